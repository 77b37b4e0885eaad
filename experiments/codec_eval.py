"""Neural codecs beside Opus and Codec2 at the bits that they spend: SI-SNR, mel and STFT distance, ViSQOL, STOI.

Paper: Défossez et al. 2022, EnCodec, https://arxiv.org/abs/2210.13438, table 3; Kumar et al. 2023, DAC,
       https://arxiv.org/abs/2306.06546, table 3
Run:   python -m experiments.codec_eval --workdir runs/eval --set codecs=runs/a/codec,runs/b/codec data=speech.jsonl
       python -m experiments.codec_eval --workdir runs/music --set row=music codecs=facebook/encodec_24khz data=FOLDER

Every recording goes through a .jac file and back, and through libopus and Codec2. Rates are what was written: of ours
all bytes of the files, headers too, of the others packets or frames alone. Codecs have their own sample rates; all are
compared at one, as the mean of their channels. The run may be killed: the same command goes on.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import soundfile
import tqdm

from experiments import codec_eval_report
from experiments.classical_codecs import CODEC2_BITS_PER_SECOND, Coded, codec2, fit, opus
from experiments.perceptual_scores import Score, perceptual_scores
from jaxaudio import config as config_lib
from jaxaudio.cli import raise_malloc_thresholds
from jaxaudio.cli.codec import load
from jaxaudio.convert.tensors import ConvertError
from jaxaudio.data.audio import load_audio
from jaxaudio.data.files import atomic_path
from jaxaudio.data.recordings import list_recordings, load_recordings
from jaxaudio.data.result_lines import ResultLog
from jaxaudio.generate.codec import Codec
from jaxaudio.generate.compression import decode_file, encode_file, file_header
from jaxaudio.ops.metrics import multi_scale_mel_distance, multi_scale_stft_distance, si_snr
from jaxaudio.report.card import Card

EXAMPLES = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """One comparison.

    Attributes:
      row: the row's name.
      data: a folder, a zip or a list of recordings that no codec was trained on.
      codecs: folders, files or hub ids.
      num_codebooks: of each codec as far as it has them; empty: its bandwidths, or 1, 2, 4, ... and all.
      opus_kbps: what Opus is asked for; empty leaves it out.
      codec2_bits_per_second: likewise, for speech alone.
      speech: whether the recordings are speech: Codec2 and STOI are for nothing else.
      sample_rate: at which all are compared, in Hz.
      max_s: seconds of each recording from its start; None: all of it.
      max_recordings: the first so many; None: all.
    """

    row: str
    data: str = "data"
    codecs: tuple[str, ...] = ()
    num_codebooks: tuple[int, ...] = ()
    opus_kbps: tuple[float, ...] = (0.5, 6.0, 8.0, 12.0, 16.0, 24.0)
    codec2_bits_per_second: tuple[int, ...] = CODEC2_BITS_PER_SECOND
    speech: bool = True
    sample_rate: int = 24_000
    max_s: float | None = None
    max_recordings: int | None = None

    def __post_init__(self):
        if not self.speech and self.codec2_bits_per_second:
            raise ValueError(
                f"codec2_bits_per_second is {self.codec2_bits_per_second}, but speech is false; it codes nothing else"
            )


ROWS = {
    "speech": Config("speech"),
    "music": Config("music", speech=False, codec2_bits_per_second=(), sample_rate=44_100, max_s=30.0),
}

DEVIATIONS = (
    "Nothing was measured: the published weights are not on the machine that these cards come from.",
    "The paper's recordings are not public; name your own with data=.",
)


def _card(system: str, paper: str, metric: str, reported: float, codec: str, row: str) -> Card:
    return Card(
        system=f"{system}, published weights",
        paper=paper,
        metric=metric,
        reported=reported,
        reached=None,
        status="not measured here: no weights",
        steps=0,
        hardware="",
        command=f"python -m experiments.codec_eval --workdir runs/{row} --set row={row} codecs={codec} data=FOLDER",
        deviations=DEVIATIONS,
    )


_ENCODEC = "Défossez et al. 2022, EnCodec, https://arxiv.org/abs/2210.13438, table 3"
_DAC = "Kumar et al. 2023, DAC, https://arxiv.org/abs/2306.06546, table 3"
CARDS = (
    _card("EnCodec 24 kHz", _ENCODEC, "6 kbps, SI-SNR dB", 6.67, "facebook/encodec_24khz", "music"),
    _card("EnCodec 24 kHz", _ENCODEC, "6 kbps, ViSQOL", 4.35, "facebook/encodec_24khz", "music"),
    _card("DAC 44.1 kHz", _DAC, "8 kbps, mel distance", 0.93, "descript/dac_44khz", "music"),
    _card("DAC 44.1 kHz", _DAC, "8 kbps, SI-SDR of centred waveforms, dB", 10.75, "descript/dac_44khz", "music"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """A codec at one rate.

    Attributes:
      family: the codec.
      label: codec and rate; no two systems have the same.
      nominal_kbps: what it is said to spend.
      code: from the name of a recording to what became of it, mono at the rate of the comparison, and its bits.
    """

    family: str
    label: str
    nominal_kbps: float
    code: Callable[[str], Coded]


class Recordings:
    """The recordings of a comparison, read at the rate that is asked for and cut to the first `max_s` seconds."""

    def __init__(self, config: Config):
        self.names = list_recordings(config.data)[: config.max_recordings]
        self._data, self._max_s = config.data, config.max_s

    def read(self, name: str, sample_rate: int, channels: int = 1) -> np.ndarray:
        """(A, channels) float32."""
        [recording] = load_recordings(self._data, [name], sample_rate=sample_rate, channels=channels)
        return recording.waveform[: None if self._max_s is None else round(self._max_s * sample_rate)]


def classical_systems(config: Config, recordings: Recordings) -> list[System]:
    """Opus and Codec2 at the rates asked for."""

    def read(name: str) -> tuple[np.ndarray, int]:
        return recordings.read(name, config.sample_rate)[:, 0], config.sample_rate

    return [
        *(
            System("Opus", f"Opus {kbps:g}", kbps, lambda name, kbps=kbps: opus(*read(name), kbps))
            for kbps in config.opus_kbps
        ),
        *(
            System("Codec2", f"Codec2 {bps}", bps / 1000, lambda name, bps=bps: codec2(*read(name), bps))
            for bps in config.codec2_bits_per_second
        ),
    ]


def neural_systems(config: Config, recordings: Recordings) -> list[System]:
    """The codecs at each of their rates.

    Raises:
      ConvertError: a codec cannot be loaded.
      ValueError: two codecs have the same name.
    """
    systems: list[System] = []
    for source in config.codecs:
        codec = load(source)
        if any(system.family == codec.name for system in systems):
            raise ValueError(f"codecs: {source} is the second that is called {codec.name}; compare them in two runs")
        for levels in _levels(codec, config.num_codebooks):
            kbps = file_header(codec, levels).kbps
            code = functools.partial(_code, config, recordings, codec, levels)
            systems.append(System(codec.name, f"{codec.name} {kbps:.3g}", kbps, code))
    return systems


def _levels(codec: Codec, asked: Sequence[int]) -> list[int]:
    most = codec.model.config.num_codebooks
    if asked:
        return [levels for levels in asked if levels <= most]
    if codec.model.config.bandwidths:
        return [codec.num_codebooks_for(kbps) for kbps in codec.model.config.bandwidths]
    return sorted({*(1 << power for power in range(most.bit_length())), most})


def _code(config: Config, recordings: Recordings, codec: Codec, levels: int, name: str) -> Coded:
    """Into a file and back."""
    waveform = recordings.read(name, codec.model.config.sample_rate, codec.model.config.channels)
    num_samples = len(recordings.read(name, config.sample_rate))
    with tempfile.TemporaryDirectory() as folder:
        original, coded, back = (pathlib.Path(folder, file) for file in ("original.wav", "coded.jac", "back.wav"))
        soundfile.write(original, waveform, codec.model.config.sample_rate, subtype="FLOAT")
        compressed = encode_file(codec, original, coded, num_codebooks=levels)
        decode_file(codec, coded, back)
        return Coded(fit(load_audio(back, config.sample_rate), num_samples), 8 * compressed.num_bytes)


def measure(reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> dict[str, float]:
    """The measures that every comparison has, of mono waveforms (A,)."""
    pair = jnp.asarray(estimate)[None], jnp.asarray(reference)[None]
    return {
        "SI-SNR": float(si_snr(*pair)[0]),
        "mel distance": float(multi_scale_mel_distance(*pair, sample_rate=sample_rate)[0]),
        "STFT distance": float(multi_scale_stft_distance(*pair)[0]),
    }


def run_all(
    pairs: Sequence[tuple[str, System]],
    recordings: Recordings,
    config: Config,
    scores: Mapping[str, Score],
    log: ResultLog,
    samples: pathlib.Path,
) -> None:
    """Codes and measures what the log has not, and keeps the first recordings in the folder `samples` to be heard."""
    for index, (name, system) in enumerate(tqdm.tqdm(pairs, disable=None)):
        if index in log:
            continue
        reference = recordings.read(name, config.sample_rate)[:, 0]
        if not np.any(reference):
            raise ValueError(f"{config.data}: {name} is silent, which no measure can judge; leave it out")
        coded = system.code(name)
        result = measure(reference, coded.waveform, config.sample_rate)
        result |= {score: rate(reference, coded.waveform, config.sample_rate) for score, rate in scores.items()}
        if name in recordings.names[:EXAMPLES]:
            codec_eval_report.write_sample(samples, name, system.label, coded.waveform, config.sample_rate)
            codec_eval_report.write_sample(samples, name, "original", reference, config.sample_rate)
        log.add(index, {"duration_s": len(reference) / config.sample_rate, "num_bits": coded.num_bits, **result})


def main(config: Config, workdir: pathlib.Path) -> None:
    """Measures what is left to measure, writes summary.json and the page."""
    recordings = Recordings(config)
    systems = [*neural_systems(config, recordings), *classical_systems(config, recordings)]
    scores, absent = perceptual_scores(speech=config.speech)
    config_lib.claim_workdir(config, workdir)
    pairs = [(name, system) for name in recordings.names for system in systems]
    items = {
        index: {"recording": name, "system": system.label, "family": system.family, "nominal_kbps": system.nominal_kbps}
        for index, (name, system) in enumerate(pairs)
    }
    settings = config_lib.to_dict(config) | {"scores": sorted(scores)}
    log = ResultLog(workdir / "results.jsonl", items, settings)
    run_all(pairs, recordings, config, scores, log, workdir / "samples")
    log.sort()
    summary = codec_eval_report.summarise(log.results)
    with atomic_path(workdir / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=1) + "\n")
    page = codec_eval_report.write_page(workdir, config, summary, recordings.names[:EXAMPLES], absent)
    print(f"{codec_eval_report.headline(summary)}\nwrote {page}: open it in a browser")


if __name__ == "__main__":
    config, workdir = config_lib.parse_command_line(__doc__, ROWS)
    raise_malloc_thresholds()
    try:
        main(config, workdir)
    except (ConvertError, ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
