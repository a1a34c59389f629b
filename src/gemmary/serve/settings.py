"""How a server is set up, checked once before anything is loaded."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemmary.errors import GemmaryError, check_bounds

__all__ = ["Settings", "api_keys", "bytes_of"]

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_KEY_VARIABLE = "GEMMARY_API_KEY"


@dataclass(frozen=True)
class Settings:
    """`memory` in bytes (None: what the batcher thinks right), `grace` in seconds, `name` as clients call the model, `draft` a
    smaller model that guesses.

    Raises GemmaryError for what is out of bounds, and for an address that others can reach while there is no key.
    """

    model: str
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 8
    queue: int = 128
    memory: int | None = None
    keys: tuple[str, ...] = ()
    allow_origin: str | None = None
    grace: float = 30.0
    dtype: str | None = None
    hub: bool = False
    look_up: bool = False
    draft: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self, port=(0, 65535), slots=(1, 1024), queue=(1, 1 << 20), grace=(0, 86400))
        if self.look_up and self.draft is not None:
            raise GemmaryError("--look-up and --draft are two ways to guess: give one of them")
        if not self.loopback and not self.keys:
            raise GemmaryError(
                f"{self.host} can be reached from other machines: give --api-key-file or {_KEY_VARIABLE}, or bind 127.0.0.1"
            )
        if self.allow_origin is not None and not re.fullmatch(r"https?://[\w.\-\[\]:]+", self.allow_origin, re.ASCII):
            raise GemmaryError(
                f"--allow-origin {self.allow_origin!r} is not one origin such as https://chat.example.org; '*' is never allowed"
            )
        if not self.name or not self.name.isprintable():
            raise GemmaryError("the served model's name is empty or cannot be printed: give --name")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def api_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Keys from a file, one a line (# begins a comment), and from GEMMARY_API_KEY. Raises GemmaryError for a file without any."""
    keys = environment.get(_KEY_VARIABLE, "").split()
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise GemmaryError(f"the file of API keys cannot be read: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise GemmaryError(f"{file} has no API key: write one a line")
        keys += found
    if any(not re.fullmatch(r"[!-~]+", key) for key in keys):
        raise GemmaryError("an API key is made of printable ASCII characters, without spaces")
    return tuple(dict.fromkeys(keys))


def bytes_of(text: str) -> int:
    """A size such as 8GiB, 500MB or a number of bytes. Raises GemmaryError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]i?B)?", text.strip(), re.ASCII)
    if found is None or (found[2] or "") not in _UNITS:
        raise GemmaryError(f"{text[:40]!r} is no size: write 8GiB, 500MB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2] or ""])
