"""Whisper's training and evaluation batches from a list of recordings, by a Grain pipeline.

Radford et al. 2022, https://arxiv.org/abs/2212.04356, sections 2.1 and 2.3 and table 17. A batch is a dict of arrays:

    waveform   (B, A) float32   a window of audio at 16 kHz, zeros behind its end
    inputs, targets, mask (B, L)   see `whisper_examples.token_row`

The log-mel spectrogram is left to the training step, where an accelerator computes it.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jaxaudio.data.audio import SAMPLE_RATE, AudioError, audio_info, read_blocks
from jaxaudio.data.manifests import ManifestError, Utterance
from jaxaudio.data.whisper_examples import Window, cut_windows, spaced, token_row, window_tokens
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer, language_code

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class WhisperData:
    """How rows are drawn from windows.

    Attributes:
      timestamps_rate: rows that write times, of those whose times are known; the paper does not give it.
      previous_text_rate: rows behind the text before them, of those that have one.
      speechless_rate: windows without speech that are kept at all.
      bpe_dropout: see `WhisperTokenizer.encode`; large-v2 has 0.1.

    Raises:
      ValueError: a rate outside [0, 1]; with the value.
    """

    timestamps_rate: float = 0.5
    previous_text_rate: float = 0.5
    speechless_rate: float = 0.1
    bpe_dropout: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                raise ValueError(f"{field.name} must be in [0, 1], got {getattr(self, field.name)}")


@dataclasses.dataclass(frozen=True)
class Example:
    """A window and the recording it is of, whose language is a code."""

    utterance: Utterance
    window: Window


def manifest_windows(utterances: Sequence[Utterance], tokenizer: WhisperTokenizer, window_s: float) -> list[Example]:
    """All windows of all recordings, in order. Where the list has no duration, the file's header is read.

    Raises:
      ManifestError: a recording without a text ("" is silence), or without a language although the tokenizer asks for
        one; or as `cut_windows`; the message names the recording.
      AudioError: a file whose header is needed and cannot be read.
    """
    examples = []
    for utterance in utterances:
        if utterance.text is None and not utterance.segments:
            raise ManifestError(f'{utterance.audio}: has neither text nor segments; give it "" if nobody speaks')
        language = utterance.language
        if language is None and tokenizer.is_multilingual:
            raise ManifestError(f"{utterance.audio}: has no language; expected a code such as {tokenizer.languages[0]}")
        if language is not None:
            utterance = dataclasses.replace(utterance, language=language_code(language))
        duration_s = utterance.duration_s or audio_info(utterance.audio).duration_s
        examples += [Example(utterance, window) for window in cut_windows(utterance, duration_s, window_s)]
    return examples


def subsample_speechless(examples: Sequence[Example], rate: float, seed: int) -> list[Example]:
    """Leaves each window without speech out with probability 1 - rate, drawn from `seed`; all others stay."""
    keep = np.random.default_rng(seed).random(len(examples)) < rate
    return [example for example, kept in zip(examples, keep, strict=True) if kept or example.window.is_speech()]


def whisper_batches(
    examples: Sequence[Example],
    tokenizer: WhisperTokenizer,
    data: WhisperData,
    *,
    window_s: float,
    text_length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_epochs: int | None = None,
) -> grain.DatasetIterator:
    """Training batches: shuffled, sharded by process, read and put into tokens, prefetched.

    `seed` decides the order of every epoch and every draw. The iterator is an Orbax checkpointable; a state needs the
    same arguments again. A file is decoded from its beginning to the window's end, so that recordings of hours should
    be cut into files of minutes before a large training.

    Args:
      examples: from `manifest_windows`.
      tokenizer: of the model.
      data: how rows are drawn.
      window_s, text_length: of the model.
      batch_size: rows of this process.
      seed: of everything.
      process_index, process_count: which of how many shares of the examples to read.
      num_epochs: None repeats for ever; otherwise rows that fill no batch at the very end are left out.
    Raises:
      ValueError: fewer examples than processes.
      ManifestError: by the iterator: a text of more tokens than text_length, or one that cannot be encoded.
      AudioError: by the iterator: a file that cannot be read, or that ends before a window begins.
    """
    if len(examples) < process_count:
        raise ValueError(f"{len(examples)} windows cannot be shared by {process_count} processes")
    dataset = grain.MapDataset.source(list(examples)).seed(seed).shuffle()[process_index::process_count]
    dataset = dataset.repeat(num_epochs).random_map(_RandomRow(tokenizer, data, window_s, text_length))
    read = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4 * batch_size)
    return iter(dataset.to_iter_dataset(read).batch(batch_size, drop_remainder=True))


def evaluation_batches(
    examples: Sequence[Example],
    tokenizer: WhisperTokenizer,
    *,
    window_s: float,
    text_length: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every window once, in order, with times where they are known and without previous text.

    Every process yields the same number of batches; rows that are left over are padding with mask False.
    """
    rows = batch_size * process_count
    for first in range(process_index * batch_size, -(-len(examples) // rows) * rows, rows):
        batch = [
            _row(example, tokenizer, window_s, text_length, timestamps=example.window.timed)
            for example in examples[first : first + batch_size]
        ]
        padding = token_row(tokenizer, [tokenizer.sot, tokenizer.eot], text_length=text_length)
        padding["waveform"] = np.zeros(round(window_s * SAMPLE_RATE), np.float32)
        padding["mask"][:] = False
        batch += [padding] * (batch_size - len(batch))
        yield {name: np.stack([row[name] for row in batch]) for name in padding}


class _RandomRow(grain.transforms.RandomMap):
    """A row by the random generator that Grain keys to each record."""

    def __init__(self, tokenizer: WhisperTokenizer, data: WhisperData, window_s: float, text_length: int):
        self.tokenizer, self.data, self.window_s, self.text_length = tokenizer, data, window_s, text_length

    def random_map(self, element: Example, rng: np.random.Generator) -> Batch:
        data, window = self.data, element.window
        timestamps = bool(rng.random() < data.timestamps_rate) and window.timed
        previous = window.previous_text if rng.random() < data.previous_text_rate else ""
        options = {"dropout": data.bpe_dropout, "rng": rng}
        return _row(element, self.tokenizer, self.window_s, self.text_length, timestamps, previous, **options)


def _row(example, tokenizer, window_s, text_length, timestamps, previous_text="", dropout=0.0, rng=None) -> Batch:
    utterance, window = example.utterance, example.window
    try:
        tokens = window_tokens(
            tokenizer,
            window,
            language=utterance.language,
            task=utterance.task,
            timestamps=timestamps,
            dropout=dropout,
            rng=rng,
        )
        previous = tokenizer.encode(spaced(previous_text, utterance.language), dropout, rng) if previous_text else ()
        row = token_row(tokenizer, tokens, text_length=text_length, previous=previous)
    except ValueError as error:
        raise ManifestError(f"{utterance.audio}, window at {window.start_s} s: {error}") from error
    waveform = np.zeros(round(window_s * SAMPLE_RATE), np.float32)
    heard = load_window(utterance.audio, window.start_s, window.num_samples(timestamps, SAMPLE_RATE, window_s))
    waveform[: len(heard)] = heard
    return {"waveform": waveform, **row}


def load_window(path: str | os.PathLike, start_s: float, num_samples: int) -> np.ndarray:
    """At most `num_samples` of a file at 16 kHz from `start_s` on, fewer at its end, float32 (A,).

    Raises:
      AudioError: the file cannot be read, or ends before `start_s`.
    """
    start = round(start_s * SAMPLE_RATE)
    pieces, position = [], 0
    for block in read_blocks(path, SAMPLE_RATE):
        piece = block[max(start - position, 0) : start + num_samples - position]
        position += len(block)
        if len(piece):
            pieces.append(piece)
        if position >= start + num_samples:
            break
    if not pieces:
        raise AudioError(f"{path}: ends after {position / SAMPLE_RATE:.2f} s, a window of it begins at {start_s} s")
    return np.concatenate(pieces)
