import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Literal

import pytest

from jaxaudio import config as configs
from jaxaudio.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Model:
    num_layers: int = 4
    num_heads: int = 8
    embed_dim: int = 64
    strides: tuple[int, ...] = (2, 4)
    kernel: tuple[int, float] = (3, 0.5)
    max_distance: int | None = None
    norm: Literal["layer", "rms"] = "layer"

    def __post_init__(self):
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")


@dataclasses.dataclass(frozen=True)
class Run:
    row: str = "baseline"
    learning_rate: float = 1e-3
    deterministic: bool = False
    level: Literal[1, 2] = 1
    limit: int | str = 5
    model: Model = Model()
    teacher: Model | None = None


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("row=relative", Run(row="relative")),
        ("row=a=b", Run(row="a=b")),
        ("row=None", Run(row="None")),
        ("learning_rate=1", Run(learning_rate=1.0)),
        ("learning_rate=-1e-3", Run(learning_rate=-0.001)),
        ("deterministic=true", Run(deterministic=True)),
        ("level=2", Run(level=2)),
        ("limit=7", Run(limit=7)),
        ("limit=all", Run(limit="all")),
        ("model.num_layers=2", Run(model=Model(num_layers=2))),
        ("model.strides=1,2,3", Run(model=Model(strides=(1, 2, 3)))),
        ("model.strides=", Run(model=Model(strides=()))),
        ("model.kernel=5,0.25", Run(model=Model(kernel=(5, 0.25)))),
        ("model.max_distance=7", Run(model=Model(max_distance=7))),
        ("model.norm=rms", Run(model=Model(norm="rms"))),
        ("teacher=None", Run()),
    ],
)
def test_override_reads_the_declared_type(assignment, expected):
    result = configs.override(Run(), [assignment])
    assert result == expected
    assert type(result.learning_rate) is float
    assert type(result.level) is int


def test_override_applies_together_and_leaves_the_original():
    original = Run(teacher=Model())
    # 3 heads do not divide the default embed_dim of 64: only the pair is valid.
    result = configs.override(original, ["model.num_heads=3", "model.embed_dim=96", "teacher.num_layers=1", "row=x"])
    assert result == Run(row="x", model=Model(num_heads=3, embed_dim=96), teacher=Model(num_layers=1))
    assert original == Run(teacher=Model())


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["model.num_layer=2"],
            r"model.num_layer: no such field, did you mean 'num_layers'\?; fields: model.num_layers, ",
        ),
        (["zzz=2"], r"zzz: no such field; fields: row, learning_rate, "),
        (["model.num_layers=2.5"], r"model.num_layers: expected int, got '2.5'"),
        (["model.num_layers="], r"model.num_layers: expected int, got ''"),
        (["learning_rate=fast"], r"learning_rate: expected float, got 'fast'"),
        (["learning_rate=nan"], r"learning_rate: expected float, got 'nan'"),
        (["deterministic=1"], r"deterministic: expected bool \(true or false\), got '1'"),
        (["deterministic=True"], r"got 'True'"),
        (["model.norm=batch"], r"model.norm: expected one of layer, rms, got 'batch'"),
        (["model.max_distance=far"], r"model.max_distance: expected None \| int, got 'far'"),
        (["model.strides=1,x"], r"model.strides\[1\]: expected int, got 'x'"),
        (["model.kernel=1,2,3"], r"model.kernel: expected 2 items as tuple\[int, float\], got \['1', '2', '3'\]"),
        (["model=big"], r"model: cannot be set as a whole to 'big'; set one of model.num_layers, "),
        (["row.name=x"], r"row.name: row is 'baseline', it has no fields"),
        (["teacher.num_layers=2"], r"teacher.num_layers: teacher is None, it has no fields"),
        (["row"], r"expected FIELD=VALUE, got 'row'"),
        (["row=a", "row=b"], r"row: assigned twice, 'a' and 'b'"),
        (["model.num_heads=3"], r"model: embed_dim 64 is not divisible by num_heads 3"),
    ],
)
def test_override_errors_say_what_was_expected(assignments, message):
    with pytest.raises(ConfigError, match=message):
        configs.override(Run(), assignments)


def test_a_config_is_not_set_both_as_a_whole_and_by_field():
    with pytest.raises(ConfigError, match=r"teacher: assigned as a whole and field by field \(num_layers\)"):
        configs.override(Run(teacher=Model()), ["teacher=None", "teacher.num_layers=2"])


def test_json_round_trip_is_exact():
    run = Run(learning_rate=1 / 3, limit="all", teacher=Model(strides=(), max_distance=9))
    text = configs.to_json(run)
    result = configs.from_json(Run, text)
    assert result == run
    assert hash(result) == hash(run)
    assert json.loads(text)["model"]["strides"] == [2, 4]
    assert configs.to_dict(run) == json.loads(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, r"extra: no such field; fields: row"),
        ({"learning_rate": "1"}, r"learning_rate: expected float, got '1'"),
        ({"level": True}, r"level: expected one of 1, 2, got True"),
        ({"deterministic": 0}, r"deterministic: expected bool"),
        ({"limit": 1.5}, r"limit: expected int \| str, got 1.5"),
        ({"model": None}, r"model: expected Model, got None"),
        ({"model": {"num_layers": 4}}, r"missing model.num_heads, model.embed_dim, .* of Model; given: num_layers"),
    ],
)
def test_from_dict_is_strict(change, message):
    with pytest.raises(ConfigError, match=message):
        configs.from_dict(Run, configs.to_dict(Run()) | change)


def test_from_json_refuses_other_text():
    with pytest.raises(ConfigError, match="not JSON: Expecting value"):
        configs.from_json(Run, "")
    with pytest.raises(ConfigError, match=r"expected a JSON object with the fields of Run, got \[1\]"):
        configs.from_json(Run, "[1]")


def test_to_dict_refuses_what_would_not_come_back():
    with pytest.raises(ConfigError, match="learning_rate: expected float, got inf"):
        configs.to_dict(Run(learning_rate=float("inf")))
    with pytest.raises(ConfigError, match="row: expected str, got 3"):
        configs.to_dict(Run(row=3))


@dataclasses.dataclass(frozen=True)
class Rounded:
    width: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "width", self.width + 1)


def test_to_dict_refuses_a_config_that_changes_itself():
    with pytest.raises(ConfigError, match="Rounded does not survive the round trip"):
        configs.to_dict(Rounded())


@dataclasses.dataclass(frozen=True)
class Unsupported:
    table: dict[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class Ambiguous:
    part: Model | Run | None = None


def test_unsupported_field_types_are_errors():
    with pytest.raises(ConfigError, match=r"cannot hold a field of type dict\[str, int\]"):
        configs.override(Unsupported(), ["table=1"])
    with pytest.raises(ConfigError, match="cannot tell the members of .* apart"):
        configs.to_dict(Ambiguous())


def test_command_line_with_one_config():
    config, workdir = configs.parse_command_line(
        "A run.", Run(), ["--workdir", "runs/x", "--set", "level=2", "row=y", "--set", "model.num_layers=1"]
    )
    assert config == Run(level=2, row="y", model=Model(num_layers=1))
    assert workdir == pathlib.Path("runs/x")


def test_command_line_picks_the_row_before_the_other_overrides():
    rows = {"baseline": Run(), "relative": Run(model=Model(num_layers=6, max_distance=256))}
    arguments = ["--workdir", "w", "--set", "model.max_distance=8", "--set", "row=relative"]
    config, _ = configs.parse_command_line("A table.", rows, arguments)
    assert config == Run(row="relative", model=Model(num_layers=6, max_distance=8))
    assert configs.parse_command_line("A table.", rows, ["--workdir", "w"])[0] == Run(row="baseline")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --workdir"),
        (
            ["--workdir", "w", "--set", "row=relativ"],
            "row: no row 'relativ', did you mean 'relative'?; rows: base, relative",
        ),
        (["--workdir", "w", "--set", "row=base", "row=relative"], "row: assigned more than once, ['base', 'relative']"),
        (["--workdir", "w", "--set", "model.num_layer=1"], "did you mean 'num_layers'?"),
        (["--workdir", "gs://bucket/run"], "--workdir: expected a local or mounted folder, got 'gs://bucket/run'"),
    ],
)
def test_command_line_errors_exit_with_the_message(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        configs.parse_command_line("A table.", {"base": Run(), "relative": Run()}, arguments)
    assert message in capsys.readouterr().err


def test_help_lists_fields_rows_and_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        configs.parse_command_line("A table of 100% real rows.", {"base": Run(), "relative": Run()}, ["--help"])
    text = capsys.readouterr().out
    for line in (
        "A table of 100% real rows.",
        "rows (with --set row=NAME): base, relative",
        "  learning_rate=0.001  (float)",
        "  model.strides=2,4  (tuple[int, ...])",
        "  model.norm=layer  (one of layer, rms)",
        "  teacher=None  (None | Model)",
    ):
        assert line in text


def test_config_does_not_import_jax():
    code = "import sys, jaxaudio.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_with_a_checkpoint_belongs_to_one_config(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Model:
        width: int = 4

    @dataclasses.dataclass(frozen=True)
    class Run:
        model: Model = Model()
        mesh: str = "data:1"

    folder = tmp_path / "run"

    def claimed():
        return configs.from_json(Run, (folder / "config.json").read_text())

    configs.claim_workdir(Run(Model(3)), folder)
    (folder / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)  # a save that a kill interrupted
    configs.claim_workdir(Run(), folder)
    assert claimed() == Run()
    (folder / "checkpoints" / "5").mkdir()
    configs.claim_workdir(Run(mesh="data:8"), folder, may_change=("mesh",))
    assert claimed() == Run(mesh="data:8")
    with pytest.raises(ConfigError, match=r"model\.width: 4 there, 5 now"):
        configs.claim_workdir(Run(Model(5), "data:8"), folder)
    assert claimed() == Run(mesh="data:8")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.json"]


def test_differences_name_both_values():
    before, now = {"a": 1, "b": {"c": 2, "d": [3]}}, {"a": 1, "b": {"c": 5, "d": [3]}, "e": None}
    assert configs.differences(before, now) == {"b.c": (2, 5), "e": ("absent", None)}
