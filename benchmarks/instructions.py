"""Instructions that a thread issues, counted in machine code as `cuobjdump -sass` lists it.

A kernel decides many things at run time: dtypes, whether rows are aligned, the activation. Of all
paths, the one that counts has the most accesses of 16 bytes, because that is the fast path, of
aligned vectors. Among such paths it is the one with the fewest instructions: the plainest dtypes
and activation.
"""

import re
from typing import NamedTuple

WIDE = re.compile(r"\b(LDG|STG|LDS|LDGSTS)\b[.\w]*\.128\b")


class Path(NamedTuple):
    """A path through the code. wide: the names of its accesses of 16 bytes, such as LDG."""

    instructions: int
    wide: tuple[str, ...]


class Counted(NamedTuple):
    """A path through the whole kernel, which passes each loop's body once, and the bodies of those
    innermost loops that access 16 bytes at a time.
    """

    kernel: Path
    loops: tuple[Path, ...]


def counted(listing: str) -> Counted:
    """The counts of one kernel."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*);", listing)
    places = {int(address, 16): place for place, (address, _) in enumerate(code)}
    texts = [text for _, text in code]
    jumps = [jump(text, places) for text in texts]
    loops = [
        (target, place)
        for place, target in enumerate(jumps)
        if target is not None and target < place
    ]
    bodies = {loop: best_path(texts, jumps, *loop) for loop in loops}
    wide = [loop for loop, body in bodies.items() if body is not None and body.wide]
    innermost = [
        one
        for one in wide
        if not any(other != one and one[0] <= other[0] and other[1] <= one[1] for other in wide)
    ]
    whole = best_path(texts, jumps, 0, len(texts) - 1, ends_anywhere=True)
    return Counted(whole or Path(0, ()), tuple(bodies[loop] for loop in innermost))


def jump(text: str, places: dict[int, int]) -> int | None:
    """The place that an instruction branches to, or None."""
    found = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
    return places.get(int(found[1], 16)) if found else None


def best_path(
    texts: list[str], jumps: list[int | None], first: int, last: int, ends_anywhere: bool = False
) -> Path | None:
    """The path that counts from the first place to the last, which takes no branches back. None if
    there is no path.

    ends_anywhere: it may also end where nothing follows.
    """
    best: dict[int, Path] = {}
    for place in range(last, first - 1, -1):
        rest = [best[at] for at in following(texts[place], jumps[place], place) if at in best]
        if place == last or (ends_anywhere and not rest):
            rest = [Path(0, ())]
        if rest:
            chosen = min(rest, key=lambda path: (-len(path.wide), path.instructions))
            wide = (*WIDE.findall(texts[place]), *chosen.wide)
            best[place] = Path(chosen.instructions + 1, wide)
    return best.get(first)


def following(text: str, target: int | None, place: int) -> list[int]:
    """The places that may follow, without those before."""
    always = not text.startswith("@") and not re.search(r"\bBRA\S* !?U?P\d", text)
    if target is not None and target > place:
        return [target] if always else [place + 1, target]
    return [] if always and re.search(r"\b(EXIT|RET)\b", text) else [place + 1]
