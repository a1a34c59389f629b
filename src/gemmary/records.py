"""Stages in folders, each with a `stage.json` of what went in and what came out: what is unchanged is not done again.

Of several processes (see `processes`) the first prepares what is learnt from, and the others wait; the folder is one that all
of them see. Stages that learn are run by all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemmary import processes
from gemmary.checkpoints.checkpoint import read_json, write_whole
from gemmary.recipe import Recipe
from gemmary.train.loop import Report

__all__ = ["Records", "write_record"]

_RECORD = "stage.json"


@dataclass(frozen=True)
class Records:
    """A recipe being lived in `folder`. `say` is told what people should know, `progress` (done, total) of counted work."""

    recipe: Recipe
    folder: Path
    say: Callable[[str], None] = lambda line: None
    progress: Callable[[int, int], None] = lambda done, total: None
    report: Report = lambda entry: None
    _lived: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        work: Callable[[Path], dict[str, Any]],
        *,
        keep: bool = False,
        always: bool = False,
    ) -> dict[str, Any]:
        """The stage's record: the one there is, or that of doing the work now.

        `always` asks the work itself whether there is anything to do; `keep` leaves to it what was begun with other settings, as
        stages that learn do. The work of others is the first process's alone.
        A stage that others build on is looked at once.
        """
        if name not in self._lived:
            begun_with = _plain({"settings": settings, "inputs": inputs})
            if keep:
                self._lived[name] = self._learnt_stage(name, begun_with, work)
            else:
                self._lived[name] = processes.from_first(name, lambda: self._stage(name, begun_with, work, always))
        return self._lived[name]

    def _learnt_stage(self, name: str, begun_with: Any, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """By all processes; the first has the record."""
        folder = self.folder / name
        old: dict[str, Any] = processes.from_first(name, lambda: self._recorded(folder))
        if old.get("begun_with") == begun_with and old["results"].get("complete", True):
            self.say(f"{name}: unchanged")
            return old
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        self.say(f"{name}: {folder}")
        results = work(folder)
        new: dict[str, Any] = processes.from_first(
            name, lambda: self._written(name, begun_with, old, results, time.perf_counter() - started)
        )
        return new

    def _stage(
        self, name: str, begun_with: Any, work: Callable[[Path], dict[str, Any]], always: bool
    ) -> dict[str, Any]:
        folder = self.folder / name
        record = self._recorded(folder)
        same = record.get("begun_with") == begun_with
        if same and not always and record["results"].get("complete", True):
            self.say(f"{name}: unchanged")
            return record
        if folder.exists() and not (always and (same or not record)):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        self.say(f"{name}: {folder}")
        results = work(folder)
        return self._written(name, begun_with, record, results, time.perf_counter() - started)

    def _recorded(self, folder: Path) -> dict[str, Any]:
        path = folder / _RECORD
        return read_json(path) if path.is_file() else {}

    def _written(
        self, name: str, begun_with: Any, old: dict[str, Any], results: dict[str, Any], seconds: float
    ) -> dict[str, Any]:
        """The new record, or the old one where nothing came of it that was not there."""
        digest = hashlib.sha256(json.dumps([begun_with, _lasting(results)], sort_keys=True).encode()).hexdigest()
        if old.get("begun_with") == begun_with and old["digest"] == digest:
            self.say(f"{name}: unchanged")
            return old
        new = {"stage": name, "digest": digest, "begun_with": begun_with, "results": results}
        new["seconds"] = round(seconds, 1)
        write_record(self.folder / name / _RECORD, new)
        return new


def _plain(data: Any) -> Any:
    """As it is after a file."""
    return json.loads(json.dumps(data))


def _lasting(results: dict[str, Any]) -> dict[str, Any]:
    """Results without what differs from run to run."""
    return {
        k: v for k, v in results.items() if k not in ("tokens_per_second", "mfu", "eta_seconds", "seconds", "goodput")
    }


def write_record(path: Path, data: Any) -> None:
    """Plain data as a file, whole."""
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())
