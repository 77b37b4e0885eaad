"""What is wrong with a Whisper checkpoint is named, with what was found and what was expected."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch
import whisper_peers
from whisper_small import BYTES, SMALL

from jaxaudio.convert import whisper_read, whisper_write
from jaxaudio.convert.whisper import ConvertError, convert_whisper, load_whisper, save_whisper


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same model as a folder of HuggingFace's, as OpenAI's file and as a folder of ours."""
    root = tmp_path_factory.mktemp("checkpoints")
    peer = whisper_peers.make_openai(1, SMALL, BYTES.eot)
    torch.save({"dims": dataclasses.asdict(peer.dims), "model_state_dict": peer.state_dict()}, root / "model.pt")
    convert_whisper(root / "model.pt", root / "hf", tokenizer=BYTES)
    convert_whisper(root / "hf", root / "ours")
    return root


@pytest.fixture
def hf(checkpoints, tmp_path):
    return copied(checkpoints / "hf", tmp_path / "hf")


@pytest.fixture
def ours(checkpoints, tmp_path):
    return copied(checkpoints / "ours", tmp_path / "ours")


def copied(source, folder):
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change_config(folder, name="config.json", **values):
    config = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_tensors(folder, change, file="model.safetensors"):
    tensors = safetensors.numpy.load_file(folder / file)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / file)


def refuses(source, *parts, **options):
    """Asserts that loading fails with a message that has all parts."""
    with pytest.raises(ConvertError) as error:
        load_whisper(source, **options)
    for part in parts:
        assert re.search(part, str(error.value)), str(error.value)


def test_a_missing_tensor(hf):
    change_tensors(hf, lambda tensors: tensors.pop("model.decoder.layers.0.fc1.weight"))
    refuses(hf, r"model\.decoder\.layers\.0\.fc1\.weight is missing, expected with shape \(320, 80\)", str(hf))


def test_an_unexpected_tensor(hf):
    change_tensors(hf, lambda tensors: tensors.update({"model.encoder.layers.0.k.bias": np.zeros(3, np.float32)}))
    refuses(hf, r"model\.encoder\.layers\.0\.k\.bias of shape \(3,\) is not one of Whisper's tensors")


def test_a_misshapen_tensor(hf):
    change_tensors(hf, lambda tensors: tensors.update({"model.decoder.layer_norm.bias": np.zeros(81, np.float32)}))
    refuses(hf, r"model\.decoder\.layer_norm\.bias has shape \(81,\), expected \(80,\)")


def test_a_tensor_that_is_not_float(hf):
    change_tensors(hf, lambda tensors: tensors.update({"model.decoder.layer_norm.bias": np.zeros(80, np.int8)}))
    refuses(hf, r"model\.decoder\.layer_norm\.bias is int8, expected one of float32, float16, bfloat16")


def test_many_problems_are_counted(hf):
    change_tensors(hf, lambda tensors: [tensors.pop(name) for name in list(tensors) if "encoder.layers" in name])
    refuses(hf, r"encoder_layers is 2, but there are tensors of 0", r"and 19 more$")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_mel_bins", 9, r"encoder\.conv1\.weight has shape .80, 8, 3., expected .80, 9, 3., as num_mel_bins"),
        ("vocab_size", 9, r"embed_tokens\.weight has shape .*, as vocab_size is 9"),
        ("max_source_positions", 9, r"encoder\.embed_positions\.weight has shape .20, 80..*max_source_positions is 9"),
        ("max_target_positions", 9, r"decoder\.embed_positions\.weight has shape .12, 80..*max_target_positions is 9"),
        ("encoder_layers", 3, r"encoder_layers is 3, but there are tensors of 2"),
        ("decoder_layers", 2, r"decoder_layers is 2, but there are tensors of 1"),
        ("d_model", 160, r"config\.json: encoder_ffn_dim is 320, but our Whisper has 640"),
        ("encoder_attention_heads", 3, r"embed_dim 80 is not a multiple of num_heads 3.*encoder_attention_heads is 3"),
        ("decoder_attention_heads", 4, r"decoder_attention_heads is 4, but our Whisper has 5"),
        ("activation_function", "relu", r"activation_function is 'relu', but our Whisper has 'gelu'"),
        ("scale_embedding", True, r"scale_embedding is True, but our Whisper has False"),
        ("num_mel_bins", None, r"expected a whole number as num_mel_bins, got None"),
        ("d_model", "80", r"expected a whole number as d_model, got '80'"),
        ("model_type", "bert", r"expected config\.json to have model_type 'whisper'.*has model_type 'bert'"),
    ],
)  # fmt: skip
def test_config_and_tensors_disagree(hf, field, value, message):
    change_config(hf, **{field: value})
    refuses(hf, message)


def test_an_untied_output_head(hf):
    embedding = safetensors.numpy.load_file(hf / "model.safetensors")["model.decoder.embed_tokens.weight"]
    change_tensors(hf, lambda tensors: tensors.update({"proj_out.weight": embedding + 1}))
    refuses(hf, r"proj_out\.weight \(\d+, 80\) float32 is not model\.decoder\.embed_tokens\.weight")
    change_tensors(hf, lambda tensors: tensors.update({"proj_out.weight": embedding.astype(np.float16)}))
    refuses(hf, r"proj_out\.weight \(\d+, 80\) float16 is not")


def test_alignment_heads_of_a_teacher(hf):
    """A distilled model was published with heads of layers it does not have."""
    change_config(hf, "generation_config.json", alignment_heads=[[0, 1], [3, 2]])
    with pytest.warns(
        UserWarning, match=r"alignment_heads \(\(0, 1\), \(3, 2\)\) are not all within .* 1 layers of 5 heads"
    ):
        assert load_whisper(hf).config.alignment_heads is None
    change_config(hf, "generation_config.json", alignment_heads=[1, 2])
    refuses(hf, r"generation_config\.json: expected alignment_heads as pairs of a layer and a head, got \[1, 2\]")


def test_weights_that_are_not_there(hf, tmp_path):
    weights = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(weights[:1000])
    refuses(hf, r"model\.safetensors cannot be read")
    (hf / "model.safetensors").unlink()
    refuses(hf, r"has no weights: expected model\.safetensors, or model\.safetensors\.index\.json")
    index = hf / "model.safetensors.index.json"
    index.write_text("[]")
    refuses(hf, r"index\.json: expected a JSON object, got list")
    index.write_text("{}")
    refuses(hf, r"index\.json: expected a 'weight_map' of tensors to files, got None")
    index.write_text('{"weight_map": {"x": 3}}')
    refuses(hf, r"index\.json: expected a 'weight_map' of tensors to files, got \{'x': 3\}")
    index.write_text(json.dumps({"weight_map": {"model.encoder.conv1.bias": "model-00001-of-00001.safetensors"}}))
    refuses(hf, r"names the file model-00001-of-00001\.safetensors, which is missing")
    (hf / "config.json").write_text("{")
    refuses(hf, r"config\.json cannot be read")
    (hf / "config.json").unlink()
    refuses(hf, r"hf has no config\.json, .* it holds generation_config\.json")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", r"empty has no config\.json, .* it holds nothing")


def test_a_folder_of_ours_is_checked(ours):
    change_tensors(ours, lambda tensors: tensors.pop("encoder/conv2/bias"), "parameters.safetensors")
    refuses(ours, r"encoder/conv2/bias is missing, expected with shape \(80,\)")
    change_config(ours, model=json.loads((ours / "config.json").read_text())["model"] | {"num_frames": 80})
    refuses(ours, r"encoder/position_embedding has shape \(20, 80\), expected \(40, 80\), as num_frames is 80")
    change_config(ours, model={"num_mels": 8})
    refuses(ours, r"config\.json: model: missing vocab_size")
    change_config(ours, model={"n_mels": 8})
    refuses(ours, r"config\.json: model: n_mels: no such field")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dims, state: dims.update(n_mels=9), r"encoder\.conv1\.weight has shape \(80, 8, 3\).*as n_mels is 9"),
        (lambda dims, state: dims.update(n_audio_layer=4), r"n_audio_layer is 4, but there are tensors of 2"),
        (lambda dims, state: dims.update(n_text_state=64), r"dims: n_text_state is 64, but our Whisper has 80"),
        (lambda dims, state: dims.update(n_text_head=4), r"dims: n_text_head is 4, but our Whisper has 5"),
        (lambda dims, state: dims.pop("n_vocab"), r"dims: expected a whole number as n_vocab, got None"),
        (
            lambda dims, state: state.pop("decoder.ln.bias"),
            r"decoder\.ln\.bias is missing, expected with shape \(80,\)",
        ),
        (lambda dims, state: state.update(x=torch.zeros(2)), r"x of shape \(2,\) is not one of Whisper's tensors"),
    ],
)
def test_openai_files_are_checked(checkpoints, tmp_path, change, message):
    content = torch.load(checkpoints / "model.pt", weights_only=True)
    change(content["dims"], content["model_state_dict"])
    torch.save(content, tmp_path / "model.pt")
    refuses(tmp_path / "model.pt", message)


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


def test_files_with_code_are_refused(tmp_path, capsys):
    torch.save({"dims": Code(), "model_state_dict": {}}, tmp_path / "code.pt")
    refuses(tmp_path / "code.pt", r"code\.pt is refused: it is damaged, or more than tensors and plain values")
    assert "unpickled" not in capsys.readouterr().out


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "text.pt").write_text("dims: none")
    refuses(tmp_path / "text.pt", r"text\.pt is refused: it is damaged")
    torch.save([1], tmp_path / "list.pt")
    refuses(tmp_path / "list.pt", r"expected OpenAI's 'dims' and 'model_state_dict', got list")
    torch.save({"state_dict": 1}, tmp_path / "other.pt")
    refuses(tmp_path / "other.pt", r"expected OpenAI's 'dims' and 'model_state_dict', got \['state_dict'\]")
    torch.save({"dims": [1], "model_state_dict": {}}, tmp_path / "dims.pt")
    refuses(tmp_path / "dims.pt", r"dims\.pt: expected a dictionary as dims, got list")


def test_states_that_hold_no_tensors(checkpoints, hf, tmp_path):
    content = torch.load(checkpoints / "model.pt", weights_only=True)
    torch.save(content | {"model_state_dict": [1]}, tmp_path / "model.pt")
    refuses(tmp_path / "model.pt", r"model_state_dict: expected tensors by name, got list")
    (hf / "model.safetensors").unlink()
    torch.save({"epoch": 3}, hf / "pytorch_model.bin")
    refuses(hf, r"pytorch_model\.bin: expected a tensor as 'epoch', got int")


def test_only_pickles_need_torch(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    load_whisper(checkpoints / "hf")
    convert_whisper(checkpoints / "ours", tmp_path / "hf")
    refuses(checkpoints / "model.pt", r"model\.pt is a file of PyTorch, which is not installed.*safetensors")
    with pytest.raises(ConvertError, match=r"which is not installed"):
        convert_whisper(checkpoints / "ours", tmp_path / "model.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_tokenizers_that_are_not_the_models(checkpoints, hf, tmp_path):
    tokenizer = whisper_peers.tokenizer_file(whisper_peers.MULTILINGUAL)
    refuses(checkpoints / "model.pt", r"model\.pt comes without a tokenizer .*gpt2\.tiktoken \(51864\).*give its path")
    refuses(hf, r"do not make a vocabulary of 1767", tokenizer=tokenizer)
    refuses(hf, r"nowhere", tokenizer=tmp_path / "nowhere.json")
    other = dataclasses.replace(BYTES, languages=("en",))
    refuses(hf, r"the tokenizer has 1766 tokens, .* has 1767", tokenizer=other)
    with pytest.raises(ConvertError, match=r"the tokenizer has 1766 tokens, the model 1767"):
        save_whisper(tmp_path / "out", SMALL, {}, other)


def test_a_tiktoken_file_beside_a_pt_file_is_found(tmp_path):
    peer = whisper_peers.make_openai(1, dataclasses.replace(whisper_peers.ENGLISH, embed_dim=8))
    torch.save({"dims": dataclasses.asdict(peer.dims), "model_state_dict": peer.state_dict()}, tmp_path / "model.pt")
    for config in (whisper_peers.ENGLISH, whisper_peers.MULTILINGUAL):
        file = whisper_peers.tokenizer_file(config)
        (tmp_path / file.name).symlink_to(file)
    checkpoint = load_whisper(tmp_path / "model.pt")
    assert checkpoint.tokenizer == whisper_peers.tokenizer(whisper_peers.ENGLISH)


def test_parameters_that_are_not_the_configs(checkpoints, tmp_path):
    params = load_whisper(checkpoints / "ours").params
    with pytest.raises(ConvertError, match=r"dtype is 'int8', expected one of float32, float16, bfloat16"):
        save_whisper(tmp_path / "out", SMALL, params, BYTES, "int8")
    deeper = dataclasses.replace(SMALL, num_encoder_layers=3)
    with pytest.raises(ConvertError, match=r"num_encoder_layers is 3, but there are tensors of 2"):
        save_whisper(tmp_path / "out", deeper, params, BYTES)
    del params["encoder"]["conv1"]["bias"]
    with pytest.raises(ConvertError, match=r"tree of parameters .*\n  encoder/conv1/bias is missing"):
        save_whisper(tmp_path / "out", SMALL, params, BYTES)
    assert not list(tmp_path.iterdir())


def test_what_exists_is_replaced_only_when_told(checkpoints, tmp_path):
    (tmp_path / "model.pt").write_text("mine")
    with pytest.raises(ConvertError, match=r"model\.pt exists; choose another destination"):
        convert_whisper(checkpoints / "ours", tmp_path / "model.pt")
    convert_whisper(checkpoints / "ours", tmp_path / "model.pt", overwrite=True)
    copied(checkpoints / "hf", tmp_path / "out")
    with pytest.raises(ConvertError, match=r"out exists; choose another destination"):
        convert_whisper(tmp_path / "model.pt", tmp_path / "out", tokenizer=BYTES)
    convert_whisper(checkpoints / "hf", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(ConvertError, match=r"out is not only a checkpoint, .* it holds thesis\.tex"):
        convert_whisper(checkpoints / "hf", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "out"]


def test_a_conversion_that_fails_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(whisper_write, "write_safetensors", full)
    monkeypatch.setattr(whisper_write, "write_torch", full)
    for destination in ("hf", "model.pt"):
        with pytest.raises(OSError, match="no space left"):
            convert_whisper(checkpoints / "ours", tmp_path / destination)
    copied(checkpoints / "ours", tmp_path / "ours")
    with pytest.raises(OSError, match="no space left"):
        convert_whisper(checkpoints / "hf", tmp_path / "ours", overwrite=True)
    load_whisper(tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_names_and_layouts_that_do_not_go_together(checkpoints, tmp_path):
    for destination, layout in (("model.pt", "hf"), ("model", "openai")):
        with pytest.raises(ConvertError, match=f"layout 'openai' is a file ending in .pt, .* got '{layout}'"):
            convert_whisper(checkpoints / "ours", tmp_path / destination, layout=layout)


def test_public_dims_with_two_sets_of_alignment_heads(tmp_path):
    config = dataclasses.replace(whisper_read.SIZES["large-v2"], alignment_heads=None)
    with pytest.warns(UserWarning, match=r"has the dims of large-v1 and large-v2, .* such as large-v1\.pt"):
        assert whisper_read._published_heads(tmp_path / "mine.pt", config) is None
