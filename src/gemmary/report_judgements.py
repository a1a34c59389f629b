"""How a run's models were judged, as sections of its report: what `evaluate`, `memorization` and `compare` left in folders of the run.

RUN/NAME/evaluation.json, RUN/NAME/memorization.json, RUN/NAME/comparison.json      with their charts; NAME is whatever --out said
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemmary import audits, comparison_results, evaluation_results
from gemmary.checkpoints.checkpoint import read_json
from gemmary.report_pages import Figure, Section, Table

__all__ = ["judgements"]


def judgements(run: Path) -> list[Section]:
    """A section for each kind of judgement that the run has."""
    found = (
        _section(run, "evaluation", "Benchmarks", _EVALUATED, _evaluated, evaluation_results.chart),
        _section(run, "memorization", "What it recites", _RECITED, _recited, audits.chart),
        _section(run, "comparison", "Side by side", _COMPARED, _compared, comparison_results.chart),
    )
    return [section for section in found if section is not None]


_EVALUATED = (
    "Percent with 95 % intervals. A published figure counts as reproduced where the difference is within its 95 % interval, both being of samples; "
    "what was measured otherwise is not compared."
)
_RECITED = (
    "Documents of which the model, given the first 50 tokens, goes on with the next 50: exactly, or with at most a tenth changed; and how many "
    "recitations hold personal data or secrets. Percent of documents, 95 % intervals."
)
_COMPARED = "Pairs that A and B won, and A's win rate with ties split evenly, in percent with its 95 % interval."


def _section(
    run: Path,
    name: str,
    title: str,
    text: str,
    table: Callable[[str, Any], Table],
    chart: Callable[[Any], str],
) -> Section | None:
    paths = sorted(run.glob(f"*/{name}.json"))
    if not paths:
        return None
    found = {path.parent.name: read_json(path) for path in paths}
    figures = [Figure(f"{title}: {folder}", chart(one)) for folder, one in found.items() if _drawn(one)]
    return Section(title, text, [table(folder, one) for folder, one in found.items()], figures)


def _drawn(found: Mapping[str, Any]) -> bool:
    """Whether there is anything to draw."""
    if "benchmarks" in found:
        return any("value" in line for line in found["benchmarks"])
    return "pairs" not in found or any(by in found for by in ("judge", "human"))


def _evaluated(folder: str, found: Mapping[str, Any]) -> Table:
    beside = found["published"]
    title = f"{folder}: {found['model']}" + (f", beside {beside['model']} ({beside['source']})" if beside else "")
    return Table(title, evaluation_results.COLUMNS, evaluation_results.rows(found))


def _recited(folder: str, found: Mapping[str, Any]) -> Table:
    return Table(f"{folder}: {found['model']}", audits.COLUMNS, audits.rows(found))


def _compared(folder: str, found: Mapping[str, Any]) -> Table:
    about = found["about"]
    return Table(
        f"{folder}: A = {about['a']}, B = {about['b']}", comparison_results.COLUMNS, comparison_results.rows(found)
    )
