"""Test programs, read before they run: which of their names are the candidate's, and whether they can fail at all."""

from __future__ import annotations

import ast
import builtins
import functools
import re
import symtable
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gemmary.errors import GemmaryError

__all__ = ["Program", "answering", "check_program", "parse_program"]

_BUILTINS = frozenset(dir(builtins))
_TO_CODE = frozenset({"eval", "exec", "compile", "__import__"})
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Program(NamedTuple):
    """`names` are asked of the candidate; `modules` are of the standard library and the checker's own; NAME of `check(NAME)` is `entry`."""

    source: str
    names: tuple[str, ...]
    modules: tuple[str, ...]
    entry: str | None

    def line(self, number: int) -> str:
        """That line's text, from 1; empty where there is none."""
        lines = self.source.split("\n")
        return lines[number - 1].strip() if 0 < number <= len(lines) else ""


def check_program(program: str) -> None:
    """The program can be judged: it is Python, uses a name that it does not define, and may fail; else GemmaryError.

    It may fail where it runs an `assert` that is more than a constant, a `raise`, or a method named assert…: at its top, in a
    class, or in a function whose name it uses. What turns text into code (`eval` and its kin) is refused: the text could be
    the candidate's.
    """
    parse_program(program)


@functools.lru_cache(2**10)
def parse_program(program: str) -> Program:
    """What `check_program` checks, taken apart.

    A name that the program uses and neither defines nor finds among builtins is the candidate's, but for modules of the standard
    library of which only attributes are used (`math.isclose` without an import): the candidate could answer for these as it
    likes. Where there is no such name, a builtin on the left of the first assertion is: `assert sum(10, 15) == 6`. A program
    that ends with `check(NAME)` may have the prompt in front: its definition of NAME is left out, and what else it defines is
    the checker's.
    """
    source = program.replace("\r\n", "\n").replace("\r", "\n")
    try:
        with warnings.catch_warnings():  # of its backslashes
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
            entry = _entry(tree)
            source = _without(source, tree, entry)
            tree = ast.parse(source)
            free = _free(symtable.symtable(source, "program", "exec"))
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise GemmaryError(f"the test program is no Python: {error}") from None
    reached = list(_reached(tree))
    tests = [node for node in reached if _may_fail(node)]
    if not tests:
        raise GemmaryError(
            "the test program could not fail: it runs no assertion. Give it one, and call the function that has it"
        )
    if found := sorted(_TO_CODE & {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        raise GemmaryError(
            f"the test program uses {found[0]}, which could make code of what a candidate returns; test the value itself"
        )
    modules = {name for name in free & sys.stdlib_module_names if _only_attributes(tree, name)} - {entry}
    names = (free - modules) | ({entry} if entry else set()) or _called_builtin(tests)
    if not names:
        raise GemmaryError("the test program uses nothing of the candidate's; have it call what it tests")
    return Program(source, tuple(sorted(names)), tuple(sorted(modules)), entry)


def _entry(tree: ast.Module) -> str | None:
    match tree.body[-1:]:
        case [ast.Expr(value=ast.Call(func=ast.Name(id="check"), args=[ast.Name(id=name)], keywords=[]))]:
            return name
    return None


def _without(source: str, tree: ast.Module, name: str | None) -> str:
    """The source with that name's definitions as empty lines, so that the others keep their numbers."""
    lines = source.split("\n")
    for node in tree.body:
        if isinstance(node, _Function | ast.ClassDef) and node.name == name:
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            last = node.end_lineno or first
            lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(lines)


def _free(top: symtable.SymbolTable) -> set[str]:
    """Names that the module's scope is asked for and does not make, without builtins."""
    used: set[str] = set()
    made: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table is top or symbol.is_global():
                if symbol.is_assigned() or symbol.is_imported():
                    made.add(symbol.get_name())
                if symbol.is_referenced():
                    used.add(symbol.get_name())
    return {name for name in used - made - _BUILTINS if not name.startswith("__")}


def _reached(tree: ast.Module) -> Iterator[ast.AST]:
    """What the program may run: of functions, those whose name is used where it runs."""
    bodies: dict[str, list[ast.stmt]] = {}
    for node in ast.walk(tree):
        if isinstance(node, _Function):
            bodies.setdefault(node.name, []).extend(node.body)
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                waiting += inner.body if isinstance(inner, _Function) else [inner]
        elif isinstance(node, _Function):
            waiting += [*node.decorator_list, node.args]
        else:
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            waiting += bodies.pop(name, [])
            waiting += ast.iter_child_nodes(node)


def _may_fail(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        always = isinstance(node.test, ast.Constant) and node.test.value
        return not always and not (isinstance(node.test, ast.Tuple) and node.test.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr.startswith("assert")
    return isinstance(node, ast.Raise)


def _only_attributes(tree: ast.Module, name: str) -> bool:
    uses = sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))
    bases = (node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return uses == sum(isinstance(base, ast.Name) and base.id == name for base in bases)


def _called_builtin(tests: Iterable[ast.AST]) -> set[str]:
    asserts = [node for node in tests if isinstance(node, ast.Assert)]
    left: ast.AST | None = min(asserts, key=lambda node: node.lineno).test if asserts else None
    left = left.operand if isinstance(left, ast.UnaryOp) else left
    left = left.left if isinstance(left, ast.Compare) else left
    match left:
        case ast.Call(func=ast.Name(id=name)) if name in _BUILTINS:
            return {name}
    return set()


def answering(code: str, program: Program) -> tuple[list[str], dict[str, int]]:
    """What is asked in the program's place, the candidate first, and which of these each name is taken from.

    A program `check(NAME)` that asks for more than NAME lacks its prompt. A candidate that goes on from the prompt has it in
    front, and what a model added comes after `def NAME`. So what is defined before that line is asked of that beginning alone.
    """
    names = dict.fromkeys(program.names, 0)
    if program.entry is None or len(names) == 1:
        return [code], names
    found = re.search(rf"^(async[ \t]+)?def[ \t]+{re.escape(program.entry)}\b", code, re.MULTILINE)
    before = code[: found.start()] if found else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(before).body
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return [code], names
    defined = {node.name for node in body if isinstance(node, _Function | ast.ClassDef)} - {program.entry}
    helpers = {name: 1 for name in names if name in defined}
    return ([code, before], names | helpers) if helpers else ([code], names)
