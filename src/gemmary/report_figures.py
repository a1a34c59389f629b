"""Curves of a report."""

from __future__ import annotations

import math
from typing import Any

from gemmary.evaluate.drawing import figure, svg

__all__ = ["curve", "watched_curve"]


def curve(entries: list[dict[str, Any]], held_out: str, label: str) -> str:
    """Training loss and held-out figures (a dict by name, or one with `all`) over steps; empty where there is nothing to draw."""
    losses = [(entry["step"], entry["loss"]) for entry in entries if math.isfinite(entry.get("loss", math.nan))]
    points: dict[str, list[tuple[int, float]]] = {}
    for entry in entries:
        for name, value in entry.get(held_out, {}).items():
            points.setdefault(name, []).append((entry["step"], value))
    if not losses:
        return ""
    made, left = figure()
    left.plot(*zip(*losses, strict=True), color="0.6", linewidth=1, label="training loss")
    left.set(xlabel="steps", ylabel="training loss, nats a token")
    left.set_ylim(0, 2.2 * sorted(loss for _, loss in losses)[len(losses) // 2])
    right = left.twinx()
    right.spines["top"].set_visible(False)
    for name, some in points.items():
        right.plot(
            *zip(*some, strict=True), marker="o", markersize=3, linewidth=2.2 if name == "all" else 1.2, label=name
        )
    right.set_ylabel(label)
    right.set_ylim(bottom=0)
    if points:
        right.legend(loc="upper right", frameon=False, ncols=2, fontsize=8)
    return svg(made)


def watched_curve(entries: list[dict[str, Any]]) -> str:
    """Reward and true success on held-out prompts over steps: where one rises and the other falls, the reward is gamed."""
    watched = [(entry["step"], entry["watched"]) for entry in entries if "watched" in entry]
    reward = [(step, found["reward"]) for step, found in watched if found["reward"] is not None]
    success = [(step, found["success"]) for step, found in watched if found["success"] is not None]
    kl = [(entry["step"], entry["kl"]) for entry in entries if "kl" in entry]
    if not reward:
        return ""
    made, left = figure()
    left.plot(*zip(*reward, strict=True), color="tab:blue", marker="o", markersize=3, label="reward")
    if kl:
        left.plot(*zip(*kl, strict=True), color="0.6", linewidth=1, label="KL, nats an answer")
    left.set(xlabel="steps", ylabel="reward; KL")
    right = left.twinx()
    right.spines["top"].set_visible(False)
    if success:
        right.plot(*zip(*success, strict=True), color="tab:orange", marker="o", markersize=3, label="true success")
    right.set_ylabel("true success")
    right.set_ylim(0, 1)
    lines = [*left.get_lines(), *right.get_lines()]
    left.legend(lines, [str(line.get_label()) for line in lines], loc="lower right", frameon=False, fontsize=8)
    return svg(made)
