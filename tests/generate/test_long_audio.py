"""Hours of audio in the memory of minutes, from the file to the seconds that were heard."""

import os
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import linen as nn
from whisper_small import BYTES, SMALL

from jaxaudio.generate.transcribe import transcribe
from jaxaudio.models.whisper import Whisper

RATE, HOURS = 8000, 5
BURSTS_S = (3600.0, 4 * 3600.0 + 0.5)  # where a tenth of a second of noise begins


def write_sparse(path):
    """A header, a hole, and two bursts of noise in it."""
    soundfile.write(path, np.zeros(0), RATE, subtype="PCM_16")
    header, num_bytes = bytearray(path.read_bytes()[:44]), HOURS * 3600 * RATE * 2
    header[4:8], header[40:44] = (36 + num_bytes).to_bytes(4, "little"), num_bytes.to_bytes(4, "little")
    path.write_bytes(header)
    os.truncate(path, 44 + num_bytes)
    noise = (np.random.default_rng(0).standard_normal(RATE // 10) * 5000).astype("<i2").tobytes()
    with open(path, "r+b") as file:
        for start_s in BURSTS_S:
            file.seek(44 + 2 * round(start_s * RATE))
            file.write(noise)


@pytest.mark.slow
def test_five_hours_with_two_sounds(tmp_path):
    write_sparse(tmp_path / "long.wav")
    model, rng = Whisper(SMALL), np.random.default_rng(0)
    mel, tokens = jnp.zeros((1, SMALL.num_frames, SMALL.num_mels)), jnp.zeros((1, 2), jnp.int32)
    abstract = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), mel, tokens))["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), abstract)
    options = {"language": "en", "batched": True, "batch_size": 2, "temperature": 0.0, "no_speech_threshold": None}
    tracemalloc.start()
    result = transcribe(model, params, tmp_path / "long.wav", tokenizer=BYTES, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250e6  # in float32 at 16 kHz the samples alone are 1150 MB
    assert result.duration_s == HOURS * 3600
    for start_s in BURSTS_S:
        assert any(span.start_s <= start_s and start_s + 0.1 <= span.end_s for span in result.heard)
    assert sum(span.end_s - span.start_s for span in result.heard) < 10
    assert {span.rule for span in result.skipped} == {"voice_activity"}
    spans = sorted([*result.heard, *result.skipped], key=lambda span: span.start_s)
    assert spans[0].start_s == 0.0
    assert all(a.end_s == b.start_s for a, b in zip(spans, spans[1:], strict=False))
    assert spans[-1].end_s == HOURS * 3600
