import io
import itertools
import os
import zipfile

import numpy as np
import pytest
import soundfile

from jaxaudio.data import fsdd
from jaxaudio.data.byte_pair import train_byte_pairs
from jaxaudio.data.fsdd import (
    WORDS,
    Clip,
    FsddError,
    SentenceConfig,
    Stage,
    concatenate,
    joined_sentences,
    load_fsdd,
    sentence_batches,
    training_sentence,
)
from jaxaudio.data.whisper_tokenizer import WhisperTokenizer

PLAIN = SentenceConfig(
    window_s=3.0, speed=(1.0, 1.0), gain_db=(0.0, 0.0), noise_rate=0.0, empty_rate=0.0, overflow_rate=0.0
)


@pytest.fixture(scope="module")
def clips():
    """Digit d of one of two speakers is a constant of its own, 0.2 to 0.5 s long, so that samples say what they are."""
    lengths = np.random.default_rng(0).integers(3200, 8000, 20)
    return tuple(Clip(i // 2, f"speaker{i % 2}", 7, np.full(lengths[i], (1 + i) / 32, np.float32)) for i in range(20))


@pytest.fixture(scope="module")
def tokenizer():
    pairs = train_byte_pairs([f" {word}" for word in WORDS], 35)
    return WhisperTokenizer.for_ranks(pairs, ("en",), 151)


@pytest.mark.parametrize("overflow", [False, True])
def test_segments_are_where_the_digits_are(clips, overflow):
    rng = np.random.default_rng(1)
    config = PLAIN if not overflow else SentenceConfig(**vars(PLAIN) | {"overflow_rate": 1.0})
    numbers, cuts = set(), 0
    for _ in range(60):
        waveform, window, num_frames = training_sentence(rng, clips, config)
        assert waveform.shape == (48000,)
        for segment in window.segments:
            # To the tick, the samples between its times are those of a clip of its digit, and those outside are not.
            start, end = round(segment.start_s * 16000), round(segment.end_s * 16000)
            (value,) = np.unique(waveform[start + 160 : end - 160])
            digit = WORDS.index(segment.text)
            clip = clips[round(float(value) * 32) - 1]
            assert clip.digit == digit
            assert abs((end - start) - len(clip.waveform)) <= 320
            assert not waveform[max(start - 320, 0) : max(start - 160, 0)].any()
            assert not waveform[end + 160 : end + 320].any()
        edges = [time for segment in window.segments for time in (segment.start_s, segment.end_s)]
        assert edges == sorted(edges)
        if window.cut_start_s is not None:
            cuts += 1
            assert num_frames == 300
            assert waveform[round(window.cut_start_s * 16000) + 160 :].all()
        elif window.segments:
            assert num_frames >= (round(window.segments[-1].end_s * 16000) - 160) // 160
        assert not waveform[num_frames * 160 + 160 :].any()
        numbers.add(len(window.segments))
    assert len(numbers) >= 3
    assert cuts > (20 if overflow else 0)


def test_windows_without_speech_have_noise_and_no_segments(clips):
    config = SentenceConfig(window_s=2.0, empty_rate=1.0)
    waveform, window, num_frames = training_sentence(np.random.default_rng(0), clips, config)
    assert not window.is_speech()
    assert num_frames == 200
    assert 0 < np.abs(waveform).max() < 0.4  # noise of at most -25 dB


def test_speed_and_gain_and_noise_stay_in_their_ranges():
    clip = Clip(0, "a", 7, np.full(4000, 0.25, np.float32))
    config = SentenceConfig(**vars(PLAIN) | {"num_digits": (1, 1), "speed": (0.5, 2.0), "gain_db": (-20.0, 6.0)})
    rng = np.random.default_rng(0)
    lengths, gains = [], []
    for _ in range(200):
        waveform = training_sentence(rng, [clip], config).waveform
        lengths.append(np.count_nonzero(waveform))
        gains.append(20 * np.log10(waveform.max() / 0.25))
    assert min(lengths) >= 2000
    assert max(lengths) <= 8000
    assert max(lengths) - min(lengths) > 5000
    assert -20.01 < min(gains) < -15
    assert 3 < max(gains) < 6.01
    noise = {"noise_rate": 1.0, "noise_db": (-20.0, -20.0), "fill_rate": 1.0, "num_digits": (1, 1)}
    loud = SentenceConfig(**vars(PLAIN) | noise)
    waveform = training_sentence(rng, [clip], loud).waveform
    assert np.std(waveform[-4000:]) == pytest.approx(0.025, rel=0.3)  # a tenth of the peak


def test_joined_sentences_have_every_clip_once_a_round(clips):
    sentences = joined_sentences(clips, seed=0, num_rounds=3)
    words = [segment.text for _, segments in sentences for segment in segments]
    assert sorted(words) == sorted([WORDS[clip.digit] for clip in clips] * 3)
    assert {len(segments) for _, segments in sentences} <= {3, 4, 5, 6}
    for waveform, segments in sentences:
        assert segments[0].start_s == 0
        gaps = [b.start_s - a.end_s for a, b in zip(segments, segments[1:], strict=False)]
        assert all(0.1 - 1e-4 <= gap <= 0.6 + 1e-4 for gap in gaps)
        assert 0.1 - 1e-4 <= len(waveform) / 16000 - segments[-1].end_s <= 0.6 + 1e-4
        for segment in segments:
            sound = waveform[round(segment.start_s * 16000) : round(segment.end_s * 16000)]
            assert len(np.unique(sound)) == 1
            assert clips[round(float(sound[0]) * 32) - 1].digit == WORDS.index(segment.text)
    for count in range(3, 40):  # no round leaves a sentence of one or two
        assert min(len(s) for _, s in joined_sentences((clips * 2)[:count], seed=count, num_rounds=1)) >= 3


def test_concatenate_needs_a_pause_around_every_clip(clips):
    waveform, (segment,) = concatenate(clips[:1], [0.5, 0.25])
    assert (segment.start_s, segment.text) == (0.5, "zero")
    assert len(waveform) == 12000 + len(clips[0].waveform)
    with pytest.raises(ValueError, match="1 clips need 2 pauses, got 1"):
        concatenate(clips[:1], [0.5])


def test_stages_follow_each_other_and_a_saved_position_continues(clips, tokenizer):
    stages = (
        Stage(2, 3, 16, SentenceConfig(window_s=1.0, num_digits=(1, 1), overflow_rate=0.0, lead_s=(0.0, 0.2))),
        Stage(3, 2, 48, SentenceConfig(window_s=3.0)),
    )
    batches = sentence_batches(clips, tokenizer, stages, seed=0)
    first = [next(batches) for _ in range(3)]
    assert [batch["waveform"].shape for batch in first] == [(3, 16000)] * 2 + [(2, 48000)]
    assert [batch["inputs"].shape for batch in first] == [(3, 16)] * 2 + [(2, 48)]
    resumed = sentence_batches(clips, tokenizer, stages, seed=0)
    resumed.set_state(batches.get_state())
    rest, again = list(batches), list(resumed)
    assert len(rest) == len(again) == 2
    for one, other in zip(rest, again, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    other = next(sentence_batches(clips, tokenizer, stages, seed=1))
    assert not np.array_equal(other["waveform"], first[0]["waveform"])


def test_rows_say_what_is_heard(clips, tokenizer):
    """Decoded back: the words are those of the constants in the waveform, before them the previous text."""
    stage = Stage(1, 64, 64, SentenceConfig(**vars(PLAIN) | {"overflow_rate": 0.3}))
    batch = next(sentence_batches(clips, tokenizer, [stage], seed=3, timestamps_rate=0.5, previous_rate=0.5))
    kinds = set()
    rows = zip(*(batch[name].tolist() for name in ("inputs", "targets", "mask")), batch["waveform"], strict=True)
    for inputs, targets, mask, waveform in rows:
        at = inputs.index(tokenizer.sot)
        assert (inputs[0] == tokenizer.sot_prev) == (at > 0)
        assert mask[: max(at - 1, 0)] == [False] * max(at - 1, 0)
        assert all(mask[max(at - 1, 0) : targets.index(tokenizer.eot) + 1])
        assert not any(mask[targets.index(tokenizer.eot) + 1 :])
        runs = [(value, len(list(run))) for value, run in itertools.groupby(waveform.tolist())]
        values = [value for value, length in runs if value and length > 160]  # less is half a tick of what was cut
        heard = [WORDS[clips[round(value * 32) - 1].digit] for value in values]
        said = tokenizer.decode(targets[at : targets.index(tokenizer.eot)]).split("|>")[-1].split()
        times = [token for token in targets[at : targets.index(tokenizer.eot)] if token >= tokenizer.timestamp_begin]
        # With times the audio goes on behind the start of a segment that the end cuts, be it for a moment.
        assert said == heard[: len(said)]
        assert len(heard) - len(said) <= len(times) % 2
        kinds.add((at > 0, bool(times), len(times) % 2))
    assert {(False, True, 0), (True, True, 0), (False, False, 0), (True, False, 0), (False, True, 1)} <= kinds


def test_the_split_is_that_of_the_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(fsdd, "NUM_CLIPS", {"train": 2, "valid": 1, "test": 2})
    with zipfile.ZipFile(tmp_path / "recordings.zip", "w") as archive:
        for take in (0, 4, 5, 6, 49):
            data = io.BytesIO()
            soundfile.write(data, np.full(800, take / 64), 8000, format="WAV", subtype="PCM_16")
            archive.writestr(f"recordings/3_ann_{take}.wav", data.getvalue())
        archive.writestr("recordings/README.md", "text")
    splits = load_fsdd(tmp_path)
    takes = {name: sorted(clip.take for clip in found) for name, found in splits.items()}
    assert takes == {"train": [6, 49], "valid": [5], "test": [0, 4]}
    for clip in splits["test"]:
        assert (clip.digit, clip.speaker, clip.waveform.shape) == (3, "ann", (1600,))
        np.testing.assert_allclose(clip.waveform[600:1000], clip.take / 64, atol=1e-3)
    monkeypatch.undo()
    with pytest.raises(FsddError, match=r"has \{'train': 2, 'valid': 1, 'test': 2\} clips, expected .*2640"):
        load_fsdd(tmp_path)
    with pytest.raises(FsddError, match="no recordings.zip in"):
        load_fsdd(tmp_path / "nowhere")


def test_the_real_recordings():
    if "JAXAUDIO_DATA" not in os.environ:
        pytest.skip("JAXAUDIO_DATA names no folder with fsdd/recordings.zip")
    splits = load_fsdd(os.environ["JAXAUDIO_DATA"])
    assert {name: len(found) for name, found in splits.items()} == {"train": 2640, "valid": 60, "test": 300}
    assert {clip.take for clip in splits["test"]} == set(range(5))
    assert len({(clip.digit, clip.speaker, clip.take) for found in splits.values() for clip in found}) == 3000
