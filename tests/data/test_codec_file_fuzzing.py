"""More than 100 000 damaged and made-up files through the reader; see `codec_file_fuzzer`."""

import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_no_damage_crashes_or_stops_the_reader_nor_changes_a_code():
    fuzzer = pathlib.Path(__file__).with_name("codec_file_fuzzer.py")
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, fuzzer], cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    one_chunk, *several_chunks, made_up = map(int, done.stdout.split())
    assert one_chunk == 0  # a file whose only chunk is lost is refused
    assert min(several_chunks) > 1000
    assert 1000 < made_up < 21_000
