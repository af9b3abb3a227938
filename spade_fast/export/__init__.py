"""`export`: networks with SPADEs as ONNX or as a program of torch.export, in standard operators
alone, or compiled by AOTInductor with this package's operators; with less to compute.

The exported network is a copy of the model in which other modules stand for its SPADEs
(network.py, layers.py). Label maps come in as whole numbers: the first convolution of a SPADE is a
look-up of rows and their sum, and γ and β are computed once for each distinct window (windows.py).
Features that nearest neighbour enlarges are convolved at their own size (runs.py). Spectral norm
is folded, and so are the running statistics of batch norms.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from ..arguments import whole_number
from ..layout import SemanticLayout
from ..nn.generator import SPADEGenerator
from .files import (
    as_onnx,
    check_packages,
    quiet,
    version,
    write_onnx,
    write_package,
    write_program,
)
from .network import Itself, Labels, Network, network_of, ways_of
from .sizes import (
    conditions_of,
    other_inputs,
    placeholders,
    shapes_of_inputs,
    shapes_of_outputs,
)

__all__ = ["Written", "export"]

Format = Literal["onnx", "pt2", "aoti"]
FORMATS: tuple[Format, ...] = get_args(Format)
DYNAMIC = ("batch", "sizes")
# The largest difference from the model's own result, relative to its largest value.
AGREES = {torch.float64: 1e-8, torch.float32: 1e-4}
AGREES_IN_HALF = 2e-2
MOST_LINES = 8  # of conditions that a description shows


class Written(NamedTuple):
    """What `export` wrote.

    inputs, outputs: dtype and shape by name, in the network's order. A size that may differ from
        the example's is "any", or "some" if `where` says which.
    where: the conditions that the sizes of all inputs that it takes fulfil, such as "x.shape[2] ==
        segmap.shape[2]", because the network needs it or asked it of the example's sizes.
    ways: how many SPADEs compute γ and β in each way.
    difference: the largest difference from the model's own result, relative to its largest value:
        on the example, and with dynamic sizes on one of other sizes.
    measured_in: where: "ONNX Runtime", "AOTInductor" or "PyTorch".
    """

    path: Path
    inputs: dict[str, str]
    outputs: dict[str, str]
    where: list[str]
    ways: dict[str, int]
    difference: float
    measured_in: str

    def __str__(self) -> str:
        lines = [f"{self.path} is written."]
        lines += [f"input {name}: {of}" for name, of in self.inputs.items()]
        lines += [f"output {name}: {of}" for name, of in self.outputs.items()]
        lines += [f"where {condition}" for condition in self.where[:MOST_LINES]]
        if len(self.where) > MOST_LINES:
            lines.append(f"and {len(self.where) - MOST_LINES} more conditions: see where")
        ways = [f"SPADEs {way}: {count}" for way, count in self.ways.items() if count]
        lines += ways or ["no SPADE was found: the network is as torch.export records it"]
        where = self.measured_in
        lines.append(f"largest difference from the model, in {where}: {self.difference:.1e}")
        return "\n".join(lines)


def export(
    model: nn.Module,
    path: str | os.PathLike,
    arguments: Sequence[Any] | None = None,
    *,
    to: Format | None = None,
    windows: bool = True,
    instances: bool = False,
    dont_care: int | None = None,
    label_shift: int = 0,
    dynamic: Sequence[Literal["batch", "sizes"]] = ("batch",),
) -> Written:
    """Writes a model for inference elsewhere: as ONNX, for ONNX Runtime, TensorRT and others, or as
    a program that `torch.export.load` reads. It has standard operators alone, and computes what the
    model computes in eval mode, with its sums in another order. The model stays as it is.

    With to="aoti" it is compiled by AOTInductor, for the kind of processor that compiles it, and
    `torch._inductor.aoti_load_package` reads it. The modulation is an operator of this package, so
    import spade_fast before loading it.

    The SPADEs of other people's models are found and proved as `convert` does it.

    Args:
        model: a SPADEGenerator, or any module with SPADEs.
        path: the file, which is replaced only when it is complete.
        arguments: an example of the arguments to call the model with, tensors and constants. With a
            SemanticLayout in place of a condition, the exported network takes label maps: int64
            [N, *spatial], with the layout's size and channels. None: a layout, and z if there is
            one, for a SPADEGenerator.
        to: "onnx", "pt2" or "aoti", whose path ends with .pt2, too; by default, the suffix of the
            path.
        windows: for label maps, compute γ and β once for each distinct window. The graph numbers
            the windows with ONNX's Unique, whose results have a length that depends on the labels.
            Engines without it, such as TensorRT and Core ML, need False, and so does AOTInductor: γ
            and β are then convolved at every pixel.
        instances: whether the last channel of the condition has the edges of instances. The network
            then takes instance maps beside label maps, int64 of the same shape.
        dont_care: the label that stands for the last class, "don't care"; None: there is none.
        label_shift: added to any other label to get its class.
        dynamic: what may differ from the example: "batch", the number of images; "sizes", the
            spatial sizes, where the network itself does not fix them. It may relate them to each
            other: see `Written`.

    Returns:
        A description of what was written, which the file has in its metadata, too.

    Raises:
        ValueError, TypeError: an argument is not as described above; the network cannot be recorded
            or takes no label maps; or what was recorded does not compute what the model computes on
            the example or, with dynamic sizes, on one of other sizes. Nothing is written then.
        RuntimeError: AOTInductor cannot compile it, for example for lack of a C++ compiler.
        ModuleNotFoundError: ONNX needs the packages onnx and onnxscript.
        OSError: the file cannot be written.

    A label that is no class is an error when ONNX Runtime or PyTorch runs the network.
    """
    path = Path(path)
    kind = format_of(path, to)
    check_model(model)
    varies = checked("dynamic", dynamic, DYNAMIC)
    if arguments is None:
        arguments = example_of(model)
    elif isinstance(arguments, (torch.Tensor, SemanticLayout)):
        arguments = (arguments,)
    labels = labels_of(arguments, instances, dont_care, label_shift)
    if kind == "onnx":
        check_packages()
    if kind == "aoti" and labels is not None and windows:
        raise ValueError(
            "windows is True; for AOTInductor it should be False: the compiler of PyTorch 2.13"
            " computes wrong sums for a number of windows that depends on the labels"
        )
    any_size = "sizes" in varies
    settings = {"any_size": any_size, "kernels": kind == "aoti"}
    settings["gathers"] = any_size and kind == "onnx"
    network, inputs, truth = network_of(model, arguments, labels, windows, **settings)
    difference = compare(truth, result_of(network, inputs))
    names = names_of_inputs(model, arguments, labels)
    outputs = [one for one in tree_leaves(truth) if isinstance(one, torch.Tensor)]
    of_outputs = ["image"] if isinstance(model, SPADEGenerator) else ["output"]
    if len(outputs) > 1:
        of_outputs = [f"output_{number}" for number in range(len(outputs))]
    program = recorded(network, inputs, names, varies)
    trials = [Trial(inputs, truth)]
    if any_size:
        other, apart = trial_of_other_sizes(program, inputs, Itself(model, network, labels))
        trials, difference = [*trials, other], max(difference, apart)
    where = conditions_of(program, names)
    found = Written(
        path,
        shapes_of_inputs(program, names, where),
        shapes_of_outputs(program, of_outputs),
        where,
        ways_of(network),
        difference,
        "PyTorch",
    )
    description: dict[str, Any] = {
        "version": version(),
        "model": type(model).__name__,
        "inputs": found.inputs,
        "outputs": found.outputs,
        "where": found.where,
        "spades": found.ways,
    }
    if labels is not None:
        description["labels"] = labels._asdict()
    if kind == "pt2":
        write_program(program, path, description)
        return found
    measured: list[float] = []

    def check(run: Callable[[Sequence[torch.Tensor]], Any]) -> None:
        measured.extend(compare(trial.truth, run(trial.inputs)) for trial in trials)

    if kind == "aoti":
        write_package(program, path, description, check)
        return found._replace(difference=max(measured), measured_in="AOTInductor")
    ran = write_onnx(as_onnx(program, names, of_outputs), path, description, inputs, check)
    return found._replace(difference=max(measured), measured_in="ONNX Runtime") if ran else found


def format_of(path: Path, to: str | None) -> str:
    """The format to write. Errors: ValueError, or FileNotFoundError."""
    found = path.suffix.removeprefix(".") if to is None else to
    if found not in FORMATS:
        what = f"path is {path}; its suffix" if to is None else f"to is {to!r}; it"
        raise ValueError(f"{what} should be one of {', '.join(FORMATS)}")
    if found == "aoti" and path.suffix != ".pt2":
        raise ValueError(f"path is {path}; its suffix should be .pt2, as AOTInductor requires")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.parent} should be a folder to write {path.name} into")
    return found


def checked(name: str, given: Sequence[str], allowed: Sequence[str]) -> set[str]:
    if isinstance(given, str) or not set(given) <= set(allowed):
        raise ValueError(f"{name} is {given!r}; it should be a list of {', '.join(allowed)}")
    return set(given)


def check_model(model: nn.Module) -> None:
    """Raises TypeError or ValueError unless the model can be copied and run."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it should be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise TypeError("model is scripted or compiled; it should be the module before that")
    tensors = [*model.parameters(), *model.buffers()]
    if not tensors or any(nn.parameter.is_lazy(one) or one.is_meta for one in tensors):
        raise ValueError("model has no weights, or lazy or meta ones; they should have values")


def example_of(model: nn.Module) -> list[Any]:
    """The arguments of a SPADEGenerator, at the size of its images."""
    if not isinstance(model, SPADEGenerator):
        raise ValueError(
            f"arguments is None; for a {type(model).__name__} it should be an example of the"
            " arguments to call it with, with a SemanticLayout in place of a label map's condition"
        )
    size = [model.last_scale * length for length in model.sizes[-1]]
    nothing = torch.zeros(1, *size, dtype=torch.long)
    arguments: list[Any] = [SemanticLayout.from_labels(nothing, model.label_nc)]
    if model.z_dim is not None:
        weight = model.fc.weight
        assert isinstance(weight, torch.Tensor)
        random = torch.Generator().manual_seed(0)
        arguments.append(torch.randn(1, model.z_dim, generator=random).to(weight))
    return arguments


def labels_of(
    arguments: Sequence[Any], instances: bool, dont_care: int | None, label_shift: int
) -> Labels | None:
    """How label maps stand for the condition; None if the arguments have no layout. Errors:
    ValueError or TypeError.
    """
    layouts = [one for one in arguments if isinstance(one, SemanticLayout)]
    label_shift = whole_number("label_shift", label_shift)
    dont_care = None if dont_care is None else whole_number("dont_care", dont_care)
    if len(layouts) > 1:
        raise ValueError(f"arguments has {len(layouts)} SemanticLayouts; it should have one")
    if not layouts:
        if instances or dont_care is not None or label_shift:
            raise ValueError(
                "instances, dont_care and label_shift are for label maps: arguments should have a"
                " SemanticLayout"
            )
        return None
    channels = layouts[0].label_nc
    classes = channels - bool(instances) - (dont_care is not None)
    if channels < 2 or classes < 1:
        raise ValueError(
            f"the layout in arguments has {channels} channels; it should have one for each class,"
            " then one for dont_care and one for instances where they are given, and 2 or more"
        )
    return Labels(classes, dont_care, bool(instances), label_shift)


def names_of_inputs(model: nn.Module, arguments: Sequence[Any], labels: Labels | None) -> list[str]:
    """The names of the exported network's inputs: those of the model's parameters."""
    forward = getattr(type(model), "own_class", type(model)).forward
    parameters = iter(list(inspect.signature(forward).parameters.values())[1:])
    names: list[str] = []
    for number, argument in enumerate(arguments):
        parameter = next(parameters, None)
        if isinstance(argument, SemanticLayout):
            assert labels is not None
            names += ["labels", "instances"][: 1 + labels.instances]
        elif isinstance(argument, torch.Tensor):
            several = parameter is None or parameter.kind is parameter.VAR_POSITIONAL
            name = f"input_{number}" if several or parameter is None else parameter.name
            names.append(f"input_{number}" if name in ("labels", "instances", *names) else name)
    return names


def result_of(network: Network, inputs: Sequence[torch.Tensor]) -> Any:
    """The network's result before it is exported. Errors: ValueError if it takes no label maps."""
    try:
        return network.run(inputs)
    except Exception as error:  # of any type, from the model's own forward
        if network.codes is None:
            raise
        raise ValueError(
            "model cannot take label maps, but only the condition itself: give it as a tensor in"
            f" place of the SemanticLayout ({type(error).__name__}: {error})"
        ) from error


def compare(truth: Any, found: Any) -> float:
    """The largest difference between two results, relative to the largest value of each tensor.
    Errors: ValueError if it is larger than roundings.
    """
    worst = 0.0
    pairs = zip(tree_leaves(truth), tree_leaves(found), strict=True)
    for one, other in pairs:
        if not isinstance(one, torch.Tensor):
            continue
        if one.shape != other.shape:
            raise ValueError(
                f"model returns the shape {list(one.shape)}, and what is to be exported"
                f" {list(other.shape)}; give the condition as a tensor, or use torch.onnx.export"
            )
        largest = one.abs().max().item() if one.numel() else 0.0
        apart = (one.cpu().double() - other.cpu().double()).abs()
        worst = max(worst, apart.max().item() / (largest or 1.0) if apart.numel() else 0.0)
        # Written so that NaN does not agree.
        if not worst <= AGREES.get(one.dtype, AGREES_IN_HALF):
            raise ValueError(
                "model does not compute the same in the form to be exported: on the example, or at"
                f" other sizes, the two differ by {worst:.1e} of the largest value. It may draw"
                " random numbers, or treat its condition in a way that is not known here: give the"
                " condition as a tensor, or use torch.onnx.export"
            )
    return worst


class Trial(NamedTuple):
    """Inputs of the network, and what the model itself makes of them."""

    inputs: Sequence[torch.Tensor]
    truth: Any


def trial_of_other_sizes(
    program: torch.export.ExportedProgram, inputs: Sequence[torch.Tensor], itself: Itself
) -> tuple[Trial, float]:
    """Inputs at other sizes than the example's, and the program's difference from the model there.
    Errors: ValueError if there are none that both take, or the two differ.
    """
    run, reason = program.module(), ""
    for others in other_inputs(program, inputs):
        try:
            truth = itself.run(others)
        except Exception as error:  # of any type, from the model's own forward
            reason = f"{type(error).__name__}: {error}"
            continue
        try:
            found = run(*others)
        except AssertionError as error:  # they are not as `conditions_of` describes
            reason = str(error)
            continue
        except Exception as error:  # of any type, from an operation that was recorded
            raise ValueError(
                "what was recorded of the model fails at other sizes, which the model takes;"
                f" dynamic should be without 'sizes' ({type(error).__name__}: {error})"
            ) from error
        return Trial(others, truth), compare(truth, found)
    raise ValueError(
        "model and what was recorded of it take none of the other sizes that were tried; dynamic"
        f" should be without 'sizes' ({reason})"
    )


def recorded(
    network: Network, inputs: Sequence[torch.Tensor], names: Sequence[str], dynamic: set[str]
) -> torch.export.ExportedProgram:
    """The program of torch.export. Errors: ValueError if it cannot be recorded as asked."""
    inputs = list(inputs)
    shapes: list[dict[int, Any]] = [{} for _ in inputs]
    if "batch" in dynamic:
        batches = {name: one.shape[0] for name, one in zip(names, inputs) if one.dim()}
        if len(set(batches.values())) > 1:
            words = ", ".join(f"{name} {number}" for name, number in batches.items())
            raise ValueError(
                f"arguments have these batches: {words}; they should be equal, or dynamic should"
                " be without 'batch'"
            )
        batch = torch.export.Dim("batch", min=1)
        shapes = [{0: batch} if one.dim() else {} for one in inputs]
        # A batch of 1 in the example would be fixed.
        if set(batches.values()) == {1}:
            inputs = [torch.cat([one, one]) if one.dim() else one for one in inputs]
    if "sizes" in dynamic:
        auto = torch.export.Dim.AUTO
        for one, shape in zip(inputs, shapes):
            first = 2 if one.is_floating_point() else 1
            shape.update(dict.fromkeys(range(first, one.dim()), auto))
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(network, tuple(inputs), dynamic_shapes=(tuple(shapes),))
    except Exception as error:  # of many types
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"torch.export cannot record the model with dynamic={tuple(sorted(dynamic))}: {reason}"
        ) from error
    network.shared.kept.clear()
    for name, node, shape in zip(names, placeholders(program), shapes):
        fixed = [dim for dim in shape if str(node.meta["val"].shape[dim]).isdigit()]
        if fixed:
            raise ValueError(
                f"the model fixes the size of {name} along axis {fixed[0]}; dynamic should be"
                f" without {'batch' if fixed[0] == 0 else 'sizes'!r}"
            )
    return program
