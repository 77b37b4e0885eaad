"""A two-layer language model with logical axes, small enough to compile in a second."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCAB, EMBED, MLP, LENGTH = 16, 8, 32, 4


class Toy(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        def init(*names):
            return nn.with_logical_partitioning(nn.initializers.normal(0.5), names)

        x = nn.Embed(VOCAB, EMBED, dtype=self.dtype, embedding_init=init("vocab", "embed"))(tokens)
        x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
        x = nn.Dense(MLP, dtype=self.dtype, kernel_init=init("embed", "mlp"), bias_init=init("mlp"), name="up")(x)
        x = nn.with_logical_constraint(nn.relu(x), ("act_batch", "act_length", "act_mlp"))
        return nn.Dense(VOCAB, dtype=self.dtype, use_bias=False, kernel_init=init("mlp", None), name="down")(x)


def init_params(key):
    return Toy().init(key, jnp.zeros((1, LENGTH), jnp.int32))["params"]


def make_loss(dtype=jnp.float32):
    def loss_fn(params, batch, key):
        logits = Toy(dtype).apply({"params": params}, batch["inputs"]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        correct = (logits.argmax(-1) == batch["targets"]) & batch["mask"]
        return jnp.sum(losses * batch["mask"]), {"weight": batch["mask"].sum(), "accuracy": correct.sum()}

    return loss_fn


def make_batch(seed=0, rows=16):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (2, rows, LENGTH), dtype=np.int32)
    return {"inputs": tokens[0], "targets": tokens[1], "mask": rng.random((rows, LENGTH)) < rng.random((rows, 1))}


def mean_loss(params, batch):
    """The plain masked mean that every step must report, for `jax.grad` without our code."""
    total, sums = make_loss()(params, jax.tree.map(jnp.asarray, batch), None)
    return total / sums["weight"]
