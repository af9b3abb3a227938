"""A few cases that stand for many."""

from collections.abc import Sequence


def covering(cases: Sequence[set]) -> set[int]:
    """The numbers of a small set of cases that cover all combinations that occur in any case. Cases
    with the most new combinations are chosen first. A case without combinations is kept.
    """
    kept, met = set(), set()
    for least in range(max(map(len, cases)), -1, -1):
        for number, meeting in enumerate(cases):
            is_wanted = len(meeting - met) >= least if least else not meeting
            if is_wanted:
                kept.add(number)
                met |= meeting
    return kept
