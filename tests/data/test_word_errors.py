"""Peers: jiwer, a recursion over all alignments, openai-whisper's normalisers."""

import functools
import math
import random

import jiwer
import pytest
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

from jaxaudio.data.word_errors import ErrorCounts, character_errors, normaliser, word_errors
from tests.data.sentences import SENTENCES


def _random_texts(seed, count, letters="abcdef", longest=12):
    rng = random.Random(seed)
    return [" ".join(rng.choice(letters) for _ in range(rng.randrange(1, longest))) for _ in range(count)]


def _slow_counts(reference, hypothesis):
    """(substitutions, deletions, insertions) with fewest errors, then fewest substitutions, over all alignments."""

    @functools.cache
    def best(i, j):
        if i == j == 0:
            return 0, 0, 0, 0
        options = []
        if i and j:
            errors, s, d, n = best(i - 1, j - 1)
            differs = reference[i - 1] != hypothesis[j - 1]
            options.append((errors + differs, s + differs, d, n))
        if i:
            errors, s, d, n = best(i - 1, j)
            options.append((errors + 1, s, d + 1, n))
        if j:
            errors, s, d, n = best(i, j - 1)
            options.append((errors + 1, s, d, n + 1))
        return min(options)

    return best(len(reference), len(hypothesis))[1:]


def test_rates_equal_jiwer():
    references, hypotheses = _random_texts(0, 200), _random_texts(1, 200)
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        assert word_errors([reference], [hypothesis]).rate == jiwer.wer(reference, hypothesis)
        assert character_errors([reference], [hypothesis]).rate == jiwer.cer(reference, hypothesis)
    counts = word_errors(references, hypotheses)
    assert counts.rate == jiwer.wer(references, hypotheses)
    assert counts.num_reference == sum(len(reference.split()) for reference in references)
    assert character_errors(references, hypotheses).rate == jiwer.cer(references, hypotheses)
    texts = list(SENTENCES.values())
    assert word_errors(texts, texts[1:] + texts[:1]).rate == jiwer.wer(texts, texts[1:] + texts[:1])
    assert character_errors(texts, texts[1:] + texts[:1]).rate == jiwer.cer(texts, texts[1:] + texts[:1])


def test_counts_equal_a_search_over_all_alignments():
    for reference, hypothesis in zip(_random_texts(2, 150, "abc"), _random_texts(3, 150, "abc"), strict=True):
        counts = word_errors([reference], [hypothesis])
        expected = _slow_counts(tuple(reference.split()), tuple(hypothesis.split()))
        assert (counts.substitutions, counts.deletions, counts.insertions) == expected


def test_counts_by_hand():
    assert word_errors(["a b c d"], ["a x c"]) == ErrorCounts(1, 1, 0, 4)
    assert word_errors(["a b"], ["b c"]) == ErrorCounts(0, 1, 1, 2)  # not two substitutions, which are as many errors
    assert character_errors(["  one "], ["on e"]) == ErrorCounts(0, 0, 1, 3)
    total = word_errors(["a b c d", "a b"], ["a x c", "b c"])
    assert total == ErrorCounts(1, 1, 0, 4) + ErrorCounts(0, 1, 1, 2) == ErrorCounts(1, 2, 1, 6)
    assert (total.errors, total.rate) == (4, 4 / 6)


def test_empty_references_only_add_insertions():
    assert word_errors(["", "a b"], ["x", "a b"]) == ErrorCounts(0, 0, 1, 2)
    assert word_errors([], []).rate == word_errors([" "], [""]).rate == 0.0
    assert word_errors([""], ["x y"]).rate == math.inf
    assert word_errors(["a b"], [""]) == ErrorCounts(0, 2, 0, 2)


def test_argument_errors():
    with pytest.raises(ValueError, match=r"got 2 and 1"):
        word_errors(["a", "b"], ["a"])
    with pytest.raises(ValueError, match=r"lists of texts; got 'a b'"):
        character_errors("a b", ["a b"])
    with pytest.raises(ValueError, match=r"no language 'klingon'"):
        normaliser("klingon")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Smith paid $20 million, i.e. twenty percent!", "mister smith paid $20000000 i e 20%"),
        ("one oh one", "101"),
        ("two thousand and ten", "2010"),
        ("the 1990s and twenty-first", "the 1990s and 21st"),
        ("She's got £3 and 5 cents", "she has got £3.05"),
        ("double oh seven", "007"),
        ("O'Neil's", "0 neil is"),
        ("Cause I kinda dunno, sorta", "cause i kinda dunno sorta"),
    ],
)
def test_english_by_hand(text, expected):
    assert normaliser("en")(text).strip() == expected
    assert normaliser("English")(text) == EnglishTextNormalizer()(text)


PIECES = """
one two three seven twelve twenty forty-two hundred thousand million point oh zero o double triple and a half
first second twenty-third 3rd 1990s 1,234.50 007 3.14 .5 5. 10:30 $ $20 £3 €1.50 ¢5 50% percent per cent dollars
dollar pounds cents cent euros minus plus negative 100 k Mr. Mrs. Dr. St. Prof. Capt. Gov. Jr. Esq. Lt. mr mrs st
won't can't let's ain't y'all wanna gotta gonna kinda sorta dunno cause 'cause because i'ma imma woulda coulda
shoulda ma'am she's she'd he'd been it's gone we'd done they've got he's got I'm you're don't didn't O'Neil's 't 's
colour realise organisation centre travelling theatre grey favourite analyse mum programme aluminium licence
hmm mm mhm uh um uhm [laughs] <noise> (coughs) (a [b) -- ... ! ? , ; : " ' - _ * & @ # ~ ☂ ♪ naïve café Łódź
straße œuvre þorn Æther İstanbul ﬁ ½ ² x2
"""


def test_english_equals_the_peer_on_random_texts():
    ours, theirs = normaliser("en"), EnglishTextNormalizer()
    pieces = [*PIECES.split(), "\t", "\n", "\u00a0"]
    rng = random.Random(0)
    for _ in range(400):
        text = "".join(rng.choice(pieces) + rng.choice([" ", " ", " ", "", "-"]) for _ in range(rng.randrange(1, 12)))
        text = rng.choice([str.lower, str.upper, str.title, str])(text)
        assert ours(text) == theirs(text), text


@pytest.mark.parametrize("language", [code for code in SENTENCES if code != "en"])
def test_basic_equals_the_peer(language):
    split_letters = language in ("zh", "ja", "th", "lo", "my", "yue")
    ours, theirs = normaliser(language), BasicTextNormalizer(split_letters=split_letters)
    for text in (SENTENCES[language], " [Applaus] <x> (la la) Ä, É! ﬁ ½ -- 5 % ♪ e\u0301\u0323 \t\n👩‍👧 "):
        assert ours(text) == theirs(text)


def test_words_of_chinese_are_characters():
    zh = normaliser("zh")
    assert word_errors([zh("今天天气好。")], [zh("今天，气很好")]) == ErrorCounts(0, 1, 1, 5)
