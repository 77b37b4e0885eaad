"""Byte-level byte pair encoding, the way GPT-2 and Whisper turn text into ids and back.

Text is cut into words by a regular expression, each word's UTF-8 bytes start as one token each, and neighbours are
joined as long as a learned token spells them, the token of lowest id (the one learned first) first.
Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes: Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners", section 2.2. With dropout: Provilkov et al. 2020, https://arxiv.org/abs/1910.13267.
"""

import base64
import binascii
import collections
import dataclasses
import functools
import heapq
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

# The words of the GPT-2 release, https://github.com/openai/gpt-2: contractions, letters, digits, the rest, whitespace.
# Letters younger than the installed `regex` package's Unicode count as "the rest".
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CACHE_WORDS = 65536


@dataclasses.dataclass(frozen=True)
class BytePairEncoding:
    """A vocabulary of byte strings; a token's position is its id and its rank among the merges.

    Attributes:
        tokens: The byte string of every id. All 256 single bytes are among them, none twice.

    Raises:
        ValueError: A single byte is missing or a token occurs twice; names it.
    """

    tokens: tuple[bytes, ...]

    def __post_init__(self):
        missing = [byte for byte in range(256) if bytes([byte]) not in self.ranks]
        if missing:
            raise ValueError(f"A byte-level vocabulary holds all 256 bytes; bytes {missing[:8]} are missing.")
        if len(self.ranks) < len(self.tokens):
            token, count = collections.Counter(self.tokens).most_common(1)[0]
            raise ValueError(f"Every token of a vocabulary is there once; {token!r} is there {count} times.")

    @functools.cached_property
    def ranks(self) -> dict[bytes, int]:
        """The id of every token."""
        return {token: rank for rank, token in enumerate(self.tokens)}

    @functools.cached_property
    def _words(self) -> dict[bytes, tuple[int, ...]]:
        return {}  # of words already encoded

    def encode_ordinary(self, text: str, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        """The ids of a text. Nothing in it is special: `<|endoftext|>` is spelled out like any other text.

        Args:
            text: Any string; a lone surrogate, which UTF-8 cannot write, becomes U+FFFD.
            dropout: The probability with which each possible merge is left out at each step (BPE dropout, algorithm 1
                of Provilkov et al.): 0 always gives the same ids, 1 gives bytes. Any of them decode to the same text.
            rng: Where the dropout's draws come from.

        Raises:
            ValueError: `dropout` is outside [0, 1], or is positive without `rng`; has the value.
        """
        if not 0 <= dropout <= 1 or (dropout > 0 and rng is None):
            raise ValueError(f"BPE dropout is a probability in [0, 1] and needs an rng above 0; got {dropout}, {rng}.")
        ids = []
        for word in split_words(text):
            if dropout > 0:
                ids += self._encode_with_dropout(word, dropout, rng)
                continue
            if (encoded := self._words.get(word)) is None:
                if len(self._words) >= _CACHE_WORDS:
                    self._words.clear()
                known = self.ranks.get(word)
                encoded = (known,) if known is not None else tuple(self.ranks[part] for part in self._merge(word))
                self._words[word] = encoded
            ids += encoded
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids.

        Raises:
            ValueError: An id is not in the vocabulary; has it.
        """
        size = len(self.tokens)
        pieces = []
        for token in ids:
            if not 0 <= token < size:
                raise ValueError(f"Token ids of this vocabulary are 0 to {size - 1}; got {token}.")
            pieces.append(self.tokens[token])
        return b"".join(pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def merges(self) -> Iterator[tuple[bytes, bytes]]:
        """For every token of two or more bytes, in order of id, the two tokens whose merge makes it.

        Raises:
            ValueError: The tokens before it do not leave it in two parts, so that no merge makes it; has the token.
        """
        for rank, token in enumerate(self.tokens):
            if len(token) < 2:
                continue
            parts = self._merge(token, rank)
            if len(parts) != 2:
                raise ValueError(
                    f"No merge of two earlier tokens makes token {rank}, {token!r}: they spell it {parts}."
                )
            yield parts[0], parts[1]

    def _merge(self, word: bytes, end_rank: int | None = None) -> list[bytes]:
        """Joins neighbours, lowest rank first and of equal ranks the leftmost, with the tokens of rank < `end_rank`.

        A heap of candidates over a linked list, so that a word as long as a page is no problem.
        """
        end_rank = len(self.tokens) if end_rank is None else end_rank
        size = len(word)
        parts = [word[i : i + 1] for i in range(size)]
        after = list(range(1, size + 1))
        before = list(range(-1, size - 1))
        candidates = []
        new_neighbours = list(itertools.pairwise(range(size)))
        while new_neighbours or candidates:
            for i, j in new_neighbours:
                merged = parts[i] + parts[j]
                rank = self.ranks.get(merged, end_rank)
                if rank < end_rank:
                    heapq.heappush(candidates, (rank, i, merged))
            new_neighbours = []
            if not candidates:
                break
            _, i, merged = heapq.heappop(candidates)
            j = after[i]
            if not parts[i] or j == size or parts[i] + parts[j] != merged:
                continue  # one of the two has been merged with another neighbour since
            parts[i], parts[j] = merged, b""
            after[i] = after[j]
            if after[i] < size:
                before[after[i]] = i
                new_neighbours.append((i, after[i]))
            if before[i] >= 0:
                new_neighbours.append((before[i], i))
        return [part for part in parts if part]

    def _encode_with_dropout(self, word: bytes, dropout: float, rng: np.random.Generator) -> list[int]:
        parts = [word[i : i + 1] for i in range(len(word))]
        while True:
            ranks = [self.ranks.get(left + right) for left, right in zip(parts, parts[1:], strict=False)]
            possible = [(rank, i) for i, rank in enumerate(ranks) if rank is not None]
            kept = [merge for merge, draw in zip(possible, rng.random(len(possible)), strict=True) if draw >= dropout]
            if not kept:
                return [self.ranks[part] for part in parts]
            rank, i = min(kept)
            parts[i : i + 2] = [self.tokens[rank]]


def split_words(text: str) -> list[bytes]:
    """The words that merges never cross, as UTF-8; a lone surrogate becomes U+FFFD."""
    try:
        return [word.encode() for word in _word_pattern().findall(text)]
    except UnicodeEncodeError:
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return [word.encode() for word in _word_pattern().findall(valid)]


@functools.cache
def _word_pattern():
    import regex

    return regex.compile(WORD_PATTERN)


def train_byte_pairs(texts: Iterable[str], num_merges: int) -> BytePairEncoding:
    """Learns a vocabulary: the 256 bytes as ids 0 to 255, then the most frequent pair of neighbours, again and again.

    For the small vocabularies of one's own models; every merge walks over all distinct words. Of equally frequent
    pairs the one of lower ids comes first, so that the same texts always give the same vocabulary.

    Raises:
        ValueError: The texts have fewer pairs to merge; has both numbers.
    """
    counts = collections.Counter(word for text in texts for word in split_words(text))
    spellings = {word: list(word) for word in counts}
    tokens = [bytes([byte]) for byte in range(256)]
    for index in range(num_merges):
        pairs = collections.Counter()
        for word, ids in spellings.items():
            for pair in zip(ids, ids[1:], strict=False):
                pairs[pair] += counts[word]
        if not pairs:
            raise ValueError(f"The texts give {index} merges, not {num_merges}; take fewer merges or more text.")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids in spellings.values():
            _replace_pair(ids, best, len(tokens))
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return BytePairEncoding(tuple(tokens))


def _replace_pair(ids: list[int], pair: tuple[int, int], merged: int):
    i = 0
    while i < len(ids) - 1:
        if (ids[i], ids[i + 1]) == pair:
            ids[i : i + 2] = [merged]
        i += 1


def from_tiktoken(path: str | os.PathLike) -> BytePairEncoding:
    """Reads a `.tiktoken` file: per line a token in base64 and its rank.

    Raises:
        ValueError: A line is something else, or the ranks are not 0, 1, 2, ...; names file and line.
    """
    tokens = []
    for number, line in enumerate(pathlib.Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            # Whisper's multilingual file ends in an empty token, which it writes as padding alone.
            token = b"" if text == b"=" else base64.b64decode(text, validate=True)
            rank = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}:{number}: expected a token in base64 and its rank, got {line[:80]!r}.") from error
        if rank != len(tokens):
            raise ValueError(f"{path}:{number}: expected rank {len(tokens)}, got {rank}.")
        tokens.append(token)
    return _named(path, tokens)


def from_vocab_merges(vocab_path: str | os.PathLike, merges_path: str | os.PathLike) -> BytePairEncoding:
    """Reads GPT-2's two files: `vocab.json` (token to id) and `merges.txt` (a pair per line, first learned first).

    Entries of `vocab.json` that follow all bytes and merges are special tokens, which are no part of the encoding.

    Raises:
        ValueError: A file is something else, or ids and merges do not have the same order; names the file.
    """
    vocab = read_json(vocab_path)
    lines = pathlib.Path(merges_path).read_text(encoding="utf-8").split("\n")
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        if len(line.split(" ")) != 2:
            raise ValueError(f"{merges_path}:{number}: expected two tokens with a space between, got {line[:80]!r}.")
        pairs.append(tuple(line.rstrip("\r").split(" ")))
    return _from_vocabulary(vocab_path, vocab, pairs)


def from_tokenizer_json(path: str | os.PathLike) -> BytePairEncoding:
    """Reads the model of a `tokenizer.json` of the tokenizers library, when it is GPT-2's kind of encoding.

    Raises:
        ValueError: It is another kind (names the part of the file and what it says), or ids and merges do not have
            the same order.
    """
    file = read_json(path)
    model = file.get("model") or {}
    words = file.get("pre_tokenizer") or {}
    for part, found, expected in (
        ("model.type", model.get("type", "BPE" if "merges" in model else None), "BPE"),
        ("normalizer", file.get("normalizer"), None),
        ("pre_tokenizer.type", words.get("type"), "ByteLevel"),
        ("pre_tokenizer.use_regex", words.get("use_regex", True), True),
        ("pre_tokenizer.add_prefix_space", words.get("add_prefix_space", True), False),
    ):
        if found != expected:
            raise ValueError(f"{path}: byte-level BPE as GPT-2's has {part} = {expected}, this file {found}.")
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    return _from_vocabulary(path, model["vocab"], pairs)


def to_vocab_merges(encoding: BytePairEncoding) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The content of `vocab.json` and `merges.txt`: the inverse of `from_vocab_merges`."""
    vocab = {_spell(token): rank for rank, token in enumerate(encoding.tokens)}
    return vocab, [(_spell(left), _spell(right)) for left, right in encoding.merges()]


def read_json(path: str | os.PathLike) -> dict:
    """A JSON object.

    Raises:
        ValueError: The file is something else; names it.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


def _from_vocabulary(
    path: str | os.PathLike, vocab: Mapping[str, int], pairs: Sequence[tuple[str, ...]]
) -> BytePairEncoding:
    """Ids must rise with the merges, because the encoding takes a token's id for its rank."""
    tokens = {vocab[text]: bytes([byte]) for byte, text in enumerate(_BYTE_LETTERS) if text in vocab}
    if "" in vocab:
        tokens[vocab[""]] = b""
    highest = -1
    for left, right in pairs:
        merged = left + right
        if merged not in vocab or vocab[merged] < highest:
            raise ValueError(
                f"{path}: the merge of {left!r} and {right!r} should make a token of id {highest} or above, as merges "
                f"are in order of id; the id of {merged!r} is {vocab.get(merged)}."
            )
        highest = vocab[merged]
        tokens[highest] = _unspell(path, merged)
    for rank in range(len(tokens)):
        if rank not in tokens:
            text = next((text for text, token in vocab.items() if token == rank), None)
            raise ValueError(f"{path}: ids 0 to {len(tokens) - 1} should be bytes and merges; {rank} is {text!r}.")
    return _named(path, [tokens[rank] for rank in range(len(tokens))])


def _named(path: str | os.PathLike, tokens: Sequence[bytes]) -> BytePairEncoding:
    try:
        return BytePairEncoding(tuple(tokens))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _byte_letters() -> tuple[str, ...]:
    """The letter that stands for each byte in `vocab.json`: itself if it is visible in Latin-1, else U+0100 onwards."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in visible else next(others)) for byte in range(256))


_BYTE_LETTERS = _byte_letters()
_LETTER_BYTES = {letter: byte for byte, letter in enumerate(_BYTE_LETTERS)}


def _spell(token: bytes) -> str:
    return "".join(_BYTE_LETTERS[byte] for byte in token)


def _unspell(path: str | os.PathLike, text: str) -> bytes:
    try:
        return bytes(_LETTER_BYTES[letter] for letter in text)
    except KeyError as error:
        raise ValueError(f"{path}: token {text!r} has {error}, which stands for no byte.") from error
