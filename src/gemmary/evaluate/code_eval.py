"""pass@k of generated programs, as Hugging Face's metric "code_eval" reports it, with the sandbox where that has none.

The metric is a program of the Hub's that runs candidates in this user's own interpreter; lm-eval's tasks for HumanEval and MBPP load it by
name. `in_place_of_hub` gives them this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from gemmary.errors import GemmaryError
from gemmary.evaluate.sandbox import Sandbox

__all__ = ["CodeEval", "in_place_of_hub", "pass_at_k"]


def pass_at_k(tried: int, passed: int, k: int) -> float:
    """The chance that of k candidates, drawn from those tried, one passes: 1 - C(tried - passed, k) / C(tried, k).

    Without bias (Chen et al. 2021, arXiv 2107.03374, section 2.1); `k` is at most `tried`.
    """
    return 1.0 - math.comb(tried - passed, k) / math.comb(tried, k)


class CodeEval:
    """The metric. `layer` names what isolates candidates; every result has it too."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.layer = sandbox.layer

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: int | Sequence[int] = (1, 10, 100),
        num_workers: int | None = None,
        timeout: float | None = None,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k, and what became of each candidate: by its reference's place, its own place among the candidates and its result.

        A reference is a test program as `Sandbox.checks` takes it; its candidates are judged `num_workers` at a time, each within
        `timeout` seconds (the processors' number and the sandbox's limit by default). A k for which some reference has too few
        candidates is left out, as the Hub's metric does. GemmaryError where numbers do not match or a reference cannot be judged,
        before anything runs.
        """
        wanted = [k] if isinstance(k, int) else list(k)
        if len(references) != len(predictions) or not all(predictions) or not references:
            raise GemmaryError(
                f"{len(references)} test programs and {len(predictions)} lists of candidates: there is one list for each, not empty"
            )
        if isinstance(references, str) or any(isinstance(codes, str) for codes in predictions) or min(wanted) < 1:
            raise GemmaryError("references are a list, predictions a list of lists, and k is at least 1")
        candidates = [(code, program) for program, codes in zip(references, predictions, strict=True) for code in codes]
        verdicts = iter(self._sandbox.checks_all(candidates, workers=num_workers, seconds=timeout))
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for task, codes in enumerate(predictions):
            results[task] = []
            for place, _ in enumerate(codes):
                verdict = next(verdicts)
                result = {"task_id": task, "completion_id": place, "passed": verdict.passed, "result": verdict.reason}
                results[task].append((place, {**result, "layer": self.layer}))
        counts = [(len(found), sum(one["passed"] for _, one in found)) for found in results.values()]
        enough = [each for each in wanted if all(tried >= each for tried, _ in counts)]
        return {f"pass@{each}": fmean(pass_at_k(*count, each) for count in counts) for each in enough}, results


_IN_PLACE: list[CodeEval] = []


class _Loaded:
    """What a module loaded. lm-eval keeps modules: this asks the metric that is in place when it is used."""

    def compute(self, **given: Any) -> Any:
        if not _IN_PLACE:
            raise GemmaryError("candidates run within in_place_of_hub only; run the task there, as it was built")
        return _IN_PLACE[-1].compute(**given)


@contextmanager
def in_place_of_hub(sandbox: Sandbox) -> Iterator[CodeEval]:
    """While it lasts, `evaluate.load("code_eval")` gives this metric, without a network, and any other name what it gave.

    For lm-eval it lasts while tasks are built (their modules load the metric when they are imported, and try it) and run.
    GemmaryError where the package `evaluate` is not installed. It is the whole process's: not for several threads.
    """
    try:
        import evaluate  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise GemmaryError("the package evaluate is not installed: pip install evaluate") from None
    hub = evaluate.load

    def load(path: str, *arguments: Any, **settings: Any) -> Any:
        return _Loaded() if path == "code_eval" else hub(path, *arguments, **settings)

    _IN_PLACE.append(CodeEval(sandbox))
    evaluate.load = load
    try:
        yield _IN_PLACE[-1]
    finally:
        evaluate.load = hub
        _IN_PLACE.pop()
