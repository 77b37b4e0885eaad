"""Prints the table of cards: what each paper reports beside what we reached."""

import importlib
import pkgutil
import sys

import experiments
from jaxaudio.report.card import Card, table


def all_cards() -> list[Card]:
    """The CARDS of every experiment, in the order of the files' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(experiments.__path__) if not module.ispkg)
    modules = [importlib.import_module(f"experiments.{name}") for name in names if name != "__main__"]
    return [card for module in modules for card in getattr(module, "CARDS", ())]


if __name__ == "__main__":
    sys.stdout.write(table(all_cards()) + "\n")
