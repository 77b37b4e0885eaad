"""Small language models of codes with random weights, and the tables that they should give."""

import numpy as np

from jaxaudio.data.integer_lm import IntegerLM
from jaxaudio.data.lm_quantization import quantize_lm

Q, C, D, N, F, L = 3, 17, 16, 4, 24, 2
PAST = 5


def random_params(seed=0, *, codebooks=Q, codes=C, dim=D, heads=N, hidden=F, layers=L, gain=1.0):
    """A tree of `EncodecLM`; `gain` makes its logits, and so its choices, more decided."""
    rng = np.random.default_rng(seed)

    def dense(inputs, outputs):
        kernel = rng.normal(size=(layers, *inputs, *outputs)) / np.sqrt(np.prod(inputs))
        return {"kernel": kernel, "bias": 0.1 * rng.normal(size=(layers, *outputs))}

    def norm(*lead):
        scale, bias = 0.1 * rng.normal(size=(2, *lead, dim))
        return {"layer": {"scale": 1 + scale, "bias": bias}}

    split = (heads, dim // heads)
    attention = {role: dense((dim,), split) for role in ("query", "key", "value")} | {"out": dense(split, (dim,))}
    layer = {
        "attention": attention,
        "mlp": {"up": dense((dim,), (hidden,)), "down": dense((hidden,), (dim,))},
        "attention_norm": norm(layers),
        "mlp_norm": norm(layers),
    }
    return {
        "embedding": rng.normal(size=(codebooks, codes + 1, dim)),
        "norm": norm(),
        "transformer": {"layers": layer},
        "logits_kernel": gain * rng.normal(size=(codebooks, dim, codes)) / np.sqrt(dim),
        "logits_bias": 0.1 * gain * rng.normal(size=(codebooks, codes)),
    }


def integer_lm(seed=0, *, num_positions=40, past=PAST, **sizes):
    tensors = quantize_lm(random_params(seed, **sizes), num_positions=num_positions)
    return IntegerLM(tensors, num_heads=sizes.get("heads", N), past_frames=past)


def random_codes(num_frames, seed=0, *, codebooks=Q, codes=C):
    return np.random.default_rng(seed).integers(0, codes, (codebooks, num_frames))


def shifted(codes):
    """A language model's inputs: 1 + the code before, 0 at the start."""
    return np.pad(codes[..., :-1] + 1, [(0, 0)] * (codes.ndim - 1) + [(1, 0)])
