"""EnCodec's language model beside the public package's, all frames at once and one by one, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encodec_lm
import torch
from encodec_peer import encodec_package

from jaxaudio import sharding
from jaxaudio.convert.encodec_lm import load_encodec_lm, main
from jaxaudio.convert.tensors import ConvertError
from jaxaudio.data.entropy_coder import load_entropy_coder
from jaxaudio.models.encodec_lm import PRESETS, EncodecLM, EncodecLMConfig, init_cache
from jaxaudio.nn.transformer import Transformer, unstack_layers
from jaxaudio.nn.transformer_config import TransformerConfig
from jaxaudio.ops.losses import cross_entropy

Q, C, D, N, F, L, PAST = 4, 19, 16, 2, 64, 2, 5
FRAME_RATE = 1.5  # of which PAST frames are 3.5 s, rounded down
B, T = 2, 13


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    lm = encodec_package().model.LMModel(Q, C, D, num_heads=N, num_layers=L, past_context=PAST).eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            center = 1.0 if ".norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(center + 0.3 * torch.randn(parameter.shape))
    return lm


@pytest.fixture(scope="module")
def file(peer, tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "encodec_lm_random.th"
    torch.save(peer.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def ours(file):
    config, params = load_encodec_lm(file, frame_rate=FRAME_RATE, num_heads=N)
    assert config == EncodecLMConfig(Q, C, PAST, num_layers=L, embed_dim=D, num_heads=N, mlp_dim=F)
    return EncodecLM(config), jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def run(ours):
    """Logits of (inputs, offset, num_levels)."""
    model, params = ours

    @jax.jit
    def run(inputs, offset, num_levels):
        return model.apply({"params": params}, inputs, offset=offset, num_levels=num_levels)[0]

    return run


def make_inputs(num_codebooks=Q):
    codes = np.random.default_rng(1).integers(0, C, (B, num_codebooks, T))
    return jnp.asarray(tiny_encodec_lm.shifted(codes), jnp.int32)


def log_probabilities(lm, inputs, **options):
    with torch.no_grad():
        probabilities, *state = lm(torch.from_numpy(np.array(inputs)).long(), **options)
    return probabilities.log().permute(0, 2, 3, 1).numpy(), state


@pytest.mark.parametrize(("num_codebooks", "offset"), [(Q, 0), (2, 1000)])
def test_equals_the_public_model(peer, run, num_codebooks, offset):
    inputs = make_inputs(num_codebooks)
    expected, _ = log_probabilities(peer, inputs, offset=offset)
    logits = run(inputs, jnp.full(B, offset), jnp.full(B, num_codebooks))
    np.testing.assert_allclose(jax.nn.log_softmax(logits), expected, atol=1e-4)


def test_frame_by_frame_equals_the_public_model(peer, ours):
    """Beyond the window, so that the zero vector before the first frame is seen, and then is not."""
    model, params = ours
    inputs = make_inputs()
    unstacked = unstack_layers(params)
    step = jax.jit(functools.partial(model.apply, {"params": unstacked}))
    cache, states, offset = init_cache(model.config, unstacked, B), None, 0
    for t in range(T):
        expected, (states, offset) = log_probabilities(peer, inputs[..., t : t + 1], states=states, offset=offset)
        logits, cache = step(inputs[..., t : t + 1], cache=cache, position=jnp.int32(t))
        np.testing.assert_allclose(jax.nn.log_softmax(logits), expected, atol=1e-4, err_msg=f"frame {t}")


def test_absent_codebooks_are_not_looked_at(run):
    inputs, zeros = make_inputs(), jnp.zeros(B, jnp.int32)
    logits = run(inputs, zeros, jnp.array([2, Q]))
    np.testing.assert_allclose(logits[0, :2], run(inputs[:, :2], zeros, jnp.full(B, 2))[0], atol=1e-5)
    np.testing.assert_allclose(logits[1], run(inputs, zeros, jnp.full(B, Q))[1], atol=1e-5)


def test_gradients_reach_every_parameter(ours):
    model, params = ours
    inputs = make_inputs()

    def loss(params):
        logits, _ = model.apply({"params": params}, inputs)
        return cross_entropy(logits, (inputs * 7) % C, jnp.ones(inputs.shape, bool))[0]

    grads = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params))
    assert not [jax.tree_util.keystr(path) for path, grad in grads if not np.abs(grad).max() > 0]


@pytest.mark.slow
def test_every_table_of_axes_gives_the_same_loss(ours):
    model, params = ours
    inputs = np.tile(make_inputs(), (4, 1, 1))

    @jax.jit
    def loss(params, inputs):
        logits, _ = model.apply({"params": params}, inputs)
        return cross_entropy(logits, (inputs * 7) % C, jnp.ones(inputs.shape, bool))[0]

    expected = loss(params, jnp.asarray(inputs))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, Q, 1), jnp.int32))["params"]
    for table, axes in {"DATA": "data:8", "FSDP": "data:2,fsdp:4", "TENSOR": "data:2,fsdp:2,model:2"}.items():
        mesh, rules = sharding.make_mesh(axes), sharding.TABLES[table]
        shardings = sharding.tree_shardings(boxed, mesh, rules)
        assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(shardings)) == (table != "DATA")
        with sharding.use(mesh, rules):
            placed = sharding.shard_batch({"inputs": inputs}, mesh, rules)["inputs"]
            np.testing.assert_allclose(loss(jax.device_put(params, shardings), placed), expected, rtol=1e-5)


@pytest.mark.parametrize(("preset", "millions"), [("encodec_24khz", 15.56), ("encodec_48khz", 8.99)])
def test_sizes_of_the_published_models(preset, millions):
    config = PRESETS[preset]
    model = EncodecLM(config)
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, config.num_codebooks, 1), jnp.int32))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6, 2) == millions
    assert config.past_frames == {"encodec_24khz": 262, "encodec_48khz": 525}[preset]


def test_refused_inputs_and_configs(ours):
    model, params = ours
    with pytest.raises(ValueError, match="5 codebooks of codes; the language model has 4"):
        model.apply({"params": params}, jnp.zeros((1, 5, 3), jnp.int32))
    with pytest.raises(ValueError, match="zero_key needs .*'full'"):
        TransformerConfig(1, 8, 2, 8, zero_key=True, attention="full")
    stack = Transformer(model.config.transformer)
    with pytest.raises(ValueError, match=r"zero_key attention .* takes no mask, got one of shape \(1, 1, 3, 3\)"):
        stack.apply({"params": params["transformer"]}, jnp.zeros((1, 3, D)), mask=jnp.ones((1, 1, 3, 3), bool))


def test_command_makes_an_entropy_coder(file, tmp_path, capsys):
    main([str(file), str(tmp_path), "--frame-rate", "1.5"])
    assert "entropy.safetensors" in capsys.readouterr().out
    coder = load_entropy_coder(tmp_path)
    assert (coder.name, coder.model.past_frames, coder.model.num_heads) == ("encodec_lm_random", PAST, 8)
    codes = tiny_encodec_lm.random_codes(T, codebooks=Q, codes=C)
    np.testing.assert_array_equal(coder.decode(coder.encode(codes), Q, T), codes)


def test_widths_that_do_not_split(file):
    with pytest.raises(ConvertError, match="its width 16 is not a multiple of num_heads=3"):
        load_encodec_lm(file, frame_rate=75.0, num_heads=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("emb.1.weight"), "emb.3.weight is not one of its tensors"),
        (lambda state: state.pop("transformer.layers.0.norm1.bias"), r"norm1.bias is missing, expected with .*\(16,\)"),
        (lambda state: state.update({"linears.0.bias": torch.zeros(3)}), r"shape \(3,\), expected \(19,\)"),
        (lambda state: state.update({"extra": torch.zeros(3)}), "extra is not one of its tensors"),
        (lambda state: [state.pop(name) for name in list(state)[1:]], "expected the matrices emb.0.weight"),
    ],
)
def test_other_files_are_refused(peer, tmp_path, change, message):
    state = dict(peer.state_dict())
    change(state)
    torch.save(state, tmp_path / "other.th")
    with pytest.raises(ConvertError, match=message):
        load_encodec_lm(tmp_path / "other.th", frame_rate=75.0, num_heads=N)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save(print, tmp_path / "code.th")
    with pytest.raises(ConvertError, match="code.th is refused"):
        load_encodec_lm(tmp_path / "code.th", frame_rate=75.0)
