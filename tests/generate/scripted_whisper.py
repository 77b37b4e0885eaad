"""openai-whisper's `transcribe` and ours with one scripted model, which answers what a script says and keeps a log.

Frame t of the mel has the value t + 1 and padding 0, so that both models know from a window where it lies.
"""

import dataclasses
import importlib
import pathlib
import types
from collections.abc import Callable, Iterable

import numpy as np
import torch
import whisper
import whisper.timing
import whisper.tokenizer

from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.generate import transcribe as ours
from jaxaudio.generate.features import FileMel
from jaxaudio.generate.whisper import DecodingResult
from jaxaudio.generate.word_timestamps import WordTiming
from jaxaudio.models.whisper import Whisper, WhisperConfig

OPENAI = importlib.import_module("whisper.transcribe")  # the package shadows its module with the function
NUM_MELS = 2
MODEL = Whisper(
    WhisperConfig(
        vocab_size=51865, num_mels=NUM_MELS, embed_dim=4, num_heads=1, num_encoder_layers=1, num_decoder_layers=1
    )
)
OPENAI_TOKENIZER = whisper.tokenizer.get_tokenizer(True, num_languages=99)
TOKENIZER = WhisperTokenizer.from_file(pathlib.Path(whisper.__file__).parent / "assets/multilingual.tiktoken", 51865)
BEGIN = TOKENIZER.timestamp_begin


@dataclasses.dataclass(frozen=True)
class Question:
    """What the model is asked."""

    seek: int
    num_frames: int
    temperature: float
    prompt: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    language: str = "en"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What it says."""

    tokens: tuple[int, ...]
    avg_logprob: float = -0.5
    no_speech_prob: float = 0.1
    compression_ratio: float = 1.2


Script = Callable[[Question], Answer]
Alignment = Callable[[int, tuple[int, ...]], list[WordTiming]]  # of the window's first frame and its text


def no_words(seek: int, text: tuple[int, ...]) -> list[WordTiming]:
    """An alignment that finds nothing."""
    return []


def detected_language(window: np.ndarray) -> str:
    """A window (T, M) speaks German if its first frame is even and English if it is odd."""
    return "de" if window[0, 0] % 2 else "en"


def place(window: np.ndarray) -> tuple[int, int]:
    """First frame, and number of frames that are not padding."""
    return int(window[0, 0]) - 1, int(np.count_nonzero(window[:, 0]))


def openai_transcribe(monkeypatch, script: Script, align: Alignment, num_frames: int, **options):
    """The result of openai-whisper, and the questions it asked."""
    asked = []

    def log_mel(audio, n_mels, padding):
        mel = torch.zeros(n_mels, num_frames + 3000)
        mel[:, :num_frames] = torch.arange(1, num_frames + 1)
        return mel

    def decode(window, options):
        if len(asked) > 1000:
            raise RuntimeError("openai-whisper decodes one window for ever")
        question = Question(
            *place(window.numpy().T),
            options.temperature,
            tuple(options.prompt[-223:]),
            tuple(options.prefix or ()),
            options.language,
        )
        asked.append(question)
        answer = script(question)
        return whisper.DecodingResult(
            audio_features=None,
            language=options.language,
            tokens=list(answer.tokens),
            text=OPENAI_TOKENIZER.decode(list(answer.tokens)).strip(),
            avg_logprob=answer.avg_logprob,
            no_speech_prob=answer.no_speech_prob,
            temperature=options.temperature,
            compression_ratio=answer.compression_ratio,
        )

    def find_alignment(model, tokenizer, text_tokens, mel, num_frames):
        timings = align(place(mel.numpy().T)[0], tuple(text_tokens)) if text_tokens else []
        return [whisper.timing.WordTiming(t.word, list(t.tokens), t.start, t.end, t.probability) for t in timings]

    model = types.SimpleNamespace(
        device=torch.device("cpu"),
        dims=types.SimpleNamespace(n_mels=NUM_MELS, n_audio_ctx=1500, n_text_ctx=448),
        is_multilingual=True,
        num_languages=99,
        decode=decode,
        detect_language=lambda window: (None, {detected_language(window.numpy().T): 1.0}),
    )
    monkeypatch.setattr(OPENAI, "log_mel_spectrogram", log_mel)
    monkeypatch.setattr(whisper.timing, "find_alignment", find_alignment)
    result = OPENAI.transcribe(model, np.zeros(1, np.float32), fp16=False, **options)
    return result, asked


def numbered_mel(blocks: Iterable[np.ndarray], num_mels: int) -> FileMel:
    """Frames by their number; their second band holds the audio's first sample, which tells files apart."""
    waveform = np.concatenate(list(blocks))
    numbers = np.arange(1, len(waveform) // 160 + 1, dtype=np.float32)
    frames = np.stack([numbers, np.full_like(numbers, waveform[0])], axis=1)
    return FileMel(frames, closing=np.zeros((0, num_mels), np.float32), silence=0.0, num_samples=len(waveform))


class Scripted:
    """Stands in for the model in our driver; `asked` is the log, `calls` what the batches looked like."""

    def __init__(self, monkeypatch, script: Script, align: Alignment = no_words):
        self.script, self.align = script, align
        self.asked: list[tuple[float, Question]] = []  # with the file's first sample
        self.calls: list[tuple[str, int]] = []
        for name in ("encode", "decode", "detect_language"):
            monkeypatch.setattr(ours, name, getattr(self, name))
        monkeypatch.setattr(ours, "inference_params", lambda params: params)
        monkeypatch.setattr(ours, "align_words", self.align_words)
        monkeypatch.setattr(ours, "file_log_mel", numbered_mel)

    def encode(self, model, params, mel):
        """The memory is the mel itself."""
        self.calls.append(("encode", len(mel)))
        return mel

    def detect_language(self, model, params, tokenizer, memory):
        """Probabilities of each row."""
        self.calls.append(("detect", len(memory)))
        return [{"de": 0.1, "en": 0.2, detected_language(window): 0.7} for window in memory]

    def decode(self, model, params, tokenizer, memory, key, options, *, requests, group_size):
        """The script's answers."""
        assert len(options) == len(requests) == len(memory)
        self.calls.append(("decode", group_size))
        results = []
        for window, row, request in zip(memory, options, requests, strict=True):
            if row is None:
                results.append(None)
                continue
            question = Question(*place(window), row.temperature, row.prompt, row.prefix, row.language)
            assert request[0] == question.seek
            self.asked.append((float(window[0, 1]), question))
            answer = self.script(question)
            text = tokenizer.decode(answer.tokens).strip()
            results.append(
                DecodingResult(text=text, language=row.language, temperature=row.temperature, **vars(answer))
            )
        return results

    def align_words(self, model, params, tokenizer, memory, text_tokens, num_frames, languages, *, task):
        """The alignment's answers."""
        assert len(memory) == len(text_tokens) == len(num_frames) == len(languages)
        self.calls.append(("align", len(memory)))
        return [
            self.align(place(window)[0], tuple(text)) if text else []
            for window, text in zip(memory, text_tokens, strict=True)
        ]

    def transcribe(self, num_frames: int, tag: float = 0.0, **options):
        """Of an audio with so many frames, all samples `tag`."""
        audio = np.full(num_frames * 160, tag, np.float32)
        return ours.transcribe(MODEL, {}, audio, tokenizer=TOKENIZER, **options)
