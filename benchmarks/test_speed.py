"""`pytest benchmarks`: the quick problems under pytest-benchmark, which keeps and compares runs
(--benchmark-autosave, -compare).
"""

import pytest

from .cases import CASES, Settings
from .measure import check

PROBLEMS = [
    (name, problem) for name, case in CASES.items() for problem in case(Settings(quick=True))
]


@pytest.mark.parametrize("variant", ["eager", "spade_fast"])
@pytest.mark.parametrize(
    "case,problem",
    PROBLEMS,
    ids=[f"{name} {problem.name} {problem.mode}" for name, problem in PROBLEMS],
)
def test_speed(case, problem, variant, benchmark):
    problem.variants.pop(
        "torch.compile", None
    )  # compiled anew in every process, it says nothing about this project
    assert check(case, problem)[variant].matches
    benchmark.group = f"{case} {problem.name} {problem.mode}"
    benchmark(problem.variants[variant])
