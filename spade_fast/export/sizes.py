"""The sizes that a recorded program takes: in words, and other ones than the example's to try."""

import re
from collections.abc import Iterator, Sequence

import torch

OF_INPUT = re.compile(r"L\['inputs'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
ONE_BATCH = re.compile(r"\w+\.shape\[0\] == \w+\.shape\[0\]")


def conditions_of(program: torch.export.ExportedProgram, names: Sequence[str]) -> list[str]:
    """The conditions, in Python, that the sizes of all inputs that the program takes fulfil: the
    network needs it or asked it of the example's sizes. That all have one batch is left out.
    """

    def named(found: re.Match) -> str:
        number, dim = found.groups()
        return f"{names[int(number)]}.shape[{dim}]"

    conditions = [OF_INPUT.sub(named, guard) for guard in program._guards_code]
    return [one for one in dict.fromkeys(conditions) if not ONE_BATCH.fullmatch(one)]


def placeholders(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    """The program's inputs, without its weights."""
    wanted = program.graph_signature.user_inputs
    return [
        node for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted
    ]


def shapes_of_inputs(
    program: torch.export.ExportedProgram, names: Sequence[str], conditions: Sequence[str]
) -> dict[str, str]:
    """dtype and shape in words, by name. A size that may differ is "any", or "some" where a
    condition speaks of it.
    """
    found = {}
    for name, node in zip(names, placeholders(program)):
        own = [f"{name}.shape[{dim}]" for dim in range(node.meta["val"].dim())]
        words = ["some" if is_in(size, conditions) else "any" for size in own]
        found[name] = in_words(node.meta["val"], words)
    return found


def is_in(size: str, conditions: Sequence[str]) -> bool:
    """Whether a condition speaks of a size, "x.shape[2]", and not of one that only ends so."""
    return any(re.search(rf"\b{re.escape(size)}", one) for one in conditions)


def shapes_of_outputs(
    program: torch.export.ExportedProgram, names: Sequence[str]
) -> dict[str, str]:
    """dtype and shape in words, by name."""
    nodes = {node.name: node for node in program.graph.nodes}
    values = [nodes[one].meta["val"] for one in program.graph_signature.user_outputs]
    return {name: in_words(one, ["any"] * one.dim()) for name, one in zip(names, values)}


def in_words(value: torch.Tensor, words: Sequence[str]) -> str:
    """dtype and shape, with these words for sizes that are no numbers."""
    sizes = [size if size.isdigit() else word for size, word in zip(map(str, value.shape), words)]
    return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(sizes)}]"


def other_inputs(
    program: torch.export.ExportedProgram, inputs: Sequence[torch.Tensor]
) -> Iterator[list[torch.Tensor]]:
    """The inputs at other sizes than the example's, in a few ways: the network may take some of
    them alone.
    """
    shapes = [node.meta["val"].shape for node in placeholders(program)]
    lengths = {
        size.node.expr: length
        for shape, one in zip(shapes, inputs)
        for size, length in zip(shape, one.shape)
        if isinstance(size, torch.SymInt) and size.node.expr.is_symbol
    }
    numbered = list(enumerate(lengths.items()))
    for values in (
        {symbol: length + 1 + number for number, (symbol, length) in numbered},  # other ratios
        # Multiples, as networks need that halve their sizes: of some lengths, then of all.
        {symbol: length * (2 if number % 4 < 2 else 1) for number, (symbol, length) in numbered},
        {symbol: length * 2 for symbol, length in lengths.items()},
    ):
        yield [at_sizes(one, shape, values) for one, shape in zip(inputs, shapes)]


def at_sizes(one: torch.Tensor, shape: Sequence[int | torch.SymInt], values: dict) -> torch.Tensor:
    """A tensor, continued by itself or cut off, in a shape with these values of its symbols."""
    for dim, size in enumerate(shape):
        if isinstance(size, torch.SymInt):
            wanted = int(size.node.expr.subs(values))
            places = torch.arange(wanted, device=one.device) % one.shape[dim]
            one = one.index_select(dim, places)
    return one
