"""Sources to curated documents: planned here, run by datatrove's executors, on one machine, Ray or Slurm alike.

    folder/documents/<source>/<split>/00000.jsonl.gz …    {"id", "text", "metadata"} a line; splits are train and held_out
    folder/classifiers/<name>/                            those trained here
    folder/report.json                                    written last: where it is, the run is complete
    folder/work/                                          while it runs; a run that was stopped continues from it

The output is a function of the sources and the settings: the same bytes for any number of workers, and after any number of
interruptions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from gemmary.checkpoints.checkpoint import write_whole
from gemmary.data.classifiers import Classifier, train_classifier
from gemmary.data.curation_report import merged
from gemmary.data.curation_settings import CurateSettings
from gemmary.data.curation_steps import PARTITIONS, Decide, Filter, Recur, Write, read_lines
from gemmary.data.decontamination import EvaluationIndex
from gemmary.data.executors import Phase, Progress, bucket_step, run_phases, workers
from gemmary.data.readers import needed
from gemmary.data.sources import Shard, shards
from gemmary.errors import GemmaryError

__all__ = ["curate", "read_documents"]

_FORMAT = 1
_SMALLEST, _LARGEST, _PARTS = 1 << 21, 1 << 27, 256
_DISK = 1.5  # bytes of disk for each byte of text, at most: what passed, what is compared, what is written


def curate(
    settings: CurateSettings, folder: Path, *, on_progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Curate into this folder; the report, as plain data. `on_progress(done, total)` counts tasks, from another thread.

    A folder that a run with these settings was stopped in is continued; one that has its result gives its report.
    """
    folder = Path(folder).expanduser().absolute()
    work = folder / "work"
    with needed("datatrove and scikit-learn"):
        import datatrove  # noqa: F401
        import scipy.sparse  # noqa: F401
    started = time.perf_counter()
    states = _states(settings)
    cache = work / "datasets" / states[:16]
    planned = _planned(settings, cache)
    digest = hashlib.sha256(json.dumps([_FORMAT, states, settings.decisive()], sort_keys=True).encode()).hexdigest()
    if (done := _finished(folder, digest)) is not None:
        return done
    if not _prepare(settings, planned, folder, digest):
        seconds = _phases(settings, planned, cache, work, on_progress)
        report = _report(settings, planned, work, digest)
        took = time.perf_counter() - started
        read = [source["read"] for source in report["sources"].values()]
        report["run"] = {
            "seconds": round(took, 3), "phases": seconds, "workers": workers(settings), "executor": settings.executor,
            "documents_per_second": round(sum(r["documents"] for r in read) / took, 1),
            "megabytes_per_second": round(sum(r["bytes"] for r in read) / 1e6 / took, 3),
        }  # fmt: skip
        write_whole(work / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    for name in ("documents", "classifiers"):
        if (work / name).exists():
            (work / name).replace(folder / name)
    (work / "report.json").replace(folder / "report.json")
    shutil.rmtree(work)
    plain: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return plain


def read_documents(folder: Path, source: str, split: str) -> Iterator[dict[str, Any]]:
    """The documents of one source and split ("train" or "held_out"), in order."""
    below = Path(folder) / "documents" / source
    if not below.is_dir():
        raise GemmaryError(f"{folder} has no curated source {source!r}: curate into it first")
    for path in sorted((below / split).glob("*.jsonl.gz")):
        yield from read_lines(path)


def _planned(settings: CurateSettings, cache: Path) -> tuple[Shard, ...]:
    """All shards, in the order of sources: the order of the corpus."""
    size = settings.task_bytes
    if not size:
        whole = sum(shard.bytes for source in settings.source for shard in shards(source, 1 << 60, cache))
        size = min(_LARGEST, max(_SMALLEST, whole // _PARTS))
    return tuple(shard for source in settings.source for shard in shards(source, size, cache))


def _states(settings: CurateSettings) -> str:
    """A digest of the sizes and times of all files that are read, and of the Python whose library may be."""
    paths = {source.path for source in settings.source} | {wanted.path for wanted in settings.evaluation}
    paths |= {path for wanted in settings.classifier for path in (wanted.path, wanted.keep, wanted.remove)}
    states: list[object] = [sys.version]
    for given in sorted(filter(None, paths)):
        path = Path(given).expanduser()
        files = (
            [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else sorted(map(Path, glob(given)))
        )
        states += [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def _finished(folder: Path, digest: str) -> dict[str, Any] | None:
    path = folder / "report.json"
    if not path.exists():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = report["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise GemmaryError(f"{path} is there and is not a report of curation: give another folder") from None
    if found != digest:
        raise GemmaryError(
            f"{folder} has documents of other settings or sources: give another folder, or delete this one"
        )
    return report


def _prepare(settings: CurateSettings, planned: tuple[Shard, ...], folder: Path, digest: str) -> bool:
    """Room on the disk, a work folder of this plan, the classifiers and the index; whether all but moving is done."""
    work = folder / "work"
    try:
        ours = (work / "plan").exists() and (work / "plan").read_text() == digest
        if ours and (work / "report.json").exists():
            return True
        if (folder / "documents").exists():
            raise GemmaryError(f"{folder} has documents and no report: give another folder, or delete this one")
        if not ours:
            _clear(work)
            write_whole(work / "plan", digest.encode())
        size = int(sum(shard.bytes for shard in planned) * _DISK)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise GemmaryError(f"cannot write to {folder}: {error.strerror}") from None
    if size > free:
        raise GemmaryError(
            f"{folder} has {free / 1e9:.1f} GB free, and curating these sources may take {size / 1e9:.1f} GB"
        )
    for wanted in settings.classifier:
        place = work / "classifiers" / wanted.name
        if not (place / "classifier.json").exists():
            trained = Classifier.load(Path(wanted.path)) if wanted.path else train_classifier(wanted)
            trained.save(place)
    if settings.evaluation and not (work / "evaluation.npz").exists():
        aside = work / ".evaluation.npz"
        EvaluationIndex(settings.evaluation, settings.evaluation_words).save(aside)
        aside.replace(work / "evaluation.npz")
    return False


def _clear(work: Path) -> None:
    """Remove what another plan left, but for what `datasets` just made."""
    left = [path for path in work.glob("*") if path.name != "datasets"]
    if left and not (work / "plan").is_file():
        raise GemmaryError(f"{work} is not of curation: give another folder, or move it away")
    for path in sorted(left, key=lambda path: path.name == "plan"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _phases(
    settings: CurateSettings, planned: tuple[Shard, ...], cache: Path, work: Path, on_progress: Progress
) -> dict[str, float]:
    """Run what has not run; the seconds of each phase."""
    given = (settings, planned, str(work), str(cache))
    tasks = len(planned)
    phases: list[Phase] = [Phase("filter", Filter(*given), tasks)]
    if settings.near_duplicates:
        phases.append(Phase("buckets", bucket_step(settings, work), settings.minhash_buckets))
    phases.append(Phase("decide", Decide(*given), 1))
    if settings.max_recurrence:
        phases.append(Phase("recur", Recur(*given), PARTITIONS))
    phases.append(Phase("write", Write(*given), tasks))
    return run_phases(phases, settings, work / "logs", on_progress)


def _report(settings: CurateSettings, planned: tuple[Shard, ...], work: Path, digest: str) -> dict[str, Any]:
    """All tallies in one."""
    tallies: dict[str, list[dict[str, Any]]] = {source.name: [] for source in settings.source}
    seen: set[int] = set()
    for i, shard in enumerate(planned):
        for step in ("filter", "write"):
            counts = json.loads((work / "tallies" / f"{step}-{i:05d}.json").read_text(encoding="utf-8"))
            tallies[shard.source.name].append(counts)
            seen.update(counts.get("items", ()))
    sources = {name: merged(counts) for name, counts in tallies.items()}
    for name, source in sources.items():
        if not source["read"]["documents"]:
            first = "; ".join(source["broken"]["first"])
            raise GemmaryError(f"source {name} has no document that can be read. First problems: {first or 'none'}")
    evaluations = {}
    if settings.evaluation:
        index = EvaluationIndex.load(work / "evaluation.npz")
        of = Counter(index.names)
        hits = Counter(index.names[item] for item in seen)
        for name, items in of.items():
            share = round(hits[name] / items, 6)
            evaluations[name] = {"items": items, "too_short": index.too_short[name], "seen": hits[name], "share": share}
    classifiers = {
        wanted.name: Classifier.load(work / "classifiers" / wanted.name).about | {"threshold": wanted.threshold}
        for wanted in settings.classifier
    }
    return {
        "format": _FORMAT, "digest": digest, "settings": settings.decisive(), "sources": sources,
        "evaluations": evaluations, "classifiers": classifiers,
    }  # fmt: skip
