"""Code in the sandbox, on published programs: HumanEval's and MBPP's own solutions pass, mutants of them do not, and no cheat does.

`--data` names a folder with hub/openai/openai_humaneval and hub/google-research-datasets/mbpp, gzipped JSON lines as on the Hub.
It takes some five minutes on two cores.
"""

from __future__ import annotations

import ast
import copy
import gzip
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cheats import CALLS, CHEATS, attacked

from gemmary.evaluate.code_eval import CodeEval
from gemmary.evaluate.sandbox import Limits, Sandbox

pytestmark = pytest.mark.release
SECONDS = 6.0  # for a mutant; some solutions take longer where much else runs
LEAST, MOST = 5, 60  # mutants of a solution that are tried: the first few, and further ones until one fails


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(Limits(seconds=60.0))


@pytest.fixture(scope="module")
def hub(request: pytest.FixtureRequest) -> Path:
    path: Path | None = request.config.getoption("--data")
    if path is None or not (path / "hub").is_dir():
        pytest.fail(f"give --data a folder with hub/, not {path}")
    return path / "hub"


def _rows(folder: Path, split: str = "test") -> list[dict[str, Any]]:
    (path,) = folder.glob(f"*/{split}.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def human(hub: Path) -> list[dict[str, Any]]:
    rows = _rows(hub / "openai" / "openai_humaneval")
    assert len(rows) == 164
    return rows


def _official(row: dict[str, Any]) -> str:
    return f"{row['test']}\ncheck({row['entry_point']})"


@pytest.mark.parametrize("prompt_in_front", [True, False])
def test_every_solution_of_humaneval_passes(
    sandbox: Sandbox, human: list[dict[str, Any]], prompt_in_front: bool
) -> None:
    programs = [(row["prompt"] + "\n" if prompt_in_front else "") + _official(row) for row in human]
    found, results = CodeEval(sandbox).compute(
        references=programs, predictions=[[row["prompt"] + row["canonical_solution"]] for row in human], k=[1]
    )
    assert not [(human[task]["task_id"], each) for task, each in results.items() if not each[0][1]["passed"]]
    assert found == {"pass@1": 1.0}


def test_every_solution_of_mbpp_passes(sandbox: Sandbox, hub: Path) -> None:
    rows = [
        row
        for split in ("test", "train", "validation", "prompt")
        for row in _rows(hub / "google-research-datasets" / "mbpp", split)
    ]
    assert len(rows) == 500 + 374 + 90 + 10
    programs = ["\n".join([row["test_setup_code"], *row["test_list"], *row["challenge_test_list"]]) for row in rows]
    found = sandbox.checks_all([(row["code"], program) for row, program in zip(rows, programs, strict=True)])
    assert not [
        (row["task_id"], verdict.reason) for row, verdict in zip(rows, found, strict=True) if not verdict.passed
    ]
    without = [row["code"].replace("def ", "def no_") for row in rows]
    assert not any(one.passed for one in sandbox.checks_all(list(zip(without, programs, strict=True))))


SWAPS: dict[type, type] = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn,
    ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


def _mutants(code: str, entry: str) -> Iterator[str]:
    """With one operator, constant or returned value of the function changed, each in its turn."""
    tree = ast.parse(code)
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry]
    for place, node in enumerate(ast.walk(function)):
        changed = copy.deepcopy(tree)
        at = next(one for one in changed.body if isinstance(one, ast.FunctionDef) and one.name == entry)
        other: Any = next(itertools.islice(ast.walk(at), place, None))
        match node:
            case ast.Compare(ops=[operator, *_]) if type(operator) in SWAPS:
                other.ops[0] = SWAPS[type(operator)]()
            case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if type(node.op) in SWAPS:
                other.op = SWAPS[type(node.op)]()
            case ast.Constant(value=value) if type(value) in (int, float, bool):
                other.value = not value if isinstance(value, bool) else value + 1
            case ast.Constant(value=str(value)) if not value.count("\n") and value.strip() != "":
                other.value = value + "x"
            case ast.Return(value=ast.expr()):
                other.value = ast.Tuple([other.value], ast.Load())
            case _:
                continue
        yield ast.unparse(ast.fix_missing_locations(changed))


def _plainly(program: str) -> bool:
    """As the dataset's authors do, in a process of its own and no sandbox: mutants of their solutions are no one's attack."""
    limited = f"import resource\nresource.setrlimit(resource.RLIMIT_AS, ({2**30}, {2**30}))\n"
    command = [
        sys.executable,
        "-I",
        "-S",
        "-W",
        "ignore",
        "-c",
        limited + "exec(compile(" + repr(program) + ", 'p', 'exec'), {})",
    ]
    try:
        return subprocess.run(command, capture_output=True, timeout=SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _tried(row: dict[str, Any]) -> list[tuple[str, bool]]:
    """Mutants, and whether they pass plainly."""
    found: list[tuple[str, bool]] = []
    for mutant in itertools.islice(_mutants(row["prompt"] + row["canonical_solution"], row["entry_point"]), MOST):
        if len(found) >= LEAST and not all(passed for _, passed in found):
            break
        found.append((mutant, _plainly(mutant + "\n" + _official(row))))
    return found


def test_every_mutant_is_judged_as_by_a_plain_run(sandbox: Sandbox, human: list[dict[str, Any]]) -> None:
    with ThreadPoolExecutor(2) as pool:
        tried = list(pool.map(_tried, human))
    assert not [row["task_id"] for row, each in zip(human, tried, strict=True) if all(passed for _, passed in each)]
    flat = [(row, *one) for row, each in zip(human, tried, strict=True) for one in each]
    found = sandbox.checks_all([(code, f"{row['prompt']}\n{_official(row)}") for row, code, _ in flat], seconds=SECONDS)
    print(f"{len(flat)} mutants, of which {sum(not passed for *_, passed in flat)} fail")
    assert not [
        (row["task_id"], code, passed, verdict.reason)
        for (row, code, passed), verdict in zip(flat, found, strict=True)
        if verdict.passed != passed
    ]


def test_no_cheat_solves_a_task_of_humaneval(human: list[dict[str, Any]], tmp_path: Path) -> None:
    """The task is of one whole number, as the cheats are; so is the class of what they return."""
    sandbox = Sandbox(Limits(seconds=2.0, memory_bytes=2**28, scratch_bytes=2**22))
    (row,) = [row for row in human if row["entry_point"] == "prime_fib"]
    with attacked(tmp_path) as host:
        codes = [host.addressed(code) for _, code in CHEATS.values()] + [code for *_, code in CALLS.values()]
        found = sandbox.checks_all([(code, f"{row['test']}\ncheck(f)") for code in codes], workers=2)
        assert not [name for name, verdict in zip([*CHEATS, *CALLS], found, strict=True) if verdict.passed]
        assert (host.victim.read_text(encoding="utf-8"), host.calls) == ("whole", 0)
