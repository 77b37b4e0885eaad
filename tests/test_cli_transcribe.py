"""`jaxaudio transcribe` beside openai-whisper's command: the same options, the same files; and what is ours."""

import dataclasses
import importlib.resources
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import soundfile
import soxr
import torch
import whisper
import whisper_peers as peers

from jaxaudio import cli
from jaxaudio.cli import transcribe as command
from jaxaudio.convert.whisper import convert_whisper
from jaxaudio.data.result_lines import ResultLog, read_results
from jaxaudio.data.transcripts import Segment, Span, Transcription
from jaxaudio.data.voice_activity import EnergyDetector, SileroDetector

ROOT = pathlib.Path(__file__).parents[1]
openai_command = importlib.import_module("whisper.transcribe")  # the name `whisper.transcribe` is the function's
QUICK = ["--beam_size", "None", "--temperature_increment_on_fallback", "None", "--language", "en", "--verbose", "False"]


def save_openai(folder, seed, config, end_scale=1.0):
    peer = peers.make_openai(seed, config)
    with torch.no_grad():
        peer.decoder.token_embedding.weight[peers.tokenizer(config).eot] *= end_scale  # texts end early
    torch.save({"dims": dataclasses.asdict(peer.dims), "model_state_dict": peer.state_dict()}, folder / "model.pt")
    shutil.copy(peers.tokenizer_file(config), folder)
    return folder / "model.pt"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The same weights as OpenAI's file and as a folder of ours."""
    folder = tmp_path_factory.mktemp("model")
    file = save_openai(folder, 3, peers.MULTILINGUAL, end_scale=1.5)
    convert_whisper(file, folder / "ours", layout="jaxaudio")
    return file, folder / "ours"


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """Noise that swells and fades, three files of different lengths, and two that are no audio."""
    folder, rng = tmp_path_factory.mktemp("audio"), np.random.default_rng(0)
    for name, seconds in (("long", 33.0), ("b", 4.0), ("c", 2.5)):
        time_s = np.arange(round(16_000 * seconds)) / 16_000
        noise = 0.2 * np.sin(time_s) ** 2 * rng.standard_normal(len(time_s))
        soundfile.write(folder / f"{name}.wav", noise.clip(-1, 1).astype(np.float32), 16_000)
    soundfile.write(folder / "silent.wav", np.zeros(16_000, np.float32), 16_000)
    (folder / "text.wav").write_text("This is no audio at all, but text.\n" * 9)
    (folder / "empty.wav").write_bytes(b"")
    return folder


@pytest.fixture(autouse=True)
def _audio_without_ffmpeg(monkeypatch):
    monkeypatch.setattr(whisper.audio, "load_audio", lambda path: soundfile.read(path, dtype="float32")[0])


def ours(*arguments):
    """Runs our command in this process, whose compiled programs are kept from test to test."""
    return cli.main(["transcribe", *map(str, arguments), "--compilation_cache", "None"])


def theirs(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["whisper", *map(str, arguments)])
    openai_command.cli()


# Given as a number, since openai-whisper writes its default into the JSON as a whole number.
NO_FALLBACK = ["--temperature", "0", "--temperature_increment_on_fallback", "None"]
CASES = {
    "beams": NO_FALLBACK,
    "words": [
        *[*NO_FALLBACK, "--beam_size", "None", "--language", "ru"],
        *["--task", "translate", "--word_timestamps", "True", "--highlight_words", "True", "--max_line_width", "24"],
        *["--max_line_count", "2", "--initial_prompt", "Ein Satz.", "--condition_on_previous_text", "False"],
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_files_are_those_of_openai_whispers_command(weights, audio, tmp_path, monkeypatch, options):
    their_model, our_model = weights
    file = audio / "long.wav"
    theirs(monkeypatch, file, "--model", their_model, "--output_dir", tmp_path / "theirs", "--fp16", "False", *options)
    assert ours(file, "--model", our_model, "--output_dir", tmp_path / "ours", "--fp16", "False", *options) == 0
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert names == [f"long.{suffix}" for suffix in ("json", "srt", "tsv", "txt", "vtt")]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names[1:]:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    text = (tmp_path / "theirs" / "long.json").read_text()
    assert len(json.loads(text)["segments"]) > 1
    # The same but for the last digits of probabilities.
    assert json.dumps(with_floats_of(text, (tmp_path / "ours" / "long.json").read_text())) == text


def with_floats_of(theirs, ours):
    floats = []

    def remember(text):
        floats.append(float(text))
        return floats[-1]

    json.loads(theirs, parse_float=remember)
    count = iter(floats)

    def replaced(text):
        expected = next(count)
        np.testing.assert_allclose(float(text), expected, atol=1e-4)
        return expected

    return json.loads(ours, parse_float=replaced)


def captured(monkeypatch, *arguments, language="en"):
    """What our command hands to `transcribe_many`, which does nothing here but to finish every file."""
    calls = []

    def capture(model, params, files, **rest):
        calls.append({"model": model, "params": params, "files": files, **rest})
        for file in files:
            rest["progress"](file, 1.0, 2.0)
            yield file, Transcription("", (), rest["options"].language or language, 2.0)

    monkeypatch.setattr(command, "transcribe_many", capture)
    assert ours(*arguments) == 0
    (call,) = calls
    return call


OPTIONS = [
    [],
    ["--temperature", "0.3", "--best_of", "3", "--temperature_increment_on_fallback", "0.1"],
    ["--temperature", "0.4"],
    ["--beam_size", "3", "--patience", "1.5", "--length_penalty", "0.6", "--best_of", "None"],
    ["--suppress_tokens", "1,2,3", "--clip_timestamps", "0,1,1.5", "--suppress_tokens", ""],
    ["--suppress_tokens", "-1", "--no_speech_threshold", "None", "--logprob_threshold", "None"],
    ["--compression_ratio_threshold", "2", "--task", "translate", "--language", "Castilian"],
    ["--initial_prompt", "Hello", "--carry_initial_prompt", "True", "--condition_on_previous_text", "False"],
    ["--word_timestamps", "True", "--prepend_punctuations", "(", "--hallucination_silence_threshold", "2"],
    ["--word_timestamps", "True", "--append_punctuations", ")", "--language", "yue"],
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_reach_the_algorithm_as_in_openai_whisper(weights, audio, tmp_path, monkeypatch, options):
    expected = []
    monkeypatch.setattr(openai_command, "transcribe", lambda *_, **kw: expected.append(kw) or {"segments": []})
    monkeypatch.setattr(whisper, "load_model", lambda *_, **__: None)
    shared = [audio / "b.wav", "--output_dir", tmp_path, "--output_format", "txt", *options]
    theirs(monkeypatch, "--model", weights[0], *shared)
    (expected,) = expected
    options = captured(monkeypatch, "--model", weights[1], *shared)["options"]
    for name in ("verbose", "fp16"):
        del expected[name]
    expected["suppress_tokens"] = tuple(int(token) for token in expected["suppress_tokens"].split(",") if token)
    points = expected["clip_timestamps"].split(",")
    expected["clip_timestamps"] = tuple(map(float, points))
    languages = {"Castilian": "es"}
    expected["language"] = languages.get(expected["language"], expected["language"])
    expected["temperature"] = tuple(expected["temperature"])
    if min(expected["temperature"]) > 0:  # which openai-whisper drops inside
        expected["beam_size"] = None
    assert {name: getattr(options, name) for name in expected if name != "condition_on_previous_text"} == {
        name: value for name, value in expected.items() if name != "condition_on_previous_text"
    }
    assert options.conditions == expected["condition_on_previous_text"]


def test_defaults_are_those_of_openai_whispers_command(monkeypatch):
    found = []

    def parse_args(parser):
        found.append(parser)
        raise SystemExit

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", parse_args)
    with pytest.raises(SystemExit):
        openai_command.cli()
    monkeypatch.undo()
    parsed = vars(cli._parser().parse_args(["transcribe", "a.wav"]))
    differ = {
        "device": None,  # an accelerator if there is one
        "fp16": "False",
        "threads": "0",
        "output_format": None,  # "all", but nothing where there is a manifest
        "suppress_tokens": (-1,),
        "condition_on_previous_text": None,  # True, but not where that is impossible
    }
    actions = {action.dest: action for action in found[0]._actions if action.dest not in ("help", "audio")}
    assert {name: parsed[name] for name in actions} == {name: a.default for name, a in actions.items()} | differ
    shorts = [flag for action in actions.values() for flag in action.option_strings]
    assert {"-o", "-f"} <= set(shorts)
    assert cli._parser().parse_args(["transcribe", "a.wav", "-o", "x", "-f", "srt"]).output_dir == "x"


def test_our_options_reach_the_algorithm(weights, audio, tmp_path, monkeypatch):
    files = [audio / "b.wav", audio / "c.wav"]
    shared = ["--model", weights[1], "--output_dir", tmp_path]
    call = captured(
        monkeypatch,
        *[*files, *shared, "--batched", "--vad", "energy", "--hotwords", "Ortega", "--repetition_penalty", "1.2"],
        *["--no_repeat_ngram_size", "3", "--int8", "--dtype", "bfloat16", "--seed", "7", "--device", "cpu"],
    )
    options = call["options"]
    assert (options.batched, options.batch_size, options.vad) == (True, 8, EnergyDetector())
    assert (options.hotwords, options.repetition_penalty, options.no_repeat_ngram_size) == ("Ortega", 1.2, 3)
    assert not options.conditions
    assert call["model"].config.dtype == "bfloat16"
    assert call["params"]["decoder"]["token_embedding"].dtype == np.int8
    assert (call["key"] == jax.random.key(7)).all()
    assert [file.audio for file in call["files"]] == [str(file) for file in files]
    call = captured(monkeypatch, *files, *shared)
    assert (call["options"].batch_size, call["model"].config.dtype, call["options"].vad) == (2, "float32", None)
    assert call["params"]["decoder"]["token_embedding"].dtype == np.float32
    silero = importlib.resources.files("silero_vad") / "data" / "silero_vad.onnx"
    options = captured(monkeypatch, files[0], *shared, "--vad", silero)["options"]
    assert (options.batch_size, options.vad) == (1, SileroDetector(str(silero)))


USAGE = [
    ([], "give audio files, or a list of them with --manifest"),
    (["a.wav", "--manifest", "l.jsonl"], "and not both"),
    (["a.wav", "--process_index", "0", "--process_count", "2"], "with --manifest"),
    (["--manifest", "l.jsonl", "--process_count", "2"], "go together"),
    (["a.wav", "--language", "xx"], "no language 'xx'"),
    (["a.wav", "--language", "Germn"], "Did you mean german"),
    (["a.wav", "--word_timestamps", "yes"], "expected True or False, got 'yes'"),
    (["--word_timestamps", "a.wav"], "got 'a.wav'; put files first"),
    (["a.wav", "--max_line_width", "20"], "--max_line_width requires --word_timestamps True"),
    (["a.wav", "--suppress_tokens", "1;2"], "got '1;2'"),
    (["a.wav", "--beam_size", "many"], "invalid int or None value: 'many'"),
    (["a.wav", "--fp16", "True"], "'True' cannot act here: computation in 16 bits is --dtype bfloat16"),
    (["a.wav", "--threads", "4"], "'4' cannot act here: XLA takes all CPUs"),
    (["a.wav", "--model_dir", "models"], "'models' cannot act here: models lie in the cache of huggingface_hub"),
    (["a.wav", "--device", "cuda:1"], "invalid choice: 'cuda:1'"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE)
def test_wrong_usage_is_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_status:
        ours(*arguments)
    assert exit_status.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_cannot_work_is_said_before_the_model_is_read(audio, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_whisper", None)
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "id.jsonl").write_text(json.dumps({"audio": str(audio / "b.wav"), "id": "a/b"}) + "\n")
    (tmp_path / "task.jsonl").write_text(json.dumps({"audio": "b.wav", "task": "translate"}) + "\n")
    (tmp_path / "bad.jsonl").write_text("no list\n")
    for arguments, message in [
        (["b.wav", "--temperature", "1.5"], "--temperature 1.5 rises"),
        (["b.wav", "--temperature_increment_on_fallback", "0"], "--temperature_increment_on_fallback 0.0"),
        (["b.wav", "--best_of", "3", "--temperature_increment_on_fallback", "None"], "best_of=3"),
        (["b.wav", "--batched", "--condition_on_previous_text", "True"], "condition_on_previous_text=True"),
        (["b.wav", "--clip_timestamps", "5,3"], "(5.0, 3.0)"),
        (["b.wav", "--vad", str(tmp_path / "text.onnx")], "text.onnx"),
        (["b.wav", "x/b.mp3"], "b.wav and x/b.mp3 would both be written to b.*"),
        (["b.wav", "b.wav"], "would both be written"),
        (["b.wav", "-f", "txt", "--word_timestamps", "True", "--max_line_width", "9"], "'txt'"),
        (["--manifest", str(tmp_path / "id.jsonl"), "-f", "srt"], "'a/b', cannot be the name of a file"),
        (["--manifest", str(tmp_path / "task.jsonl")], "task 'translate', but --task is 'transcribe'"),
        (["--manifest", str(tmp_path / "bad.jsonl")], "bad.jsonl:1: is not JSON"),
        (["--manifest", str(tmp_path / "no.jsonl")], "there is no such file"),
        (
            ["--manifest", str(tmp_path / "id.jsonl"), "--process_index", "2", "--process_count", "2"],
            "index=2 of count=2",
        ),
        (["b.wav", "-o", str(audio / "b.wav" / "x")], "Not a directory"),
    ]:
        assert ours(*arguments) == 1, arguments
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("jaxaudio transcribe: ")
        assert message in lines[0]


def test_a_model_that_cannot_be_read_is_one_line(weights, audio, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(weights[1], broken)
    tensors = load_file(broken / "parameters.safetensors")
    del tensors["decoder/transformer/layers/1/cross_attention/query/kernel"]
    save_file(tensors, broken / "parameters.safetensors")
    for model, message in [
        (broken, "decoder/transformer/layers/1/cross_attention/query/kernel"),
        (tmp_path / "none", "no size"),
        (audio, "no config.json"),
    ]:
        assert ours(audio / "b.wav", "--model", model, "--output_dir", tmp_path / "out") == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert message in lines[0]
    assert not list((tmp_path / "out").iterdir())


def test_bad_files_are_reported_and_the_others_go_on(weights, audio, tmp_path, capsys):
    files = [audio / name for name in ("text.wav", "b.wav", "none.wav", "empty.wav", "c.wav")]
    assert ours(*files, "--model", weights[1], "-o", tmp_path, *QUICK, "-f", "txt", "--batch_size", 2) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3, lines
    for line, name in zip(sorted(lines), ("empty.wav", "none.wav", "text.wav"), strict=True):
        assert line.startswith(f"jaxaudio transcribe: {audio / name}: ")
        assert line.count(f"{audio / name}: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.txt", "c.txt"]


def test_what_is_heard_is_printed(weights, audio, tmp_path, monkeypatch, capsys):
    segment = Segment(0, 0, 1.0, 3661.5, " Guten Tag.", (), 0.0, 0.0, 1.0, 0.0)
    skipped = (Span(0.0, 1.0, "voice_activity"), Span(2.0, 3.5, "no_speech"), Span(4.0, 4.5, "voice_activity"))

    def answer(model, params, files, progress, **_):
        for file in files:
            cleared = dataclasses.replace(segment, start=3661.5, text="")
            yield file, Transcription(" Guten Tag.", (segment, cleared), "de", 5.0, (), skipped)

    monkeypatch.setattr(command, "transcribe_many", answer)
    files = [audio / "b.wav", audio / "c.wav"]
    shared = ["--model", weights[1], "-o", tmp_path]
    assert ours(*files, *shared) == 0
    printed = capsys.readouterr()
    line = "[00:01.000 --> 01:01:01.500]  Guten Tag."
    assert printed.out.splitlines() == [
        str(files[0]), "Detected language: German", line, str(files[1]), "Detected language: German", line
    ]  # fmt: skip
    lines = printed.err.splitlines()
    assert "3,705,152 parameters, float32 on cpu, in" in lines[0]
    assert lines[1] == f"jaxaudio transcribe: {files[0]}: skipped 1.50 s by voice_activity, 1.50 s by no_speech"
    assert "of it compiling" in lines[-1]
    assert ours(files[0], *shared, "--language", "de") == 0
    assert capsys.readouterr().out.splitlines() == [line]
    assert ours(files[0], *shared, "--verbose", "False") == 0
    assert capsys.readouterr() == ("", "")


def test_the_bar_counts_the_seconds_of_all_files(weights, audio, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def answer(model, params, files, progress, **_):
        b, text, c = files
        progress(b, 3.0, 4.0)
        yield text, ValueError("no audio")
        progress(c, 2.5, 2.5)
        yield b, Transcription("", (), "en", 4.0)
        yield c, Transcription("", (), "en", 2.5)

    monkeypatch.setattr(command, "transcribe_many", answer)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    files = [audio / name for name in ("b.wav", "text.wav", "c.wav")]
    assert ours(*files, "--model", weights[1], "-o", tmp_path, "--verbose", "False") == 1
    assert "0 of 6 s" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert "6 of 6 s of audio" in terminal.getvalue()


def test_an_english_model_hears_english(audio, tmp_path, capsys):
    config = dataclasses.replace(peers.ENGLISH, num_encoder_layers=1, num_decoder_layers=1, embed_dim=32)
    model = save_openai(tmp_path, 0, config)
    nothing_to_hear = [audio / "silent.wav", "--vad", "energy", "--model", model, "-o", tmp_path]
    assert ours(*nothing_to_hear, "--language", "German") == 0
    assert "model.pt knows English alone, not German; using English" in capsys.readouterr().err
    assert json.loads((tmp_path / "silent.json").read_text()) == {"text": "", "segments": [], "language": "en"}
    assert ours(*nothing_to_hear) == 0
    assert "English alone" not in capsys.readouterr().err


@pytest.fixture
def manifest(audio, tmp_path):
    """Three utterances, one of them in a folder of its own and with the same name as another."""
    folder = tmp_path / "list"
    (folder / "x").mkdir(parents=True)
    shutil.copy(audio / "b.wav", folder)
    shutil.copy(audio / "c.wav", folder / "x" / "b.wav")
    lines = [{"audio": "b.wav", "id": "one"}, {"audio": "x/b.wav"}, {"audio": str(audio / "c.wav"), "language": "de"}]
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_manifest(weights, manifest, folder, *arguments):
    greedy = [option for option in QUICK if option not in ("--language", "en")]
    return ours("--manifest", manifest, "--model", weights[1], "-o", folder, *greedy, "--batch_size", 2, *arguments)


@pytest.mark.slow
def test_processes_share_a_list_and_killed_ones_go_on(weights, manifest, audio, tmp_path, monkeypatch, capsys):
    whole, shared, killed = tmp_path / "whole", tmp_path / "shared", tmp_path / "killed"
    assert run_manifest(weights, manifest, whole) == 0
    results = read_results(whole / "list.0-of-1.jsonl")
    assert sorted(path.name for path in whole.iterdir()) == ["list.0-of-1.jsonl", "list.0-of-1.settings.json"]
    assert [(result["index"], result["audio"], result["id"]) for result in results] == [
        (0, "b.wav", "one"), (1, "x/b.wav", None), (2, str(audio / "c.wav"), None)
    ]  # fmt: skip
    assert results[2]["language"] == "de"
    for result, seconds in zip(results, (4.0, 2.5, 2.5), strict=True):
        assert result["duration_s"] == seconds
        spans = sorted((span["start_s"], span["end_s"]) for span in result["heard"] + result["skipped"])
        assert (spans[0][0], spans[-1][1]) == (0.0, seconds)

    for index in (1, 0):
        assert run_manifest(weights, manifest, shared, "--process_index", index, "--process_count", 2) == 0
    parts = [read_results(shared / f"list.{index}-of-2.jsonl") for index in (0, 1)]
    assert [[result["index"] for result in part] for part in parts] == [[0, 2], [1]]
    assert [parts[0][0], parts[1][0], parts[0][1]] == results

    def add_one_and_die(log, index, result, add=ResultLog.add):
        add(log, index, result)
        with log.path.open("ab") as file:
            file.write(b'{"index": 1, "text": "torn')
        raise KeyboardInterrupt

    monkeypatch.setattr(ResultLog, "add", add_one_and_die)
    assert run_manifest(weights, manifest, killed) == 130
    assert "interrupted" in capsys.readouterr().err
    assert (killed / "list.0-of-1.jsonl").read_bytes().count(b"\n") == 1
    monkeypatch.undo()
    assert run_manifest(weights, manifest, killed, "--verbose", "True") == 0
    assert "1 of 3 were done before" in capsys.readouterr().err
    name = "list.0-of-1.jsonl"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()

    monkeypatch.setattr(command, "load_whisper", None)  # nothing is left to do
    assert run_manifest(weights, manifest, killed) == 0
    assert run_manifest(weights, manifest, killed, "--seed", 3) == 1
    assert "seed 0 there, 3 now" in capsys.readouterr().err


def test_a_manifest_writes_files_too_and_does_again_what_is_missing(weights, manifest, tmp_path, monkeypatch):
    called = []

    def answer(model, params, files, progress, **_):
        called.append([file.id or pathlib.Path(file.audio).parent.name for file in files])
        for file in reversed(files):
            yield file, Transcription("", (), "en", 1.0)

    monkeypatch.setattr(command, "transcribe_many", answer)
    names = ["one", "b", "c"]
    for expected in (1, 1, 1):
        assert run_manifest(weights, manifest, tmp_path / "out", "-f", "vtt") == 0
        assert len(called) == expected
        assert sorted(path.stem for path in (tmp_path / "out").glob("*.vtt")) == sorted(names)
    (tmp_path / "out" / "b.vtt").unlink()
    assert run_manifest(weights, manifest, tmp_path / "out", "-f", "vtt") == 0
    assert called[1:] == [["x"]]
    results = read_results(tmp_path / "out" / "list.0-of-1.jsonl")
    assert [result["index"] for result in results] == [0, 1, 2]
    settings = json.loads((tmp_path / "out" / "list.0-of-1.settings.json").read_text())
    assert settings["resampler"] == f"soxr {soxr.__version__} VHQ"
    assert run_manifest(weights, manifest, tmp_path / "out", "-f", "all") == 0
    assert len(called[2]) == 3


def test_a_failed_utterance_is_tried_again(weights, manifest, tmp_path, monkeypatch, capsys):
    fails = True

    def answer(model, params, files, progress, **_):
        for file in files:
            yield file, OSError("gone") if fails and file.id else Transcription("", (), "en", 1.0)

    monkeypatch.setattr(command, "transcribe_many", answer)
    assert run_manifest(weights, manifest, tmp_path / "out") == 1
    assert "b.wav: gone" in capsys.readouterr().err
    assert [result["index"] for result in read_results(tmp_path / "out" / "list.0-of-1.jsonl")] == [1, 2]
    fails = False
    assert run_manifest(weights, manifest, tmp_path / "out") == 0
    assert [result["index"] for result in read_results(tmp_path / "out" / "list.0-of-1.jsonl")] == [0, 1, 2]


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_without_compiling_again(weights, manifest, tmp_path):
    line = [sys.executable, "-m", "jaxaudio.cli", "transcribe", "--manifest", manifest, "--model", weights[1]]
    line += [*QUICK, "--verbose", "True", "--batch_size", 1, "--compilation_cache", tmp_path / "cache"]
    lines = tmp_path / "out" / "list.0-of-1.jsonl"

    def start():
        return subprocess.Popen(
            [*map(str, line), "-o", tmp_path / "out"], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )

    process = start()
    while process.poll() is None and not (lines.exists() and lines.read_bytes().count(b"\n")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = lines.read_bytes().count(b"\n")
    assert done
    process = start()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert [result["index"] for result in read_results(lines)] == [0, 1, 2]
    if process.returncode == 0 and done < 3:
        assert b"compiling 0 programs" in errors
    assert os.listdir(tmp_path / "cache")
