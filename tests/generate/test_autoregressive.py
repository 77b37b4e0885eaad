"""The decode loop: equal to re-running the whole sequence, and each row on its own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxaudio.generate import autoregressive
from jaxaudio.models.music_transformer import MusicTransformer, MusicTransformerConfig, init_cache
from jaxaudio.nn.transformer import unstack_layers
from jaxaudio.nn.transformer_config import TransformerConfig
from jaxaudio.ops.sampling import Sampling, filter_logits, make_sampling, most_likely

LENGTH = 24
MODEL = MusicTransformer(
    MusicTransformerConfig(
        12,
        TransformerConfig(
            num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, positions="relative", max_distance=10, block_size=8
        ),
    )
)


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    return nn.meta.unbox(jax.jit(MODEL.init)(jax.random.key(3), tokens))["params"]


def run(params, prompts, **options):
    return autoregressive.generate(
        MODEL,
        params,
        jax.random.key(5),
        init_cache=functools.partial(init_cache, MODEL.config),
        prompts=prompts,
        length=LENGTH,
        **options,
    )


def uncached_greedy(params, prompt, num_tokens):
    """Argmax of a full forward pass for every token."""
    forward = jax.jit(lambda tokens: MODEL.apply({"params": params}, tokens)[0])
    tokens = list(prompt)
    while len(tokens) < num_tokens:
        inputs = np.zeros((1, LENGTH), np.int32)
        inputs[0, 1 : len(tokens) + 1] = tokens[: LENGTH - 1]
        tokens.append(int(np.argmax(forward(inputs)[0, len(tokens)])))
    return tokens


def test_greedy_equals_rerunning_the_whole_sequence(params):
    prompts = [np.array([], np.int32), np.array([3, 1, 4, 1, 5])]
    out = run(params, prompts, sampling=make_sampling(2, temperature=0.0))
    for row, prompt in enumerate(prompts):
        assert out[row].tolist() == uncached_greedy(params, prompt, LENGTH)


def test_a_row_depends_on_its_request_alone(params):
    prompts = [np.array([row + 1] * row) for row in range(8)]
    together = run(params, prompts)
    for slots in ([2], [7, 2, 0], [1, 2, 3, 4]):
        part = run(params, [prompts[slot] for slot in slots], requests=slots)
        np.testing.assert_array_equal(part, together[slots])
    other_neighbours = run(params, [prompts[2], np.array([9] * 7)], requests=[2, 99])
    np.testing.assert_array_equal(other_neighbours[0], together[2])
    assert len({tuple(row) for row in together[:, 8:].tolist()}) == 8


def test_prompts_are_forced_and_forbidden_tokens_never_drawn(params):
    prompt = np.array([5, 5, 2, 7])
    allowed = np.arange(12) % 2 == 1
    out = run(params, [prompt, prompt], allowed=allowed, num_tokens=20)
    assert out.shape == (2, 20)
    np.testing.assert_array_equal(out[:, :4], [prompt, prompt])
    assert np.all(out[:, 4:] % 2 == 1)


def test_one_program_serves_all_options_and_lengths(params):
    run(params, [np.array([1]), np.array([2])])
    before = autoregressive._decode._cache_size()
    for temperature, top_k, top_p, num_tokens in [(0.5, 3, 0.9, 9), (0.0, 0, 1.0, 24), (1.3, 1, 0.2, 15)]:
        options = make_sampling(2, temperature=temperature, top_k=top_k, top_p=top_p)
        run(params, [np.array([1, 2, 3]), np.array([], int)], sampling=options, num_tokens=num_tokens)
    assert autoregressive._decode._cache_size() == before


def test_chunks_are_the_whole_and_a_shorter_cache_rolls_on(params):
    prompts = [np.array([3, 1, 4, 1, 5, 9, 2]), np.array([], np.int32)]
    whole = run(params, prompts)

    def chunks(context, **options):
        cache = init_cache(MODEL.config, 2, context)
        options |= {"prompts": prompts, "chunk_length": 5, "cache": cache}
        return list(autoregressive.stream(MODEL, params, jax.random.key(5), **options))

    parts = chunks(LENGTH, num_tokens=LENGTH)
    assert [part.shape[1] for part in parts] == [5, 5, 5, 5, 4]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    rolling = np.concatenate(chunks(11, num_tokens=3 * LENGTH), axis=1)
    assert rolling.shape == (2, 3 * LENGTH)
    np.testing.assert_array_equal(rolling[:, :11], whole[:, :11])
    assert np.any(rolling[:, :LENGTH] != whole)


def test_no_weight_or_cache_is_copied_inside_the_loop(params):
    """Copies of arrays as large as a weight matrix, in the loop's body of the compiled program."""
    config = MODEL.config.transformer
    arguments = (
        MODEL,
        unstack_layers(params),
        init_cache(MODEL.config, 1, LENGTH),
        jax.random.key(0),
        np.zeros((1, 1), np.int32),
        np.zeros((1, LENGTH), np.int32),
        np.zeros((1, LENGTH), bool),
        np.int32(0),
        np.int32(LENGTH),
        np.zeros(1, np.uint32),
        make_sampling(1),
        None,
    )
    text = autoregressive._decode.lower(*arguments).compile().as_text()
    body = next(match for match in re.findall(r"body=%([\w.-]+)", text) if match)
    program = re.search(rf"\n%?{re.escape(body)} [^\n]*\{{\n(.*?)\n\}}", text, re.DOTALL).group(1)
    smallest = min(config.embed_dim * config.mlp_dim, config.num_heads * LENGTH * config.query_head_dim)
    copies = [
        line
        for line in program.splitlines()
        if (found := re.search(r"= f32\[([\d,]+)\]\S* copy\(", line))
        and np.prod([int(size) for size in found.group(1).split(",")]) >= smallest
    ]
    assert copies == []


def test_prompt_longer_than_the_context_is_an_error(params):
    with pytest.raises(ValueError, match=r"prompt 0 has 25 tokens, more than the 24"):
        run(params, [np.ones(25, int)])
    with pytest.raises(ValueError, match=r"1\.\.24 .*got 25"):
        run(params, [np.ones(3, int)], num_tokens=25)
    with pytest.raises(ValueError, match=r"requests .* 1 prompts, got 2"):
        run(params, [np.ones(3, int)], requests=[0, 1])
    with pytest.raises(ValueError, match=r"sampling .* 1 prompts, got 3"):
        run(params, [np.ones(3, int)], sampling=make_sampling(3))


def loop_filter(logits, temperature, top_k, top_p):
    """Top-k, then top-p, by sorting one row in Python."""
    logits = logits / temperature
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    order = order[: top_k or len(order)]
    weights = np.exp(logits[order] - logits[order[0]])
    weights /= weights.sum()
    kept, total = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if total >= top_p:
            break
        kept.append(token)
        total += weight
    return sorted(kept)


def test_the_most_likely_token_is_the_first_of_the_largest():
    logits = np.random.default_rng(0).integers(0, 4, (5, 3, 11)).astype(np.float32)
    logits[0, 0] = -np.inf
    logits[1, 1, 2:] = -np.inf
    np.testing.assert_array_equal(most_likely(jnp.asarray(logits)), np.argmax(logits, axis=-1))


def test_filters_equal_a_loop_per_row():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 12)).astype(np.float32)
    temperature, top_k = [1.0, 0.5, 2.0, 1.0, 1.0, 1.0], [0, 3, 5, 1, 12, 40]
    top_p = [0.9, 1.0, 0.5, 0.7, 0.01, 0.999]
    options = Sampling(jnp.array(temperature), jnp.array(top_k), jnp.array(top_p))
    filtered = np.asarray(filter_logits(jnp.asarray(logits), options))
    for row in range(6):
        kept = loop_filter(logits[row].astype(np.float64), temperature[row], top_k[row], top_p[row])
        assert np.flatnonzero(np.isfinite(filtered[row])).tolist() == kept


def test_draws_follow_the_distribution():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    from jaxaudio.ops.sampling import sample

    logits = jnp.tile(jnp.log(jnp.asarray(probabilities, jnp.float32)), (20_000, 1))
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = sample(keys, logits, make_sampling(20_000))
    frequencies = np.bincount(drawn, minlength=4) / 20_000
    np.testing.assert_allclose(frequencies, probabilities, atol=0.012)  # over three standard deviations


@pytest.mark.parametrize(("option", "value"), [("temperature", -0.5), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5)])
def test_impossible_options_are_errors(option, value):
    with pytest.raises(ValueError, match=f"{option}.*got {value}"):
        make_sampling(1, **{option: value})
