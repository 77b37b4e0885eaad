"""transformers' EncodecModel, DacModel and MimiModel with random weights, narrow; and the original files of the same
weights, as the projects that trained them publish theirs.
"""

import re

import torch
import transformers

torch.set_num_threads(1)

# hop 30: 800 frames a second of 4 bits a codebook.
ENCODEC = {
    "encodec_24khz": {"target_bandwidths": [6.4, 12.8, 25.6]},
    "encodec_48khz": {
        "target_bandwidths": [12.8, 25.6],
        "sampling_rate": 48000,
        "audio_channels": 2,
        "use_causal_conv": False,
        "norm_type": "time_group_norm",
        "normalize": True,
        "chunk_length_s": 0.025,
        "overlap": 0.01,
    },
    "encodec_32khz": {
        "target_bandwidths": [17.1],
        "sampling_rate": 32000,
        "use_causal_conv": False,
        "use_conv_shortcut": False,
        "upsampling_ratios": [5, 3, 2],
        "num_residual_layers": 2,
        "pad_mode": "constant",
    },
}
DAC = {
    "even": {"downsampling_ratios": [2, 4, 4], "sampling_rate": 44100},
    "odd": {"downsampling_ratios": [2, 3, 5], "sampling_rate": 16000},
}
MIMI = {
    "mimi": {},
    "other": {
        "upsampling_ratios": [4, 3],
        "num_semantic_quantizers": 2,
        "num_residual_layers": 2,
        "num_key_value_heads": 1,
    },
}


def make_encodec(name: str, seed: int = 0) -> transformers.EncodecModel:
    """One of `ENCODEC`."""
    torch.manual_seed(seed)
    sizes = {"num_filters": 4, "hidden_size": 12, "codebook_size": 16, "upsampling_ratios": [5, 3, 2]}
    model = _noisy(transformers.EncodecModel(transformers.EncodecConfig(**(sizes | ENCODEC[name]))))
    with torch.no_grad():
        latents = model.encoder(torch.randn(1, model.config.audio_channels, 3000))[0]
    _filled(model.quantizer.layers, latents, "embed", "cluster_size")
    return model


def make_dac(name: str, seed: int = 0) -> transformers.DacModel:
    """One of `DAC`, weights not split."""
    torch.manual_seed(seed)
    sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 24, "codebook_size": 16, "codebook_dim": 4}
    model = _noisy(transformers.DacModel(transformers.DacConfig(n_codebooks=5, **(sizes | DAC[name]))))
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 3 and len(tensor) > 1:  # their starts are so small that biases alone choose the codes
                torch.nn.init.kaiming_normal_(tensor).mul_(0.5)
        for level in model.quantizer.quantizers:
            level.in_proj.bias.zero_()
    return model


def make_mimi(name: str, seed: int = 0) -> transformers.MimiModel:
    """One of `MIMI`."""
    torch.manual_seed(seed)
    sizes = {
        "num_filters": 4,
        "hidden_size": 16,
        "upsampling_ratios": [3, 2],
        "codebook_size": 16,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "num_quantizers": 5,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "sliding_window": 7,
        "upsample_groups": 16,
    }
    model = _noisy(transformers.MimiModel(transformers.MimiConfig(**(sizes | MIMI[name]))))
    quantizer = model.quantizer
    with torch.no_grad():
        latents = model.encoder(torch.randn(1, 1, 3000)).latents
        for half in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
            _filled(half.layers, half.input_proj(latents)[0], "embed_sum", "cluster_usage")
        model.decoder.decoder_seanet.layers[-1].conv.weight *= 0.03
    return model


def _noisy(model):
    """Moves what starts as zeros, ones or one small number, so that nothing is the identity by chance."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(("_scale.scale", "alpha", "bias")) or "norm.weight" in name:
                tensor += 0.2 * torch.randn_like(tensor)
    return model.eval()


def _filled(layers, latents: torch.Tensor, sums: str, counts: str) -> None:
    """Fills codebooks with codes where the latents (D, T) are, later levels with finer ones."""
    mean, spread = latents.mean(1), latents.std(1)
    for level, layer in enumerate(layers):
        codes = (level == 0) * mean + 0.6**level * spread * torch.randn(layer.codebook.codebook_size, len(mean))
        count = torch.rand(len(codes)) + 0.3
        count[3] = 1e-7  # less than what Mimi's sums are divided by at least
        setattr(layer.codebook, counts, count)
        setattr(layer.codebook, sums, codes if sums == "embed" else codes * count.clamp(min=1e-5)[:, None])


def encodec_file(model: transformers.EncodecModel) -> dict[str, torch.Tensor]:
    """The tensors of a file of the repositories `encodec` and `audiocraft`, weight norm in torch's older spelling."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^(encoder|decoder)\.layers", r"\1.model", _wrapped(model, name))
        name = re.sub(r"^quantizer\.layers\.(\d+)\.", r"quantizer.vq.layers.\1._", name)
        name = name.replace("parametrizations.weight.original0", "weight_g")
        renamed[name.replace("parametrizations.weight.original1", "weight_v")] = tensor
    return renamed


def _wrapped(model: torch.nn.Module, name: str) -> str:
    """A tensor's name where each convolution stands in two modules of its kind, and its norm in the outer one."""
    for path, module in model.named_modules():
        kind = "convtr" if "Transpose" in type(module).__name__ else "conv"
        if type(module).__name__.endswith(("Conv1d", "ConvTranspose1d")) and hasattr(module, "conv"):
            if name.startswith(f"{path}.conv."):
                return f"{path}.{kind}.{kind}.{name.removeprefix(f'{path}.conv.')}"
            if name.startswith(f"{path}.norm."):
                return f"{path}.{kind}.norm.{name.removeprefix(f'{path}.norm.')}"
    return name


def dac_file(model: transformers.DacModel) -> dict[str, object]:
    """What a file of Descript's holds: the tensors with weight norm, and the arguments of their model."""
    config = model.config
    stages, state = len(config.downsampling_ratios), {}
    outer = {"conv1": "0", "snake1": f"{stages + 1}", "conv2": f"{stages + 2}"}
    encoder_block = {"snake1": "3", "conv1": "4"} | {f"res_unit{unit + 1}": f"{unit}.block" for unit in range(3)}
    decoder_block = {"snake1": "0", "conv_t1": "1"} | {f"res_unit{unit + 1}": f"{unit + 2}.block" for unit in range(3)}
    unit = {"snake1": "0", "conv1": "1", "snake2": "2", "conv2": "3"}
    for name, tensor in model.state_dict().items():
        part, *keys, leaf = name.split(".")
        if part != "quantizer":
            block, root = (encoder_block, "block") if part == "encoder" else (decoder_block, "model")
            inner = [outer[keys[0]]] if keys[0] in outer else [str(int(keys[1]) + 1), "block", block[keys[2]]]
            keys = [root, *inner, *[unit[key] for key in keys[3:]]]
        prefix = ".".join([part, *keys])
        if leaf == "weight" and tensor.ndim == 3:
            half = torch.rand(len(tensor), 1, 1) + 0.5  # any other length of the direction says the same
            state[f"{prefix}.weight_g"] = tensor.norm(dim=(1, 2), keepdim=True)
            state[f"{prefix}.weight_v"] = tensor * half
        else:
            state[f"{prefix}.{leaf}"] = tensor
    arguments = {
        "encoder_dim": config.encoder_hidden_size,
        "encoder_rates": list(config.downsampling_ratios),
        "latent_dim": None,
        "decoder_dim": config.decoder_hidden_size,
        "decoder_rates": list(config.upsampling_ratios),
        "n_codebooks": config.n_codebooks,
        "codebook_size": config.codebook_size,
        "codebook_dim": config.codebook_dim,
        "quantizer_dropout": 0.5,
        "sample_rate": config.sampling_rate,
    }
    return {"state_dict": state, "metadata": {"kwargs": arguments}}


_KYUTAI = {
    "encoder.encoder_seanet.layers": "encoder.model",
    "decoder.decoder_seanet.layers": "decoder.model",
    "encoder.downsample": "downsample.conv",
    "decoder.upsample": "upsample.convtr",
    "encoder.encoder_transformer": "encoder_transformer.transformer",
    "decoder.decoder_transformer": "decoder_transformer.transformer",
    "quantizer.semantic_residual_vector_quantizer.layers": "quantizer.rvq_first.vq.layers",
    "quantizer.acoustic_residual_vector_quantizer.layers": "quantizer.rvq_rest.vq.layers",
    "quantizer.semantic_residual_vector_quantizer": "quantizer.rvq_first",
    "quantizer.acoustic_residual_vector_quantizer": "quantizer.rvq_rest",
    ".codebook.initialized": "._codebook._initialized",
    ".codebook.cluster_usage": "._codebook.cluster_usage",
    ".codebook.embed_sum": "._codebook.embedding_sum",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "self_attn_layer_scale": "layer_scale_1",
    "mlp_layer_scale": "layer_scale_2",
    "self_attn.o_proj.weight": "self_attn.out_projs.0.weight",
}


def mimi_file(model: transformers.MimiModel) -> dict[str, torch.Tensor]:
    """The tensors of a file of Kyutai's, whose rotary positions turn neighbours: rows 2 i and 2 i + 1 of a head."""
    renamed, num_heads = {}, model.config.num_attention_heads
    state = model.state_dict()
    for name, tensor in state.items():
        if re.search("[kv]_proj", name):
            continue
        if "q_proj" in name:
            query, key, value = (state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv")
            half = query.shape[0] // num_heads // 2
            order = [head * 2 * half + i % 2 * half + i // 2 for head in range(num_heads) for i in range(2 * half)]
            name, tensor = (
                name.replace("q_proj.weight", "in_projs.0.weight"),
                torch.cat([query[order], key[order], value]),
            )
        name = _wrapped(model, name)
        for hf, kyutai in _KYUTAI.items():
            name = name.replace(hf, kyutai)
        renamed[name] = tensor.contiguous()
    return renamed
