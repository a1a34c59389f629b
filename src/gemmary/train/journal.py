"""What a run writes down as it goes: a line of JSON each time, TensorBoard where asked for, a curve as a picture."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemmary.checkpoints.checkpoint import write_whole
from gemmary.errors import GemmaryError

__all__ = ["Journal", "draw_curve", "read_entries"]

_LINES, _CURVE = "metrics.jsonl", "curve.png"


class Journal:
    """The record of one run in its folder. Going on from a step forgets what was written of later ones.

    A disk that takes no lines ends no run: `say` is told, and they are written when it takes them again. One that is not `kept`
    (of many processes' all but one) writes nothing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = False,
        say: Callable[[str], None] = lambda line: None,
        kept: bool = True,
    ) -> None:
        self._folder, self._say, self._kept = folder, say, kept
        self._behind = False
        self.entries: list[dict[str, Any]] = read_entries(folder / _LINES)
        self._board: Any = _board(folder / "tensorboard") if tensorboard and kept else None

    def go_on_from(self, step: int) -> None:
        """Keep only what was written up to this step."""
        self.entries = [entry for entry in self.entries if entry["step"] <= step]
        with self._on_disk():
            self._rewrite()

    def write(self, entry: dict[str, Any]) -> None:
        """Add an entry, which has a `step`; nested numbers go to TensorBoard as `name/part`."""
        self.entries.append(entry)
        with self._on_disk():
            if self._behind:
                self._rewrite()
            elif self._kept:
                with (self._folder / _LINES).open("a", encoding="utf-8") as out:
                    out.write(_line(entry))
        if self._board is not None:
            for name, value in entry.items():
                for part, number in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(number, int | float) and name != "step":
                        self._board.add_scalar(f"{name}/{part}" if part else name, number, entry["step"])

    def close(self) -> None:
        """Draw the curve, and let go of TensorBoard's file."""
        if self._board is not None:
            self._board.close()
        with self._on_disk():
            if self._behind:
                self._rewrite()
            if self._kept:
                draw_curve(self.entries, self._folder / _CURVE)

    def _rewrite(self) -> None:
        if not self._kept:
            return
        write_whole(self._folder / _LINES, "".join(_line(entry) for entry in self.entries).encode())

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
            self._behind = False
        except OSError as error:
            if not self._behind:
                self._say(f"{self._folder} takes no more lines for now: {error.strerror}")
            self._behind = True


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries so far; a last line that was cut off is not one, nor is a damaged one."""
    entries = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def _board(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise GemmaryError("TensorBoard's writer is not installed: pip install 'gemmary[tensorboard]'") from None
    return SummaryWriter(str(folder))


def draw_curve(entries: list[dict[str, Any]], path: Path) -> None:
    """Training loss and held-out bits per byte over tokens, as a PNG; nothing where there is nothing to draw yet."""
    losses = [(entry["tokens"], entry["loss"]) for entry in entries if math.isfinite(entry.get("loss", math.nan))]
    held_out = [(entry["tokens"], entry["held_out"]) for entry in entries if "held_out" in entry]
    if not losses:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.subplots()
    left.plot(*zip(*losses, strict=True), color="0.55", linewidth=1, label="training loss")
    left.set_xlabel("tokens")
    left.set_ylabel("training loss, nats per token")
    ordered = sorted(loss for _, loss in losses)
    if ordered[0] > 0:  # a policy's loss has either sign
        left.set_ylim(0, min(ordered[-1], 2.2 * ordered[len(ordered) // 2]))
    if held_out:
        right = left.twinx()
        for name in sorted({name for _, values in held_out for name in values}):
            points = [(tokens, values[name]) for tokens, values in held_out if name in values]
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"held-out {name}")
        right.set_ylabel("held-out bits per byte")
        right.set_ylim(bottom=0)
        right.legend(loc="lower right", frameon=False)  # where no curve goes: both axes begin at 0
    left.legend(loc="lower left", frameon=False)
    left.spines["top"].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())
