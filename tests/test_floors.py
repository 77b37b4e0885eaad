"""Imports point down only (the README's floors), and importing the light parts pulls in nothing heavy."""

import ast
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[1]

FLOORS = {
    "ops": 0, "sharding": 0, "data": 0, "config": 0,
    "nn": 1,
    "models": 2,
    "train": 3, "generate": 3, "convert": 3, "report": 3, "cli": 3,
}  # fmt: skip
EXPERIMENTS = 4

JAX_FAMILY = ("jax", "jaxlib", "flax", "optax", "orbax")
FORBIDDEN = {  # part -> packages that none of its files may import, not even inside a function
    "ops": ("flax",),
    "data": JAX_FAMILY,
    "config": JAX_FAMILY,
}
PEERS = ("torch", "transformers")  # only inside functions of convert
PRIVATE = ("jax._src", "jax.core", "flax.nnx")  # nowhere: not public, or not the house's API


def _is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _dotted(node: ast.AST) -> str | None:
    """`jax.core.Tracer` for that attribute chain, None for anything that does not start at a plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := _dotted(node.value)):
        return f"{base}.{node.attr}"
    return None


def imported_names(source: str, package: str) -> list[tuple[str, int, bool]]:
    """(absolute dotted name, line, whether inside a function) of every import of a file that lives in `package`."""
    found = []

    def visit(node, in_function):
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            prefix = ".".join(base + ([node.module] if node.module else []))
            found.extend((f"{prefix}.{alias.name}", node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.Call) and _dotted(node.func) in ("__import__", "importlib.import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                found.append((str(node.args[0].value), node.lineno, in_function))
        elif isinstance(node, ast.Attribute) and _is_under(_dotted(node) or "", PRIVATE):
            found.append((_dotted(node), node.lineno, in_function))
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def violations(path: str, source: str) -> list[str]:
    """What the file at `path` (relative to the root, with slashes) imports and must not, one line each."""
    pure = pathlib.PurePosixPath(path)
    module = pure.with_suffix("").parts
    part = module[1] if module[0] == "jaxaudio" else None
    if part == "__init__":
        part = None
    if part is not None and part not in FLOORS:
        return [f"{path}: {part!r} has no floor; the parts are {', '.join(FLOORS)}"]
    problems = []
    for name, line, in_function in imported_names(source, ".".join(pure.parent.parts)):
        reason = None
        if _is_under(name, PRIVATE):
            reason = "is not public API"
        elif module[0] == "experiments":
            pass  # the top floor sees everything, its peers in the benchmarks included
        elif _is_under(name, PEERS) and not (part == "convert" and in_function):
            reason = "is a peer: only functions of convert may import it"
        elif _is_under(name, FORBIDDEN.get(part, ())):
            reason = f"is forbidden in {part}"
        elif _is_under(name, ("experiments",)):
            reason = "is above the library"
        elif _is_under(name, ("jaxaudio",)):
            reason = _house_rule(module, part, name.split("."))
        if reason:
            problems.append(f"{path}:{line}: {name} {reason}")
    return problems


def _house_rule(module: tuple[str, ...], part: str | None, target: list[str]) -> str | None:
    """Why `module` may not import `target`, both parts of jaxaudio; None where it may."""
    if len(target) == 1 or target[1].startswith("__"):
        return None  # the package itself or its version
    if part is None:
        return "must not be imported by jaxaudio/__init__.py"
    if target[1] not in FLOORS:
        return f"has no floor; the parts are {', '.join(FLOORS)}"
    if target[1] == part:
        other_model = part == "models" and module[2] != "__init__" and target[2:3] != [module[2]]
        return "is another model" if other_model else None
    if FLOORS[target[1]] > FLOORS[part]:
        return f"is on floor {FLOORS[target[1]]}, above floor {FLOORS[part]}"
    if FLOORS[target[1]] == FLOORS[part] and part != "cli":
        return f"is sideways on floor {FLOORS[part]}"
    return None


def test_every_import_points_down():
    files = sorted((ROOT / "jaxaudio").rglob("*.py")) + sorted((ROOT / "experiments").rglob("*.py"))
    assert files
    problems = []
    for file in files:
        problems += violations(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("jaxaudio/ops/mel.py", "from jaxaudio.nn import transformer", "floor 1, above floor 0"),
        ("jaxaudio/ops/mel.py", "from ..nn.transformer import Block", "floor 1, above floor 0"),
        ("jaxaudio/nn/seanet.py", "import jaxaudio.models.encodec as encodec", "floor 2, above floor 1"),
        ("jaxaudio/models/t5.py", "def f():\n    from jaxaudio.train.step import g", ":2: jaxaudio.train.step.g"),
        ("jaxaudio/train/loop.py", "import experiments.quickstart", "above the library"),
        ("jaxaudio/data/text.py", "from jaxaudio import config", "sideways on floor 0"),
        ("jaxaudio/train/loop.py", "from jaxaudio.report import page", "sideways on floor 3"),
        ("jaxaudio/generate/beam.py", "from jaxaudio import cli", "sideways on floor 3"),
        ("jaxaudio/models/musicgen.py", "from jaxaudio.models import t5", "another model"),
        ("jaxaudio/models/musicgen.py", "from .t5 import T5", "another model"),
        ("jaxaudio/models/musicgen.py", "from . import t5", "another model"),
        ("jaxaudio/ops/mel.py", "import flax.linen as nn", "forbidden in ops"),
        ("jaxaudio/ops/mel.py", "class A:\n    def f(self):\n        from flax import linen", "forbidden in ops"),
        ("jaxaudio/data/text.py", "import jax.numpy as jnp", "forbidden in data"),
        ("jaxaudio/data/text.py", "from jax import numpy", "forbidden in data"),
        ("jaxaudio/config.py", "import flax", "forbidden in config"),
        ("jaxaudio/convert/whisper.py", "import torch", "only functions of convert"),
        ("jaxaudio/nn/seanet.py", "def f():\n    import torch.nn", "only functions of convert"),
        ("jaxaudio/report/page.py", "from transformers import T5Model", "only functions of convert"),
        ("jaxaudio/convert/t5.py", "import importlib\nimportlib.import_module('torch')", ":2: torch"),
        ("jaxaudio/nn/seanet.py", "from jax._src import core", "not public API"),
        ("jaxaudio/nn/seanet.py", "from jax import core", "not public API"),
        ("jaxaudio/nn/seanet.py", "import jax\nx = jax.core.Tracer", ":2: jax.core"),
        ("experiments/quickstart.py", "import jax.core", "not public API"),
        ("jaxaudio/models/t5.py", "from flax import nnx", "not public API"),
        ("jaxaudio/__init__.py", "from jaxaudio import config", "__init__.py"),
        ("jaxaudio/utils.py", "import os", "'utils' has no floor"),
        ("jaxaudio/train/loop.py", "from jaxaudio.utils import x", "has no floor"),
    ],
)
def test_the_checker_finds_what_it_must(path, source, message):
    problems = violations(path, source)
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("jaxaudio/nn/conformer.py", "from jaxaudio.nn import transformer\nfrom jaxaudio.ops import attention"),
        ("jaxaudio/models/t5.py", "from jaxaudio import sharding\nfrom ..nn.transformer import Block"),
        ("jaxaudio/cli.py", "def main():\n    from jaxaudio.convert import export"),
        ("jaxaudio/convert/whisper.py", "def load():\n    import torch"),
        ("jaxaudio/report/plots.py", "from jaxaudio.data.midi import Note\nfrom jaxaudio import __version__"),
        ("jaxaudio/data/text.py", "import jaxtyping, numpy"),
        ("experiments/benchmarks/attention.py", "import torch\nfrom jaxaudio.models import t5"),
        ("jaxaudio/ops/mel.py", "import jax\nx = jax.numpy.ones(3)  # not jax.core"),
    ],
)
def test_the_checker_lets_the_rest_pass(path, source):
    assert violations(path, source) == []


def _in_a_fresh_process(code: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_jaxaudio_imports_nothing_else():
    code = """
        import sys
        before = set(sys.modules)
        import jaxaudio
        print(sorted(set(sys.modules) - before))
    """
    assert _in_a_fresh_process(code) == "['jaxaudio']"


def test_the_light_parts_import_no_heavy_reader():
    code = """
        import importlib, pkgutil, sys
        names = ["jaxaudio.cli", "jaxaudio.config", "jaxaudio.sharding", "jaxaudio.train.state", "jaxaudio.train.step"]
        for part in ("ops", "nn", "models", "generate"):
            package = importlib.import_module(f"jaxaudio.{part}")
            names += [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
        for name in names:
            importlib.import_module(name)
        heavy = "grain librosa matplotlib mido music21 soundfile tensorflow_datasets torch transformers"
        print([name for name in heavy.split() if name in sys.modules])
    """
    assert _in_a_fresh_process(code) == "[]"


def test_config_does_not_import_jax():
    assert _in_a_fresh_process("import sys, jaxaudio.config; print('jax' in sys.modules)") == "False"
