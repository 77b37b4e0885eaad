import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaudio import sharding
from jaxaudio.models.whisper import Whisper, WhisperConfig
from jaxaudio.nn.adapters import INPUT_AXES, LoraConfig, init_lora, merge_lora
from jaxaudio.nn.layers import Projection

CONFIG = WhisperConfig(
    vocab_size=30,
    num_mels=4,
    embed_dim=12,
    num_heads=3,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_frames=10,
    text_length=8,
)
MEL = jnp.asarray(np.random.default_rng(0).standard_normal((2, 10, 4)), jnp.float32)
TOKENS = jnp.asarray([[1, 2, 3], [4, 5, 6]], jnp.int32)
EVERY = LoraConfig(rank=2, alpha=6.0, targets=("query", "key", "value", "out", "up", "down"))


@pytest.fixture(scope="module")
def boxed():
    return jax.jit(Whisper(CONFIG).init)(jax.random.key(0), MEL, TOKENS)["params"]


def random_factors(params, config):
    """Factors as after some training: b is no longer zero."""
    lora = init_lora(jax.random.key(1), params, config)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), lora)


def paths(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_new_factors_change_nothing(boxed):
    params = nn.meta.unbox(boxed)
    lora = init_lora(jax.random.key(1), params, EVERY)
    merged = merge_lora(params, lora, EVERY)
    for name, leaf in paths(merged).items():
        np.testing.assert_array_equal(leaf, paths(params)[name], err_msg=name)
    for name, leaf in paths(lora).items():
        assert bool(jnp.any(leaf != 0)) == name.endswith("/a"), name
    a = lora["decoder"]["transformer"]["layers"]["mlp"]["down"]["a"]
    assert float(jnp.std(a)) == pytest.approx(48**-0.5, rel=0.15)  # fan-in of the MLP's 48 hidden units


def test_query_and_value_of_all_attentions_are_the_default(boxed):
    lora = paths(init_lora(jax.random.key(1), nn.meta.unbox(boxed), LoraConfig()))
    attentions = ["encoder/transformer/layers/attention"]
    attentions += [f"decoder/transformer/layers/{name}" for name in ("attention", "cross_attention")]
    assert set(lora) == {f"{at}/{name}/{f}" for at in attentions for name in ("query", "value") for f in "ab"}
    # layers, width, rank; layers, rank, heads, head width
    assert lora[f"{attentions[0]}/query/a"].shape == (2, 12, 8)
    assert lora[f"{attentions[0]}/query/b"].shape == (2, 8, 3, 4)


def test_merged_kernels_by_a_loop(boxed):
    params = nn.meta.unbox(boxed)
    lora = random_factors(params, EVERY)
    merged = paths(merge_lora(params, lora, EVERY))
    factors, changed = paths(lora), 0
    for name, kernel in paths(params).items():
        module = name.removesuffix("/kernel")
        if f"{module}/a" not in factors:
            np.testing.assert_array_equal(merged[name], kernel)
            continue
        changed += 1
        inputs = INPUT_AXES[module.rsplit("/", 1)[1]]
        for layer in range(2):
            a, b = (np.asarray(factors[f"{module}/{f}"][layer], np.float64) for f in "ab")
            expected = np.array(kernel[layer], np.float64)
            for place in np.ndindex(expected.shape):
                ins, outs = place[:inputs], place[inputs:]
                expected[place] += 6.0 / 2 * sum(a[(*ins, r)] * b[(r, *outs)] for r in range(2))
            np.testing.assert_allclose(merged[name][layer], expected, atol=1e-6, err_msg=name)
    assert changed == 6 * 3 - 2  # the MLP is not there three times


def test_the_merged_model_is_the_model_with_a_side_branch(boxed):
    """W x + (alpha / r) B A x of equation 3, computed beside each projection while the base model runs."""
    params = nn.meta.unbox(boxed)
    # Both layers have the same factors, since inside of a scan an interceptor does not know its layer.
    factors = jax.tree.map(lambda leaf: leaf[0], random_factors(params, EVERY))
    lora = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), factors)

    def branch(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if not isinstance(context.module, Projection) or context.module.name not in EVERY.targets:
            return y
        node = factors
        for part in context.module.path:
            node = node[part]
        a, b = node["a"], node["b"]
        x = args[0].reshape(*args[0].shape[:2], -1)
        change = (x @ a.reshape(-1, 2)) @ b.reshape(2, -1)
        return y + 3.0 * change.reshape(y.shape)

    apply = jax.jit(lambda params: Whisper(CONFIG).apply({"params": params}, MEL, TOKENS))
    with nn.intercept_methods(branch):
        expected = jax.jit(lambda: Whisper(CONFIG).apply({"params": params}, MEL, TOKENS))()
    found = apply(merge_lora(params, lora, EVERY))
    assert float(jnp.max(jnp.abs(found - apply(params)))) > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("rules", [sharding.FSDP, sharding.TENSOR])
def test_factors_are_sharded_as_their_kernels(boxed, rules):
    mesh = sharding.make_mesh("fsdp:4,model:1", jax.devices()[:4])
    shardings = sharding.tree_shardings(init_lora(jax.random.key(1), boxed, LoraConfig()), mesh, rules)
    query = shardings["encoder"]["transformer"]["layers"]["attention"]["query"]
    assert tuple(query["a"].spec) == (None, "fsdp", None)
    assert tuple(query["b"].spec) == (None, None, rules["heads"], None)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"targets": ("query", "q_proj")}, r"targets \('query', 'q_proj'\): expected some of query, key, value"),
        ({"targets": ()}, r"targets \(\): expected some of"),
    ],
)
def test_wrong_configs(fields, match):
    with pytest.raises(ValueError, match=match):
        LoraConfig(**fields)


def test_factors_and_models_that_do_not_go_together(boxed):
    params = nn.meta.unbox(boxed)
    with pytest.raises(ValueError, match="no kernel is named gate; targets are query, gate"):
        init_lora(jax.random.key(0), params, LoraConfig(targets=("query", "gate")))
    lora = init_lora(jax.random.key(0), params, LoraConfig())
    with pytest.raises(ValueError, match="factors for decoder, which the model does not have"):
        merge_lora({"encoder": params["encoder"]}, lora, LoraConfig())
