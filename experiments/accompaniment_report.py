"""What a run on melodies and their accompaniments leaves behind: accompanied melodies, pictures and its page."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import music_report, music_training, piano_report
from jaxaudio import config as config_lib
from jaxaudio.convert.export import export_checkpoint, load, to_tree
from jaxaudio.convert.music import write_music_model
from jaxaudio.data.events import STEPS_PER_SECOND, array_to_notes
from jaxaudio.data.melody import decode_melody
from jaxaudio.data.melody_segments import MelodyDataset
from jaxaudio.data.synthesis import synthesize
from jaxaudio.generate.music import accompany
from jaxaudio.models.music_transformer import AccompanimentTransformer
from jaxaudio.ops.sampling import make_sampling
from jaxaudio.report import page
from jaxaudio.report.card import Card


def finish(
    workdir: pathlib.Path,
    model: AccompanimentTransformer,
    key: jax.Array,
    *,
    config: Any,
    dataset: MelodyDataset,
    result: music_training.Result,
    card: Card,
    cards: Sequence[Card],
) -> None:
    """After training: writes the model's folder, accompanies the beginnings of three held-out melodies, and the page.

    Args:
      workdir: the run's folder.
      model: whose parameters the result's checkpoint has.
      key: of all samples.
      config: of the run.
      dataset: of performances and melodies.
      result: of the run.
      card, cards: of the run, with the result in it, and of all rows.
    """
    vocabulary, context = dataset.events.vocabulary, config.segment.length
    export_checkpoint(result.checkpoint, workdir / "parameters.safetensors", ema=config.ema_decay is not None)
    params = to_tree(load(workdir / "parameters.safetensors"))
    write_music_model(workdir / "model", model.config, params, vocabulary, context=context, overwrite=True)
    melodies = held_out_melodies(dataset, config)
    written = accompany(
        model,
        params,
        vocabulary,
        [tokens[tokens > 0] for tokens in melodies.values()],
        key,
        context=context,
        seconds=config.sample_s,
        sampling=make_sampling(len(melodies), temperature=config.temperature),
    )
    headline = f"{result.nats['valid']:.3f} nats per token on held-out performances, given " + (
        "their melodies." if config.segment.has_melody else "nothing but silence in place of their melodies."
    )
    sections = []
    for (name, tokens), music in zip(melodies.items(), written, strict=True):
        heading = name.replace("_", " ").replace("a", "A", 1)
        sections.append(page.Section(heading, _music(workdir, name, tokens, music.tokens, vocabulary)))
    page.write_report(
        workdir / "report.html",
        title=card.system,
        headline=headline,
        sections=[
            page.Section("Result", (page.Text(_about(config, result)), rows_table(cards, card))),
            page.Section("Training", (piano_report.curves(workdir, {}),)),
            *sections,
            page.Section("Data", (page.Code("The performances that were read and skipped", dataset.events.report()),)),
            page.Section("Card", (card,)),
            page.Section("Config", (page.Code("The resolved config of this run", config_lib.to_json(config)),)),
        ],
    )
    print(f"{headline}\nwrote {workdir}/samples, {workdir}/model and {workdir}/report.html: open it in a browser")


def held_out_melodies(dataset: MelodyDataset, config: Any) -> dict[str, np.ndarray]:
    """The melodies, as the model gets them, of the beginnings of the first three validation compositions, by name."""
    first = {piece.composition: index for index, piece in reversed([*enumerate(dataset.events.pieces["valid"])])}
    stop = round(config.sample_s * STEPS_PER_SECOND)
    return {
        f"accompaniment_of_{composition.replace('/', '_')}": dataset.segment("valid", index, 0, stop, config.segment)[
            0
        ]["melody"]
        for composition, index in sorted(first.items())[:3]
    }


def rows_table(cards: Sequence[Card], ours: Card) -> page.Table:
    """The paper's results and ours, and whether the melody helps."""
    reached = {piano_report.row_of(card): card.reached for card in cards} | {piano_report.row_of(ours): ours.reached}
    reported = {piano_report.row_of(card): card.reported for card in cards}
    rows = tuple((row, _number(reported[row], "-"), _number(reached[row], "not trained")) for row in reported)
    caption = "Nats per token given the melody, on other performances than the paper's."
    given, without = reached["small"], reached["small_without_melody"]
    if given is not None and without is not None:
        caption += f" The melody {'helps' if given < without else 'does NOT help'}, by {without - given:+.3f}."
    return page.Table(("row", "paper, Table 4", "ours"), rows, caption)


def _number(value: float | None, absent: str) -> str:
    return absent if value is None else f"{value:.3f}"


def _about(config: Any, result: music_training.Result) -> str:
    segment = config.segment
    part = "all" if config.max_evaluation_segments is None else f"{config.max_evaluation_segments} at most, of all"
    return (
        f"Performances of {config.dataset}, no composition in two splits, with the melodies that a Viterbi search "
        f"finds in them. Validation {result.nats['valid']:.4f}, test {result.nats['test']:.4f} nats per token over "
        f"segments of {segment.evaluation_s:g} s ({part}), of {segment.length} events at most; in training they have "
        f"{segment.min_s:g} to {segment.max_s:g} s. Below, beginnings of held-out melodies of {config.sample_s:g} s, "
        "and what the model plays to them."
    )


def _music(workdir, name, melody_tokens, tokens, vocabulary) -> tuple[page.Block, ...]:
    melody = array_to_notes(decode_melody(melody_tokens))
    piece = piano_report.make_piece(workdir / "samples", name, tokens, vocabulary, None)
    blocks: list[page.Block] = []
    if melody:
        sound = synthesize(melody, piano_report.SAMPLE_RATE)
        given = music_report.Piece("melody", melody_tokens, melody, sound, None)
        blocks += music_report.music([given], piano_report.SAMPLE_RATE)
    else:
        blocks.append(page.Text("No melody is given."))
    if piece is None:
        blocks.append(page.Text("The model ended the piece without a note."))
    else:
        blocks += music_report.music([piece], piano_report.SAMPLE_RATE)
    return tuple(blocks)
