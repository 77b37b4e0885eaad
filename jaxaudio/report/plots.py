"""Pictures of a run: its losses, its place on the ladder, its notes, and what its attention looks at.

Every function returns a matplotlib `Figure` made without pyplot, so nothing global changes. The background is
transparent and text is one mid grey, readable on light and dark pages; `to_svg` turns that grey into the page's own
text colour. Series colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from jaxaudio.data.chorales import VOICES
from jaxaudio.data.midi import Note

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
INK = "#7b8087"  # also the marker that to_svg replaces, so no series uses it

_PITCH_CLASSES = ("C", "C♯", "D", "D♯", "E", "F", "F♯", "G", "G♯", "A", "A♯", "B")


class Roll(NamedTuple):
    """The notes of one panel, the second at which its prime ends (None: there was no prime), and its title."""

    notes: Sequence[Note]
    prime_end_s: float | None = None
    title: str = ""


def loss_curve(
    metrics: Sequence[Mapping[str, float | int]],
    series: Mapping[str, str],
    ladder: Mapping[str, float] | None = None,
    *,
    unit: str = "nats per token",
) -> Figure:
    """Losses over steps, with a labelled line for every rung of the ladder.

    Args:
      metrics: lines of `metrics.jsonl`, each with "step"; a line need not have every key.
      series: label -> key, in drawing order: {"training": "loss", "held-out": "eval_loss"}.
      ladder: label -> loss of what the run is compared with.
      unit: of the losses.

    Raises:
      ValueError: no line has one of the keys (the message lists the keys there are), or more series than colours.
    """
    _check_colours(series, "series")
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = style_axes(figure.add_subplot())
    for colour, (label, key) in zip(COLOURS[: len(series)], series.items(), strict=True):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if not points:
            raise ValueError(f"no metrics line has {key!r}; the keys are {sorted(set().union(*metrics))}")
        steps, losses = np.transpose(points)
        few = len(points) <= 40
        axes.plot(steps, losses, color=colour, linewidth=1.6, marker="o" if few else "", markersize=4, label=label)
    rungs = sorted((ladder or {}).items(), key=lambda rung: rung[1])
    for _, loss in rungs:
        axes.axhline(loss, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    low, high = axes.get_ylim()
    right = axes.get_yaxis_transform()  # x in fractions of the axes, y in losses
    for y, (label, loss) in zip(_spread([loss for _, loss in rungs], 0.055 * (high - low)), rungs, strict=True):
        axes.plot([1.005, 1.03], [loss, y], color=INK, linewidth=0.7, transform=right, clip_on=False)
        axes.text(1.04, y, f"{label} {loss:.3f}", transform=right, va="center", color=INK, size=9)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), frameon=False, labelcolor=INK, fontsize=9)
    return figure


def result_ladder(
    rungs: Mapping[str, float], ours: Mapping[str, float], *, unit: str = "nats per token (lower is better)"
) -> Figure:
    """Horizontal bars from the worst rung at the top to the best at the bottom, ours in colour.

    Raises:
      ValueError: a name is both a rung and ours, or there is nothing to draw.
    """
    both = sorted(set(rungs) & set(ours))
    if both or not ours:
        raise ValueError(f"expected results of ours with names that no rung has; shared: {both}, ours: {list(ours)}")
    bars = sorted([*rungs.items(), *ours.items()], key=lambda bar: bar[1])
    figure = Figure(figsize=(7.2, 0.6 + 0.42 * len(bars)), layout="constrained")
    axes = style_axes(figure.add_subplot(), grid="x")
    colours = [COLOURS[0] if label in ours else INK for label, _ in bars]
    values = [value for _, value in bars]
    drawn = axes.barh(range(len(bars)), values, color=colours, height=0.62)
    texts = axes.bar_label(drawn, labels=[f"{value:.3f}" for value in values], padding=4, color=INK)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    for text, tick, (label, _) in zip(texts, axes.get_yticklabels(), bars, strict=True):
        if label in ours:
            text.set_fontweight("bold")
            tick.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.12 * max(values))
    axes.set_xlabel(unit)
    return figure


def piano_roll(
    notes: Sequence[Note], *, prime_end_s: float | None = None, title: str = "", voices: Sequence[str] = VOICES
) -> Figure:
    """Notes over seconds, coloured by voice; the prime lies on a shaded ground, its continuation does not.

    Args:
      notes: what to draw, in any order.
      prime_end_s: where the given music ends and the model's begins; None where all of it is the model's.
      title: drawn above.
      voices: names of voice 0, 1, ...; a voice without a name is called by its number. From the seventh voice on the
        colours repeat.

    Raises:
      ValueError: there are no notes.
    """
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    axes = style_axes(figure.add_subplot())
    _draw_roll(axes, Roll(notes, prime_end_s, title))
    axes.set_xlabel("seconds")
    axes.set_ylabel("pitch (C4 is MIDI 60)")
    _voice_legend(figure, notes, voices)
    return figure


def roll_grid(rows: Mapping[str, Sequence[Roll]], *, voices: Sequence[str] = VOICES) -> Figure:
    """A piano roll for each cell, rows by name, all on one scale.

    Huang et al. 2018, https://arxiv.org/abs/1809.04281, Fig. 4.

    Raises:
      ValueError: no rows, rows of different lengths (the message has them), or a roll without notes.
    """
    lengths = {name: len(rolls) for name, rolls in rows.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"expected at least one row, and equally many rolls in each; the rows have {lengths}")
    columns = next(iter(lengths.values()))
    figure = Figure(figsize=(max(4.5, 3.6 * columns), 0.8 + 1.9 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, sharex=True, sharey=True, squeeze=False)
    everything = [note for rolls in rows.values() for roll in rolls for note in roll.notes]
    for axes_row, (name, rolls) in zip(grid, rows.items(), strict=True):
        for axes, roll in zip(axes_row, rolls, strict=True):
            _draw_roll(style_axes(axes), roll, scale=everything)
        axes_row[0].set_ylabel(name)
    for axes in grid[-1]:
        axes.set_xlabel("seconds")
    _voice_legend(figure, everything, voices)
    return figure


def attention_over_piano_roll(
    notes: Sequence[Note],
    weights: np.ndarray,
    anchors: Sequence[tuple[float, float] | None],
    query: tuple[float, float],
    *,
    heads: Sequence[str] = (),
    min_weight: float = 0.03,
    title: str = "",
) -> Figure:
    """Lines from one query back to what each head attends to, over the notes (Huang et al. 2018, Figs. 8 and 9).

    A line's colour is its head, its width the weight.

    Args:
      notes: what to draw under the lines.
      weights: (N, T) attention of the query over T tokens, one row for each head.
      anchors: where each token lies, (seconds, pitch); None for a token without a place, such as a rest or the start.
      query: where the query lies, (seconds, pitch).
      heads: names of the rows of `weights`; "head 1", "head 2", ... if empty.
      min_weight: lighter lines are left out; the picture says how much attention its lines carry.
      title: drawn above.

    Raises:
      ValueError: weights and anchors disagree in length, more heads than colours or names, or no notes.
    """
    weights = np.asarray(weights, np.float32)
    if weights.ndim != 2 or weights.shape[1] != len(anchors):
        raise ValueError(f"expected weights (N, T) with T = {len(anchors)} anchors, got shape {weights.shape}")
    heads = heads or [f"head {row + 1}" for row in range(len(weights))]
    if len(heads) != len(weights):
        raise ValueError(f"{len(weights)} rows of weights, but {len(heads)} names of heads: {list(heads)}")
    _check_colours(heads, "heads")
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    axes = style_axes(figure.add_subplot())
    _draw_roll(axes, Roll(notes, None, title), colour=INK)
    for row, head_weights in enumerate(weights):
        for weight, anchor in zip(head_weights.tolist(), anchors, strict=True):
            if anchor is not None and weight >= min_weight:
                arc = _arc(query, anchor, bend=row - (len(weights) - 1) / 2)
                style = {"edgecolor": COLOURS[row], "facecolor": "none", "alpha": 0.85, "capstyle": "round"}
                axes.add_patch(PathPatch(arc, linewidth=0.6 + 5 * weight, zorder=4, **style))
    circle = {"marker": "o", "markersize": 8, "color": "none", "markeredgecolor": INK, "markeredgewidth": 2}
    axes.plot(*query, **circle, zorder=5, clip_on=False)
    placed = np.array([anchor is not None for anchor in anchors])
    drawn = np.where(placed & (weights >= min_weight), weights, 0).sum() / weights.sum()
    note = f"the lines carry {drawn:.0%} of the attention: weights of {min_weight:g} and more, on notes"
    axes.set_xlabel(f"seconds ({note})")
    axes.set_ylabel("pitch (C4 is MIDI 60)")
    _legend_below(figure, dict(zip(heads, COLOURS[: len(heads)], strict=True)))
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element to write into a page: text stays text, and ink takes the page's text colour."""
    buffer = io.StringIO()
    options = {"svg.fonttype": "none", "svg.hashsalt": "jaxaudio", "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def pitch_name(pitch: int) -> str:
    """Scientific pitch name of a MIDI pitch: 60 is C4, 69 is A4."""
    return f"{_PITCH_CLASSES[pitch % 12]}{pitch // 12 - 1}"


def style_axes(axes: Axes, *, grid: str = "y") -> Axes:
    """The house's look: no box, thin grid, one ink."""
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis=grid, color=INK, alpha=0.22, linewidth=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
    axes.patch.set_alpha(0)
    return axes


def _draw_roll(axes: Axes, roll: Roll, *, scale: Sequence[Note] = (), colour: str | None = None) -> None:
    """Draws one roll; `scale` are the notes whose range it shows (its own if empty), `colour` replaces the voices'."""
    if not roll.notes:
        raise ValueError(f"the piano roll {roll.title!r} has no notes")
    low = min(note.pitch for note in scale or roll.notes) - 1.5
    high = max(note.pitch for note in scale or roll.notes) + 1.5
    end_s = max(note.end_s for note in scale or roll.notes)
    for pitch in range(int(low), int(high) + 2):
        if "♯" in pitch_name(pitch):
            axes.axhspan(pitch - 0.5, pitch + 0.5, color=INK, alpha=0.07, linewidth=0, zorder=0)
    if roll.prime_end_s is not None:
        axes.axvspan(0, roll.prime_end_s, color=COLOURS[1], alpha=0.16, linewidth=0, zorder=0.5)
        axes.axvline(roll.prime_end_s, color=INK, linewidth=1.2, zorder=3)
        for offset, side, word in ((-6, "right", "prime"), (6, "left", "continuation")):
            where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": side, "va": "top"}
            axes.annotate(word, (roll.prime_end_s, 1), (offset, 0), **where, color=INK, size=8.5)
        high += 2
    gap_s = 0.004 * end_s  # so that a repeated pitch reads as two notes
    boxes = [
        Rectangle((note.start_s, note.pitch - 0.42), max(note.end_s - note.start_s - gap_s, gap_s), 0.84)
        for note in roll.notes
    ]
    colours = [colour or COLOURS[note.voice % len(COLOURS)] for note in roll.notes]
    axes.add_collection(PatchCollection(boxes, facecolors=colours, linewidths=0, alpha=0.45 if colour else 1, zorder=2))
    axes.set_xlim(0, end_s)
    axes.set_ylim(low, high)
    octaves = range(-(-int(np.ceil(low)) // 12) * 12, int(high) + 1, 12)
    axes.set_yticks(list(octaves), [pitch_name(pitch) for pitch in octaves])
    axes.set_title(roll.title, fontsize=10, loc="left", color=INK)


def _arc(start: tuple[float, float], end: tuple[float, float], *, bend: float) -> Path:
    """A curve whose middle is lifted by `bend` semitones, so that heads on one note do not hide each other."""
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 2 * bend)
    return Path([start, middle, end], [Path.MOVETO, Path.CURVE3, Path.CURVE3])


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Ascending values moved up just enough to lie `gap` apart: where the labels of close lines go."""
    placed: list[float] = []
    for value in values:
        placed.append(max(value, placed[-1] + gap) if placed else value)
    return placed


def _check_colours(names: Sequence[str] | Mapping[str, str], what: str) -> None:
    if len(names) > len(COLOURS):
        known = f"there are {len(COLOURS)} colours that all readers can tell apart"
        raise ValueError(f"{len(names)} {what}, but {known}: choose among {list(names)}")


def _voice_legend(figure: Figure, notes: Sequence[Note], names: Sequence[str]) -> None:
    """Names the voices below the figure, unless there is only one."""
    present = sorted({note.voice for note in notes})
    labels = [names[voice] if voice < len(names) else f"voice {voice + 1}" for voice in present]
    if len(present) > 1:
        colours = [COLOURS[voice % len(COLOURS)] for voice in present]
        _legend_below(figure, dict(zip(labels, colours, strict=True)))


def _legend_below(figure: Figure, colours: Mapping[str, str]) -> None:
    handles = [Rectangle((0, 0), 1, 1, color=colour, label=label) for label, colour in colours.items()]
    style = {"frameon": False, "labelcolor": INK, "fontsize": 9, "handlelength": 1.4}
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), **style)
