"""`python -m benchmarks service`: its measurements, and that a wrong image gets no times."""

import dataclasses
import json
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import cli, service
from spade_fast import Service

LOAD = service.Load(seconds=0.2, clients=3, layouts=2, size=32, ngf=2)
OURS, LOCK, ONNX = "spade_fast, Service", "eager, a lock", "ONNX Runtime"


@pytest.fixture(scope="module")
def inputs():
    return service.Inputs(LOAD)


def replace_result(monkeypatch, name, change):
    """Wraps a method of Service: it returns change(service, its usual result)."""
    right = getattr(Service, name)
    monkeypatch.setattr(Service, name, lambda self, *inputs: change(self, right(self, *inputs)))


def test_images_differ_by_weights_and_layouts(inputs):
    images = [image for found in inputs.by_hand for image in found]
    assert len(images) == 4
    for number, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[:number])


@pytest.mark.parametrize("variant", [OURS, LOCK])
def test_right_images_are_timed(variant, inputs):
    row = service.measured(variant, inputs)
    assert row.matches and row.failure is None and 0 <= row.excess <= 1
    assert len(row.times) >= LOAD.clients + 1 and row.p50 <= row.p95 <= max(row.times)
    assert min(row.alone_new, row.alone_known, row.images_per_second) > 0
    assert row.images_per_second < len(row.times) / LOAD.seconds
    assert (0 < row.cache <= 256_000_000) if variant == OURS else row.cache == 0


def test_a_cache_for_a_single_layout_keeps_its_limit(inputs, monkeypatch):
    monkeypatch.setattr(inputs, "load", dataclasses.replace(LOAD, cache="400kB"))
    row = service.measured(OURS, inputs)
    assert row.matches and row.times and 0 < row.cache <= 400_000


def test_zero_seconds_suffice_for_old_and_new_weights(inputs):
    load = service.Load(seconds=0, clients=1, layouts=2, size=32, ngf=2)
    asked = []
    server = service.Server(
        lambda number: asked.append("image") or torch.zeros(1), lambda: asked.append("reload")
    )
    times, seconds = service.together(service.Heard(server), load)
    assert len(times) >= 2 and sum(times) <= seconds
    assert asked[0] == asked[-1] == "image" and asked.count("reload") == 1


def test_an_image_that_differs_by_a_bit_gets_no_times(inputs, monkeypatch):
    def off(self, image):
        image[0, 0, 0, 0] = torch.nextafter(image[0, 0, 0, 0], torch.tensor(2.0))
        return image

    replace_result(monkeypatch, "generate", off)
    row = service.measured(OURS, inputs)
    assert not row.matches and not row.times and row.images_per_second is None
    assert "is not that of the " in row.failure


def test_old_weights_after_the_reload_get_no_times(inputs, monkeypatch):
    monkeypatch.setattr(Service, "reload", lambda self, weights: None)
    row = service.measured(OURS, inputs)
    assert not row.matches and not row.times
    assert row.failure.endswith("is not that of the new weights, after the reload")


def test_a_failing_reload_or_request_is_reported(inputs, monkeypatch):
    def fail(self, *inputs):
        raise OSError("no such luck")

    for name in ("reload", "generate"):
        with monkeypatch.context() as patch:
            patch.setattr(Service, name, fail)
            row = service.measured(OURS, inputs)
        assert row.failure == "OSError: no such luck" and not row.times


def test_clients_end_if_all_fail(inputs):
    def fail(number):
        raise OSError("no such luck")

    with pytest.raises(OSError, match="no such luck"):
        service.together(service.Heard(service.Server(fail)), LOAD)


def test_a_cache_above_its_limit_gets_no_times(inputs, monkeypatch):
    monkeypatch.setattr(Service, "bytes", 256_000_001)
    row = service.measured(OURS, inputs)
    assert not row.times
    assert row.failure == "256000001 bytes are kept; they should be at most 256000000"


def test_a_rival_whose_images_differ_gets_no_times(inputs, monkeypatch):
    assert len(inputs.truths) == LOAD.layouts  # of the right network
    wrong = 1.01 * inputs.by_hand[0][0]
    monkeypatch.setattr(inputs.published[0], "forward", lambda condition: wrong)
    row = service.measured(LOCK, inputs)
    assert (
        row.failure is None and not row.matches and not row.times and row.images_per_second is None
    )


def test_the_command(tmp_path, monkeypatch):
    """Without ONNX Runtime, which is reported; the other two servers are measured."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    file = tmp_path / "out.json"
    arguments = ["--quick", "--seconds", "0", "--clients", "2", "--layouts", "1"]
    result = CliRunner().invoke(cli.app, ["service", *arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "ONNX Runtime needs three packages: pip install onnx" in " ".join(result.output.split())
    rows = {row["variant"]: row for row in json.loads(file.read_text())["rows"]}
    assert not rows[ONNX]["times"] and rows[ONNX]["p95"] is None
    assert rows[OURS]["p95"] > 0 and rows[LOCK]["p95"] > 0
    assert rows[OURS]["problem"] == "COCO 64², ngf 8, 2 clients, 1 layouts, cache 256MB"


def test_options_that_the_command_refuses(monkeypatch):
    monkeypatch.setattr(service, "Inputs", None)  # nothing is built
    for arguments, words in [
        (["--cache", "much"], "cache is 'much'; it should be bytes"),
        (["--json", "/no/such/folder/out.json"], "folder that exists"),
        (["--clients", "0"], "should be greater than or equal to 1"),
    ]:
        result = CliRunner().invoke(cli.app, ["service", *arguments])
        assert result.exit_code == 2
        assert words in " ".join(result.output.replace("│", " ").split()), result.output


def test_a_wrong_image_of_the_service_is_an_error(monkeypatch):
    monkeypatch.setattr(service, "SERVERS", {OURS: service.our_service})
    monkeypatch.setattr(Service, "reload", lambda self, weights: None)
    arguments = ["--quick", "--seconds", "0", "--clients", "1", "--layouts", "1"]
    result = CliRunner().invoke(cli.app, ["service", *arguments])
    assert result.exit_code == 1 and "after the reload" in " ".join(result.output.split())


def test_the_table_can_be_read_in_80_columns():
    row = service.Row("service", "problem", "forward", OURS, 0.5, times=[1.0], cache=12345 << 20)
    row.alone_new = row.alone_known = row.p50 = row.p95 = 12.3456
    row.images_per_second = 12345.6
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(service.table([row, service.Row("service", "problem", "forward", ONNX)]))
    assert max(map(len, capture.get().splitlines())) <= 80
    for words in ("12346 ms", "12346", "12345 MiB", "yes 0.50"):
        assert words in capture.get()


@pytest.mark.full
@pytest.mark.large
def test_onnx_runtime_computes_the_same(inputs):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    row = service.measured(ONNX, inputs)
    assert row.matches and row.times and row.cache == 0
