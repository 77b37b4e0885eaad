"""The options of a transcription, named as those of the public package openai-whisper and checked once."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jaxaudio.data.whisper_tokenizer import WhisperTokenizer, language_code
from jaxaudio.generate.whisper import DecodingOptions

PREPEND_PUNCTUATIONS = "\"'“¿([{-"
APPEND_PUNCTUATIONS = "\"'.。,，!！?？:：”)]}、"

# An option that only acts together with another is an error without it.
_NEEDS = {
    "hallucination_silence_threshold": "word_timestamps",
    "prepend_punctuations": "word_timestamps",
    "append_punctuations": "word_timestamps",
    "carry_initial_prompt": "initial_prompt",
    "patience": "beam_size",
}


@dataclasses.dataclass(frozen=True)
class TranscribeOptions:
    """How an audio is transcribed. The defaults are those of openai-whisper's `transcribe`.

    Attributes:
      temperature: of sampling, 0 for greedy or beam search. Of several, the next is tried when a window's result fails
        a threshold; the last one's result is kept.
      compression_ratio_threshold: a text that zlib shrinks by more than this factor has failed (it repeats itself).
      logprob_threshold: a lower mean log-probability of the tokens has failed.
      no_speech_threshold: a window with a higher probability of no speech is skipped, unless its log-probability is
        above logprob_threshold. None switches any of the three off.
      condition_on_previous_text: the text so far is the next window's prompt. None: True, but False if batched.
      prompt_reset_on_temperature: a window decoded at a higher temperature prompts nothing after it.
      initial_prompt: text before the first window (before the first one of each clip if batched).
      carry_initial_prompt: put it before every window.
      prefix: text, or tokens, that each window's result is forced to begin with.
      word_timestamps: times of words, from the cross-attention; they also place the next window.
      prepend_punctuations, append_punctuations: marks that belong to the next or to the previous word.
      hallucination_silence_threshold: skips silence longer than this (seconds) around words that look invented.
      clip_timestamps: start, end, start, ... in seconds of what to transcribe, or the same as text with commas; without
        the last end, up to the end of the audio.
      multilingual: detect the language of each window anew.
      vad: a detector of speech (`data.voice_activity`): only what it finds is transcribed. None: all, but an
        `EnergyDetector` if batched.
      batched: the clips that vad finds are transcribed at the same time, each as if it were alone. Everything else acts
        as it does without, where one window comes after the other.
      batch_size: windows per call of the model; the one shape that is compiled. Results do not depend on it. Rows are
        filled by the clips of a batched audio and by many files; one audio in sequence fills one.
      task, language, sample_len, best_of, beam_size, patience, length_penalty, suppress_tokens, suppress_blank,
        without_timestamps, max_initial_timestamp, repetition_penalty, no_repeat_ngram_size, hotwords: see
        `DecodingOptions`. beam_size and patience act at temperature 0, best_of above it. No language: it is detected
        from the first window.

    Raises:
      ValueError: a value out of range, an option without the one it needs, or batched with condition_on_previous_text;
        the message has the value.
    """

    task: str = "transcribe"
    language: str | None = None
    temperature: float | tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    condition_on_previous_text: bool | None = None
    prompt_reset_on_temperature: float = 0.5
    initial_prompt: str | None = None
    carry_initial_prompt: bool = False
    prefix: str | tuple[int, ...] = ()
    hotwords: str | None = None
    word_timestamps: bool = False
    prepend_punctuations: str = PREPEND_PUNCTUATIONS
    append_punctuations: str = APPEND_PUNCTUATIONS
    hallucination_silence_threshold: float | None = None
    clip_timestamps: str | tuple[float, ...] = (0.0,)
    multilingual: bool = False
    vad: Callable[..., Any] | None = None
    batched: bool = False
    batch_size: int = 1
    sample_len: int | None = None
    best_of: int | None = None
    beam_size: int | None = None
    patience: float | None = None
    length_penalty: float | None = None
    suppress_tokens: tuple[int, ...] = (-1,)
    suppress_blank: bool = True
    without_timestamps: bool = False
    max_initial_timestamp: float | None = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self):
        temperatures = self.temperature if isinstance(self.temperature, tuple | list) else (self.temperature,)
        clips = self.clip_timestamps
        if isinstance(clips, str):
            clips = _numbers(clips)
        object.__setattr__(self, "temperature", tuple(float(t) for t in temperatures))
        object.__setattr__(self, "clip_timestamps", tuple(float(s) for s in clips))
        if not self.temperature or not all(t >= 0 and math.isfinite(t) for t in self.temperature):
            raise ValueError(f"temperature must be one or more numbers, each at least 0, got {temperatures!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        self._check_clips()
        self._check_companions()
        for temperature in self.temperature:
            self.decoding(temperature)  # the options of a window are checked where they belong

    def _check_clips(self):
        points = self.clip_timestamps
        ordered = all(start < end for start, end in zip(points[::2], points[1::2], strict=False))
        if not (ordered and all(s >= 0 and math.isfinite(s) for s in points)):
            raise ValueError(
                f"clip_timestamps must be start,end,start,end,... in seconds, each end after its start, got {points}"
            )

    def _check_companions(self):
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, needed in _NEEDS.items():
            value = getattr(self, name)
            if value != defaults[name] and not getattr(self, needed):
                raise ValueError(f"{name}={value!r} has no effect without {needed}; give that too or leave {name} out")
        if self.beam_size is not None and min(self.temperature) > 0:
            raise ValueError(f"beam_size={self.beam_size} acts at temperature 0, which is not in {self.temperature}")
        if self.best_of is not None and max(self.temperature) == 0:
            raise ValueError(f"best_of={self.best_of} acts above temperature 0, got {self.temperature}")
        if self.multilingual and self.language is not None:
            raise ValueError(f"multilingual detects each window's language; language={self.language!r} fixes it")
        if self.without_timestamps and self.max_initial_timestamp not in (None, defaults["max_initial_timestamp"]):
            raise ValueError(
                f"max_initial_timestamp={self.max_initial_timestamp} has no effect with without_timestamps=True"
            )
        ratio = self.compression_ratio_threshold
        if len(self.temperature) == 1 and ratio not in (None, defaults["compression_ratio_threshold"]):
            raise ValueError(
                f"compression_ratio_threshold={ratio} decides on the next temperature; the only one is "
                f"{self.temperature[0]}"
            )
        if self.batched and self.condition_on_previous_text:
            raise ValueError(
                "condition_on_previous_text=True cannot be combined with batched=True: clips are transcribed at the "
                "same time, so the text before a clip is not known yet; leave one of the two out"
            )
        if not self.conditions and self.prompt_reset_on_temperature != defaults["prompt_reset_on_temperature"]:
            raise ValueError(
                f"prompt_reset_on_temperature={self.prompt_reset_on_temperature} has no effect where windows are not "
                "conditioned on the previous text"
            )

    @property
    def conditions(self) -> bool:
        """Whether the text so far prompts the next window."""
        return not self.batched if self.condition_on_previous_text is None else self.condition_on_previous_text

    @property
    def group_size(self) -> int:
        """Hypotheses per window that decoding needs at most, over all temperatures."""
        attempts = [self.decoding(temperature) for temperature in self.temperature]
        return max(max(attempt.width, 1 + attempt.is_beam) for attempt in attempts)

    def decoding(self, temperature: float, **window: Any) -> DecodingOptions:
        """A window's options at one temperature; `window` are fields that differ from window to window."""
        names = {field.name for field in dataclasses.fields(DecodingOptions)} - {"prompt", "prefix", "temperature"}
        shared = {name: getattr(self, name) for name in names}
        shared["prefix"] = () if isinstance(self.prefix, str) else self.prefix  # text awaits its tokenizer
        idle = ("beam_size", "patience") if temperature > 0 else ("best_of",)
        return DecodingOptions(**shared | dict.fromkeys(idle) | window, temperature=temperature)


def options_for(options: TranscribeOptions, tokenizer: WhisperTokenizer) -> TranscribeOptions:
    """The options with the language as its code and the prefix as tokens.

    Raises:
      ValueError: a language, a task or a detection that the tokenizer's model does not have; with the value.
    """
    language = None if options.language is None else language_code(options.language)
    if language is not None or not tokenizer.is_multilingual:
        tokenizer.sot_sequence(language, options.task)
    if options.multilingual and not tokenizer.is_multilingual:
        raise ValueError("multilingual=True: the model knows one language; leave multilingual out")
    prefix = options.prefix
    if isinstance(prefix, str):
        prefix = tuple(tokenizer.encode(" " + prefix.strip()))
    return dataclasses.replace(options, language=language, prefix=prefix)


def initial_prompt(
    options: TranscribeOptions, tokenizer: WhisperTokenizer, text_length: int
) -> tuple[tuple[int, ...], int]:
    """Tokens of the initial prompt, and how many tokens of prompt a window may have beside the hotwords.

    Args:
      text_length: the decoder's context, half of which less one token is for what comes before the window's own text.
    Raises:
      ValueError: an initial prompt or hotwords that do not fit, with both numbers.
    """
    room = text_length // 2 - 1
    if options.hotwords:
        num_hotwords = len(tokenizer.encode(" " + options.hotwords.strip()))
        if num_hotwords > room:
            raise ValueError(f"hotwords have {num_hotwords} tokens, of which this model takes {room}; give fewer")
        room -= num_hotwords
    if options.initial_prompt is None:
        return (), room
    tokens = tuple(tokenizer.encode(" " + options.initial_prompt.strip()))
    most = room - 1 if options.carry_initial_prompt else room  # a carried prompt leaves room for the text after it
    if len(tokens) > most:
        raise ValueError(f"initial_prompt has {len(tokens)} tokens, of which this model takes {most}; shorten it")
    return tokens, room


def _numbers(text: str) -> list[float]:
    """`"0,2.5"` as numbers; no text is no number."""
    try:
        return [float(number) for number in text.split(",")] if text else []
    except ValueError as error:
        raise ValueError(f"clip_timestamps must be numbers with commas between them, got {text!r}") from error
