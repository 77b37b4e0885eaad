r"""What a run on piano performances leaves behind, and models side by side on any prime (Figs. 4 and 8 of the paper).

Run:   python -m experiments.piano_report --workdir OUT --set prime=PRIME.mid models=runs/a/model,runs/b/model
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import music_report, music_training
from experiments.music_report import Piece
from jaxaudio import config as config_lib
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.convert.export import export_checkpoint, load, to_tree
from jaxaudio.convert.music import MusicModel, read_music_model, write_music_model
from jaxaudio.convert.tensors import ConvertError
from jaxaudio.data.event_batches import evaluation_event_batches
from jaxaudio.data.event_dataset import EventDataset
from jaxaudio.data.events import STEPS_PER_SECOND, EventVocabulary, apply_sustain, decode_events, encode_events
from jaxaudio.data.midi import write_midi
from jaxaudio.data.midi_performance import read_performance
from jaxaudio.data.synthesis import synthesize, write_wav
from jaxaudio.generate.music import continue_performance, first_seconds, seconds_that_fit
from jaxaudio.models.music_transformer import MusicTransformer
from jaxaudio.ops.sampling import make_sampling
from jaxaudio.report import page, plots
from jaxaudio.report.card import Card

SAMPLE_RATE = 22_050
MAX_DENSE_LENGTH = 1024  # whose weights are stored for the picture of attention: 4 MiB a head and layer


def check_samples(config: Any) -> None:
    """Checks the config fields that `finish` uses, before any training.

    Raises:
      ValueError: no prime, one that the model does not see at once, or one that fills the sample; has the numbers.
    """
    if not 0 < config.prime_tokens <= config.length:
        raise ValueError(f"prime_tokens must be in 1..{config.length} (length), got {config.prime_tokens}")
    if config.prime_tokens >= config.sample_tokens:
        raise ValueError(f"prime_tokens {config.prime_tokens} must be less than sample_tokens {config.sample_tokens}")


def token_places(tokens: np.ndarray, vocabulary: EventVocabulary) -> list[tuple[float, float] | None]:
    """Where each event (N,) is, (seconds, pitch); None for a shift of time or a velocity, which have no pitch."""
    places, step = [], 0
    for token in tokens.tolist():
        if token in vocabulary.time_shift:
            step += token - vocabulary.time_shift.start + 1
        is_note = vocabulary.note_on.start <= token < vocabulary.note_off.stop
        key = (token - vocabulary.note_on.start) % len(vocabulary.note_on)
        places.append((step / STEPS_PER_SECOND, float(vocabulary.min_pitch + key)) if is_note else None)
    return places


def make_piece(
    folder: pathlib.Path, name: str, tokens: np.ndarray, vocabulary: EventVocabulary, prime_end_s: float | None
) -> Piece | None:
    """The piece of events (N,), also as folder/name.mid and .wav; None where they have no note."""
    notes = decode_events(tokens, vocabulary)
    if not notes:
        return None
    waveform = synthesize(notes, SAMPLE_RATE)
    write_midi(notes, folder / f"{name}.mid")
    write_wav(folder / f"{name}.wav", waveform, SAMPLE_RATE)
    return Piece(name.replace("_", " "), tokens, notes, waveform, prime_end_s)


def write_music(
    model: MusicModel,
    key: jax.Array,
    folder: pathlib.Path,
    *,
    primes: Mapping[str, np.ndarray],
    num_tokens: int,
    temperature: float,
) -> tuple[list[Piece], list[str]]:
    """Continues each prime by num_tokens events and writes each piece as .mid and .wav.

    Args:
      model: of `read_music_model`.
      key: of all draws.
      folder: of the files.
      primes: name -> events; none for music from nothing.
      num_tokens: events that the model adds, and as many to nothing.
      temperature: of the draws.
    Returns:
      The pieces, and the names of those that the model ended without a note.
    """
    written = continue_performance(
        model.model,
        model.params,
        model.vocabulary,
        list(primes.values()),
        key,
        context=model.context,
        num_tokens=num_tokens,
        sampling=make_sampling(len(primes), temperature=temperature),
    )
    ends_s = [
        seconds_that_fit(prime, model.vocabulary, len(prime)) if len(prime) else None for prime in primes.values()
    ]
    pieces = {
        name: make_piece(folder, name, music.tokens, model.vocabulary, end_s)
        for name, music, end_s in zip(primes, written, ends_s, strict=True)
    }
    return [piece for piece in pieces.values() if piece], [name for name, piece in pieces.items() if piece is None]


def attention(model: MusicModel, piece: Piece) -> list[page.Figure]:
    """The paper's Fig. 8 for a piece, if the model is relative global: the others' attention is not stored."""
    transformer = model.model.config.transformer
    if (transformer.positions, transformer.attention) != ("relative", "causal"):
        return []
    length = min(len(piece.tokens), model.context, MAX_DENSE_LENGTH)
    notes_on = np.flatnonzero(np.isin(piece.tokens[:length], model.vocabulary.note_on))
    if not len(notes_on):
        return []
    query = int(notes_on[np.argmin(np.abs(notes_on - 3 * length // 4))])
    places = token_places(piece.tokens, model.vocabulary)
    return [music_report.attention_figure(model.model, model.params, piece, query, places)]


def held_out_primes(dataset: EventDataset, num_tokens: int) -> dict[str, np.ndarray]:
    """The beginnings of performances of the first three validation compositions, by name."""
    first = {piece.composition: index for index, piece in reversed([*enumerate(dataset.pieces["valid"])])}
    return {
        f"continuation_of_{composition.replace('/', '_')}": dataset.tokens("valid", index)[:num_tokens].astype(np.int32)
        for composition, index in sorted(first.items())[:3]
    }


def count_losses(dataset: EventDataset, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """What counting reaches on the evaluation batches, in nats per token: a model has to do better.

    "unigram": how often each event occurs in the training performances, each once more. "bigram": how often it follows
    the event before it, with as many counts as there are events from the unigram.
    """
    size = dataset.vocabulary.size
    counts = np.zeros((size, size))
    for index in range(len(dataset.pieces["train"])):
        tokens = np.append(0, dataset.tokens("train", index)).astype(np.int64)
        counts += np.bincount(tokens[:-1] * size + tokens[1:], minlength=size * size).reshape(size, size)
    unigram = (counts.sum(axis=0) + 1) / (counts.sum() + size)
    bigram = (counts + size * unigram) / (counts.sum(axis=1, keepdims=True) + size)
    nats, weight = np.zeros(2), 0
    for batch in batches:
        before, token = batch["inputs"][batch["mask"]], batch["targets"][batch["mask"]]
        nats -= np.log([unigram[token], bigram[before, token]]).sum(axis=1)
        weight += len(token)
    return dict(zip(("unigram", "bigram"), (nats / weight).tolist(), strict=True))


def rows_table(cards: Sequence[Card], ours: Card) -> page.Table:
    """The paper's results beside ours for each kind of attention, and both orders."""
    small = row_of(ours).startswith("small_")
    reported = {row_of(card): card.reported for card in cards if card.reported is not None}
    reached = {row_of(card): card.reached for card in cards} | {row_of(ours): ours.reached}
    column = {row: reached[f"small_{row}" if small else row] for row in reported}
    rows = tuple(
        (row, f"{reported[row]:.3f}", "not trained" if value is None else f"{value:.3f}")
        for row, value in column.items()
    )
    return page.Table(
        ("attention", "paper, Table 3", "ours, small" if small else "ours"),
        rows,
        f"Nats per token, on other performances than the paper's. Paper: {order(reported)}. Ours: {order(column)}.",
    )


def order(nats: Mapping[str, float | None]) -> str:
    """The rows that have a value from the best to the worst, and whether relative attention pays off in them."""
    known = {row: value for row, value in nats.items() if value is not None}
    text = " < ".join(sorted(known, key=known.get)) or "no row"
    if not {"relative_global", "baseline"} <= known.keys():
        return text
    verdict = "is below" if known["relative_global"] < known["baseline"] else "is NOT below"
    return f"{text}; relative_global {verdict} the baseline, by {known['baseline'] - known['relative_global']:+.3f}"


def row_of(card: Card) -> str:
    """The row that a card is of."""
    return card.command.rsplit("row=", 1)[1].split()[0]


def finish(
    workdir: pathlib.Path,
    model: MusicTransformer,
    key: jax.Array,
    *,
    config: Any,
    dataset: EventDataset,
    result: music_training.Result,
    card: Card,
    cards: Sequence[Card],
) -> None:
    """After training: writes the model's folder, three continuations, two pieces from nothing, and the page.

    Args:
      workdir: the run's folder.
      model: whose parameters the result's checkpoint has.
      key: of all samples.
      config: of the run.
      dataset: of the performances.
      result: of the run.
      card, cards: of the run, with the result in it, and of all rows.
    """
    export_checkpoint(result.checkpoint, workdir / "parameters.safetensors", ema=config.ema_decay is not None)
    params = to_tree(load(workdir / "parameters.safetensors"))
    write_music_model(
        workdir / "model", model.config, params, dataset.vocabulary, context=config.length, overwrite=True
    )
    trained = MusicModel(model, params, dataset.vocabulary, config.length)
    pieces, silent = write_music(
        trained,
        key,
        workdir / "samples",
        primes=held_out_primes(dataset, config.prime_tokens)
        | {f"piece_{number}": np.zeros(0, np.int32) for number in (1, 2)},
        num_tokens=config.sample_tokens - config.prime_tokens,
        temperature=config.temperature,
    )
    nats = result.nats["valid"]
    batches = evaluation_event_batches(dataset, length=config.length, batch_size=1, max_rows=config.max_evaluation_rows)
    rungs = count_losses(dataset, batches)
    headline = (
        f"{nats:.3f} nats per token on held-out performances: "
        f"{'beats' if nats < rungs['bigram'] else 'does NOT beat'} counted pairs, {rungs['bigram']:.3f} (bigram)."
    )
    part = "all crops" if config.max_evaluation_rows is None else f"{config.max_evaluation_rows} crops at most"
    about = (
        f"Performances of {config.dataset}, no composition in two splits. Validation {nats:.4f}, test "
        f"{result.nats['test']:.4f} nats per token over {part} of {config.length} events without left context. "
        f"Continuations begin with {config.prime_tokens} events of held-out performances; with them they have "
        f"{config.sample_tokens}, and the model sees {config.length} at once."
        + "".join(f" {name}: the model ended it without a note." for name in silent)
    )
    continued, new = ([p for p in pieces if (p.prime_end_s is None) == is_new] for is_new in (False, True))
    pictures = attention(trained, continued[0])
    page.write_report(
        workdir / "report.html",
        title=card.system,
        headline=headline,
        sections=[
            page.Section("Result", _result(about, rungs, nats, card, cards)),
            page.Section("Training", (curves(workdir, rungs),)),
            page.Section(
                "Continuations of held-out performances",
                (music_report.side_by_side({"this model": continued}), *music_report.music(continued, SAMPLE_RATE)),
            ),
            *([page.Section("Music from nothing", music_report.music(new, SAMPLE_RATE))] if new else []),
            *([page.Section("Attention", tuple(pictures))] if pictures else []),
            page.Section("Data", (page.Code("The performances that were read and skipped", dataset.report()),)),
            page.Section("Card", (card,)),
            page.Section("Config", (page.Code("The resolved config of this run", config_lib.to_json(config)),)),
        ],
    )
    print(f"{headline}\nwrote {workdir}/samples, {workdir}/model and {workdir}/report.html: open it in a browser")


def _result(about, rungs, nats, card, cards) -> tuple[page.Block, ...]:
    bars = plots.result_ladder(rungs, {"Music Transformer (this run)": nats})
    alt = f"Bars: our loss, {nats:.3f}, against {', '.join(f'{name} {value:.3f}' for name, value in rungs.items())}."
    return page.Text(about), page.Figure(bars, alt=alt), rows_table(cards, card)


def curves(workdir: pathlib.Path, rungs: Mapping[str, float]) -> page.Figure:
    """The run's losses over its steps, with lines for what else was measured."""
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    series = {"training": "train/loss", "held out": "validation/loss"}
    return page.Figure(plots.loss_curve(metrics, series, rungs), alt="Training and held-out loss over steps.")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare.

    Attributes:
      models: folders that `experiments/music_transformer_piano.py` wrote, "runs/x/model".
      prime: MIDI file that is continued.
      prime_s: seconds of it that are used.
      num_tokens: events that each model adds.
      num_samples: continuations by each model.
      temperature, seed: of the draws; the models share them.
    """

    models: tuple[str, ...] = ()
    prime: str | None = None
    prime_s: float = 10.0
    num_tokens: int = 1024
    num_samples: int = 3
    temperature: float = 1.0
    seed: int = 0


def main(config: Config, workdir: pathlib.Path) -> None:
    """Continues the prime by each model and writes the page that shows and plays it all.

    Raises:
      ConfigError: no model, prime or sample, two models of one name, one that accompanies, or a prime without notes.
      ConvertError, MidiError, FileNotFoundError, ValueError: as `read_music_model`, `read_performance`, `encode_events`
        and `continue_performance`.
    """
    if not config.models or config.prime is None or config.num_samples < 1:
        raise config_lib.ConfigError(
            f"expected models=DIR,DIR prime=FILE and num_samples of 1 or more, got {config.models}, {config.prime} and "
            f"{config.num_samples}"
        )
    folders = {_name(folder): pathlib.Path(folder) for folder in config.models}
    if len(folders) < len(config.models):
        raise config_lib.ConfigError(f"models: two of {config.models} have one name, of {[*folders]}")
    models = {name: read_music_model(folder) for name, folder in folders.items()}
    notes = apply_sustain(read_performance(config.prime))
    key = jax.random.key(config.seed)
    pieces, pictures, prime = {}, [], None
    for name, model in models.items():
        if not isinstance(model.model, MusicTransformer):
            raise config_lib.ConfigError(f"models: {folders[name]} accompanies melodies and continues no prime")
        tokens = first_seconds(encode_events(notes, model.vocabulary), model.vocabulary, config.prime_s)
        if not np.isin(tokens, model.vocabulary.note_on).any():
            raise config_lib.ConfigError(f"prime: the first {config.prime_s} s of {config.prime} have no note")
        prime = prime or make_piece(workdir / "samples", "prime", tokens, model.vocabulary, None)
        pieces[name], _ = write_music(
            model,
            key,
            workdir / "samples",
            primes={f"{name}_{number}": tokens for number in range(1, config.num_samples + 1)},
            num_tokens=config.num_tokens,
            temperature=config.temperature,
        )
        pictures += attention(model, pieces[name][0])
    headline = f"{pathlib.Path(config.prime).name}, continued by {', '.join(models)}"
    page.write_report(
        workdir / "report.html",
        title="Music Transformers side by side",
        headline=headline,
        sections=[
            page.Section("The prime", music_report.music([prime], SAMPLE_RATE)),
            page.Section("Side by side", (music_report.side_by_side(pieces), _losses(folders))),
            *(page.Section(name, music_report.music(found, SAMPLE_RATE)) for name, found in pieces.items()),
            *([page.Section("Attention", tuple(pictures))] if pictures else []),
            page.Section("Config", (page.Code("What was asked for", config_lib.to_json(config)),)),
        ],
    )
    print(f"{headline}\nwrote {workdir}/samples and {workdir}/report.html: open it in a browser")


def _name(folder: str) -> str:
    """The run of a model's folder."""
    path = pathlib.Path(folder).absolute()
    return path.parent.name if path.name == "model" else path.name


def _losses(folders: Mapping[str, pathlib.Path]) -> page.Table:
    """The least validation loss of each model's run, where the run is there."""
    rows = []
    for name, folder in folders.items():
        path = folder.parent / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        losses = [line["validation/loss"] for line in lines if "validation/loss" in line]
        rows.append((name, f"{min(losses):.3f}" if losses else "unknown"))
    return page.Table(("model", "validation, nats per token"), tuple(rows))


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, Config())
    raise_malloc_thresholds()
    try:
        main(config, workdir)
    except (ConvertError, FileNotFoundError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
