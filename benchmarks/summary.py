"""The table of measurements in docs/pages/benchmarks.md, computed from benchmarks/results/. Where a
result is missing, the table says "not measured yet".
"""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
WANTED = (
    ("CPU", "generator", "float32", ""),
    ("CPU", "discriminator", "float32", ""),
    ("CPU", "training", "float32", ""),
    ("CPU", "converted", "float32", ""),
    ("CPU", "generator", "bfloat16", "no spectral norm"),
    ("CPU", "monai", "float32", ""),
    ("CPU", "spatial", "float32", ""),
    ("CPU", "modulate", "float32", "128 × 256²"),
    ("GPU", "generator", "bfloat16", ""),
    ("GPU", "modulate", "bfloat16", "128 × 256²"),
    ("GPU", "lookup", "bfloat16", "128 × 256²"),
    ("GPU", "modulate", "float32", "128 × 256²"),
)
ON_CPU = ("spade_fast", "spade_fast, frozen")  # the variants with a line there
HEADER = (
    "| on | what | eager | torch.compile | spade_fast | times eager | overhead | ÷ limit |",
    "|---|---|---|---|---|---|---|---|",
)


def summary(results=RESULTS):
    """A table in Markdown: medians in ms, then eager's time over spade_fast's, and spade_fast's
    over the floor's and over the limit's. On GPUs, eager is the faster of both memory formats, and
    each variant of spade_fast has a line.
    """
    lines, measured = (
        list(HEADER),
        [json.loads(path.read_text()) for path in sorted(results.rglob("*.json"))],
    )
    for kind, case, dtype, only in WANTED:
        found = [line for one in measured for line in lines_of(one, kind, case, dtype, only)]
        what = ", ".join(filter(None, (case, only, dtype)))
        lines += found or [f"| a {kind} | {what} | not measured yet | | | | | |"]
    return "\n".join(lines)


def lines_of(measured, kind, case, dtype, only):
    """The lines for the rows of one file that have this kind of device, case and dtype."""
    device = measured.get("environment", {}).get("device", "")
    if ("CPU" if device.startswith("CPU") else "GPU") != kind or measured["environment"].get(
        "dtype"
    ) != dtype:
        return []
    problems = {}
    for row in measured.get("rows", ()):
        if row["case"] == case and only in row["problem"]:
            problems.setdefault((row["problem"], row["mode"]), {})[row["variant"]] = row
    lines = []
    for (problem, mode), rows in problems.items():
        eager = min(
            (row for name, row in rows.items() if name.startswith("eager")),
            key=median,
            default=None,
        )
        for name, ours in rows.items():
            if not name.startswith("spade_fast") or (kind == "CPU" and name not in ON_CPU):
                continue
            way = name.removeprefix("spade_fast")
            what = f"{case} {problem}, {dtype}, {mode}{way}"
            times = [milliseconds(row) for row in (eager, rows.get("torch.compile"), ours)]
            own = ours["ratio"] and ours["ratio"][1]
            ratio = own if eager is rows.get("eager") else median(eager) / median(ours)
            # Files from before there was a limit lack it.
            figures = (ratio, ours["overhead"], ours.get("over_limit"))
            ratios = [f"{number:.2f}" if number else "" for number in figures]
            lines.append(f"| {' | '.join([device, what, *times, *ratios])} |")
    return lines


def median(row):
    """The median in seconds, or infinity if nothing was timed."""
    return statistics.median(row["times"]) if row["times"] else float("inf")


def milliseconds(row):
    """The median in ms with three digits, or a dash if the row failed or is missing."""
    if row is None or not row["times"]:
        return "–"
    median = statistics.median(row["times"]) * 1e3
    return f"{median:.{max(0, 3 - len(str(int(median))))}f}"
