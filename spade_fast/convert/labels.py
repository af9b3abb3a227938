"""Recognises norms whose γ and β are rows of parameters, looked up by each pixel's label, as in
CLADE: one run of the own forward shows which parameter makes the factor and which the summand.
"""

import warnings
from itertools import permutations, product

import torch
import torch.nn as nn

from ..nn.parts import Form, part_of
from ..nn.pixels import resize
from .copies import Values, copy_of, trying
from .roles import EXACT, PIXELS, SIZES, OwnForwardFails, Unlike, convolutions_of, trace
from .swap import Call, Called


def label_tables(module: nn.Module, norms: list[str]) -> tuple[str, str] | None:
    """The names of two parameters of one shape [labels, channels] in a module or its children but
    these norms, if there are just two and they are not the weights of linear layers.
    """
    found = {
        name: own.shape
        for name, own in module.named_parameters()
        if own.dim() == 2 and name.count(".") < 2 and name.split(".")[0] not in norms
    }
    if len(found) != 2 or len(set(found.values())) != 1:
        return None
    if any(isinstance(part_of(module, _owner(name)), nn.Linear) for name in found):
        return None
    first, second = found
    return first, second


def appended_convolution(
    module: nn.Module, tables: tuple[str, str], others: list[str]
) -> str | None:
    """The name of the part with one convolution that has all these other parameters, or None."""
    for name in convolutions_of(module) if others else ():
        inside = [own.startswith(f"{name}.") for own in (*tables, *others)]
        if inside == [False, False, *[True] * len(others)]:
            return name
    return None


def recognise_labels(
    module: nn.Module, norm: str, tables: tuple[str, str], appended: str | None
) -> tuple[Form, str]:
    """The Form of a module with these tables, and a description of it in words. Raises Unlike if
    its forward does something else with their rows.

    appended: the name of a part with a convolution. It should be given the channels of the
        condition that follow those of the labels, and its output should follow the channels of y.
    """
    call = Call(type(module).forward)
    failure: Unlike | None = None
    labels, channels = module.get_parameter(tables[0]).shape
    others = 0 if appended is None else convolutions_of(module)[appended].in_channels
    device = next(module.parameters()).device
    with trying(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments that are tried out
        values = Values(module)
        for dims, size, swapped in product((2, 3, 1), SIZES, (False, True)):
            torch.manual_seed(0)
            x, condition = pair = [
                torch.randn(2, *shape, dtype=torch.float64, device=device)
                for shape in ((channels, *PIXELS[:dims]), (labels + others, *size[:dims]))
            ]
            copy = copy_of(module, values(torch.float64))
            ran = trace(copy, {name: part_of(copy, name) for name in (norm, appended) if name})
            try:
                given = pair[::-1] if swapped else pair
                y = type(copy).forward(copy, *given, **dict.fromkeys(call.required))
            except Exception as error:  # the own forward may raise anything
                failure = failure or OwnForwardFails(
                    f"its own forward fails on x {list(x.shape)} and a condition"
                    f" {list(condition.shape)}: {type(error).__name__}: {error}"
                )
                continue
            of_labels, of_others = resize(condition, x.shape[2:]).split([labels, others], dim=1)
            expected = {norm: x} if appended is None else {norm: x, appended: of_others}
            found = _rows(copy, tables, of_labels.argmax(1), ran, expected, y)
            if found is not None:
                rows, plus_one = found
                gamma, beta = map(_owner, rows)
                form = Form(
                    norm,
                    None,
                    gamma,
                    beta,
                    channels,
                    labels + others,
                    dims,
                    plus_one=plus_one,
                    by_label=rows,
                    call=Called(swapped, appended=appended),
                )
                return form, _words(module, form)
            failure = Unlike(
                "its own forward does not return n · (1 + a) + b or n · a + b, where n is its norm"
                f" of x, and a and b are rows of {' and '.join(tables)} by the label of each pixel"
            )
    assert failure is not None
    raise failure


def _owner(name):
    return name.rpartition(".")[0]


def _rows(module, tables, labels, ran, expected, y):
    """The names of γ's and β's rows, and whether 1 + γ is the factor; None if y is not made so.

    ran: the calls of the norm, and of the appended part; expected: what they should be given.
    """
    calls = {own.name: own for own in ran}
    if not isinstance(y, torch.Tensor) or calls.keys() != expected.keys():
        return None
    if not all(torch.equal(calls[name].inputs[0], given) for name, given in expected.items()):
        return None
    normalised, *more = (calls[name].outputs[0] for name in expected)
    for names, plus_one in product(permutations(tables), (True, False)):
        a, b = (module.get_parameter(name)[labels].movedim(-1, 1) for name in names)
        ours = torch.cat([normalised * (a + plus_one) + b, *more], dim=1)
        if y.shape == ours.shape and (y - ours).abs().max() <= EXACT * y.abs().max():
            return names, plus_one
    return None


def _words(module, form):
    kind = type(part_of(module, form.norm)).__name__
    words = f"class-adaptive norm({form.norm_nc}, {form.label_nc}), {kind}"
    words += "" if form.plus_one else ", γ without 1 +"
    return words if form.call.appended is None else f"{words}, {form.call.appended} after y"
