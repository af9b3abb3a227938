"""Recognises a SPADE or its residual block. Names and channels only decide which modules are
examined; what their parts do is found by running them (roles.py).
"""

import torch.nn as nn
from torch.nn.modules.batchnorm import _NormBase

from ..nn.block import activation_of
from ..nn.parts import Form, part_of
from ..nn.spade import SpatiallyAdaptive
from .labels import appended_convolution, label_tables, recognise_labels
from .roles import (
    Unlike,
    convolutions_of,
    dimensions_of,
    find_roles,
    halved,
    normalised_channels,
    pairs,
    parts_by_name,
)
from .swap import Call, Called


def looks_like_spade(module: nn.Module) -> bool:
    """Whether a module may be a SPADE: it has children for gamma and for beta, or else one norm,
    two convolutions from and to the same channels or one with twice the norm's channels, nothing
    with parameters but that and further convolutions, and a forward of two arguments. Two
    `label_tables` may be in the place of the convolutions.
    """
    children = dict(module.named_children())
    names = [name.lower() for name in children]
    if any("gamma" in name for name in names) and any("beta" in name for name in names):
        return True
    norms = _norms_in(module)
    if len(norms) == 1 and label_tables(module, norms):
        return _takes_two(module)
    convolutions = convolutions_of(module)
    found = convolutions.values()
    if len(norms) != 1 or not (pairs(found) or halved(found, normalised_channels(module))):
        return False
    parts = parts_by_name(module)
    with_parameters = {name for name, part in parts.items() if any(True for _ in part.parameters())}
    if not with_parameters <= {*norms, *convolutions}:
        return False
    return _takes_two(module)


def _norms_in(module):
    return [name for name, child in module.named_children() if _may_be_norm(child)]


def _may_be_norm(module):
    return isinstance(module, (_NormBase, nn.GroupNorm)) or "norm" in type(module).__name__.lower()


def _takes_two(module):
    call = Call(type(module).forward)
    return call.several or len(call.names) > 1


def recognise_spade(module: nn.Module) -> tuple[Form, str]:
    """The Form of a SPADE, and a description of it in words. Raises Unlike if it is not one."""
    norms = _norms_in(module)
    tables = label_tables(module, norms) if len(norms) == 1 else None
    if tables is not None:
        others = [name for name, _ in module.named_parameters() if name not in tables]
        others = [name for name in others if name.split(".")[0] not in norms]
        appended = appended_convolution(module, tables, others)
        _check_parameters(module, others if appended is None else [])
        return recognise_labels(module, norms[0], tables, appended)
    _check_parameters(module, [name for name, _ in module.named_parameters(recurse=False)])
    roles = find_roles(module)
    names = (roles.norm, roles.shared, roles.gamma, roles.beta, roles.pad, roles.added)
    used = {
        id(tensor)
        for name in names
        if name is not None
        for tensor in part_of(module, name).parameters()
    }
    _check_parameters(
        module, [name for name, own in module.named_parameters() if id(own) not in used]
    )
    convolutions = convolutions_of(module)
    gamma = convolutions[roles.gamma]
    channels = roles.channels
    form = Form(
        roles.norm,
        roles.shared,
        roles.gamma,
        roles.beta,
        channels,
        roles.label_nc,
        dimensions_of(gamma),
        roles.pad,
        roles.added,
        roles.plus_one,
        roles.apart,
        roles.halves,
        call=roles.call,
    )
    sizes = [channels, roles.label_nc]
    if roles.shared is not None:
        sizes.append(convolutions[roles.shared].out_channels)
    kind = "SPADE" if roles.shared is not None else "spatial norm"
    without = "" if roles.plus_one else ", γ without 1 +"
    norm = type(part_of(module, roles.norm)).__name__
    return form, f"{kind}({', '.join(map(str, sizes))}), {norm}{without}"


def _check_parameters(module, unused):
    if unused:
        raise Unlike(f"it has parameters that a SPADE does not have: {', '.join(unused)}")


def looks_like_block(module: nn.Module) -> bool:
    """Whether a module has the children of a residual block, and its SPADEs are fast."""
    children = dict(module.named_children())
    needed = {"norm_0", "norm_1", "conv_0", "conv_1"}
    if not needed <= children.keys() or ("norm_s" in children) != ("conv_s" in children):
        return False
    norms = [children[name] for name in ("norm_0", "norm_1", "norm_s") if name in children]
    return all(isinstance(norm, SpatiallyAdaptive) for norm in norms)


def recognise_block(module: nn.Module) -> tuple[Form, str]:
    """The Form of a block's norm_0, which gives the block's input sizes, and a description of the
    block in words.
    """
    first, second = module.norm_0, module.norm_1
    assert isinstance(first, SpatiallyAdaptive) and isinstance(second, SpatiallyAdaptive)
    norms = [module._modules.get(name) for name in ("norm_0", "norm_1", "norm_s")]
    forms = [norm.spade_form for norm in norms if isinstance(norm, SpatiallyAdaptive)]
    if any(form.apart or (form.call or Called()) != Called() for form in forms):
        raise Unlike("its SPADEs take or return more than the published ones do")
    form = first.spade_form._replace(inside=False)  # those parts are the SPADE's
    words = f"residual block {form.norm_nc} → {second.spade_form.norm_nc}"
    if activation_of(module) is None:
        words += ", leaky ReLU of slope 0.2 (no activation module)"
    return form, words
