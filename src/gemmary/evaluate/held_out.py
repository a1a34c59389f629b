"""A run's own held-out questions as tasks of lm-eval, asked as its others are: answers that are right or wrong by what they end with or by tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from gemmary.evaluate.lm_eval import GemmaryLM
from gemmary.evaluate.running import Run
from gemmary.train.rewards import Reward
from gemmary.train.rollouts import Prompt, Rollout

__all__ = ["HeldOut", "by_task"]


class HeldOut:
    """Tasks by the source of their prompts, loaded as lm-eval's are; each answer is judged by `success` and kept in `rollouts`."""

    def __init__(
        self,
        lm: GemmaryLM,
        sources: Mapping[str, Sequence[Prompt]],
        success: Reward,
        *,
        max_new_tokens: int,
        sampled: bool,
    ) -> None:
        self.rollouts: list[Rollout] = []
        self._lm, self._sources, self._success = lm, sources, success
        self._generation: dict[str, Any] = {
            "until": [],
            "max_gen_toks": max_new_tokens,
            "show_end": True,
            "do_sample": sampled,
        }
        if sampled:
            self._generation["temperature"] = 1.0

    def load(self, names: Sequence[str]) -> dict[str, Any]:
        """What lm-eval's `TaskManager.load` gives."""
        return {"tasks": {name: self._task(name) for name in names}, "groups": {}, "group_map": {}}

    def _task(self, source: str) -> ConfigurableTask:
        prompts = self._sources[source]
        rows = [{"number": i, "prompt": one.text, "where": one.where} for i, one in enumerate(prompts)]

        def judged(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
            text, finished = self._lm.ended(results[0])
            tokenizer = self._lm.gemma.tokenizer
            ids = [*tokenizer.encode(text), *([tokenizer.end_of_turn or tokenizer.eos] if finished else [])]
            rollout = Rollout(prompts[doc["number"]], tuple(ids), (), text, finished)
            self.rollouts.append(rollout)
            (value,) = self._success([rollout])
            return {} if value is None else {"success": value}

        return ConfigurableTask(
            config={
                "task": source, "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)}, "test_split": "test",
                "output_type": "generate_until", "doc_to_text": lambda doc: self._lm.written(prompts[doc["number"]].ids),
                "doc_to_target": "", "process_results": judged, "generation_kwargs": self._generation, "num_fewshot": 0,
                "metric_list": [{"metric": "success", "aggregation": "mean", "higher_is_better": True}],
                "metadata": {"version": 1.0},
            }
        )  # fmt: skip


def by_task(runs: Sequence[Run]) -> dict[str, Any]:
    """By source, and the mean over sources (`all`): how many prompts were judged, the share answered right and its 95 % interval."""
    found: dict[str, Any] = {
        one.benchmark: {
            "prompts": one.questions,
            "success": one.value / 100,
            "interval": [x / 100 for x in one.interval],
        }
        for one in sorted(runs, key=lambda one: one.benchmark)
    }
    if found:
        count = sum(one["prompts"] for one in found.values())
        found["all"] = {"prompts": count, "success": sum(one["success"] for one in found.values()) / len(found)}
    return found
