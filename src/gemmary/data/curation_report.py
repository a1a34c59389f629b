"""What curation removed and changed: counted by task, put together in the corpus's order, and shown as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

__all__ = ["Tally", "merged", "report_table"]

_EXAMPLES = 10
_BROKEN = 3
_LONGEST = 200


class Tally:
    """What one task did, as plain data in `counts`."""

    def __init__(self) -> None:
        self.counts: dict[str, Any] = {}

    def size(self, name: str, text: str) -> None:
        """A document that was read or written."""
        entry = self.counts.setdefault(name, {"documents": 0, "characters": 0, "bytes": 0})
        entry["documents"] += 1
        entry["characters"] += len(text)
        entry["bytes"] += len(text.encode())

    def broken(self, where: str, why: str) -> None:
        """What could not be read."""
        entry = self.counts.setdefault("broken", {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < _BROKEN:
            entry["first"].append(_shown(f"{where}: {why}"))

    def removed(self, rule: str, identity: str, text: str) -> None:
        """A document that goes."""
        self._add("removed", rule, identity, text[:_LONGEST], len(text))

    def changed(self, rule: str, identity: str, before: str, after: str, at: int, found: int = 1) -> None:
        """A document that stays, altered; the example is what it says now around `at`."""
        excerpt = after[max(0, at - _LONGEST // 2) : at + _LONGEST // 2]
        self._add("changed", rule, identity, excerpt, max(0, len(before) - len(after)), found)

    def _add(self, kind: str, rule: str, identity: str, excerpt: str, characters: int, found: int = 1) -> None:
        rules = self.counts.setdefault(kind, {})
        entry = rules.setdefault(rule, {"documents": 0, "found": 0, "characters": 0, "examples": []})
        entry["documents"] += 1
        entry["found"] += found
        entry["characters"] += characters
        if len(entry["examples"]) < _EXAMPLES:
            entry["examples"].append({"id": _shown(identity), "text": _shown(excerpt)})


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def merged(tallies: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Tallies of one source put together, in order; with each rule's share of all documents and characters read."""
    whole: dict[str, Any] = {
        name: {"documents": 0, "characters": 0, "bytes": 0} for name in ("read", "train", "held_out")
    } | {"broken": {"count": 0, "first": []}, "removed": {}, "changed": {}}
    empty = {"documents": 0, "found": 0, "characters": 0, "examples": []}
    for counts in tallies:
        for name in ("read", "train", "held_out"):
            for key, value in counts.get(name, {}).items():
                whole[name][key] += value
        broken = counts.get("broken", {"count": 0, "first": []})
        whole["broken"]["count"] += broken["count"]
        whole["broken"]["first"] = (whole["broken"]["first"] + broken["first"])[:_BROKEN]
        for kind in ("removed", "changed"):
            for rule, entry in counts.get(kind, {}).items():
                total = whole[kind].setdefault(rule, dict(empty))
                for key in ("documents", "found", "characters"):
                    total[key] += entry[key]
                total["examples"] = (total["examples"] + entry["examples"])[:_EXAMPLES]
    for kind in ("removed", "changed"):
        for entry in whole[kind].values():
            for key in ("documents", "characters"):
                entry[f"share_of_{key}"] = round(entry[key] / max(1, whole["read"][key]), 6)
        whole[kind] = dict(sorted(whole[kind].items(), key=lambda item: (-item[1]["characters"], item[0])))
    return whole


def report_table(report: dict[str, Any]) -> Table:
    """The report for the terminal."""
    run = report["run"]
    speed = f"{run['documents_per_second']:.0f} documents/s, {run['megabytes_per_second']:.2f} MB/s"
    table = Table(
        "", "documents", "share", "MB", "share", title=f"Curation: {run['seconds']:.1f} s, {speed}", expand=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, source in report["sources"].items():
        read = source["read"]
        table.add_section()
        table.add_row(f"[bold]{name}[/bold] read", f"{read['documents']:,}", "", _mega(read["characters"]), "")
        if count := source["broken"]["count"]:
            table.add_row("  broken", f"{count:,}", "", "", "")
        for kind, sign in (("removed", "-"), ("changed", "~")):
            for rule, entry in source[kind].items():
                table.add_row(f"  {sign} {rule}", *_shares(entry, read))
        for split in ("train", "held_out"):
            table.add_row(f"  = {split}", *_shares(source[split], read))
    for name, found in report["evaluations"].items():
        table.add_section()
        table.add_row(f"evaluation {name}: items seen", f"{found['seen']:,}", f"{found['share']:.1%}", "", "")
    return table


def _mega(characters: int) -> str:
    return f"{characters / 1e6:.2f}"


def _shares(entry: dict[str, Any], read: dict[str, int]) -> tuple[str, str, str, str]:
    documents, characters = (entry[key] / max(1, read[key]) for key in ("documents", "characters"))
    return f"{entry['documents']:,}", f"{documents:.1%}", _mega(entry["characters"]), f"{characters:.1%}"
