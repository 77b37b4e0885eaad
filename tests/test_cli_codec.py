"""`jaxaudio encode` and `jaxaudio decode`, from the command line to the samples."""

import pathlib
import re

import numpy as np
import pytest
import soundfile
import tiny_codec
import tiny_encodec_lm

from jaxaudio import cli
from jaxaudio.cli.codec import load
from jaxaudio.convert.codec import save_codec
from jaxaudio.data.codec_files import open_codec_file
from jaxaudio.data.codec_header import header_bytes
from jaxaudio.data.entropy_coder import save_entropy_model
from jaxaudio.data.lm_quantization import quantize_lm

RATE = 8000


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """The folder of a codec of random weights."""
    folder = tmp_path_factory.mktemp("codecs") / "tiny"
    save_codec(tiny_codec.make_codec(), folder)
    return folder


def run(command: str, *arguments) -> int:
    return cli.main([command, *map(str, arguments), "--compilation_cache", "None"])


def record(path: pathlib.Path, num_samples: int = 810, channels: int = 1, rate: int = RATE) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(num_samples)
    waveform = (0.2 * rng.standard_normal((num_samples, channels))).astype(np.float32)
    soundfile.write(path, waveform, rate, subtype="FLOAT" if path.suffix == ".wav" else "PCM_16")
    return waveform


@pytest.mark.parametrize(("rate", "num_codebooks"), [([], 4), (["--kbps", "3.2"], 2), (["--num_codebooks", "3"], 3)])
def test_a_recording_comes_back_as_the_codec_decodes_it(codec, tmp_path, capsys, rate, num_codebooks):
    waveform = record(tmp_path / "in.wav")
    assert run("encode", tmp_path / "in.wav", tmp_path / "a.jac", "--codec", codec, *rate) == 0
    line = capsys.readouterr().out
    num_bytes = (tmp_path / "a.jac").stat().st_size
    assert re.fullmatch(
        rf"\S+a.jac: 0\.101 s, {num_bytes:,} bytes, [\d.]+ kbit/s with {num_codebooks} codebooks of tiny\n", line
    )
    assert run("decode", tmp_path / "a.jac", tmp_path / "back.flac", "--codec", codec) == 0
    assert capsys.readouterr().out == f"{tmp_path}/back.flac: 0.101 s, from {num_codebooks} codebooks of tiny\n"
    loaded = load(str(codec))
    expected = loaded.decode(loaded.encode(waveform, num_codebooks=num_codebooks))
    restored, read_rate = soundfile.read(tmp_path / "back.flac", always_2d=True)
    assert read_rate == RATE
    np.testing.assert_allclose(restored, expected, atol=0.5 / 32768 + 1e-5)


def test_inspect_shows_what_a_file_holds(codec, tmp_path, capsys):
    record(tmp_path / "in.wav", 4000)
    assert run("encode", tmp_path / "in.wav", tmp_path / "a.jac", "--codec", codec, "--kbps", "3.2") == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "a.jac")]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    size = (tmp_path / "a.jac").stat().st_size
    assert rows["bitrate"] == f"{size * 8 / 500:.3f} kbit/s, of plain codes 3.200"
    assert (rows["codec"], rows["num_codebooks"], rows["duration"], rows["damage"]) == ("tiny", "2", "0.500 s", "none")
    (tmp_path / "a.jac").write_bytes((tmp_path / "a.jac").read_bytes()[:-1])
    assert cli.main(["inspect", str(tmp_path / "a.jac")]) == 0
    assert "one of the two copies of its header is damaged" in capsys.readouterr().out


def test_what_was_converted_is_said(codec, tmp_path, capsys):
    record(tmp_path / "in.wav", 1000, channels=2, rate=11025)
    assert run("encode", tmp_path / "in.wav", tmp_path / "a.jac", "--codec", codec) == 0
    assert capsys.readouterr().out.endswith("; resampled from 11025 to 8000 Hz; mean of 2 channels\n")


def test_folders_keep_their_tree_and_go_on_after_a_bad_file(codec, tmp_path, capsys):
    record(tmp_path / "in" / "a.wav")
    record(tmp_path / "in" / "deep" / "er" / "b.flac", 333)
    (tmp_path / "in" / "deep" / "bad.wav").write_text("no sound")
    (tmp_path / "in" / "notes.txt").write_text("no sound either")
    assert run("encode", tmp_path / "in", tmp_path / "out", "--codec", codec) == 1
    captured = capsys.readouterr()
    assert captured.out.endswith("2 of 3 files are whole\n")
    assert "encode: 1 files below" in captured.err
    assert re.search(r"jaxaudio encode: \S+deep/bad.wav: ", captured.err)
    assert captured.err.count("\n") == 2
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert found == ["a.jac", "deep/er/b.jac"]

    assert run("decode", tmp_path / "out", tmp_path / "back", "--codec", codec, "--format", "flac") == 0
    assert capsys.readouterr().err == ""
    assert soundfile.info(tmp_path / "back" / "deep" / "er" / "b.flac").frames == 333
    assert run("decode", tmp_path / "out", tmp_path / "back", "--codec", codec) == 0
    assert soundfile.info(tmp_path / "back" / "a.wav").frames == 810


def test_existing_files_are_kept_without_overwrite(codec, tmp_path, capsys):
    record(tmp_path / "in.wav")
    (tmp_path / "a.jac").write_text("precious")
    assert run("encode", tmp_path / "in.wav", tmp_path / "a.jac", "--codec", codec) == 1
    assert "a.jac exists; name another file, or give --overwrite" in capsys.readouterr().err
    assert (tmp_path / "a.jac").read_text() == "precious"
    assert run("encode", tmp_path / "in.wav", tmp_path / "a.jac", "--codec", codec, "--overwrite") == 0
    assert run("decode", tmp_path / "a.jac", tmp_path / "in.wav", "--codec", codec) == 1
    assert "in.wav exists" in capsys.readouterr().err
    assert run("decode", tmp_path / "a.jac", tmp_path / "in.wav", "--codec", codec, "--overwrite") == 0


def test_damaged_chunks_are_silence_and_are_reported(codec, tmp_path, capsys):
    """11 s are chunks of 5, 5 and 1 s."""
    record(tmp_path / "in.wav", 11 * RATE)
    assert run("encode", tmp_path / "in.wav", tmp_path / "a.jac", "--codec", codec) == 0
    assert run("decode", tmp_path / "a.jac", tmp_path / "whole.wav", "--codec", codec) == 0
    capsys.readouterr()
    data = bytearray((tmp_path / "a.jac").read_bytes())
    second = data.index(b"\xa9JC\xd7", data.index(b"\xa9JC\xd7") + 1)
    data[second + 100] ^= 1
    data[30] ^= 1
    (tmp_path / "a.jac").write_bytes(data)
    assert run("decode", tmp_path / "a.jac", tmp_path / "back.wav", "--codec", codec) == 1
    error = capsys.readouterr().err.splitlines()
    assert error == [
        f"jaxaudio decode: {tmp_path}/a.jac: one of the two copies of its header is damaged or missing; the other was "
        "read",
        f"jaxaudio decode: {tmp_path}/a.jac: chunk 1 is lost, 5.000 to 10.000 s are silence: its checksum is wrong",
    ]
    whole, _ = soundfile.read(tmp_path / "whole.wav")
    back, _ = soundfile.read(tmp_path / "back.wav")
    assert len(back) == 11 * RATE
    np.testing.assert_allclose(back[: 5 * RATE], whole[: 5 * RATE], atol=1.01 / 32768)  # in other pieces
    assert not back[5 * RATE : 10 * RATE].any()
    assert back[10 * RATE :].std() > 0.5 * whole[10 * RATE :].std()
    (tmp_path / "a.jac").write_bytes(data[: second + 50])
    assert run("decode", tmp_path / "a.jac", tmp_path / "cut.wav", "--codec", codec) == 1
    assert "both copies of its header are damaged" in capsys.readouterr().err
    assert not (tmp_path / "cut.wav").exists()


def test_the_codec_is_found_or_asked_for(codec, tmp_path, capsys):
    record(tmp_path / "in.wav")
    assert run("encode", tmp_path / "in.wav", tmp_path / "a.jac", "--codec", codec) == 0
    assert run("decode", tmp_path / "a.jac", tmp_path / "b.wav") == 1
    assert "a.jac was encoded with the codec tiny, config " in capsys.readouterr().err
    other = tmp_path / "other"
    save_codec(tiny_codec.make_codec("other", seed=1), other)
    assert run("decode", tmp_path / "a.jac", tmp_path / "b.wav", "--codec", other) == 1
    assert "was encoded with the codec tiny (config" in capsys.readouterr().err
    assert run("decode", tmp_path / "a.jac", tmp_path / "b.wav", "--codec", tmp_path / "no") == 1
    assert "no is no file or folder" in capsys.readouterr().err.replace("'", "")


def test_a_named_codec_needs_no_option(tmp_path, monkeypatch):
    """What the file names is looked up among the published ones alone, here in a folder of that name."""
    monkeypatch.chdir(tmp_path)
    save_codec(tiny_codec.make_codec("mimi"), "mimi")
    record(pathlib.Path("in.wav"))
    assert run("encode", "in.wav", "a.jac", "--codec", "mimi") == 0
    assert run("decode", "a.jac", "b.wav") == 0
    assert soundfile.info("b.wav").frames == 810


def test_entropy_coding_changes_the_size_alone(codec, tmp_path, capsys):
    waveform, plain, short = record(tmp_path / "in.wav", 4000), tmp_path / "plain.jac", tmp_path / "short.jac"
    command = ["encode", tmp_path / "in.wav", short, "--codec", codec]
    assert run(*command, "--entropy") == 1
    assert "tiny has no entropy model (entropy.safetensors)" in capsys.readouterr().err
    # A model that knows how often each code comes, and nothing else.
    params = tiny_encodec_lm.random_params(codebooks=4, codes=16, gain=0.0)
    counts = np.stack([np.bincount(codes, minlength=16) for codes in load(str(codec)).encode(waveform).codes])
    params["logits_bias"] = np.log((counts + 0.1) / 200)
    tensors = quantize_lm(params, num_positions=60)
    save_entropy_model(tmp_path / "lm", tensors, num_heads=tiny_encodec_lm.N, past_frames=5, name="how often")
    assert run(*command, "--entropy", "--entropy_model", tmp_path / "lm") == 0
    assert capsys.readouterr().out.endswith("with 4 codebooks of tiny, coded by how often\n")
    assert run("encode", tmp_path / "in.wav", plain, "--codec", codec) == 0
    counts = counts + 1e-9
    information = float((counts * np.log2(counts.sum(axis=1, keepdims=True) / counts)).sum()) / 8
    headers = []
    for path in (plain, short):
        with open_codec_file(path) as file:
            headers.append(2 * len(header_bytes(file.header)))
    saved = plain.stat().st_size - headers[0] - (short.stat().st_size - headers[1])
    assert saved == pytest.approx(400 - information - 5, abs=4)

    assert run("decode", short, tmp_path / "a.wav", "--codec", codec) == 1
    assert "tiny has no entropy model" in capsys.readouterr().err
    assert run("decode", short, tmp_path / "a.wav", "--codec", codec, "--entropy_model", tmp_path / "lm") == 0
    assert run("decode", plain, tmp_path / "b.wav", "--codec", codec) == 0
    np.testing.assert_array_equal(soundfile.read(tmp_path / "a.wav")[0], soundfile.read(tmp_path / "b.wav")[0])
    save_entropy_model(tmp_path / "lm", tensors, num_heads=tiny_encodec_lm.N, past_frames=6, name="another")
    capsys.readouterr()
    assert run("decode", short, tmp_path / "c.wav", "--codec", codec, "--entropy_model", tmp_path / "lm") == 1
    assert re.search(
        r"needs? the entropy model how often \(\w{16}\), but another \(\w{16}\) is", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kbps", "5"], "tiny has no 5 kbps; choose of 3.2, 6.4"),
        (["--num_codebooks", "5"], "5 codebooks asked for, but tiny has 1 to 4"),
        (["--num_codebooks", "0"], "0 codebooks asked for, but tiny has 1 to 4"),
    ],
)
def test_a_rate_that_the_codec_has_not_is_refused(codec, tmp_path, capsys, options, message):
    record(tmp_path / "in.wav")
    assert run("encode", tmp_path / "in.wav", tmp_path / "a.jac", "--codec", codec, *options) == 1
    assert message in capsys.readouterr().err


def test_what_cannot_be_done_is_said_before_the_work(codec, tmp_path, capsys):
    record(tmp_path / "in" / "a.wav")
    record(tmp_path / "in" / "a.flac")
    wav, out = tmp_path / "in" / "a.wav", tmp_path / "out"
    (tmp_path / "file").touch()
    (tmp_path / "none").mkdir()
    for arguments, message in (
        (("encode", tmp_path / "in", out), "in/a.flac and .*in/a.wav would both be written to .*out/a.jac"),
        (("encode", tmp_path / "none", out), "none: none of its 0 files is called .wav, .flac"),
        (("decode", tmp_path / "in", out), "in: none of its 2 files is called .jac"),
        (("encode", tmp_path / "in", tmp_path / "file"), "file is a file; the files of the folder"),
        (("encode", wav, tmp_path / "none"), "none is a folder; .*a.wav needs the name of a file"),
        (("encode", wav, tmp_path / "b.wav"), "b.wav: expected a name that ends in .jac"),
        (("decode", wav, tmp_path / "b.mp3"), "b.mp3: expected a name that ends in .wav or .flac"),
        (("encode", tmp_path / "no.wav", tmp_path / "b.jac"), "no.wav: there is no such file"),
        (("decode", tmp_path / "no.jac", tmp_path / "b.wav"), "no.jac: there is no such file"),
        (("decode", wav, tmp_path / "b.wav"), "a.wav: is no .jac file, .* begins with b'RIFF"),
    ):
        assert run(*arguments, "--codec", codec) == 1
        error = capsys.readouterr().err
        assert re.search(message, error)
        assert error.count("\n") == 1
    for arguments, message in (
        (("encode", wav, out), "the following arguments are required: --codec"),
        (("encode", wav, out, "--codec", codec, "--kbps", "3", "--num_codebooks", "2"), "not allowed with argument"),
        (("encode", wav, out, "--codec", codec, "--entropy_model", out), "--entropy_model needs --entropy"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*arguments)
        assert message in capsys.readouterr().err
