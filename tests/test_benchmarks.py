"""The benchmark suite: the layouts that it draws, its measurements, and that a wrong result gets no
times.
"""

import dataclasses
import functools
import json
import re
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import spade_fast
from benchmarks import (
    cli,
    cuda_proofs,
    gpu,
    layouts,
    measure,
    proofs,
    report,
    summary,
)
from benchmarks.cases import CASES, generate, generator, modulation, training
from benchmarks.cases.converted import FaceDecoder
from benchmarks.cases.networks import COCO_NORM, without_spade
from benchmarks.cases.problem import (
    BACKWARD,
    BARE,
    DEVICE_ALONE,
    FORWARD,
    WHOLE_CALLS,
    Plan,
    Problem,
    Settings,
)
from benchmarks.cases.scenes import conditions
from spade_fast import reference


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


MEMORIES = ("contiguous", "channels-last")


def toy(settings):
    """A problem that takes a millisecond, with a variant that is wrong and a rival that fails."""
    x = torch.randn(1000)

    def fail():
        raise RuntimeError("no such luck")

    variants = {
        "eager": lambda: {"y": x.exp()},
        "spade_fast": lambda: {"y": x.exp() + 1e-3},
        "torch.compile": fail,
        "floor": lambda: {"y": x},
        "limit": lambda: {"y": x},
    }
    yield Plan(
        "toy",
        FORWARD,
        lambda: Problem(
            "toy", FORWARD, variants, lambda: {"y": x.double().exp()}, lambda number: {"y": x.exp()}
        ),
    )


def test_wrong_results_get_no_times(monkeypatch, tmp_path):
    monkeypatch.setitem(cli.CASES, "toy", toy)
    result = invoke(
        "run", "toy", "--quick", "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"
    )
    assert result.exit_code == 1
    assert "NO" in result.output and "no such luck" in result.output
    rows = {row["variant"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert rows["limit"]["over_limit"] == 1 and rows["eager"]["over_limit"] is not None
    assert (
        rows["eager"]["times"] and rows["floor"]["times"] and rows["eager"]["peak_memory"] == 4000
    )
    assert not rows["spade_fast"]["times"] and rows["spade_fast"]["excess"] > 1
    assert not rows["torch.compile"]["times"] and "no such luck" in rows["torch.compile"]["failure"]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    "case",
    [
        "modulate",
        "lookup",
        "discriminator",
        *(
            pytest.param(case, marks=pytest.mark.full)  # each takes at least ten seconds
            for case in ("block", "generator", "generate", "paint", "training", "converted")
        ),
        pytest.param("monai", marks=[pytest.mark.full, pytest.mark.needs("monai", "einops")]),
        pytest.param("spatial", marks=[pytest.mark.full, pytest.mark.needs("diffusers")]),
    ],
)
def test_every_quick_case_matches_without_the_compiler(case):
    for plan in CASES[case](Settings(quick=True, without=("torch.compile",))):
        if (case, plan.mode) == ("generator", BACKWARD) and plan.name.startswith("4 samples"):
            continue  # as long as all others together, of which each has a part of it
        problem = plan.build()
        assert problem.least_rounds == (3 if case == "generate" else 5)
        problem.least_rounds = 2
        counted = re.escape(plan.name).replace("windows", r"\d+\ windows")
        assert re.fullmatch(counted if case == "lookup" else re.escape(plan.name), problem.name)
        assert problem.mode == plan.mode
        assert "torch.compile" not in problem.variants
        rows = measure.measure(case, problem, "cpu", 0)
        assert {
            row.variant for row in rows if row.matches or differs_by_a_sign(row)
        } == problem.variants.keys()
        timed = [row for row in rows if row.matches]
        assert all(len(row.times) == 2 and row.peak_memory > 0 for row in timed)
        assert (
            case
            in ("generate", "paint", "discriminator", "training", "converted", "monai", "spatial")
            or min(row.overhead for row in rows if row.variant.startswith("floor")) == 1
        )
        if problem.mode == BACKWARD and case in ("block", "generator"):
            assert (
                "dhead_0.norm_0.mlp_gamma.weight" in problem.truth()
                or "dnorm_0.mlp_gamma.weight" in problem.truth()
            )


@pytest.mark.full
@pytest.mark.needs("onnx", "onnxscript", "onnxruntime", "monai")
def test_exported_networks_match():
    """Each network with some variants, which together are all: an export takes seconds."""
    names = ["ONNX Runtime", "spade_fast, ONNX Runtime", "spade_fast, ONNX Runtime, pixels"]
    for number, count, left_out in ((0, 4, ()), (1, 2, names[:1]), (2, 3, names[2:])):
        plans = CASES["export"](Settings(quick=True, without=tuple(left_out)))
        problem = list(plans)[number].build()
        problem.least_rounds = 2
        rows = measure.measure("export", problem, "cpu", 0)
        assert all(row.matches and len(row.times) == 2 for row in rows)
        assert [row.variant for row in rows] == list(problem.variants) and len(rows) == count


def test_exported_networks_are_measured_on_the_cpu_alone():
    with pytest.raises(ValueError, match="the case export is for float32 on the CPU, not"):
        next(CASES["export"](Settings(dtype=torch.bfloat16)))


def bare_networks():
    """Networks of reference.py with and without spectral norm, and a call of each."""
    segmap = torch.randn(1, 5, 64, 64)
    for norm_G in (COCO_NORM, generator.NO_SPECTRAL_NORM["norm_G"]):
        network = reference.SPADEGenerator(5, 2, crop_size=64, norm_G=norm_G)
        yield network.eval(), (segmap,)
    yield FaceDecoder(16, 8, 8).eval(), (torch.randn(1, 8, 8, 8),)


def convolutions_called(network, *inputs):
    """Name, weight, stride, padding, shape of the input of each convolution outside of SPADE, in
    the order of the calls.
    """
    called, spades = [], [part for part in network.modules() if isinstance(part, reference.SPADE)]
    inside = {part for spade in spades for part in spade.modules()}
    for name, part in network.named_modules():
        if isinstance(part, torch.nn.Conv2d) and part not in inside:
            part.register_forward_pre_hook(
                lambda part, inputs, name=name: called.append(
                    (name, part.weight.tolist(), part.stride, part.padding, inputs[0].shape)
                )
            )
    with torch.no_grad():
        network(*inputs)
    return called


def test_the_limit_has_the_convolutions_outside_of_spade():
    for network, inputs in bare_networks():
        bare = {kind: without_spade(network, norm) for kind, norm in BARE.items()}
        expected = convolutions_called(network, *inputs)
        names = {name for name, *_ in expected}
        assert {"fc", "conv_img"} < names and any(name.endswith("conv_s") for name in names)
        weights = {
            name: value for name, value in network.state_dict().items() if ".norm_" not in name
        }
        for found in bare.values():
            own = found.state_dict()
            assert own.keys() == weights.keys()
            assert all(torch.equal(own[name], value) for name, value in weights.items())
            assert convolutions_called(found, *inputs) == expected


def test_the_limit_is_the_network_without_spade():
    """In the words of the definition: convolutions and leaky ReLUs around a shortcut."""
    block = reference.SPADEResnetBlock(4, 6, "spadeinstance3x3", 5).eval()
    x, segmap = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8)
    leaky = functools.partial(torch.nn.functional.leaky_relu, negative_slope=0.2)
    norm = torch.nn.functional.instance_norm
    limit, floor = (without_spade(block, BARE[kind]) for kind in ("limit", "floor"))
    found = limit(x, segmap)
    assert torch.equal(found, block.conv_s(x) + block.conv_1(leaky(block.conv_0(leaky(x)))))
    dx = block.conv_1(leaky(norm(block.conv_0(leaky(norm(x))))))
    assert torch.equal(floor(x, segmap), block.conv_s(norm(x)) + dx)


@pytest.mark.parametrize(
    "case,problem,folding",
    [("block", "128", {"frozen", "folded, frozen"}), ("generator", "small", set())],
)
def test_rows_that_fold_spectral_norm_have_no_time_over_the_limit(case, problem, folding):
    plans = CASES[case](Settings(quick=True, without=("torch.compile",)))
    plan = next(plan for plan in plans if plan.name.startswith(problem))
    rows = {row.variant: row for row in measure.measure(case, plan.build(), "cpu", 0)}
    assert all(row.times for row in rows.values()) and "spade_fast, frozen" in rows
    unlimited = {name for name, row in rows.items() if row.over_limit is None}
    assert unlimited == {f"spade_fast, {name}" for name in folding}
    assert min(rows[f"limit, {memory}"].over_limit for memory in MEMORIES) == 1


def differs_by_a_sign(row):
    """Whether a leaky ReLU's sign may explain a gradient's error: on some processors one sign
    differs, but none does in float64.
    """
    proven = row.mode == BACKWARD and row.failure is None and row.error_in_double is not None
    return (
        proven and row.error_in_double <= measure.LIMIT_IN_DOUBLE and row.excess < 1e5
    )  # 1.6e4 was seen


@pytest.mark.full
def test_every_generated_file_is_checked():
    """Including files whose truth is not in float64, for which an error of one level of 8 bits is
    allowed.
    """
    problem = next(generate.generate(Settings(quick=True))).build()
    right = problem.variants["spade_fast"]
    kinds = [image.dtype for image in problem.truth().values()]
    assert kinds == [torch.float64] * generate.FILES_IN_DOUBLE + [torch.float32]

    def wrong(place):
        found = right()
        file = list(found)[place]
        found[file][0, 0, 0] += 2.0 if found[file][0, 0, 0] < 128 else -2.0
        return found

    assert all(row.matches for row in measure.check("generate", problem).values())
    for place in (0, -1):
        problem.variants["spade_fast"] = functools.partial(wrong, place)
        rows = measure.check("generate", problem)
        assert rows["eager"].matches and not rows["spade_fast"].matches


def test_a_step_of_training_with_vgg19_is_the_published_one():
    problem = training.training_problem(Settings(quick=True), "VGG19", BACKWARD, perceptual=True)
    truth, found = problem.truth(), problem.in_double()
    assert truth.keys() == found.keys() and truth["perceptual"] > 0
    scales = measure.gradient_scales(truth)
    for key in truth:
        error = (truth[key] - found[key]).abs().max().item()
        assert error <= measure.LIMIT_IN_DOUBLE * scales[key], key
    for key in ("fc.weight", "up_3.norm_0.param_free_norm.running_mean", "conv_img.bias"):
        assert f"generator.{key}" in truth
    assert "generator.fc.bias" not in truth  # a norm follows, and takes it away


def test_training_restarts_before_each_call():
    problem = next(training.training(Settings(quick=True))).build()
    results = []
    for _ in range(2):
        problem.prepare("spade_fast")
        results.append(problem.variants["spade_fast"]())
    assert all(torch.equal(one, results[1][key]) for key, one in results[0].items())
    after = problem.variants["spade_fast"]()  # without being told to
    assert not torch.equal(after["adversarial"], results[0]["adversarial"])


def test_training_is_not_measured_in_half_precision():
    with pytest.raises(ValueError, match="dtype is torch.float16, training should have float32"):
        next(training.training(Settings(dtype=torch.float16)))


def built(*arguments, **named):
    raise AssertionError("something is built")


def places_of(name):
    """The modules of cases that look up a name, each with the name."""
    modules = {sys.modules[case.__module__] for case in CASES.values()}
    found = [(module, name) for module in modules if hasattr(module, name)]
    assert found
    return found


def test_plans_have_names_before_anything_is_built(monkeypatch):
    for where, name in [
        (torch.nn.Module, "__init__"),
        (torch, "randn"),
        (layouts, "draw_scene"),
        (layouts, "draw_volume"),
        *places_of("conditions"),
        *places_of("nets_and_schedulers"),
    ]:
        monkeypatch.setattr(where, name, built)
    for settings in (Settings(), Settings(quick=True, scenes=3, batch=2)):
        for case in CASES.values():
            plans = list(case(settings))
            assert all(plan.name and plan.mode in (FORWARD, BACKWARD) for plan in plans)
            assert len({(plan.name, plan.mode) for plan in plans}) == len(plans)
    names = [plan.name for plan in CASES["generator"](settings)]
    assert names[0] == "COCO 64², batch 2, 3 scenes"
    result = invoke("run", "generator", "discriminator", "--only", "COCO 25²")
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert "no problem's name contains 'COCO 25²'; the names are: COCO 256²; small 128²;" in text
    with pytest.raises(AssertionError, match="something is built"):
        next(CASES["block"](settings)).build()


def test_problems_that_are_left_out_are_not_built(monkeypatch):
    def two(settings):
        yield Plan("wanted", FORWARD, lambda: next(toy(settings)).build())
        yield Plan("left out", FORWARD, built)

    monkeypatch.setitem(cli.CASES, "two", two)
    assert "toy" in invoke("run", "two", "--quick", "--only", "wanted", "--seconds", "0").output


def test_problems_keep_the_order_of_the_options():
    asked = ["64 × 256²", "channels-last", "1024 × 8² contiguous"]
    chosen = {"modulate": modulation.modulate}
    names = [plan.name for _, plan in cli.choose_plans(chosen, Settings(), asked)]
    assert names[:4] == [f"64 × 256² {memory}" for memory in MEMORIES for _ in range(2)]
    assert names[4].endswith("channels-last") and names[-1] == "1024 × 8² contiguous"
    assert all(names.count(name) == 2 for name in names)  # forward, and with backward


def test_a_whole_name_takes_one_problem_of_a_case():
    chosen = {"generator": generator.generator, "training": training.training}
    for text, expected in [
        ("COCO 256²", ["COCO 256²", "COCO 256², without VGG19", "COCO 256², VGG19"]),
        ("COCO 256², no", ["COCO 256², no spectral norm"]),
    ]:
        plans = [plan for _, plan in cli.choose_plans(chosen, Settings(), [text])]
        assert cli.names_of_problems(plans) == expected
    chosen = {"generator": generator.generator}
    for batch, only in ((1, gpu.GENERATOR), (16, gpu.GENERATOR_AT_16)):
        plans = cli.choose_plans(chosen, Settings(batch=batch), only[1:])
        assert {plan.name for _, plan in plans} == {only[1]}


def test_variants_that_are_left_out_are_not_built(monkeypatch):
    monkeypatch.setattr(modulation, "_compiled", built)
    monkeypatch.setattr(torch, "compile", built)
    for case in ("modulate", "block"):
        settings = Settings(quick=True, without=("torch.compile", "spade_fast, f", *BARE))
        problem = next(CASES[case](settings)).build()
        expected = {"eager", "spade_fast"} | (
            {"spade_fast, prepared"} if case == "block" else set()
        )
        assert problem.variants.keys() == expected
        with pytest.raises(AssertionError, match="something is built"):
            next(CASES[case](Settings(quick=True))).build()
    for text in ("eager", "ea", ""):
        result = invoke("run", "modulate", "--quick", "--without", text)
        assert result.exit_code == 2 and "eager cannot be left out" in result.output
    rows = measure.measure("block", problem, "cpu", 0)
    assert "eager" in in_80_columns(report.tables(rows))


class Events:
    """A stand-in for a GPU's clock. The host is ahead if the GPU sleeps long enough."""

    def __init__(self, cycles_of_the_host):
        self.cycles_of_the_host, self.slept = cycles_of_the_host, []

    def sleep(self, cycles):
        self.slept.append(cycles)

    def Event(self, enable_timing):
        return SimpleNamespace(
            record=lambda: None,
            query=lambda: self.slept[-1] < self.cycles_of_the_host,
            synchronize=lambda: None,
            elapsed_time=lambda end: 2.5,
        )


@pytest.mark.parametrize("cycles,slept", [(0, 1), (measure.HEAD_START + 1, 2), (1 << 60, 5)])
def test_an_operation_is_timed_with_the_host_ahead(cycles, slept, monkeypatch):
    events = Events(cycles)
    monkeypatch.setattr(torch.cuda, "Event", events.Event)
    monkeypatch.setattr(torch.cuda, "_sleep", events.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.slept.append("waited"))
    monkeypatch.setattr(measure, "flush", lambda device: None)
    assert measure.timed(lambda: None, "cuda", DEVICE_ALONE) == 2.5e-3
    assert events.slept == [measure.HEAD_START << number for number in range(slept)]
    events.slept.clear()
    assert 0 <= measure.timed(lambda: None, "cuda", WHOLE_CALLS) < 2.5e-3
    assert events.slept == ["waited", "waited"]  # before the call, and for it


def test_rows_say_what_was_timed():
    settings = Settings(quick=True, without=("torch.compile", "floor"))
    for case, clock in (("modulate", DEVICE_ALONE), ("block", WHOLE_CALLS)):
        rows = measure.check(case, next(CASES[case](settings)).build())
        assert {row.clock for row in rows.values()} == {clock}
        assert report.CLOCKS[clock] in " ".join(in_80_columns(report.tables(rows.values())).split())


def test_a_problem_is_freed_before_the_next_is_built(monkeypatch):
    alive = weakref.WeakSet()

    class Shared:
        """Data that the problems of a case share."""

    def build(shared, name):
        assert len(alive) == 1
        problem = next(toy(None)).build()
        alive.add(problem)
        return problem

    def case(settings):
        shared = Shared()
        alive.add(shared)
        for name in "ab":
            yield Plan(name, FORWARD, functools.partial(build, shared, name))

    monkeypatch.setattr(cli, "CASES", {"case": case})
    monkeypatch.setattr(Problem, "__hash__", object.__hash__, raising=False)
    result = invoke("run", "case", "--quick", "--seconds", "0")
    assert "eager" in result.output and not isinstance(result.exception, AssertionError)


def test_a_batch_consists_of_different_scenes():
    one, two = conditions(Settings(quick=True, scenes=2, batch=3))
    assert one.shape == two.shape == (3, 184, 64, 64)
    assert len({tuple(image.flatten().tolist()) for image in (*one, *two)}) == 6


def test_too_few_scenes_are_followed_by_mirrored_copies(tmp_path):
    folder, instances = layouts.save_scenes(tmp_path, 2)
    settings = Settings(quick=True, labels=folder, instances=instances, batch=4)
    (batch,) = conditions(settings)
    (drawn,) = conditions(Settings(quick=True, batch=2))
    assert torch.equal(batch[:2], drawn) and not torch.equal(batch[2:], drawn)
    # sampled from the other side of the pixels, so only nearly the same
    flipped = batch[2:].flip(-1)
    assert (flipped != drawn).double().mean() < 0.01


def test_full_cases_have_the_published_shapes():
    assert next(modulation.modulate(Settings())).name.startswith("1024 × 8²")
    with torch.device("meta"):
        shapes = []
        network = reference.SPADEGenerator(184, norm_G="spectralspadeinstance3x3")
        for module in network.modules():
            if isinstance(module, reference.SPADE):
                module.register_forward_pre_hook(
                    lambda module, inputs: shapes.append((inputs[0].shape[1], inputs[0].shape[2]))
                )
        network(torch.randn(1, 184, 256, 256))
    assert set(shapes) == set(modulation.COCO_SHAPES)


def test_list_and_bad_options(tmp_path):
    for settings, options in ((Settings(), ()), (Settings(quick=True), ("--quick",))):
        listed = invoke("list", *options).output.splitlines()
        for name, case in CASES.items():
            (place,) = (number for number, line in enumerate(listed) if line.startswith(f"{name}:"))
            for problem in dict.fromkeys(plan.name for plan in case(settings)):
                place += 1
                assert listed[place] == f"    {problem}"
    for arguments, words in [
        (["run", "nothing"], "'nothing' should be one of modulate"),
        (["run", "block", "--without", "spade-fast"], "names are: eager; eager, channels-last;"),
        (["run", "block", "--labels", tmp_path / "no"], "should be a folder that exists"),
        (["picture", tmp_path / "no.png", "--labels", tmp_path / "no"], "folder that exists"),
        (["run", "block", "--dtype", "int8"], "'int8' should be one of float32"),
        (["run", "block", "--device", "cuda:99"], "cannot be used"),
        (["run", "block", "--json", tmp_path / "no" / "such.json"], "folder that exists"),
    ]:
        result = invoke(*arguments)
        assert result.exit_code == 2 and words in " ".join(
            result.output.replace("│", " ").split()
        ), result.output


def rows_of_every_kind():
    problem = "generator", "4 samples of one COCO layout, 256², batch 16, 3 scenes", BACKWARD
    variants = [*report.COLOURS, *(f"{kind}, {own}" for kind in BARE for own in MEMORIES)]
    rows = [
        measure.Row(
            *(*problem, variant, 0.5),
            times=[1.2345, 1.25, 1.26],
            ratio=(1.99, 2.05, 2.11),
        )
        for variant in variants
    ]
    for row in rows:
        row.overhead, row.over_limit = 12.34, 23.45
        row.peak_memory, row.bandwidth = 12345 * 2**20, 0.8
    rows.append(dataclasses.replace(rows[0], times=[], error_in_double=1e-3))
    return [*rows, dataclasses.replace(rows[0], times=[], failure="no such luck")]


def in_80_columns(renderable):
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    assert max(map(len, capture.get().splitlines())) <= 80 and "…" not in capture.get()
    return capture.get()


def test_tables_can_be_read_in_80_columns():
    text = in_80_columns(report.tables(rows_of_every_kind()))
    words = {word for variant in report.COLOURS for word in variant.split()}
    for word in (
        *words,
        "channels-last",
        "(1.99–2.11)",
        "23.45",
        "12345",
        "1250",
        "in float64",
        "failed",
    ):
        assert word in text
    widths = {16: 1, 8: 2, 4: 3, 2: 1}
    found = in_80_columns(
        proofs.table(
            [
                proofs.Proof(
                    *("backward_input_kernel", "float32, γ bfloat16", "channels-last", "dense"),
                    *("leaky_relu", True, 90, 128, 0, 12345, widths, widths, 0, 0),
                )
            ]
        )
    )
    assert all(word in found for word in ("backward_input", "channels-last", "16, 8, 4, 2"))
    found = in_80_columns(
        cuda_proofs.table(
            [
                cuda_proofs.Proof(
                    *(
                        "backward_input_kernel",
                        8,
                        "channels-last",
                        "SiLU",
                        90,
                        128,
                        0,
                        0,
                        1000,
                        256,
                    ),
                    *(widths, widths, 0, False, False, None),
                )
            ]
        )
    )
    assert all(word in found for word in ("backward_input", "channels-last", "sm_90", "16, 8"))


def test_layouts_are_drawn_and_read_back(tmp_path):
    result = invoke("layouts", tmp_path, "--count", 2)
    assert result.exit_code == 0 and "--labels" in result.output
    scenes = layouts.load_scenes(tmp_path / "label", tmp_path / "instance")
    for seed, scene in enumerate(scenes):
        assert all(
            np.array_equal(read, drawn) for read, drawn in zip(scene, layouts.draw_scene(seed))
        )
    assert len(scenes) == 2


def test_a_painting_is_drawn(tmp_path):
    assert invoke("painting", tmp_path / "painting.png", "--steps", 1).exit_code == 0
    with Image.open(tmp_path / "painting.png") as picture:
        assert picture.width > 1000


def test_the_condition_is_one_hot_with_edges():
    labels = np.array([[0, 0, 1], [255, 2, 1]])
    instances = np.array([[5, 5, 5], [7, 5, 5]])
    condition = layouts.condition(labels, instances, num_classes=3)
    assert condition.shape == (1, 5, 2, 3) and condition.dtype == torch.float32
    assert torch.equal(condition[0, :4].argmax(0), torch.tensor([[0, 0, 1], [3, 2, 1]]))
    assert torch.equal(condition[0, :4].sum(0), torch.ones(2, 3))
    assert torch.equal(condition[0, 4], torch.tensor([[1.0, 0, 0], [1, 1, 0]]))
    assert [size.shape for size in layouts.resized(labels, instances, (4, 6))] == [(4, 6), (4, 6)]


def test_scenes_that_cannot_be_read(tmp_path):
    (tmp_path / "label").mkdir()
    with pytest.raises(FileNotFoundError, match="label_folder is .* should be a folder with PNGs"):
        layouts.load_scenes(tmp_path / "label")
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "label" / "0.png")
    with pytest.raises(FileNotFoundError, match="is missing"):
        layouts.load_scenes(tmp_path / "label", tmp_path)
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"is \[4, 6\]; it should be \[4, 5\]"):
        layouts.load_scenes(tmp_path / "label", tmp_path)
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "label" / "0.png")
    with pytest.raises(ValueError, match="mode RGB"):
        layouts.load_scenes(tmp_path / "label")
    with pytest.raises(ValueError, match="labels has a 9; it should have 0 to 3, or 255"):
        layouts.condition(np.array([[0, 9]]), None, num_classes=4)


def test_the_picture_is_drawn(tmp_path):
    folder, _ = layouts.save_scenes(tmp_path, 1)
    for name, options in [("drawn.png", []), ("read.png", ["--labels", folder])]:
        result = invoke("picture", tmp_path / name, "--size", 32, *options)
        assert result.exit_code == 0, result.output
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and picture.width == 1800 and 600 < picture.height < 900
    result = invoke("picture", tmp_path / "none.png", "--labels", folder, "--scene", 1)
    assert result.exit_code == 2 and "has 1 PNGs; it should have at least 2" in " ".join(
        result.output.replace("│", "").split()
    )
    assert not (tmp_path / "none.png").exists()


def test_the_table_of_measurements(tmp_path):
    assert summary.summary(tmp_path).count("not measured yet") == len(summary.WANTED)
    (tmp_path / "gpu").mkdir()
    row = {"case": "generator", "problem": "COCO", "mode": "forward", "overhead": None}
    rows = [
        row | {"variant": "eager", "times": [0.004, 0.0021, 0.001], "ratio": [1, 1, 1]},
        row | {"variant": "torch.compile", "times": [], "ratio": None},
        row
        | {"variant": "spade_fast", "times": [0.0123], "ratio": [1.9, 2, 2.1], "overhead": 1.234},
    ]
    rows.append(rows[2] | {"variant": "spade_fast, prepared", "over_limit": 1.567})
    measured = {"environment": {"device": "NVIDIA H100", "dtype": "bfloat16"}, "rows": rows}
    (tmp_path / "gpu" / "generator.json").write_text(json.dumps(measured))
    (tmp_path / "gpu" / "gpu.json").write_text(
        json.dumps({"environment": {"device": "NVIDIA H100"}, "stages": []})
    )
    written = summary.summary(tmp_path).splitlines()
    for what, limit in (("forward", ""), ("forward, prepared", "1.57")):
        figures = f"2.10 | – | 12.3 | 2.00 | 1.23 | {limit} |"
        assert f"| NVIDIA H100 | generator COCO, bfloat16, {what} | {figures}" in written


def test_the_commit_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc")
    assert report.commit() == "abc"


def test_the_gpu_commands_dry_run():
    result = invoke("gpu", "--dry-run")
    assert result.exit_code == 0
    for stage in gpu.STAGES:
        assert f"{stage.name:{gpu.WIDTH}} at most {stage.seconds:3} s" in result.output
    assert gpu.TOTAL < 9 * 60
    result = invoke("gpu", "--dry-run", "--stage", "racecheck of cuda", "--stage", "decoder")
    assert (
        "racecheck" in result.output
        and "decoder" in result.output
        and "memcheck" not in result.output
    )
    assert invoke("gpu", "--stage", "nothing").exit_code == 2


def test_the_gpu_command_begins_with_the_most_valuable_stages():
    names = [stage.name for stage in gpu.STAGES]
    order = ("build", "smoke", "modulate", "generator", "tests of cuda", "memcheck of cuda")
    assert sorted(order, key=names.index) == list(order) and names[0] == order[0]
    compiled = [stage for stage in gpu.STAGES if stage.name.endswith("compiled")]
    assert compiled and gpu.STAGES[-len(compiled) :] == compiled
    measured = [stage for stage in gpu.STAGES if "--json" in stage.command]
    for stage in measured:
        assert ("--without torch.compile" in " ".join(stage.command)) == (stage not in compiled)
    assert "max-autotune" in gpu.STAGES[-1].command
    assert len({stage.command[-1] for stage in measured}) == len(measured)  # none is written over


def test_every_stage_is_a_valid_command(monkeypatch):
    def stop(option, path):
        raise typer.BadParameter("all else is understood")

    monkeypatch.setattr(cli, "check_device", lambda name: name)
    monkeypatch.setattr(cli, "check_folder", stop)  # the last check
    for stage in gpu.STAGES:
        command = [part.format(out=".") for part in stage.command]
        if "pytest" in command:
            assert all((gpu.ROOT / part).exists() for part in command if part.endswith(".py"))
        elif "-c" in command:
            compile(command[-1], stage.name, "exec")
        elif "benchmarks" in command:
            result = invoke(*command[command.index("benchmarks") + 1 :])
            assert result.exit_code == 2 and "all else is understood" in result.output


def test_programs_are_found_in_the_toolkit(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "CUDA_HOME", str(tmp_path))
    tool = tmp_path / "bin" / "only-in-the-toolkit"
    tool.parent.mkdir()
    tool.write_text(f"#!{sys.executable}\nprint('it ran')\n")
    tool.chmod(0o755)
    assert gpu.run(tmp_path, [gpu.Stage("tool", "", [tool.name], 60, tool.name)], say=str)
    assert "it ran" in (tmp_path / "log.txt").read_text()


def test_a_build_is_for_this_machines_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = gpu.for_this_gpu()
    assert found["TORCH_CUDA_ARCH_LIST"] == "9.0" and int(found["MAX_JOBS"]) >= 1


def test_the_gpu_command_on_real_scenes(tmp_path):
    folder, instances = layouts.save_scenes(tmp_path, 2)
    result = invoke("gpu", "--dry-run", "--labels", folder)
    assert result.exit_code == 2 and "has 2 PNGs; it should have at least 8" in " ".join(
        result.output.replace("│", "").split()
    )
    stages = gpu.with_scenes(gpu.STAGES, folder, instances)
    for before, stage in zip(gpu.STAGES, stages):
        added = stage.command[len(before.command) :]
        expected = ["--labels", str(folder), "--instances", str(instances)]
        assert added == (expected if "--json" in stage.command else [])


def test_the_smoke_test_finds_wrong_results(monkeypatch, capsys):
    plans = gpu.smoke_plans(Settings("cpu", batch=2, without=("torch.compile",)), few=True)
    few = [plan for plan in plans if "33 × 9²" in plan.name]
    assert len(few) == 8
    monkeypatch.setattr(gpu, "smoke_plans", lambda settings, few_ones=few, **named: few_ones)
    monkeypatch.setattr(generator, "generator", lambda settings: iter(()))
    gpu.smoke("cpu", ("cpu", "torch"))
    assert capsys.readouterr().out.count("agrees") == 16
    right = spade_fast.spade_modulate
    monkeypatch.setattr(
        spade_fast, "spade_modulate", lambda *args, **named: right(*args, **named) * 1.1
    )
    with pytest.raises(SystemExit, match="8 results failed or differ"):
        gpu.smoke("cpu", ("cpu",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_command_without_a_gpu(tmp_path):
    result = invoke("gpu", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "there is no CUDA GPU here" in result.output
    assert not (tmp_path / "out").exists()


def test_a_stage_that_fails_or_hangs_does_not_affect_the_others(tmp_path):
    def stage(name, code, seconds=60, needs=None):
        return gpu.Stage(name, "", [sys.executable, "-c", code], seconds, needs)

    stages = [
        stage("fails", "print('before'); raise SystemExit(3)"),
        stage("hangs", "import time; time.sleep(60)", 1),
        stage("writes", "open(r'{out}/result', 'w').write('here')"),
        stage("lacks", "", needs="no-such-program"),
        stage("late", ""),
    ]
    stages[-1] = dataclasses.replace(stages[-1], seconds=0)
    said = []
    assert not gpu.run(tmp_path, stages, say=said.append)
    outcomes = {
        entry["name"]: entry["outcome"]
        for entry in json.loads((tmp_path / "gpu.json").read_text())["stages"]
    }
    assert outcomes == {
        "fails": "failed with 3",
        "hangs": "stopped after 1 s",
        "writes": "passed",
        "lacks": "left out: no-such-program is not installed",
        "late": "left out: no time is left",
    }
    assert (
        (tmp_path / "result").read_text() == "here"
        and "before" in (tmp_path / "log.txt").read_text()
        and len(said) == 5
    )
    assert gpu.run(tmp_path, [stages[2], stages[3]], say=said.append)
