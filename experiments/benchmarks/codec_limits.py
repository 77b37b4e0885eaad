"""The work of the codecs by formula: a product and a sum for each weight and place, without activations and norms."""

from jaxaudio.models.mimi import MimiConfig
from jaxaudio.nn.codec import CodecConfig
from jaxaudio.nn.seanet import SEANetConfig
from jaxaudio.nn.transformer_config import TransformerConfig


def encode_flops(config: CodecConfig, num_frames: int, num_codebooks: int) -> int:
    """Operations from num_frames * hop_length samples to codes."""
    latents = num_frames * config.hop_length // config.seanet.hop_length
    flops = seanet_flops(config.seanet, latents, config.seanet.num_filters)
    return flops + _mimi_flops(config, latents) + quantizer_flops(config, num_frames, num_codebooks)


def decode_flops(config: CodecConfig, num_frames: int, num_codebooks: int) -> int:
    """Operations from codes to num_frames * hop_length samples."""
    latents = num_frames * config.hop_length // config.seanet.hop_length
    seanet = config.seanet
    flops = seanet_flops(seanet, latents, seanet.decoder_filters or seanet.num_filters, decoder=True)
    flops += _mimi_flops(config, latents, decoder=True)
    if config.rvq.projection == "per_level":
        flops += 2 * num_frames * num_codebooks * config.rvq.codebook_dim * config.rvq.embed_dim
    return flops + _shared_flops(config, num_frames)


def seanet_flops(config: SEANetConfig, num_frames: int, num_filters: int, *, decoder: bool = False) -> int:
    """Convolutions and LSTM of one half; a convolution that goes up has the work of the one that goes down."""
    length, width = num_frames * config.hop_length, num_filters
    first, last = config.kernel_size, config.encoder_last_kernel_size or config.last_kernel_size
    if decoder:
        first, last = config.last_kernel_size, config.kernel_size
    products = length * first * config.channels * width
    for stride in config.strides:
        hidden = width // config.compress
        unit = (config.residual_kernel_size + 1) * width * hidden + config.conv_shortcut * width**2
        products += length * len(config.dilations) * unit
        length //= stride
        products += length * 2 * stride * width * 2 * width
        width *= 2
    products += config.num_lstm_layers * length * 8 * width**2
    return 2 * (products + length * last * width * config.embed_dim)


def quantizer_flops(config: CodecConfig, num_frames: int, num_codebooks: int) -> int:
    """Distances to all codes of each level, and the projections around them."""
    rvq = config.rvq
    level = rvq.codebook_size * rvq.codebook_dim
    if rvq.projection == "per_level":
        level += 2 * rvq.codebook_dim * rvq.embed_dim
    return 2 * num_frames * num_codebooks * level + _shared_flops(config, num_frames)


def transformer_flops(config: TransformerConfig, length: int) -> int:
    """Projections, MLP, and attention to the steps of the window."""
    weights = 4 * config.embed_dim**2 + 2 * config.embed_dim * config.mlp_dim
    attended = sum(min(step + 1, config.window or length) for step in range(length))
    return 2 * config.num_layers * (length * weights + 2 * attended * config.embed_dim)


def _mimi_flops(config: CodecConfig, latents: int, *, decoder: bool = False) -> int:
    """What Mimi has between its convolutions and its quantizer."""
    if not isinstance(config, MimiConfig):
        return 0
    size, dim = 2 * config.downsampling, config.seanet.embed_dim
    resampling = 2 * latents // config.downsampling * size * (dim if decoder else dim**2)  # up: each channel by itself
    return transformer_flops(config.transformer, latents) + resampling


def _shared_flops(config: CodecConfig, num_frames: int) -> int:
    """Mimi's projections of its two quantizers."""
    halves = 2 if config.rvq.projection == "shared" else 0
    return 2 * num_frames * halves * config.rvq.embed_dim * config.rvq.codebook_dim
