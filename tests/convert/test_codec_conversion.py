"""Codecs between HuggingFace's folders, their authors' files and ours, and what is wrong with those refused."""

import dataclasses
import json
import pathlib
import re

import codec_peers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from codec_parity import encode, load, model_of, noise
from encodec_peer import encodec_package
from flax.traverse_util import flatten_dict

from jaxaudio.convert import codec as codec_module
from jaxaudio.convert import codec_read
from jaxaudio.convert.codec import CodecCheckpoint, ConvertError, convert_codec, is_codec, load_codec, save_codec
from jaxaudio.models import dac, encodec, mimi, soundstream

PEERS = [("encodec", name) for name in codec_peers.ENCODEC]
PEERS += [("dac", name) for name in codec_peers.DAC] + [("mimi", name) for name in codec_peers.MIMI]
CLASSES = {"encodec": transformers.EncodecModel, "dac": transformers.DacModel, "mimi": transformers.MimiModel}
PRESETS = {"encodec": encodec.PRESETS, "dac": dac.PRESETS, "mimi": mimi.PRESETS}

AUDIOCRAFT = """
compression_model: encodec
sample_rate: 32000
channels: 1
encodec: {autoencoder: seanet, quantizer: rvq, sample_rate: '${sample_rate}', channels: '${channels}', causal: false,
  renormalize: false}
seanet: {dimension: 12, channels: '${channels}', causal: '${encodec.causal}', n_filters: 4, n_residual_layers: 2,
  ratios: [5, 3, 2], activation: ELU, activation_params: {alpha: 1.0}, norm: weight_norm, norm_params: {},
  kernel_size: 7, residual_kernel_size: 3, last_kernel_size: 7, dilation_base: 2, pad_mode: constant, true_skip: true,
  compress: 2, lstm: 2, disable_norm_outer_blocks: 0, encoder: {},
  decoder: {trim_right_ratio: 1.0, final_activation: null, final_activation_params: null}}
rvq: {n_q: 4, q_dropout: false, bins: 16, decay: 0.99}
"""
KYUTAI = {
    "channels": 1,
    "sample_rate": 24000,
    "frame_rate": 2000.0,
    "seanet": {
        "channels": 1, "dimension": 16, "causal": True, "n_filters": 4, "n_residual_layers": 1, "activation": "ELU",
        "compress": 2, "dilation_base": 2, "disable_norm_outer_blocks": 0, "kernel_size": 7, "residual_kernel_size": 3,
        "last_kernel_size": 3, "norm": "none", "pad_mode": "constant", "ratios": [3, 2], "true_skip": True,
    },
    "quantizer": {"dimension": 8, "n_q": 5, "bins": 16, "input_dimension": 16, "output_dimension": 16},
    "transformer": {
        "d_model": 16, "num_heads": 2, "num_layers": 2, "causal": True, "layer_scale": 0.01, "context": 7,
        "conv_layout": True, "max_period": 10000, "gating": "none", "norm": "layer_norm", "dim_feedforward": 24,
        "positional_embedding": "rope", "input_dimension": 16, "output_dimensions": [16],
    },
}  # fmt: skip


def make(kind: str, name: str):
    return getattr(codec_peers, f"make_{kind}")(name)


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    """A folder of transformers' for each kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in CLASSES}
    for kind, name in (("encodec", "encodec_24khz"), ("dac", "odd"), ("mimi", "mimi")):
        make(kind, name).save_pretrained(folders[kind])
    return folders


def assert_equal_trees(one, other, tolerance=0.0):
    one, other = flatten_dict(one, sep="/"), flatten_dict(other, sep="/")
    assert one.keys() == other.keys()
    for path, array in one.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, other[path], rtol=tolerance, atol=tolerance, err_msg=path)


@pytest.mark.parametrize(("kind", "name"), PEERS)
def test_round_trip_is_exact_and_transformers_reads_it(kind, name, tmp_path):
    peer = make(kind, name)
    checkpoint = load(peer, tmp_path / "hf")
    done = convert_codec(tmp_path / "hf", tmp_path / "ours")
    assert (done.source_layout, done.layout, done.kind) == ("hf", "jaxaudio", kind)
    assert json.loads((tmp_path / "ours/config.json").read_text()).keys() == {"kind", "name", "config"}
    ours = load_codec(tmp_path / "ours", kind=kind)
    assert (ours.kind, ours.config, ours.name) == (kind, checkpoint.config, checkpoint.name)
    assert_equal_trees(ours.params, checkpoint.params)
    done = convert_codec(tmp_path / "ours", tmp_path / "back")
    assert (done.source_layout, done.layout) == ("jaxaudio", "hf")
    assert_equal_trees(load_codec(tmp_path / "back").params, checkpoint.params)

    back, info = CLASSES[kind].from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    waveform = torch.tensor(noise(peer.config.audio_channels if kind != "dac" else 1, 300)[:1].swapaxes(1, 2))
    with torch.no_grad():
        one, other = peer(waveform), back.eval()(waveform)
    assert torch.equal(one.audio_codes, other.audio_codes)
    torch.testing.assert_close(one.audio_values, other.audio_values, rtol=0, atol=1e-5)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "back")
    assert extractor.sampling_rate == checkpoint.config.sample_rate


def test_weight_norm_in_both_spellings_and_none(tmp_path):
    """HuggingFace's folders have had all three; a DAC may come with it."""
    peer = make("dac", "even")
    plain = load(peer, tmp_path / "plain")
    peer.apply_weight_norm()
    state = peer.state_dict()
    assert any(name.endswith("conv_t1.parametrizations.weight.original0") for name in state)
    new = load(peer, tmp_path / "new")
    assert_equal_trees(new.params, plain.params, 1e-6)
    names = ((".parametrizations.weight.original0", ".weight_g"), (".parametrizations.weight.original1", ".weight_v"))
    tensors = safetensors.torch.load_file(tmp_path / "new/model.safetensors")
    for one, other in names:
        tensors = {name.replace(one, other): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "new/model.safetensors", {"format": "pt"})
    assert_equal_trees(load_codec(tmp_path / "new").params, new.params)


def test_transposed_convolutions_have_norms_of_inputs(hf_folders):
    """Folded by hand from lengths that are not those of the directions."""
    tensors = safetensors.torch.load_file(hf_folders["encodec"] / "model.safetensors")
    rng = np.random.default_rng(3)
    pair = ["decoder.layers.3.conv.parametrizations.weight.original0", None]
    pair[1] = pair[0].replace("original0", "original1")
    assert tensors[pair[0]].shape == (32, 1, 1)
    lengths = rng.uniform(0.5, 2, 32)
    folder = hf_folders["encodec"].with_name("scaled")
    folder.mkdir()
    (folder / "config.json").write_text((hf_folders["encodec"] / "config.json").read_text())
    tensors[pair[0]] = torch.tensor(lengths, dtype=torch.float32)[:, None, None]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    kernel = load_codec(folder).params["decoder"]["stage_0"]["up"]["kernel"]  # (K, I, O)
    direction = tensors[pair[1]].double().numpy()
    for channel in range(32):
        by_hand = lengths[channel] * direction[channel] / np.sqrt((direction[channel] ** 2).sum())
        np.testing.assert_allclose(kernel[:, channel], by_hand.T, rtol=1e-6)


@pytest.mark.parametrize("preset", ["encodec_24khz", "encodec_48khz"])
def test_files_of_encodec(preset, tmp_path):
    """The package's own models, which have the two published sizes."""
    package = encodec_package()
    torch.manual_seed(1)
    original = getattr(package.model.EncodecModel, preset.replace("encodec", "encodec_model"))(pretrained=False)
    for layer in original.quantizer.vq.layers:
        layer._codebook.embed.normal_()
        layer._codebook.inited.fill_(1)
    torch.save(original.state_dict(), tmp_path / f"{preset}-0123.th")
    checkpoint = load_codec(tmp_path)  # the one file in it
    assert (checkpoint.kind, checkpoint.config, checkpoint.name) == ("encodec", encodec.PRESETS[preset], preset)
    convolution = original.decoder.model[3].convtr.convtr
    with torch.no_grad():
        weight = convolution.weight
        if preset == "encodec_24khz":
            weight = torch._weight_norm(convolution.weight_v, convolution.weight_g, 0)
    kernel = checkpoint.params["decoder"]["stage_0"]["up"]["kernel"]
    np.testing.assert_allclose(kernel, weight.detach().numpy().transpose(2, 0, 1), rtol=1e-5, atol=1e-7)
    lstm = original.encoder.model[13].lstm
    bias = (lstm.bias_ih_l1 + lstm.bias_hh_l1).detach().numpy()
    np.testing.assert_array_equal(checkpoint.params["encoder"]["lstm"]["layer_1"]["bias"], bias)


def test_names_of_encodec_are_the_tables(tmp_path):
    """Written from a model of transformers by other renames; loaded by the config beside, as audiocraft's are."""
    peer = make("encodec", "encodec_32khz")
    checkpoint = load(peer, tmp_path / "hf")
    content = {"best_state": codec_peers.encodec_file(peer), "xp.cfg": AUDIOCRAFT, "version": "1", "exported": True}
    torch.save(content, tmp_path / "compression_state_dict.bin")
    original = load_codec(tmp_path / "compression_state_dict.bin")
    bandwidths = (4 * 4 * 1067 / 1000,)
    assert original.name == "compression_state_dict"
    assert original.config == dataclasses.replace(checkpoint.config, bandwidths=bandwidths)
    assert_equal_trees(original.params, checkpoint.params)


def test_files_of_descript(tmp_path):
    peer = make("dac", "odd")
    checkpoint = load(peer, tmp_path / "hf")
    torch.save(codec_peers.dac_file(peer), tmp_path / "weights_16khz.pth")
    original = load_codec(tmp_path / "weights_16khz.pth", kind="dac")
    assert original.config == checkpoint.config
    assert_equal_trees(original.params, checkpoint.params, 1e-6)


@pytest.mark.parametrize("older", [False, True])
def test_files_of_kyutai(older, tmp_path):
    peer = make("mimi", "mimi")
    checkpoint = load(peer, tmp_path / "hf")
    tensors = codec_peers.mimi_file(peer)
    if older:
        renames = {"in_projs.0.weight": "in_proj_weight", "out_projs.0.weight": "out_proj.weight"}
        renames |= {"_initialized": "inited", "cluster_usage": "cluster_size", "embedding_sum": "embed_avg"}
        for new, old in renames.items():
            tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "tokenizer-0123-checkpoint125.safetensors")
    (tmp_path / "mimi_config.json").write_text(json.dumps(KYUTAI))
    original = load_codec(tmp_path)
    assert original.config == checkpoint.config
    assert_equal_trees(original.params, checkpoint.params)


def test_a_file_of_kyutai_without_config_is_the_published_model(tmp_path):
    path = tmp_path / "tokenizer-e351c8d8-checkpoint125.safetensors"
    safetensors.torch.save_file(codec_peers.mimi_file(make("mimi", "mimi")), path)
    with pytest.raises(ConvertError, match=r"decoder.model.0.conv.conv.bias has shape \(16,\), expected \(1024,\)"):
        load_codec(path)


@pytest.mark.parametrize("preset", [name for presets in PRESETS.values() for name in presets])
def test_published_sizes_survive_huggingface_configs(preset):
    kind, config = next((kind, presets[preset]) for kind, presets in PRESETS.items() if preset in presets)
    table = codec_read.TABLES[kind]
    assert table.read_config(table.hf_config(config), "") == config


def test_transformers_counts_our_codebooks():
    """It divides a bandwidth, in which rounding must not lose one."""
    preset = encodec.PRESETS["encodec_24khz"]
    for num_codebooks in range(1, 65):
        rvq = dataclasses.replace(preset.rvq, num_codebooks=num_codebooks)
        for sample_rate in (16000, 24000, 44100):
            config = dataclasses.replace(preset, sample_rate=sample_rate, rvq=rvq, bandwidths=())
            values = codec_read.TABLES["encodec"].hf_config(config)
            assert transformers.EncodecConfig(**values).num_quantizers == num_codebooks


@pytest.mark.parametrize("kind", CLASSES)
def test_defaults_of_transformers_are_the_published_sizes(kind):
    """An empty config has what its authors published first, DAC in the 16 kHz of its default."""
    hf = {"encodec": transformers.EncodecConfig, "dac": transformers.DacConfig, "mimi": transformers.MimiConfig}[kind]()
    read = codec_read.TABLES[kind].read_config
    assert read({}, "") == read(json.loads(hf.to_json_string()), "")
    expected = {"encodec": "encodec_24khz", "dac": "dac_44khz", "mimi": "mimi"}[kind]
    assert dataclasses.replace(read({}, ""), sample_rate=PRESETS[kind][expected].sample_rate) == PRESETS[kind][expected]


def test_a_trained_codec_is_saved_and_loaded(tmp_path):
    """JAX arrays with weight norm: what comes back gives the same codes."""
    preset = soundstream.PRESETS["soundstream_16khz"]
    seanet = dataclasses.replace(
        preset.seanet, num_filters=4, embed_dim=8, strides=(3,), dilations=(1,), weight_norm=True
    )
    rvq = dataclasses.replace(preset.rvq, num_codebooks=3, codebook_size=16, codebook_dim=8, embed_dim=8)
    config = dataclasses.replace(preset, seanet=seanet, rvq=rvq)
    model = soundstream.SoundStream(config)
    waveform = noise(1, 61)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(waveform), jnp.full(3, 3))["params"]
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, jnp.float32), shapes)
    save_codec(CodecCheckpoint("soundstream", config, params, "mine"), tmp_path / "mine")
    loaded = load_codec(tmp_path / "mine")
    assert (loaded.kind, loaded.name) == ("soundstream", "mine")
    assert loaded.config == dataclasses.replace(config, seanet=dataclasses.replace(seanet, weight_norm=False))
    expected = encode(model, params, waveform, 3)
    np.testing.assert_array_equal(encode(model_of(loaded), loaded.params, waveform, 3), expected)
    with pytest.raises(ConvertError, match="mine exists"):
        save_codec(loaded, tmp_path / "mine")
    save_codec(loaded, tmp_path / "mine", overwrite=True)
    with pytest.raises(ConvertError, match="transformers has no soundstream; it has encodec, dac, mimi"):
        convert_codec(tmp_path / "mine", tmp_path / "hf")
    del loaded.params["encoder"]["conv_in"]
    with pytest.raises(
        ConvertError, match=r"of mine .*\n  encoder/conv_in/bias is missing, expected with shape \(4,\)"
    ):
        save_codec(loaded, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def edited(source: pathlib.Path, folder: pathlib.Path, config: dict, edit) -> pathlib.Path:
    """The checkpoint with a changed config and changed tensors."""
    folder.mkdir()
    values = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


BIAS = "encoder.layers.0.conv.bias"
G, V = (f"encoder.layers.0.conv.parametrizations.weight.original{half}" for half in "01")
WEIGHT = "encoder.layers.0.conv.weight"
EMBED = "quantizer.layers.2.codebook"


@pytest.mark.parametrize(
    ("kind", "config", "edit", "message"),
    [
        (
            "encodec",
            {},
            lambda t: t.pop(BIAS),
            rf"{BIAS} is missing, expected with shape \(4,\) as encoder/conv_in/bias",
        ),
        ("encodec", {}, lambda t: t.update({BIAS: torch.zeros(5)}), rf"{BIAS} has shape \(5,\), expected \(4,\)"),
        ("encodec", {}, lambda t: t.update({BIAS: torch.zeros(4).int()}), rf"{BIAS} is int32, expected one of float32"),
        ("encodec", {}, lambda t: t.update(more=torch.zeros(2)), r"more of shape \(2,\) is not one of the codec's"),
        ("encodec", {}, lambda t: t.pop(G), f"{V} is there without the other half"),
        (
            "encodec",
            {},
            lambda t: t.update({G: torch.zeros(1, 1, 7)}),
            rf"{G} has shape \(1, 1, 7\), expected one norm",
        ),
        ("encodec", {}, lambda t: t.update({WEIGHT: torch.zeros(4, 1, 7)}), f"{WEIGHT} is there twice, as one tensor"),
        ("encodec", {}, lambda t: t[f"{EMBED}.inited"].zero_(), f"{EMBED}.inited .* was never trained"),
        ("encodec", {}, lambda t: t.pop(f"{EMBED}.embed"), f"{EMBED}.embed is missing"),
        ("encodec", {}, lambda t: t.pop("encoder.layers.10.lstm.bias_hh_l1"), "expected two biases .*lstm.bias_ih_l1"),
        ("encodec", {"num_filters": 6}, lambda t: None, r"conv.weight has shape \(32, 12, 7\), expected \(48, 12, 7\)"),
        ("encodec", {"num_filters": "6"}, lambda t: None, "num_filters is '6', expected a int such as 32"),
        ("encodec", {"pad_mode": "circular"}, lambda t: None, "pad_mode is 'circular', expected one of 'constant'"),
        ("encodec", {"norm_type": "none"}, lambda t: None, "norm_type is 'none', expected one of 'weight_norm'"),
        ("encodec", {"trim_right_ratio": 0.5}, lambda t: None, "trim_right_ratio is 0.5, but our codecs have 1.0"),
        ("encodec", {"codebook_dim": 3}, lambda t: None, "codebook_dim 3 is not embed_dim 12"),
        ("encodec", {"target_bandwidths": []}, lambda t: None, "describes no codec of ours: IndexError"),
        ("dac", {"hidden_size": 7}, lambda t: None, "hidden_size is 7, but our codecs have 32"),
        ("dac", {"decoder_hidden_size": 20}, lambda t: None, "3 stages cannot halve 20 channels each"),
        ("mimi", {"attention_bias": True}, lambda t: None, "attention_bias is True, but our codecs have False"),
        ("mimi", {"frame_rate": 1700.0}, lambda t: None, "1700.0 frames a second are no whole number of 6 samples"),
        ("mimi", {}, lambda t: t.pop("downsample.conv.weight"), r"downsample.conv.weight .* \(16, 16, 4\)"),
        (
            "mimi",
            {},
            lambda t: t.pop("quantizer.acoustic_residual_vector_quantizer.layers.1.codebook.cluster_usage"),
            "layers.1.codebook has .*, expected the sums of its vectors and their counts",
        ),
    ],
)
def test_errors_name_the_tensor_or_field(kind, config, edit, message, hf_folders, tmp_path):
    folder = edited(hf_folders[kind], tmp_path / "edited", config, edit)
    with pytest.raises(ConvertError, match=message):
        load_codec(folder)


def test_errors_of_files(hf_folders, tmp_path):
    def refused(content, message, name="model.bin"):
        torch.save(content, tmp_path / name)
        with pytest.raises(ConvertError, match=message):
            load_codec(tmp_path / name)

    refused({"conv.weight": torch.zeros(2)}, "expected Descript's 'metadata' .* got conv.weight")
    refused([1], "expected tensors by name, got list")
    refused({"pretrained": "facebook/encodec_32khz"}, "only names another model, 'facebook/encodec_32khz'")
    refused({"xp.cfg": "a: [", "best_state": {}}, "xp.cfg is no YAML")
    refused({"xp.cfg": "transformer_lm: {}", "best_state": {}}, "config of an EnCodec, but it has no encodec, rvq")
    refused({"xp.cfg": AUDIOCRAFT.replace("ELU", "ReLU"), "best_state": {}}, "activation is 'ReLU', but our codecs")
    refused({"xp.cfg": AUDIOCRAFT, "best_state": 3}, "expected tensors by name, got int")
    refused({"metadata": {"kwargs": {"encoder_dim": 4}}, "state_dict": {}}, "expected the arguments codebook_dim, .*")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "tokenizer-a.safetensors")
    with pytest.raises(ConvertError, match=r"no Mimi of Kyutai's: expected quantizer.rvq_first.\*, got a"):
        load_codec(tmp_path / "tokenizer-a.safetensors")
    (tmp_path / "notes.txt").write_text("no codec")
    with pytest.raises(ConvertError, match="notes.txt: expected a name ending in .safetensors or .th"):
        load_codec(tmp_path / "notes.txt")
    with pytest.raises(ConvertError, match="is of kind 'dac', expected 'mimi'"):
        load_codec(hf_folders["dac"], kind="mimi")
    with pytest.raises(ConvertError, match="'nowhere' is no file or folder, no id .* these are encodec_24khz"):
        load_codec("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConvertError, match="it has model_type None and holds nothing"):
        load_codec(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text('{"kind": "opus"}')
    with pytest.raises(ConvertError, match="kind is 'opus', expected one of 'encodec', 'dac', 'mimi', 'soundstream'"):
        load_codec(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text('{"kind": "dac", "config": {"sample_rate": 1}}')
    with pytest.raises(ConvertError, match="config: missing seanet, rvq"):
        load_codec(tmp_path / "empty")
    with pytest.raises(ConvertError, match="out.pt is the name of a file"):
        convert_codec(hf_folders["dac"], tmp_path / "out.pt")


def test_pickles_that_run_code_are_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "harm",)

    torch.save({"state_dict": Harm(), "metadata": {}}, tmp_path / "weights.pth")
    with pytest.raises(ConvertError, match="is refused"):
        load_codec(tmp_path / "weights.pth")
    assert not (tmp_path / "harm").exists()


def test_hub_ids_fetch_only_the_codec(hf_folders, tmp_path, monkeypatch):
    asked = []

    def fetch(repository, files, fallback=()):
        asked.append((repository, [*files, *fallback]))
        return {"facebook/encodec_24khz": hf_folders["encodec"], "kyutai/moshiko": tmp_path}[repository]

    monkeypatch.setattr(codec_module, "fetch_folder", fetch)
    loaded = load_codec("facebook/encodec_24khz")
    assert (loaded.kind, loaded.name) == ("encodec", "encodec_24khz")
    assert asked[0] == ("facebook/encodec_24khz", ["config.json"])
    assert {"model.safetensors", "pytorch_model.bin"} <= set(asked[1][1])
    (tmp_path / "config.json").write_text('{"model_type": "moshi"}')
    with pytest.raises(ConvertError, match="it has model_type 'moshi'"):
        load_codec("kyutai/moshiko")
    assert "model.safetensors" not in asked[-1][1]
    assert "tokenizer-*.safetensors" in asked[-1][1]
    assert is_codec("facebook/encodec_24khz")
    assert not is_codec("kyutai/moshiko")


def test_what_is_a_codec(hf_folders, tmp_path):
    assert all(is_codec(folder) for folder in hf_folders.values())
    assert not is_codec(tmp_path)
    assert not is_codec("tiny")
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    assert not is_codec(tmp_path)
    (tmp_path / "weights.pth").touch()
    assert is_codec(tmp_path)
    assert is_codec(tmp_path / "weights.pth")


def test_half_precision_is_read_as_float32(hf_folders, tmp_path):
    def halve(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(torch.bfloat16 if re.search("conv.*weight", name) else torch.float16)

    folder = edited(hf_folders["mimi"], tmp_path / "half", {}, halve)
    exact = load_codec(hf_folders["mimi"]).params["encoder"]["conv_in"]["kernel"]
    kernel = load_codec(folder).params["encoder"]["conv_in"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, torch.tensor(exact).bfloat16().float().numpy())
