"""Recognises a SPADE or its residual block by its parts. Names only decide which modules are
examined, not what they are.
"""

import torch.nn as nn
from torch.nn.modules import padding

from ..nn.block import ACTIVATIONS
from ..nn.modules import CONVOLUTION_TYPES, CONVOLUTIONS
from ..nn.parts import Form
from ..nn.spade import SpatiallyAdaptive


class Unlike(Exception):
    """The reason why a module is left as it was."""


def looks_like_spade(module: nn.Module) -> bool:
    """Whether a module has children for γ and for β."""
    names = [name.lower() for name, _ in module.named_children()]
    return any("gamma" in name for name in names) and any("beta" in name for name in names)


def recognise_spade(module: nn.Module) -> tuple[Form, str]:
    """The Form of a SPADE, and a description of it in words. Raises Unlike if it is not one."""
    children = dict(_only_child(name, child) for name, child in module.named_children())
    convolutions = {
        name: [part for part in child.modules() if isinstance(part, CONVOLUTION_TYPES)]
        for name, child in children.items()
    }

    def only(what, names):
        if len(names) != 1:
            raise Unlike(f"it has {', '.join(names) or 'nothing'} for {what}; it should have one")
        return names[0]

    def with_convolution(word):
        return [name for name in children if word in name.lower() and convolutions[name]]

    gamma, beta = only("gamma", with_convolution("gamma")), only("beta", with_convolution("beta"))
    shared = only(
        "the convolution before gamma and beta",
        [name for name in children if convolutions[name] and name not in (gamma, beta)],
    )
    for name in (gamma, beta, shared):
        numbers = range(1, len(convolutions[name]) + 1)
        only(f"the convolution of {name}", [f"convolution {number}" for number in numbers])
    first, second, third = (convolutions[name][0] for name in (shared, gamma, beta))
    if (
        not first.out_channels == second.in_channels == third.in_channels
        or second.out_channels != third.out_channels
    ):
        raise Unlike(f"the channels of {shared}, {gamma} and {beta} do not match those of a SPADE")
    others = [name for name in children if name not in (gamma, beta, shared)]
    pads = [name for name in others if _is_of(children[name], padding)]
    pad = only("padding", pads) if pads else None
    norm = only(
        "the norm",
        [name for name in others if name not in pads and not _is_of(children[name], nn.ReLU)],
    )
    used = {
        id(tensor) for name in (gamma, beta, shared, norm) for tensor in children[name].parameters()
    }
    unused = [name for name, tensor in module.named_parameters() if id(tensor) not in used]
    if unused:
        raise Unlike(f"it has parameters that a SPADE does not have: {', '.join(unused)}")
    dims = next(dims for dims, kind in CONVOLUTIONS.items() if isinstance(first, kind))
    form = Form(norm, shared, gamma, beta, second.out_channels, first.in_channels, dims, pad)
    sizes = f"{form.norm_nc}, {form.label_nc}, {first.out_channels}"
    return form, f"SPADE({sizes}), {type(children[norm]).__name__}"


def _only_child(name, child):
    """A child and its name. If the child is a ModuleList of one module, that module instead."""
    if isinstance(child, nn.ModuleList) and len(child) == 1:
        return _only_child(f"{name}.0", child[0])
    return name, child


def _is_of(module, like):
    """Whether a module has no parameters, and its class is defined in the file `like`, which is
    given as a Python module or as a class defined there.
    """
    home = getattr(like, "__module__", None) or like.__name__
    return type(module).__module__ == home and not list(module.parameters())


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
    form = first.spade_form._replace(inside=False)  # those parts are the SPADE's
    words = f"residual block {form.norm_nc} → {second.spade_form.norm_nc}"
    if not any(type(part) in ACTIVATIONS for part in module.children()):
        words += ", leaky ReLU of slope 0.2 (no activation module)"
    return form, words
