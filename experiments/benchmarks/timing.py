"""Fair timing on a machine that does other things too, and plain tables of the results."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Timing(NamedTuple):
    """Seconds of one call: the first one (which compiles), the fastest and the median of the later ones, how many."""

    first_s: float
    min_s: float
    median_s: float
    rounds: int


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    budget_s: float = math.inf,
    check: Callable[[dict[str, object]], object] = lambda outputs: None,
) -> dict[str, Timing]:
    """Calls each function once, then all of them in turn, `repeats` times: a slow spell of the machine hits them all.

    Args:
      functions: callables by name; each returns only when its work is done.
      repeats: timed calls of each, after the first.
      budget_s: no further round begins when the timed ones have taken this long together; one is always timed.
      check: is given what the first calls returned, and raises if they do not do the same work.
    Raises:
      ValueError: repeats below 1; the message carries it.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")

    def call(function: Callable[[], object]) -> tuple[float, object]:
        start = time.perf_counter()
        output = function()
        return time.perf_counter() - start, output

    firsts = {name: call(function) for name, function in functions.items()}
    first = {name: seconds for name, (seconds, _) in firsts.items()}
    check({name: output for name, (_, output) in firsts.items()})
    del firsts
    rounds: list[dict[str, float]] = []
    while len(rounds) < repeats and sum(sum(one.values()) for one in rounds) < budget_s:
        rounds.append({name: call(function)[0] for name, function in functions.items()})
    timings = {}
    for name in functions:
        later = [one[name] for one in rounds]
        timings[name] = Timing(first[name], min(later), statistics.median(later), len(later))
    return timings


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Text in columns, the first flush left, the others flush right."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def joined(line: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *cells]).rstrip()

    return "\n".join(map(joined, lines))
