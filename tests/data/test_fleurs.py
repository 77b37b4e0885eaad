"""FLEURS' layout, made by hand from rows of the release."""

import pytest

from jaxaudio.data.fleurs import FleursError, fleurs_language, read_fleurs

ROWS = (
    '1675\t1.wav\tHe said: "Stop!"\the said stop\th e | s a i d | s t o p |\t160000\tMALE',
    "1675\t2.wav\tHe said: Stop!\the said stop\th e | s a i d | s t o p |\t40000\tFEMALE",
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "en_us"
    (folder / "audio" / "test").mkdir(parents=True)
    for name in ("1.wav", "2.wav"):
        (folder / "audio" / "test" / name).write_bytes(b"")
    (folder / "test.tsv").write_text("\n".join(ROWS) + "\n")
    return folder


def test_recordings_have_their_text_language_and_length(folder):
    first, second = read_fleurs(folder)
    assert (first.audio, first.text) == (str(folder / "audio" / "test" / "1.wav"), "he said stop")
    assert (first.language, first.duration_s, first.id) == ("en", 10.0, "1")
    assert (second.duration_s, second.id) == (2.5, "2")


@pytest.mark.parametrize(
    ("name", "code"),
    [("de_de", "de"), ("es_419", "es"), ("cmn_hans_cn", "zh"), ("yue_hant_hk", "yue"), ("fil_ph", "tl"),
     ("nb_no", "no"), ("jv_id", "jw"), ("he_il", "he")],
)  # fmt: skip
def test_languages_are_whispers(name, code):
    assert fleurs_language(name) == code


def test_what_is_wrong_is_named(folder):
    with pytest.raises(FleursError, match="there is no .*train.tsv"):
        read_fleurs(folder, "train")
    with pytest.raises(FleursError, match="'ast_es' is no language of FLEURS that Whisper knows"):
        fleurs_language("ast_es")
    table = folder / "test.tsv"
    for text, message in [
        (ROWS[0].replace("\tMALE", ""), "test.tsv:1: expected 7 fields"),
        (ROWS[0] + "\n" + ROWS[1].replace("40000", "long"), "test.tsv:2: .*'long'"),
        (ROWS[0].replace("1.wav", "3.wav"), "3.wav; unpack audio/test.tar.gz"),
        ("", "test.tsv is empty"),
    ]:
        table.write_text(text)
        with pytest.raises(FleursError, match=message):
            read_fleurs(folder)
