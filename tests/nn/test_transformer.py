"""The one Transformer against public stacks with random weights, and against itself: cached, rematerialised, 16-bit."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import PartitionSpec

from jaxaudio import sharding
from jaxaudio.nn.layers import Norm
from jaxaudio.nn.transformer import MLP, Attention, Transformer, cross_caches, init_caches, unstack_layers
from jaxaudio.nn.transformer_config import TransformerConfig

B, T, S, D, N, H, F, L = 2, 12, 7, 32, 4, 8, 48, 3
SIZES = {"num_layers": L, "embed_dim": D, "num_heads": N, "mlp_dim": F}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_params(config, seed=0, **inputs):
    """Parameters of the model's shapes from NumPy: half the compile time of `init`, and no bias stays zero."""
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(
        Transformer(config).init, jax.random.key(0), jnp.zeros((1, 4, config.embed_dim)), **inputs
    )

    def draw(path, leaf):
        fan_in = max(np.prod(leaf.shape[1:-1]), 4) if leaf.ndim > 2 else 4
        center = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(center + rng.standard_normal(leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(abstract)["params"])


# Peers: each table says which of our parameters a torch tensor is, and its shape here. A torch matrix is (out, in).


def randomise(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            center = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(center + 0.15 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def nest(flat):
    tree = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(value)
    return tree


def convert(module, prefix, table, **others):
    """Stacks the layers `prefix`.0, 1, ... by `table`: ours -> (theirs, shape, third of a fused matrix or None)."""
    tensors = {name: tensor.detach().numpy() for name, tensor in module.named_parameters()}
    flat = {}
    for ours, (theirs, shape, third) in table.items():
        layers = [
            tensors.pop(f"{prefix}.{i}.{theirs}") if third in (None, 2) else tensors[f"{prefix}.{i}.{theirs}"]
            for i in range(L)
        ]
        parts = [layer if third is None else np.split(layer, 3)[third] for layer in layers]
        flat[f"layers/{ours}"] = np.stack([part.T.reshape(shape) for part in parts])
    for ours, theirs in others.items():
        flat[ours.replace("__", "/")] = tensors.pop(theirs)
    assert tensors == {}, "parameters of the peer that were not converted"
    return nest(flat)


def torch_attention_table(ours, theirs):
    fused = {name: third for third, name in enumerate(("query", "key", "value"))}
    table = {f"{ours}/{name}/kernel": (f"{theirs}.in_proj_weight", (D, N, H), i) for name, i in fused.items()}
    table |= {f"{ours}/{name}/bias": (f"{theirs}.in_proj_bias", (N, H), i) for name, i in fused.items()}
    table[f"{ours}/out/kernel"] = (f"{theirs}.out_proj.weight", (N, H, D), None)
    return table | {f"{ours}/out/bias": (f"{theirs}.out_proj.bias", (D,), None)}


def torch_table(sublayers):
    table = {}
    for number, (ours, theirs) in enumerate(sublayers, start=1):
        table |= {
            f"{ours}_norm/layer/scale": (f"norm{number}.weight", (D,), None),
            f"{ours}_norm/layer/bias": (f"norm{number}.bias", (D,), None),
        }
        if theirs is not None:
            table |= torch_attention_table(ours, theirs)
    return table | {
        "mlp/up/kernel": ("linear1.weight", (D, F), None),
        "mlp/up/bias": ("linear1.bias", (F,), None),
        "mlp/down/kernel": ("linear2.weight", (F, D), None),
        "mlp/down/bias": ("linear2.bias", (D,), None),
    }


TORCH_BLOCK = {"attention_bias": True, "attention_out_bias": True, "norm_epsilon": 1e-5}


def run(config, params, x, **inputs):
    out = jax.jit(lambda params, x: Transformer(config).apply({"params": params}, x, **inputs)[0])(params, x)
    return np.asarray(out)


@pytest.mark.parametrize(("norm_position", "activation"), [("pre", "gelu"), ("post", "relu")])
def test_equals_torch_encoder(norm_position, activation):
    layer = torch.nn.TransformerEncoderLayer(
        D, N, F, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_position == "pre"
    )
    norm = torch.nn.LayerNorm(D) if norm_position == "pre" else None
    peer = randomise(torch.nn.TransformerEncoder(layer, L, norm, enable_nested_tensor=False))
    table = torch_table([("attention", "self_attn"), ("mlp", None)])
    final = {} if norm is None else {"norm__layer__scale": "norm.weight", "norm__layer__bias": "norm.bias"}
    params = convert(peer, "layers", table, **final)
    x, keep = normal(B, T, D), np.arange(T) < np.array([[T], [9]])
    expected = peer(torch.tensor(x), src_key_padding_mask=torch.tensor(~keep)).detach().numpy()
    config = TransformerConfig(
        **SIZES, **TORCH_BLOCK, attention="full", activation=activation, norm_position=norm_position
    )
    out = run(config, params, x, mask=jnp.asarray(keep[:, None, None]))
    np.testing.assert_allclose(out[keep], expected[keep], atol=1e-4)


@pytest.mark.parametrize(("norm_position", "activation"), [("pre", "relu"), ("post", "gelu")])
def test_equals_torch_decoder(norm_position, activation):
    layer = torch.nn.TransformerDecoderLayer(
        D, N, F, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_position == "pre"
    )
    norm = torch.nn.LayerNorm(D) if norm_position == "pre" else None
    peer = randomise(torch.nn.TransformerDecoder(layer, L, norm))
    table = torch_table([("attention", "self_attn"), ("cross_attention", "multihead_attn"), ("mlp", None)])
    final = {} if norm is None else {"norm__layer__scale": "norm.weight", "norm__layer__bias": "norm.bias"}
    params = convert(peer, "layers", table, **final)
    x, memory, keep = normal(B, T, D), normal(B, S, D, seed=1), np.arange(S) < np.array([[S], [4]])
    expected = peer(
        torch.tensor(x),
        torch.tensor(memory),
        tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(T),
        tgt_is_causal=True,
        memory_key_padding_mask=torch.tensor(~keep),
    )
    config = TransformerConfig(
        **SIZES, **TORCH_BLOCK, cross_attention=True, activation=activation, norm_position=norm_position
    )
    out = run(config, params, x, memory=jnp.asarray(memory), memory_mask=jnp.asarray(keep[:, None, None]))
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-4)


LLAMA = TransformerConfig(
    **SIZES,
    num_kv_heads=2,
    positions="rotary",
    norm="rms",
    activation="silu",
    gated_mlp=True,
    mlp_bias=False,
)


def test_equals_llama():
    options = transformers.LlamaConfig(
        vocab_size=5,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    peer = randomise(transformers.LlamaModel(options))
    del peer.embed_tokens
    table = {
        "attention_norm/rms/scale": ("input_layernorm.weight", (D,), None),
        "attention/query/kernel": ("self_attn.q_proj.weight", (D, N, H), None),
        "attention/key/kernel": ("self_attn.k_proj.weight", (D, 2, H), None),
        "attention/value/kernel": ("self_attn.v_proj.weight", (D, 2, H), None),
        "attention/out/kernel": ("self_attn.o_proj.weight", (N, H, D), None),
        "mlp_norm/rms/scale": ("post_attention_layernorm.weight", (D,), None),
        "mlp/gate/kernel": ("mlp.gate_proj.weight", (D, F), None),
        "mlp/up/kernel": ("mlp.up_proj.weight", (D, F), None),
        "mlp/down/kernel": ("mlp.down_proj.weight", (F, D), None),
    }
    params, x = convert(peer, "layers", table, norm__rms__scale="norm.weight"), normal(B, T, D)
    expected = peer(inputs_embeds=torch.tensor(x), use_cache=False).last_hidden_state.detach().numpy()
    np.testing.assert_allclose(run(LLAMA, params, x), expected, atol=1e-4)


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_equals_t5_encoder(feed_forward):
    length, gated = 40, feed_forward == "gated-gelu"
    options = transformers.T5Config(
        vocab_size=5,
        d_model=D,
        d_kv=6,
        d_ff=F,
        num_layers=L,
        num_heads=N,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=20,
        feed_forward_proj=feed_forward,
    )
    peer = randomise(transformers.T5EncoderModel(options)).encoder
    del peer.embed_tokens
    x, keep = normal(B, length, D), np.arange(length) < np.array([[length], [31]])
    mask = torch.tensor(keep.astype(np.int64))
    expected = peer(inputs_embeds=torch.tensor(x), attention_mask=mask).last_hidden_state.detach().numpy()
    attention, mlp = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    table = {
        "attention_norm/rms/scale": ("layer.0.layer_norm.weight", (D,), None),
        "attention/query/kernel": (f"{attention}.q.weight", (D, N, 6), None),
        "attention/key/kernel": (f"{attention}.k.weight", (D, N, 6), None),
        "attention/value/kernel": (f"{attention}.v.weight", (D, N, 6), None),
        "attention/out/kernel": (f"{attention}.o.weight", (N, 6, D), None),
        "mlp_norm/rms/scale": ("layer.1.layer_norm.weight", (D,), None),
        "mlp/down/kernel": (f"{mlp}.wo.weight", (F, D), None),
    }
    if gated:
        table |= {
            "mlp/gate/kernel": (f"{mlp}.wi_0.weight", (D, F), None),
            "mlp/up/kernel": (f"{mlp}.wi_1.weight", (D, F), None),
        }
    else:
        table["mlp/up/kernel"] = (f"{mlp}.wi.weight", (D, F), None)
    params = convert(
        peer,
        "block",
        table,
        norm__rms__scale="final_layer_norm.weight",
        relative_bias=f"block.0.{attention}.relative_attention_bias.weight",
    )
    config = TransformerConfig(
        **SIZES,
        head_dim=6,
        value_head_dim=6,
        attention="full",
        attention_scale=1.0,
        positions="t5",
        num_buckets=16,
        max_distance=20,
        norm="rms",
        activation="gelu_tanh" if gated else "relu",
        gated_mlp=gated,
        mlp_bias=False,
    )
    out = run(config, params, x, mask=jnp.asarray(keep[:, None, None]))
    np.testing.assert_allclose(out[keep], expected[keep], atol=1e-4)


DROPOUT = {"dropout_rate": 0.1, "attention_dropout_rate": 0.1, "mlp_dropout_rate": 0.1, "dropout_generator": "hash"}


def loss_and_gradient(config, params, x):
    """Of a training pass, with dropout."""

    def loss(params):
        rngs = {"dropout": jax.random.key(1)}
        out, _ = Transformer(config).apply({"params": params}, x, deterministic=False, rngs=rngs)
        return jnp.mean(jnp.square(out.astype(jnp.float32) - 1))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def trained():
    config = dataclasses.replace(LLAMA, **DROPOUT)
    params, x = random_params(config), jnp.asarray(normal(B, T, D))
    return config, params, x, loss_and_gradient(config, params, x)


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_with_no_batch_dims_saveable"])
def test_rematerialisation_changes_nothing(trained, policy):
    config, params, x, (loss, gradient) = trained
    other, other_gradient = loss_and_gradient(dataclasses.replace(config, remat_policy=policy), params, x)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other_gradient, gradient)


def test_bfloat16_compute_is_close_and_keeps_float32_parameters(trained):
    """Each of the 3 layers rounds inputs, weights and sums to 8 bits (2^-9 of each): some percent of a gradient."""
    config, params, x, (loss, gradient) = trained
    config = dataclasses.replace(config, dtype="bfloat16")
    out = jax.eval_shape(Transformer(config).apply, {"params": params}, x)[0]
    assert out.dtype == jnp.bfloat16
    boxed = jax.eval_shape(Transformer(config).init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(boxed)} == {jnp.dtype("float32")}
    other, other_gradient = loss_and_gradient(config, params, x)
    np.testing.assert_allclose(other, loss, rtol=1e-2)
    assert float(other) != float(loss)
    for ours, exact in zip(jax.tree.leaves(other_gradient), jax.tree.leaves(gradient), strict=True):
        assert ours.dtype == jnp.float32
        assert np.linalg.norm(ours - exact) < 0.05 * np.linalg.norm(exact)


# One config for each way in which positions enter, and cross-attention.
CACHED = {
    "rotary": LLAMA,
    "t5": TransformerConfig(**SIZES, positions="t5", num_buckets=8, max_distance=9, attention_scale=1.0, norm="rms"),
    "local": TransformerConfig(**SIZES, attention="local", block_size=4, attention_bias=True),
    "relative_local": TransformerConfig(
        **SIZES, attention="local", block_size=4, positions="relative", max_distance=6, norm_position="post"
    ),
    "cross": TransformerConfig(**SIZES, cross_attention=True, positions="rotary"),
}


@pytest.fixture(scope="module", params=CACHED)
def stack(request):
    config = CACHED[request.param]
    inputs = {}
    if config.cross_attention:
        keep = np.arange(S) < np.array([[S], [4]])
        inputs = {"memory": jnp.asarray(normal(B, S, D)), "memory_mask": jnp.asarray(keep[:, None, None])}
    abstract = {name: jnp.zeros((1, *array.shape[1:]), array.dtype) for name, array in inputs.items()}
    params, x = random_params(config, **abstract), jnp.asarray(normal(B, T, D, seed=3))
    apply = jax.jit(lambda params, x, inputs: Transformer(config).apply({"params": params}, x, **inputs)[0])
    return config, params, x, inputs, apply, apply(params, x, inputs)


def test_cached_spans_equal_the_full_pass(stack):
    config, params, x, inputs, _, full = stack

    @jax.jit
    def step(params, x, cache, position):
        return Transformer(config).apply({"params": params}, x, cache=cache, position=position, **inputs)

    cache, layers, position = init_caches(config, B, T), unstack_layers(params), 0
    if config.cross_attention:
        inputs = inputs | {"memory": cross_caches(config, layers, inputs["memory"])}
    for span in (1, 1, 1, 1, 1, 1, 5, 1):  # the five cross a block of local attention
        out, cache = step(layers, x[:, position : position + span], cache, jnp.int32(position))
        np.testing.assert_allclose(out, full[:, position : position + span], atol=1e-4)
        position += span
    assert position == T


def test_a_mask_hides_padded_slots_of_the_cache():
    config, pad = LLAMA, 3  # rotary positions see distances only, so padding on the left changes nothing
    params, x = random_params(config), jnp.asarray(normal(B, T, D))
    full, _ = Transformer(config).apply({"params": params}, x)
    padded = jnp.concatenate([jnp.full((B, pad, D), 7.0), x], axis=1)
    slots = np.arange(T + pad)
    mask = (slots[None] <= slots[:, None]) & (slots[None] >= pad) | (slots[None] == slots[:, None])
    cache, variables = init_caches(config, B, T + pad), {"params": unstack_layers(params)}
    out, _ = Transformer(config).apply(
        variables, padded, cache=cache, position=jnp.int32(0), mask=jnp.asarray(mask)[None, None]
    )
    np.testing.assert_allclose(out[:, pad:], full, atol=1e-4)


def test_stochastic_depth_drops_branches_of_examples_and_rescales_the_others():
    rate, batch = 0.4, 64
    config = TransformerConfig(**SIZES | {"num_layers": 2}, stochastic_depth_rate=rate)
    params, x = random_params(config), jnp.asarray(normal(batch, 4, D))
    out, _ = Transformer(config).apply({"params": params}, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    candidates = [x]
    for layer, survival in enumerate((1 - rate / 2, 1 - rate)):
        layer_params = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        for name, module in (("attention", Attention(config)), ("mlp", MLP(config))):
            branch = []
            for candidate in candidates:
                y = Norm(epsilon=config.norm_epsilon).apply({"params": layer_params[f"{name}_norm"]}, candidate)
                y = module.apply({"params": layer_params[name]}, y, deterministic=True)
                branch.append(candidate + (y[0] if name == "attention" else y) / survival)
            candidates = candidates + branch
    final = jnp.stack([Norm(epsilon=config.norm_epsilon).apply({"params": params["norm"]}, y) for y in candidates])
    errors = np.abs(np.asarray(final - out[None])).max(axis=(2, 3))
    assert np.all(errors.min(axis=0) < 1e-4)
    chosen = errors.argmin(axis=0)
    first, second = np.mean(chosen & 1), np.mean(chosen >> 2 & 1)
    assert abs(first - (1 - rate / 2)) < 0.2
    assert abs(second - (1 - rate)) < 0.2


def test_rows_do_not_depend_on_their_neighbours_or_the_future(stack):
    _, params, x, inputs, apply, full = stack
    changed = x.at[1].set(7.0).at[0, 8:].add(1.0)
    other = apply(params, changed, inputs)
    np.testing.assert_array_equal(other[0, :8], full[0, :8])
    assert np.all(np.any(np.asarray(other[0, 8:] != full[0, 8:]), axis=-1))


def test_batch_equals_one_by_one():
    config = CACHED["t5"]
    params, x = random_params(config), normal(4, T, D)
    together = run(config, params, x)
    apply = jax.jit(lambda x: Transformer(config).apply({"params": params}, x)[0])
    for row in range(4):
        np.testing.assert_allclose(apply(x[row : row + 1])[0], together[row], atol=1e-5)


def test_local_attention_sees_its_own_block_and_the_one_before():
    config = dataclasses.replace(CACHED["local"], num_layers=1)
    params = random_params(config)
    influence = jax.jacobian(lambda x: Transformer(config).apply({"params": params}, x)[0].sum(-1))
    seen = np.any(np.asarray(jax.jit(influence)(jnp.asarray(normal(1, T, D))))[0, :, 0] != 0, axis=-1)
    expected = [[k <= q and q // 4 - k // 4 <= 1 for k in range(T)] for q in range(T)]
    np.testing.assert_array_equal(seen, expected)


EVERYTHING = {
    "relative": TransformerConfig(
        **SIZES,
        attention_bias=True,
        attention_out_bias=True,
        cross_attention=True,
        gated_mlp=True,
        positions="relative",
        pitch_time=True,
    ),
    "t5": TransformerConfig(**SIZES, attention="full", positions="t5", norm="rms"),
    "rotary": dataclasses.replace(LLAMA, attention_bias=True, mlp_bias=True),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_array_has_axes_that_every_table_knows(name, monkeypatch):
    config, activations = EVERYTHING[name], []

    def record(x, axes):
        assert len(axes) == x.ndim
        activations.extend(axes)
        return x

    monkeypatch.setattr(nn, "with_logical_constraint", record)
    inputs = {"pitches": jnp.zeros((1, T), jnp.int32)} if config.pitch_time else {}
    inputs |= {"memory": jnp.zeros((1, S, D))} if config.cross_attention else {}
    boxed = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, T, D)), **inputs)["params"]
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    assert all(isinstance(leaf, nn.Partitioned) for leaf in leaves)
    assert all(len(leaf.names) == leaf.value.ndim for leaf in leaves)
    names = {axis for leaf in leaves for axis in leaf.names} | set(activations)
    for rules in sharding.TABLES.values():
        assert names - {None} <= set(rules)
    specs = nn.get_partition_spec(boxed)
    attention, mlp = specs["layers"]["attention"], specs["layers"]["mlp"]
    assert attention["query"]["kernel"] == PartitionSpec("layers", "embed", "heads", "head_dim")
    assert attention["out"]["kernel"] == PartitionSpec("layers", "heads", "head_dim", "embed")
    assert mlp["down"]["kernel"] == PartitionSpec("layers", "mlp", "embed")
    if config.pitch_time:
        first = specs["first_layer"]["attention"]
        assert first["pitch_embeddings"] == PartitionSpec("heads", "relative", "head_dim")
    assert activations.count("act_batch") > 4


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"remat_policy": "save_all"}, "remat_policy 'save_all' is not one of .*nothing_saveable"),
        ({"pitch_time": True}, "pitch_time needs .* got positions='none', attention='causal'"),
        ({"pitch_time": True, "positions": "relative", "attention": "local"}, "pitch_time needs .*attention='local'"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be None or at least 1, got 0"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\), got 1.0"),
        ({"num_heads": 5}, "embed_dim 32 is not a multiple of num_heads 5"),
        ({"positions": "rotary", "head_dim": 7}, "rotary positions need an even head_dim, got 7"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"positions": "relative", "attention": "full"}, "causal attention, got attention='full'"),
        ({"positions": "relative", "attention_scale": 2.0}, "got attention_scale=2.0, attention_implementation='auto'"),
        ({"positions": "relative", "attention_implementation": "xla"}, "attention_implementation='xla'"),
        ({"positions": "relative", "num_kv_heads": 2}, "no grouped heads, got num_kv_heads=2"),
    ],
)
def test_impossible_configs_are_errors(fields, match):
    with pytest.raises(ValueError, match=match):
        TransformerConfig(**(SIZES | fields))


def call(config, cache=None, **inputs):
    x, position = jnp.zeros((1, 2, D)), None if cache is None else jnp.int32(0)
    model = Transformer(dataclasses.replace(config, num_layers=1))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), x, cache=cache, position=position, **inputs))


def test_memory_and_cross_attention_go_together():
    with pytest.raises(ValueError, match="cross_attention=True does not go with memory of shape None"):
        call(CACHED["cross"])
    with pytest.raises(ValueError, match=r"cross_attention=False .* memory of shape \(1, 7, 32\)"):
        call(LLAMA, memory=jnp.zeros((1, S, D)))
    cross = dataclasses.replace(CACHED["cross"], num_layers=1)
    with pytest.raises(ValueError, match=r"cross_caches of the memory, got an array of shape \(1, 7, 32\)"):
        call(cross, init_caches(cross, 1, 4), memory=jnp.zeros((1, S, D)))
    with pytest.raises(ValueError, match="the memory is one array, got a tuple"):
        call(cross, memory=init_caches(cross, 1, S))
    with pytest.raises(ValueError, match="1 layers needs as many cross_caches, got 2"):
        call(cross, init_caches(cross, 1, 4), memory=init_caches(cross, 1, S) * 2)


def test_what_a_mode_cannot_honour_is_an_error():
    mask = jnp.ones((1, 1, 2, 2), bool)
    with pytest.raises(ValueError, match="relative attention is causal and takes no mask"):
        call(CACHED["relative_local"], mask=mask)
    cache = init_caches(LLAMA, 1, 4)[:1]
    with pytest.raises(ValueError, match="a stack of 1 layers needs as many caches, got 2"):
        call(LLAMA, cache * 2)
    relative = CACHED["relative_local"]
    with pytest.raises(ValueError, match="relative attention is causal and takes no mask"):
        call(relative, init_caches(relative, 1, 4), mask=mask)
    with pytest.raises(ValueError, match="deterministic=False"):
        call(LLAMA, cache, deterministic=False)
    with pytest.raises(ValueError, match="attention='full'"):
        call(dataclasses.replace(LLAMA, attention="full"), cache)


@pytest.mark.parametrize("lengths", [(9,), (1,) * 9, (4, 5), (2, 7)])
def test_sliding_cache_equals_the_full_pass_in_pieces_of_any_size(lengths):
    config = TransformerConfig(
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        mlp_dim=32,
        window=4,
        positions="rotary",
        layer_scale=0.5,
        final_norm=False,
    )
    x = jax.random.normal(jax.random.key(1), (2, 9, 16))
    stack = Transformer(config)
    params = nn.meta.unbox(stack.init(jax.random.key(0), x))["params"]
    assert "norm" not in params
    expected, _ = stack.apply({"params": params}, x)
    far = stack.apply({"params": params}, x.at[:, 0, 0].add(1.0))[0]
    np.testing.assert_array_equal(far[:, 7:], expected[:, 7:])  # two layers see 3 positions back each
    assert np.abs(far[:, 6] - expected[:, 6]).max() > 1e-4
    unstacked = {"params": unstack_layers(params)}
    np.testing.assert_allclose(stack.apply(unstacked, x)[0], expected, atol=1e-5)
    cache, start, pieces = init_caches(config, 2, 100), 0, []
    for length in lengths:
        y, cache = stack.apply(unstacked, x[:, start : start + length], cache=cache, position=jnp.int32(start))
        pieces.append(y)
        start += length
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), expected, atol=1e-5)
