"""The page stands alone, plays what it was given, and escapes what it prints."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
import soundfile

from jaxaudio.data.midi import Note
from jaxaudio.report import page, plots
from jaxaudio.report.card import Card

NASTY = "<script>alert('x')</script> & \"quoted\" {braces}"
VOID = {"meta", "link", "br", "img", "hr", "input", "path", "use"}
SAMPLE_RATE = 16_000


class Reader(html.parser.HTMLParser):
    """Collects tags with attributes and text, and checks that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"{tag} closes out of order at {self.getpos()}"

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def tone():
    return (0.4 * np.sin(2 * np.pi * 440 * np.arange(int(1.7 * SAMPLE_RATE)) / SAMPLE_RATE)).astype(np.float32)


@pytest.fixture(scope="module")
def report(tone, tmp_path_factory):
    card = Card(NASTY, NASTY, "NLL", 0.357, None, "not trained", 0, "", "python -m x", (NASTY,))
    figures = [plots.piano_roll([Note(0.0, 1.0, 60, 80, 0), Note(0.0, 1.0, 48, 80, 3)], title=NASTY) for _ in range(2)]
    sections = [
        page.Section(NASTY, (page.Text(f"{NASTY}\n\nsecond"), page.Audio(NASTY, tone, SAMPLE_RATE))),
        page.Section("Pictures", tuple(page.Figure(figure, NASTY, NASTY) for figure in figures)),
        page.Section("Rest", (page.Table(("rung", "loss"), ((NASTY, "0.712"), ("b", "0.9")), NASTY), card)),
        page.Section("Config", (page.Code(NASTY, f'{{"title": "{NASTY}"}}'),)),
    ]
    path = tmp_path_factory.mktemp("run") / "report.html"
    page.write_report(path, title=NASTY, headline=NASTY, sections=sections)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_every_tag_closes(report):
    assert Reader(report).open == []


def test_nothing_is_fetched(report):
    for tag, attributes in Reader(report).tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            if name in attributes:
                assert re.match(r"#|data:", attributes[name]), (tag, name, attributes[name][:60])
    assert not re.search(r"@import|url\((?!#)", report)


def test_every_link_leads_somewhere_and_ids_are_unique(report):
    reader = Reader(report)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', report)
    assert len(reader.of("section")) == 4
    assert targets
    assert set(targets) <= set(ids)


def test_audio_decodes_to_what_was_given(report, tone):
    (player,) = Reader(report).of("audio")
    kind, data = player["src"].split(",", 1)
    assert kind == "data:audio/mpeg;base64"
    samples, sample_rate = soundfile.read(io.BytesIO(base64.b64decode(data, validate=True)), dtype="float32")
    assert sample_rate == SAMPLE_RATE
    assert samples.shape == tone.shape
    assert np.max(np.abs(samples - tone)[800:-800]) < 0.05
    assert "(1.7 s)" in report


def test_text_is_escaped(report):
    reader = Reader(report)
    assert "<script" not in report
    # title, heading and its link, h1, headline, paragraph, player, two captions, table caption and cell, three in the
    # card, summary, config, and the titles inside the two pictures
    assert reader.text.count(NASTY) == 18
    assert [svg["aria-label"] for svg in reader.of("svg")] == [NASTY, NASTY]


def test_the_page_is_accessible(report):
    reader = Reader(report)
    assert reader.of("html") == [{"lang": "en"}]
    assert [len(reader.of(tag)) for tag in ("h1", "h2", "main", "nav")] == [1, 4, 1, 1]
    assert all(svg["role"] == "img" for svg in reader.of("svg"))
    assert all(cell["scope"] == "col" for cell in reader.of("th"))
    assert [cell.get("class") for cell in reader.of("td")] == [None, "number", None, "number"]


def test_an_untrained_card_says_so(report):
    assert "<dt>Reached</dt><dd>no value</dd>" in report
    assert "<dt>Status</dt><dd>not trained</dd>" in report


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (page.Table(("a", "b"), (("1",),)), r"table row \('1',\) has 1 cells, expected 2"),
        (page.Figure(plots.result_ladder({"a": 1.0}, {"b": 2.0}), " ", "losses"), "'losses' has no alternative text"),
        (page.Audio("a", np.zeros(100, np.float32), 16_001), "no sample rate 16001"),
        (page.Audio("a", np.zeros((100, 2), np.float32), 16_000), r"shape \(100, 2\)"),
        (page.Audio("a", np.zeros(0, np.float32), 16_000), r"shape \(0,\)"),
        (page.Audio("a", np.full(100, 1.5, np.float32), 16_000), "the loudest is 1.5"),
        (page.Audio("a", np.full(100, np.nan, np.float32), 16_000), "the loudest is nan"),
    ],
)
def test_a_block_that_cannot_be_shown_leaves_the_old_page(tmp_path, block, message):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match=message):
        page.write_report(path, title="t", headline="h", sections=[page.Section("s", (block,))])
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
