"""One comparison: checks that all do the same work, and a table of how fast each does it, beside a peer and a limit."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.timing import Timing, table


def report(
    title: str,
    timings: Mapping[str, Timing],
    amounts: Mapping[str, float],
    unit: str,
    least_s: Mapping[str, float],
    reference: str,
    columns: Mapping[str, Mapping[str, str]] | None = None,
    absent: Collection[str] = (),
    note: str = "",
) -> dict[str, Any]:
    """Prints a table and returns what is in it.

    Args:
      title: of the table.
      timings: by row.
      amounts: of work in one call, by row, in `unit`s.
      unit: of the rate that is printed.
      least_s: the seconds that the machine needs at least, by row; their share of the median is "of limit".
      reference: row whose rate the others are divided by.
      columns: further cells, by column and row.
      absent: peers that are not installed.
      note: said above the table.
    """
    columns = columns or {}
    rates = {who: amounts[who] / timing.median_s for who, timing in timings.items()}
    rows, found = [], []
    for who, timing in timings.items():
        figures = {
            "who": who,
            **timing._asdict(),
            "per_s": rates[who],
            "of_reference": rates[who] / rates[reference],
            "of_limit": least_s[who] / timing.median_s,
        }
        found.append(figures | {column: cells[who] for column, cells in columns.items()})
        cells = [f"{timing.min_s:.4g}", f"{timing.median_s:.4g}", f"{rates[who]:.4g}"]
        cells += [f"{figures['of_reference']:.2f}", f"{figures['of_limit']:.0%}", f"{timing.first_s:.3g}"]
        rows.append([who, *cells, timing.rounds, *(cells[who] for cells in columns.values())])
    rows += [[who, "not installed", *[""] * (6 + len(columns))] for who in absent]
    header = ["", "min s", "median s", f"{unit}/s", "of reference", "of limit", "first call s", "calls", *columns]
    print(f"\n{title}\nreference: {reference}{note and '; '}{note}\n{table(header, rows)}", flush=True)
    return {"title": title, "unit": unit, "reference": reference, "rows": found, "absent": list(absent)}


def claim(name: str, ratio: float, wanted: float | None = None) -> dict[str, Any]:
    """Prints a ratio, beside the one that is wanted if there is one; never fails."""
    print(f"{name}: {ratio:.2f} times" + ("" if wanted is None else f" (wanted: at least {wanted:g})"), flush=True)
    return {"name": name, "ratio": ratio, "wanted": wanted}


def require_close(
    outputs: Mapping[str, np.ndarray], reference: str, *, tolerance: float, ignore: Collection[str] = ()
) -> None:
    """Compares arrays with the reference's.

    Args:
      outputs: by name.
      reference: its name.
      tolerance: of the root mean square of the difference, as a share of the reference's.
      ignore: names of other outputs, such as those of 8-bit weights.
    Raises:
      ValueError: one has another shape, or differs by more, or is NaN; names it.
    """
    exact = np.asarray(outputs[reference])
    for who in outputs.keys() - ignore:
        found = np.asarray(outputs[who])
        if found.shape != exact.shape:
            raise ValueError(f"{who} gives shape {found.shape}, {reference} {exact.shape}; nothing is timed")
        difference = relative_rms(found, exact)
        if not difference <= tolerance:
            raise ValueError(f"{who} differs from {reference} by {difference:.1e}, allowed {tolerance:g}")


def relative_rms(found: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square of the difference, as a share of that of `exact`."""
    difference = np.sum(np.square(found - exact), dtype=np.float64)
    return float(np.sqrt(difference / np.sum(np.square(exact), dtype=np.float64)))


def require_lengths(who: str, rows: Sequence[Sequence[int]], length: int) -> None:
    """Raises:
    ValueError: a row has another number of tokens; has both.
    """
    for row, tokens in enumerate(rows):
        if len(tokens) != length:
            raise ValueError(f"{who} made {len(tokens)} tokens in row {row}, not {length}; nothing is timed")


def num_same(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """Tokens before the first that is not the reference's."""
    differs = [found != expected for found, expected in zip(tokens, reference, strict=True)]
    return differs.index(True) if True in differs else len(differs)


def count_same(rows: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> int:
    """`num_same` of all rows together."""
    return sum(num_same(*pair) for pair in zip(rows, reference, strict=True))


def require_same_tokens(
    rows: Sequence[Sequence[int]],
    reference: Sequence[Sequence[int]],
    logits: Callable[[int, Sequence[int]], np.ndarray],
    *,
    tolerance: float = 1e-3,
) -> None:
    """Compares texts. One may go its own way after a token that is, to the tolerance, as likely as the reference's.

    Args:
      rows, reference: tokens of each row.
      logits: (row, tokens) -> logits (V,) of the token after these.
      tolerance: of a logit.
    Raises:
      ValueError: another token that is less likely; with row, place and both tokens.
    """
    for row, (found, expected) in enumerate(zip(rows, reference, strict=True)):
        same = num_same(found, expected)
        if same == len(expected):
            continue
        scores = logits(row, expected[:same])
        if not abs(scores[expected[same]] - scores[found[same]]) <= tolerance:
            raise ValueError(
                f"token {same} of row {row} is {found[same]}, the reference's {expected[same]}, whose logits are "
                f"{scores[found[same]]:.4f} and {scores[expected[same]]:.4f}; nothing is timed"
            )
