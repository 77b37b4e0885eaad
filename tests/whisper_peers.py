"""Small Whispers with random weights in three implementations, for tests that compare them.

openai-whisper's code knows one window, 30 s, which are 1500 encoder positions, and three vocabularies: 51865
(multilingual), 51864 (English), 51866 (since large-v3, with 128 mels).
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import torch
import transformers
import whisper

from jaxaudio.convert import whisper_names
from jaxaudio.convert.torch_files import stored
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer
from jaxaudio.models.whisper import Whisper, WhisperConfig

torch.set_num_threads(1)

MULTILINGUAL = WhisperConfig(
    vocab_size=51865, num_mels=80, embed_dim=64, num_heads=2, num_encoder_layers=2, num_decoder_layers=2
)
ENGLISH = dataclasses.replace(MULTILINGUAL, vocab_size=51864)
V3 = dataclasses.replace(MULTILINGUAL, vocab_size=51866, num_mels=128, num_encoder_layers=3)  # a shallower decoder
SHAPES = {"multilingual": MULTILINGUAL, "english": ENGLISH, "v3": V3}


def randomise(peer: torch.nn.Module, seed: int, eot: int) -> None:
    """Fills all parameters with random numbers, biases and norms too, such that logits depend on audio and text.

    The encoder's sinusoids stay. Tables are small and the layers' outputs large, so that the residual stream is not
    the last token's own embedding, which would make every token repeat itself.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> torch.Tensor:
        return std * torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            is_norm = "ln" in name or "layer_norm" in name
            if name.startswith(("model.encoder.embed_positions", "proj_out")):
                continue
            if is_norm and name.endswith("weight"):
                # The last norm sets the spread of the logits.
                mean = 4.0 if name in ("decoder.ln.weight", "model.decoder.layer_norm.weight") else 1.0
                parameter.copy_(mean + normal(parameter.shape, 0.2 * mean))
            elif parameter.ndim == 1:
                parameter.copy_(normal(parameter.shape, 0.2))
            elif "embed" in name:
                parameter.copy_(normal(parameter.shape, 0.5 if "position" in name else 0.1))
            else:
                parameter.copy_(normal(parameter.shape, 1.5 * parameter[0].numel() ** -0.5))
            if name.endswith(("token_embedding.weight", "embed_tokens.weight")):
                # Texts should end, silence be found and timestamps come up now and then, as in a trained model.
                timestamp_begin = len(parameter) - 1501
                parameter[[eot, timestamp_begin - 2]] *= 3.0  # the end of the text; no speech
                parameter[timestamp_begin:] *= 1.3


def _eot(config: WhisperConfig) -> int:
    return 50256 if config.vocab_size == ENGLISH.vocab_size else 50257


def make_openai(seed: int, config: WhisperConfig = MULTILINGUAL, eot: int | None = None) -> whisper.model.Whisper:
    """openai-whisper's model with the shape and alignment heads of `config`; `eot` if the vocabulary is not public."""
    dims = whisper.model.ModelDimensions(
        n_mels=config.num_mels,
        n_audio_ctx=config.num_positions,
        n_audio_state=config.embed_dim,
        n_audio_head=config.num_heads,
        n_audio_layer=config.num_encoder_layers,
        n_vocab=config.vocab_size,
        n_text_ctx=config.text_length,
        n_text_state=config.embed_dim,
        n_text_head=config.num_heads,
        n_text_layer=config.num_decoder_layers,
    )
    peer = whisper.model.Whisper(dims).eval()
    randomise(peer, seed, _eot(config) if eot is None else eot)
    if config.alignment_heads is not None:
        heads = torch.zeros(config.num_decoder_layers, config.num_heads, dtype=torch.bool)
        heads[tuple(zip(*config.alignment_heads, strict=True))] = True
        peer.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    return peer


def make_hf(
    seed: int, config: WhisperConfig = MULTILINGUAL, eot: int | None = None
) -> transformers.WhisperForConditionalGeneration:
    """transformers' model with the shape of `config`; `eot` if the vocabulary is not public."""
    end = _eot(config) if eot is None else eot
    peer_config = transformers.WhisperConfig(
        vocab_size=config.vocab_size,
        num_mel_bins=config.num_mels,
        d_model=config.embed_dim,
        encoder_layers=config.num_encoder_layers,
        decoder_layers=config.num_decoder_layers,
        encoder_attention_heads=config.num_heads,
        decoder_attention_heads=config.num_heads,
        encoder_ffn_dim=4 * config.embed_dim,
        decoder_ffn_dim=4 * config.embed_dim,
        max_source_positions=config.num_positions,
        max_target_positions=config.text_length,
        decoder_start_token_id=end + 1,
        eos_token_id=end,
        bos_token_id=end,
        pad_token_id=end,
        begin_suppress_tokens=[220, end],
    )
    peer = transformers.WhisperForConditionalGeneration(peer_config).eval()
    randomise(peer, seed, end)
    return peer


def from_openai(peer: whisper.model.Whisper) -> tuple[Whisper, dict, WhisperConfig]:
    """Our model, its parameters (JAX arrays) and its config, with openai-whisper's weights by our converter's names."""
    dims = peer.dims
    config = WhisperConfig(
        vocab_size=dims.n_vocab,
        num_mels=dims.n_mels,
        embed_dim=dims.n_audio_state,
        num_heads=dims.n_audio_head,
        num_encoder_layers=dims.n_audio_layer,
        num_decoder_layers=dims.n_text_layer,
        num_frames=2 * dims.n_audio_ctx,
        text_length=dims.n_text_ctx,
        alignment_heads=tuple((layer, head) for layer, head in peer.alignment_heads.indices().T.tolist()),
    )
    state = peer.state_dict()
    tensors = {p.path: p.from_upstream(stored(state[p.openai])) for p in whisper_names.parameters(config)}
    return Whisper(config), jax.tree.map(jnp.asarray, whisper_names.to_tree(config, tensors)), config


def tokenizer_file(config: WhisperConfig) -> pathlib.Path:
    """openai-whisper's file of merge ranks for a vocabulary."""
    name = "gpt2" if config.vocab_size == ENGLISH.vocab_size else "multilingual"
    return pathlib.Path(whisper.__file__).parent / "assets" / f"{name}.tiktoken"


@functools.cache
def tokenizer(config: WhisperConfig) -> WhisperTokenizer:
    """Our tokenizer for a public vocabulary."""
    return WhisperTokenizer.from_file(tokenizer_file(config), config.vocab_size)


@functools.cache
def openai_tokenizer(config: WhisperConfig) -> whisper.tokenizer.Tokenizer:
    """openai-whisper's tokenizer for a vocabulary."""
    is_multilingual = config.vocab_size > ENGLISH.vocab_size
    return whisper.tokenizer.get_tokenizer(is_multilingual, num_languages=config.vocab_size - 51765 - is_multilingual)
