"""What the library that every Python carries says of its own functions: the facts that lessons ask for."""

from __future__ import annotations

import ast
import doctest
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Function", "functions"]

_MOST_WORDS = 16
_NOT_ASKED = {
    "test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtle", "turtledemo", "pydoc_data", "this",
    "antigravity", "distutils", "ensurepip", "posixpath", "ntpath", "genericpath",
}  # fmt: skip
_VARY = ("secrets", "subprocess", "random", "doctest")  # modules whose examples show what another run does not
_BUILTINS = {"list", "sorted", "dict", "tuple", "len", "str", "set"}
_SENTENCE = re.compile(r"[A-Z][^`\"*<>|{}\\]+?\.(?=\s|$)")


@dataclass(frozen=True)
class Function:
    """A public function of a public module: what its docstring says first, and its examples as (expression, value).

    An example's expression has nothing but literals, the function's name and builtins such as `list`.
    """

    module: str
    name: str
    says: str
    examples: tuple[tuple[str, str], ...]


@cache
def functions() -> tuple[Function, ...]:
    """Functions whose name one module alone has, in order of module and place. `says` is empty where it would be long."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Function] = []
    names: Counter[str] = Counter()
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if parts[0] in _NOT_ASKED or module.startswith("_") or "._" in module or "-" in module:
            continue
        try:
            body = ast.parse(path.read_text(encoding="utf-8")).body
        except (OSError, ValueError, SyntaxError):
            continue
        for node in body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name != "main":
                names[node.name] += 1
                said = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                sentence = _SENTENCE.match(said if said.endswith(".") else said + ".")
                says = sentence[0] if sentence and sentence[0].isascii() else ""
                if not 3 <= len(says.split()) <= _MOST_WORDS:
                    says = ""
                examples = _examples(node) if module not in _VARY else ()
                if says or examples:
                    found.append(Function(module, node.name, says, examples))
    return tuple(function for function in found if names[function.name] == 1)


def _examples(node: ast.FunctionDef) -> tuple[tuple[str, str], ...]:
    """The docstring's examples that can be tried by themselves, with the literal that it shows."""
    made, known = [], {node.name, *_BUILTINS}
    try:
        examples = doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")
    except ValueError:
        return ()
    for example in examples:
        try:
            call = ast.parse(example.source.strip(), mode="eval").body
            value = ast.literal_eval(example.want.strip())
            names = {part.id for part in ast.walk(call) if isinstance(part, ast.Name)}
            if node.name in names <= known:
                made.append((ast.unparse(call), repr(value)))
        except (ValueError, SyntaxError, TypeError):
            continue
    return tuple(made)
