"""The data sets that lm-eval's tasks read, from a folder that mirrors the hub's: DIR/<org>/<name>/README.md, with `configs:` in its front matter."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemmary.errors import GemmaryError
from gemmary.evaluate.kept import content_of

__all__ = ["Unavailable", "mirrored", "quiet"]


class Unavailable(GemmaryError):
    """A task cannot be run here: its data, a package or a sandbox is not there."""


@contextmanager
def mirrored(folder: Path | None, cache: Path) -> Iterator[None]:
    """Within it `datasets.load_dataset` reads from the folder, and from nowhere else; what it makes of a data set is kept in `cache` by content.

    Without a folder it finds what it always finds. Loading raises Unavailable for a data set that is not there.
    """
    import datasets

    plain: Callable[..., Any] = datasets.load_dataset
    digests: dict[Path, str] = {}

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        if folder is None:
            return _loaded(plain, path, name, options)
        where = folder / path
        if not (where / "README.md").is_file():
            raise Unavailable(f"{where} is not there")
        # The library tells versions of a local folder apart by its README: edited data would be read as they were.
        if where not in digests:
            digests[where] = content_of(where)
        options = {key: value for key, value in options.items() if key not in ("trust_remote_code", "revision")}
        return _loaded(plain, str(where), name, options | {"cache_dir": str(cache / digests[where][:32])})

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = plain


def _loaded(plain: Callable[..., Any], path: str, name: str | None, options: dict[str, Any]) -> Any:
    try:
        return plain(path, name, **options)
    except OSError as error:  # not there, or no network: the library's own are of this kind
        raise Unavailable(f"{path} cannot be had: {error}") from None
    except ValueError as error:  # there is no such configuration
        raise Unavailable(f"{path}{f', {name}' if name else ''}: {error}") from None


@contextmanager
def quiet(*, network: bool) -> Iterator[None]:
    """lm-eval and what it brings say nothing but errors, draw no bars of their own, and without `network` keep to this machine.

    To be entered before they are imported.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    if not network:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
            os.environ[name] = "1"  # else a data set that is not there is looked for for half a minute
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("lm_eval", "lm-eval", "datasets"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
