"""Whisper's checkpoints between three layouts, bit for bit, and the logits of openai-whisper and transformers."""

import base64
import dataclasses
import functools
import gzip
import json
import pathlib
import struct

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import whisper
import whisper_peers
from flax.traverse_util import flatten_dict
from whisper_small import BYTES, SMALL

from jaxaudio.config import to_json
from jaxaudio.convert import whisper_names
from jaxaudio.convert.tensors import StoredTensor
from jaxaudio.convert.whisper import ConvertError, convert_whisper, load_whisper, save_whisper
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.models.whisper import SIZES, Whisper, WhisperConfig


@pytest.fixture(scope="module")
def hf_peer():
    return whisper_peers.make_hf(7, SMALL, BYTES.eot)


@pytest.fixture
def hf_folder(hf_peer, tmp_path):
    """A folder as transformers writes it, with our tokenizer's files."""
    folder = tmp_path / "hf"
    hf_peer.generation_config.alignment_heads = [list(head) for head in SMALL.alignment_heads]
    hf_peer.save_pretrained(folder)
    BYTES.save(folder)
    return folder


def save_openai(peer: whisper.model.Whisper, path: pathlib.Path) -> pathlib.Path:
    torch.save({"dims": dataclasses.asdict(peer.dims), "model_state_dict": peer.state_dict()}, path)
    return path


def inputs(config: WhisperConfig, batch_size: int = 2, length: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    mel = rng.normal(size=(batch_size, config.num_frames, config.num_mels)).astype(np.float32)
    return mel, rng.integers(0, config.vocab_size, (batch_size, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Whisper, params, mel, tokens):
    encoded = model.apply({"params": params}, mel, method="encode")
    return encoded, model.apply({"params": params}, mel, tokens)


def ours(checkpoint, mel, tokens):
    return forward(Whisper(checkpoint.config), checkpoint.params, jnp.asarray(mel), jnp.asarray(tokens))


def openai_outputs(peer, mel, tokens):
    with torch.no_grad():
        encoded = peer.encoder(torch.from_numpy(mel.swapaxes(1, 2)))
        return encoded.numpy(), peer.decoder(torch.from_numpy(tokens), encoded).numpy()


def hf_outputs(peer, mel, tokens):
    with torch.no_grad():
        features = torch.from_numpy(mel.swapaxes(1, 2).copy())
        out = peer(input_features=features, decoder_input_ids=torch.from_numpy(tokens).long())
    return out.encoder_last_hidden_state.numpy(), out.logits.numpy()


def assert_close(outputs, expected):
    for array, reference in zip(outputs, expected, strict=True):
        assert np.abs(reference).max() > 1
        np.testing.assert_allclose(np.asarray(array), reference, atol=1e-4, rtol=0)


def state_bytes(path: pathlib.Path) -> dict[str, tuple]:
    """Every tensor of a .pt file or a folder's safetensors: shape, dtype and bytes, read with torch."""
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)["model_state_dict"]
    else:
        state = {}
        for file in path.glob("*.safetensors"):
            state |= safetensors.torch.load_file(file)
    return {
        name: (tuple(t.shape), str(t.dtype), t.contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in state.items()
    }


@pytest.mark.parametrize("shape", whisper_peers.SHAPES)
def test_logits_equal_openai_whisper(shape, tmp_path):
    config = whisper_peers.SHAPES[shape]
    peer = whisper_peers.make_openai(1, config)
    checkpoint = load_whisper(save_openai(peer, tmp_path / "model.pt"), tokenizer=whisper_peers.tokenizer(config))
    mel, tokens = inputs(config)
    assert_close(ours(checkpoint, mel, tokens), openai_outputs(peer, mel, tokens))
    assert checkpoint.config == config
    assert checkpoint.dtype == "float32"


@pytest.mark.parametrize("shape", ["multilingual", "v3", "small"])
def test_logits_equal_transformers(shape, tmp_path):
    config = SMALL if shape == "small" else whisper_peers.SHAPES[shape]
    peer = whisper_peers.make_hf(2, config, BYTES.eot if shape == "small" else None)
    peer.save_pretrained(tmp_path / "hf")
    tokenizer = BYTES if shape == "small" else whisper_peers.tokenizer(config)
    checkpoint = load_whisper(tmp_path / "hf", tokenizer=tokenizer)
    assert checkpoint.config == dataclasses.replace(config, alignment_heads=None)
    mel, tokens = inputs(config)
    assert_close(ours(checkpoint, mel, tokens), hf_outputs(peer, mel, tokens))


def test_parameters_are_those_of_the_model():
    tokens, mel = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, SMALL.num_frames, SMALL.num_mels))
    abstract = jax.eval_shape(lambda: nn.meta.unbox(Whisper(SMALL).init(jax.random.key(0), mel, tokens)))
    flat = flatten_dict(abstract["params"], sep="/")
    zeros = {
        p.path: StoredTensor(p.shape, np.dtype(np.float16), lambda p=p: np.zeros(p.shape, np.float16))
        for p in whisper_names.parameters(SMALL)
    }
    tree = flatten_dict(whisper_names.to_tree(SMALL, zeros), sep="/")
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in tree.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in flat.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_huggingface_there_and_back(dtype, tmp_path):
    peer = whisper_peers.make_hf(3, SMALL, BYTES.eot).to(getattr(torch, dtype))
    peer.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    BYTES.save(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    done = convert_whisper(tmp_path / "hf", tmp_path / "ours")
    assert (done.source_layout, done.layout, done.dtype) == ("hf", "jaxaudio", dtype)
    done = convert_whisper(tmp_path / "ours", tmp_path / "back")
    assert (done.source_layout, done.layout, done.dtype) == ("jaxaudio", "hf", dtype)
    assert state_bytes(tmp_path / "back") == state_bytes(tmp_path / "hf")
    again = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert again.dtype == getattr(torch, dtype)
    if dtype == "float32":
        mel, tokens = inputs(SMALL)
        for array, expected in zip(hf_outputs(again, mel, tokens), hf_outputs(peer, mel, tokens), strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_openai_there_and_back(dtype, tmp_path):
    peer = whisper_peers.make_openai(4, SMALL, BYTES.eot).to(getattr(torch, dtype))
    peer.decoder.ln.float()  # dtypes may differ within a file
    source = save_openai(peer, tmp_path / "model.pt")
    done = convert_whisper(source, tmp_path / "hf", tokenizer=BYTES)
    assert (done.source_layout, done.layout, done.dtype) == ("openai", "hf", dtype)
    convert_whisper(tmp_path / "hf", tmp_path / "ours")
    convert_whisper(tmp_path / "ours", tmp_path / "back.pt")
    convert_whisper(source, tmp_path / "direct", layout="jaxaudio", tokenizer=BYTES)
    convert_whisper(tmp_path / "hf", tmp_path / "from_hf.pt")
    expected = state_bytes(source)
    assert state_bytes(tmp_path / "back.pt") == expected
    assert state_bytes(tmp_path / "from_hf.pt") == expected
    assert state_bytes(tmp_path / "direct") == state_bytes(tmp_path / "ours")
    dims = [torch.load(path, weights_only=True)["dims"] for path in (source, tmp_path / "back.pt")]
    assert dims[0] == dims[1]


def test_openai_whisper_loads_our_file(hf_folder, hf_peer, tmp_path):
    convert_whisper(hf_folder, tmp_path / "ours")
    convert_whisper(tmp_path / "ours", tmp_path / "model.pt")
    peer = whisper.load_model(str(tmp_path / "model.pt"), device="cpu")
    mel, tokens = inputs(SMALL)
    assert_close(openai_outputs(peer, mel, tokens), hf_outputs(hf_peer, mel, tokens))


def test_transformers_generates_like_openai_whisper_from_our_folder(tmp_path, monkeypatch):
    config = whisper_peers.MULTILINGUAL
    peer = whisper_peers.make_openai(8, config)
    monkeypatch.setattr(WhisperTokenizer, "save", lambda self, folder: None)  # tested with the tokenizer
    tokenizer = whisper_peers.tokenizer(config)
    convert_whisper(save_openai(peer, tmp_path / "model.pt"), tmp_path / "hf", tokenizer=tokenizer)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(tmp_path / "hf")
    assert (extractor.feature_size, extractor.n_samples, extractor.nb_max_frames) == (80, 480_000, 3000)
    mel = torch.from_numpy(inputs(config, batch_size=1)[0].swapaxes(1, 2).copy())
    options = whisper.DecodingOptions(language="de", without_timestamps=True, sample_len=8, fp16=False)
    expected = whisper.decode(peer, mel, options)[0]
    ids = model.generate(mel, language="de", task="transcribe", max_new_tokens=8)[0].tolist()
    assert ids[-len(expected.tokens) :] == expected.tokens


def test_a_stored_output_head_is_kept(hf_folder, tmp_path):
    state = safetensors.torch.load_file(hf_folder / "model.safetensors")
    assert "proj_out.weight" not in state
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"].clone()
    safetensors.torch.save_file(state, hf_folder / "model.safetensors", metadata={"format": "pt"})
    convert_whisper(hf_folder, tmp_path / "ours")
    convert_whisper(tmp_path / "ours", tmp_path / "back")
    assert state_bytes(tmp_path / "back") == state_bytes(hf_folder)


def test_what_only_transformers_reads_is_kept(hf_folder, tmp_path):
    config = json.loads((hf_folder / "config.json").read_text()) | {
        "apply_spec_augment": True,
        "median_filter_width": 9,
    }
    (hf_folder / "config.json").write_text(json.dumps(config))
    (hf_folder / "preprocessor_config.json").write_text('{"feature_size": 8, "dither": 0.5}')
    (hf_folder / "normalizer.json").write_text('{"colour": "color"}')
    convert_whisper(hf_folder, tmp_path / "ours")
    convert_whisper(tmp_path / "ours", tmp_path / "back")
    for name in ("config.json", "generation_config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((hf_folder / name).read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "normalizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf_folder / name).read_bytes()


def test_saved_parameters_come_back(hf_folder, tmp_path):
    checkpoint = load_whisper(hf_folder)
    assert checkpoint.config == SMALL
    params = jax.tree.map(jnp.asarray, checkpoint.params)
    save_whisper(tmp_path / "ours", SMALL, params, BYTES)
    again = load_whisper(tmp_path / "ours")
    assert (again.config, again.dtype, again.tokenizer) == (SMALL, "float32", BYTES)
    jax.tree.map(np.testing.assert_array_equal, again.params, checkpoint.params)
    save_whisper(tmp_path / "ours", SMALL, params, BYTES, "bfloat16", overwrite=True)
    again = load_whisper(tmp_path / "ours")
    assert again.dtype == "bfloat16"
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), checkpoint.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, rounded)


def test_a_training_run_is_read(hf_folder, tmp_path):
    """As an experiment leaves it: its config has a model among other things, its parameters were exported."""
    convert_whisper(hf_folder, tmp_path / "ours")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"seed": 3, "model": json.loads(to_json(SMALL)), "steps": 10}))
    with pytest.raises(ConvertError, match=r"run has no parameters.safetensors; write it with `jaxaudio export"):
        load_whisper(run)
    (tmp_path / "ours" / "parameters.safetensors").rename(run / "parameters.safetensors")
    with pytest.raises(ConvertError, match=r"run comes without a tokenizer .*openai/whisper-tiny of 51865"):
        load_whisper(run)
    checkpoint = load_whisper(run, tokenizer=hf_folder / "tokenizer.json")
    expected = load_whisper(hf_folder)
    assert checkpoint.config == SMALL
    jax.tree.map(np.testing.assert_array_equal, checkpoint.params, expected.params)


def test_pytorch_bin_is_read(hf_folder, hf_peer):
    expected = load_whisper(hf_folder)
    (hf_folder / "model.safetensors").unlink()
    torch.save(hf_peer.state_dict(), hf_folder / "pytorch_model.bin")
    jax.tree.map(np.testing.assert_array_equal, load_whisper(hf_folder).params, expected.params)


@pytest.mark.parametrize(
    ("size", "name", "heads"),
    [
        ("tiny", "x.pt", SIZES["tiny"].alignment_heads),
        ("tiny.en", "x.pt", SIZES["tiny.en"].alignment_heads),
        ("turbo", "x.pt", SIZES["turbo"].alignment_heads),
        ("large-v1", "large-v1.pt", SIZES["large-v1"].alignment_heads),
        ("large-v1", "large-v2.pt", SIZES["large-v2"].alignment_heads),
    ],
)
def test_published_alignment_heads_are_found(size, name, heads):
    from jaxaudio.convert.whisper_read import _published_heads

    config = dataclasses.replace(SIZES[size], alignment_heads=None)
    assert _published_heads(pathlib.Path(name), config) == heads
    assert _published_heads(pathlib.Path(name), dataclasses.replace(config, num_decoder_layers=2)) is None


def test_alignment_heads_are_those_of_openai_whisper():
    for size, packed in whisper._ALIGNMENT_HEADS.items():
        config = SIZES[size]
        mask = np.frombuffer(gzip.decompress(base64.b85decode(packed)), bool).reshape(-1, config.num_heads)
        assert len(mask) == config.num_decoder_layers, size
        assert config.alignment_heads == tuple(map(tuple, np.argwhere(mask).tolist())), size


def test_memory_is_one_tensor_above_the_model(hf_folder, monkeypatch):
    """No tensor is read before it is needed, and none twice."""
    reads = []
    original = whisper_names.Parameter.from_upstream

    def counted(self, tensor):
        return original(self, dataclasses.replace(tensor, read=lambda: reads.append(self.hf) or tensor.read()))

    monkeypatch.setattr(whisper_names.Parameter, "from_upstream", counted)
    from jaxaudio.convert.whisper_read import read_checkpoint

    checkpoint = read_checkpoint(hf_folder)
    assert reads == []
    whisper_names.to_tree(checkpoint.config, checkpoint.tensors)
    assert sorted(reads) == sorted(p.hf for p in whisper_names.parameters(SMALL))


def test_our_file_is_aligned_and_plain(hf_folder, tmp_path):
    convert_whisper(hf_folder, tmp_path / "ours")
    raw = (tmp_path / "ours" / "parameters.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    assert header["encoder/transformer/layers/1/attention/query/kernel"]["shape"] == [80, 5, 16]
    assert header["decoder/transformer/layers/0/cross_attention/out/kernel"]["shape"] == [5, 16, 80]
    assert header["encoder/conv1/kernel"]["shape"] == [3, 8, 80]
