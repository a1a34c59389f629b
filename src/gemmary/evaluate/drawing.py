"""Figures for reports, as SVG with their letters as text, and the same bytes from run to run."""

from __future__ import annotations

import io
import re
from typing import Any

__all__ = ["figure", "svg"]


def figure(height: float = 3.6) -> tuple[Any, Any]:
    """A figure as wide as a report's text, and its axes. `height` in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(7.6, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots()
    axes.spines["top"].set_visible(False)
    return made, axes


def svg(made: Any) -> str:
    """The drawing alone: without the XML head, and without ids or dates that differ from run to run."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gemmary"}):
        made.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"<metadata>.*?</metadata>", "", out.getvalue()[out.getvalue().index("<svg") :], flags=re.DOTALL)
