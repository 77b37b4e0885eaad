"""Peers: openai-whisper's tokenizer, transformers' classes; ids by hand from the published table."""

import base64
import json
import pathlib
import pickle
import random

import numpy as np
import pytest
import transformers
import whisper
from whisper.tokenizer import LANGUAGES, get_tokenizer

from jaxaudio.data import byte_pair
from jaxaudio.data.byte_pair import train_byte_pairs
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer

ASSETS = pathlib.Path(whisper.__file__).parent / "assets"
SIZES = {51864: ("gpt2", False, 99), 51865: ("multilingual", True, 99), 51866: ("multilingual", True, 100)}
TEXTS = (
    " And so my fellow Americans, it's 1961: ask not... (applause)",
    "Straße, größer; ¿dónde? Съешь ещё! Ελλάδα - İstanbul'da",
    "今天天气很好。東京は晴れです、ね？ 오늘 아침에",
    "สวัสดีครับ วันนี้ မင်္ဂလာပါ ສະບາຍດີ",
    '  two  spaces\n\nand lines \t👩‍👩‍👧 ♪♪♪ -- "quoted" don\'t',
)


@pytest.fixture(scope="module", params=SIZES)
def published(request):
    """Our tokenizer, the peer's keyword arguments, and the peer."""
    name, multilingual, num_languages = SIZES[request.param]
    ours = WhisperTokenizer.from_file(ASSETS / f"{name}.tiktoken", request.param)
    arguments = {"multilingual": multilingual, "num_languages": num_languages}
    return ours, arguments, get_tokenizer(**arguments)


@pytest.fixture(scope="module")
def english():
    return WhisperTokenizer.from_file(ASSETS / "gpt2.tiktoken", 51864)


@pytest.fixture(scope="module")
def large_v3():
    return WhisperTokenizer.from_file(ASSETS / "multilingual.tiktoken", 51866)


@pytest.fixture(scope="module")
def digits():
    """A vocabulary of one's own: 1 s windows, one language."""
    bpe = train_byte_pairs([" one two three four five", " six seven eight nine zero"], 20)
    return WhisperTokenizer.for_ranks(bpe, languages=("en",), num_timestamps=51)


@pytest.mark.parametrize(
    ("vocab_size", "ids"),
    [
        (51864, (50256, 50257, 50258, 50357, 50358, 50359, 50360, 50361, 50362, 50363)),
        (51865, (50257, 50258, 50259, 50358, 50359, 50360, 50361, 50362, 50363, 50364)),
        (51866, (50257, 50258, 50259, 50359, 50360, 50361, 50362, 50363, 50364, 50365)),
    ],
)
def test_ids_of_the_published_vocabularies(vocab_size, ids):
    t = WhisperTokenizer.from_file(ASSETS / f"{SIZES[vocab_size][0]}.tiktoken", vocab_size)
    assert t.vocab_size == vocab_size
    assert (t.eot, t.sot, t.language_ids["en"], t.translate, t.transcribe, t.sot_lm) == ids[:6]
    assert (t.sot_prev, t.no_speech, t.no_timestamps, t.timestamp_begin) == ids[6:]
    assert t.blank_tokens == (220,)
    assert len(t.non_speech_tokens) == (82 if t.is_multilingual else 84)
    hello = [2425, 11, 1002, 0] if t.is_multilingual else [18435, 11, 995, 0]
    assert t.encode(" Hello, world!") == hello


def test_every_special_id_equals_the_peer(published):
    ours, arguments, theirs = published
    assert ours.special_tokens == theirs.special_tokens
    assert ours.vocab_size == theirs.encoding.n_vocab
    assert ours.is_multilingual == arguments["multilingual"]
    for name in ("eot", "sot", "translate", "transcribe", "sot_lm", "sot_prev", "no_speech", "no_timestamps"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.timestamp_begin == theirs.timestamp_begin
    assert ours.non_speech_tokens == theirs.non_speech_tokens
    assert list(ours.blank_tokens) == theirs.encode(" ")
    assert ours.languages == tuple(LANGUAGES)[: arguments["num_languages"]]
    assert ours.language_ids == {code: theirs.to_language_token(code) for code in ours.languages}


def test_every_prompt_equals_the_peer(published):
    ours, arguments, theirs = published
    assert ours.sot_sequence() == ours.sot_sequence(None, None) == theirs.sot_sequence
    languages, tasks = (ours.languages, ("transcribe", "translate")) if ours.is_multilingual else (("en",), (None,))
    for language in languages:
        for task in tasks:
            peer = get_tokenizer(**arguments, language=language, task=task)
            assert ours.sot_sequence(language, task) == peer.sot_sequence


def test_text_equals_the_peer(published):
    ours, _, theirs = published
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == text
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(ours.vocab_size if rng.random() < 0.3 else ours.eot) for _ in range(15)]
        ids += [ours.timestamp_begin, ours.vocab_size - 1, ours.eot]
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode_with_timestamps(ids) == theirs.decode_with_timestamps(ids)


def test_words_equal_the_peer(published):
    ours, arguments, theirs = published
    peers = {None: theirs}
    if ours.is_multilingual:
        languages = [code for code in ("en", "de", "zh", "ja", "th", "lo", "my", "yue") if code in ours.languages]
        peers = {language: get_tokenizer(**arguments, language=language) for language in languages}
    for language, peer in peers.items():
        for text in TEXTS:
            ids = [*ours.encode(text), ours.timestamp_begin + 7, ours.eot]
            assert ours.split_to_word_tokens(ids, language) == peer.split_to_word_tokens(ids)
    # Random ids hold halves of characters. There the peer may raise or lose ids; where it does not, words are equal.
    rng = random.Random(1)
    halves = [token for token, piece in enumerate(ours.bpe.tokens) if "\ufffd" in piece.decode(errors="replace")]
    num_compared = 0
    for trial in range(500):
        language = rng.choice(list(peers))
        ids = [rng.choice(halves) if rng.random() < 0.02 * (trial % 10) else rng.randrange(ours.eot) for _ in range(12)]
        ids.append(ours.eot)
        words, word_ids = ours.split_to_word_tokens(ids, language)
        assert sum(word_ids, []) == ids
        try:
            peer_words, peer_ids = peers[language].split_to_word_tokens(ids)
        except IndexError:
            continue
        if sum(peer_ids, []) == ids:
            num_compared += 1
            assert (words, word_ids) == (peer_words, peer_ids)
    assert num_compared > 450


def test_malformed_bytes_lose_no_ids(digits):
    """E2 82 is the beginning of a euro sign, which "a" does not complete."""
    ids = [0xE2, 0x82, ord("a"), *"é".encode(), ord("b")]
    assert digits.split_to_word_tokens(ids, "ja") == (
        ["\ufffd", "\ufffd", "a", "é", "b"],
        [[0xE2], [0x82], [ord("a")], list("é".encode()), [ord("b")]],
    )
    assert digits.split_to_word_tokens([]) == ([], [])


def test_special_tokens_in_text_are_errors(published):
    ours, _, theirs = published
    for text in ("hello <|endoftext|>", "<|<|0.02|>", "x<|en|>", "<|notimestamps|>"):
        with pytest.raises(ValueError, match="disallowed special token"):
            theirs.encode(text)
        with pytest.raises(ValueError, match=r"special token <\|.*\|> at character \d"):
            ours.encode(text)
    for text in ("<|nothing|>", "<| en |>", "<|en|", "<|30.02|>"):
        assert ours.encode(text) == theirs.encode(text)


def test_dropout_reaches_the_encoding(large_v3):
    text = " And so my fellow Americans"
    assert large_v3.encode(text) == [400, 370, 452, 7177, 6280]
    rng = np.random.default_rng(0)
    dropped = [large_v3.encode(text, 0.5, rng) for _ in range(5)]
    assert all(large_v3.decode(ids) == text for ids in dropped)
    assert len(set(map(tuple, dropped))) > 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory, large_v3):
    folder = tmp_path_factory.mktemp("large_v3")
    large_v3.save(folder)
    return folder


def test_saved_files_read_back(saved, large_v3):
    assert sorted(path.name for path in saved.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert WhisperTokenizer.from_folder(saved, 51866) == large_v3
    assert WhisperTokenizer.from_folder(saved) == large_v3
    assert WhisperTokenizer.from_file(saved / "tokenizer.json", 51866) == large_v3


def test_transformers_reads_the_saved_files(saved, large_v3, tmp_path):
    peers = [
        transformers.AutoTokenizer.from_pretrained(saved),
        transformers.PreTrainedTokenizerFast.from_pretrained(saved),
    ]
    assert isinstance(peers[0], transformers.WhisperTokenizer)
    for peer in peers:
        assert len(peer) == large_v3.vocab_size
        assert {name: peer.convert_tokens_to_ids(name) for name in large_v3.special_tokens} == large_v3.special_tokens
        for text in TEXTS:
            ids = large_v3.encode(text)
            assert peer.encode(text, add_special_tokens=False) == ids
            assert peer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert peers[0].decode([*large_v3.sot_sequence("de"), 2425, large_v3.eot], skip_special_tokens=True) == " Hello"
    peers[0].set_prefix_tokens(language="german", task="translate")
    assert peers[0].encode("") == [*large_v3.sot_sequence("de", "translate"), large_v3.no_timestamps, large_v3.eot]
    # What transformers writes itself is a third form that checkpoints come in.
    peers[0].save_pretrained(tmp_path)
    assert WhisperTokenizer.from_folder(tmp_path, 51866) == large_v3


def test_a_vocabulary_of_ones_own(digits, tmp_path):
    assert digits.is_multilingual
    assert digits.eot == 256 + 20
    assert digits.sot_sequence("en") == (277, 278, 280)
    assert digits.vocab_size == 277 + 8 + 51
    assert digits.decode_with_timestamps([digits.vocab_size - 1]) == "<|1.00|>"
    assert digits.decode(digits.encode(" one seven nine")) == " one seven nine"
    # A space is no non-speech token, though " (" and the notes begin with one in a vocabulary this small.
    assert ord(" ") in digits.blank_tokens
    assert digits.non_speech_tokens == tuple(sorted(map(ord, '"#()*+/:;<=>@[\\]^_`{|}~')))
    digits.save(tmp_path)
    assert WhisperTokenizer.from_folder(tmp_path, digits.vocab_size) == digits
    assert WhisperTokenizer.from_file(tmp_path / "tokenizer.json") == digits
    assert pickle.loads(pickle.dumps(digits)) == digits

    alone = WhisperTokenizer.for_ranks(digits.bpe, num_timestamps=3)
    assert not alone.is_multilingual
    assert alone.sot_sequence() == (alone.sot,)
    unused = WhisperTokenizer(digits.bpe, ("de",), 3, is_multilingual=False)
    for tokenizer in (alone, unused):
        tokenizer.save(tmp_path / "other")
        assert WhisperTokenizer.from_folder(tmp_path / "other") == tokenizer


def _write_vocab_merges(folder, tokenizer, **added_files):
    vocab, merges = byte_pair.to_vocab_merges(tokenizer.bpe)
    (folder / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": tokenizer.eot}))
    (folder / "merges.txt").write_text("\n".join(map(" ".join, merges)), encoding="utf-8")
    for name, content in added_files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_reads_the_published_english_folder(english, tmp_path):
    """vocab.json and merges.txt of 2022: added tokens without times, the old name of <|nospeech|>."""
    old = {name: token for name, token in english.special_tokens.items() if token < english.timestamp_begin}
    old["<|nocaptions|>"] = old.pop("<|nospeech|>")
    _write_vocab_merges(tmp_path, english, added_tokens=old)
    assert WhisperTokenizer.from_folder(tmp_path, 51864) == english
    assert WhisperTokenizer.from_folder(tmp_path) == english
    assert transformers.WhisperTokenizer.from_pretrained(tmp_path).encode(
        TEXTS[0], add_special_tokens=False
    ) == english.encode(TEXTS[0])


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"added_tokens": {}},
        {"tokenizer_config": {"added_tokens_decoder": {"277": {"content": "<|startoftranscript|>"}}}},
        {"generation_config": {"is_multilingual": True, "lang_to_id": {"<|en|>": 278}}},
    ],
    ids=["none", "empty", "tokenizer_config", "generation_config"],
)
def test_files_without_the_layout_have_it_computed(digits, tmp_path, files):
    expected = WhisperTokenizer.for_ranks(digits.bpe, tuple(LANGUAGES)[:99], 1501)
    _write_vocab_merges(tmp_path, digits, **files)
    assert WhisperTokenizer.from_folder(tmp_path) == expected
    assert WhisperTokenizer.from_folder(tmp_path, expected.vocab_size + 1).languages == tuple(LANGUAGES)


def test_reads_a_folder_with_a_tiktoken_file(digits, tmp_path):
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(digits.bpe.tokens)]
    (tmp_path / "digits.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "generation_config.json").write_text('{"is_multilingual": false}')
    expected = WhisperTokenizer(digits.bpe, tuple(LANGUAGES)[:99], 1501, is_multilingual=False)
    assert WhisperTokenizer.from_folder(tmp_path) == expected
    (tmp_path / "other.tiktoken").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"one \.tiktoken file; its files are \['digits.tiktoken'"):
        WhisperTokenizer.from_folder(tmp_path)


def test_folders_without_a_tokenizer_are_errors(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"should hold tokenizer\.json.*\['vocab\.json'\]"):
        WhisperTokenizer.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing should hold.*no folder"):
        WhisperTokenizer.from_folder(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"model\.bin: expected a tokenizer\.json or a \.tiktoken"):
        WhisperTokenizer.from_file(tmp_path / "model.bin")


def test_wrong_sizes_are_errors(digits, tmp_path):
    with pytest.raises(ValueError, match=r"gpt2\.tiktoken: 50256 byte pairs, .* do not make .* of 51966 tokens"):
        WhisperTokenizer.from_file(ASSETS / "gpt2.tiktoken", 51966)
    digits.save(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokenizer has 336 tokens, expected the model's 51865"):
        WhisperTokenizer.from_folder(tmp_path, 51865)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"<|startofprev|>": 300}, r"1 languages.*<\|startofprev\|> at id 282, this file at 300"),
        ({"<|extra|>": 336}, r"1 languages.*<\|extra\|> at no id, this file at 336"),
        ({"<|1.00|>": 340}, r"1 languages.*<\|1\.00\|> at id 335, this file at 340"),
    ],
)
def test_other_layouts_are_errors(digits, tmp_path, added, message):
    digits.save(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ValueError, match=r"tokenizer\.json: after 276 byte pairs and " + message):
        WhisperTokenizer.from_folder(tmp_path)


def test_prompt_errors(english, large_v3, digits):
    with pytest.raises(ValueError, match="transcribe and translate; got 'summarise'"):
        large_v3.sot_sequence("en", "summarise")
    with pytest.raises(ValueError, match=r"no language 'germn'. Did you mean german"):
        large_v3.sot_sequence("germn")
    with pytest.raises(ValueError, match=r"got 'german', whose code is de"):
        large_v3.sot_sequence("german")
    with pytest.raises(ValueError, match=r"tokens for the codes en; got 'de'"):
        digits.sot_sequence("de")
    with pytest.raises(ValueError, match=r"can only transcribe en; got translate en"):
        english.sot_sequence("en", "translate")
    with pytest.raises(ValueError, match=r"can only transcribe en; got transcribe fr"):
        english.sot_sequence("fr")


def test_id_errors(digits):
    for decode in (digits.decode, digits.decode_with_timestamps, digits.split_to_word_tokens):
        for token in (336, -1):
            with pytest.raises(ValueError, match=rf"0 to 335; got {token}"):
                decode([5, token])


def test_construction_errors(digits):
    with pytest.raises(ValueError, match=r"one token; got \('en', 'de', 'en'\)"):
        WhisperTokenizer.for_ranks(digits.bpe, ("en", "de", "en"))
    with pytest.raises(ValueError, match=r"num_timestamps=0, languages=\(\)"):
        WhisperTokenizer.for_ranks(digits.bpe, (), 0)
    with pytest.raises(ValueError, match=r"num_timestamps=1, languages=\(\)"):
        WhisperTokenizer(digits.bpe, (), 1, is_multilingual=True)
