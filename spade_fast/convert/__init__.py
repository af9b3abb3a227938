"""`convert`: finds the SPADEs of other people's models, proves that it has understood each, and
makes them fast in place.

A module stays the same object, with its parameters, buffers and hooks. Its class becomes a subclass
of its own class (swap.py), which runs the forward of `nn/spade.py` or `nn/block.py` for every call
that was proved. Where these do not compute all that a module does, its own forward runs, with the
modulation in it as one operation (fuse.py).

A SPADE is recognised by what its parts do, not by their names (roles.py), and then proved
(prove.py): on small random tensors the outputs, gradients and buffers must match those of
its own forward, in float64 and in its own dtype, in train and in eval mode, with and without
autocast.
"""

from contextlib import suppress
from itertools import product

import torch
import torch.nn as nn

from .. import kernels
from ..nn.block import ResidualBlock
from ..nn.modules import NeverTheSame, check_module, leaves
from ..nn.parts import Parts
from ..nn.spade import SpatiallyAdaptive
from ..recording import has_values
from .own import recognise_own
from .prove import CONDITIONS, prove
from .recognise import (
    Unlike,
    looks_like_block,
    looks_like_spade,
    recognise_block,
    recognise_spade,
)
from .report import Entry, Report
from .swap import (
    Call,
    Fast,
    FastBlock,
    FastModulation,
    FastSPADE,
    Proof,
    kinds_of_children,
    make_fast,
    make_own,
    marks,
    marks_of_class,
)

__all__ = ["Entry", "Fast", "Report", "convert", "revert"]


def convert(model: nn.Module, *, probe: bool = True, blocks: bool = True) -> Report:
    """Makes the SPADEs of a model fast, in place: parameters, buffers, hooks, state_dict keys and
    results stay the same.

    A converted module takes every call that its own forward takes. It falls back to its own forward
    for any call that was not proved: one with further arguments that differ from their defaults, or
    one in a mode, under an autocast or with attributes (`module.strength = 0`) for which the two
    forwards were not found to agree.

    Args:
        model: any torch.nn.Module. Its SPADEs are found by their structure; the report says what
            was not converted, and why.
        probe: prove each module against its own forward, by outputs, gradients and buffers on small
            random tensors.
        blocks: convert residual blocks of the published shape (norm_0, norm_1, norm_s, conv_0,
            conv_1, conv_s) as well.

    Returns:
        The Report. `revert(model)` undoes the conversion.

    Raises:
        TypeError: if the model is not a module, or is scripted, traced or compiled.
    """
    check_module("model", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model is scripted or traced, so its forward is fixed; it should be the module before"
            " that. torch.jit.trace takes a converted module, torch.jit.script does not"
        )
    if hasattr(model, "_orig_mod"):
        raise TypeError("model is compiled; convert it before torch.compile")
    entries = {}
    for name, module in model.named_modules():
        if looks_like_spade(module):
            entries[name] = _convert(name, module, FastSPADE, recognise_spade, probe)
    for name, module in model.named_modules() if blocks else ():
        if looks_like_block(module):
            entries[name] = _convert(name, module, FastBlock, recognise_block, probe)
    return Report(entries[name] for name, _ in model.named_modules() if name in entries)


def revert(model: nn.Module) -> int:
    """Restores the own class of each module that `convert` converted. Returns the number of such
    modules. Errors: TypeError if the model is not a module.
    """
    check_module("model", model)
    found = [module for module in model.modules() if isinstance(module, Fast)]
    for module in found:
        make_own(module)
    return len(found)


def _convert(name, module, kind, recognise, probe):
    def entry(recognised_as, converted, reason):
        own_class = getattr(module, "own_class", type(module))
        return Entry(name, own_class.__name__, recognised_as, converted, reason)

    if isinstance(module, (Fast, SpatiallyAdaptive, ResidualBlock)):
        return entry("spade_fast's", isinstance(module, Fast), "it is fast already")
    recognised_as, exceptions = "", []
    try:
        _check_values(module)
        _check_names(module, kind)
        form, recognised_as = recognise(module)
        _check_marks(module, form)
        if probe:
            form, proof, exceptions = _proved(module, kind, form)
        else:
            proof = _trusted(module, form)
    except Unlike as unlike:
        if kind is FastBlock or not probe:
            return entry(recognised_as, False, str(unlike))
        try:
            form, recognised_as = _fused(module)
        except Unlike as neither:
            reasons = dict.fromkeys((str(unlike), str(neither)))
            return entry(recognised_as, False, "; ".join(reasons))
        make_fast(module, FastModulation, form)
        backend = kernels.select(next(module.parameters())).name
        how = f"its own forward, on large maps with its modulation as one operation; {backend}"
        return entry(recognised_as, True, f"{how}; not more, because {unlike}")
    if probe and kind is FastSPADE and _takes_more(module, form):
        with suppress(Unlike):
            form = form._replace(own=_fused(module)[0])
    make_fast(module, kind, form._replace(proof=proof))
    return entry(recognised_as, True, "; ".join([_how(module), *exceptions]))


def _fused(module):
    """The OwnForm of a module whose own forward may run with a modulation in it as one operation,
    and a description of it. Raises Unlike if there is none.
    """
    _check_values(module)
    _check_names(module, FastModulation)
    form, recognised_as = recognise_own(module)
    _check_marks(module, form)
    proof, _ = prove(module, FastModulation, form)
    # The own forward sees to it if attributes change.
    return form._replace(proof=proof._replace(marks=[], children=())), recognised_as


def _takes_more(module, form):
    """Whether a module can be called with arguments beyond x and the condition that matter."""
    call = Call(type(module).forward)
    return call.several or bool({*call.neutral} - {*call.names[:2], *form.call.ignores})


def _proved(module, kind, form):
    """The form, its proof and the exceptions to the proof. A part of an unknown class is first
    assumed to run the modules inside it one after the other, because that makes windows possible.
    If the proof fails, the part is called as a whole.
    """
    if kind is FastSPADE and _is_opaque(module, form):
        try:
            opened = form._replace(inside=True)
            return opened, *prove(module, kind, opened)
        except Unlike:
            pass
    return form, *prove(module, kind, form)


def _is_opaque(module, form):
    """Whether a part contains other modules and is not a Sequential."""
    parts = [module.get_submodule(name) for name in form.of_condition]
    return form.by_label is None and any(leaf._modules for part in parts for leaf in leaves(part))


def _check_names(module, kind):
    """Raises Unlike if the module already uses a name that its fast class needs."""
    needed = {name for own in kind.__mro__ for name in vars(own) if not name.startswith("__")}
    needed |= {"kind", "own_class", "class_marks", "call", "spade_form"}
    needed -= {"forward", "_get_name", *vars(nn.Module)}
    own = {*module.__dict__, *module._buffers, *module._parameters, *module._modules}
    own |= {name for name in needed if hasattr(type(module), name)}
    if taken := sorted(own & needed):
        raise Unlike(f"it uses names that the fast class needs: {', '.join(taken)}")


def _check_marks(module, form):
    """Raises Unlike if the module has attributes that cannot be compared in each call."""
    own, parts, wrappers = marks(module, form)
    of_others = [marked for _, marked in (*wrappers, *marks_of_class(type(module)))]
    found: dict[str, set[str]] = {}
    for marked in (own, *parts, *of_others):
        for name, mark in marked.items():
            if isinstance(mark, NeverTheSame):
                found.setdefault(mark.why, set()).add(name)
    if found:
        each = (f"attributes {why}: {', '.join(sorted(found[why]))}" for why in sorted(found))
        raise Unlike("; ".join(each))


def _check_values(module):
    """Raises Unlike if the module cannot be probed, whatever it computes."""
    if "forward" in module.__dict__:
        raise Unlike("its forward was replaced on this instance")
    tensors = [*module.parameters(), *module.buffers()]
    if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise Unlike("it has lazy parameters, which have no shape yet: call it once, then convert")
    if any(tensor.is_meta for tensor in tensors):
        raise Unlike("its parameters are on the meta device, so they have no values")
    if not all(map(has_values, tensors)):
        raise Unlike("its parameters are of a tensor subclass with its own __torch_dispatch__")


def _trusted(module, form):
    """A proof that assumes agreement in every state, without a probe."""
    both, floats = (False, True), (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return Proof(
        marks(module, form),
        kinds_of_children(module),
        tuple(product(both, both)),
        tuple(product(both, floats, floats, (None, torch.bfloat16, torch.float16))),
        frozenset(CONDITIONS),
    )


def _how(module):
    """How a converted module computes γ and β, and on which backend."""
    backend = kernels.select(next(module.parameters())).name
    if isinstance(module, FastBlock):
        return f"with its activations; {backend}"
    parts, where = Parts.of(module), "pixels"
    if parts.convolutions() is not None:
        where = "windows of labels, else pixels"
    elif module.spade_form.by_label is not None:
        where = "rows of labels"
    elif parts.pointwise() is not None:
        where = "voxels of the condition, else pixels"
    return f"{where}; {backend}"
