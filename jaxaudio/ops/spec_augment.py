"""SpecAugment: warps spectrograms in time and masks bands of frequencies and stretches of time.

Park et al. 2019, SpecAugment, https://arxiv.org/abs/1904.08779, section 2. The warp is piecewise linear in time,
which is what the paper's six anchor points amount to along the line that they hold.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class SpecAugmentConfig:
    """An augmentation policy; the defaults are "LibriSpeech Basic" of table 1.

    Attributes:
      time_warp: W, a point moves by less than this many frames; 0 leaves time as it is.
      frequency_mask: F, a band has 0 to F mels.
      num_frequency_masks: m_F.
      time_mask: T, a stretch has 0 to T frames.
      num_time_masks: m_T.
      max_time_fraction: p, a stretch is at most this part of all frames.

    Raises:
      ValueError: a negative number, or a fraction outside [0, 1]; with the value.
    """

    time_warp: int = 80
    frequency_mask: int = 27
    num_frequency_masks: int = 1
    time_mask: int = 100
    num_time_masks: int = 1
    max_time_fraction: float = 1.0

    def __post_init__(self):
        for name in ("time_warp", "frequency_mask", "num_frequency_masks", "time_mask", "num_time_masks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.max_time_fraction <= 1:
            raise ValueError(f"max_time_fraction must be in [0, 1], got {self.max_time_fraction}")


def spec_augment(
    key: Key[Array, ""], mel: Float[Array, "B T M"], config: SpecAugmentConfig | None = None
) -> Float[Array, "B T M"]:
    """Spectrograms augmented each on its own: warped, then masked with their own mean.

    Args:
      key: consumed here.
      mel: log-mel spectrograms.
      config: the policy; "LibriSpeech Basic" if None.
    Raises:
      ValueError: a policy that does not fit the spectrogram: 2 W frames or fewer, or fewer mels than F; with both.
    """
    config = SpecAugmentConfig() if config is None else config
    _, num_frames, num_mels = mel.shape
    if config.time_warp and num_frames <= 2 * config.time_warp:
        raise ValueError(f"time_warp {config.time_warp} needs more than twice as many frames, got {num_frames}")
    if config.num_frequency_masks and config.frequency_mask > num_mels:
        raise ValueError(f"frequency_mask {config.frequency_mask} is wider than {num_mels} mels")
    widest = min(config.time_mask, int(config.max_time_fraction * num_frames))

    def augment(key: Key[Array, ""], mel: Float[Array, "T M"]) -> Float[Array, "T M"]:
        centre_key, shift_key, frequency_key, time_key = jax.random.split(key, 4)
        if config.time_warp:
            size = config.time_warp
            centre = jax.random.randint(centre_key, (), size, num_frames - size + 1)
            mel = warp_time(mel, centre, centre + jax.random.randint(shift_key, (), 1 - size, size))
        bands = _masked(frequency_key, num_mels, config.num_frequency_masks, config.frequency_mask)
        stretches = _masked(time_key, num_frames, config.num_time_masks, widest)
        return jnp.where(stretches[:, None] | bands[None, :], jnp.mean(mel), mel)

    return jax.vmap(augment)(jax.random.split(key, mel.shape[0]), mel)


def warp_time(mel: Float[Array, "T M"], source: Int[Array, ""], target: Int[Array, ""]) -> Float[Array, "T M"]:
    """Moves frame `source` to `target`; the first and the last frame stay, what lies between is stretched linearly.

    Both frames are strictly between the first and one past the last.
    """
    last = mel.shape[0] - 1
    frame = jnp.arange(mel.shape[0])
    # Each side is a straight line through two of (0, 0), (target, source) and (last, last).
    left = frame * (source / target)
    right = last - (last - frame) * ((last - source) / jnp.maximum(last - target, 1))
    where = jnp.where(frame < target, left, right)
    below = jnp.clip(jnp.floor(where).astype(jnp.int32), 0, max(last - 1, 0))
    weight = (where - below)[:, None].astype(mel.dtype)
    return (1 - weight) * mel[below] + weight * mel[jnp.minimum(below + 1, last)]


def _masked(key: Key[Array, ""], size: int, count: int, widest: int) -> jax.Array:
    """(size,) bool, True inside `count` stretches of 0 to `widest`, wherever they fit."""
    width_key, start_key = jax.random.split(key)
    width = jax.random.randint(width_key, (count, 1), 0, widest + 1)
    start = jax.random.randint(start_key, (count, 1), 0, jnp.maximum(size - width, 1))
    index = jnp.arange(size)[None]
    return jnp.any((index >= start) & (index < start + width), axis=0)
