"""A directory's manifest: size and SHA-256 of every other file, written last, so that what is whole can be told from what is not.

All files are brought to the disk before the manifest is, and the manifest before anyone is told that it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemmary.checkpoints.checkpoint import read_json
from gemmary.errors import GemmaryError

__all__ = ["MANIFEST", "sealed", "to_disk", "verify_manifest", "write_manifest"]

MANIFEST = "manifest.json"
_VERSION = 1


def sealed(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest; the file is on the disk then."""
    to_disk(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def write_manifest(directory: Path, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Seal a directory as it is; `known` has the entries (`sealed`) of files that others wrote, by path."""
    digests = dict(known or {})
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in digests:
            digests[name] = sealed(path)
    for path in directory.rglob("*"):
        if path.is_dir():
            to_disk(path)
    text = json.dumps({"format": _VERSION, "files": digests}, indent=2) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    to_disk(directory / MANIFEST)
    to_disk(directory)


def verify_manifest(directory: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Every file as the manifest says, and none beside; else GemmaryError naming the first that differs.

    With a share (i, n) the bytes of every n-th file only, from the i-th on: n processes look at all.
    """
    if not (directory / MANIFEST).is_file():
        raise GemmaryError(f"{directory} has no {MANIFEST}: it was never finished, or is damaged; write it again")
    manifest = read_json(directory / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise GemmaryError(f"{directory / MANIFEST} is not a manifest; the checkpoint is damaged")
    present = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()} - {MANIFEST}
    for place, name in enumerate(sorted(present | set(files))):
        if name not in present or name not in files:
            state = "is missing from" if name in files else "was added to"
            raise GemmaryError(f"{directory}: {name} {state} the checkpoint; it is damaged, use another copy")
        path, entry = directory / name, files[name]
        if place % share[1] != share[0]:
            continue
        if path.stat().st_size != entry.get("bytes") or _sha256(path) != entry.get("sha256"):
            raise GemmaryError(
                f"{directory}: {name} differs from its SHA-256; the checkpoint is damaged, use another copy"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_disk(path: Path) -> None:
    """Return when a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
