"""What a comparison came to: the numbers, a table, a chart, and the files that keep them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gemmary.checkpoints.checkpoint import write_whole
from gemmary.evaluate.drawing import figure, svg
from gemmary.evaluate.pairs import Pair, preferences
from gemmary.evaluate.side_by_side import Outcome, agreement, by_category, position_bias, tally, written

__all__ = ["COLUMNS", "Results", "chart", "rows"]

_TABLE_WIDTH = 110  # so that intervals stay whole where output is piped
COLUMNS = ["by", "category", "pairs", "A wins", "ties", "B wins", "invalid", "win rate of A, % [95 % interval]"]
_COLORS = {"wins": "tab:blue", "ties": "0.82", "losses": "tab:orange"}


class Results:
    """Pairs, what the judge made of them (`evaluate.pairs.judged`; None where there was none), and what people did.

    `about` says who was compared, on what and by whom. `ratings` has for each pair what each rater gave to A, or is empty.
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        pairs: Sequence[Pair],
        verdicts: tuple[list[Outcome], list[dict[str, Any]]] | None,
        ratings: Sequence[Mapping[str, float]],
    ) -> None:
        self._about, self._pairs = about, pairs
        self._ratings = ratings if any(ratings) else ()
        self._verdicts = verdicts[1] if verdicts else ()
        self._ruled: dict[str, Sequence[Outcome]] = {}  # people first: where both have ruled, a preference is theirs
        if self._ratings:
            self._ruled["human"] = [_by_people(pair, one) for pair, one in zip(pairs, ratings, strict=True)]
        if verdicts:
            self._ruled["judge"] = verdicts[0]

    @cached_property
    def found(self) -> dict[str, Any]:
        """As plain data: of each who ruled a tally, whole and by category; of the judge its bias, of people how far they agree."""
        cut = {
            "a": sum(said.cut for pair in self._pairs for said in pair.a),
            "b": sum(said.cut for pair in self._pairs for said in pair.b),
        }
        equal = sum(pair.equal for pair in self._pairs)
        found: dict[str, Any] = {"about": self._about, "pairs": len(self._pairs), "equal": equal, "cut": cut}
        for name, every in self._ruled.items():
            outcomes = [one for one in every if name == "judge" or one.value is not None]
            found[name] = {"all": tally(outcomes), "categories": by_category(outcomes)}
            if name == "judge":
                found[name]["bias"] = position_bias(outcomes)
            else:
                found[name]["unrated"] = len(every) - len(outcomes)
                found[name]["raters"] = dict(Counter(rater for one in self._ratings for rater in one))
                found[name]["agreement"] = agreement(list(one.values()) for one in self._ratings)
        return found

    def write(self, out: Path, export: Path | None) -> str:
        """`comparison.json`, `pairs.jsonl` and `comparison.svg` into a folder, each whole; preferences where they are asked for, and a word on them."""
        files = {
            "pairs.jsonl": _json_lines(self._records()),
            "comparison.json": json.dumps(self.found, indent=1) + "\n",
        }
        if self._ruled:
            files["comparison.svg"] = chart(self.found)
        for name, text in files.items():
            write_whole(out / name, text.encode())
        if export is None:
            return ""
        made, left_out = preferences(self._pairs, list(self._ruled.items()))
        write_whole(export, _json_lines(made).encode())
        return f"wrote {len(made)} preferences to {export}; the other {left_out} pairs are none"

    def _records(self) -> Iterator[dict[str, Any]]:
        for i, pair in enumerate(self._pairs):
            a, b = pair.texts
            question = pair.question
            line: dict[str, Any] = {"id": question.id, "category": question.category, "turns": question.turns}
            line |= {"a": a, "b": b} | {name: outcomes[i].value for name, outcomes in self._ruled.items()}
            line |= {"verdicts": self._verdicts[i]} if self._verdicts else {}
            yield line | ({"ratings": self._ratings[i]} if self._ratings else {})

    def show(self) -> None:
        """Print the table, and a line for each thing to know beside it."""
        shown = Console()
        shown.width = max(shown.width, _TABLE_WIDTH)
        title = escape(f"A = {self._about['a']}, B = {self._about['b']}")
        table = Table(*COLUMNS, title=title)
        for row in rows(self.found):
            table.add_row(*map(escape, row))
        for column in table.columns[2:7]:
            column.justify = "right"
        if table.row_count:
            shown.print(table)
        for line in _remarks(self.found):
            shown.print(line, markup=False, highlight=False)


def _by_people(pair: Pair, given: Mapping[str, float]) -> Outcome:
    value = 0.5 if pair.equal else sum(given.values()) / len(given) if given else None
    return Outcome(pair.question.id, pair.question.category, value)


def _json_lines(records: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(who ruled, category, tally), all categories last."""
    for name in ("judge", "human"):
        if name in found:
            categories = found[name]["categories"]
            yield from ((name, category, one) for category, one in categories.items() if len(categories) > 1)
            yield name, "all", found[name]["all"]


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row for each category and who ruled, as `COLUMNS`."""
    return [
        [
            name,
            category,
            *(str(one[key]) for key in ("pairs", "wins", "ties", "losses", "invalid")),
            written(one["rate"], one["interval"]),
        ]
        for name, category, one in _rows(found)
    ]


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
    if "judge" in found and found["judge"]["bias"]["pairs"]:
        bias = found["judge"]["bias"]
        first, second, same = (
            written(bias[key]["share"], bias[key]["interval"]) for key in ("first", "second", "consistent")
        )
        yield f"place: in both orders the first answer won in {first} % of pairs, the second in {second} %"
        yield f"the judge said the same in both orders in {same} % of pairs"
    if "human" in found:
        human = found["human"]
        alpha = human["agreement"]["alpha"]
        said = "cannot be told" if alpha is None else f"{alpha:.2f}"
        met = human["agreement"]["pairs"]
        yield f"raters: {len(human['raters'])}; Krippendorff's alpha {said}, of {met} pairs that two or more rated"
        yield f"pairs that nobody rated: {human['unrated']}"
    if found["equal"]:
        yield f"pairs of equal answers, which are ties: {found['equal']}"
    if any(found["cut"].values()):
        yield f"answers cut off at --max-new-tokens: {found['cut']['a']} of A, {found['cut']['b']} of B"
    if "judge" not in found and "human" not in found:
        yield "nobody has rated a pair yet: the same command goes on"
    yield f"everything is in {found['about']['folder']}"


def chart(found: Mapping[str, Any]) -> str:
    """Wins, ties and losses of each category as shares of a bar, the win rate beside it: an SVG."""
    rows = [(name, category, one) for name, category, one in _rows(found) if one["rate"] is not None]
    made, axes = figure(height=1.0 + 0.42 * max(len(rows), 1))
    for at, (_, _, one) in enumerate(rows):
        valid, left = one["pairs"] - one["invalid"], 0.0
        for key, color in _COLORS.items():
            share = 100 * one[key] / valid
            axes.barh(at, share, left=left, height=0.7, color=color)
            if share >= 4:
                axes.text(left + share / 2, at, str(one[key]), ha="center", va="center", fontsize=8)
            left += share
        axes.text(101.5, at, written(one["rate"], one["interval"]), va="center", fontsize=8)
    several = len({name for name, _, _ in rows}) > 1
    axes.set_yticks(range(len(rows)), [f"{category} ({name})" if several else category for name, category, _ in rows])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a category may have a dollar sign
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("percent of pairs; at the right, A's win rate [95 % interval]")
    axes.spines["right"].set_visible(False)
    names = {"wins": "A wins", "ties": "tie", "losses": "B wins"}
    handles = [axes.barh([0], [0], color=color, label=names[key]) for key, color in _COLORS.items()]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return svg(made)
