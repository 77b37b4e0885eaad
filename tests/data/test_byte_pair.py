"""Peers: openai-whisper's own encodings (tiktoken) and the tokenizers library; a slow trainer; exact probabilities."""

import collections
import json
import pathlib
import pickle
import random

import numpy as np
import pytest
import tokenizers
import whisper
from whisper.tokenizer import get_encoding

from jaxaudio.data import byte_pair
from jaxaudio.data.byte_pair import BytePairEncoding, train_byte_pairs
from tests.data.sentences import SENTENCES

ASSETS = pathlib.Path(whisper.__file__).parent / "assets"
BYTES = tuple(bytes([byte]) for byte in range(256))
ODD_TEXTS = (
    "",
    " ",
    "   three spaces   and\ttabs\t\t\nlines\r\n\r\n  end  ",
    "".join(map(chr, range(0x80))),
    "a\x1cb\x1d \x1e c\x1f\x85d\u00a0e\u1680f\u2000 \u2003g\u2028h\u2029 i\u202fj\u205fk\u3000 l\u200bm\ufeff n\u180e",
    "👩‍👩‍👧‍👦 🇩🇪 ❤️‍🔥 👍🏽 ♪♫ 1️⃣",
    "0 12 345 6789 10,000.50 3½ Ⅻ ² ٣ 一二三 $5 50%",
    "don't DON'T they'll they're I'm he'd 's's 'tis ''' \u2019s it\u2019s",
    "e\u0301 o\u0308\u0323 Å Å ﬁ Ω\u0345 a\u0300\u0301\u0302\u0303",
    "\ufffd replacement, half of a pair \ud83d and \ude00, a whole pair in halves \ud83d\ude00",
    "x" * 3000 + " " * 500 + "é" * 1000,
)


@pytest.fixture(scope="module", params=["gpt2", "multilingual"])
def vocabulary(request):
    return byte_pair.from_tiktoken(ASSETS / f"{request.param}.tiktoken"), get_encoding(request.param)


@pytest.mark.parametrize("language", SENTENCES)
def test_equals_tiktoken_in_every_language(vocabulary, language):
    ours, theirs = vocabulary
    text = SENTENCES[language]
    ids = theirs.encode(text)
    assert ours.encode_ordinary(text) == ids
    assert ours.decode(ids) == text
    # Ids cut anywhere may end within a character.
    for cut in range(len(ids)):
        assert ours.decode(ids[:cut]) == theirs.decode(ids[:cut])
        assert ours.decode(ids[cut:]) == theirs.decode(ids[cut:])


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_equals_tiktoken_on_odd_texts(vocabulary, text):
    ours, theirs = vocabulary
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


def test_equals_tiktoken_on_random_texts_and_ids(vocabulary):
    ours, theirs = vocabulary
    rng = random.Random(0)
    pieces = [
        *"aeTns '\t\n19é日ไ",
        "the",
        "ing",
        " a",
        "'s",
        "'LL",
        "  ",
        "한국",
        "😀",
        "אב",
        " قا",
        "\u0301",
        "\u2003",
        "ß",
    ]
    for _ in range(300):
        text = "".join(rng.choice(pieces) for _ in range(40))
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text), text
    letters = "".join(rng.choice("etaoinshrdlu") for _ in range(3000))  # one word
    assert ours.encode_ordinary(letters) == theirs.encode_ordinary(letters)
    for _ in range(100):
        ids = [rng.randrange(len(ours.tokens)) for _ in range(20)]
        assert ours.decode(ids) == theirs.decode(ids)


def test_special_tokens_are_ordinary_text(vocabulary):
    ours, theirs = vocabulary
    text = "<|endoftext|> and <|en|>"
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode_ordinary(text)) == text


def _tokenizers_peer(vocab, merges):
    peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return peer


def test_its_merges_make_the_tokenizers_library_agree(vocabulary, tmp_path):
    ours, theirs = vocabulary
    peer = _tokenizers_peer(*byte_pair.to_vocab_merges(ours))
    for text in [*SENTENCES.values(), *(text for text in ODD_TEXTS if "\ud83d" not in text)]:
        assert peer.encode(text).ids == theirs.encode_ordinary(text)
    peer.save(str(tmp_path / "tokenizer.json"))
    assert byte_pair.from_tokenizer_json(tmp_path / "tokenizer.json") == ours


def test_reads_every_form(vocabulary, tmp_path):
    ours = BytePairEncoding(vocabulary[0].tokens[:2000])  # the first merges alone are an encoding too
    vocab, merges = byte_pair.to_vocab_merges(ours)
    assert len(merges) == 2000 - 256
    peer = _tokenizers_peer(vocab, merges)
    for text in SENTENCES.values():
        assert peer.encode(text).ids == ours.encode_ordinary(text)

    peer.save(str(tmp_path / "tokenizer.json"))
    assert byte_pair.from_tokenizer_json(tmp_path / "tokenizer.json") == ours
    old = json.loads((tmp_path / "tokenizer.json").read_text())
    old["model"]["merges"] = [" ".join(merge) for merge in old["model"]["merges"]]
    old["pre_tokenizer"].pop("use_regex")  # old files have merges as strings and leave the regular expression out
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert byte_pair.from_tokenizer_json(tmp_path / "old.json") == ours

    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": 2000}))
    lines = "\n".join(f"{left} {right}" for left, right in merges)
    for text in (f"#version: 0.2\n{lines}\n", lines):
        (tmp_path / "merges.txt").write_text(text, encoding="utf-8")
        assert byte_pair.from_vocab_merges(tmp_path / "vocab.json", tmp_path / "merges.txt") == ours


def test_merges_of_a_small_vocabulary():
    encoding = BytePairEncoding((*BYTES, b"ab", b"", b"cd", b"abcd"))
    assert list(encoding.merges()) == [(b"a", b"b"), (b"c", b"d"), (b"ab", b"cd")]
    with pytest.raises(ValueError, match=r"token 257, b'abcd'.*b'ab', b'c', b'd'"):
        list(BytePairEncoding((*BYTES, b"ab", b"abcd")).merges())


def test_dropout_has_the_probabilities_of_the_algorithm():
    """Of "abcd" with merges ab, bc, cd the first step keeps each with 1 - p; the lowest rank left is merged."""
    encoding = BytePairEncoding((*BYTES, b"ab", b"bc", b"cd", b"abcd"))
    p = 0.3
    expected = {
        ("a", "b", "c", "d"): p**3,
        ("a", "bc", "d"): p * (1 - p),
        ("ab", "c", "d"): (1 - p) * p,  # cd is dropped in the second step
        ("ab", "cd"): (1 - p) ** 2 * p + p**2 * (1 - p) * (1 - p) * p,  # by ab then cd, or cd then ab; not abcd
        ("abcd",): (1 - p) ** 3 + p**2 * (1 - p) ** 3,
        ("a", "b", "cd"): p**2 * (1 - p) * p,
    }
    assert sum(expected.values()) == pytest.approx(1)
    rng = np.random.default_rng(0)
    draws = 4000
    seen = collections.Counter(
        tuple(encoding.tokens[token].decode() for token in encoding.encode_ordinary("abcd", p, rng))
        for _ in range(draws)
    )
    assert set(seen) == set(expected)
    for outcome, probability in expected.items():
        deviation = (draws * probability * (1 - probability)) ** 0.5
        assert abs(seen[outcome] - draws * probability) < 4 * deviation, outcome


def test_dropout_keeps_the_text(vocabulary):
    ours, _ = vocabulary
    rng = np.random.default_rng(0)
    num_ids = num_dropped = 0
    for text in SENTENCES.values():
        ids = ours.encode_ordinary(text)
        dropped = ours.encode_ordinary(text, 0.3, rng)
        assert ours.decode(dropped) == text
        num_ids, num_dropped = num_ids + len(ids), num_dropped + len(dropped)
        assert ours.encode_ordinary(text, 0.0, rng) == ids
    assert num_dropped > num_ids
    text = "Hello, Köln"
    assert [ours.tokens[token] for token in ours.encode_ordinary(text, 1.0, rng)] == [
        bytes([byte]) for byte in text.encode()
    ]
    again = [ours.encode_ordinary(text, 0.5, np.random.default_rng(7)) for _ in range(2)]
    assert again[0] == again[1]


def _slow_trainer(texts, num_merges):
    """Counts pairs anew over the whole text, word by word, with strings of bytes instead of ids."""
    words = [[bytes([byte]) for byte in word] for text in texts for word in byte_pair.split_words(text)]
    order = list(BYTES)
    for _ in range(num_merges):
        pairs = [(left, right) for word in words for left, right in zip(word, word[1:], strict=False)]
        best = sorted(set(pairs), key=lambda pair: (-pairs.count(pair), *map(order.index, pair)))[0]
        order.append(best[0] + best[1])
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [order[-1]]
                i += 1
    return order, words


def test_trainer_equals_a_slow_one():
    texts = [
        " zero one two three",
        " three seven nine nine one",
        " öne zwei drei",
        "aaaaaaa aaa",
        " six sixteen sixty",
    ] * 2
    ours = train_byte_pairs(texts, 40)
    order, words = _slow_trainer(texts, 40)
    assert list(ours.tokens) == order
    flat = [token for word in words for token in word]
    assert [ours.tokens[token] for text in texts for token in ours.encode_ordinary(text)] == flat
    assert len(list(ours.merges())) == 40


def test_trainer_reports_how_many_merges_there_are():
    with pytest.raises(ValueError, match=r"give 2 merges, not 3"):
        train_byte_pairs(["abc"], 3)


def test_is_a_value():
    encoding = train_byte_pairs(["one two"], 2)
    encoding.encode_ordinary("one")
    assert pickle.loads(pickle.dumps(encoding)) == encoding
    assert pickle.loads(pickle.dumps(encoding)).encode_ordinary("one") == encoding.encode_ordinary("one")


def test_vocabulary_errors():
    with pytest.raises(ValueError, match=r"bytes \[97\] are missing"):
        BytePairEncoding(tuple(token for token in BYTES if token != b"a"))
    with pytest.raises(ValueError, match=r"b'ab' is there 2 times"):
        BytePairEncoding((*BYTES, b"ab", b"ab"))


def test_argument_errors():
    encoding = BytePairEncoding(BYTES)
    for dropout, rng in ((1.5, np.random.default_rng(0)), (-0.1, np.random.default_rng(0)), (0.1, None)):
        with pytest.raises(ValueError, match=rf"got {dropout}"):
            encoding.encode_ordinary("a", dropout, rng)
    for token in (256, -1):
        with pytest.raises(ValueError, match=rf"0 to 255; got {token}"):
            encoding.decode([1, token])


@pytest.mark.parametrize(
    ("line", "message"),
    [("YQ== 0 1", "2: expected a token"), ("!!!! 1", "2: expected a token"), ("YQ== 7", "2: expected rank 1, got 7")],
)
def test_tiktoken_errors(tmp_path, line, message):
    path = tmp_path / "broken.tiktoken"
    path.write_text(f"IQ== 0\n{line}\n")
    with pytest.raises(ValueError, match=rf"broken\.tiktoken:{message}"):
        byte_pair.from_tiktoken(path)


def test_a_truncated_tiktoken_file_is_an_error(tmp_path):
    path = tmp_path / "short.tiktoken"
    path.write_bytes(b"\n".join((ASSETS / "gpt2.tiktoken").read_bytes().splitlines()[:100]))
    with pytest.raises(ValueError, match=r"short\.tiktoken: .*bytes \[0, 1, 2"):
        byte_pair.from_tiktoken(path)


@pytest.fixture
def small(tmp_path):
    """A vocabulary file of the bytes, ab and abc."""
    vocab, merges = byte_pair.to_vocab_merges(BytePairEncoding((*BYTES, b"ab", b"abc")))
    assert merges == [("a", "b"), ("ab", "c")]

    def write(vocab=vocab, merges=("a b", "ab c")):
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("\n".join(merges))
        return byte_pair.from_vocab_merges(tmp_path / "vocab.json", tmp_path / "merges.txt")

    write.vocab = vocab
    return write


def test_vocab_merges_errors(small, tmp_path):
    assert small().tokens[256:] == (b"ab", b"abc")
    with pytest.raises(ValueError, match=r"merges\.txt:2: expected two tokens.*'ab c d'"):
        small(merges=("a b", "ab c d"))
    with pytest.raises(ValueError, match=r"vocab\.json: the merge of 'a' and 'b'.*257 or above.*'ab' is 256"):
        small(merges=("ab c", "a b"))
    with pytest.raises(ValueError, match=r"'x' and 'y'.*'xy' is None"):
        small(merges=("a b", "ab c", "x y"))
    with pytest.raises(ValueError, match=r"ids 0 to 257 should be bytes and merges; 256 is '<pad>'"):
        small(vocab=small.vocab | {"<pad>": 256, "ab": 257, "abc": 258})
    with pytest.raises(ValueError, match=r"token 'a\\u3042' has '\\u3042'|token 'aあ' has 'あ'"):
        small(vocab=small.vocab | {"aあ": 258}, merges=("a b", "ab c", "a あ"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json: expected a JSON object, got list"):
        byte_pair.from_tokenizer_json(tmp_path / "list.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ValueError, match=r"text\.json: expected JSON"):
        byte_pair.from_tokenizer_json(tmp_path / "text.json")


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("model", {"type": "Unigram"}, "model.type = BPE, this file Unigram"),
        ("normalizer", {"type": "NFC"}, "normalizer = None, this file {'type': 'NFC'}"),
        ("pre_tokenizer", {"type": "Sequence"}, "pre_tokenizer.type = ByteLevel, this file Sequence"),
        ("pre_tokenizer", {"type": "ByteLevel", "use_regex": False}, "use_regex = True, this file False"),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "add_prefix_space = False, this file True"),
    ],
)
def test_other_kinds_of_tokenizer_are_errors(tmp_path, part, content, message):
    file = {
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(file | {part: content}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*" + message.replace(".", r"\.")):
        byte_pair.from_tokenizer_json(tmp_path / "tokenizer.json")
