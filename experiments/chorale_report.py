"""What a run on chorales leaves behind: music, pictures and its page."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxaudio.data.chorales import (
    DEFAULT_TEMPO,
    NUM_VOICES,
    PAD_TOKEN,
    PITCH_OFFSET,
    REST_TOKEN,
    STEPS_PER_BEAT,
    decode_tokens,
    grid_to_notes,
    write_chorale_midi,
)
from jaxaudio.data.midi import Note
from jaxaudio.data.pipelines import token_window
from jaxaudio.data.synthesis import synthesize, write_wav
from jaxaudio.generate.autoregressive import generate
from jaxaudio.models.music_transformer import MusicTransformer, init_cache
from jaxaudio.report import page, plots
from jaxaudio.report.card import Card

SAMPLE_RATE = 44_100
STEP_S = 60 / DEFAULT_TEMPO / STEPS_PER_BEAT


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A generated chorale: its tokens, notes and sound, and the second at which its prime ends (None without one)."""

    name: str
    tokens: np.ndarray
    notes: tuple[Note, ...]
    waveform: np.ndarray
    prime_end_s: float | None


def write_music(
    model: MusicTransformer,
    params: Any,
    key: jax.Array,
    folder: pathlib.Path,
    *,
    primes: Mapping[str, np.ndarray],
    num_new: int,
    num_tokens: int,
    temperature: float,
) -> list[Piece]:
    """Samples `num_new` chorales and one continuation of each prime, and writes each as .mid and .wav.

    Args:
      primes: name -> tokens to continue.
      num_tokens: of each piece, its prime included; a multiple of 4.
    """
    from jaxaudio.ops.sampling import make_sampling

    names = [f"chorale_{number + 1}" for number in range(num_new)]
    names += [f"continuation_of_{name}" for name in primes]
    prompts = [np.zeros(0, np.int32)] * num_new + list(primes.values())
    rows = generate(
        model,
        params,
        init_cache(model.config, len(prompts), num_tokens),
        key,
        prompts=prompts,
        length=num_tokens,
        sampling=make_sampling(len(prompts), temperature=temperature),
        allowed=np.arange(model.config.vocab_size) != PAD_TOKEN,
    )
    folder.mkdir(parents=True, exist_ok=True)
    pieces = []
    for name, prompt, tokens in zip(names, prompts, rows, strict=True):
        grid = decode_tokens(tokens)
        write_chorale_midi(grid, folder / f"{name}.mid")
        notes = grid_to_notes(grid)
        waveform = synthesize(notes, SAMPLE_RATE)
        write_wav(folder / f"{name}.wav", waveform, SAMPLE_RATE)
        prime_end_s = len(prompt) // NUM_VOICES * STEP_S if len(prompt) else None
        pieces.append(Piece(name.replace("_", " "), tokens, notes, waveform, prime_end_s))
    return pieces


def attention_figure(model: MusicTransformer, params: Any, piece: Piece, query: int) -> page.Figure:
    """The paper's Figs. 8 and 9: where the last layer's heads look when token `query` of a piece is predicted."""
    # Only the forms that store the weights can show them; they compute the same function as the blockwise one.
    transformer = dataclasses.replace(model.config.transformer, relative_form="skew")
    dense = MusicTransformer(dataclasses.replace(model.config, transformer=transformer))
    inputs = token_window(piece.tokens, len(piece.tokens))["inputs"][None]
    _, seen = jax.jit(lambda params: dense.apply({"params": params}, inputs, mutable=["attention_weights"]))(params)
    weights = jax.tree.leaves(seen["attention_weights"]["transformer"]["layers"])[0]  # L B N T S
    weights = np.asarray(weights[-1, 0, : len(plots.COLOURS), query, : query + 1])

    def place(index: int) -> tuple[float, float] | None:
        token = int(piece.tokens[index]) if index >= 0 else PAD_TOKEN
        return None if token <= REST_TOKEN else ((index // NUM_VOICES + 0.5) * STEP_S, token + PITCH_OFFSET)

    figure = plots.attention_over_piano_roll(
        [note for note in piece.notes if note.start_s <= query // NUM_VOICES * STEP_S],
        weights,
        [place(index - 1) for index in range(query + 1)],
        place(query),
        title=f"Last layer's attention when a note of the {piece.name} is predicted",
    )
    return page.Figure(
        figure,
        alt=f"Piano roll with lines from one predicted note back to the notes that {len(weights)} heads attend to.",
        caption="One line per attended note: colour is the head, width the weight (as in Figs. 8 and 9 of the paper).",
    )


def write_page(
    workdir: pathlib.Path,
    *,
    title: str,
    headline: str,
    about: str,
    card: Card,
    config: str,
    ladder: Mapping[str, float],
    ours: Mapping[str, float],
    pieces: Sequence[Piece],
    attention: Sequence[page.Figure],
) -> pathlib.Path:
    """Writes workdir/report.html: result, losses, music, attention, card and config."""
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    best = min(ladder, key=ladder.get)
    curves = plots.loss_curve(
        metrics, {"training": "train/loss", "held out": "validation/loss"}, {f"n-gram: {best}": ladder[best]}
    )
    numbers = tuple((name, f"{value:.4f}") for name, value in [*ladder.items(), *ours.items()])
    continued, new = ([p for p in pieces if (p.prime_end_s is None) == is_new] for is_new in (False, True))
    page.write_report(
        workdir / "report.html",
        title=title,
        headline=headline,
        sections=[
            page.Section(
                "Result",
                (
                    page.Text(about),
                    page.Figure(plots.result_ladder(ladder, ours), alt=f"Bars: our loss against n-grams. {headline}"),
                    page.Table(("model", "nats per token"), numbers),
                ),
            ),
            page.Section("Training", (page.Figure(curves, alt="Training and held-out loss over steps."),)),
            page.Section("Continuations of held-out chorales", _music(continued)),
            page.Section("New chorales", _music(new)),
            page.Section("Attention", tuple(attention)),
            page.Section("Card", (card,)),
            page.Section("Config", (page.Code("The resolved config of this run", config),)),
        ],
    )
    return workdir / "report.html"


def _music(pieces: Sequence[Piece]) -> tuple[page.Block, ...]:
    blocks = []
    for piece in pieces:
        ground = "" if piece.prime_end_s is None else f"; given up to second {piece.prime_end_s:.1f}, then generated"
        roll = plots.piano_roll(piece.notes, prime_end_s=piece.prime_end_s, title=piece.name)
        blocks.append(page.Figure(roll, alt=f"Piano roll of the {piece.name}, four voices{ground}."))
        blocks.append(page.Audio(piece.name, piece.waveform, SAMPLE_RATE))
    return tuple(blocks)
