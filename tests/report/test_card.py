"""Cards refuse to be incomplete, and a row that was not trained says so."""

import pytest

from jaxaudio.report.card import Card, describe, table

GOOD = {
    "system": "Music Transformer, relative",
    "paper": "Huang et al. 2018, Table 2",
    "metric": "validation NLL, nats per token",
    "reported": 0.357,
    "reached": 0.36,
    "status": "trained",
    "steps": 12_000,
    "hardware": "1 GPU, 1 hour",
    "command": "python -m experiments.example --workdir runs/example",
    "deviations": ("crops of 1024 tokens",),
}
UNTRAINED = {"reached": None, "status": "not trained", "steps": 0, "hardware": ""}


@pytest.mark.parametrize("field", ["system", "paper", "metric", "status", "command"])
def test_an_empty_field_is_an_error(field):
    with pytest.raises(ValueError, match=f"{field} is empty"):
        Card(**GOOD | {field: " "})


@pytest.mark.parametrize("deviations", [(), ("one", " ")])
def test_deviations_must_be_stated(deviations):
    with pytest.raises(ValueError, match=r"deviations is .*expected a tuple with one sentence"):
        Card(**GOOD | {"deviations": deviations})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reported": float("nan")}, "reported is nan"),
        ({"reached": float("inf")}, "reached is inf"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 0}, "reached is 0.36, but steps is 0"),
        ({"hardware": ""}, "hardware is ''; a value needs both"),
    ],
)
def test_a_value_needs_its_grounds(change, message):
    with pytest.raises(ValueError, match=message):
        Card(**GOOD | change)


def test_describe_gives_the_distance_from_the_paper():
    fields = describe(Card(**GOOD))
    assert fields["Reported"] == "0.357"
    assert fields["Reached"] == "0.360 (+0.003 from the paper's)"
    assert fields["Steps"] == "12,000"
    untrained = describe(Card(**GOOD | UNTRAINED))
    assert (untrained["Reached"], untrained["Status"]) == ("no value", "not trained")


def test_table_lines_up_and_shows_untrained_rows():
    lines = table([Card(**GOOD), Card(**GOOD | UNTRAINED | {"system": "baseline", "reported": None})]).splitlines()
    assert lines[0].split() == ["system", "metric", "reported", "reached", "steps", "hardware", "status"]
    assert lines[2].split()[-8:] == ["0.357", "0.360", "12,000", "1", "GPU,", "1", "hour", "trained"]
    assert lines[3].split()[-6:] == ["-", "-", "0", "-", "not", "trained"]
    assert lines[3].rindex("not trained") == lines[2].rindex("trained") == lines[0].rindex("status")
