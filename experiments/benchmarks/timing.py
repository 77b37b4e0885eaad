"""Fair timing on a machine that does other things too, and plain tables of the results."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Timing(NamedTuple):
    """Seconds of one call: the first one (which compiles), the fastest and the median of the later ones."""

    first_s: float
    min_s: float
    median_s: float


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Calls each function once, then all of them in turn, `repeats` times: a slow spell of the machine hits them all.

    Args:
      functions: callables by name; each returns only when its work is done.
      repeats: timed calls of each, after the first.
    Raises:
      ValueError: repeats below 1; the message carries it.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")

    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    first = {name: seconds(function) for name, function in functions.items()}
    rounds = [{name: seconds(function) for name, function in functions.items()} for _ in range(repeats)]
    timings = {}
    for name in functions:
        later = [one[name] for one in rounds]
        timings[name] = Timing(first[name], min(later), statistics.median(later))
    return timings


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Text in columns, the first flush left, the others flush right."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def joined(line: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *cells]).rstrip()

    return "\n".join(map(joined, lines))
