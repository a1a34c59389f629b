"""The corpus that every Python carries: its reference topics and docstrings as prose, its sources as code.

About 2 MB of English and 12 MB of code. Which documents there are depends on the version and build of Python; tests of the
library are left out.
"""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gemmary.data.readers import Broken, Document, Piece

__all__ = ["python_pieces", "read_python"]

_MODULES = 1 << 20  # bytes of Python in a piece
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def python_pieces(part: str) -> list[Piece]:
    """Modules of the standard library in groups, and for prose the reference topics first."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, int]] = []
    for folder, below, files in os.walk(root):
        below[:] = sorted(set(below) - _NOT_LIBRARY)
        paths = (Path(folder, name) for name in sorted(files) if name.endswith(".py"))
        found += [(path.relative_to(root).as_posix(), path.stat().st_size) for path in paths]
    pieces, names, size = [], list[str](), 0
    if part == "prose":
        found = [(name, size) for name, size in found if name != "pydoc_data/topics.py"]
        pieces.append(Piece("pydoc_data.topics", 500_000))
    for name, more in sorted(found):
        names.append(name)
        size += more
        if size >= _MODULES or name == max(found)[0]:
            pieces.append(Piece(str(root), size, names=tuple(names)))
            names, size = [], 0
    return pieces


def read_python(piece: Piece, part: str) -> Iterator[Document | Broken]:
    """Topics, docstrings of modules, or sources."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not piece.names:
        from pydoc_data.topics import topics

        for name, text in sorted(topics.items()):
            yield Document(f"{version}/topics/{name}", text.strip() + "\n", {})
    for name in piece.names:
        where = f"{version}/{part}/{name}"
        try:
            source = Path(piece.path, name).read_text(encoding="utf-8")
            text = source if part == "code" else _docstrings(source)
        except (ValueError, SyntaxError, OSError) as error:
            yield Broken(where, str(error))
            continue
        if text.strip():
            yield Document(where, text, {})


def _docstrings(source: str) -> str:
    """A module's docstrings in order, those of classes and functions under their names."""
    parts: list[str] = []
    stack: list[ast.AST] = [ast.parse(source)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if said := ast.get_docstring(node):
                parts.append(said if isinstance(node, ast.Module) else f"{node.name}\n{said}")
        elif not isinstance(node, ast.If | ast.Try):
            continue
        stack += reversed(node.body)
    return "\n\n".join(parts) + "\n" if parts else ""
