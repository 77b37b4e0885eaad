"""`jaxaudio convert` and `jaxaudio inspect` of codecs."""

import codec_peers
import pytest
import torch
from safetensors.numpy import load_file

from jaxaudio import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec") / "hf"
    codec_peers.make_dac("odd").save_pretrained(folder)
    return folder


def test_convert_goes_both_ways(folder, tmp_path, capsys):
    ours, back, file = tmp_path / "ours", tmp_path / "back", tmp_path / "weights.pth"
    assert cli.main(["convert", str(folder), str(ours)]) == 0
    assert capsys.readouterr().out == f"{ours}: dac, from the hf to the jaxaudio layout\n"
    assert cli.main(["convert", str(ours), str(back)]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (folder, back))
    assert {name: array.tobytes() for name, array in before.items()} == {name: a.tobytes() for name, a in after.items()}
    torch.save(codec_peers.dac_file(codec_peers.make_dac("odd")), file)
    assert cli.main(["convert", str(file), str(ours)]) == 1
    assert f"{ours} exists" in capsys.readouterr().err
    assert cli.main(["convert", str(file), str(ours), "--overwrite"]) == 0
    assert cli.main(["convert", str(file), str(back), "--tokenizer", "x"]) == 1
    assert "--tokenizer x" in capsys.readouterr().err


def test_inspect_shows_a_codec(folder, tmp_path, capsys):
    file = tmp_path / "weights.pth"
    peer = codec_peers.make_dac("odd")
    torch.save(codec_peers.dac_file(peer), file)
    for path, layout in ((folder, "hf"), (file, "original")):
        assert cli.main(["inspect", str(path)]) == 0
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        assert "encoder/conv_in/kernel [7, 1, 4] float32 28" in lines
        assert f"total {sum(p.numel() for p in peer.parameters()):,}" in lines
        for line in (f"layout {layout}", "kind dac", "audio 16000 Hz, 1 channel", "bandwidths any number of codes"):
            assert line in lines
        assert "frames 533.333 a second, of 30 samples" in lines
        assert "codes 5 of 16 a frame, 2.13333 kbps each" in lines
    (tmp_path / "other.bin").write_bytes(b"nothing")
    assert cli.main(["inspect", str(tmp_path / "other.bin")]) == 1
    assert "other.bin is refused" in capsys.readouterr().err
