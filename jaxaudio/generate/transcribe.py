"""Transcribes audio of any length: one file after its own algorithm, many files and clips with one batch of windows.

Radford et al. 2022, https://arxiv.org/abs/2212.04356, section 4.5. The algorithm of one file is `generate.windows`; its
requests are answered here, those of many files and clips together: encoded once, decoded with fallback, aligned.
"""

import collections
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxaudio.data.manifests import Utterance
from jaxaudio.data.transcripts import Segment, Transcription
from jaxaudio.data.voice_activity import EnergyDetector
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.generate.audio_source import audio_blocks, rereadable
from jaxaudio.generate.clips import requested_clips, speech_clips
from jaxaudio.generate.coverage import Coverage
from jaxaudio.generate.features import FileMel, file_log_mel
from jaxaudio.generate.transcribe_options import TranscribeOptions, initial_prompt, options_for
from jaxaudio.generate.whisper import DecodingResult, decode, detect_language, encode, inference_params
from jaxaudio.generate.windows import AlignRequest, DecodeRequest, DetectRequest, needs_fallback, transcribe_clips
from jaxaudio.generate.word_timestamps import align_words
from jaxaudio.models.whisper import Whisper

_END = object()


def transcribe(
    model: Whisper,
    params: Any,
    audio: Any,
    *,
    tokenizer: WhisperTokenizer,
    key: jax.Array | None = None,
    options: TranscribeOptions | None = None,
    progress: Callable[[float, float], None] | None = None,
    **overrides: Any,
) -> Transcription:
    """Transcribes one audio.

    In sequence (the default) the segments, tokens and seconds are those of openai-whisper's `transcribe` with the same
    weights. With batched=True each clip of speech gives what that function gives for the clip alone
    (clip_timestamps=[start, end]), `batch_size` clips at a time.

    A transcription depends on the audio, the weights, the options and `key`, and on nothing else: window s of attempt a
    is drawn with `key` folded with (s, a), so neither other files nor the batch nor earlier calls change it. For
    another draw of the same audio pass another key.

    Args:
      model, params: the model and its parameters, as trained or from `inference_params` (which saves the work when many
        calls share them).
      audio: a path, an array (A,) of mono samples in [-1, 1] at 16 kHz, or an iterator of such arrays.
      tokenizer: the model's `WhisperTokenizer`.
      key: of sampling above temperature 0; jax.random.key(0) if None.
      options: all options; `overrides` are fields of it by name, such as language="de".
      progress: called with the seconds done and the seconds in all.
    Raises:
      AudioError: audio that cannot be read, is empty or is not finite; see `audio_blocks`.
      ValueError: options that are wrong in themselves (`TranscribeOptions`) or for this model or this audio: a language
        or a task it does not have, an initial prompt longer than its context takes, a clip after the audio's end; the
        message has the value.
    """
    report = None if progress is None else lambda _, done_s, total_s: progress(done_s, total_s)
    results = transcribe_many(
        model, params, [audio], tokenizer=tokenizer, key=key, options=options, progress=report, **overrides
    )
    _, result = next(results)
    if isinstance(result, Exception):
        raise result
    return result


def transcribe_many(
    model: Whisper,
    params: Any,
    files: Iterable[Any],
    *,
    tokenizer: WhisperTokenizer,
    key: jax.Array | None = None,
    options: TranscribeOptions | None = None,
    progress: Callable[[Any, float, float], None] | None = None,
    **overrides: Any,
) -> Iterator[tuple[Any, Transcription | OSError | ValueError]]:
    """Transcribes many audios, whose windows share batches of `batch_size`; each result is that of `transcribe` alone.

    A file is opened when a place in the batch is free. One that cannot be transcribed gives its error and the others
    go on.

    Args:
      files: audios as of `transcribe`, or `Utterance`s, whose language, if any, goes before that of the options; one of
        another task or with a previous text is an error.
      progress: called with the file, its seconds done and its seconds in all.
      model, params, tokenizer, key, options, overrides: as of `transcribe`.
    Returns:
      An iterator of (file, transcription or error) in the order in which they are finished.
    Raises:
      ValueError: options that are wrong in themselves or for the model, before any file is read.
    """
    options = dataclasses.replace(options or TranscribeOptions(), **overrides)
    engine = _Engine(model, params, tokenizer, jax.random.key(0) if key is None else key, options)
    return _run(engine, iter(files), progress or (lambda *_: None))


def _run(engine: "_Engine", files: Iterator[Any], progress: Callable[[Any, float, float], None]) -> Iterator[tuple]:
    rows: list[_Stream | None] = [None] * engine.options.batch_size
    waiting: collections.deque[_Stream] = collections.deque()
    while True:
        while None in rows:
            if not waiting:
                file = next(files, _END)
                if file is _END:
                    break
                try:
                    waiting.extend(engine.open(file))
                except (OSError, ValueError) as error:
                    yield file, error
                    continue
            stream = waiting.popleft()
            stream.send(None)
            rows[rows.index(None)] = stream
        if not any(rows):
            return
        engine.answer(rows)
        for row, stream in enumerate(rows):
            if stream is None:
                continue
            job = stream.job
            progress(job.file, job.coverage.done_s, job.coverage.duration_s)
            if stream.segments is not None:
                rows[row] = None
                if job.is_done:
                    yield job.file, job.transcription(engine.tokenizer)


class _Stream:
    """One run of the algorithm: the request it waits on, in the end its segments."""

    def __init__(self, job: "_Job", requests: Generator):
        self.job = job
        self.request = None
        self.segments: list[Segment] | None = None
        self._requests = requests

    def send(self, answer: Any):
        """Goes on to the next request."""
        try:
            self.request = self._requests.send(answer)
        except StopIteration as end:
            self.request, self.segments = None, end.value


@dataclasses.dataclass
class _Job:
    """One file: the language once it is known, and a stream for each part of it that is transcribed on its own."""

    file: Any
    language: str | None
    coverage: Coverage
    streams: list[_Stream] = dataclasses.field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return all(stream.segments is not None for stream in self.streams)

    def transcription(self, tokenizer: WhisperTokenizer) -> Transcription:
        segments = [segment for stream in self.streams for segment in stream.segments]
        heard, skipped = self.coverage.spans()
        return Transcription(
            text=tokenizer.decode([token for segment in segments for token in segment.tokens]),
            segments=tuple(dataclasses.replace(segment, id=i) for i, segment in enumerate(segments)),
            language=self.language,
            duration_s=self.coverage.duration_s,
            heard=heard,
            skipped=skipped,
        )


class _Engine:
    """The model with the options of a call: it opens files and answers the requests of a batch."""

    def __init__(self, model: Whisper, params: Any, tokenizer: WhisperTokenizer, key: jax.Array, options: Any):
        self.model, self.tokenizer, self.key = model, tokenizer, key
        self.options = options_for(options, tokenizer)
        self.initial_tokens, self.prompt_length = initial_prompt(options, tokenizer, model.config.text_length)
        self.params = inference_params(params)

    def open(self, file: Any) -> list[_Stream]:
        """Reads a file as far as its mel and its clips; its streams have not begun."""
        options, config = self.options, self.model.config
        if isinstance(file, Utterance):
            self._check(file)
        audio = file.audio if isinstance(file, Utterance) else file
        if isinstance(file, Utterance) and file.language is not None:
            options = options_for(dataclasses.replace(options, language=file.language), self.tokenizer)
        vad = options.vad or (EnergyDetector() if options.batched else None)
        audio = audio if vad is None else rereadable(audio)
        mel = file_log_mel(audio_blocks(audio), config.num_mels)
        language = options.language or (None if self.tokenizer.is_multilingual else "en")
        job = _Job(file, language, Coverage(len(mel.frames), mel.duration_s))
        clips = requested_clips(options.clip_timestamps, len(mel.frames))
        job.coverage.skip_outside(clips, "clip_timestamps")
        if vad is not None:
            speech = vad(audio_blocks(audio))
            clips = speech_clips(clips, speech, config.num_frames, keep_cuts=options.batched)
            job.coverage.skip_outside(clips, "voice_activity")
        parts = [[clip] for clip in clips] if options.batched else [clips]
        job.streams += [_Stream(job, self._requests(job, mel, part)) for part in parts or [[]]]
        return job.streams

    def _check(self, utterance: Utterance):
        if utterance.task != self.options.task:
            raise ValueError(
                f"{utterance.audio}: its task is {utterance.task!r}, that of the options {self.options.task!r}; "
                "transcribe each task by a call of its own"
            )
        if utterance.previous_text is not None:
            raise ValueError(
                f"{utterance.audio}: previous_text={utterance.previous_text!r} is for training; a prompt is given as "
                "initial_prompt"
            )

    def _requests(self, job: _Job, mel: FileMel, clips: list[tuple[int, int]]) -> Generator:
        if job.language is None:
            job.language = yield DetectRequest(mel.first_window(self.model.config.num_frames))
        return (
            yield from transcribe_clips(
                mel,
                clips,
                window_frames=self.model.config.num_frames,
                tokenizer=self.tokenizer,
                options=self.options,
                language=job.language,
                coverage=job.coverage,
                initial_tokens=self.initial_tokens,
                prompt_length=self.prompt_length,
            )
        )

    def answer(self, rows: Sequence[_Stream | None]):
        """Answers the requests of one batch: each window is encoded once, whatever is asked about it.

        Every call of the model has all rows, some of them idle, so that nothing compiles again when files end.
        """
        config = self.model.config
        requests = [stream.request if stream else None for stream in rows]
        if not any(requests):
            return
        mel = np.zeros((len(rows), config.num_frames, config.num_mels), np.float32)
        for row, request in enumerate(requests):
            if request is not None:
                mel[row] = request.mel
        memory = encode(self.model, self.params, mel)
        languages = self._languages(memory, requests)
        results = self._decode(memory, requests, languages)
        for stream, request, result, language in zip(rows, requests, results, languages, strict=True):
            if request is not None:
                stream.send(language if isinstance(request, DetectRequest) else result)
        self._align(memory, rows)

    def _languages(self, memory: Any, requests: Sequence[Any]) -> list[str | None]:
        languages = [getattr(request, "language", None) for request in requests]
        unknown = [row for row, request in enumerate(requests) if request is not None and languages[row] is None]
        if unknown:
            probabilities = detect_language(self.model, self.params, self.tokenizer, memory)
            for row in unknown:
                languages[row] = max(probabilities[row], key=probabilities[row].get)
        return languages

    def _decode(
        self, memory: Any, requests: Sequence[Any], languages: Sequence[str | None]
    ) -> list[DecodingResult | None]:
        """Decodes at one temperature after the other; a row whose result is good enough idles from then on."""
        results: list[DecodingResult | None] = [None] * len(requests)
        for attempt, temperature in enumerate(self.options.temperature):
            rows = [
                self.options.decoding(temperature, prompt=request.prompt, language=language)
                if isinstance(request, DecodeRequest) and (result is None or needs_fallback(result, self.options))
                else None
                for request, language, result in zip(requests, languages, results, strict=True)
            ]
            if not any(rows):
                break
            found = decode(
                self.model,
                self.params,
                self.tokenizer,
                memory,
                self.key,
                rows,
                requests=[(getattr(request, "seek", 0), attempt) for request in requests],
                group_size=self.options.group_size,
            )
            results = [new or old for new, old in zip(found, results, strict=True)]
        return results

    def _align(self, memory: Any, rows: Sequence[_Stream | None]):
        """Answers the rows that go on with the same window to ask for its words."""
        wanted = [stream.request if stream and isinstance(stream.request, AlignRequest) else None for stream in rows]
        if not any(wanted):
            return
        language = next(request.language for request in wanted if request)  # rows without text may have any
        timings = align_words(
            self.model,
            self.params,
            self.tokenizer,
            memory,
            [request.text_tokens if request else () for request in wanted],
            [request.num_frames if request else 0 for request in wanted],
            [request.language if request else language for request in wanted],
            task=self.options.task,
        )
        for stream, request, words in zip(rows, wanted, timings, strict=True):
            if request is not None:
                stream.send(words)
