"""Whisper's vocabulary: byte pairs, then special tokens for languages, tasks and times.

Radford et al. 2022, https://arxiv.org/abs/2212.04356, section 2.3; the layout is that of
https://github.com/openai/whisper/blob/main/whisper/tokenizer.py. After the byte pairs come

    endoftext startoftranscript LANGUAGES... translate transcribe startoflm startofprev nospeech notimestamps TIMES...

so every id follows from the number of byte pairs and of languages. Times are <|0.00|>, <|0.02|>, ... in seconds.
"""

import dataclasses
import functools
import os
import re
import string
from collections.abc import Sequence

import numpy as np

from jaxaudio.data import whisper_tokenizer_files
from jaxaudio.data.byte_pair import BytePairEncoding
from jaxaudio.data.languages import LANGUAGES, LANGUAGES_WITHOUT_SPACES, language_code

__all__ = ["LANGUAGES", "SECONDS_PER_TIMESTAMP", "WhisperTokenizer", "language_code"]

SECONDS_PER_TIMESTAMP = 0.02

_ENGLISH_VOCAB_SIZE = 51864  # of the published English-only models, whose files do not say that they are
_DEFAULT_NUM_LANGUAGES = 99
_CONTROLS = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
# Symbols that transcripts of speech do not contain, alone or doubled, and the notes that stand for music.
_NON_SPEECH_SYMBOLS = (
    *'"#()*+/:;<=>@[\\]^_`{|}~「」『』',
    *("<<", ">>", "<<<", ">>>", "--", "---", "-(", "-[", "('", '("', "((", "))", "(((", ")))"),
    *("[[", "]]", "{{", "}}", "♪♪", "♪♪♪"),
)
_MUSIC_NOTES = "♩♪♫♬♭♮♯"
_MUSIC_BYTES = "♩".encode()[:2]  # the first two of three bytes of U+2640 to U+267F


@dataclasses.dataclass(frozen=True)
class WhisperTokenizer:
    """Text to ids and back.

    Attributes:
        bpe: The byte pairs, ids 0 to eot - 1.
        languages: The codes that have a token, in order of id.
        num_timestamps: Times of a window, its start and end included: window in seconds / 0.02 + 1.
        is_multilingual: Whether a prompt names language and task. The published English-only vocabularies have the
            tokens for it and never use them.

    Raises:
        ValueError: A language occurs twice, there is no time, or a multilingual vocabulary has no language.
    """

    bpe: BytePairEncoding
    languages: tuple[str, ...] = tuple(LANGUAGES)
    num_timestamps: int = 1501
    is_multilingual: bool = True

    def __post_init__(self):
        if len(set(self.languages)) < len(self.languages):
            raise ValueError(f"Every language has one token; got {self.languages}.")
        if self.num_timestamps < 1 or (self.is_multilingual and not self.languages):
            raise ValueError(
                f"A vocabulary has at least one time, and one language if it is multilingual; got "
                f"num_timestamps={self.num_timestamps}, languages={self.languages}."
            )

    @classmethod
    def for_ranks(
        cls, bpe: BytePairEncoding, languages: Sequence[str] = (), num_timestamps: int = 1501
    ) -> "WhisperTokenizer":
        """The vocabulary of a model of one's own; without languages its prompt is `sot` alone."""
        return cls(bpe, tuple(languages), num_timestamps, is_multilingual=bool(languages))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, vocab_size: int | None = None) -> "WhisperTokenizer":
        """Reads the tokenizer of a checkpoint's folder.

        Takes `tokenizer.json`, else `vocab.json` with `merges.txt`, else the one `*.tiktoken` file, and what
        `added_tokens.json`, `tokenizer_config.json` and `generation_config.json` say about added tokens.

        Args:
            folder: The folder.
            vocab_size: The number of ids of the model, if it is known; it is then checked.

        Raises:
            FileNotFoundError: The folder has none of these files, or several `.tiktoken` files; has its path.
            ValueError: A file is damaged, or its ids are not Whisper's layout or not `vocab_size` many; names it.
        """
        return cls._from_files(whisper_tokenizer_files.read_folder(folder), vocab_size)

    @classmethod
    def from_file(cls, path: str | os.PathLike, vocab_size: int | None = None) -> "WhisperTokenizer":
        """Reads one `tokenizer.json` or `.tiktoken` file; the latter has no languages, so that `vocab_size` tells them.

        Raises:
            ValueError: As `from_folder`.
        """
        return cls._from_files(whisper_tokenizer_files.read_file(path), vocab_size)

    @classmethod
    def _from_files(cls, files: whisper_tokenizer_files.TokenizerFiles, vocab_size: int | None) -> "WhisperTokenizer":
        """Computes the layout and compares it with every added token that the files name."""
        added = {name.replace("<|nocaptions|>", "<|nospeech|>"): token for name, token in files.added_tokens.items()}
        num_ranks = len(files.bpe.tokens)
        num_timestamps = sum(re.fullmatch(r"<\|\d+\.\d\d\|>", name) is not None for name in added) or 1501
        if "<|translate|>" in added:
            block = sorted((token, name) for name, token in added.items() if token < added["<|translate|>"])
            languages = tuple(name[2:-2] for token, name in block if token > num_ranks + 1)
        else:
            others = num_ranks + 2 + len(_CONTROLS) + num_timestamps
            num_languages = _DEFAULT_NUM_LANGUAGES if vocab_size is None else vocab_size - others
            if not 0 <= num_languages <= len(LANGUAGES):
                raise ValueError(
                    f"{files.path}: {num_ranks} byte pairs, {others - num_ranks} special tokens and up to "
                    f"{len(LANGUAGES)} languages do not make a vocabulary of {vocab_size} tokens."
                )
            languages = tuple(LANGUAGES)[:num_languages]
        is_multilingual = files.is_multilingual
        if is_multilingual is None:
            size = num_ranks + 2 + len(languages) + len(_CONTROLS) + num_timestamps
            is_multilingual = bool(languages) and size != _ENGLISH_VOCAB_SIZE
        tokenizer = cls(files.bpe, languages, num_timestamps, is_multilingual)
        for name, token in added.items():
            is_byte_pair = 0 <= token < num_ranks and files.bpe.tokens[token] == name.encode()
            expected = tokenizer.special_tokens.get(name)
            if not is_byte_pair and expected != token:
                raise ValueError(
                    f"{files.path}: after {num_ranks} byte pairs and {len(languages)} languages Whisper's layout has "
                    f"{name} at {'no id' if expected is None else f'id {expected}'}, this file at {token}."
                )
        if vocab_size is not None and tokenizer.vocab_size != vocab_size:
            raise ValueError(
                f"{files.path}: the tokenizer has {tokenizer.vocab_size} tokens, expected the model's {vocab_size}."
            )
        return tokenizer

    def save(self, folder: str | os.PathLike):
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `from_folder` and transformers read."""
        whisper_tokenizer_files.write_folder(
            folder, self.bpe, self.special_tokens, self.timestamp_begin, self.is_multilingual
        )

    @property
    def eot(self) -> int:
        """The id that ends a transcript."""
        return len(self.bpe.tokens)

    @property
    def sot(self) -> int:
        """The id a transcript begins with."""
        return self.eot + 1

    @functools.cached_property
    def language_ids(self) -> dict[str, int]:
        """Language code to id."""
        return {code: self.sot + 1 + index for index, code in enumerate(self.languages)}

    @property
    def translate(self) -> int:
        """The id of the task of translating into English."""
        return self.sot + 1 + len(self.languages)

    @property
    def transcribe(self) -> int:
        """The id of the task of writing down the spoken language."""
        return self.translate + 1

    @property
    def sot_lm(self) -> int:
        """The id of <|startoflm|>, which the published models do not use."""
        return self.translate + 2

    @property
    def sot_prev(self) -> int:
        """The id before the text of earlier windows, the prompt."""
        return self.translate + 3

    @property
    def no_speech(self) -> int:
        """The id that says that a window has no speech."""
        return self.translate + 4

    @property
    def no_timestamps(self) -> int:
        """The id that asks for a transcript without times."""
        return self.translate + 5

    @property
    def timestamp_begin(self) -> int:
        """The id of <|0.00|>; `id - timestamp_begin` counts steps of 0.02 s."""
        return self.translate + 6

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return self.timestamp_begin + self.num_timestamps

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """How every special token is written, such as `<|en|>`, to its id, in order of id."""
        times = [f"{SECONDS_PER_TIMESTAMP * step:.2f}" for step in range(self.num_timestamps)]
        names = ["endoftext", "startoftranscript", *self.languages, *_CONTROLS, *times]
        return {f"<|{name}|>": self.eot + index for index, name in enumerate(names)}

    @functools.cached_property
    def _special_bytes(self) -> tuple[bytes, ...]:
        return tuple(name.encode() for name in self.special_tokens)

    def encode(self, text: str, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        """The ids of spoken text, with BPE dropout if asked for (see `BytePairEncoding.encode_ordinary`).

        Raises:
            ValueError: The text contains a special token such as `<|en|>`, which would be read as spelled-out text;
                names it. `bpe.encode_ordinary` does spell it out.
        """
        for match in re.finditer(r"<\|[^|]*\|>", text):
            if match[0] in self.special_tokens:
                raise ValueError(
                    f"The text contains the special token {match[0]} at character {match.start()}. Special tokens are "
                    "given by id; remove it from the text, or spell it out with bpe.encode_ordinary."
                )
        return self.bpe.encode_ordinary(text, dropout, rng)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without times; other special tokens are written out.

        Raises:
            ValueError: An id is not in the vocabulary; has it.
        """
        self._check(ids)
        return self.decode_with_timestamps([token for token in ids if token < self.timestamp_begin])

    def decode_with_timestamps(self, ids: Sequence[int]) -> str:
        """The text of ids with all special tokens written out, times as `<|1.08|>`.

        Raises:
            ValueError: An id is not in the vocabulary; has it.
        """
        return b"".join(self._token_bytes(ids)).decode("utf-8", errors="replace")

    def _check(self, ids: Sequence[int]):
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"Token ids of this vocabulary are 0 to {self.vocab_size - 1}; got {token}.")

    def _token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        self._check(ids)
        eot = self.eot
        return [self.bpe.tokens[token] if token < eot else self._special_bytes[token - eot] for token in ids]

    def sot_sequence(self, language: str | None = "en", task: str | None = "transcribe") -> tuple[int, ...]:
        """The ids a transcript begins with: sot, language, task; sot alone in a vocabulary that is not multilingual.

        Args:
            language: One of `languages`; None is English.
            task: "transcribe" or "translate"; None is "transcribe".

        Raises:
            ValueError: There is no token for the language or task, or an English-only vocabulary is asked for another
                language or for translation; has the value.
        """
        language, task = language or "en", task or "transcribe"
        if task not in ("transcribe", "translate"):
            raise ValueError(f"Whisper's tasks are transcribe and translate; got {task!r}.")
        if not self.is_multilingual:
            if (language, task) != ("en", "transcribe"):
                raise ValueError(f"An English-only vocabulary can only transcribe en; got {task} {language}.")
            return (self.sot,)
        if language not in self.language_ids:
            code = language_code(language)
            raise ValueError(
                f"This vocabulary has tokens for the codes {', '.join(self.languages)}; got {language!r}"
                + (f", whose code is {code}." if code != language else ".")
            )
        return self.sot, self.language_ids[language], getattr(self, task)

    @functools.cached_property
    def blank_tokens(self) -> tuple[int, ...]:
        """The ids of a single space, which no transcript begins with."""
        return tuple(self.bpe.encode_ordinary(" "))

    @functools.cached_property
    def non_speech_tokens(self) -> tuple[int, ...]:
        """Tokens of what is written but not spoken, such as brackets, speaker dashes and notes, in order of id.

        A symbol counts if it is one token, with or without a space before it. Hyphen and apostrophe only count at the
        start of a word. Of the notes, their first two bytes count when they are a token of their own, because
        all characters that begin with these are such symbols.
        """
        found = set()
        for text in (" -", " '", *_NON_SPEECH_SYMBOLS, *(f" {symbol}" for symbol in _NON_SPEECH_SYMBOLS)):
            ids = self.bpe.encode_ordinary(text)
            if len(ids) == 1:
                found.add(ids[0])
        for text in (*_MUSIC_NOTES, *(f" {note}" for note in _MUSIC_NOTES)):
            first = self.bpe.encode_ordinary(text)[0]
            if self.bpe.tokens[first].lstrip(b" ").startswith(_MUSIC_BYTES):
                found.add(first)
        return tuple(sorted(found))

    def split_to_word_tokens(
        self, ids: Sequence[int], language: str | None = "en"
    ) -> tuple[list[str], list[list[int]]]:
        """Groups ids into words: at spaces, punctuation and special tokens, or where text has no spaces, at characters.

        Bytes that are no UTF-8 never swallow the tokens after them: every id is in exactly one word.

        Args:
            ids: Token ids, special ones included.
            language: The text's language; zh, ja, th, lo, my and yue are split at characters.

        Returns:
            The words, with their leading spaces, and the ids of each.

        Raises:
            ValueError: An id is not in the vocabulary; has it.
        """
        pieces, piece_ids = self._split_at_characters(ids)
        if language in LANGUAGES_WITHOUT_SPACES:
            return pieces, piece_ids
        words, word_ids = [], []
        for piece, tokens in zip(pieces, piece_ids, strict=True):
            # What strips to nothing is "punctuation" too, as in the published implementation.
            is_punctuation = piece.strip() in string.punctuation
            if not words or piece.startswith(" ") or is_punctuation or tokens[0] >= self.eot:
                words.append(piece)
                word_ids.append(tokens)
            else:
                words[-1] += piece
                word_ids[-1] = word_ids[-1] + tokens
        return words, word_ids

    def _split_at_characters(self, ids: Sequence[int]) -> tuple[list[str], list[list[int]]]:
        token_bytes = self._token_bytes(ids)
        whole = b"".join(token_bytes)
        words, word_ids, pending = [], [], []
        start = end = 0
        for token, piece in zip(ids, token_bytes, strict=True):
            pending.append(token)
            end += len(piece)
            character = _character_around(whole, end)
            # After bytes that are no UTF-8 the published implementation cuts at once, through characters too.
            if character is None or "\ufffd" in whole[start:character].decode("utf-8", errors="replace"):
                words.append(whole[start:end].decode("utf-8", errors="replace"))
                word_ids.append(pending)
                pending, start = [], end
        return words, word_ids


def _character_around(text: bytes, position: int) -> int | None:
    """Where a valid UTF-8 character starts that has bytes on both sides of a position; None if there is none."""
    if position == len(text) or text[position] & 0xC0 != 0x80:
        return None  # what follows is no continuation byte
    for first in range(max(position - 3, 0), position):
        for last in range(position + 1, min(first + 4, len(text)) + 1):
            try:
                if len(text[first:last].decode("utf-8")) == 1:
                    return first
            except UnicodeDecodeError:
                continue
    return None
