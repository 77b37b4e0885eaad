"""Decoding of single windows against openai-whisper with the same random weights: the same tokens for every option."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import whisper
import whisper_peers as peers

from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.generate import whisper as decoding
from jaxaudio.generate.whisper import (
    DecodingOptions,
    decode,
    detect_language,
    encode,
    inference_params,
    memory_keys,
    teacher_forced,
)
from jaxaudio.generate.whisper_rules import Rules, SpecialIds, apply_rules

ROWS = 3
GROUP_SIZES = {1: 1, 4: 5}  # few, since each is a program of its own
KEY = jax.random.key(7)


@dataclasses.dataclass
class Pair:
    """openai-whisper's model and ours, and what both make of the same three windows."""

    peer: whisper.model.Whisper
    features: torch.Tensor
    model: object
    params: dict
    tokenizer: WhisperTokenizer
    memory: decoding.Memory

    def theirs(self, row, **options):
        for name in ("prompt", "prefix", "suppress_tokens"):
            if name in options:
                options[name] = list(options[name])
        features = self.features[row : row + 1]
        return whisper.decode(self.peer, features, whisper.DecodingOptions(**options, fp16=False))[0]

    def ours(self, options, **others):
        return decode(self.model, self.params, self.tokenizer, self.memory, KEY, options, **others)


def make_pair(seed, config, end_scale):
    """A larger embedding of the end makes texts end after a few to a few dozen tokens."""
    peer = peers.make_openai(seed, config)
    tokenizer = WhisperTokenizer.from_file(peers.tokenizer_file(config), config.vocab_size)
    with torch.no_grad():
        peer.decoder.token_embedding.weight[tokenizer.eot] *= end_scale
    model, params, _ = peers.from_openai(peer)
    mel = np.random.default_rng(0).standard_normal((ROWS, 3000, config.num_mels)).astype(np.float32)
    params = inference_params(params)
    features = peer.embed_audio(torch.tensor(mel.transpose(0, 2, 1)))
    return Pair(peer, features.detach(), model, params, tokenizer, encode(model, params, jnp.asarray(mel)))


@pytest.fixture(scope="module")
def pair():
    return make_pair(3, peers.MULTILINGUAL, 1.5)


def assert_equal(ours, theirs):
    assert list(ours.tokens) == theirs.tokens
    assert ours.text == theirs.text
    assert ours.language == theirs.language
    assert ours.temperature == theirs.temperature
    np.testing.assert_allclose(ours.avg_logprob, theirs.avg_logprob, atol=1e-4)
    np.testing.assert_allclose(ours.no_speech_prob, theirs.no_speech_prob, atol=1e-5)
    np.testing.assert_allclose(ours.compression_ratio, theirs.compression_ratio, rtol=1e-6)


LONG_PROMPT = tuple(range(1000, 1400))
SINGLE = [
    {},
    {"without_timestamps": True},
    {"task": "translate", "language": "de"},
    {"sample_len": 7},
    {"suppress_tokens": ()},
    {"suppress_tokens": (-1, 50, 51, 52)},
    {"suppress_tokens": (400,)},
    {"suppress_blank": False},
    {"max_initial_timestamp": None},
    {"max_initial_timestamp": 0.3},
    {"prompt": (1000, 50400, 1002)},
    {"prompt": LONG_PROMPT, "prefix": (400, 370, 452)},
    {"prefix": (50364, 400, 370), "sample_len": 222},
    {"beam_size": 1},
    {"length_penalty": 0.5},
]
GROUPS = [
    {"beam_size": 5},
    {"beam_size": 5, "length_penalty": 0.6},
    {"beam_size": 3, "patience": 2.0},
    {"beam_size": 5, "patience": 0.5},
    {"beam_size": 2, "without_timestamps": True, "prompt": LONG_PROMPT},
    {"beam_size": 1, "patience": 2.0},
    {"beam_size": 4, "sample_len": 5, "task": "translate"},
]


@pytest.mark.parametrize(("cases", "group_size"), [(SINGLE, 1), (GROUPS, 5)], ids=["single", "groups"])
def test_tokens_equal_openai_whisper_for_every_option(pair, cases, group_size):
    cases = [{"language": "en", "sample_len": 40} | case for case in cases]
    # Three windows with three sets of options at a time, so that every row has options of its own.
    for start in range(0, len(cases), ROWS):
        batch = (cases[start : start + ROWS] * ROWS)[:ROWS]
        ours = pair.ours([DecodingOptions(**case) for case in batch], group_size=group_size)
        for row, (result, case) in enumerate(zip(ours, batch, strict=True)):
            assert_equal(result, pair.theirs(row, **case))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"sample_len": 300}, {"prompt": LONG_PROMPT, "sample_len": 440}])
def test_texts_that_fill_the_context_equal_openai_whisper(options):
    pair = make_pair(0, peers.MULTILINGUAL, 1.0)
    theirs = pair.theirs(0, language="en", **options)
    assert len(theirs.tokens) == min(options.get("sample_len", 224), 449 - 227 * ("prompt" in options))
    assert_equal(pair.ours([DecodingOptions(language="en", **options), None, None])[0], theirs)


def test_beams_of_one_window_equal_openai_whisper(pair):
    for row in range(ROWS):
        one = DecodingOptions(language="en", beam_size=5, sample_len=40)
        ours = pair.ours([one if row == i else None for i in range(ROWS)])
        assert [result is None for result in ours] == [i != row for i in range(ROWS)]
        assert_equal(ours[row], pair.theirs(row, language="en", beam_size=5, sample_len=40))


def noise(row_key, group_size, vocab_size):
    """Gumbel noise of each step, from the keys that the documentation promises."""
    keys = [jax.random.fold_in(row_key, i) for i in range(group_size)]
    step = 0
    while True:
        yield np.stack([jax.random.gumbel(jax.random.fold_in(key, step), (vocab_size,)) for key in keys])
        step += 1


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"temperature": 1.0, "best_of": 4}], ids=["one", "best_of"])
def test_samples_equal_openai_whisper_with_the_same_noise(pair, monkeypatch, options):
    options = {"language": "en", "sample_len": 12} | options
    row_options, requests = DecodingOptions(**options), [(5, 3000, row) for row in range(ROWS)]
    ours = pair.ours([row_options] * ROWS, requests=requests, group_size=GROUP_SIZES[row_options.width])
    for row, numbers in enumerate(requests):
        row_key = KEY
        for number in numbers:
            row_key = jax.random.fold_in(row_key, number)
        draws = noise(row_key, row_options.width, pair.model.config.vocab_size)

        class Drawn:
            def __init__(self, logits):
                self.logits = logits

            def sample(self, draws=draws):
                return (self.logits + torch.tensor(next(draws))).argmax(dim=-1)

        monkeypatch.setattr(whisper.decoding, "Categorical", Drawn)
        assert_equal(ours[row], pair.theirs(row, **options))


@pytest.mark.parametrize(("config", "end_scale"), [(peers.ENGLISH, 2.0), (peers.V3, 2.0)], ids=["english", "v3"])
def test_other_vocabularies_equal_openai_whisper(config, end_scale):
    pair = make_pair(0, config, end_scale)
    options = {"language": "en", "sample_len": 40}
    for row, result in enumerate(pair.ours([DecodingOptions(**options)] * ROWS)):
        assert_equal(result, pair.theirs(row, **options))


def test_a_batch_equals_its_rows_alone(pair):
    options = [
        DecodingOptions(language="en", sample_len=30),
        DecodingOptions(language="fr", sample_len=30, temperature=0.8, best_of=3, prompt=(1000, 1001)),
        DecodingOptions(language="de", sample_len=30, beam_size=3, without_timestamps=True),
    ]
    requests = [(row, 100 * row) for row in range(ROWS)]
    together = pair.ours(options, requests=requests, group_size=5)
    for row in range(ROWS):
        memory = jax.tree.map(lambda leaf, row=row: leaf.reshape(ROWS, -1, *leaf.shape[1:])[row], pair.memory)
        alone = decode(
            pair.model, pair.params, pair.tokenizer, memory, KEY, [options[row]], requests=[requests[row]], group_size=5
        )
        assert alone[0].tokens == together[row].tokens
        np.testing.assert_allclose(alone[0].avg_logprob, together[row].avg_logprob, atol=1e-5)


def test_one_program_serves_all_options(pair):
    before = decoding._decode._cache_size()
    for case in SINGLE:
        pair.ours([DecodingOptions(**{"language": "en", "sample_len": 3} | case)] * ROWS)
    for case in GROUPS + [{"temperature": 0.5, "best_of": 5}, {}]:
        pair.ours([DecodingOptions(**{"language": "en", "sample_len": 3} | case)] * ROWS, group_size=5)
    assert decoding._decode._cache_size() - before <= 2


def test_a_long_prompt_in_the_batch_changes_no_other_row(pair):
    """Where all prompts are short, another loop runs, which has no room for a long one."""
    short = [DecodingOptions(language="en", prompt=prompt) for prompt in [(), (1000, 50400)]]
    without = pair.ours([*short, None])
    beside = pair.ours([*short, DecodingOptions(language="en", prompt=LONG_PROMPT)])
    for one, other in zip(without[:2], beside[:2], strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.avg_logprob, other.avg_logprob, atol=1e-5)
        np.testing.assert_allclose(one.no_speech_prob, other.no_speech_prob, atol=1e-5)


def test_language_probabilities_equal_openai_whisper(pair):
    _, theirs = pair.peer.detect_language(pair.features)
    for ours, expected in zip(
        detect_language(pair.model, pair.params, pair.tokenizer, pair.memory), theirs, strict=True
    ):
        assert set(ours) == set(expected)
        for code, probability in expected.items():
            assert abs(ours[code] - probability) < 1e-5


def test_teacher_forced_logits_and_queries_equal_openai_whisper(pair):
    tokens = np.random.default_rng(1).integers(0, 50_000, (ROWS, 6))
    logits, queries = teacher_forced(pair.model, pair.params, pair.memory, jnp.asarray(tokens))
    found = [None] * len(pair.peer.decoder.blocks)
    hooks = [
        block.cross_attn.register_forward_hook(lambda _, __, out, i=i: found.__setitem__(i, out[1]))
        for i, block in enumerate(pair.peer.decoder.blocks)
    ]
    with torch.no_grad(), whisper.model.disable_sdpa():
        expected = pair.peer.decoder(torch.tensor(tokens), pair.features).numpy()
    for hook in hooks:
        hook.remove()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    for layer, query in enumerate(queries):
        keys = memory_keys(pair.model, pair.memory, layer)
        products = jnp.einsum("BLNH,BNSH->BNLS", query, keys) * query.shape[-1] ** -0.5
        np.testing.assert_allclose(products, found[layer].numpy(), atol=1e-4)


def test_int8_weights_are_the_rounded_ones(pair):
    stacked = peers.from_openai(pair.peer)[1]
    quantized = inference_params(stacked, int8=True)

    def num_bytes(params):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(params["decoder"]))

    assert num_bytes(quantized) < 0.3 * num_bytes(pair.params)

    def by_hand(tree):
        if not isinstance(tree, dict):
            return tree
        out = {name: by_hand(value) for name, value in tree.items() if not name.endswith("_scale")}
        if "kernel_scale" in tree:  # the scale's axes are the last of the kernel's
            out["kernel"] = jnp.asarray(np.asarray(tree["kernel"], np.float32) * np.asarray(tree["kernel_scale"]))
        if "token_embedding_scale" in tree:
            scale = np.asarray(tree["token_embedding_scale"])[:, None]
            out["token_embedding"] = jnp.asarray(np.asarray(tree["token_embedding"], np.float32) * scale)
        return out

    expected = by_hand(quantized)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50_000, (ROWS, 6)))
    ours, _ = teacher_forced(pair.model, quantized, pair.memory, tokens)
    theirs, _ = teacher_forced(pair.model, expected, pair.memory, tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    exact, _ = teacher_forced(pair.model, pair.params, pair.memory, tokens)
    error = np.sqrt(np.mean((np.asarray(ours) - exact) ** 2) / np.var(exact))
    assert 1e-4 < error < 0.05


def random_rules(rng, batch, vocab_size, begin):
    return Rules(
        suppressed=jnp.asarray(rng.random((batch, vocab_size)) < 0.1),
        suppressed_first=jnp.asarray(rng.random((batch, vocab_size)) < 0.1),
        timestamps=jnp.asarray(rng.random(batch) < 0.7),
        last_initial=jnp.asarray(rng.integers(begin, vocab_size, batch), jnp.int32),
        repetition_penalty=jnp.ones(batch),
        no_repeat_ngram=jnp.zeros(batch, jnp.int32),
    )


def random_history(rng, length, begin, vocab_size):
    """Text and timestamps that do not decrease, in any order."""
    history, time = [], begin
    for _ in range(length):
        if rng.random() < 0.4:
            time = int(rng.integers(time, vocab_size))
            history.append(time)
        else:
            history.append(int(rng.integers(0, begin - 3)))
    return history


def test_timestamp_rules_equal_openai_whisper():
    rng = np.random.default_rng(2)
    batch, group, longest, eot, begin, vocab_size = 4, 2, 9, 30, 36, 60
    ids = SpecialIds(eot=eot, no_speech=34, no_timestamps=35, timestamp_begin=begin)

    class Vocabulary:
        no_timestamps, timestamp_begin = ids.no_timestamps, ids.timestamp_begin

    Vocabulary.eot = eot
    run = jax.jit(lambda logits, tokens, step, rules: apply_rules(logits, tokens, step, rules, ids))
    for _ in range(60):
        step = int(rng.integers(0, longest))
        rules = random_rules(rng, batch, vocab_size, begin)
        history = np.array([[random_history(rng, step, begin, vocab_size) for _ in range(group)] for _ in range(batch)])
        tokens = np.full((batch, group, longest), eot, np.int32)
        tokens[..., :step] = history
        logits = rng.standard_normal((batch, group, vocab_size)).astype(np.float32) * 3
        ours = run(jnp.asarray(logits), jnp.asarray(tokens), jnp.int32(step), rules)
        for row in range(batch):
            expected = torch.tensor(logits[row])
            if step == 0:
                expected[:, np.asarray(rules.suppressed_first[row])] = -np.inf
            expected[:, np.asarray(rules.suppressed[row])] = -np.inf
            if rules.timestamps[row]:
                last = int(rules.last_initial[row]) - begin
                whisper.decoding.ApplyTimestampRules(Vocabulary, 0, last).apply(
                    expected, torch.tensor(history[row], dtype=torch.long)
                )
            np.testing.assert_allclose(ours[row], expected.numpy(), rtol=1e-6)


def test_repetition_rules_equal_transformers():
    rng = np.random.default_rng(3)
    batch, group, longest, vocab_size = 4, 2, 12, 7
    ids = SpecialIds(eot=vocab_size - 3, no_speech=0, no_timestamps=vocab_size - 2, timestamp_begin=vocab_size - 1)
    run = jax.jit(lambda logits, tokens, step, rules: apply_rules(logits, tokens, step, rules, ids))
    for _ in range(40):
        step = int(rng.integers(1, longest + 1))
        penalties, sizes = rng.choice([1.0, 1.3, 0.8], batch), rng.integers(0, 5, batch)
        tokens = rng.integers(0, vocab_size, (batch, group, longest)).astype(np.int32)
        tokens[..., step:] = ids.eot
        logits = rng.standard_normal((batch, group, vocab_size)).astype(np.float32)
        nothing = jnp.zeros((batch, vocab_size), bool)
        rules = Rules(
            nothing,
            nothing,
            jnp.zeros(batch, bool),
            jnp.zeros(batch, jnp.int32),
            jnp.asarray(penalties, jnp.float32),
            jnp.asarray(sizes, jnp.int32),
        )
        ours = run(jnp.asarray(logits), jnp.asarray(tokens), jnp.int32(step), rules)
        for row in range(batch):
            said, expected = torch.tensor(tokens[row, :, :step], dtype=torch.long), torch.tensor(logits[row])
            expected = transformers.RepetitionPenaltyLogitsProcessor(float(penalties[row]))(said, expected)
            if sizes[row]:
                expected = transformers.NoRepeatNGramLogitsProcessor(int(sizes[row]))(said, expected)
            np.testing.assert_allclose(ours[row], expected.numpy(), rtol=1e-6)


def test_no_ngram_repeats_and_hotwords_are_said_before(pair):
    results = pair.ours(
        [DecodingOptions(language="en", no_repeat_ngram_size=2, without_timestamps=True, sample_len=60)] * ROWS
    )
    for result in results:
        grams = list(zip(result.tokens, result.tokens[1:], strict=False))
        assert len(set(grams)) == len(grams)
    words = pair.tokenizer.encode(" Bach")
    hot = pair.ours(
        [
            DecodingOptions(language="en", hotwords="Bach ", prompt=(1000,), sample_len=20),
            None,
            None,
        ]
    )[0]
    prompted = pair.ours([DecodingOptions(language="en", prompt=(*words, 1000), sample_len=20)] * ROWS)[0]
    assert hot.tokens == prompted.tokens


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"task": "sing"}, "'sing'"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"beam_size": 0}, "beam_size must be at least 1, got 0"),
        ({"beam_size": 2, "best_of": 3, "temperature": 1.0}, "not both, got 2 and 3"),
        ({"best_of": 3}, "best_of=3 needs a temperature"),
        ({"patience": 2.0}, "patience=2.0 needs a beam_size"),
        ({"patience": 0.1, "beam_size": 2}, "patience=0.1 with beam_size=2"),
        ({"length_penalty": 1.5}, r"in \[0, 1\], got 1.5"),
        ({"max_initial_timestamp": -1.0}, "got -1.0"),
        ({"repetition_penalty": 0.0}, "above 0, got 0.0"),
        ({"no_repeat_ngram_size": -1}, "got -1"),
    ],
)
def test_impossible_options_are_errors(options, match):
    with pytest.raises(ValueError, match=match):
        DecodingOptions(**options)


def test_what_does_not_fit_the_model_is_an_error(pair):
    english = DecodingOptions(language="en")
    with pytest.raises(ValueError, match="one entry for each of 3 windows, got 1"):
        pair.ours([english])
    with pytest.raises(ValueError, match="requests must have one entry .* got 2"):
        pair.ours([english] * ROWS, requests=[(0,)] * 2)
    with pytest.raises(ValueError, match="group_size must be at least 5 .* got 2"):
        pair.ours([dataclasses.replace(english, beam_size=5)] * ROWS, group_size=2)
    with pytest.raises(ValueError, match="xx"):
        pair.ours([dataclasses.replace(english, language="xx")] * ROWS)
    with pytest.raises(ValueError, match="prompt and prefix have 503 tokens, more than the decoder's 448"):
        pair.ours([dataclasses.replace(english, prefix=(400,) * 500)] * ROWS)
    with pytest.raises(ValueError, match="sample_len=300 leaves no room for a prefix"):
        pair.ours([dataclasses.replace(english, prefix=(400,), sample_len=300)] * ROWS)
    with pytest.raises(ValueError, match="tokens of hotwords do not fit beside a prompt of 400 in 223"):
        pair.ours([dataclasses.replace(english, prompt=LONG_PROMPT, hotwords="Bach")] * ROWS)
    with pytest.raises(ValueError, match="suppress_tokens has 60000"):
        pair.ours([dataclasses.replace(english, suppress_tokens=(60_000,))] * ROWS)
