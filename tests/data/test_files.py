"""Files appear whole, under their own name and with ordinary permissions, or not at all."""

import stat
import subprocess
import sys

import pytest

from jaxaudio.data.files import atomic_path


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "sound.wav"
    with atomic_path(path) as temporary:
        assert (temporary.parent, temporary.suffix) == (path.parent, ".wav")
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_former_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("former")

    def fail_halfway():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail_halfway()
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_any_new_file(tmp_path):
    code = """if True:
        import os, sys
        os.umask(0o027)
        from jaxaudio.data.files import atomic_path
        with atomic_path(sys.argv[1]) as temporary:
            temporary.touch()
        assert os.umask(0) == 0o027
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
