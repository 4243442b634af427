"""The structure of the code: imports never run up, and files and functions stay short enough to read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up. A module imports only from its own layer and from those before it.
LAYERS = (
    ("kernels",),
    ("words", "tracing", "scalars", "devices", "threads", "rng", "box"),
    ("energies",),
    ("targets",),
    ("samplers",),
    ("backends",),
    ("driver",),
    ("estimates",),
    ("pool",),
    ("objectives",),
    ("data",),
    ("evaluate", "plot"),
    ("diagnostics",),
    ("train",),
    ("bench",),
    ("cli",),
    ("__init__", "__main__"),  # the lazy public names, and the command
)
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}

MOST_LINES, MOST_LINES_OF_FUNCTION, MOST_PARAMETERS = 500, 80, 12

# What may exceed a budget, with the reason.
PUBLIC = "a public call: its options are keywords, each with a line of documentation"
SCHEMA = "a torch.library operator takes flat tensors and numbers"
NUMBA = "a Numba kernel: it takes the pointers and sizes of everything that it reads"
EXEMPT = {
    "fastebm/backends/op.py:_fake": SCHEMA,
    "fastebm/backends/op.py:langevin": SCHEMA,
    "fastebm/driver/langevin_sample.py:langevin_sample": PUBLIC,
    "fastebm/driver/sample.py:sample": PUBLIC,
    "fastebm/objectives/contrastive_divergence.py:ContrastiveDivergence.__init__": PUBLIC,
    "fastebm/pool/pool.py:ChainPool.__init__": PUBLIC,
    "fastebm/train/loop.py:train": PUBLIC,
    "fastebm/train/trainer.py:Trainer.__init__": PUBLIC,
    "kernels/cpu/leapfrog.py:arrive": NUMBA,
    "kernels/cpu/leapfrog.py:leap": NUMBA,
    "kernels/cpu/mlp.py:_up.up": NUMBA,
    "kernels/cpu/mlp.py:energy": NUMBA,
    "kernels/cpu/pool.py:draw": NUMBA,
    "kernels/cpu/pool.py:put": NUMBA,
    "kernels/cpu/update.py:draw": NUMBA,
    "kernels/cpu/update.py:update": NUMBA,
}


def modules(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def dotted(path: str) -> list[str]:
    """fastebm/pool/draws.py -> ["pool", "draws"]; kernels/cpu/jit.py -> ["kernels", "cpu", "jit"]."""
    parts = path.removesuffix(".py").split("/")
    return parts if parts[0] == "kernels" else parts[1:]


def imported(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line, and the part of fastebm that is imported there, at any depth but under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from imported(path, node)
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from ((node.lineno, name[1] if name[1:] else "__init__") for name in names if name[0] == "fastebm")
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                module = [*dotted(path)[: -node.level], *module]
            elif module[:1] == ["fastebm"]:
                module = module[1:]
            else:
                continue
            # ``from . import plot`` names modules, ``from .plot import png`` does not
            for part in [module[0]] if module else [alias.name for alias in node.names]:
                yield node.lineno, part if part in LAYER_OF else "__init__"


def test_imports_never_run_up():
    wrong = []
    for path, tree in modules("fastebm", "kernels"):
        layer = LAYER_OF[dotted(path)[0]]
        for line, part in imported(path, tree):
            if LAYER_OF[part] > layer:
                wrong.append(f"{path}:{line} imports {part}")
    assert wrong == []


@pytest.mark.parametrize(
    ("path", "text", "parts"),
    [
        ("fastebm/pool/pool.py", "from ..backends.run import x", ["backends"]),
        ("fastebm/pool/pool.py", "from .draws import x", ["pool"]),
        ("fastebm/pool/pool.py", "from . import draws", ["pool"]),
        ("fastebm/pool/__init__.py", "from .pool import x", ["pool"]),
        ("fastebm/pool/pool.py", "from .. import plot, __version__", ["plot", "__init__"]),
        ("fastebm/rng.py", "def f():\n    from .kernels import cpu", ["kernels"]),
        (
            "fastebm/rng.py",
            "from fastebm.data import x\nimport fastebm.plot\nimport fastebm",
            ["data", "plot", "__init__"],
        ),
        ("fastebm/rng.py", "if TYPE_CHECKING:\n    from .pool import x", []),
        ("kernels/cpu/mlp.py", "from . import jit\nfrom .jit import device", ["kernels", "kernels"]),
        ("fastebm/rng.py", "import torch\nfrom torch import nn", []),
    ],
)
def test_imports_are_found(path, text, parts):
    assert [part for _, part in imported(path, ast.parse(text))] == parts


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = f"{prefix}{node.name}."
            if isinstance(node, ast.FunctionDef):
                yield name[:-1], node
        yield from functions(node, name)


def over_budget() -> Iterator[str]:
    for path, tree in modules("fastebm", "kernels", "bench"):
        if len((ROOT / path).read_text().splitlines()) > MOST_LINES:
            yield path
        for name, function in functions(tree):
            if any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list):
                continue  # it takes pointers, sizes and constants, and is compiled as one body
            arguments = function.args
            n = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
            lines = function.end_lineno - function.lineno + 1
            if lines > MOST_LINES_OF_FUNCTION or n > MOST_PARAMETERS:
                yield f"{path}:{name}"


def test_files_and_functions_stay_short():
    """At most 500 lines a file; at most 80 lines and 12 parameters a function. Split by job before adding to EXEMPT."""
    assert sorted(set(over_budget()) - EXEMPT.keys()) == []


def test_no_exemption_is_left_over():
    assert sorted(EXEMPT.keys() - set(over_budget())) == []
