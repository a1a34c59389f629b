"""One benchmark, from its questions to a figure with an interval and a record of every question."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from gemmary.errors import GemmaryError
from gemmary.evaluate.code_eval import CodeEval
from gemmary.evaluate.data_sets import Unavailable, mirrored
from gemmary.evaluate.lm_eval import GemmaryLM
from gemmary.evaluate.published import Figure
from gemmary.evaluate.several import majority, passing
from gemmary.evaluate.suites import Benchmark
from gemmary.evaluate.toxicity import fitted, judge
from gemmary.train.reward import interval

__all__ = ["Run", "Settings", "Tasks", "Unjudged", "joint", "known_tasks", "run"]

_TASKS = Path(__file__).parent / "lm_tasks"
_SEED = 1234  # lm-eval's own for examples
_SURE = 1.96


class Tasks(Protocol):
    """Whatever has tasks by name, as lm-eval's `TaskManager`."""

    def load(self, names: list[str]) -> Any:
        """The tasks of these names and groups, and how groups are made up."""


class Unjudged(GemmaryError):
    """Questions were answered, and nothing says how well."""


@dataclass(frozen=True)
class Settings:
    """What a run is asked for, beside the benchmark. `limit` is per task (of a group each): the first ones, or `spread` evenly; `samples` answers are
    drawn of each question at `temperature` where it is more than one: for code pass@k, for GSM8K the answer most often given."""

    data: Path | None
    cache: Path
    limit: int | None = None
    chat: bool = False
    samples: int = 1
    temperature: float = 0.8
    spread: bool = False


@dataclass(frozen=True)
class Run:
    """A benchmark's figure in percent, its 95 % interval, how many questions it is of (of so many), and how many examples stood before each.

    `judged_by` names the classifier or the layer of the sandbox that had a say, `measures` are all figures of the same answers, `records` what
    each question came to.
    """

    benchmark: str
    task: str
    shots: int
    asked_shots: int | None
    metric: str
    value: float
    interval: tuple[float, float]
    questions: int
    of: int
    seconds: float
    version: str
    judged_by: str
    measures: Mapping[str, float]
    note: str
    records: Sequence[Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@functools.cache
def known_tasks() -> TaskManager:
    """lm-eval's tasks, and ours. Finding them takes seconds."""
    return TaskManager(include_path=str(_TASKS))


def run(lm: GemmaryLM, tasks: Tasks, one: Benchmark, settings: Settings, code: CodeEval | str) -> Run:
    """Ask a model a benchmark's questions.

    `code` runs programs, or says why nothing does. Raises Unavailable where the questions, or what the task needs beside them, are not there,
    and Unjudged where no answer to them can be judged.
    """
    started = time.perf_counter()
    random.seed(0)
    np.random.seed(_SEED)  # some tasks shuffle with the global state
    with mirrored(settings.data, settings.cache):
        loaded = _loaded(tasks, one)
        judged_by = _judged_by(loaded["tasks"].values(), code)
        shots = _prepare(loaded["tasks"], one, settings)
        some = _spread(loaded["tasks"], settings)
        found = evaluate(
            lm, loaded, limit=None if some else settings.limit, samples=some, bootstrap_iters=0, log_samples=True, apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat, confirm_run_unsafe_code=True,
        )  # fmt: skip
    metric, records = _records(one, found["samples"])
    values = [record["value"] for record in records]
    value, bounds = _figure(values)
    others = _measures(found["samples"], code if isinstance(code, CodeEval) else None, settings.samples)
    docs = [doc for task in loaded["tasks"].values() for doc in task.eval_docs]
    counts = sum(_meant(one, doc) for doc in docs)
    versions = {str(version) for version in found["versions"].values() if version is not None}
    return Run(
        one.name, one.task, shots, one.shots, metric, value, bounds, len(values), counts, time.perf_counter() - started,
        "/".join(sorted(versions)), judged_by, others, one.note, records,
    )  # fmt: skip


def _spread(tasks: Mapping[str, ConfigurableTask], settings: Settings) -> dict[str, list[int]] | None:
    """Which questions are asked, where not the first: many data sets are in an order that matters."""
    if not settings.spread or settings.limit is None:
        return None
    counts = {name: (len(task.eval_docs), min(settings.limit, len(task.eval_docs))) for name, task in tasks.items()}
    return {name: [i * count // some for i in range(some)] for name, (count, some) in counts.items()}


def _loaded(tasks: Tasks, one: Benchmark) -> Any:
    try:
        return tasks.load([one.task])
    except GemmaryError:
        raise
    except ModuleNotFoundError as error:
        raise Unavailable(f"it needs {error.name}: pip install {error.name}") from None
    except Exception as error:  # whatever a task's own code raises
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, GemmaryError):
            cause = cause.__cause__ or cause.__context__
        raise cause or Unavailable(f"it cannot be built: {type(error).__name__}: {error}") from None


def _judged_by(tasks: Iterable[ConfigurableTask], code: CodeEval | str) -> str:
    if any(getattr(task, "UNSAFE_CODE", False) for task in tasks):
        if isinstance(code, str):
            raise Unavailable(code)
        return f"its tests, in the sandbox's layer {code.layer}"
    return fitted().name if any(task.config.process_results is judge for task in tasks) else ""


def _prepare(tasks: Mapping[str, ConfigurableTask], one: Benchmark, settings: Settings) -> int:
    """Set every task up, and say how many examples stand before each question: as many as there are, where too few."""
    least = one.shots
    for task in tasks.values():
        task.set_fewshot_seed(_SEED)
        shots = (task.config.num_fewshot or 0) if one.shots is None else one.shots
        shots = min(shots, _examples(task)) if shots else 0
        task.set_config("num_fewshot", shots)
        least = shots if least is None else min(least, shots)
        for key, value in _FIXES.get(task.config.task, {}).items():
            task.set_config(key, value)
        if settings.samples > 1 and task.OUTPUT_TYPE == "generate_until":
            task.set_config("repeats", settings.samples)
            drawn = {"do_sample": True, "temperature": settings.temperature}
            task.set_config("generation_kwargs", {**(task.config.generation_kwargs or {}), **drawn})
    return least or 0


def _examples(task: ConfigurableTask) -> int:
    """How many examples can be had; one is kept back where they are drawn, since the question itself may be among them."""
    return len(list(task.fewshot_docs())) - (not isinstance(task.sampler, FirstNSampler))


# What a program is judged by comes with the names that its tests need: the prompt's own helpers, a set-up.
_FIXES: dict[str, dict[str, Any]] = {
    "humaneval": {"doc_to_target": "{{prompt}}\n    pass\n\n{{test}}\ncheck({{entry_point}})"},
    "mbpp": {
        "doc_to_target": "{% if is_fewshot is defined %}{{code}}\n[DONE]{% else %}{{test_setup_code}}\n{{test_list | join('\n')}}{% endif %}"
    },
}


def _records(one: Benchmark, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[str, list[dict[str, Any]]]:
    """The measure that was taken, and every question's record with its value."""
    metric, found = one.metric, []
    for task, some in samples.items():
        for sample in some:
            if one.filter and sample["filter"] != one.filter:
                continue
            if not _meant(one, sample["doc"]):
                continue
            numbers = _numbers(sample)
            metric = metric or next(iter(numbers), "")
            if metric not in numbers:
                continue
            found.append(
                {
                    "task": task, "id": sample["doc_id"], "value": numbers[metric], "target": sample["target"],
                    "answers": sample["resps"], "read_as": sample["filtered_resps"], "measures": numbers,
                    "doc": sample["doc"], "prompt_hash": sample["prompt_hash"],
                }
            )  # fmt: skip
    if not found:
        raise Unjudged(
            f"{one.task} has no question that {metric or 'any measure'} is known of, with the filter {one.filter!r}"
        )
    return metric, found


def _meant(one: Benchmark, doc: Mapping[str, Any]) -> bool:
    return one.where is None or str(doc.get(one.where[0])) == one.where[1]


def _numbers(sample: Mapping[str, Any]) -> dict[str, float]:
    """A question's measures that are numbers; a measure that is several goes by their names, as pass@1 does."""
    found: dict[str, float] = {}
    for name in sample["metrics"]:
        several = sample[name] if isinstance(sample[name], Mapping) else {name: sample[name]}
        found |= {
            key: float(value) for key, value in several.items() if isinstance(value, (bool, int, float, np.number))
        }
    return found


def _figure(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean in percent with its 95 % interval: Wilson's where each is right or wrong, else the normal one of a mean."""
    mean = float(np.mean(values))
    if set(values) <= {0.0, 1.0}:
        low, high = interval(sum(values), len(values))
    else:
        half = _SURE * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("inf")
        low, high = mean - half, mean + half
    return 100 * mean, (100 * max(low, 0.0), 100 * min(high, 1.0))


def joint(bounds: Sequence[float], of: int, figure: Figure) -> float:
    """Half the 95 % interval of the difference between a figure with these bounds and a published one, in points.

    Both are of a sample of all possible questions; the published one is taken to be of all that the benchmark has, `of`.
    """
    share = min(max(figure.value / 100, 0.0), 1.0)
    theirs = 100 * _SURE * (share * (1 - share) / max(of, 1)) ** 0.5
    return float(np.hypot((bounds[1] - bounds[0]) / 2, theirs))


def _measures(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], code: CodeEval | None, count: int
) -> dict[str, float]:
    """Every measure's mean over all questions, in percent, and what several answers to each come to."""
    sums: dict[str, list[float]] = {}
    for task, some in samples.items():
        for sample in some:
            filter = "" if sample["filter"] == "none" else f",{sample['filter']}"
            found = {f"{name}{filter}": value for name, value in _numbers(sample).items()}
            if count > 1 and code is not None and task in _FIXES:
                found |= passing(sample, code)
            elif count > 1 and task.startswith("gsm8k"):
                strict = sample["filter"] == "strict-match"
                found[f"maj@{count}{filter}"] = majority(sample["resps"][0], sample["target"], strict=strict)
            for name, value in found.items():
                sums.setdefault(name, []).append(value)
    return {name: 100 * float(np.mean(values)) for name, values in sums.items()}
