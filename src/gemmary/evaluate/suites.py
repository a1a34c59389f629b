"""The protocols as data: which lm-eval task stands for which benchmark, with how many examples, and which of its measures is taken.

- `gemma`: the 18 tasks of the Gemma report's table of pre-trained models.
- `leaderboard`: the six of the Open LLM Leaderboard's first version, as in the report's comparison with Mistral.
- `safety`: the ten of the report's table of instruction-tuned models.

Where the report does not state a setting, the usual one of lm-eval is taken; `note` says what else differs from what was published.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, replace

from gemmary.errors import GemmaryError

__all__ = ["SUITES", "Benchmark", "named", "suite"]


@dataclass(frozen=True)
class Benchmark:
    """One row of a table. `shots` of None are the task's own; `where` takes only questions whose document has that value in that field."""

    name: str
    task: str
    shots: int | None = None
    metric: str = "acc"
    filter: str = "none"
    where: tuple[str, str] | None = None
    comparable: bool = True
    """Whether what was published measures the same."""
    note: str = ""


_MULTIPLE = "lm-eval's task, 0-shot: the published setting is 3 to 5 examples, which lm-eval's multiple-choice tasks do not take"
_JUDGED = "a classifier of our own in place of the published one: not to be compared with published figures"

SUITES: dict[str, tuple[Benchmark, ...]] = {
    "gemma": (
        Benchmark("MMLU", "mmlu", 5),
        Benchmark("HellaSwag", "hellaswag", 0, "acc_norm"),
        Benchmark("PIQA", "piqa", 0),
        Benchmark("SIQA", "social_iqa", 0),
        Benchmark("BoolQ", "boolq", 0),
        Benchmark("Winogrande", "winogrande", 0, note="partial score: the likelihood of what follows the name"),
        Benchmark("CQA", "commonsense_qa", 7),
        Benchmark("OBQA", "openbookqa", 0, "acc_norm"),
        Benchmark("ARC-e", "arc_easy", 0, "acc"),
        Benchmark("ARC-c", "arc_challenge", 0, "acc_norm"),
        Benchmark("TriviaQA", "triviaqa", 5, "exact_match", "remove_whitespace"),
        Benchmark("NQ", "nq_open", 5, "exact_match", "remove_whitespace"),
        Benchmark("HumanEval", "humaneval", 0, "pass@1", "create_test"),
        Benchmark("MBPP", "mbpp", 3, "pass_at_1"),
        Benchmark("GSM8K", "gsm8k", 5, "exact_match", "strict-match"),
        Benchmark("MATH", "minerva_math", 4, "exact_match"),
        Benchmark("AGIEval", "agieval_en", 0, note=_MULTIPLE),
        Benchmark("BBH", "bbh", 3, "exact_match", "get-answer", note="with chains of thought"),
    ),
    "leaderboard": (
        Benchmark("ARC-c", "arc_challenge", 25, "acc_norm"),
        Benchmark("HellaSwag", "hellaswag", 10, "acc_norm"),
        Benchmark("MMLU", "mmlu", 5),
        Benchmark("TruthfulQA", "truthfulqa_mc2", 0),
        Benchmark("Winogrande", "winogrande", 5),
        Benchmark("GSM8K", "gsm8k", 5, "exact_match", "strict-match"),
    ),
    "safety": (
        Benchmark("RealToxicity", "gemmary_realtoxicity", 0, "toxicity", comparable=False, note=_JUDGED),
        Benchmark("BOLD", "gemmary_bold", 0, "toxicity", comparable=False, note=_JUDGED),
        Benchmark(
            "CrowS-Pairs", "crows_pairs_english", 0, "pct_stereotype",
            note="how often the stereotype is the likelier sentence: 50 is no bias",
        ),
        Benchmark("BBQ ambiguous", "bbq", 1, where=("context_condition", "ambig")),
        Benchmark("BBQ disambiguated", "bbq", 0, where=("context_condition", "disambig")),
        Benchmark("Winogender", "winogender_all", 0),
        Benchmark("TruthfulQA", "truthfulqa_mc2", 0),
        Benchmark("Winobias 1_2", "gemmary_winobias_type1", 0, note="type 1 sentences, pro- and anti-stereotypical"),
        Benchmark("Winobias 2_2", "gemmary_winobias_type2", 0, note="type 2 sentences, pro- and anti-stereotypical"),
        Benchmark("Toxigen", "gemmary_toxigen", 0, "toxic", comparable=False, note=_JUDGED),
    ),
}  # fmt: skip

_MEASURES = {one.task: one for suite in reversed(SUITES.values()) for one in suite if one.where is None}


def suite(name: str) -> tuple[Benchmark, ...]:
    """A suite's benchmarks. Raises GemmaryError for an unknown one."""
    if name not in SUITES:
        raise GemmaryError(f"there is no suite {name!r}: {', '.join(SUITES)}")
    return SUITES[name]


def named(asked: str, known: Collection[str]) -> Benchmark:
    """A benchmark from `TASK` or `TASK@SHOTS`, where `TASK` is one of lm-eval's (`known`) or a benchmark's name here.

    Raises GemmaryError for an unknown one, with the nearest names.
    """
    task, _, shots = asked.partition("@")
    if shots and not shots.isdecimal():
        raise GemmaryError(f"{asked!r}: after @ comes how many examples, as in piqa@5")
    ours = {one.name.lower(): one for some in reversed(SUITES.values()) for one in some}
    found = ours.get(task.lower()) or _MEASURES.get(task)
    if found is None and task not in known:
        near = difflib.get_close_matches(task, [*ours, *known], n=5, cutoff=0.5)
        raise GemmaryError(f"there is no task {task!r}" + (f": is it {', '.join(near)}?" if near else ""))
    found = found or Benchmark(task, task, metric="", filter="")
    return replace(found, shots=int(shots)) if shots else found
