"""The one residual vector quantizer of the codecs: SoundStream's, EnCodec's, DAC's and Mimi's are its configurations.

Zeghidour et al. 2021, section 3.3; Defossez et al. 2022, section 3.2; Kumar et al. 2023, section 3.2.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxaudio.ops.vector_quantize import dequantize, nearest_codes, residual_codes


@dataclasses.dataclass(frozen=True)
class RVQConfig:
    """Shape and kind of a residual vector quantizer.

    Attributes:
      num_codebooks, codebook_size, codebook_dim: Q, C and E.
      embed_dim: width D of the latents.
      projection: between D and E: "none" (D is E), "shared" by all levels (Mimi; no biases), or "per_level" with biases
        (DAC), where levels quantize D-dimensional residuals in E dimensions.
      distance: "euclidean" or "cosine".
      learned_by: "statistics" of the assigned vectors, outside of the gradient (`ops.codebook_ema`), or "gradient".
    """

    num_codebooks: int
    codebook_size: int
    codebook_dim: int
    embed_dim: int
    projection: Literal["none", "shared", "per_level"] = "none"
    distance: Literal["euclidean", "cosine"] = "euclidean"
    learned_by: Literal["statistics", "gradient"] = "statistics"

    def __post_init__(self):
        for name in ("num_codebooks", "codebook_size", "codebook_dim", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if (self.projection == "per_level") != (self.learned_by == "gradient"):
            raise ValueError(
                f"projection={self.projection!r} does not go with learned_by={self.learned_by!r}: levels with "
                "projections of their own learn by the gradient, the others by statistics"
            )
        if self.projection == "none" and self.codebook_dim != self.embed_dim:
            raise ValueError(f"codebook_dim {self.codebook_dim} is not embed_dim {self.embed_dim}: set a projection")


class Quantized(struct.PyTreeNode):
    """What a training step needs of a quantizer.

    latents: (B, T, D) quantized; the gradient passes straight through to the quantizer's input.
    codes: (B, Q, T), of all levels, used or not.
    residuals: (Q, B, T, E) what each level quantized, outside of the gradient.
    commitment: () mean squared distance of residuals from their code vectors, by its gradient drawing the encoder.
    codebook_loss: () the same number, by its gradient drawing the codebooks; 0 where statistics teach them.
    """

    latents: jax.Array
    codes: jax.Array
    residuals: jax.Array
    commitment: jax.Array
    codebook_loss: jax.Array


class ResidualVectorQuantizer(nn.Module):
    """Q codebooks, each of which quantizes what those before it left."""

    config: RVQConfig

    def setup(self) -> None:
        """Makes codebooks and projections."""
        config = self.config
        levels, dim, width = config.num_codebooks, config.codebook_dim, config.embed_dim
        # Small, as k-means or EMA replace them; DAC's embeddings begin with torch's N(0, 1).
        scale = 1.0 if config.learned_by == "gradient" else dim**-0.5
        shape = (levels, config.codebook_size, dim)
        self.codebooks = self.param("codebooks", nn.initializers.normal(scale), shape, jnp.float32)
        if config.projection == "shared":
            init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            self.in_kernel = self.param("in_kernel", init, (width, dim), jnp.float32)
            self.out_kernel = self.param("out_kernel", init, (dim, width), jnp.float32)
        if config.projection == "per_level":
            init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", -2, -1, batch_axis=(0,))
            zeros = nn.initializers.zeros
            self.in_kernel = self.param("in_kernel", init, (levels, width, dim), jnp.float32)
            self.in_bias = self.param("in_bias", zeros, (levels, dim), jnp.float32)
            self.out_kernel = self.param("out_kernel", init, (levels, dim, width), jnp.float32)
            self.out_bias = self.param("out_bias", zeros, (levels, width), jnp.float32)

    def encode(self, latents: jax.Array, num_codebooks: int) -> jax.Array:
        """(B, T, D) -> codes (B, num_codebooks, T)."""
        x = latents.astype(jnp.float32)
        if self.config.projection != "per_level":
            return residual_codes(self._projected(x), self.codebooks[:num_codebooks])

        def level(residual, params):
            inner = _affine(residual, params["in_kernel"], params["in_bias"])
            codes = nearest_codes(inner, params["codebook"], self.config.distance)
            return residual - _affine(params["codebook"][codes], params["out_kernel"], params["out_bias"]), codes

        _, codes = lax.scan(level, x, self._levels(num_codebooks))
        return codes.transpose(1, 0, 2)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes (B, Q, T), Q at most num_codebooks, -> (B, T, D)."""
        if self.config.projection == "per_level":

            def level(total, inputs):
                params, codes = inputs
                return total + _affine(params["codebook"][codes], params["out_kernel"], params["out_bias"]), None

            zeros = jnp.zeros((codes.shape[0], codes.shape[2], self.config.embed_dim), jnp.float32)
            return lax.scan(level, zeros, (self._levels(codes.shape[1]), codes.transpose(1, 0, 2)))[0]
        return self._restored(dequantize(codes, self.codebooks))

    def __call__(self, latents: jax.Array, num_levels: jax.Array) -> Quantized:
        """Quantizes for training.

        Codebooks that statistics teach get no gradient, and residuals carry none from level to level, or the commitment
        would reach the encoder from the first level only. Where the gradient teaches (DAC), it does flow through the
        residuals, as there.

        Args:
          latents: (B, T, D).
          num_levels: (B,) how many levels each row uses; losses are means over the rows that use a level, summed over
            levels for "gradient" and averaged for "statistics", as the public trainers do.
        """
        used = (jnp.arange(self.config.num_codebooks)[:, None] < num_levels[None])[..., None, None]  # (Q, B, 1, 1)
        start, levels = latents.astype(jnp.float32), self._levels(self.config.num_codebooks)
        if self.config.learned_by == "gradient":
            level, total = self._gradient_level, jnp.zeros_like(start)
            (_, total), (codes, inputs, commitment, codebook_loss) = lax.scan(level, (start, total), (levels, used))
            count = used.shape[1]
        else:
            start = self._projected(start)
            total = jnp.zeros_like(start)
            (_, total), (codes, inputs, commitment) = lax.scan(self._statistics_level, (start, total), (levels, used))
            codebook_loss, count = jnp.zeros(()), jnp.sum(used)
            total = self._restored(start + lax.stop_gradient(total - start))
        weights = used[..., 0, 0] / count
        return Quantized(
            latents=total.astype(latents.dtype),
            codes=codes.transpose(1, 0, 2),
            residuals=lax.stop_gradient(inputs),
            commitment=jnp.sum(weights * commitment),
            codebook_loss=jnp.sum(weights * codebook_loss),
        )

    def _statistics_level(self, carry, inputs):
        (residual, total), (params, used) = carry, inputs
        codes = nearest_codes(residual, params["codebook"], self.config.distance)
        vectors = lax.stop_gradient(params["codebook"][codes])
        commitment = jnp.mean((residual - vectors) ** 2, axis=(1, 2))
        return (residual - vectors, total + jnp.where(used, vectors, 0)), (codes, residual, commitment)

    def _gradient_level(self, carry, inputs):
        (residual, total), (params, used) = carry, inputs
        inner = _affine(residual, params["in_kernel"], params["in_bias"])
        codes = nearest_codes(inner, params["codebook"], self.config.distance)
        vectors = params["codebook"][codes]
        commitment = jnp.mean((inner - lax.stop_gradient(vectors)) ** 2, axis=(1, 2))
        codebook_loss = jnp.mean((vectors - lax.stop_gradient(inner)) ** 2, axis=(1, 2))
        straight = inner + lax.stop_gradient(vectors - inner)
        out = _affine(straight, params["out_kernel"], params["out_bias"])
        return (residual - out, total + jnp.where(used, out, 0)), (codes, inner, commitment, codebook_loss)

    def _levels(self, count: int) -> dict[str, jax.Array]:
        """The parameters of the first levels, to scan over."""
        params = {"codebook": self.codebooks}
        if self.config.projection == "per_level":
            names = ("in_kernel", "in_bias", "out_kernel", "out_bias")
            params |= {name: getattr(self, name) for name in names}
        return {name: value[:count] for name, value in params.items()}

    def _projected(self, x: jax.Array) -> jax.Array:
        return _product(x, self.in_kernel) if self.config.projection == "shared" else x

    def _restored(self, x: jax.Array) -> jax.Array:
        return _product(x, self.out_kernel) if self.config.projection == "shared" else x


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel, precision=lax.Precision.HIGHEST)


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return _product(x, kernel) + bias[None, None]
