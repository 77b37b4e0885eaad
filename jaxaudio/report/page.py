"""The page of a run: one HTML file with everything inside, which opens from the file system.

A page is a headline and sections; a section is a heading and blocks. Blocks are values (`Text`, `Figure`, `Audio`,
`Table`, `Code`, and `Card` of the module card), and a page is a pure function of them.
"""

import base64
import dataclasses
import html
import io
import os
import re
from collections.abc import Sequence

import matplotlib.figure
import numpy as np

from jaxaudio.data.files import atomic_path
from jaxaudio.report import plots
from jaxaudio.report.card import Card, describe

MP3_SAMPLE_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


@dataclasses.dataclass(frozen=True)
class Text:
    """Plain paragraphs, parted by empty lines."""

    text: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture: `alt` says what it shows to a reader who does not see it, `caption` is printed below."""

    figure: matplotlib.figure.Figure
    alt: str
    caption: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Audio:
    """A player: mono samples in [-1, 1], float (A,), kept in the page as MP3, which every browser plays."""

    title: str
    waveform: np.ndarray
    sample_rate: int


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a header; columns of numbers are set to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Code:
    """Preformatted text, such as the resolved config, folded under its summary."""

    summary: str
    text: str


Block = Text | Figure | Audio | Table | Code | Card


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    heading: str
    blocks: tuple[Block, ...]


def write_report(path: str | os.PathLike, *, title: str, headline: str, sections: Sequence[Section]) -> None:
    """Writes the page; an older page at `path` is replaced only when the new one is whole.

    Args:
      path: of the HTML file.
      title: name of the run.
      headline: the result in one sentence.
      sections: in reading order.

    Raises:
      ValueError: audio that MP3 cannot hold, a table row of the wrong length, or a figure without alternative text.
    """
    text = render(title=title, headline=headline, sections=sections)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(*, title: str, headline: str, sections: Sequence[Section]) -> str:
    """The page as one string of HTML; arguments and errors as for `write_report`."""
    links, bodies = [], []
    for number, section in enumerate(sections, 1):
        heading = html.escape(section.heading)
        links.append(f'<li><a href="#section-{number}">{heading}</a></li>')
        blocks = [_block(block, f"s{number}b{place}") for place, block in enumerate(section.blocks, 1)]
        bodies.append(f'<section id="section-{number}">\n<h2>{heading}</h2>\n' + "\n".join(blocks) + "\n</section>")
    return _PAGE.format(
        title=html.escape(title),
        headline=html.escape(headline),
        style=_STYLE,
        links="".join(links),
        sections="\n".join(bodies),
    )


def mp3(waveform: np.ndarray, sample_rate: int) -> bytes:
    """Mono samples, float (A,) in [-1, 1], as an MP3 file.

    Raises:
      ValueError: empty, not one-dimensional, not finite, louder than 1, or at a rate that MP3 does not have.
    """
    import soundfile

    waveform = np.asarray(waveform, np.float32)
    if waveform.ndim != 1 or not waveform.size:
        raise ValueError(f"expected mono samples (A,), got an array of shape {waveform.shape}")
    if sample_rate not in MP3_SAMPLE_RATES:
        raise ValueError(f"MP3 has no sample rate {sample_rate}; resample to one of {MP3_SAMPLE_RATES}")
    peak = np.max(np.abs(waveform))
    if not peak <= 1:
        raise ValueError(f"expected samples in [-1, 1], the loudest is {peak}")
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, sample_rate, format="MP3", subtype="MPEG_LAYER_III")
    return buffer.getvalue()


def _block(block: Block, name: str) -> str:
    """The HTML of one block; `name` keeps its ids apart from those of other blocks."""
    match block:
        case Text(text):
            paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", text.strip()) if paragraph]
            return "\n".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs)
        case Figure(figure, alt, caption):
            return _figure(figure, alt, caption, name)
        case Audio(title, waveform, sample_rate):
            source = "data:audio/mpeg;base64," + base64.b64encode(mp3(waveform, sample_rate)).decode("ascii")
            label = html.escape(f"{title} ({len(waveform) / sample_rate:.1f} s)")
            player = f'<audio controls preload="metadata" aria-labelledby="{name}" src="{source}"></audio>'
            return f'<figure class="audio"><figcaption id="{name}">{label}</figcaption>{player}</figure>'
        case Table(header, rows, caption):
            return _table(header, rows, caption)
        case Code(summary, text):
            return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"
        case Card():
            pairs = "".join(
                f"<dt>{html.escape(key)}</dt><dd>{_card_value(key, value)}</dd>"
                for key, value in describe(block).items()
            )
            return f'<div class="card"><h3>{html.escape(block.system)}</h3><dl>{pairs}</dl></div>'


def _card_value(key: str, value: str) -> str:
    return f"<code>{html.escape(value)}</code>" if key == "Command" else html.escape(value)


def _figure(figure: matplotlib.figure.Figure, alt: str, caption: str, name: str) -> str:
    if not alt.strip():
        raise ValueError(f"the figure with caption {caption!r} has no alternative text; say what it shows")
    svg = plots.to_svg(figure)
    # Ids are global to a page, and matplotlib numbers those of every figure alike.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'^<svg\b(.*?) width="[^"]*"', r"<svg\1", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'^<svg\b(.*?) height="[^"]*"', r"<svg\1", svg, count=1, flags=re.DOTALL)
    width_px = round(figure.get_figwidth() * 96)
    attributes = f'role="img" aria-label="{html.escape(alt)}" style="max-width:{width_px}px"'
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg.replace('<svg', f'<svg {attributes}', 1)}{below}</figure>"


def _table(header: tuple[str, ...], rows: tuple[tuple[str, ...], ...], caption: str) -> str:
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"table row {row} has {len(row)} cells, expected {len(header)}: {header}")
    numeric = [bool(rows) and all(_is_number(row[column]) for row in rows) for column in range(len(header))]
    marks = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(f'<th scope="col"{mark}>{html.escape(name)}</th>' for name, mark in zip(header, marks, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{html.escape(cell)}</td>" for cell, mark in zip(row, marks, strict=True)) + "</tr>"
        for row in rows
    )
    top = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{top}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+−≤≥~]?\s*[\d.,]+\s*[%×x]?", text) is not None


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="headline">{headline}</p>
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{sections}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #20242a; --soft: #5b636e; --line: #dfe3e8; --ground: #ffffff; --panel: #f5f7f9;
  --accent: #0063a0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #a3abb6; --line: #333a43; --ground: #14171b; --panel: #1c2127; --accent: #6cb6f0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 5rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; }
h1 { margin: 0 0 1rem; color: var(--soft); font-size: 1rem; font-weight: 600; }
h2 { margin: 3.25rem 0 1rem; padding-top: 1.25rem; border-top: 1px solid var(--line); font-size: 1.3rem; }
h3 { margin: 0 0 .75rem; font-size: 1rem; }
p { max-width: 44rem; margin: 0 0 1rem; }
a { color: var(--accent); }
.headline { margin: 0 0 1.5rem; font-size: clamp(1.35rem, 3.4vw, 1.9rem); font-weight: 600; line-height: 1.3; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0; padding: 0; list-style: none; }
figure { margin: 1.25rem 0; }
figure svg { display: block; width: 100%; min-width: 36rem; height: auto; color: var(--soft); }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif !important; }
figcaption, caption { color: var(--soft); font-size: .9rem; text-align: left; }
figcaption { max-width: 44rem; margin-top: .4rem; }
.audio { display: flex; flex-wrap: wrap; align-items: center; justify-content: space-between; gap: .5rem 1.5rem;
  margin: 0; padding: .6rem 0; border-bottom: 1px solid var(--line); }
.audio figcaption { margin: 0; color: var(--ink); font-size: 1rem; }
audio { width: 24rem; max-width: 100%; }
.scroll { overflow-x: auto; }
.scroll:has(table) { margin: 1.25rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .5rem; }
th, td { padding: .35rem 1.5rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-size: .9rem; font-weight: 600; }
.number { text-align: right; }
.card { margin: 1.25rem 0; padding: 1.1rem 1.25rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--panel); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.5rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .875rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
details { margin: 1.25rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { margin: .75rem 0 0; padding: 1rem 1.25rem; overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--panel); }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6rem; } }
@media print { nav, audio { display: none; } body { max-width: none; padding: 0; } }
"""
