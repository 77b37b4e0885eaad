"""Frozen dataclasses as configs: typed overrides (`model.num_layers=2`), an exact JSON round trip, the command line.

A config holds int, float, bool, str, None, `Literal`, tuples of these, and other frozen dataclasses; so it is hashable
and equal to its copy read back from `config.json`. Whatever does not fit its declared type is a `ConfigError`.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import pathlib
import socket
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Config = TypeVar("Config")


class ConfigError(ValueError):
    """An unknown field or a value of the wrong type; the message carries the field, the value and what was expected."""


def override(config: Config, assignments: Sequence[str]) -> Config:
    """Returns the config with fields replaced by assignments such as `model.num_layers=2`.

    Values are read by the field's declared type: `true`/`false` for bool, `None` where the type allows it, `1,2,3` for
    tuples. All assignments apply at once: a dataclass that checks its fields against each other sees the final values.

    Raises:
      ConfigError: an unknown field (lists the real ones), a value of the wrong type, a field assigned twice, text
        without `=`, or a combination that the dataclass itself refuses.
    """
    texts: dict[str, str] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"expected FIELD=VALUE, got {assignment!r}")
        if path in texts:
            raise ConfigError(f"{path}: assigned twice, {texts[path]!r} and {text!r}")
        texts[path] = text
    return _replace(config, texts, prefix="")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts and lists of JSON values; `from_dict` gives back an equal config.

    Raises:
      ConfigError: a value does not have its declared type (or is not a finite number), so it would not come back equal.
    """
    mapping = _plain(config)
    if from_dict(type(config), mapping) != config:
        raise ConfigError(f"{type(config).__name__} does not survive the round trip through JSON values: {config}")
    return mapping


def from_dict(cls: type[Config], mapping: Mapping[str, Any]) -> Config:
    """The config of class `cls` from `to_dict`'s mapping; lists become tuples again.

    Raises:
      ConfigError: a missing or unknown key (lists the real ones) or a value of the wrong type.
    """
    return _from_mapping(cls, mapping, prefix="")


def to_json(config: Any) -> str:
    """The config as indented JSON text."""
    return json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n"


def from_json(cls: type[Config], text: str) -> Config:
    """The config of class `cls` from `to_json`'s text.

    Raises:
      ConfigError: the text is not a JSON object, or as `from_dict`.
    """
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"expected a JSON object with the fields of {cls.__name__}, got {mapping!r}")
    return from_dict(cls, mapping)


def claim_workdir(config: Any, workdir: pathlib.Path, *, may_change: Sequence[str] = ()) -> None:
    """Makes the run's folder and writes its config.json; a folder with checkpoints of another config is an error.

    Where no checkpoint was saved, the config replaces that of the earlier start, so a corrected command starts anew.
    All processes of a run may call it at once.

    Args:
      config: the resolved config.
      workdir: the run's folder, new or of an earlier start of the same run.
      may_change: top-level fields that a resumed run may have otherwise, such as its mesh.
    Raises:
      ConfigError: the folder holds a checkpoint and another config.json; the message lists both values of each field
        that differs.
    """
    path = workdir / "config.json"
    has_checkpoint = any(folder.name.isdecimal() for folder in (workdir / "checkpoints").glob("*"))
    if has_checkpoint and path.exists():
        names = differences(json.loads(path.read_text()), to_dict(config))
        changed = [
            f"{name}: {there!r} there, {now!r} now"
            for name, (there, now) in names.items()
            if name.split(".")[0] not in may_change
        ]
        if changed:
            raise ConfigError(
                f"{workdir} holds a run with another config; name another --workdir, or give it the same config:\n  "
                + "\n  ".join(changed)
            )
    workdir.mkdir(parents=True, exist_ok=True)
    # A name of its own for each process, so that none moves away what another one is writing.
    temporary = path.with_name(f".config.{socket.gethostname()}.{os.getpid()}.json")
    temporary.write_text(to_json(config))
    temporary.replace(path)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields whose values differ between two `to_dict` results, with both values, by name.

    A field that one of them lacks has the value "absent" there.
    """
    before, now = _leaves(before), _leaves(now)
    pairs = {name: (before.get(name, "absent"), now.get(name, "absent")) for name in sorted({*before, *now})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested {"a": {"b": 1}} as {"a.b": 1}."""
    leaves = {}
    for name, value in mapping.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def parse_command_line(
    description: str, configs: Mapping[str, Config] | Config, argv: Sequence[str] | None = None
) -> tuple[Config, pathlib.Path]:
    """Reads `--workdir DIR [--set FIELD=VALUE ...]`, an experiment's whole command line.

    Args:
      description: shown by `--help`, above the list of all fields with their types and defaults.
      configs: the default config; or named rows, of which `--set row=NAME` picks one (the first without it) before the
        other assignments apply. The config class of rows has a field `row`, which then holds NAME.
      argv: arguments without the program's name; `sys.argv[1:]` when None.
    Returns:
      The resolved config and the run's folder (not created).
    Raises:
      SystemExit: on a bad argument, after printing what `ConfigError` says; and after `--help`.
    """
    rows = dict(configs) if isinstance(configs, Mapping) else None
    default = next(iter(rows.values())) if rows else configs
    listing = "fields (with --set FIELD=VALUE) and their defaults:\n" + _describe(default)
    if rows:
        listing = f"rows (with --set row=NAME): {', '.join(rows)}\n\n{listing}"
    parser = argparse.ArgumentParser(
        description=description, epilog=listing, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder, local or mounted")
    parser.add_argument(
        "--set", dest="assignments", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="see below"
    )
    arguments = parser.parse_args(argv)
    try:
        if "://" in arguments.workdir:
            raise ConfigError(f"--workdir: expected a local or mounted folder, got {arguments.workdir!r}")
        config, assignments = default, arguments.assignments
        if rows:
            config, assignments = _pick_row(rows, assignments)
        return override(config, assignments), pathlib.Path(arguments.workdir)
    except ConfigError as error:
        parser.error(str(error))


def _pick_row(rows: Mapping[str, Any], assignments: Sequence[str]) -> tuple[Any, list[str]]:
    names = [text.removeprefix("row=") for text in assignments if text.startswith("row=")] or [next(iter(rows))]
    if len(names) > 1:
        raise ConfigError(f"row: assigned more than once, {names}")
    if names[0] not in rows:
        raise ConfigError(f"row: no row {names[0]!r}{_did_you_mean(names[0], rows)}; rows: {', '.join(rows)}")
    config = dataclasses.replace(rows[names[0]], row=names[0])
    return config, [text for text in assignments if not text.startswith("row=")]


def _replace(config: Any, texts: Mapping[str, str], prefix: str) -> Any:
    """`override` below `prefix`: assignments of one nested config are grouped, so that each config is rebuilt once."""
    field_types = _field_types(type(config))
    nested: dict[str, dict[str, str]] = {}
    changes = {}
    for path, text in texts.items():
        name, dot, rest = path.partition(".")
        _require_field(name, field_types, prefix)
        value = getattr(config, name)
        if dot and not dataclasses.is_dataclass(value):
            raise ConfigError(f"{prefix}{path}: {prefix}{name} is {value!r}, it has no fields")
        if dot:
            nested.setdefault(name, {})[rest] = text
        else:
            changes[name] = _from_text(field_types[name], text, prefix + name)
    for name, inner in nested.items():
        if name in changes:
            raise ConfigError(f"{prefix}{name}: assigned as a whole and field by field ({', '.join(inner)})")
        changes[name] = _replace(getattr(config, name), inner, f"{prefix}{name}.")
    return _construct(lambda **fields: dataclasses.replace(config, **fields), changes, prefix)


def _from_mapping(cls: type, mapping: Mapping[str, Any], prefix: str) -> Any:
    field_types = _field_types(cls)
    for name in mapping:
        _require_field(name, field_types, prefix)
    missing = [prefix + name for name in field_types if name not in mapping]
    if missing:
        raise ConfigError(f"missing {', '.join(missing)} of {cls.__name__}; given: {', '.join(mapping) or 'nothing'}")
    return _construct(
        cls, {name: _from_value(field_types[name], mapping[name], prefix + name) for name in mapping}, prefix
    )


def _construct(build: Callable[..., Any], fields: Mapping[str, Any], prefix: str) -> Any:
    """Calls the dataclass; what its own `__post_init__` refuses is reported with the place in the whole config."""
    try:
        return build(**fields)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix.removesuffix('.')}: {error}" if prefix else str(error)) from error


def _from_text(hint: Any, text: str, path: str) -> Any:
    """The value of type `hint` that `text` spells on the command line."""
    for option in _options(hint):
        if option is types.NoneType and text == "None":
            return None
        if option is str:
            return text
        if option is bool and text in ("true", "false"):
            return text == "true"
        if option in (int, float):
            number = _number(option, text)
            if number is not None:
                return number
        if typing.get_origin(option) is typing.Literal:
            for choice in typing.get_args(option):
                if text == str(choice):
                    return choice
        if typing.get_origin(option) is tuple:
            items = text.split(",") if text else []
            return tuple(
                _from_text(inner, item, f"{path}[{i}]")
                for i, (inner, item) in enumerate(_tuple_items(option, items, path))
            )
        if dataclasses.is_dataclass(option):
            names = ", ".join(f"{path}.{name}" for name in _field_types(option))
            raise ConfigError(f"{path}: cannot be set as a whole to {text!r}; set one of {names}")
    raise ConfigError(f"{path}: expected {_type_name(hint)}, got {text!r}")


def _from_value(hint: Any, value: Any, path: str) -> Any:
    """`value`, read from JSON, as type `hint`: an int passes for float, a list for a tuple, a mapping for a config."""
    for option in _options(hint):
        if option in (types.NoneType, bool, int, str) and type(value) is option:
            return value
        if option is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if typing.get_origin(option) is typing.Literal:
            for choice in typing.get_args(option):
                if type(value) is type(choice) and value == choice:
                    return choice
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(
                _from_value(inner, item, f"{path}[{i}]")
                for i, (inner, item) in enumerate(_tuple_items(option, value, path))
            )
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return _from_mapping(option, value, f"{path}.")
    raise ConfigError(f"{path}: expected {_type_name(hint)}, got {value!r}")


def _options(hint: Any) -> list[Any]:
    """The members of a union, str last (any text is a str); checked to be types that a config can hold."""
    options = list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]
    for option in options:
        known = option in (types.NoneType, bool, int, float, str) or dataclasses.is_dataclass(option)
        if not known and typing.get_origin(option) not in (typing.Literal, tuple):
            raise ConfigError(f"a config cannot hold a field of type {option}")
    if sum(dataclasses.is_dataclass(option) or typing.get_origin(option) is tuple for option in options) > 1:
        raise ConfigError(f"a config cannot tell the members of {hint} apart")
    order = [types.NoneType, bool, int, float]
    return sorted(options, key=lambda o: order.index(o) if o in order else len(order) + (o is str))


def _number(cls: type, text: str) -> int | float | None:
    try:
        number = cls(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _tuple_items(hint: Any, items: Sequence[Any], path: str) -> list[tuple[Any, Any]]:
    """Pairs of (type, item); `tuple[int, ...]` has any length, `tuple[int, int]` two."""
    arguments = typing.get_args(hint)
    if arguments[1:] == (Ellipsis,):
        arguments = arguments[:1] * len(items)
    if len(arguments) != len(items):
        raise ConfigError(f"{path}: expected {len(arguments)} items as {_type_name(hint)}, got {list(items)!r}")
    return list(zip(arguments, items, strict=True))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in _field_types(type(value))}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _describe(config: Any, prefix: str = "") -> str:
    lines = []
    for name, hint in _field_types(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            lines.append(_describe(value, f"{prefix}{name}."))
        else:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            lines.append(f"  {prefix}{name}={shown}  ({_type_name(hint)})")
    return "\n".join(lines)


def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _type_name(hint: Any) -> str:
    def name(option: Any) -> str:
        if typing.get_origin(option) is typing.Literal:
            return f"one of {', '.join(map(str, typing.get_args(option)))}"
        if option is types.NoneType:
            return "None"
        if option is bool:
            return "bool (true or false)"
        return option.__name__ if isinstance(option, type) and not typing.get_args(option) else str(option)

    return " | ".join(name(option) for option in _options(hint))


def _require_field(name: str, field_types: Mapping[str, Any], prefix: str) -> None:
    if name not in field_types:
        names = ", ".join(prefix + field for field in field_types)
        raise ConfigError(f"{prefix}{name}: no such field{_did_you_mean(name, field_types)}; fields: {names}")


def _did_you_mean(name: str, choices: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
