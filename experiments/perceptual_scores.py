"""Scores of how a reconstruction sounds, by packages of the extra `bench`; more is better.

PESQ is not among them: its package has no wheels, only C code to compile.
"""

import warnings
from collections.abc import Callable

import numpy as np

Score = Callable[[np.ndarray, np.ndarray, int], float]

_VISQOL_RATE = 48_000


def perceptual_scores(*, speech: bool) -> tuple[dict[str, Score], list[str]]:
    """The scores that are installed, by name, and for each that is not, a sentence that says why.

    A score takes reference and reconstruction, mono (A,) in [-1, 1] and equally long, and their sample rate. It is NaN
    where a recording is too short for it.

    Args:
      speech: whether recordings are speech, which STOI needs.
    """
    scores, absent = {}, []
    for name, make in {"ViSQOL": _visqol, **({"STOI": _stoi} if speech else {})}.items():
        try:
            scores[name] = make()
        except ImportError as error:
            absent.append(f"{name} was left out: {error}; pip install 'jaxaudio[bench]' brings it.")
    return scores, absent


def _visqol() -> Score:
    """ViSQOL v3 (Chinen et al. 2020, https://arxiv.org/abs/2004.09584), a MOS from 1 to 5, by visqol-python.

    In its mode for audio at 48 kHz, which codecs' papers give for speech too.
    """
    from visqol import VisqolApi

    api = VisqolApi()
    api.create(mode="audio")

    def score(reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> float:
        import soxr

        pair = [
            soxr.resample(waveform.astype(np.float64), sample_rate, _VISQOL_RATE) for waveform in (reference, estimate)
        ]
        try:
            return float(api.measure_from_arrays(*pair, _VISQOL_RATE).moslqo)
        except ValueError as error:
            if "smaller than minimum patch size" in str(error) or "Too few samples" in str(error):
                return float("nan")
            raise

    return score


def _stoi() -> Score:
    """Short-time objective intelligibility of speech (Taal et al. 2011), about 0 to 1, by pystoi."""
    from pystoi import stoi

    def score(reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> float:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
            try:
                return float(stoi(reference, estimate, sample_rate))
            except RuntimeWarning:
                return float("nan")

    return score
