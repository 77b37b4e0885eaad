"""Results of a long run, one JSON object per line, that outlive the run's death.

A line is written at once and to the disk, so that a run that is killed loses what it was working on and nothing more.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from jaxaudio.data.files import atomic_path


class ResultLog:
    """Results of the numbered items of a list, whatever their order, by a run that may be killed and started again.

    Beside PATH.jsonl it keeps PATH.settings.json, so that no run goes on with the results of another one.

    Args:
      path: of the lines; made with its folder if missing.
      items: what makes each item of the list known again, by its number: JSON values that its line will have too.
      settings: what the results depend on: JSON values.
    Raises:
      ValueError: there are results with other settings (both values of each that differs are named), of an item that is
        not in the list or is another one now, or lines that are damaged.
    """

    def __init__(
        self, path: str | os.PathLike, items: Mapping[int, Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> None:
        self.path = pathlib.Path(path)
        self._items = items
        self._results: dict[int, dict[str, Any]] = {}
        for result in read_results(self.path):
            self._check_item(result)
            self._results[result["index"]] = result
        self._claim(json.loads(json.dumps(settings)))

    @property
    def results(self) -> list[dict[str, Any]]:
        """All results, in the order of the list."""
        return [self._results[index] for index in sorted(self._results)]

    def __contains__(self, index: int) -> bool:
        return index in self._results

    def add(self, index: int, result: Mapping[str, Any]) -> None:
        """Writes the result of an item, in place of an earlier one."""
        self._results[index] = {"index": index, **self._items[index], **result}
        append_result(self.path, self._results[index])

    def sort(self) -> None:
        """Puts the lines in the order of the list, so that they do not tell how often the run was killed."""
        write_results(self.path, self.results)

    def _check_item(self, result: Mapping[str, Any]) -> None:
        item = self._items.get(result.get("index"))
        there = {name: result.get(name) for name in item or {}}
        if item is None or there != item:
            raise ValueError(
                f"{self.path} has a result of item {result.get('index')}, {there or 'which the list does not have'}; "
                f"now that is {item}. The list has changed: name another folder, or remove the file"
            )

    def _claim(self, settings: dict[str, Any]) -> None:
        path = self.path.with_suffix(".settings.json")
        if self._results:
            there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            changed = [
                f"{name} {there.get(name)!r} there, {settings.get(name)!r} now"
                for name in sorted({*there, *settings})
                if there.get(name) != settings.get(name)
            ]
            if changed:
                raise ValueError(
                    f"{self.path} has the results of a run with other settings: {'; '.join(changed)}. Name another "
                    "folder, or give the same settings"
                )
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_results(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The results of a file, none if there is no file; a last line that was not written to its end is cut off the file.

    Raises:
      ValueError: a whole line is not a JSON object; has file, line and what is there.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    results = []
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            result = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: is not JSON ({error}); remove the line to do its work again") from error
        if not isinstance(result, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:80]!r}; remove the line")
        results.append(result)
    return results


def append_result(path: str | os.PathLike, result: Mapping[str, Any]) -> None:
    """Adds a line; when this returns, it is on the disk."""
    with open(path, "ab") as file:
        file.write(_line(result).encode())
        file.flush()
        os.fsync(file.fileno())


def write_results(path: str | os.PathLike, results: Iterable[Mapping[str, Any]]) -> None:
    """Writes all lines anew, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(map(_line, results)), encoding="utf-8")


def _line(result: Mapping[str, Any]) -> str:
    return json.dumps(result, ensure_ascii=False) + "\n"
