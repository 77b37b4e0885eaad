"""The pictures hold one artist for each thing they show, where it belongs."""

import pathlib
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch, Rectangle

from jaxaudio.data.midi import Note
from jaxaudio.report import plots

ROOT = pathlib.Path(__file__).parents[2]
NOTES = [
    Note(0.0, 1.0, 72, 80, 0),
    Note(1.0, 1.5, 74, 80, 0),
    Note(0.0, 1.5, 67, 80, 1),
    Note(0.5, 2.0, 48, 80, 3),
]


def note_boxes(axes):
    """(left, right, pitch, colour) of every note drawn, in the order of the notes."""
    (collection,) = [artist for artist in axes.collections if isinstance(artist, PatchCollection)]
    boxes = [path.get_extents() for path in collection.get_paths()]
    colours = [to_hex(colour).upper() for colour in collection.get_facecolors()]
    return [(box.x0, box.x1, (box.y0 + box.y1) / 2, colour) for box, colour in zip(boxes, colours, strict=True)]


def words(figure):
    """All text of a figure."""
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_piano_roll_draws_each_note_once():
    (axes,) = plots.piano_roll(NOTES, prime_end_s=1.0, title="a title").axes
    boxes = note_boxes(axes)
    assert [(box[0], box[2]) for box in boxes] == [(note.start_s, note.pitch) for note in NOTES]
    assert [box[1] for box in boxes] == pytest.approx([note.end_s for note in NOTES], abs=0.02)
    assert [box[3] for box in boxes] == [plots.COLOURS[voice] for voice in (0, 0, 1, 3)]
    shades = [
        p for p in axes.patches if isinstance(p, Rectangle) and to_hex(p.get_facecolor()).upper() != plots.INK.upper()
    ]
    assert [(shade.get_x(), shade.get_width()) for shade in shades] == [(0, 1.0)]
    assert axes.get_xlim() == (0, 2.0)
    assert {"prime", "continuation", "a title", "soprano", "alto", "bass", "C4"} <= set(words(axes.figure))
    assert "tenor" not in words(axes.figure)


def test_piano_roll_without_prime_or_voices():
    figure = plots.piano_roll([note for note in NOTES if note.voice == 0])
    assert not figure.legends
    assert "prime" not in words(figure)
    assert "voice 4" in words(plots.piano_roll(NOTES, voices=("upper", "lower")))


def test_no_notes_is_an_error():
    with pytest.raises(ValueError, match="the piano roll 'empty' has no notes"):
        plots.piano_roll([], title="empty")


def test_roll_grid_shares_one_scale():
    high = [Note(0.0, 4.0, 84, 80, 0)]
    figure = plots.roll_grid(
        {"relative": [plots.Roll(NOTES, 1.0), plots.Roll(high)], "baseline": [plots.Roll(NOTES)] * 2}
    )
    assert [len(note_boxes(axes)) for axes in figure.axes] == [4, 1, 4, 4]
    assert {axes.get_xlim() for axes in figure.axes} == {(0, 4.0)}
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert all(low < 48 and high > 84 for low, high in [axes.get_ylim() for axes in figure.axes])


@pytest.mark.parametrize("rows", [{}, {"a": []}, {"a": [plots.Roll(NOTES)], "b": []}])
def test_roll_grid_refuses_ragged_rows(rows):
    with pytest.raises(ValueError, match="the rows have"):
        plots.roll_grid(rows)


def test_attention_draws_a_line_for_each_weight_that_counts():
    anchors = [(0.5, 72.0), None, (0.75, 67.0), (1.25, 74.0)]
    weights = np.array([[0.7, 0.2, 0.09, 0.01], [0.0, 0.5, 0.25, 0.25]])
    (axes,) = plots.attention_over_piano_roll(NOTES, weights, anchors, (1.25, 74.0), min_weight=0.05).axes
    arcs = [patch for patch in axes.patches if isinstance(patch, PathPatch)]
    drawn = [(tuple(arc.get_path().vertices[-1]), to_hex(arc.get_edgecolor()).upper()) for arc in arcs]
    blue, orange = plots.COLOURS[:2]
    assert drawn == [
        ((0.5, 72.0), blue),
        ((0.75, 67.0), blue),
        ((0.75, 67.0), orange),
        ((1.25, 74.0), orange),
    ]
    assert all(tuple(arc.get_path().vertices[0]) == (1.25, 74.0) for arc in arcs)
    wide = [arc.get_linewidth() for arc in arcs]
    assert wide[0] > wide[2] > wide[1]
    assert "the lines carry 64% of the attention" in axes.get_xlabel()  # (0.7 + 0.09 + 0.25 + 0.25) / 2 = 0.645
    assert len(note_boxes(axes)) == len(NOTES)


def test_attention_errors():
    with pytest.raises(ValueError, match=r"T = 2 anchors, got shape \(1, 3\)"):
        plots.attention_over_piano_roll(NOTES, np.ones((1, 3)), [None, None], (0.0, 60.0))
    with pytest.raises(ValueError, match="8 heads, but there are 6 colours"):
        plots.attention_over_piano_roll(NOTES, np.ones((8, 1)), [(0.0, 60.0)], (0.0, 60.0))
    with pytest.raises(ValueError, match=r"2 rows of weights, but 1 names of heads: \['a'\]"):
        plots.attention_over_piano_roll(NOTES, np.ones((2, 1)), [(0.0, 60.0)], (0.0, 60.0), heads=["a"])


def test_loss_curve_holds_the_numbers():
    metrics = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_loss": 2.5}, {"step": 3, "loss": 1.0}]
    (axes,) = plots.loss_curve(
        metrics, {"training": "loss", "held-out": "eval_loss"}, {"unigram": 2.6, "bigram": 0.9}
    ).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["training"] == [[1, 3.0], [2, 2.0], [3, 1.0]]
    assert lines["held-out"] == [[2, 2.5]]
    heights = [line.get_ydata()[0] for line in axes.lines if line.is_dashed()]
    assert heights == [0.9, 2.6]
    assert {"unigram 2.600", "bigram 0.900", "nats per token", "optimizer step"} <= set(words(axes.figure))


def test_labels_of_close_rungs_do_not_overlap():
    (axes,) = plots.loss_curve([{"step": 0, "loss": 2.0}], {"a": "loss"}, {"x": 0.712, "y": 0.714, "z": 1.9}).axes
    heights = [text.get_position()[1] for text in axes.texts]
    assert heights[1] - heights[0] == pytest.approx(0.055 * axes.get_ylim()[1])
    assert (heights[0], heights[2]) == (0.712, 1.9)


def test_loss_curve_errors():
    with pytest.raises(ValueError, match=r"no metrics line has 'eval'; the keys are \['loss', 'step'\]"):
        plots.loss_curve([{"step": 1, "loss": 3.0}], {"held-out": "eval"})
    with pytest.raises(ValueError, match="7 series, but there are 6 colours"):
        plots.loss_curve([{"step": 1, "loss": 3.0}], dict.fromkeys("abcdefg", "loss"))


def test_result_ladder_orders_bars_and_marks_ours():
    (axes,) = plots.result_ladder({"unigram": 2.6, "bigram": 0.9}, {"ours": 0.5}).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["ours", "bigram", "unigram"]  # from the bottom up
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.9, 2.6]
    colours = [to_hex(bar.get_facecolor()).upper() for bar in axes.patches]
    assert colours == [plots.COLOURS[0], plots.INK.upper(), plots.INK.upper()]
    assert [text.get_text() for text in axes.texts] == ["0.500", "0.900", "2.600"]


@pytest.mark.parametrize("ours", [{}, {"unigram": 1.0}])
def test_result_ladder_errors(ours):
    with pytest.raises(ValueError, match="names that no rung has"):
        plots.result_ladder({"unigram": 2.6}, ours)


def test_svg_is_one_element_that_takes_the_text_colour():
    svg = plots.to_svg(plots.piano_roll(NOTES, title="Bach & <sons>"))
    assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg")
    assert "currentColor" in svg
    assert plots.INK not in svg
    assert "Bach &amp; &lt;sons&gt;" in svg
    assert svg == plots.to_svg(plots.piano_roll(NOTES, title="Bach & <sons>"))


@pytest.mark.parametrize(("pitch", "name"), [(60, "C4"), (69, "A4"), (21, "A0"), (108, "C8"), (0, "C-1"), (61, "C♯4")])
def test_pitch_names(pitch, name):
    assert plots.pitch_name(pitch) == name


def test_pyplot_stays_out():
    code = "import sys, jaxaudio.report.page; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
