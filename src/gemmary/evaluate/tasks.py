"""Held-out tasks: questions whose answers can be told right from wrong, by what they end with or by running their code."""

from __future__ import annotations

from collections.abc import Sequence

from gemmary.evaluate.sandbox import Sandbox, find_code
from gemmary.train.rewards import Reward, exact_answer
from gemmary.train.rollouts import Rollout

__all__ = ["passing_tests", "success"]


def passing_tests(sandbox: Sandbox) -> Reward:
    """1 where a finished answer's code passes its prompt's tests, else 0; None for prompts without tests."""

    def judge(rollouts: Sequence[Rollout]) -> list[float | None]:
        tried = [(find_code(one.text), one.prompt.tests) for one in rollouts if one.prompt.tests and one.finished]
        verdicts = iter(sandbox.passes_all(tried))
        return [
            None if not one.prompt.tests else float(one.finished and next(verdicts).passed) for one in rollouts
        ]  # `and`: an answer that did not end has no verdict

    return judge


def success(sandbox: Sandbox | None) -> Reward:
    """Right or wrong by tests where a prompt has them (None without a sandbox), else by its answer."""
    tests = passing_tests(sandbox) if sandbox else None

    def judge(rollouts: Sequence[Rollout]) -> list[float | None]:
        by_tests = tests(rollouts) if tests else [None] * len(rollouts)
        by_answer = exact_answer(rollouts)
        return [
            code if one.prompt.tests else answer
            for one, code, answer in zip(rollouts, by_tests, by_answer, strict=True)
        ]

    return judge
