"""Word and character error rates, and the normalisation of text that Whisper's paper scores with.

Radford et al. 2022, https://arxiv.org/abs/2212.04356, sections 3.2 and 4.4 and appendix C.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxaudio.data.languages import LANGUAGES_WITHOUT_SPACES, language_code

# Rules of the package whisper-normalizer 0.1.15 that openai-whisper, the code of the paper, does not have.
_ADDED_RULES = (r"\bkinda\b", r"\bsorta\b", r"\bdunno\b", r"\bcause\b")
_NUM_RULES = 49


@dataclasses.dataclass(frozen=True)
class ErrorCounts:
    """The errors of an alignment, of one text or summed over many.

    Attributes:
        substitutions: Words (or characters) of the reference with another word in their place.
        deletions: Words of the reference without any in their place.
        insertions: Words beside the reference.
        num_reference: Words of the reference.
    """

    substitutions: int
    deletions: int
    insertions: int
    num_reference: int

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.num_reference + other.num_reference,
        )

    @property
    def errors(self) -> int:
        """All three kinds together, the edit distance."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per word of the reference; of an empty reference 0 if nothing was inserted, else infinity."""
        if self.num_reference == 0:
            return math.inf if self.errors else 0.0
        return self.errors / self.num_reference


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Word errors summed over texts; `.rate` is the corpus' word error rate. Words are what whitespace separates.

    Every text is aligned with the fewest errors; where several alignments have as few, the one with the fewest
    substitutions counts, so that the three counts are unique.

    Args:
        references: What was said, normalised. An empty one only adds insertions.
        hypotheses: What was recognised, one for each reference.

    Raises:
        ValueError: There are not as many of one as of the other, or a text was given for a list of texts.
    """
    return _count(references, hypotheses, str.split)


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """As `word_errors`, of characters (code points, inner spaces included) instead of words."""
    return _count(references, hypotheses, lambda text: list(text.strip()))


def _count(references: Sequence[str], hypotheses: Sequence[str], split: Callable[[str], list[str]]) -> ErrorCounts:
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise ValueError(f"Errors are counted over lists of texts; got {references!r} and {hypotheses!r}.")
    if len(references) != len(hypotheses):
        raise ValueError(f"Every reference has one hypothesis; got {len(references)} and {len(hypotheses)}.")
    pairs = zip(references, hypotheses, strict=True)
    return sum(
        (_align(split(reference), split(hypothesis)) for reference, hypothesis in pairs), ErrorCounts(0, 0, 0, 0)
    )


def _align(reference: list[str], hypothesis: list[str]) -> ErrorCounts:
    """Levenshtein's table row by row, whose cells hold errors * 2^32 + substitutions, so that minima break ties."""
    numbers = {}
    rows = np.array([numbers.setdefault(word, len(numbers)) for word in reference], np.int64)
    columns = np.array([numbers.setdefault(word, len(numbers)) for word in hypothesis], np.int64)
    error, substitution = 1 << 32, (1 << 32) + 1
    insertions = np.arange(len(columns) + 1, dtype=np.int64) * error
    costs = insertions
    for row in rows:
        below = costs + error
        below[1:] = np.minimum(below[1:], costs[:-1] + np.where(columns == row, 0, substitution))
        # An insertion costs the same everywhere, so the best run of insertions up to a column is a running minimum.
        costs = np.minimum.accumulate(below - insertions) + insertions
    num_errors, substitutions = divmod(int(costs[-1]), error)
    deletions = (num_errors - substitutions + len(reference) - len(hypothesis)) // 2
    return ErrorCounts(substitutions, deletions, num_errors - substitutions - deletions, len(reference))


def normaliser(language: str) -> Callable[[str], str]:
    """The paper's normalisation of references and hypotheses in a language.

    English has rules for contractions, titles, numbers, currencies and British spellings. All others only lose
    brackets, symbols and case; where words are not separated, every letter becomes a word, so that `word_errors` counts
    characters. Both give what openai-whisper 20250625 gives, trailing space included.

    Args:
        language: A code or an English name.

    Raises:
        ImportError: The package whisper-normalizer is not installed.
        ValueError: Whisper knows no such language; or the package's English rules are not the known ones.
    """
    return _normaliser(language_code(language))


@functools.cache
def _normaliser(code: str) -> Callable[[str], str]:
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    if code != "en":
        return BasicTextNormalizer(split_letters=code in LANGUAGES_WITHOUT_SPACES)
    english = EnglishTextNormalizer()
    for pattern in _ADDED_RULES:
        english.replacers.pop(pattern, None)
    if len(english.replacers) != _NUM_RULES:
        raise ValueError(
            f"The English normaliser of openai-whisper has {_NUM_RULES} rules, that of the installed "
            f"whisper-normalizer {len(english.replacers)} besides {_ADDED_RULES}, so that its rates would not compare "
            "with published ones. Install whisper-normalizer 0.1.15."
        )
    return english
