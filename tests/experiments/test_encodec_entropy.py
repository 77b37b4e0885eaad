"""The experiment of entropy coding, small: from folders of codes to a codec's entropy model and a page."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import encodec_entropy
from jaxaudio import config as configs
from jaxaudio.data.entropy_coder import load_entropy_coder
from jaxaudio.data.manifests import Utterance
from jaxaudio.data.token_dataset import TokenClip, TokenDataset, TokenFormat, TokenWriter

Q, C, FRAME_RATE = 4, 16, 10.0
FORMAT = TokenFormat(
    codec="tiny",
    config_hash="0123abcd",
    codebooks_hash="89ef",
    num_codebooks=Q,
    codebook_size=C,
    frame_rate=FRAME_RATE,
    hop_length=1600,
    sample_rate=16_000,
    channels=1,
    scale=False,
)
TINY = [
    "levels=2,4",
    "num_layers=2",
    "embed_dim=16",
    "num_heads=2",
    "mlp_dim=24",
    "crop_s=2",
    "max_offset=3",
    "num_positions=40",
    "batch_size=8",
    "num_steps=2",
    "optimizer.num_steps=2",
    "optimizer.warmup_steps=1",
    "log_every=1",
    "coded_s=5",
]


def write_tokens(folder, num_clips, seed, token_format=FORMAT):
    rng = np.random.default_rng(seed)
    utterances = [Utterance(f"{index}.wav") for index in range(num_clips)]
    writer = TokenWriter(folder, token_format, utterances, num_clips)
    shape = (token_format.num_codebooks, 33)
    clips = [
        TokenClip(i, utterance, rng.integers(0, C, shape).astype(np.int32), 33 * 1600)
        for i, utterance in enumerate(utterances)
    ]
    writer.write(0, clips)
    writer.finish()


@pytest.fixture
def config(tmp_path):
    write_tokens(tmp_path / "train", 9, 0)
    write_tokens(tmp_path / "valid", 3, 1)
    folders = [f"tokens={tmp_path / 'train'}", f"valid_tokens={tmp_path / 'valid'}", f"codec_dir={tmp_path / 'codec'}"]
    return configs.override(encodec_entropy.Config(), [*TINY, *folders])


@pytest.mark.slow
def test_from_codes_to_an_entropy_model_and_a_page(config, tmp_path, capsys):
    workdir = tmp_path / "run"
    encodec_entropy.main(config, workdir)
    assert "Entropy coding takes tiny from" in capsys.readouterr().out
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [
        line[name] for line in lines for name in ("train/loss", "validation/bits_2", "validation/loss") if name in line
    ]
    assert len(losses) == 4  # two steps, one evaluation
    assert all(abs(loss - np.log2(C)) < 1.5 for loss in losses)  # untrained: about 4 bits for 16 codes

    coder = load_entropy_coder(config.codec_dir)
    assert (coder.name, coder.model.past_frames, coder.model.num_positions) == ("run", 35, 40)
    valid = TokenDataset(config.valid_tokens)
    streams = [coder.encode(valid[i].codes[:2, start : start + 20]) for i in range(3) for start in (0, 20)]
    kbps, seconds, _ = encodec_entropy.coded(coder, valid, 2, 20, dataclasses.replace(config, coded_s=1e9))
    assert seconds == pytest.approx(9.9)
    assert kbps == pytest.approx(sum(map(len, streams)) * 8 / 1000 / 9.9)
    # Of the first 5 s, in chunks of 2 s: 20 and 13 frames of the first clip, 20 of the second.
    assert encodec_entropy.coded(coder, valid, 2, 20, config)[1] == pytest.approx(5.3)
    # What is beside the information in floats: 5 bytes a stream, and a part of a byte.
    bits = next(line["validation/bits_2"] for line in lines if "validation/bits_2" in line)
    assert 0 < sum(map(len, streams)) - bits * 2 * 99 / 8 < 7 * 6
    page = (workdir / "report.html").read_text()
    assert "0.08" in page  # kbit/s of 2 codebooks: 2 * 4 bits * 10 Hz
    assert "the paper has no such codec" in page.lower()


def test_refused_configs(config, tmp_path):
    with pytest.raises(ValueError, match=r"levels are \(2, 8\); .*train has 4 codebooks"):
        dataclasses.replace(config, levels=(2, 8)).model(FORMAT)
    with pytest.raises(ValueError, match="20 frames with max_offset=21 pass num_positions=40"):
        dataclasses.replace(config, max_offset=21).model(FORMAT)
    with pytest.raises(ValueError, match="optimizer.num_steps is 2, but the run's own 3"):
        dataclasses.replace(config, num_steps=3)
    for levels in ((), (4, 2), (2, 2)):
        with pytest.raises(ValueError, match="levels are .*; expected at least one, rising"):
            dataclasses.replace(config, levels=levels)
    other = dataclasses.replace(FORMAT, config_hash="4567")
    write_tokens(tmp_path / "other", 2, 0, other)
    with pytest.raises(ValueError, match="config_hash='0123abcd'.*config_hash='4567'"):
        encodec_entropy.load_tokens(dataclasses.replace(config, valid_tokens=str(tmp_path / "other")))


def test_cards_are_the_papers():
    assert [card.reported for card in encodec_entropy.CARDS] == [0.9, 1.9, 4.1, 8.9]
    # 8 codebooks of 1024 at 75 Hz are 6 kbit/s.
    assert encodec_entropy.kbps_of(dataclasses.replace(FORMAT, codebook_size=1024, frame_rate=75.0), 8) == 6.0
