"""What the configs of other projects say, read by their own names."""

from collections.abc import Mapping
from types import NoneType
from typing import Any

from jaxaudio.convert.tensors import ConvertError


def fields(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Of a config upstream the values that we need, each of its default's type; a default None is an absent number.

    Raises:
      ConvertError: a value of another type.
    """
    found = {name: values.get(name, default) for name, default in defaults.items()}
    for name, default in defaults.items():
        types = {float: (int, float), list: (list, tuple), NoneType: (int, float, NoneType)}
        if type(found[name]) not in types.get(type(default), (type(default),)):
            expected = "a number or nothing" if default is None else f"a {type(default).__name__} such as {default!r}"
            raise ConvertError(f"{where}: {name} is {found[name]!r}, expected {expected}")
    return found


def require(values: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Compares what a config upstream says with the one thing that ours can be.

    Raises:
      ConvertError: another value.
    """
    for name, value in expected.items():
        if values.get(name, value) != value:
            raise ConvertError(f"{where}: {name} is {values[name]!r}, but our codecs have {value!r}")


def one_of(choices: Mapping[str, Any], name: str, value: Any, where: str) -> Any:
    """What is ours of a value upstream.

    Raises:
      ConvertError: it has nothing here; the message lists what has.
    """
    if value not in choices:
        raise ConvertError(f"{where}: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
    return choices[value]
