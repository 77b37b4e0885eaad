import pytest
from whisper.tokenizer import LANGUAGES as PUBLISHED
from whisper.tokenizer import TO_LANGUAGE_CODE

from jaxaudio.data.languages import LANGUAGES, language_code


def test_equals_the_published_table():
    assert list(LANGUAGES.items()) == list(PUBLISHED.items())  # the order is that of the ids


def test_every_published_name_and_code_is_known():
    for code in PUBLISHED:
        assert language_code(code) == language_code(f" {code.upper()} ") == code
    for name, code in TO_LANGUAGE_CODE.items():
        assert language_code(name) == language_code(name.title()) == code


@pytest.mark.parametrize(
    ("given", "hint"), [("germen", "Did you mean german"), ("xx", "an English name"), ("", "an English name")]
)
def test_unknown_languages_are_errors(given, hint):
    with pytest.raises(ValueError, match=rf"knows no language '{given}'.*{hint}"):
        language_code(given)
