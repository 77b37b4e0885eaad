"""A codec of random weights that is quick to compile, and recordings for it."""

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from jaxaudio.convert.codec import CodecCheckpoint
from jaxaudio.generate.codec import Codec
from jaxaudio.models.encodec import EnCodec, EnCodecConfig
from jaxaudio.nn.rvq import RVQConfig
from jaxaudio.nn.seanet import SEANetConfig

CONFIG = EnCodecConfig(
    8000,
    SEANetConfig(num_filters=2, embed_dim=8, strides=(4, 5), num_lstm_layers=1, pad_mode="zeros"),
    RVQConfig(num_codebooks=4, codebook_size=16, codebook_dim=8, embed_dim=8),
    (3.2, 6.4),  # 2 and 4 codebooks of 4 bits at 400 Hz
)


def make_codec(name: str = "tiny", seed: int = 0) -> CodecCheckpoint:
    """With kernels that keep levels about what they are, so that codes vary."""
    rng, model = np.random.default_rng(seed), EnCodec(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 400, 1)), jnp.array([4]))["params"]

    def fill(leaf):
        return (rng.standard_normal(leaf.shape) / np.sqrt(max(np.prod(leaf.shape[:-1]), 4))).astype(np.float32)

    return CodecCheckpoint("encodec", CONFIG, jax.tree.map(fill, shapes), name)


def to_codec(checkpoint: CodecCheckpoint) -> Codec:
    return Codec(checkpoint.name, EnCodec(checkpoint.config), checkpoint.params)


def write_recordings(folder, lengths, sample_rate: int = 8000) -> list[str]:
    """Noise of so many samples, as 0.wav, 1.wav, ...; returns their paths."""
    rng, paths = np.random.default_rng(0), []
    for number, length in enumerate(lengths):
        paths.append(str(folder / f"{number}.wav"))
        soundfile.write(paths[-1], 0.3 * rng.standard_normal(length), sample_rate, subtype="FLOAT")
    return paths
