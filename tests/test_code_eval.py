"""pass@k as the Hub's metric has it, and lm-eval's own tasks with this metric in its place."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from cheats import sandbox_of

from gemmary.errors import GemmaryError
from gemmary.evaluate.code_eval import CodeEval, in_place_of_hub, pass_at_k
from gemmary.evaluate.sandbox import Limits, Sandbox

PROGRAM = "assert f(2) == 3"
RIGHT, WRONG = "def f(n): return n + 1", "def f(n): return n"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_of(Limits(seconds=3.0))


def test_pass_at_k_is_the_share_of_draws() -> None:
    for tried in range(1, 7):
        for passed, k in itertools.product(range(tried + 1), range(1, tried + 1)):
            draws = list(itertools.combinations(range(tried), k))
            share = sum(any(one < passed for one in draw) for draw in draws) / len(draws)
            assert pass_at_k(tried, passed, k) == pytest.approx(share, abs=1e-12)
    assert pass_at_k(200, 100, 100) == pytest.approx(1.0)


def test_it_gives_what_the_metric_gives(sandbox: Sandbox) -> None:
    found, results = CodeEval(sandbox).compute(
        references=[PROGRAM, PROGRAM], predictions=[[RIGHT, WRONG, WRONG], [RIGHT, RIGHT, WRONG]], k=[1, 2, 10]
    )
    assert found == pytest.approx({"pass@1": 0.5, "pass@2": 5 / 6})  # no pass@10 of three
    assert {task: [(place, one["passed"]) for place, one in each] for task, each in results.items()} == {
        0: [(0, True), (1, False), (2, False)],
        1: [(0, True), (1, True), (2, False)],
    }
    assert results[1][2][1] == {
        "task_id": 1, "completion_id": 2, "passed": False, "result": "failed `assert f(2) == 3`", "layer": "bubblewrap",
    }  # fmt: skip


def test_its_own_time_is_kept(sandbox: Sandbox) -> None:
    loop = "def f(n):\n    while True: pass"
    started = time.monotonic()
    found, results = CodeEval(sandbox).compute(references=[PROGRAM], predictions=[[loop]], k=1, timeout=0.3)
    assert found == {"pass@1": 0.0}
    assert results[0][0][1]["result"] == "timed out"
    assert time.monotonic() - started < sandbox.limits.seconds / 2


@pytest.mark.parametrize(
    ("references", "predictions", "k", "reason"),
    [
        ([PROGRAM], [[RIGHT], [RIGHT]], 1, "one list for each"),
        ([PROGRAM], [[]], 1, "not empty"),
        ([], [], 1, "not empty"),
        ([PROGRAM], [[RIGHT]], 0, "k is at least 1"),
        (["f(2)"], [[RIGHT]], 1, "could not fail"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    sandbox: Sandbox, references: list[str], predictions: list[list[str]], k: int, reason: str
) -> None:
    with pytest.raises(GemmaryError, match=reason):
        CodeEval(sandbox).compute(references=references, predictions=predictions, k=k)


PROMPT = '''def turn(words):
    """The first goes behind the last."""
    return words[1:] + words[:1]


def back(words):
    """Undoes turn."""
'''
CHECK = "\n\ndef check(candidate):\n    for words in ([1, 2, 3], [4], [5, 6]):\n        assert candidate(turn(words)) == words\n"
ADD = {"prompt": 'def add(a, b):\n    """The sum."""\n', "entry_point": "add"}
ADD["test"] = "def check(candidate):\n    for n in range(3):\n        assert candidate(n, 2) == n + 2\n"
HUMAN = [ADD, {"prompt": PROMPT, "entry_point": "back", "test": CHECK}]
BASIC = [
    {"text": "Write a function to add.", "code": "", "test_list": ["assert add(1, 2) == 3", "assert add(1, 1) == 2", "assert add(0, 0) == 0"]}
]  # fmt: skip
SAYS = {
    "def add": "    return a + b\n",
    "def back": "    return words\ndef turn(words): return words\n",  # passes where the helper is the candidate's
    "Write": "def add(a, b): return a + b\n",
}


def _task(folder: Path, name: str, rows: list[dict[str, Any]], tasks: Path) -> str:
    """A task of lm-eval's with rows of ours."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(
        f"include: {tasks / name / name}.yaml\ntask: own_{name}\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n",
        encoding="utf-8",
    )
    return f"own_{name}"


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_tasks_of_the_harness_work_without_a_network(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluate
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Says(LM):
        """What it says begins with what the prompt's last known words call for."""

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            return [SAYS[max(SAYS, key=request.args[0].rfind)] for request in requests]

        def loglikelihood(self, requests: list[Any], **_: Any) -> list[Any]:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    hub = evaluate.load
    with in_place_of_hub(sandbox) as metric:
        assert metric.layer == "bubblewrap"
        tasks = Path(lm_eval.__file__).parent / "tasks"
        names = [_task(tmp_path, "humaneval", HUMAN, tasks), _task(tmp_path, "mbpp", BASIC, tasks)]
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = lm_eval.simple_evaluate(
            Says(), tasks=names, task_manager=manager, confirm_run_unsafe_code=True, bootstrap_iters=0
        )
        kept = evaluate.load("code_eval")
    assert evaluate.load is hub
    assert found is not None
    assert found["results"]["own_humaneval"]["pass@1,create_test"] == 0.5
    assert found["results"]["own_mbpp"]["pass_at_1,none"] == 1.0
    # Modules of the harness keep what they loaded.
    with pytest.raises(GemmaryError, match="within in_place_of_hub"):
        kept.compute(references=[PROGRAM], predictions=[[RIGHT]], k=[1])
    with in_place_of_hub(Sandbox(Limits(seconds=0.1))):
        assert kept.compute(references=[PROGRAM], predictions=[["while True: pass"]], k=[1])[0] == {"pass@1": 0.0}
