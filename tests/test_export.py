"""`spade_fast.export`: the written network computes what the model computes."""

import copy
import itertools
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from agree import assert_agree
from families import CHANNELS, LABELS, Block, CLADEBlock, CoCosNet, ImaginaireNorm, Layer
from refusals import refusal
from typer.testing import CliRunner

import spade_fast
from spade_fast import SPADE, SemanticLayout, SPADEGenerator, SPADEResnetBlock, checkpoint
from spade_fast.cli import app
from spade_fast.export import layers
from spade_fast.export.runs import CONVOLVE, assembled, convolve_runs
from spade_fast.export.windows import number_again, number_tuples, number_windows
from spade_fast.nn.spectral import converge
from spade_fast.reference import SPADEResnetBlock as PublishedBlock

needs_onnx = pytest.mark.needs("onnx", "onnxscript", "onnxruntime")


def layout_of(images, size, classes, seed=0):
    return SemanticLayout.from_labels(squares(images, size, classes, seed), classes)


def squares(images, size, classes, seed=0):
    """Label maps of rectangles, some of one pixel."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images, *[-(-one // 3) for one in size]), generator=random)
    for dim, length in enumerate(size, start=1):
        labels = labels.repeat_interleave(3, dim).narrow(dim, 0, length)
    labels[:, 0] = 0
    return labels.contiguous()


def run(path, *inputs):
    """The first result of a written network."""
    if path.suffix == ".pt2":
        found = torch.export.load(path).module()(*inputs)
        return found[0] if isinstance(found, tuple) else found
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    given = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, given)[0])


class Small(nn.Module):
    """Two sizes, of which one is above the least for windows, and a first convolution of labels."""

    def __init__(self, classes, norm="spadesyncbatch3x3", block=SPADEResnetBlock):
        super().__init__()
        self.fc = nn.Conv2d(classes, 4, 3, padding=1)
        self.low = block(4, 4, norm, classes)
        self.high = block(4, 2, norm, classes)

    def forward(self, segmap, shift=0.0):
        size = [one // 4 for one in segmap.shape[2:]]
        x = self.low(self.fc(F.interpolate(segmap, size=size)), segmap)
        return self.high(F.interpolate(x, size=segmap.shape[2:]), segmap) + shift


def settled(model):
    """The model in eval mode, with running statistics and spectral norm as after some training."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return converge(model).eval()


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_windows_are_those_of_a_layout(dims, kernel_size):
    labels = squares(2, (7, 5, 6)[:dims], 4)
    layout = SemanticLayout(labels.int(), torch.eye(4))
    expected = layout.windows(labels.shape[1:], kernel_size)
    hidden = number_windows(labels, kernel_size, 4)
    found = number_again(hidden, kernel_size)
    assert (len(hidden.windows), len(found.windows)) == (expected.hidden_count, expected.count)
    half = kernel_size // 2
    for numbers, codes, outside in (
        (hidden, labels, 4),
        (found, hidden.index, expected.hidden_count),
    ):
        padded = F.pad(codes, [half] * 2 * dims, value=outside)
        for dim in range(1, dims + 1):
            padded = padded.unfold(dim, kernel_size, 1)
        seen = numbers.contents[numbers.index]
        assert torch.equal(seen, padded.flatten(1 + dims))


def test_more_tuples_than_fit_into_a_number_are_an_error():
    first = torch.arange(2**21 - 3).repeat(2)
    second = torch.arange(2).repeat_interleave(2**21 - 3)
    numbers, tuples = number_tuples([first, first])
    assert len(tuples) == 2**21 - 3
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        number_tuples([first, second])


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("taps", [1, 3, 5])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_before_the_enlargement(dims, taps, factor):
    x = torch.randn(2, 3, *(4, 3, 2)[:dims], dtype=torch.float64)
    weight, bias = torch.randn(5, 3, *[taps] * dims).double(), torch.randn(5).double()
    large = F.interpolate(x, scale_factor=factor)
    expected = CONVOLVE[dims](large, weight, bias, padding=taps // 2)
    assert_agree(assembled(convolve_runs(x, factor, weight, bias), factor, taps), expected)


@pytest.mark.parametrize("suffix", ["pt2", pytest.param("onnx", marks=needs_onnx)])
@pytest.mark.parametrize("windows", [True, False])
def test_label_maps(suffix, windows, tmp_path):
    """Void labels and instances' edges, in another batch than the example's, at an odd size."""
    size, path = (35, 45), tmp_path / f"small.{suffix}"
    model = settled(Small(7, "spectralspadesyncbatch3x3"))
    before = copy.deepcopy(model.state_dict())
    settings = {"windows": windows, "instances": True, "dont_care": 255}
    written = spade_fast.export(model, path, (layout_of(1, size, 7),), **settings)
    assert list(written.inputs.values()) == ["int64 [any, 35, 45]"] * 2
    assert written.ways["at the distinct windows of labels"] == (3 if windows else 0)
    assert written.in_onnxruntime == (suffix == "onnx")
    labels, instances = squares(3, size, 6), squares(3, size, 4, seed=1)
    labels[labels == 5] = 255
    layout = SemanticLayout.from_labels(labels, 5, instances, dont_care=255)
    found = run(path, labels, instances)
    assert_agree(found, model(layout.to_segmap()), 256)
    assert_agree(model.state_dict(), before)


@needs_onnx
def test_the_file_says_what_it_is(tmp_path):
    import onnx

    path = tmp_path / "layer.onnx"
    x, layout = torch.randn(2, 4, 6, 6), layout_of(2, (6, 6), 3)
    spade_fast.export(SPADE(4, 3, 4), path, (x, layout), windows=False)
    model = onnx.load(path)
    assert [one.name for one in model.graph.input] == ["x", "labels"]
    (entry,) = model.metadata_props
    said = json.loads(entry.value)
    assert entry.key == "spade_fast" and said["version"] == spade_fast.__version__
    assert said["labels"] == {"classes": 3, "dont_care": None, "instances": False, "shift": 0}
    assert said["inputs"] == {"x": "float32 [any, 4, 6, 6]", "labels": "int64 [any, 6, 6]"}
    assert {node.domain for node in model.graph.node} == {""}
    operators = {node.op_type for node in model.graph.node}
    assert "OneHot" not in operators and "Unique" not in operators
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 2  # γ and β alone
    assert list(tmp_path.iterdir()) == [path]


@needs_onnx
@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_is_no_class_is_an_error(label, tmp_path):
    path = tmp_path / "layer.onnx"
    x, layout = torch.randn(1, 4, 6, 6), layout_of(1, (6, 6), 3)
    spade_fast.export(SPADE(4, 3, 4), path, (x, layout), windows=False)
    labels = squares(1, (6, 6), 3)
    labels[0, 2, 2] = label
    with pytest.raises(Exception, match="out of data bounds"):
        run(path, x, labels)
    spade_fast.export(SPADE(4, 3, 4), tmp_path / "layer.pt2", (x, layout))
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        run(tmp_path / "layer.pt2", x, labels)
