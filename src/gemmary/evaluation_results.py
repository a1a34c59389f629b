"""An evaluation for people: a table and a chart beside what was published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

__all__ = ["COLUMNS", "chart", "rows", "summary", "table"]


def summary(model: str, card: Any, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that is known, as plain data. `card` is whose published figures stand beside, or None."""
    beside = None if card is None else {"model": card.name, "source": card.source}
    suites: dict[str, Any] = {}
    for line in lines:
        if line["suite"] in _AVERAGED and "value" in line:
            suites.setdefault(line["suite"], []).append(line["value"])
    means = {name: {"benchmarks": len(values), "mean": sum(values) / len(values)} for name, values in suites.items()}
    return {"model": model, "published": beside, "suites": means, "benchmarks": list(lines)}


_AVERAGED = ("gemma", "leaderboard")  # safety has both kinds, where more is better and where less is
COLUMNS = ["suite", "benchmark", "shots", "questions", "ours", "published", "reproduced", "time"]


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row for each benchmark, as `COLUMNS`: ours with its interval, what was published, whether they agree, and the time; and each suite's mean."""
    made = []
    for line in found["benchmarks"]:
        if "missing" in line:
            made.append([line["suite"], line["benchmark"], "", "", "not run: " + line["missing"], "", "", ""])
            continue
        low, high = line["interval"]
        asked, shots = line["asked_shots"], str(line["shots"])
        shots += "" if asked in (None, line["shots"]) else f" of {asked}"
        count = f"{line['questions']:,}" + (f" of {line['of']:,}" if line["questions"] < line["of"] else "")
        ours = f"{line['value']:.1f} [{low:.1f}, {high:.1f}] {line['metric']}"
        cells = [line["suite"], line["benchmark"], shots, count, ours, _published(line), _verdict(line)]
        made.append([*cells, f"{line['seconds']:.0f} s"])
    for name, one in found["suites"].items():
        made.append([name, f"mean of {one['benchmarks']}", "", "", f"{one['mean']:.1f}", "", "", ""])
    return made


def table(found: Mapping[str, Any]) -> Table:
    """The rows as a table for a terminal."""
    beside = found["published"]
    title = f"{found['model']}, percent [95 % interval]" + (f", beside {beside['model']}" if beside else "")
    out = Table(*COLUMNS, title=escape(title))
    for row in rows(found):
        out.add_row(*map(escape, row))
    out.columns[4].overflow = "fold"  # a path that is not there is shown whole
    for column in out.columns[2:4] + out.columns[7:]:
        column.justify = "right"
    return out


def _published(line: Mapping[str, Any]) -> str:
    if line["published"] is None:
        return ""
    shots = line["published_shots"]
    return f"{line['published']:g}" + ("" if shots in (None, line["shots"]) else f" ({shots}-shot)")


def _verdict(line: Mapping[str, Any]) -> str:
    if line["published"] is None:
        return ""
    if not line["comparable"]:
        return "not comparable"
    return f"{'yes' if line['reproduced'] else 'no'}, {line['difference']:+.1f} ± {line['joint']:.1f}"


def chart(found: Mapping[str, Any]) -> str:
    """Every benchmark's figure with its interval, and the published one beside it: an SVG."""
    from gemmary.evaluate.drawing import figure, svg

    lines = [line for line in found["benchmarks"] if "value" in line]
    made, axes = figure(height=1.2 + 0.34 * len(lines))
    at = range(len(lines))
    values = [line["value"] for line in lines]
    below = [max(line["value"] - line["interval"][0], 0) for line in lines]
    above = [max(line["interval"][1] - line["value"], 0) for line in lines]
    axes.barh(at, values, height=0.6, color="tab:blue", xerr=(below, above), ecolor="0.35", capsize=2, label="ours")
    for comparable, face, label in (
        (True, "tab:orange", "published"),
        (False, "none", "published, measured otherwise"),
    ):
        marked = [i for i in at if lines[i]["published"] is not None and lines[i]["comparable"] is comparable]
        if marked:
            where = [lines[i]["published"] for i in marked]
            axes.scatter(where, marked, marker="D", s=26, facecolor=face, edgecolor="tab:orange", zorder=3, label=label)
    names = [
        f"{line['benchmark']} ({line['suite']})" if len(found["suites"]) > 1 else line["benchmark"] for line in lines
    ]
    axes.set_yticks(at, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("percent")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(
        frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.9 / (1.2 + 0.34 * len(lines))), ncols=3
    )
    return svg(made)
