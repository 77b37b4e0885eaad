"""The page of a training of EnCodec's language model: what entropy coding saves at each bandwidth."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxaudio.data.token_dataset import TokenFormat
from jaxaudio.report import page, plots
from jaxaudio.report.card import Card


def write_page(
    workdir: pathlib.Path,
    results: Sequence[Any],
    cards: Sequence[Card],
    *,
    codec: TokenFormat,
    savings: str | None,
    config: str,
) -> pathlib.Path:
    """Writes report.html and prints the result.

    Args:
      workdir: with metrics.jsonl.
      results: `encodec_entropy.Result` of each bandwidth.
      cards: of each bandwidth.
      codec: whose codes they are.
      savings: the paper's, in words; None where it has none for such a codec.
      config: of the run, as JSON.
    """
    plain_bits = math.log2(codec.codebook_size)
    header = ("kbit/s", "entropy coded", "saved, %", "bits per code", "the same in floats", "paper", "frames/s")
    rows = []
    for result, card in zip(results, cards, strict=True):
        bits = plain_bits * result.coded_kbps / result.kbps
        paper = "-" if card.reported is None else f"{card.reported:g}"
        saved = 100 * (1 - result.coded_kbps / result.kbps)
        numbers = (result.kbps, result.coded_kbps, saved, bits, result.bits_per_code)
        rows.append((*(f"{number:.2f}" for number in numbers), paper, f"{result.frames_per_s:.0f}"))
    most = max(results, key=lambda result: 1 - result.coded_kbps / result.kbps)
    headline = (
        f"Entropy coding takes {codec.codec} from {most.kbps:.2f} to {most.coded_kbps:.2f} kbit/s, "
        f"{100 * (1 - most.coded_kbps / most.kbps):.1f} % less; at other bandwidths as below."
    )
    about = (
        f"Held-out codes of {codec.codec}. Bits in floats are the cross-entropy of all of them; the streams are those "
        f"of the first {results[0].coded_s:.0f} s, as the integer model coded them in chunks, without the container's "
        "20 bytes a chunk, on one core. "
    )
    about += f"The paper saves {savings} at this frame rate." if savings else "The paper has no such codec."
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    series = {"training": "train/loss", "held-out": "validation/loss"}
    curves = plots.loss_curve(metrics, series, {"without a model": plain_bits}, unit="bits per code")
    path = workdir / "report.html"
    page.write_report(
        path,
        title=f"Entropy coding of {codec.codec}",
        headline=headline,
        sections=(
            page.Section("Result", (page.Text(about), page.Table(header, tuple(rows)))),
            page.Section("Training", (page.Figure(curves, alt="Training and held-out bits per code over steps."),)),
            page.Section("Cards", tuple(cards)),
            page.Section("Config", (page.Code("The resolved config of this run", config),)),
        ),
    )
    print(f"{headline}\nwrote {path}: open it in a browser")
    return path
