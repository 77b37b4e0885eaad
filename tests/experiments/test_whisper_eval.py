"""Evaluations beside openai-whisper and jiwer on the same weights; data of each kind; killed runs; pages and errors."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jiwer
import numpy as np
import pytest
import soundfile
import torch
import whisper
import whisper_peers as peers
from tiny_librispeech import TEXTS, prepare
from whisper.normalizers import EnglishTextNormalizer

from experiments import whisper_eval, whisper_eval_report, whisper_paper
from experiments import whisper_paper_languages as languages
from experiments.__main__ import all_cards
from jaxaudio import config as config_lib
from jaxaudio.convert.whisper import save_whisper
from jaxaudio.data.languages import LANGUAGES as NAMES
from jaxaudio.data.result_lines import ResultLog, read_results
from jaxaudio.data.transcripts import Transcription

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = {"a": 2.0, "b": 3.5, "long": 31.0, "silent": 1.0}


@pytest.fixture(scope="module")
def peer():
    peer = peers.make_openai(3, peers.MULTILINGUAL)
    with torch.no_grad():
        peer.decoder.token_embedding.weight[peers.tokenizer(peers.MULTILINGUAL).eot] *= 1.7  # texts end early
    return peer


@pytest.fixture(scope="module")
def model(peer, tmp_path_factory):
    """The same weights as a folder of ours."""
    _, params, config = peers.from_openai(peer)
    folder = tmp_path_factory.mktemp("model") / "ours"
    save_whisper(folder, config, params, peers.tokenizer(peers.MULTILINGUAL))
    return folder


def theirs(peer, waveform):
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(waveform))
    options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False)
    return whisper.decode(peer, mel, options).text


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("audio"), np.random.default_rng(1)
    for name, seconds in SECONDS.items():
        noise = 0.2 * rng.standard_normal(round(16_000 * seconds))
        soundfile.write(folder / f"{name}.wav", (noise * (name != "silent")).clip(-1, 1).astype(np.float32), 16_000)
    return folder


@pytest.fixture(scope="module")
def heard(peer, recordings):
    """What openai-whisper hears."""
    return {name: theirs(peer, soundfile.read(recordings / f"{name}.wav", dtype="float32")[0]) for name in SECONDS}


def write_manifest(folder, recordings, texts, **fields):
    path = folder / "list.jsonl"
    lines = [{"audio": str(recordings / f"{name}.wav"), "text": text} | fields for name, text in texts.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def configured(row="manifest", **changes):
    return dataclasses.replace(whisper_eval.ROWS[row], **{name: str(v) if name in ("path", "model") else v
                                                        for name, v in changes.items()})  # fmt: skip


@pytest.mark.slow
def test_greedy_rates_are_those_of_openai_whisper_and_jiwer(model, recordings, heard, tmp_path, monkeypatch, capsys):
    assert len(set(heard.values())) > 1
    texts = {name: f"Mr. {text} colour" for name, text in heard.items()}  # a word before and one behind
    config = configured(
        path=write_manifest(tmp_path, recordings, texts),
        model=model,
        decoding="greedy",
        language="english",
        batch_size=3,
    )
    assert whisper_eval.main(config, tmp_path / "run") == 0
    results = read_results(tmp_path / "run" / "utterances.jsonl")
    normalise = EnglishTextNormalizer()
    assert [result["hypothesis"] for result in results] == [normalise(heard[name]).strip() for name in SECONDS]
    assert [result["cut_s"] for result in results] == [0.0, 0.0, 1.0, 0.0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    pairs = [normalise(text) for text in texts.values()], [normalise(text) for text in heard.values()]
    for unit, expected in (("words", jiwer.process_words(*pairs)), ("characters", None)):
        rate = expected.wer if expected else jiwer.cer([p.strip() for p in pairs[0]], [p.strip() for p in pairs[1]])
        assert summary[unit]["rate"] == pytest.approx(rate)
    errors = jiwer.process_words(*pairs)
    words = summary["words"]
    assert words["deletions"] + words["substitutions"] + words["insertions"] == (
        errors.deletions + errors.substitutions + errors.insertions
    )
    assert summary["audio_s"] == sum(SECONDS.values())
    assert (summary["num_cut"], summary["cut_s"], summary["paper"]) == (1, 1.0, None)
    assert [group["length"] for group in summary["by_length"]] == ["0–5 s", "30 s and longer"]
    html = (tmp_path / "run" / "report.html").read_text()
    assert f"word error rate {100 * words['rate']:.2f} % on 4 utterances" in html
    assert "1.0 s of audio were not heard" in html
    assert results[0]["reference"] in html
    assert "wrote" in capsys.readouterr().out

    # A run that is killed and goes on in batches of another size ends with the same files.
    def add_and_die(log, index, result, add=ResultLog.add):
        add(log, index, result)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResultLog, "add", add_and_die)
    with pytest.raises(KeyboardInterrupt):
        whisper_eval.main(config, tmp_path / "killed")
    monkeypatch.undo()
    assert len(read_results(tmp_path / "killed" / "utterances.jsonl")) == 1
    assert whisper_eval.main(config, tmp_path / "killed") == 0
    for name in ("utterances.jsonl", "summary.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    monkeypatch.setattr(whisper_eval, "load_whisper", None)  # all is heard
    assert whisper_eval.main(config, tmp_path / "run") == 0
    with pytest.raises(ValueError, match="decoding 'greedy' there, 'beam' now"):
        whisper_eval.main(dataclasses.replace(config, decoding="beam"), tmp_path / "run")


@pytest.fixture
def echo(monkeypatch):
    """Stands for the model: says " Ein Test." and records how it was asked."""
    asked = []

    def answer(model, params, files, **options):
        for file in files:
            asked.append((len(file), options))
            yield file, Transcription(" Ein Test. ", (), options["language"], len(file) / 16_000)

    monkeypatch.setattr(whisper_eval, "transcribe_many", answer)
    return asked


def test_beams_of_several_languages(model, recordings, tmp_path, echo):
    lines = [("a", "Ein Test!", "de"), ("b", "Kein Test?", "german"), ("long", "考试。", "zh"), ("silent", "", "de")]
    path = tmp_path / "list.jsonl"
    path.write_text(
        "".join(
            json.dumps({"audio": str(recordings / f"{name}.wav"), "text": text, "language": language}) + "\n"
            for name, text, language in lines
        )
    )
    assert whisper_eval.main(configured(path=path, model=model, seed=3), tmp_path / "run") == 0
    assert [options["language"] for _, options in echo] == ["de", "de", "de", "zh"]
    assert {(options["beam_size"], options["best_of"]) for _, options in echo} == {(5, 5)}
    results = read_results(tmp_path / "run" / "utterances.jsonl")
    assert [result["words"]["substitutions"] for result in results[:2]] == [0, 1]
    assert (results[2]["reference"], results[2]["hypothesis"]) == ("考 试", "e i n t e s t")
    assert results[2]["words"] == results[2]["characters"]
    assert results[3]["words"] == {"substitutions": 0, "deletions": 0, "insertions": 2, "num_reference": 0}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["words"]["num_reference"] == 6
    assert summary["words"]["rate"] == pytest.approx((0 + 1 + 7 + 2) / 6)


def test_librispeech_is_read_and_compared_with_the_paper(model, tmp_path, echo):
    prepare(tmp_path / "tfds", "2.1.1", lazy=True)
    config = configured("clean_beam", path=tmp_path / "tfds", model=model, column="base.en")
    assert whisper_eval.main(config, tmp_path / "run") == 0
    results = read_results(tmp_path / "run" / "utterances.jsonl")
    assert {result["id"] for result in results} == {"1-2-0", "1-2-1", "1-2-2"}
    assert {result["reference"] for result in results} == {"he hoped there would be stew", "stuff it into you", "ca va"}
    assert len(TEXTS) == 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["paper"] == ["base.en", 4.1]
    html = (tmp_path / "run" / "report.html").read_text()
    assert "the paper&#x27;s base.en has 4.1 %" in html
    assert "1,048,576" in html  # the card's steps
    assert whisper_eval.main(dataclasses.replace(config, max_utterances=2), tmp_path / "two") == 0
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["paper"] is None


def test_fleurs_is_read(model, recordings, tmp_path, echo):
    folder = tmp_path / "de_de"
    (folder / "audio" / "dev").mkdir(parents=True)
    (folder / "audio" / "dev" / "7.wav").write_bytes((recordings / "a.wav").read_bytes())
    (folder / "dev.tsv").write_text("1\t7.wav\tEin Test.\tein test\te i n |\t32000\tMALE\n")
    config = configured("fleurs", path=folder, split="dev", model=model, column="large-v2")
    assert whisper_eval.main(config, tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["words"]["rate"], summary["paper"]) == (0.0, ["large-v2", 4.5])


@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_what_cannot_be_heard_is_named_and_has_no_summary(
    model, recordings, tmp_path, echo, monkeypatch, capsys, decoding
):
    (tmp_path / "bad.wav").write_text("text")
    names = {"a": "Ein Test", "silent": "Ein Test"}
    path = write_manifest(tmp_path, recordings, names, language="en")
    path.write_text(
        path.read_text() + json.dumps({"audio": "bad.wav", "text": "", "language": "en", "id": "bad"}) + "\n"
    )
    monkeypatch.setattr(whisper_eval, "encode", lambda *_: None)
    monkeypatch.setattr(
        whisper_eval,
        "decode",
        lambda *arguments: [row and Transcription("Ein Test", (), "en", 1.0) for row in arguments[-1]],
    )
    config = configured(path=path, model=model, decoding=decoding)
    assert whisper_eval.main(config, tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert "bad: " in errors
    assert "1 utterances could not be heard" in errors
    assert not (tmp_path / "run" / "summary.json").exists()
    assert len(read_results(tmp_path / "run" / "utterances.jsonl")) == 2
    soundfile.write(tmp_path / "bad.wav", np.zeros(1600, np.float32), 16_000)
    assert whisper_eval.main(config, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_utterances"] == 3


def test_wrong_data_and_fields_are_named(recordings, tmp_path, model):
    path = tmp_path / "list.jsonl"
    for fields, message in [
        ({"language": "en"}, "a.wav: expected a text, a language and the task transcribe, got None, 'en'"),
        ({"text": "a"}, "got 'a', None"),
        ({"text": "a", "language": "en", "task": "translate"}, "'translate'"),
        ({"text": "a", "language": "elvish"}, "elvish"),
    ]:
        path.write_text(json.dumps({"audio": str(recordings / "a.wav")} | fields) + "\n")
        with pytest.raises(ValueError, match=message):
            whisper_eval.main(configured(path=path, model=model), tmp_path / "run")
    with pytest.raises(ValueError, match="column is 'huge'"):
        configured(column="huge")
    with pytest.raises(ValueError, match="batch_size is 0"):
        configured(batch_size=0)
    with pytest.raises(ValueError, match="max_utterances is -1"):
        configured(max_utterances=-1)
    command = [sys.executable, "-m", "experiments.whisper_eval", "--workdir", str(tmp_path / "x"), "--set"]
    done = subprocess.run(
        [*command, "row=fleurs", f"path={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("FleursError: there is no")
    assert len(done.stderr.splitlines()) == 1


def test_an_english_model_refuses_other_languages(recordings, tmp_path):
    config = dataclasses.replace(peers.ENGLISH, num_encoder_layers=1, num_decoder_layers=1, embed_dim=32)
    _, params, config = peers.from_openai(peers.make_openai(0, config))
    save_whisper(tmp_path / "model", config, params, peers.tokenizer(peers.ENGLISH))
    path = write_manifest(tmp_path, recordings, {"a": "Ein Test"}, language="de")
    with pytest.raises(ValueError, match="knows English alone"):
        whisper_eval.main(configured(path=path, model=tmp_path / "model"), tmp_path / "run")


LANGUAGES = {"TFDS_FOLDER": "en", "FLEURS/en_us": "en", "FLEURS/de_de": "de", "FLEURS/cmn_hans_cn": "zh",
             "german.jsonl": "de"}  # fmt: skip


def test_cards_are_the_papers_and_can_be_run():
    cards = [card for card in all_cards() if "whisper_eval" in card.command]
    assert cards == list(whisper_eval.CARDS)
    found = {(card.system.split()[1].rstrip(","), card.metric): card.reported for card in cards}
    assert found["base.en", "LibriSpeech test-clean, greedy, WER %"] == 4.2
    assert found["large-v2", "LibriSpeech test-other, beam, WER %"] == 4.9
    assert found["large-v2", "FLEURS zh, WER %"] == 14.7
    assert found["large-v2", "MLS de, WER %"] == 5.5
    for card in cards:
        assert card.reached is None
        words = card.command.split()
        config, _ = config_lib.parse_command_line("", whisper_eval.ROWS, words[3:])
        language = LANGUAGES[config.path]
        assert whisper_eval.reported(config, [language]) == (
            config.model.removeprefix("openai/whisper-"),
            card.reported,
        )


def test_models_have_the_papers_names():
    names = {"openai/whisper-large": "large", "large-v1": "large", "large": None, "openai/whisper-large-v3": None,
             "openai/whisper-tiny.en": "tiny.en", "medium": "medium", "runs/base": None}  # fmt: skip
    assert {name: whisper_paper.column_of(name) for name in names} == names


def test_the_page_shows_the_worst_first(tmp_path):
    def result(index, errors, seconds):
        words = {"substitutions": errors, "deletions": 0, "insertions": 0, "num_reference": 10}
        texts = {"reference": f"said {index}", "hypothesis": f"heard <{index}>"}
        return {"index": index, "id": f"id{index}", "duration_s": seconds, "cut_s": 0.0, "words": words,
                "characters": words, **texts}  # fmt: skip

    results = [result(i, i % 7, 1.0 + i) for i in range(40)]
    summary = whisper_eval_report.summarise(results)
    assert summary["words"]["rate"] == pytest.approx(sum(i % 7 for i in range(40)) / 400)
    assert [group["num_utterances"] for group in summary["by_length"]] == [4, 5, 5, 5, 5, 5, 11]
    assert summary["by_length"][0]["rate"] == pytest.approx((0 + 1 + 2 + 3) / 40)
    path = whisper_eval_report.write_page(tmp_path, configured(), results, summary | {"paper": None}, "cpu")
    html = path.read_text()
    assert html.index("id6<") < html.index("id13<") < html.index("id5<")
    assert html.count("heard &lt;") == 25


@pytest.mark.parametrize("kind", ["wer", "bleu"])
def test_lines_of_hours_are_least_squares(kind):
    from scipy.stats import linregress

    log_y = kind == "wer"
    points = whisper_paper.points("small")[kind]
    hours, values = np.transpose(list(points.values()))
    expected = linregress(np.log2(hours), np.log2(values) if log_y else values)
    fit = whisper_paper.fit_line(points, log_y=log_y)
    np.testing.assert_allclose(
        [fit.slope, fit.intercept, fit.r2], [expected.slope, expected.intercept, expected.rvalue**2], atol=1e-9
    )
    (axes,) = whisper_paper.hours_figure(points, log_y=log_y, x_label="hours", y_label=kind).axes
    assert [text.get_text() for text in axes.texts] == list(points)
    assert axes.lines[0].get_xdata().tolist() == hours.tolist()
    line = axes.lines[1]
    ends = expected.intercept + expected.slope * np.log2(line.get_xdata()[[0, -1]])
    np.testing.assert_allclose(line.get_ydata()[[0, -1]], 2**ends if log_y else ends, rtol=1e-9)


def test_hours_and_lines_are_the_papers():
    """The sums of figure 11, but for the rounding of its bars; the correlations of figures 3 and 4, section 3.4."""
    assert sum(languages.HOURS_TRANSCRIBED.values()) == pytest.approx(117_113, abs=3)
    assert sum(languages.HOURS_TRANSLATED.values()) == pytest.approx(125_739, abs=3)
    assert {*languages.HOURS_TRANSCRIBED, *languages.HOURS_TRANSLATED, *languages.FLEURS_WER} <= {*NAMES}
    points = whisper_paper.points("large")
    wer, bleu = (whisper_paper.fit_line(points[kind], log_y=kind == "wer") for kind in ("wer", "bleu"))
    assert round(wer.r2, 2) == 0.83
    assert round(2 ** (-1 / wer.slope)) in (15, 16)  # the paper says 16
    assert round(bleu.r2, 2) == 0.24


def test_the_papers_tables_are_printed(tmp_path, capsys):
    whisper_paper.main(whisper_paper.Config(), tmp_path)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "test-clean, greedy (table 8) 5.6 7.6 4.2 5.0 3.1 3.4 3.1 2.9 2.7 2.7" in lines
    assert "hi 102.3 101.1 38.4 26.8 26.9 21.5" in lines
    assert "it 13.8" in lines
    html = (tmp_path / "report.html").read_text()
    assert "It halves with 15.4 times the hours" in html
    assert html.count("<svg") == 2
    with pytest.raises(ValueError, match=r"column is 'base.en'"):
        whisper_paper.Config(column="base.en")
