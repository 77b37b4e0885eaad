"""Word and character error rates of a Whisper, normalised and decoded as in the paper, beside the paper's numbers.

Paper: Radford et al. 2022, Whisper, https://arxiv.org/abs/2212.04356, tables 8, 9, 10 and 13
Run:   python -m experiments.whisper_eval --workdir runs/eval --set row=clean_greedy model=base.en path=TFDS_FOLDER
       python -m experiments.whisper_eval --workdir runs/de --set row=fleurs model=small path=FLEURS/de_de
       python -m experiments.whisper_eval --workdir runs/mine --set manifest model=runs/fsdd/model path=test.jsonl

Data: `librispeech` as `tfds build librispeech --file_format=array_record` prepares it (data/tfds_audio.py), `fleurs` a
language's folder of the release, unpacked (data/fleurs.py), `manifest` a list in JSON lines with texts and languages
(data/manifests.py). The run may be killed: the same command goes on.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments import whisper_eval_report, whisper_paper
from experiments.whisper_paper_languages import FLEURS_WER
from jaxaudio import config as config_lib
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.convert.whisper import ConvertError, load_whisper
from jaxaudio.data.audio import load_audio
from jaxaudio.data.files import atomic_path
from jaxaudio.data.fleurs import read_fleurs
from jaxaudio.data.languages import LANGUAGES_WITHOUT_SPACES, language_code
from jaxaudio.data.manifests import Utterance, read_manifest
from jaxaudio.data.result_lines import ResultLog
from jaxaudio.data.tfds_audio import LibriSpeech, SpeechExample
from jaxaudio.data.word_errors import character_errors, normaliser, word_errors
from jaxaudio.generate.transcribe import transcribe_many
from jaxaudio.generate.whisper import DecodingOptions, decode, encode, inference_params
from jaxaudio.models.whisper import HOP_LENGTH, SAMPLE_RATE, Whisper
from jaxaudio.ops.mel import whisper_log_mel
from jaxaudio.report.card import Card


@dataclasses.dataclass(frozen=True)
class Config:
    """One evaluation.

    Attributes:
      row: the row's name.
      data, path, split: see the module; the split of a manifest is not looked at.
      language: of everything; None: that of each utterance.
      model: size, hub id, folder or .pt file.
      tokenizer: for a .pt file, which has none.
      column: the paper's model that this one is; None: by its name, if it is a published one.
      decoding: "greedy": one window of 30 s, no timestamps, no fallback, as the paper's table 8 and the notebook of
        openai-whisper; what is longer is cut there, and counted as such. "beam": long form with timestamps, beams of 5
        and temperature fallback, as table 9.
      max_utterances: the first so many; None: all.
      int8, dtype: of the model, see `jaxaudio transcribe`.
      batch_size: windows at a time; changes nothing but the speed.
      seed: of the fallback's samples.
    """

    row: str
    data: Literal["librispeech", "fleurs", "manifest"]
    decoding: Literal["greedy", "beam"]
    split: str = "test"
    path: str = "data"
    language: str | None = None
    model: str = "base.en"
    tokenizer: str | None = None
    column: str | None = None
    max_utterances: int | None = None
    int8: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self):
        if self.column not in (None, *whisper_paper.MODELS):
            raise ValueError(f"column is {self.column!r}, expected one of {', '.join(whisper_paper.MODELS)}")
        for name in ("batch_size", "max_utterances"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


ROWS = {
    "clean_greedy": Config("clean_greedy", "librispeech", "greedy", split="test_clean", language="en"),
    "other_greedy": Config("other_greedy", "librispeech", "greedy", split="test_other", language="en"),
    "clean_beam": Config("clean_beam", "librispeech", "beam", split="test_clean", language="en"),
    "other_beam": Config("other_beam", "librispeech", "beam", split="test_other", language="en"),
    "fleurs": Config("fleurs", "fleurs", "beam", model="small"),
    "mls": Config("mls", "manifest", "beam", model="large-v2"),
    "manifest": Config("manifest", "manifest", "beam", model="small"),
}

DEVIATIONS = (
    "Nothing was measured: there are neither published weights nor the data on the machine that these cards come from.",
    "A command measures one model; the paper's numbers of all its models are in `python -m experiments.whisper_paper`.",
)


def _card(row: str, language: str | None, model: str, metric: str, place: str, reported: float, path: str) -> Card:
    return Card(
        system=f"Whisper {model}, published weights",
        paper=f"{whisper_paper.SOURCE}, {place}",
        metric=f"{metric}, WER %",
        reported=reported,
        reached=None,
        status="not measured here: no weights and no data",
        steps=0,
        hardware="",
        command=f"python -m experiments.whisper_eval --workdir runs/{row} --set row={row} "
        f"model=openai/whisper-{model} path={path}",
        deviations=DEVIATIONS,
    )


CARDS = (
    *(
        _card(
            f"{split.removeprefix('test_')}_{decoding}",
            "en",
            model,
            f"LibriSpeech {split.replace('_', '-')}, {decoding}",
            f"table {whisper_paper.LIBRISPEECH_TABLES[decoding]}",
            column[model],
            "TFDS_FOLDER",
        )
        for (decoding, split), column in whisper_paper.LIBRISPEECH.items()
        for model in ("base.en", "large-v2")
    ),
    *(
        _card("fleurs", code, "large-v2", f"FLEURS {code}", "table 13", FLEURS_WER[code]["large-v2"], folder)
        for code, folder in (("en", "FLEURS/en_us"), ("de", "FLEURS/de_de"), ("zh", "FLEURS/cmn_hans_cn"))
    ),
    _card("mls", "de", "large-v2", "MLS de", "table 10", whisper_paper.MLS["de"]["large-v2"], "german.jsonl"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One utterance: its place and its name in the data, its language, and how to read audio and text."""

    index: int
    name: str
    language: str
    read: Callable[[], SpeechExample]


def read_items(config: Config) -> list[Item]:
    """The utterances to hear, unread.

    Raises:
      ValueError: data that cannot be read, or an utterance without a text or a language, or in a task that is not
        transcribing.
    """
    if config.data == "librispeech":
        source, language = LibriSpeech(config.path, config.split), language_code(config.language or "en")
        count = min(len(source), config.max_utterances or len(source))
        return [
            Item(i, f"{config.split}[{i}]", language, functools.partial(source.__getitem__, i)) for i in range(count)
        ]
    utterances = read_fleurs(config.path, config.split) if config.data == "fleurs" else read_manifest(config.path)
    return [_item(config, i, utterance) for i, utterance in enumerate(utterances[: config.max_utterances])]


def _item(config: Config, index: int, utterance: Utterance) -> Item:
    name, text = utterance.id or utterance.audio, utterance.text
    language = config.language or utterance.language
    if text is None or language is None or utterance.task != "transcribe":
        raise ValueError(
            f"{config.path}: {name}: expected a text, a language and the task transcribe, got {text!r}, {language!r} "
            f"and {utterance.task!r}; `--set language=en` gives all the same language"
        )
    return Item(index, name, language_code(language), lambda: SpeechExample(name, load_audio(utterance.audio), text))


@dataclasses.dataclass(frozen=True)
class Heard:
    """What was heard in an utterance, and the seconds at its end that were not listened to."""

    text: str
    cut_s: float = 0.0


def hear_windows(config: Config, model: Whisper, params: Any, tokenizer: Any, items: Sequence[Item]) -> Iterator[tuple]:
    """(item, what was said, what was heard), one window each, `batch_size` at a time; (item, error, None) if it failed.

    The paper's "greedy": the waveform is padded or cut to the window before its features are computed.
    """
    num_samples = model.config.num_frames * HOP_LENGTH
    key = jax.random.key(config.seed)
    for start in range(0, len(items), config.batch_size):
        waveforms = np.zeros((config.batch_size, num_samples), np.float32)
        rows: list[tuple[Item, SpeechExample] | None] = [None] * config.batch_size
        for row, item in enumerate(items[start : start + config.batch_size]):
            try:
                example = item.read()
            except (OSError, ValueError) as error:
                yield item, error, None
                continue
            waveforms[row, : len(example.waveform)] = example.waveform[:num_samples]
            rows[row] = item, example
        options = [
            DecodingOptions(language=row[0].language, without_timestamps=True) if row is not None else None
            for row in rows
        ]
        if not any(rows):
            continue
        memory = encode(model, params, whisper_log_mel(jnp.asarray(waveforms), model.config.num_mels))
        for row, result in zip(rows, decode(model, params, tokenizer, memory, key, options), strict=True):
            if row is not None:
                item, example = row
                cut = max(len(example.waveform) - num_samples, 0)
                yield item, example, Heard(result.text, cut / SAMPLE_RATE)


def hear_long_form(
    config: Config, model: Whisper, params: Any, tokenizer: Any, items: Sequence[Item]
) -> Iterator[tuple]:
    """As `hear_windows`, by the long form with beams and fallback; one language after the other."""
    for language in sorted({item.language for item in items}):
        read: dict[int, tuple[Item, SpeechExample]] = {}
        failed = []

        def waveforms(language: str = language, read: dict = read, failed: list = failed) -> Iterator[np.ndarray]:
            for item in items:
                if item.language != language:
                    continue
                try:
                    example = item.read()
                except (OSError, ValueError) as error:
                    failed.append((item, error, None))
                    continue
                read[id(example.waveform)] = item, example
                yield example.waveform

        results = transcribe_many(
            model,
            params,
            waveforms(),
            tokenizer=tokenizer,
            key=jax.random.key(config.seed),
            language=language,
            beam_size=5,
            best_of=5,
            batch_size=config.batch_size,
        )
        for waveform, result in results:
            item, example = read.pop(id(waveform))
            if isinstance(result, Exception):
                yield item, result, None
            else:
                yield item, example, Heard(result.text.strip())
        yield from failed


def score(language: str, example: SpeechExample, heard: Heard) -> dict[str, Any]:
    """The result of an utterance: texts and counts of errors; where words are not separated, words are characters."""
    normalise = normaliser(language)
    reference, hypothesis = normalise(example.text).strip(), normalise(heard.text).strip()
    words = word_errors([reference], [hypothesis])
    is_by_letter = language in LANGUAGES_WITHOUT_SPACES
    characters = words if is_by_letter else character_errors([reference], [hypothesis])
    return {
        "id": example.id,
        "language": language,
        "duration_s": len(example.waveform) / SAMPLE_RATE,
        "cut_s": heard.cut_s,
        "reference": reference,
        "hypothesis": hypothesis,
        "words": dataclasses.asdict(words),
        "characters": dataclasses.asdict(characters),
    }


def reported(config: Config, languages: Sequence[str]) -> tuple[str, float] | None:
    """(the paper's model, its word error rate in percent), None where this is not one of the paper's numbers."""
    column = config.column or whisper_paper.column_of(config.model)
    if config.max_utterances is not None or column is None or len(languages) != 1:
        return None
    if config.data == "librispeech":
        numbers = whisper_paper.LIBRISPEECH.get((config.decoding, config.split), {})
    else:
        tables = {"fleurs": FLEURS_WER, "mls": whisper_paper.MLS}
        numbers = tables.get(config.row, {}).get(languages[0], {}) if config.decoding == "beam" else {}
    return (column, numbers[column]) if column in numbers else None


def main(config: Config, workdir: pathlib.Path) -> int:
    """Hears what is left to hear, writes summary and page; returns how many utterances could not be heard."""
    started = time.perf_counter()
    items = read_items(config)
    config_lib.claim_workdir(config, workdir)
    settings = config_lib.to_dict(config)
    for name in ("batch_size", "column"):
        del settings[name]
    log = ResultLog(workdir / "utterances.jsonl", {item.index: {"name": item.name} for item in items}, settings)
    todo = [item for item in items if item.index not in log]
    num_failed = 0
    if todo:
        checkpoint = load_whisper(config.model, tokenizer=config.tokenizer)
        model = Whisper(dataclasses.replace(checkpoint.config, dtype=config.dtype))
        params = jax.device_put(inference_params(checkpoint.params))
        params = inference_params(params, int8=True) if config.int8 else params
        if not checkpoint.tokenizer.is_multilingual and {item.language for item in items} != {"en"}:
            raise ValueError(f"{config.model} knows English alone, the data are in other languages too")
        hear = hear_windows if config.decoding == "greedy" else hear_long_form
        results = hear(config, model, params, checkpoint.tokenizer, todo)
        for item, example, heard in tqdm.tqdm(results, total=len(items), initial=len(items) - len(todo), disable=None):
            if heard is None:
                num_failed += 1
                print(f"{item.name}: {' '.join(str(example).split())}", file=sys.stderr)
            else:
                log.add(item.index, score(item.language, example, heard))
        log.sort()
    if num_failed:
        print(f"{num_failed} utterances could not be heard; mend them and run the same command again", file=sys.stderr)
        return num_failed
    summary = whisper_eval_report.summarise(log.results)
    summary["paper"] = reported(config, sorted({item.language for item in items}))
    with atomic_path(workdir / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=1) + "\n")
    seconds = time.perf_counter() - started
    hardware = f"{jax.devices()[0].device_kind}, {seconds / 60:.1f} minutes in the last start"
    page = whisper_eval_report.write_page(workdir, config, log.results, summary, hardware)
    print(f"{whisper_eval_report.headline(config, summary)}\nwrote {page}: open it in a browser")
    return 0


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, ROWS)
    raise_malloc_thresholds()
    try:
        sys.exit(1 if main(config, workdir) else 0)
    except (ConvertError, ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
