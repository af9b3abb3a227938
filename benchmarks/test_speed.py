"""`pytest benchmarks` runs the quick problems under pytest-benchmark, which saves and compares runs
(--benchmark-autosave, --benchmark-compare).
"""

import pytest

from .cases import CASES
from .cases.problem import Settings
from .measure import check

# torch.compile compiles again in every process, and says nothing about this project.
SETTINGS = Settings(quick=True, without=("torch.compile",))
PLANS = [(name, plan) for name, case in CASES.items() for plan in case(SETTINGS)]


@pytest.mark.parametrize("variant", ["eager", "spade_fast"])
@pytest.mark.parametrize(
    "case,plan", PLANS, ids=[f"{name} {plan.name} {plan.mode}" for name, plan in PLANS]
)
def test_speed(case, plan, variant, benchmark):
    problem = plan.build()
    assert check(case, problem)[variant].matches
    benchmark.group = f"{case} {problem.name} {problem.mode}"
    benchmark(problem.variants[variant])
