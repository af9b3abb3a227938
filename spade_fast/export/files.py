"""Writes a network as ONNX, as a program of torch.export or as a package of AOTInductor, with a
description of itself.
"""

import contextlib
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..writing import written

PACKAGE = __name__.partition(".")[0]  # also the key of the description in a file's metadata
Run = Callable[[Sequence[torch.Tensor]], Any]  # the inputs of a network to its results
MOST_BYTES = 2**31 - 1  # of an ONNX file
POINTWISE = ("LeakyRelu", "Relu", "Sigmoid")  # with a single input
# What ONNX Runtime computes in the usual memory layout, beside convolutions.
OTHER_LAYOUTS = ("InstanceNormalization", "Transpose")
BLOCK = 16  # channels, float32; other maps are not in that layout


def version() -> str:
    """The version of this package, which imports this module."""
    return importlib.import_module(PACKAGE).__version__


def check_packages() -> None:
    """Raises ModuleNotFoundError unless ONNX can be written."""
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"to write ONNX, install two packages: pip install onnx onnxscript ({error})"
        ) from error


def write_program(
    program: torch.export.ExportedProgram, path: Path, description: Mapping[str, Any]
) -> None:
    """Writes a program, which `torch.export.load` reads."""
    with written(path) as unfinished, open(unfinished, "wb") as file:
        extra = {f"{PACKAGE}.json": json.dumps(description)}
        torch.export.save(program, file, extra_files=extra)


def write_package(
    program: torch.export.ExportedProgram,
    path: Path,
    description: Mapping[str, Any],
    check: Callable[[Run], None],
) -> None:
    """Compiles a program with AOTInductor, and writes it if `check`, which may run it, accepts it.
    Errors: RuntimeError if it cannot be compiled.
    """
    settings = {"aot_inductor.metadata": {PACKAGE: json.dumps(description)}}
    with written(path) as unfinished:
        try:
            with quiet():
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(unfinished), inductor_configs=settings
                )
        except Exception as error:  # of many types
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise RuntimeError(f"AOTInductor cannot compile the network: {reason}") from error
        package = torch._inductor.aoti_load_package(str(unfinished))
        check(lambda inputs: package(*inputs))


def as_onnx(
    program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]
) -> Any:
    """A program in the operators of ONNX: a torch.onnx.ONNXProgram."""
    with quiet():
        converted = torch.onnx.export(
            program, input_names=inputs, output_names=outputs, dynamo=True, verbose=False
        )
    assert converted is not None
    for node in list(converted.model.graph):
        activate_first(node)
        keep_blocks(node)
    return converted


def activate_first(node: Any) -> None:
    """Moves a transposition behind the activation that follows it: ONNX Runtime makes one of a
    transposition and the reordering of a convolution's input if nothing is in between.
    """
    if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
        return
    users = [use.node for use in node.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type not in POINTWISE:
        return
    # The two nodes exchange what they are, and keep their inputs and outputs.
    (other,) = users
    node.op_type, other.op_type = other.op_type, node.op_type
    own, others = (list(one.attributes.values()) for one in (node, other))
    for one, attributes in ((node, others), (other, own)):
        one.attributes.clear()
        for attribute in attributes:
            one.attributes.add(attribute)
    node.outputs[0].shape = node.inputs[0].shape


def keep_blocks(node: Any) -> None:
    """Puts a pooling of single pixels, which changes nothing, behind a node whose result meets
    convolutions. ONNX Runtime has a memory layout of its own for them, in which it adds and
    multiplies if both operands come in it, and into which it brings a result once for each use.
    Pooling takes its input into that layout.
    """
    (value, *others), uses = node.outputs, []
    shape = value.shape
    if node.op_type not in OTHER_LAYOUTS or others or shape is None or len(shape) != 4:
        return
    ir = importlib.import_module("onnxscript").ir
    if not isinstance(shape[1], int) or shape[1] % BLOCK or value.dtype != ir.DataType.FLOAT:
        return
    for user, place in value.uses():
        if user.op_type in ("Add", "Mul"):
            other = user.inputs[1 - place].producer()
            uses += [(user, place)] * (2 if other is not None and other.op_type == "Conv" else 0)
        elif user.op_type == "Conv":
            uses.append((user, place))
    if len(uses) < 2:
        return
    sides = [ir.AttrInt64s("kernel_shape", [1, 1])]
    pool = ir.Node("", "MaxPool", [value], sides, name=f"{node.name}_kept")
    (kept,) = pool.outputs
    kept.name, kept.shape, kept.type = f"{value.name}_kept", shape, value.type
    node.graph.insert_after(node, pool)
    for user, place in uses:
        user.replace_input_with(place, kept)


def write_onnx(
    converted: Any,
    path: Path,
    description: Mapping[str, Any],
    inputs: Sequence[torch.Tensor],
    check: Callable[[Run], None],
) -> bool:
    """Writes what `as_onnx` returns. Where ONNX Runtime can run it on inputs like these, `check`
    runs it first. Returns whether it did.

    Errors: ValueError if the file would be larger than ONNX allows.
    """
    model = converted.model_proto
    model.producer_name, model.producer_version = PACKAGE, version()
    entry = model.metadata_props.add()
    entry.key, entry.value = PACKAGE, json.dumps(description)
    size = model.ByteSize()
    if size > MOST_BYTES:
        raise ValueError(
            f"the network takes {size} bytes in ONNX, whose files have at most {MOST_BYTES}:"
            " write it as .pt2"
        )
    content = model.SerializeToString()
    run = in_onnx_runtime(content, inputs)
    if run is not None:
        check(run)
    with written(path) as unfinished:
        unfinished.write_bytes(content)
    return run is not None


def in_onnx_runtime(content: bytes, inputs: Sequence[torch.Tensor]) -> Run | None:
    """Runs a network in ONNX Runtime; None if it is not installed, or the inputs are not of
    float32, in which alone it has all operators on a CPU.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    if any(one.dtype not in (torch.float32, torch.int64) for one in inputs):
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        given = {name: one.cpu().numpy() for name, one in zip(names, inputs, strict=True)}
        return [torch.from_numpy(one) for one in session.run(None, given)]

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, torch's exporters do not tell of packages and functions that are not needed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
