"""What a run on chorales leaves behind: music, pictures and its page."""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import music_report
from experiments.music_report import Piece
from jaxaudio import config as config_lib
from jaxaudio.convert.export import export_checkpoint, load, to_tree
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
from jaxaudio.data.ngrams import ladder
from jaxaudio.data.synthesis import synthesize, write_wav
from jaxaudio.generate.autoregressive import generate
from jaxaudio.models.music_transformer import MusicTransformer, init_cache
from jaxaudio.ops.sampling import make_sampling
from jaxaudio.report import page, plots
from jaxaudio.report.card import Card

SAMPLE_RATE = 44_100
STEP_S = 60 / DEFAULT_TEMPO / STEPS_PER_BEAT


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
    names = [f"chorale_{number + 1}" for number in range(num_new)]
    names += [f"continuation_of_{name}" for name in primes]
    prompts = [np.zeros(0, np.int32)] * num_new + list(primes.values())
    rows = generate(
        model,
        params,
        key,
        init_cache=functools.partial(init_cache, model.config),
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


def check_samples(config: Any) -> None:
    """Checks the config fields that `finish` uses, before any training.

    Raises:
      ValueError: prime_tokens or sample_tokens are no whole steps of four voices, or the prime fills the sample.
    """
    for name in ("prime_tokens", "sample_tokens"):
        if getattr(config, name) < NUM_VOICES or getattr(config, name) % NUM_VOICES:
            raise ValueError(f"{name} must be a positive multiple of {NUM_VOICES}, got {getattr(config, name)}")
    if config.prime_tokens >= config.sample_tokens:
        raise ValueError(f"prime_tokens {config.prime_tokens} must be less than sample_tokens {config.sample_tokens}")


def attention_figure(model: MusicTransformer, params: Any, piece: Piece, middle: int) -> page.Figure:
    """The paper's Figs. 8 and 9: where the last layer's heads look when a note of a piece is predicted.

    The note is the one at token `middle`, or the nearest to it where that is a rest.
    """
    query = min(np.flatnonzero(piece.tokens > REST_TOKEN).tolist(), key=lambda index: abs(index - middle))
    places = [
        ((index // NUM_VOICES + 0.5) * STEP_S, float(token + PITCH_OFFSET)) if token > REST_TOKEN else None
        for index, token in enumerate(piece.tokens.tolist())
    ]
    return music_report.attention_figure(model, params, piece, query, places)


def finish(
    workdir: pathlib.Path,
    checkpoint: pathlib.Path,
    model: MusicTransformer,
    key: jax.Array,
    *,
    config: Any,
    ema: bool,
    tokens: Mapping[str, Sequence[np.ndarray]],
    split: str,
    primes: Mapping[str, np.ndarray],
    nats: float,
    about: str,
    card: Card,
) -> None:
    """After training: exports the parameters, fits the n-grams, writes 4 chorales and the continuations, and the page.

    Args:
      workdir: the run's folder.
      checkpoint: the step that was evaluated.
      model: whose parameters the checkpoint has.
      key: of all samples.
      config: of the run; its prime_tokens, sample_tokens and temperature are used here.
      ema: whether the average of the parameters was evaluated, and is exported and sampled from.
      tokens: chorales by split; the n-grams are fitted on "train".
      split: of the evaluation.
      primes: name -> a held-out chorale; its first prime_tokens are continued.
      nats: our result on `split`, nats per token.
      about: what the page says about the data.
      card: with the result in it.
    """
    parameters = workdir / "parameters.safetensors"
    export_checkpoint(checkpoint, parameters, ema=ema)
    params = to_tree(load(parameters))
    rungs = {rung.name: rung.nats_per_token for rung in ladder(tokens["train"], tokens[split])}
    best = min(rungs, key=rungs.get)
    headline = (
        f"{nats:.3f} nats per token on {len(tokens[split])} held-out chorales: "
        f"{'beats' if nats < rungs[best] else 'does NOT beat'} the best n-gram, {rungs[best]:.3f} ({best})."
    )
    pieces = write_music(
        model,
        params,
        key,
        workdir / "samples",
        primes={name: sequence[: config.prime_tokens] for name, sequence in primes.items()},
        num_new=4,
        num_tokens=config.sample_tokens,
        temperature=config.temperature,
    )
    attention, transformer = [], model.config.transformer
    if (transformer.positions, transformer.attention) == ("relative", "causal"):
        attention = [attention_figure(model, params, pieces[-1], (config.prime_tokens + config.sample_tokens) // 2)]
    length = f"Samples have {config.sample_tokens} tokens, windows in training {config.length}."
    path = write_page(
        workdir,
        title=card.system,
        headline=headline,
        about=f"{about} {length}",
        card=card,
        config=config_lib.to_json(config),
        ladder=rungs,
        ours={"Music Transformer (this run)": nats},
        pieces=pieces,
        attention=attention,
    )
    print(f"{headline}\nwrote {workdir}/samples, {parameters} and {path}: open it in a browser")


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
        metrics, {"training": "train/loss", "held out": "validation/loss"}, {"best n-gram": ladder[best]}
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
            page.Section(
                "Continuations of held-out chorales",
                (music_report.side_by_side({"this model": continued}), *music_report.music(continued, SAMPLE_RATE)),
            ),
            page.Section("New chorales", music_report.music(new, SAMPLE_RATE)),
            *([page.Section("Attention", tuple(attention))] if attention else []),
            page.Section("Card", (card,)),
            page.Section("Config", (page.Code("The resolved config of this run", config),)),
        ],
    )
    return workdir / "report.html"
