import sys

import numpy as np
import pytest

from experiments.perceptual_scores import perceptual_scores

RNG = np.random.default_rng(0)
RATE = 16_000
TIME = np.arange(2 * RATE) / RATE
SPEECH = (0.1 * np.sign(np.sin(2 * np.pi * 150 * TIME)) * np.sin(2 * np.pi * 2 * TIME) ** 2).astype(np.float32)
NOISE = (0.02 * RNG.standard_normal(len(SPEECH))).astype(np.float32)


def test_what_is_not_installed_is_said(monkeypatch):
    for name in ("visqol", "pystoi"):
        monkeypatch.setitem(sys.modules, name, None)
    scores, absent = perceptual_scores(speech=True)
    assert scores == {}
    assert [sentence.split()[0] for sentence in absent] == ["ViSQOL", "STOI"]
    assert all("pip install 'jaxaudio[bench]' brings it" in sentence for sentence in absent)
    assert len(perceptual_scores(speech=False)[1]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("package", "name", "best"), [("visqol", "ViSQOL", 4.73), ("pystoi", "STOI", 1.0)])
def test_scores_fall_with_noise(package, name, best):
    pytest.importorskip(package, reason=f"{package} is in the extra bench")
    score = perceptual_scores(speech=True)[0][name]
    clean, little, much = (score(SPEECH, SPEECH + gain * NOISE, RATE) for gain in (0, 1, 8))
    assert clean == pytest.approx(best, abs=0.01)
    assert clean > little > much
    assert np.isnan(score(SPEECH[:2000], SPEECH[:2000], RATE))
