"""The language model in integers: beside floats, beside a slow loop over Python's integers, and in every order."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encodec_lm
from tiny_encodec_lm import PAST, D, L, N, integer_lm, random_codes, random_params, shifted

from jaxaudio.data import integer_lm as integers
from jaxaudio.data.integer_lm import ACTIVATION_LIMIT, TABLE_BITS, EntropyModelError, IntegerLM, isqrt
from jaxaudio.data.lm_quantization import quantize_lm
from jaxaudio.models.encodec_lm import EncodecLM, EncodecLMConfig

T = 24


def tables_of(model, codes):
    """All frames at once: codes (B, Q, T) or (Q, T)."""
    codes = codes if codes.ndim == 3 else codes[None]
    return model.cumulative(shifted(codes), model.start(len(codes), codes.shape[-1]))


@pytest.mark.parametrize("sizes", [{}, {"gain": 6.0}, {"codebooks": 5, "codes": 64, "dim": 40, "heads": 8}])
def test_costs_what_the_floats_cost(sizes):
    """Coding what the floats expect takes less than 0.1 % more bits than their entropy."""
    params = random_params(**sizes)
    codebooks, codes, dim = params["embedding"].shape[0], params["embedding"].shape[1] - 1, params["embedding"].shape[2]
    config = EncodecLMConfig(codebooks, codes, PAST, L, dim, sizes.get("heads", N), tiny_encodec_lm.F)
    stream = random_codes(T, codebooks=codebooks, codes=codes)
    floats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    inputs = jnp.asarray(shifted(stream)[None], jnp.int32)
    logits, _ = jax.jit(EncodecLM(config).apply)({"params": floats}, inputs)
    expected = np.asarray(jax.nn.softmax(logits[0]), np.float64).transpose(1, 0, 2)  # (T, Q, C)
    found = probabilities(tables_of(integer_lm(**sizes), stream)[0])
    entropy = -np.sum(expected * np.log2(expected + 1e-30))
    excess = np.sum(expected * np.log2((expected + 1e-30) / found))
    assert -1e-6 * entropy < excess < 1e-3 * entropy
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-5)


def probabilities(tables):
    return np.diff(tables) / 2**TABLE_BITS


def test_tables_are_tables():
    """Also where one code is all but certain."""
    for gain in (1.0, 300.0):
        tables = tables_of(integer_lm(gain=gain), random_codes(T))
        assert np.all(tables[..., 0] == 0)
        assert np.all(tables[..., -1] == 2**TABLE_BITS)
        assert np.diff(tables).min() >= 1
    assert np.diff(tables).max() == 2**TABLE_BITS - tiny_encodec_lm.C + 1


@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_every_order_gives_the_same_tables(num_codebooks):
    """All frames at once, one by one, in blocks; a row alone and among others."""
    model = integer_lm()
    batch = np.stack([random_codes(T, seed)[:num_codebooks] for seed in range(3)])
    whole = tables_of(model, batch)
    for sizes in ([1] * T, [5, 1, 11, 7]):
        for row in range(3):
            state, inputs, parts = model.start(1, T), shifted(batch[row : row + 1]), []
            for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
                parts.append(model.cumulative(inputs[..., start : start + size], state))
            np.testing.assert_array_equal(np.concatenate(parts, axis=1)[0], whole[row])


def slow_tables(model, codes):
    """The model's definition in Python's integers, number by number: codes (Q, T)."""
    tensors, past = model.tensors, model.past_frames
    heads, dim = model.num_heads, model.embed_dim
    clip = lambda value: max(-ACTIVATION_LIMIT, min(ACTIVATION_LIMIT, value))  # noqa: E731

    def linear(x, name, index=()):
        kernel, bias, shift = (tensors[f"{name}/{part}"][index].tolist() for part in ("kernel", "bias", "shift"))
        sums = [sum(a * row[o] for a, row in zip(x, kernel, strict=True)) for o in range(len(bias))]
        return [clip((s + b + (1 << (h - 1))) >> h) for s, b, h in zip(sums, bias, shift, strict=True)]

    def norm(x, name):
        scale, bias = (tensors[f"{name}/{part}"].tolist() for part in ("scale", "bias"))
        mean = (2 * sum(x) + dim) // (2 * dim)
        deviation = math.isqrt((sum((a - mean) ** 2 for a in x) // dim + 168) << 16)
        units = [((a - mean) * (2**48 // deviation)) >> 24 for a in x]
        return [clip((u * s + (b << 16) + 2**15) >> 16) for u, s, b in zip(units, scale, bias, strict=True)]

    def power(below, bits):
        return int(tensors["exp_table"][below & 4095]) >> (min(below >> 12, 25) + 24 - bits)

    def gelu(x):
        return max(x, 0) - int(tensors["gelu_table"][min(abs(x), len(tensors["gelu_table"]) - 1)])

    def attended(past_keys, past_values, query):
        out = []
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            logits = [sum(a * b for a, b in zip(query[part], key[part], strict=True)) >> 12 for key in past_keys]
            weights = [power(max(logits) - logit, 16) for logit in logits]
            for column in zip(*(value[part] for value in past_values), strict=True):
                mixed = sum(w * v for w, v in zip(weights, column, strict=True))
                out.append((2 * mixed + sum(weights)) // (2 * sum(weights)))
        return out

    zeros = [linear([0] * dim, f"layers/{index}/qkv") for index in range(L)]
    keys, values = ([[z[dim * i : dim * (i + 1)]] for z in zeros] for i in (1, 2))
    tables = []
    for frame, inputs in enumerate(shifted(codes).T):
        rows = [tensors["embedding"][q, code].tolist() for q, code in enumerate(inputs)]
        x = norm([sum(column) << int(tensors["embedding_shift"]) for column in zip(*rows, strict=True)], "norm")
        x = [clip(a + int(b)) for a, b in zip(x, tensors["positions"][frame], strict=True)]
        for index in range(L):
            name = f"layers/{index}"
            qkv = linear(x, f"{name}/qkv")
            keys[index].append(qkv[dim : 2 * dim])
            values[index].append(qkv[2 * dim :])
            y = linear(attended(keys[index][-past - 1 :], values[index][-past - 1 :], qkv[:dim]), f"{name}/out")
            x = norm([a + b for a, b in zip(x, y, strict=True)], f"{name}/attention_norm")
            y = linear([gelu(a) for a in linear(x, f"{name}/up")], f"{name}/down")
            x = norm([a + b for a, b in zip(x, y, strict=True)], f"{name}/mlp_norm")
        for q in range(len(codes)):
            logits = linear(x, "logits", (q,))
            powers = [power(max(logits) - logit, 24) for logit in logits]
            factor = ((2**20 - len(powers)) << 30) // sum(powers)
            counts = [1 + (p * factor >> 30) for p in powers]
            counts[logits.index(max(logits))] += 2**20 - sum(counts)
            tables.append([sum(counts[:c]) for c in range(len(counts) + 1)])
    return np.array(tables).reshape(codes.shape[1], len(codes), -1)


def as_large_as_allowed(tensors):
    """Every weight, norm and embedding at its limit, with random signs: sums and products as large as they get."""
    rng = np.random.default_rng(0)
    limits = {"kernel": 2**15 - 1, "scale": 2**24 - 1, "embedding": 2**15 - 1}
    out = {}
    for name, array in tensors.items():
        limit = limits.get(name.split("/")[-1])
        out[name] = array if limit is None else (limit * rng.choice([-1, 1], array.shape)).astype(array.dtype)
        if name.endswith("shift") and array.ndim:
            out[name] = np.ones_like(array)
    return out


@pytest.mark.parametrize("extreme", [False, True])
def test_equals_a_slow_loop(extreme):
    model = integer_lm(gain=3.0)
    if extreme:
        model = IntegerLM(as_large_as_allowed(model.tensors), num_heads=N, past_frames=PAST)
    codes = random_codes(9)
    np.testing.assert_array_equal(tables_of(model, codes)[0], slow_tables(model, codes))


def test_roots():
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 2**31, 1000) ** 2
    numbers = np.concatenate([[0, 1, 2, 3, 2**62 - 1], squares, squares - 1, squares + 1, rng.integers(0, 2**62, 1000)])
    numbers = np.maximum(numbers, 0)
    np.testing.assert_array_equal(isqrt(numbers), [math.isqrt(number) for number in numbers.tolist()])


def test_tables_of_functions():
    """Against their definitions, to half a unit."""
    tensors = quantize_lm(random_params(), num_positions=5)
    x = np.arange(0, len(tensors["gelu_table"]), 97) / 4096
    gelu = [max(v, 0.0) - 0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in -x]
    np.testing.assert_allclose(tensors["gelu_table"][::97] / 4096, gelu, atol=0.51 / 4096)
    assert tensors["gelu_table"][-1] == 0
    np.testing.assert_allclose(tensors["exp_table"] / 2**24, np.exp2(-np.arange(4096) / 4096), atol=0.51 / 2**24)
    angles = np.outer(np.arange(5), 1e4 ** -(np.arange(D // 2) / (D // 2 - 1)))
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(tensors["positions"] / 4096, waves, atol=0.51 / 4096)


def with_change(**changes):
    tensors = quantize_lm(random_params(), num_positions=4)
    for name, change in changes.items():
        tensors[name.replace("__", "/")] = change(tensors[name.replace("__", "/")])
    return tensors


def test_tensors_that_could_leave_the_integers_are_refused():
    """The largest weights of 2**15 with 2**18 inputs could: 2**15 * 2**20 * 2**18 = 2**53."""
    wide = dict(with_change())
    wide["layers/0/down/kernel"] = np.full((2**18 + 2**14, D), 2**15 - 1, np.int16)
    hidden = len(wide["layers/0/down/kernel"])
    wide["layers/0/up/kernel"] = np.zeros((D, hidden), np.int16)
    wide |= {"layers/0/up/bias": np.zeros(hidden, np.int64), "layers/0/up/shift": np.ones(hidden, np.uint8)}
    for index in range(1, L):
        wide |= {name.replace("/0/", f"/{index}/"): a for name, a in wide.items() if name.startswith("layers/0/")}
    with pytest.raises(EntropyModelError, match="down/kernel: sums may reach 95.*; only below 9007199254740992 are"):
        IntegerLM(wide, num_heads=N, past_frames=PAST)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits__bias": lambda a: a + 2**53}, "logits/bias: sums may reach"),
        ({"logits__shift": lambda a: a * 0}, "logits/shift: sums may reach -1"),
        ({"logits__shift": lambda a: a * 0 + 40}, "logits/shift: sums may reach 40; only below 32"),
        ({"norm__scale": lambda a: a + 2**24}, "norm/scale: sums may reach"),
        ({"embedding_shift": lambda a: a + 7}, "embedding: sums may reach"),
        ({"exp_table": lambda a: a - 1}, "exp_table: sums may reach"),
        ({"gelu_table": lambda a: a - 1}, "gelu_table: sums may reach -1"),
        ({"gelu_table": lambda a: a.astype(np.int64)}, r"gelu_table is int64 .*; expected int32"),
        ({"norm__bias": lambda a: a[1:]}, r"norm/bias is int32 \(15,\); expected int32 \(16,\)"),
    ],
)
def test_other_tensors_are_refused(changes, message):
    with pytest.raises(EntropyModelError, match=message):
        IntegerLM(with_change(**changes), num_heads=N, past_frames=PAST)


def test_other_refusals():
    tensors = with_change()
    with pytest.raises(EntropyModelError, match="num_heads is 5; expected a divisor of the width 16"):
        IntegerLM(tensors, num_heads=5, past_frames=PAST)
    with pytest.raises(EntropyModelError, match="past_frames is 131072; expected 1 to 131071"):
        IntegerLM(tensors, num_heads=N, past_frames=2**17)
    with pytest.raises(EntropyModelError, match="5 frames in a stream; the model has 4 positions"):
        IntegerLM(tensors, num_heads=N, past_frames=PAST).start(1, 5)
    with pytest.raises(EntropyModelError, match="layers/1/out/bias is missing"):
        IntegerLM({k: v for k, v in tensors.items() if k != "layers/1/out/bias"}, num_heads=N, past_frames=PAST)
    with pytest.raises(EntropyModelError, match="surplus: not tensors"):
        IntegerLM(tensors | {"surplus": np.zeros(1)}, num_heads=N, past_frames=PAST)
    with pytest.raises(EntropyModelError, match="embedding is missing; found nothing"):
        IntegerLM({}, num_heads=N, past_frames=PAST)
    codes = {name: tensors[name][:, :1] for name in ("logits/bias", "logits/shift")}
    codes |= {"logits/kernel": tensors["logits/kernel"][..., :1], "embedding": tensors["embedding"][:, :2]}
    with pytest.raises(EntropyModelError, match="a codebook of 1 codes; expected 2 to 65536"):
        IntegerLM(tensors | codes, num_heads=N, past_frames=PAST)


@pytest.mark.parametrize("value", [np.nan, np.inf, 20000.0])
def test_weights_that_cannot_be_quantized(value):
    params = random_params()
    params["transformer"]["layers"]["mlp"]["up"]["kernel"][1, 0, 0] = value
    message = "layers/1/up has a weight of 20000" if value == 20000 else "layers/1/up has a value that is not finite"
    with pytest.raises(EntropyModelError, match=message):
        quantize_lm(params)
    params = random_params()
    params["norm"]["layer"]["scale"][0] = value
    with pytest.raises(EntropyModelError, match="norm/scale has a value"):
        quantize_lm(params)


def test_large_embeddings_are_shifted():
    params = random_params()
    params["embedding"] *= 7
    model = IntegerLM(quantize_lm(params), num_heads=N, past_frames=PAST)
    assert (
        model.tensors["embedding_shift"] == math.ceil(math.log2(np.abs(params["embedding"]).max() * 4096 / 32767)) > 0
    )
    plain, shifted_ones = (probabilities(tables_of(m, random_codes(T))) for m in (integer_lm(), model))
    np.testing.assert_allclose(shifted_ones, plain, rtol=0.02, atol=1e-5)  # the norm after them divides by their size


def test_products_are_exact_at_their_limit():
    """Sums next to 2**53, in float64, are the integers that Python computes."""
    rng = np.random.default_rng(0)
    x = np.full((3, 300), ACTIVATION_LIMIT) * rng.choice([-1, 1], (3, 300))
    kernel = rng.integers(-(2**24), 2**24, (300, 40))
    linear = integers._Linear(kernel.astype(np.float64), np.zeros(40, np.int64), np.full(40, 31))
    expected = (x.astype(object) @ kernel.astype(object)) >> 31
    np.testing.assert_array_equal(integers._apply(x, linear), expected.astype(np.int64))
