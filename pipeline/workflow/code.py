"""Which code of this package a command executes, so that Snakemake makes anew what a change of it affects.

Rules call `python -m pipeline ...`, which Snakemake does not look into. Each rule has the digest of its command's code
among its parameters instead, and a changed parameter reruns a job.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
_NO_EFFECT = ("pipeline.cli.options", "pipeline.progress")
"""Help texts and progress bars change no result, and a study takes hours."""


def code_digest(module: str) -> str:
    """A digest of all code that `module` can execute; comments, docstrings and formatting do not count."""
    return hashlib.sha256("".join(_meaning(path) for path in code_of(module)).encode()).hexdigest()[:16]


def code_of(module: str) -> list[Path]:
    """The files of this package that `module` imports, directly or not and also within functions, itself included.

    A package's `__init__.py` counts only where something is imported from it by name.
    """
    found: set[Path] = set()
    waiting = [_file_of(module)]
    while waiting:
        path = waiting.pop()
        if path is not None and path not in found:
            found.add(path)
            waiting += [_file_of(name) for name in _imported(path)]
    return sorted(found)


@cache
def _imported(path: Path) -> tuple[str, ...]:
    """What a file imports from this package, as names of modules."""
    names: list[str] = []
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from package import module` and `from module import name` both mean the module.
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if _file_of(name) else node.module for name in modules]
    return tuple(name for name in names if name.split(".")[0] == PACKAGE.name and name not in _NO_EFFECT)


@cache
def _file_of(module: str) -> Path | None:
    place = PACKAGE.parent.joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@cache
def _meaning(path: Path) -> str:
    return ast.dump(_WithoutDocstrings().visit(_parsed(path)))


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


class _WithoutDocstrings(ast.NodeTransformer):
    """Drops statements that are nothing but a text."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node
