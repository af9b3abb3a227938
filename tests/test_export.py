"""`spade_fast.export`: the written network computes what the model computes."""

import copy
import json

import fresh
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from agree import assert_agree
from families import (
    CHANNELS,
    LABELS,
    Block,
    CLADEBlock,
    CoCosNet,
    HiFaceGAN,
    ImaginaireNorm,
    Layer,
)
from refusals import refusal
from typer.testing import CliRunner

import spade_fast
from spade_fast import SPADE, SemanticLayout, SPADEGenerator, SPADEResnetBlock, checkpoint
from spade_fast.cli import app
from spade_fast.cli import export as export_command
from spade_fast.export import network, recorded
from spade_fast.export.runs import CONVOLVE, assembled, convolve_runs
from spade_fast.export.sizes import is_in
from spade_fast.export.windows import number_again, number_tuples, number_windows
from spade_fast.nn.spectral import converge
from spade_fast.reference import SPADE as PublishedSPADE
from spade_fast.reference import SPADEResnetBlock as PublishedBlock
from spade_fast.settings import Config
from spade_fast.training.run import GENERATOR, SETTINGS

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
    return loaded(path)(*inputs)


def loaded(path):
    """A written network: its inputs to its first result."""
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()

        def of_program(*inputs):
            found = program(*inputs)
            return found[0] if isinstance(found, tuple) else found

        return of_program
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def of_session(*inputs):
        given = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return of_session


class Small(nn.Module):
    """Two sizes, of which one is above the least for windows, and a first convolution of labels."""

    def __init__(self, classes, norm):
        super().__init__()
        self.fc = nn.Conv2d(classes, 4, 3, padding=1)
        self.low = SPADEResnetBlock(4, 4, norm, classes)
        self.high = SPADEResnetBlock(4, 2, norm, classes)

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
    _, tuples = number_tuples([first, first])
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


@pytest.mark.parametrize(
    ("suffix", "windows"),
    [
        ("pt2", True),
        pytest.param("onnx", True, marks=needs_onnx),
        pytest.param("onnx", False, marks=needs_onnx),
    ],
)
def test_label_maps(suffix, windows, tmp_path):
    """Void labels and instances' edges, in another batch than the example's, at an odd size."""
    size, path = (35, 45), tmp_path / f"small.{suffix}"
    model = settled(Small(7, "spectralspadesyncbatch3x3"))
    before = copy.deepcopy(model.state_dict())
    settings = {"windows": windows, "instances": True, "dont_care": 255}
    written = spade_fast.export(model, path, (layout_of(1, size, 7),), **settings)
    assert list(written.inputs.values()) == ["int64 [any, 35, 45]"] * 2
    assert written.ways["at the distinct windows of labels"] == (3 if windows else 0)
    assert written.measured_in == ("ONNX Runtime" if suffix == "onnx" else "PyTorch")
    labels, instances = squares(3, size, 6), squares(3, size, 4, seed=1)
    labels[labels == 5] = 255
    layout = SemanticLayout.from_labels(labels, 5, instances, dont_care=255)
    found = run(path, labels, instances)
    assert_agree(found, model(layout.to_segmap()), 256)
    assert_agree(model.state_dict(), before)
    if windows and suffix == "onnx":  # ONNX Runtime drops a transposition beside a convolution
        import onnx

        nodes = onnx.load(path).graph.node
        turned = {node.output[0] for node in nodes if node.op_type == "Transpose"}
        activations = [node for node in nodes if node.op_type == "LeakyRelu"]
        assert len(activations) == 4 and not turned & {node.input[0] for node in activations}


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
def test_a_label_that_is_no_class_is_an_error(tmp_path):
    path = tmp_path / "layer.onnx"
    x, layout = torch.randn(1, 4, 6, 6), layout_of(1, (6, 6), 3)
    spade_fast.export(SPADE(4, 3, 4), path, (x, layout), windows=False)
    for label in (3, -1):
        labels = squares(1, (6, 6), 3)
        labels[0, 2, 2] = label
        with pytest.raises(Exception, match="out of data bounds"):
            run(path, x, labels)
        with pytest.raises(IndexError, match="out of range"):
            network.Codes(network.Labels(3, None, False))(labels)


class Decoder(nn.Module):
    """Features as the condition at their own size and at twice that, as in LivePortrait's
    decoder, and x from them.
    """

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            PublishedBlock(16, channels, "spadespectralinstance3x3", 5, nhidden=16)
            for channels in (16, 6)
        )
        self.fc = nn.Conv2d(5, 16, 3, padding=1)

    def forward(self, features):
        x = self.fc(features)
        for block in self.blocks:
            x = block(x, features)
            x = F.interpolate(x, scale_factor=2)
        return x


@pytest.mark.parametrize("suffix", ["pt2", pytest.param("onnx", marks=needs_onnx)])
def test_features(suffix, tmp_path):
    """In another batch and at another size than the example's."""
    model, path = settled(Decoder()), tmp_path / f"decoder.{suffix}"
    example = torch.randn(1, 5, 4, 5)
    written = spade_fast.export(model, path, example, dynamic=("batch", "sizes"))
    assert written.inputs == {"features": "float32 [any, 5, any, any]"} and not written.where
    assert written.ways["from features before their enlargement"] == 3
    assert written.ways["from features"] == 2
    features = torch.randn(3, 5, 3, 7)
    assert_agree(run(path, features), model(features))
    if suffix == "onnx":  # in ONNX Runtime's layout: norms of 16 channels, and hidden maps
        import onnx

        nodes = onnx.load(path).graph.node
        pooled = {node.input[0] for node in nodes if node.op_type == "MaxPool"}
        makers = [node.op_type for node in nodes if pooled & set(node.output)]
        assert sorted(makers) == ["InstanceNormalization"] * 3 + ["Transpose"] * 3


ANY_SIZE = ["batch", "sizes"]
SIZES = (  # of x and of its condition
    ((8, 8), (8, 8)),
    ((8, 6), (8, 1)),
    ((8, 8), (1, 1)),
    ((5, 9), (10, 7)),
    ((94, 1), (8, 3)),  # ONNX Runtime's Resize takes other pixels
)


@pytest.mark.parametrize(
    ("kind", "given", "suffix"),
    [
        ("features", 8, "pt2"),
        ("features", 4, "pt2"),
        ("windows", 8, "pt2"),
        pytest.param("features", 8, "onnx", marks=needs_onnx),
        pytest.param("labels", 8, "onnx", marks=needs_onnx),
        pytest.param("windows", 4, "onnx", marks=needs_onnx),
    ],
)
def test_any_sizes(given, suffix, kind, tmp_path, monkeypatch):
    """Whatever the example's ratio."""
    monkeypatch.setattr(network, "WINDOWS_FROM", 1)
    model, path = settled(PublishedSPADE(4, 3)), tmp_path / f"layer.{suffix}"
    layout = layout_of(1, (given, given), 3)
    example = torch.randn(1, 4, 8, 8), layout.to_segmap() if kind == "features" else layout
    written = spade_fast.export(model, path, example, windows=kind == "windows", dynamic=ANY_SIZE)
    assert not written.where and "any, any]" in list(written.inputs.values())[1]
    take = loaded(path)
    for size, of_condition in SIZES:
        x, layout = torch.randn(2, 4, *size), layout_of(2, of_condition, 3)
        segmap = layout.to_segmap()
        found = take(x, segmap if kind == "features" else layout.codes.long())
        assert_agree(found, model(x, segmap), 64)


class Relates(nn.Module):
    """Its code asks for sizes, and does something else for others."""

    def __init__(self, asks):
        super().__init__()
        self.asks, self.norm = asks, SPADE(4, 3, 4)

    def forward(self, x, segmap):
        return self.norm(x, segmap) if self.asks(x.shape[2], segmap.shape[2]) else x


@pytest.mark.parametrize(
    ("asks", "where"),
    [
        (lambda x, segmap: x == 2 * segmap, "x.shape[2] == (2*segmap.shape[2])"),
        (lambda x, segmap: x % 2 == 0, "(x.shape[2] % 2) == 0"),
        (lambda x, segmap: x < 20, "x.shape[2] < 20"),
    ],
)
def test_sizes_that_the_network_relates_are_described(asks, where, tmp_path):
    path, example = tmp_path / "model.pt2", (torch.randn(1, 4, 8, 8), torch.randn(1, 3, 4, 4))
    written = spade_fast.export(Relates(asks), path, example, dynamic=ANY_SIZE)
    assert written.where == [where] and f"where {where}\n" in str(written)
    assert written.inputs["x"] == "float32 [any, 4, some, any]"


def test_a_condition_of_a_longer_name_is_not_of_the_shorter():
    conditions = ["(2*max.shape[2]) == y.shape[2]"]
    found = [is_in(f"{name}.shape[2]", conditions) for name in ("max", "x", "y")]
    assert found == [True, False, True]


class FailsAtOthers(nn.Module):
    def __init__(self, fails):
        super().__init__()
        self.fails, self.norm = fails, SPADE(4, 3, 4)

    def forward(self, x, segmap):
        if torch.compiler.is_compiling():
            return self.norm(x, segmap)
        if int(x.shape[2]) == 8:
            return self.norm(x, segmap)
        if self.fails:
            raise ValueError("x should have 8 rows")
        return 2 * self.norm(x, segmap)


@pytest.mark.parametrize(
    ("fails", "message"),
    [(True, "(ValueError: x should have 8 rows)"), (False, "or at other sizes, the two differ")],
)
def test_what_is_written_is_tried_at_other_sizes(fails, message, tmp_path):
    example = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8, 8)
    path = tmp_path / "model.pt2"
    found = refusal(spade_fast.export, FailsAtOthers(fails), path, example, dynamic=ANY_SIZE)
    assert message in found and not path.exists()


@needs_onnx
def test_sizes_that_are_fixed_need_no_resizing(tmp_path):
    import onnx

    path, example = tmp_path / "layer.onnx", (torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8, 8))
    spade_fast.export(SPADE(4, 3, 4), path, example)
    assert not {"Resize", "Gather"} & {node.op_type for node in onnx.load(path).graph.node}


class Followed(nn.Module):
    """One convolution of what a SPADE returns, before and after that is overwritten."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = SPADE(4, 3, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x, condition):
        y = self.norm(x, condition)
        before = self.conv(y)
        return torch.cat([before, self.conv(y.mul_(2)), y], 1)


@pytest.mark.parametrize("windows", [False, True])
def test_a_convolution_after_a_spade(windows, tmp_path, monkeypatch):
    monkeypatch.setattr(network, "WINDOWS_FROM", 1)
    model, path = Followed().eval(), tmp_path / "model.pt2"
    x, layout = torch.randn(2, 4, 6, 6), layout_of(2, (6, 6), 3)
    expected = model(x, layout.to_segmap())
    spade_fast.export(model, path, (x, layout), windows=windows)
    assert_agree(run(path, x, layout.codes.long()), expected, 256)
    summed = [one for one in torch.export.load(path).state_dict if one.endswith("conv.of_beta")]
    assert summed == ["model.conv.of_beta"]


OTHERS = {
    "published": lambda: (PublishedBlock(CHANNELS, 4, "spadebatch3x3", LABELS, nhidden=4), True),
    "CoCosNet": lambda: (Block(CoCosNet, 4), False),
    "CLADE": lambda: (CLADEBlock(), True),
    "γ without 1 +": lambda: (HiFaceGAN(nn.BatchNorm2d(CHANNELS, affine=False)), True),
    "imaginaire, 5 × 5, joint": lambda: (ImaginaireNorm(1), True),
    "imaginaire, 5 × 5": lambda: (ImaginaireNorm(1, separate_projection=True), True),
    "leaky hidden": lambda: (Layer(hidden_activation=nn.LeakyReLU(0.01, inplace=True)), True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_peoples_modules(name, tmp_path, monkeypatch):
    """Those that are not converted take label maps as well."""
    monkeypatch.setattr(network, "WINDOWS_FROM", 1)
    torch.manual_seed(1)
    model, is_converted = OTHERS[name]()
    settled(model)
    layout, path = layout_of(2, (12, 11), LABELS), tmp_path / "model.pt2"
    x = torch.randn(2, CHANNELS, 12, 11)
    written = spade_fast.export(model, path, (x, layout))
    assert (written.ways["at the distinct windows of labels"] > 0) == is_converted
    labels = squares(2, (12, 11), LABELS, seed=3)
    segmap = SemanticLayout.from_labels(labels, LABELS).to_segmap()
    assert_agree(run(path, x, labels), model(x, segmap), 256)


@pytest.mark.needs("monai")
@pytest.mark.parametrize("dims", [2, pytest.param(3, marks=pytest.mark.full)])
def test_monai(dims, tmp_path, monkeypatch):
    """γ and β are normalised over each image."""
    from monai.networks.nets import SPADENet

    size = [8] * dims
    monkeypatch.setattr(network, "WINDOWS_FROM", 16)
    model = SPADENet(dims, 1, 1, 4, size, [4], 8, False, 6).eval()
    path = tmp_path / "model.pt2"
    written = spade_fast.export(model, path, (layout_of(1, size, 4),))
    assert written.ways["at the distinct windows of labels"] == 3
    labels = squares(2, size, 4, seed=3)
    segmap = SemanticLayout.from_labels(labels, 4).to_segmap()
    assert_agree(run(path, labels), model(segmap)[0], 256)


def small_generator(label_nc=9, z_dim=None):
    stages = [("head", 2, 1), ("up", 1, 2)]
    settings = {"stages": stages, "start": 8, "nhidden": 2, "norm_G": "spectralspadebatch3x3"}
    return settled(SPADEGenerator(label_nc, z_dim, 2, **settings))


def test_a_generator_with_a_style(tmp_path):
    generator = settled(small_generator(6, z_dim=8)).double()
    path = tmp_path / "generator.pt2"
    written = spade_fast.export(generator, path)
    assert list(written.inputs) == ["labels", "z"] and list(written.outputs) == ["image"]
    layout, z = layout_of(3, (32, 32), 6, seed=2), torch.randn(3, 8, dtype=torch.float64)
    assert_agree(run(path, layout.codes.long(), z), generator(layout, z))


def test_sizes_that_do_not_divide(tmp_path):
    """The pixels that nearest neighbour takes are those of F.interpolate."""
    model = settled(SPADE(4, 5, 4, norm="batch"))
    path = tmp_path / "layer.pt2"
    for size, given in ((7, 9), (37, 20)), ((20, 33), (53, 100)):
        x = torch.randn(2, 4, *size)
        layout = layout_of(2, given, 5)
        spade_fast.export(model, path, (x, layout))
        assert_agree(run(path, x, layout.codes.long()), model(x, layout.to_segmap()))


def test_a_batch_that_is_fixed(tmp_path):
    model, path = settled(SPADE(4, 5, 4)), tmp_path / "layer.pt2"
    example = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 6, 6)
    written = spade_fast.export(model, path, example, dynamic=())
    assert list(written.inputs.values()) == ["float32 [2, 4, 6, 6]", "float32 [2, 5, 6, 6]"]


@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
@pytest.mark.parametrize("of_labels", [False, True])
def test_our_operators(norm, of_labels):
    """What AOTInductor compiles, in another batch than the example's."""
    size = (9, 7)
    x, layout = torch.randn(1, 4, *size), layout_of(1, size, 3)
    model = settled(SPADE(4, 3, 4, norm=norm, num_groups=2, affine=norm != "instance"))
    arguments = (x, layout if of_labels else layout.to_segmap())
    labels = network.Labels(3, None, False) if of_labels else None
    ours, inputs, truth = network.network_of(model, arguments, labels, False, kernels=True)
    assert_agree(ours.run(inputs), truth)
    program = recorded(ours, inputs, ["x", "condition"], {"batch"})
    targets = [str(node.target) for node in program.graph.nodes]
    wanted = "spade_fast.instance_forward" if norm == "instance" else "spade_fast.apply"
    assert sum(target.startswith(wanted) for target in targets) == 1
    twice = [torch.cat([one, one.flip(-1)]) for one in inputs]
    segmap = labels.condition(twice[1:]) if of_labels else twice[1]
    assert_agree(program.module()(*twice), model(twice[0], segmap))


@pytest.mark.parametrize("batches", [(3, 1), (1, 3)])
def test_our_operators_on_one_x_or_one_condition(batches):
    model = settled(SPADE(4, 3, 4))
    example = torch.randn(batches[0], 4, 9, 7), torch.randn(batches[1], 3, 9, 7)
    ours, inputs, truth = network.network_of(model, example, None, True, kernels=True)
    assert_agree(ours.run(inputs), truth)


@pytest.mark.product  # compiling takes too long for a run of all tests
@pytest.mark.parametrize("of_labels", [False, True])
def test_a_package_of_aotinductor(of_labels, tmp_path):
    """It runs in a fresh process that has imported spade_fast, and in no other."""
    model, path = settled(SPADE(4, 3, 4)), tmp_path / "layer.pt2"
    x, layout = torch.randn(2, 4, 9, 7), layout_of(2, (9, 7), 3)
    segmap = layout.to_segmap()
    example = (x, layout if of_labels else segmap)
    written = spade_fast.export(model, path, example, to="aoti", windows=False)
    assert written.measured_in == "AOTInductor"
    torch.save([x, layout.codes.long() if of_labels else segmap], tmp_path / "inputs")
    code = (
        "import torch{}\n"
        f"package = torch._inductor.aoti_load_package({str(path)!r})\n"
        "print(sorted(package.get_metadata()))\n"
        f"found = package(*torch.load({str(tmp_path / 'inputs')!r}))\n"
        f"torch.save(found, {str(tmp_path / 'found')!r})"
    )
    said, errors = fresh.python(code.format(""))
    assert not said and "Could not find schema for spade_fast" in errors
    said, errors = fresh.python(code.format(", spade_fast"))
    assert "'spade_fast'" in said, errors
    assert_agree(torch.load(tmp_path / "found"), model(x, segmap))


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = SPADE(4, 3, 4)

    def forward(self, x, segmap):
        return self.norm(x, segmap) + torch.randn_like(x)


class FixesItsSize(Draws):
    def forward(self, x, segmap):
        return self.norm(x + torch.ones(6), segmap)


def test_refusals(tmp_path):
    path, layer = tmp_path / "layer.pt2", SPADE(4, 3, 4)
    x, segmap, layout = torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6), layout_of(2, (6, 6), 3)

    def refused(model=layer, path=path, arguments=(x, segmap), **settings):
        return refusal(spade_fast.export, model, path, arguments, **settings)

    assert refused("layer") == "model is a str; it should be a torch.nn.Module"
    assert "scripted or compiled" in refused(torch.compile(layer))
    assert "they should have values" in refused(SPADE(4, 3, 4).to("meta"))
    assert "its suffix should be one of onnx, pt2, aoti" in refused(path=tmp_path / "layer.pth")
    assert refused(to="coreml") == "to is 'coreml'; it should be one of onnx, pt2, aoti"
    assert "its suffix should be .pt2" in refused(path=tmp_path / "a.onnx", to="aoti")
    assert "windows is True; for AOTInductor" in refused(arguments=(x, layout), to="aoti")
    assert "arguments is None; for a SPADE it should be an example" in refused(arguments=None)
    assert "dynamic is 'batch'; it should be a list of batch, sizes" in refused(dynamic="batch")
    assert "arguments should have a SemanticLayout" in refused(dont_care=255)
    two = refused(arguments=(layout, layout))
    assert two == "arguments has 2 SemanticLayouts; it should have one"
    few = refused(arguments=(x, layout_of(2, (6, 6), 2)), instances=True, dont_care=255)
    assert "has 2 channels; it should have one for each class" in few
    assert "dont_care is 'void'; it should be a whole number" in refused(
        arguments=(x, layout), dont_care="void"
    )
    assert "x 2, segmap 1; they should be equal" in refused(arguments=(x, segmap[:1]))
    assert "It may draw random numbers" in refused(Draws())
    layer.mlp_gamma.register_forward_hook(lambda module, given, gamma: 2 * gamma)
    assert "model cannot take label maps" in refused(arguments=(x, layout))
    fixed = refused(FixesItsSize(), dynamic=("batch", "sizes"))
    assert fixed == "the model fixes the size of x along axis 3; dynamic should be without 'sizes'"
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="should be a folder to write layer.pt2 into"):
        spade_fast.export(layer, tmp_path / "missing/layer.pt2", (x, segmap))


def command(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def test_the_command_on_a_run(tmp_path):
    """Its settings say how label maps are read."""
    generator, path = small_generator(), tmp_path / "g.pt2"
    checkpoint.write(generator, tmp_path / GENERATOR)
    Config(num_classes=7, dont_care=255, instances="inst").save(tmp_path / SETTINGS)
    result = command(tmp_path, "--out", path)
    assert result.exit_code == 0, result.output
    assert "input labels: int64 [any, 32, 32]\ninput instances: int64 [any" in result.output
    labels, instances = squares(1, (32, 32), 7), squares(1, (32, 32), 3, seed=1)
    labels[0, :9] = 255
    layout = SemanticLayout.from_labels(labels, 7, instances, dont_care=255)
    assert_agree(run(path, labels, instances), generator(layout))


def generator_and_inputs():
    return SPADE(4, 3, 4), (torch.zeros(2, 4, 6, 6), layout_of(2, (6, 6), 3))


@needs_onnx
def test_the_command_on_a_function(tmp_path):
    path = tmp_path / "layer.onnx"
    result = command(f"{__name__}:generator_and_inputs", "--out", path, "--fixed-batch")
    assert result.exit_code == 0, result.output
    assert "input labels: int64 [2, 6, 6]" in result.output
    assert "in ONNX Runtime" in result.output and path.exists()


def test_the_commands_refusals(tmp_path):
    weights, path = tmp_path / "g.pth", tmp_path / "g.pt2"
    checkpoint.write(small_generator(), weights)
    for words, message in (
        ((weights, "--num-classes", 5), "the generator has 9 channels, and 5 classes make 5"),
        ((weights, "--convention", "coco"), "--convention is 'coco'; it should be one of"),
        ((weights, "--to", "coreml"), "--to is 'coreml'; it should be one of onnx, pt2, aoti"),
        ((weights, "--to", "aoti"), "--windows is True; for AOTInductor it should be False"),
        (("no.such:thing",), "cannot be imported"),
        (("no.such:thing", "--crop-size", 64), "--crop-size should be given with weights, not"),
    ):
        result = command(*words, "--out", path)
        assert result.exit_code == 2 and message in result.output, result.output
        assert result.output.startswith("Error: ") and not path.exists()


def test_label_maps_as_ade20k_numbers_them():
    found = export_command.labels_of(151, "ade20k")
    assert found == {"instances": False, "dont_care": 0, "label_shift": -1}
    labels = network.Labels(150, 0, False, -1)
    codes = network.Codes(labels)(torch.tensor([[0, 1, 150]]))
    assert codes[0, 0].tolist() == [150, 0, 149]
