"""The README's table of what was measured, made from benchmarks/results/: what is not there is said
to be not measured yet.
"""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
WANTED = (
    ("CPU", "generator", "float32", ""),
    ("CPU", "discriminator", "float32", ""),
    ("CPU", "converted", "float32", ""),
    ("CPU", "monai", "float32", ""),
    ("CPU", "modulate", "float32", "128 × 256²"),
    ("GPU", "generator", "bfloat16", ""),
    ("GPU", "modulate", "bfloat16", "128 × 256²"),
    ("GPU", "modulate", "float32", "128 × 256²"),
)
VARIANTS = ("eager", "torch.compile", "spade_fast")
HEADER = (
    "| on | what | eager | torch.compile | spade_fast | times eager | overhead |",
    "|---|---|---|---|---|---|---|",
)


def summary(results=RESULTS):
    """A table in Markdown: medians in ms, then spade_fast's ratio to eager and to the floor, as the
    rounds had them.
    """
    lines, measured = (
        list(HEADER),
        [json.loads(path.read_text()) for path in sorted(results.rglob("*.json"))],
    )
    for kind, case, dtype, only in WANTED:
        found = [line for one in measured for line in lines_of(one, kind, case, dtype, only)]
        what = ", ".join(filter(None, (case, only, dtype)))
        lines += found or [f"| a {kind} | {what} | not measured yet | | | | |"]
    return "\n".join(lines)


def lines_of(measured, kind, case, dtype, only):
    """The lines for one file, if it is of this kind of device, case and dtype."""
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
        if "spade_fast" not in rows:  # left out, by --without
            continue
        ours = rows["spade_fast"]
        times = [milliseconds(rows.get(variant)) for variant in VARIANTS]
        ratios = [
            f"{number:.2f}" if number else ""
            for number in (ours["ratio"] and ours["ratio"][1], ours["overhead"])
        ]
        lines.append(
            f"| {' | '.join([device, f'{case} {problem}, {dtype}, {mode}', *times, *ratios])} |"
        )
    return lines


def milliseconds(row):
    """The median of what was measured, with three digits; nothing for what failed or is missing."""
    if row is None or not row["times"]:
        return "–"
    median = statistics.median(row["times"]) * 1e3
    return f"{median:.{max(0, 3 - len(str(int(median))))}f}"
