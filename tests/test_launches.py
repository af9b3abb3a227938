"""The counts of a GPU's work without a GPU are right, and no path exceeds its limit."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import spade_fast
from benchmarks import cli, launches, predictions
from spade_fast import SemanticLayout, kernels
from spade_fast.kernels import contract


def test_no_path_exceeds_its_limit():
    found = launches.count_all()
    assert launches.excesses(found) == []
    assert launches.LIMITS.keys() == found.keys() - {"generator, eager"}
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(launches.table(found))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert all(name.split(",")[0] in text for name in found)
    predictions_are_complete(found)


def predictions_are_complete(found):
    """Each path has a prediction, and each operator of the CUDA backend except apply_out, whose
    kernel is that of apply. Measured times are beside, and named as such.
    """
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(*launches.predicted(found, list(found)), sep="\n")
    text = capture.get()
    times, operators = text.split("operator, its mean")
    assert all(f"\n{name} " in times for name in found)
    known = {*contract.MODULATION, *contract.GATHERING, *launches.NUMBERING} - {"apply_out"}
    assert all(f"\n{name}, " in operators for name in known)
    assert "predicted" in times.splitlines()[1] and "predicted µs" in operators
    assert "not measured" in operators
    works = {name: counts.work for name, counts in found.items()}
    rows = list(predictions.rows(launches.model(found), works))
    assert all(row.then == row.measured for row in rows if row.ratio == "constant")
    assert {row.path: row.measured for row in rows}["generator, frozen"] == "6.69"
    documented = (Path(__file__).parent.parent / "docs" / "pages" / "gpu.md").read_text()
    for row in rows:
        counts = found[row.path.removesuffix(", graph")]
        cells = [row.path, str(counts.launches), str(counts.waits), row.predicted]
        cells += [row.then or "–", row.measured or "–"]
        named = row.path.startswith(("from_segmap", "numbering", "generator"))
        assert not named or f"| {' | '.join(cells)} |\n" in documented


def test_a_count_above_its_limit_is_reported(monkeypatch):
    monkeypatch.setattr(
        launches, "count_all", lambda names: dict.fromkeys(names, launches.Counts(12, 1))
    )
    monkeypatch.setattr(launches, "predicted", lambda everything, names: ())
    monkeypatch.setitem(launches.LIMITS, "block", launches.Limit(11, 0))
    result = CliRunner().invoke(cli.app, ["launches", "--only", "block"])
    assert result.exit_code == 1
    assert "block: 12 launches, the limit is 11" in result.output
    assert "block: 1 waits, the limit is 0" in result.output
    monkeypatch.setitem(launches.LIMITS, "block", launches.Limit(12, 1))
    assert CliRunner().invoke(cli.app, ["launches", "--only", "block"]).exit_code == 0
    assert CliRunner().invoke(cli.app, ["launches", "--only", "nothing"]).exit_code == 2


X = torch.ones(2, 3)
OWN = ("convolve_windows", "sum_lists", "instance_forward", "instance_backward")


@pytest.mark.parametrize(
    "call,found",
    [
        (lambda: X + X, (1, 0, 1, 24)),
        (lambda: X.t()[1:].unsqueeze(0), (0, 0, 0, 0)),
        (lambda: torch.empty(5, device="cuda"), (0, 0, 1, 20)),
        (lambda: torch.zeros(5, device=X.device), (1, 0, 1, 20)),
        (lambda: X.clone().mul_(2), (2, 0, 1, 24)),
        (lambda: X.to("cuda:0").cuda(), (0, 0, 0, 0)),
        (lambda: X.new_tensor([1.0]), (1, 1, 0, 0)),
        (lambda: X.tolist(), (1, 1, 0, 0)),
        (lambda: X.sum().item(), (2, 1, 1, 4)),
        (lambda: bool((X > 0).all()), (3, 1, 2, 7)),
        (lambda: X.nonzero(), (3, 1, 1, 96)),
    ],
)
def test_counts_of_single_operations(call, found):
    counts = launches.count(call)
    assert (counts.launches, counts.waits, counts.allocations, counts.bytes) == found


def test_backward_is_counted():
    x = X.clone().requires_grad_()
    counts = launches.count(lambda: torch.autograd.grad((x * x).sum(), x))
    # The product, then its gradients for both factors, which are added.
    assert counts.operators["mul"] == 3 and counts.operators["add"] == 1


def test_the_package_takes_a_gpus_code_paths():
    spade, x = spade_fast.SPADE(8, 5, 4).bfloat16(), torch.randn(1, 8, 6, 6).bfloat16()
    x.requires_grad_()
    labels = torch.arange(36).view(1, 6, 6) // 8
    counts = launches.Counts()
    with launches.on_gpu(counts):
        assert X.is_cuda and not X.is_cpu and X.device.type == "cuda"
        layout = SemanticLayout.from_labels(labels, 5)
        with spade_fast.window_mode("always"):
            torch.autograd.grad(spade(x, layout).sum(), [x, *spade.parameters()])
    own = {name for name in counts.operators if name.startswith("spade_fast")}
    own -= {f"spade_fast::{name}" for name in launches.NUMBERING}
    assert own == {f"spade_fast::{name}" for name in OWN}
    assert counts.operators["spade_fast::instance_backward"] == 7
    assert X.is_cpu and X.device.type == "cpu" and len(kernels.BEST_FIRST) > 1


def test_windows_are_numbered_as_on_the_host():
    labels = torch.randint(3, (1, 12, 12))
    expected = SemanticLayout.from_labels(labels, 3).windows((12, 12), 3)
    with launches.on_gpu(launches.Counts()):
        found = SemanticLayout.from_labels(labels, 3).windows((12, 12), 3)
    assert torch.equal(found.index, expected.index) and found.count == expected.count
