"""Runs `jaxaudio transcribe`: many files in one batch, their outputs, and lists that are done in parts."""

import argparse
import dataclasses
import math
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import tqdm

from jaxaudio.cli.device import compilation_cache, use_device
from jaxaudio.cli.transcribe_arguments import SUBTITLE_OPTIONS, transcribe_options
from jaxaudio.convert.whisper import load_whisper
from jaxaudio.data.audio import RESAMPLER, AudioError, audio_info
from jaxaudio.data.languages import LANGUAGES
from jaxaudio.data.manifests import ManifestError, Utterance, read_manifest, shard
from jaxaudio.data.result_lines import ResultLog
from jaxaudio.data.subtitles import FORMATS, format_timestamp, format_transcript, write_transcript
from jaxaudio.data.transcripts import Transcription, to_report_dict
from jaxaudio.generate.transcribe import transcribe_many
from jaxaudio.generate.transcribe_options import TranscribeOptions
from jaxaudio.generate.whisper import inference_params
from jaxaudio.models.whisper import Whisper


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """A file to transcribe: its place in the list, and its outputs' name without folder and suffix."""

    index: int
    utterance: Utterance
    name: str


def run(arguments: argparse.Namespace) -> int:
    """Runs the subcommand.

    Returns:
      Its exit status: 1 if a file could not be transcribed, else 0.
    Raises:
      ConvertError, ValueError, OSError: what concerns the whole run; the message says it in one line.
    """
    _check_usage(arguments)
    jobs = _jobs(arguments)
    options = transcribe_options(arguments, len(jobs))
    subtitles = {name: getattr(arguments, name) for name in SUBTITLE_OPTIONS}
    formats = _formats(arguments)
    for output_format in () if formats == FORMATS else formats:
        # An empty transcript takes every option that any transcript takes: what cannot act is said before the work.
        format_transcript(Transcription("", (), "en", 0.0), output_format, **subtitles)
    folder = pathlib.Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    log = None if arguments.manifest is None else _open_log(arguments, jobs, options)
    todo = [job for job in jobs if not _is_done(job, log, folder, formats)]
    if arguments.verbose and len(todo) < len(jobs):
        _say(f"{len(jobs) - len(todo)} of {len(jobs)} were done before")

    def finish(job: _Job, transcription: Transcription) -> None:
        if formats:
            output_format = "all" if formats == FORMATS else formats[0]
            write_transcript(transcription, folder / job.name, output_format, **subtitles)
        if log is not None:
            log.add(job.index, to_report_dict(transcription))
        if arguments.verbose:
            _print(job, transcription, name_it=len(jobs) > 1, detected=options.language is None)

    num_failed = _transcribe(arguments, options, todo, finish) if todo else 0
    if log is not None:
        log.sort()
    return 1 if num_failed else 0


def _check_usage(arguments: argparse.Namespace) -> None:
    """Exits with argparse's message where the options do not go together."""
    if (arguments.manifest is None) == (not arguments.audio):
        arguments.usage_error("give audio files, or a list of them with --manifest, and not both")
    process = (arguments.process_index, arguments.process_count)
    if process != (None, None) and (arguments.manifest is None or None in process):
        arguments.usage_error("--process_index and --process_count go together, and with --manifest")
    for name in SUBTITLE_OPTIONS:
        if getattr(arguments, name) and not arguments.word_timestamps:
            arguments.usage_error(f"--{name} requires --word_timestamps True")


def _formats(arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.output_format is None:
        return () if arguments.manifest else FORMATS
    return FORMATS if arguments.output_format == "all" else (arguments.output_format,)


def _jobs(arguments: argparse.Namespace) -> list[_Job]:
    """This process's share of the files, whose outputs have names of their own."""
    if arguments.manifest is None:
        utterances = [Utterance(audio, task=arguments.task) for audio in arguments.audio]
    else:
        utterances = read_manifest(arguments.manifest)
        for utterance in utterances:
            if utterance.task != arguments.task:
                raise ManifestError(
                    f"{arguments.manifest}: {utterance.audio} has task {utterance.task!r}, but --task is "
                    f"{arguments.task!r}; make a list for each task"
                )
    jobs = [_Job(index, utterance, _name(utterance)) for index, utterance in enumerate(utterances)]
    if _formats(arguments):
        first: dict[str, _Job] = {}
        for job in jobs:
            other = first.setdefault(job.name, job)
            if other is not job or job.name != os.path.basename(job.name):
                raise ValueError(
                    f"{other.utterance.audio} and {job.utterance.audio} would both be written to {job.name}.*; "
                    "give them different names, or transcribe them into different --output_dir"
                    if other is not job
                    else f"{job.utterance.audio}: its id, {job.name!r}, cannot be the name of a file"
                )
    return jobs if arguments.process_count is None else shard(jobs, arguments.process_index, arguments.process_count)


def _name(utterance: Utterance) -> str:
    return utterance.id or os.path.splitext(os.path.basename(utterance.audio))[0]


def _open_log(arguments: argparse.Namespace, jobs: Sequence[_Job], options: TranscribeOptions) -> ResultLog:
    index, count = arguments.process_index or 0, arguments.process_count or 1
    path = pathlib.Path(arguments.output_dir, f"{pathlib.Path(arguments.manifest).stem}.{index}-of-{count}.jsonl")
    folder = os.path.dirname(os.path.abspath(arguments.manifest))

    def item(utterance: Utterance) -> dict[str, Any]:
        audio = os.path.abspath(utterance.audio)
        inside = os.path.commonpath([audio, folder]) == folder
        return {"audio": os.path.relpath(audio, folder) if inside else audio, "id": utterance.id}

    settings = dataclasses.asdict(options) | {
        name: getattr(arguments, name) for name in ("model", "tokenizer", "int8", "dtype", "seed")
    }
    del settings["batch_size"]  # on which nothing depends
    settings["resampler"] = RESAMPLER
    settings["vad"] = options.vad and repr(options.vad)
    return ResultLog(path, {job.index: item(job.utterance) for job in jobs}, settings)


def _is_done(job: _Job, log: ResultLog | None, folder: pathlib.Path, formats: Sequence[str]) -> bool:
    if log is None or job.index not in log:
        return False
    return all((folder / f"{job.name}.{suffix}").exists() for suffix in formats)


def _transcribe(arguments: argparse.Namespace, options: TranscribeOptions, jobs: Sequence[_Job], finish: Any) -> int:
    """Transcribes the files and gives each to `finish` when it is done; returns how many failed."""
    use_device(arguments.device)
    num_failed, started = 0, time.perf_counter()
    with compilation_cache(arguments.compilation_cache), _CompileClock() as clock, _Bar(jobs) as bar:
        model, params, tokenizer, description = _load(arguments)
        if not tokenizer.is_multilingual and options.language not in (None, "en"):
            language = LANGUAGES[options.language].title()
            warnings.warn(f"{arguments.model} knows English alone, not {language}; using English", stacklevel=1)
            options = dataclasses.replace(options, language="en")
        loaded = time.perf_counter()
        if arguments.verbose:
            _say(f"loaded {description} in {loaded - started:.1f} s")
        by_utterance = {id(job.utterance): job for job in jobs}
        results = transcribe_many(
            model,
            params,
            [job.utterance for job in jobs],
            tokenizer=tokenizer,
            key=jax.random.key(arguments.seed),
            options=options,
            progress=bar.update,
        )
        for utterance, result in results:
            if isinstance(result, Exception):
                num_failed += 1
                bar.drop(utterance)
                _say(_with_path(result, utterance.audio))
            else:
                bar.complete(utterance)
                finish(by_utterance[id(utterance)], result)
    if arguments.verbose:
        _say(f"{time.perf_counter() - loaded:.1f} s for {bar.heard_s:.1f} s of audio; {clock}")
    return num_failed


def _load(arguments: argparse.Namespace) -> tuple[Whisper, Any, Any, str]:
    checkpoint = load_whisper(arguments.model, tokenizer=arguments.tokenizer)
    config = checkpoint.config
    if arguments.dtype is not None:
        config = dataclasses.replace(config, dtype=arguments.dtype)
    num_parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(checkpoint.params))
    params = jax.device_put(inference_params(checkpoint.params))  # layer by layer: views of the file's arrays
    if arguments.int8:
        params = inference_params(params, int8=True)
    kind = f"{config.dtype}{', 8-bit decoder' if arguments.int8 else ''} on {jax.devices()[0].device_kind}"
    return Whisper(config), params, checkpoint.tokenizer, f"{arguments.model}, {num_parameters:,} parameters, {kind},"


class _CompileClock:
    """How long XLA compiled, how many programs, and how many it found in the cache."""

    def __init__(self):
        self._seconds, self._num_programs, self._num_found = 0.0, 0, 0

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        jax.monitoring.unregister_event_listener(self._on_event)

    def _on_duration(self, event: str, seconds: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self._seconds += seconds
            self._num_programs += 1

    def _on_event(self, event: str, **_):
        self._num_found += event == "/jax/compilation_cache/cache_hits"

    def __str__(self):
        return (
            f"{self._seconds:.1f} s of it compiling {self._num_programs - self._num_found} programs and reading "
            f"{self._num_found} from the cache"
        )


class _Bar:
    """A progress bar of the seconds of audio of all files, where standard error is a terminal."""

    def __init__(self, jobs: Sequence[_Job]):
        form = "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s of audio [{elapsed}<{remaining}, {rate_fmt}]"
        self._bar = tqdm.tqdm(total=0.0, unit="s", disable=None, bar_format=form, file=sys.stderr)
        self._totals: dict[int, float] = {}
        self._done: dict[int, float] = {}
        self.heard_s = 0.0
        if not self._bar.disable:  # reading so many headers takes a while
            self._totals = {id(job.utterance): _duration_s(job.utterance) for job in jobs}
            self._bar.reset(total=sum(self._totals.values()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def update(self, utterance: Utterance, done_s: float, total_s: float) -> None:
        """Takes what `transcribe_many` says of the progress of a file; its length is known for certain now."""
        known, self._totals[id(utterance)] = self._totals.get(id(utterance), 0.0), total_s
        done, self._done[id(utterance)] = self._done.get(id(utterance), 0.0), done_s
        self.heard_s += done_s - done
        if not self._bar.disable:
            self._bar.total += total_s - known
            self._bar.update(done_s - done)

    def complete(self, utterance: Utterance) -> None:
        """A file has its transcription; one without a window to hear was never reported."""
        total_s = self._totals.get(id(utterance), 0.0)
        self.update(utterance, total_s, total_s)

    def drop(self, utterance: Utterance) -> None:
        """A file failed: the rest of it will not be done."""
        done_s = self._done.get(id(utterance), 0.0)
        self.update(utterance, done_s, done_s)


def _duration_s(utterance: Utterance) -> float:
    if utterance.duration_s is not None:
        return utterance.duration_s
    try:
        return audio_info(utterance.audio).duration_s
    except (AudioError, OSError):
        return 0.0  # `transcribe_many` will say why


def _print(job: _Job, transcription: Transcription, *, name_it: bool, detected: bool) -> None:
    """Prints what was heard as openai-whisper does, and what was not."""
    lines = [job.utterance.audio] if name_it else []
    if detected:
        lines.append(f"Detected language: {LANGUAGES[transcription.language].title()}")
    lines += [
        f"[{format_timestamp(segment.start)} --> {format_timestamp(segment.end)}] {segment.text}"
        for segment in transcription.segments
        if segment.text
    ]
    if lines:
        tqdm.tqdm.write("\n".join(lines), file=sys.stdout)
    skipped: dict[str, float] = {}
    for span in transcription.skipped:
        skipped[span.rule] = skipped.get(span.rule, 0.0) + span.end_s - span.start_s
    if skipped:
        by_rule = ", ".join(f"{seconds:.2f} s by {rule}" for rule, seconds in skipped.items())
        _say(f"{job.utterance.audio}: skipped {by_rule}")


def _with_path(error: Exception, path: str) -> str:
    message = " ".join(str(error).split())
    return message if path in message else f"{path}: {message}"


def _say(line: str) -> None:
    tqdm.tqdm.write(f"jaxaudio transcribe: {line}", file=sys.stderr)
