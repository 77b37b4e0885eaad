"""Cards: what a paper reports, what we reached, how far, with which deviations."""

import dataclasses
import math
from collections.abc import Sequence

COLUMNS = ("system", "metric", "reported", "reached", "steps", "hardware", "status")


@dataclasses.dataclass(frozen=True)
class Card:
    """One result of one paper beside ours.

    Attributes:
      system: the row's name, "Music Transformer, relative".
      paper: authors, year, link, table and row.
      metric: what is counted, on which data, with its unit: "JSB validation NLL, nats per token".
      reported: the paper's value; None where the paper has none.
      reached: our value; None where no training has reached the end, and then `status` says so.
      status: "trained", "not trained", "stopped at the time limit", ...
      steps: optimizer steps behind `reached`, or run so far.
      hardware: what it ran on, and for how long; empty while nothing ran.
      command: the command line that repeats it.
      deviations: what differs from the paper, one sentence each; ("none",) where nothing does.

    Raises:
      ValueError: an empty field, a value that is not finite, or a `reached` without the steps and hardware behind it;
        the message names the system, the field and what was expected.
    """

    system: str
    paper: str
    metric: str
    reported: float | None
    reached: float | None
    status: str
    steps: int
    hardware: str
    command: str
    deviations: tuple[str, ...]

    def __post_init__(self):
        for field in ("system", "paper", "metric", "status", "command"):
            if not getattr(self, field).strip():
                raise ValueError(f"card {self.system!r}: {field} is empty")
        if isinstance(self.deviations, str) or not self.deviations or not all(text.strip() for text in self.deviations):
            raise ValueError(
                f"card {self.system!r}: deviations is {self.deviations!r}; expected a tuple with one sentence for each "
                'difference from the paper, or ("none",)'
            )
        for field in ("reported", "reached"):
            value = getattr(self, field)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"card {self.system!r}: {field} is {value}; expected a finite number or None")
        if self.steps < 0:
            raise ValueError(f"card {self.system!r}: steps is {self.steps}; expected 0 or more")
        if self.reached is not None and not (self.steps and self.hardware.strip()):
            raise ValueError(
                f"card {self.system!r}: reached is {self.reached}, but steps is {self.steps} and hardware is "
                f"{self.hardware!r}; a value needs both"
            )


def describe(card: Card) -> dict[str, str]:
    """Every field of the card as text, under the heading that readers see, in reading order."""
    fields = {
        "Paper": card.paper,
        "Metric": card.metric,
        "Reported": _value(card.reported, "not reported"),
        "Reached": _value(card.reached, "no value"),
        "Status": card.status,
        "Steps": f"{card.steps:,}",
        "Hardware": card.hardware or "none yet",
        "Command": card.command,
        "Deviations": " ".join(card.deviations),
    }
    if card.reported is not None and card.reached is not None:
        fields["Reached"] += f" ({card.reached - card.reported:+.3f} from the paper's)"
    return fields


def table(cards: Sequence[Card]) -> str:
    """The cards as a plain text table, one line each; a value that does not exist is "-", and the status says why."""
    rows = [COLUMNS]
    for card in cards:
        reported, reached = _value(card.reported, "-"), _value(card.reached, "-")
        rows.append((card.system, card.metric, reported, reached, f"{card.steps:,}", card.hardware or "-", card.status))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    rows.insert(1, tuple("-" * width for width in widths))
    right = [name in ("reported", "reached", "steps") for name in COLUMNS]
    cells = [
        [
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        ]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _value(value: float | None, absent: str) -> str:
    return absent if value is None else f"{value:.3f}"
