"""Results as tables, as a JSON file, and as a chart."""

import dataclasses
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Group
from rich.markup import escape

import spade_fast

from .cases.problem import BARE, DEVICE_ALONE, WHOLE_CALLS
from .measure import LIMIT_IN_DOUBLE, copy_bandwidth
from .tables import narrow_table

CAPTION = (
    "match: the error as a fraction of the allowed error. ratio: eager's time over this variant's,"
    " round by round. overhead: this variant's time over the floor's, which is plain instance norm."
    " ÷ limit: this variant's time over that of the network's convolutions and activations alone."
    " kept: what forward keeps for backward."
    " of a copy: the bytes that the operation has to move per second, as a fraction of a copy's."
)


CLOCKS = {DEVICE_ALONE: "time of the operation", WHOLE_CALLS: "time of a call"}


def tables(rows):
    """Measured rows as a renderable of rich: a table for each problem."""
    problems = {}
    for row in rows:
        title = f"{row.case} {row.problem}, {row.mode}, {CLOCKS[row.clock]}"
        problems.setdefault(title, []).append(row)
    columns = [
        "match",
        "time",
        "spread",
        "ratio\n(quartiles)",
        "over-\nhead",
        "÷\nlimit",
        "memory\n(MiB)",
    ]
    columns += ["kept\n(MiB)"] * any(row.kept_memory is not None for row in rows)
    columns += ["of a\ncopy"] * any(row.bandwidth for row in rows)
    found = []
    for name, measured in problems.items():
        table = narrow_table("variant", *columns, title=f"\n{escape(name)}")
        for row in measured:
            table.add_row(row.variant.replace(", ", ",\n  "), match(row), *numbers(row))
        found.append(table)
    return Group(*found, "", CAPTION)


def match(row):
    """Whether the row matches, and its error as a fraction of the allowed error."""
    if row.failure:
        return "[red]failed"
    if row.excess is None:
        return f"[dim]{row.variant.split(',')[0]}"
    if row.error_in_double and row.error_in_double > LIMIT_IN_DOUBLE:
        return f"[red]NO[/] {row.error_in_double:.1e}\nin float64"
    return f"[green]yes[/] {row.excess:.2f}" if row.matches else f"[red]NO[/] {row.excess:.3g}"


def numbers(row):
    """A row's figures as text; none for a row that was not timed."""
    if not row.times:
        return []
    ratio = f"{row.ratio[1]:.2f} ({row.ratio[0]:.2f}–{row.ratio[2]:.2f})" if row.ratio else ""
    overheads = (f"{number:.2f}" if number else "" for number in (row.overhead, row.over_limit))
    return [
        f"{short(row.median * 1e3, 2)} ms",
        f"± {row.spread * 100:.0f}%",
        ratio,
        *overheads,
        short(row.peak_memory / 2**20, 1),
        *([short(row.kept_memory / 2**20, 1)] if row.kept_memory is not None else []),
        *([f"{row.bandwidth:.0%}"] if row.bandwidth else []),
    ]


def short(number, decimals):
    """A number as text with `decimals` decimals, or without any from 1000 on."""
    return f"{number:.{decimals if number < 1000 else 0}f}"


def environment(settings):
    """The facts that a reader needs to reproduce the numbers."""
    cuda = torch.device(settings.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name()
        if cuda
        else f"CPU {processor()}, {instructions()}, {torch.get_num_threads()} threads",
        "dtype": str(settings.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "torch.compile": settings.compile_mode,
        "spade_fast": spade_fast.__version__,
        "commit": commit(),
        **({"copy, bytes/s": round(copy_bandwidth(settings.device))} if cuda else {}),
        "allocator": {
            name: value for name, value in os.environ.items() if name.startswith("MALLOC_")
        }
        or "the system's defaults",
        "backends": {status.name: status.reason or "runs" for status in spade_fast.backends()},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def commit():
    """The commit of this project that runs: the environment variable COMMIT, meant for copies of
    the files without this Git history; otherwise what `git describe` returns.
    """
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    try:
        command = ["git", "describe", "--always", "--dirty"]
        found = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"


def processor():
    """The processor's model name if the system has one, otherwise the architecture."""
    try:
        lines = open("/proc/cpuinfo").read().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def instructions():
    """The vector instructions that PyTorch uses here: of the processor, or of the environment
    variable ATEN_CPU_CAPABILITY.
    """
    return torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512")


def save_json(path, facts, rows):
    """Writes all measurements, with the time of every round, one line per row. facts: the
    environment at the start of the run.
    """
    records = [
        dataclasses.asdict(row) | {"times": [round(time, 7) for time in row.times]} for row in rows
    ]
    lines = ",\n".join(map(json.dumps, records))
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(f'{{"environment": {json.dumps(facts)},\n"rows": [\n{lines}]}}\n')
    unfinished.replace(path)


COLOURS = {
    "eager": "#9aa5b1",
    "torch.compile": "#e0a458",
    "ONNX Runtime": "#b08968",
    "spade_fast": "#2a6f97",
    "spade_fast, ONNX Runtime": "#2a6f97",
    "spade_fast, ONNX Runtime, pixels": "#c9d6df",
    "spade_fast, prepared": "#468faf",
    "spade_fast, frozen": "#89c2d9",
    "spade_fast, folded, frozen": "#a9d6e5",
    "spade_fast, graph": "#014f86",
    "spade_fast, graph, prepared": "#013a63",
    "spade_fast, pixels": "#c9d6df",
    "spade_fast, windows": "#89c2d9",
    "spade_fast, by itself": "#2a6f97",
    "spade_fast, new condition": "#014f86",
}


# What a chart's bars may show: a row's time over another's, with that other's name in the legend
# (unless it has bars itself) and in the axis' label. The first one that any row has is drawn.
BARS = (
    (lambda row: row.over_limit, "limit: the same without SPADE", "limit"),
    (lambda row: row.overhead, "floor: the same with plain instance norm", "floor"),
    (lambda row: 1 / row.ratio[1] if row.ratio else None, None, "that of eager PyTorch"),
)


def save_chart(path, facts, rows):
    """Draws bars of each variant's time over the limit's (over the floor's or eager's if no problem
    has a limit), grouped by problem, as a PNG or in the format of the path's suffix.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if not row.variant.startswith(tuple(BARE))]
    length_of, line, compared = next(bars for bars in BARS if any(map(bars[0], rows)))
    shown = [row for row in rows if length_of(row)]
    groups = list(dict.fromkeys((row.case, row.problem, row.mode) for row in shown))
    variants = [variant for variant in COLOURS if any(row.variant == variant for row in shown)]
    height = 0.9 / len(variants)
    figure, axes = plt.subplots(
        figsize=(9, 1.2 + 0.22 * len(variants) * len(groups)), layout="constrained"
    )
    lengths = list(map(length_of, shown))
    labelled = set()
    for row, length in zip(shown, lengths):
        group = groups.index((row.case, row.problem, row.mode))
        place = group + height * (variants.index(row.variant) - (len(variants) - 1) / 2)
        label = (
            None
            if row.variant in labelled
            else {"eager": "eager PyTorch"}.get(row.variant, row.variant)
        )
        labelled.add(row.variant)
        axes.barh(place, length, 0.92 * height, color=COLOURS[row.variant], label=label)
        milliseconds = row.median * 1e3
        text = f"{length:.2f}   {milliseconds:.{0 if milliseconds >= 100 else 2}f} ms"
        axes.annotate(
            text,
            (length, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.axvline(
        1,
        color="black",
        linewidth=1,
        linestyle="--",
        zorder=0,
        label=line,
    )
    axes.set_yticks(
        range(len(groups)), [f"{case} {problem}\n{mode}" for case, problem, mode in groups]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(lengths))
    axes.set_xlabel(f"time ÷ {compared} (lower is better)")
    axes.set_title(f"{facts['device']}, {facts['dtype']}, torch {facts['torch']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda number: labels[number] == line)
    figure.legend(
        [handles[number] for number in order],
        [labels[number] for number in order],
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
