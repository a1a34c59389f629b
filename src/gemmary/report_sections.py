"""A run's files, and what each part of its report says of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemmary.checkpoints.checkpoint import read_json
from gemmary.report_figures import curve, watched_curve
from gemmary.report_pages import Figure, Samples, Section, Table

__all__ = ["SECTIONS", "RunFiles"]

_STAGES = (
    "curate",
    "tokenizer",
    "tokens",
    "pretrain",
    "instructions",
    "dialogues",
    "sft",
    "preferences",
    "pairs",
    "reward",
    "rlhf",
    "dpo",
    "evaluate",
)
_NAMES = {"base": "base", "sft": "SFT", "rlhf": "RLHF", "dpo": "DPO"}


@dataclass
class RunFiles:
    """The files of a run."""

    folder: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _STAGES:
            if (self.folder / name / "stage.json").is_file():
                self.stages[name] = read_json(self.folder / name / "stage.json")

    def data(self, name: str) -> Any:
        """A JSON file of the run; None where there is none."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None

    def entries(self, stage: str) -> list[dict[str, Any]]:
        path = self.folder / stage / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _answers(run: RunFiles) -> Section | None:
    found = run.data("evaluate/results.json")
    if not found:
        return None
    models = found["models"]
    tables = [
        Table(f"Held-out tasks, {title}", ["task", "prompts", *(_NAMES[m] for m in models)], _answered(models, how))
        for how, title in (("greedy", "the likeliest answers"), ("sampled", "sampled answers"))
    ]
    others = [
        [
            _NAMES[m],
            f"{models[m]['greedy']['answer_tokens']:.1f}",
            _percent(models[m]["greedy"]["finished"]),
            _percent(models[m]["greedy"]["repetition"]),
        ]
        for m in models
    ]
    judged = (
        f"Code was run in a sandbox ({found['sandbox']})."
        if found["sandbox"]
        else "Code was not judged: there was no sandbox."
    )
    samples = [
        Samples(one["source"], one["prompt"], one["answer"], {_NAMES[m]: text for m, text in one["models"].items()})
        for one in found["samples"]
    ]
    return Section(
        "How it answers",
        "Answers to questions whose facts no stage of tuning was shown, right or wrong by what they end with or by tests; 95 % intervals in "
        f"brackets. The likeliest answers first, then sampled ones (temperature 1). {judged}",
        [
            *tables,
            Table("Answers", ["model", "tokens", "ended by themselves", "repeated 4-grams"], others),
        ],
        samples=samples,
    )


def _answered(models: dict[str, Any], how: str) -> list[list[str]]:
    rows = []
    for task, first in next(iter(models.values()))[how]["tasks"].items():
        cells = []
        for found in models.values():
            one = found[how]["tasks"][task]
            between = " [{:.0f}, {:.0f}]".format(*(100 * x for x in one["interval"])) if "interval" in one else ""
            cells.append(_percent(one["success"]) + between)
        rows.append(["mean of tasks" if task == "all" else task, str(first["prompts"]), *cells])
    return rows


def _curated(run: RunFiles) -> Section | None:
    found = run.data("curate/report.json")
    if not found:
        return None
    rows, removed = [], []
    for name, source in found["sources"].items():
        read, train, held_out = (source[key] for key in ("read", "train", "held_out"))
        kept = train["characters"] + held_out["characters"]
        rows.append(
            [name, f"{read['documents']:,}", f"{read['characters'] / 1e6:.2f}", f"{train['documents']:,}", f"{held_out['documents']:,}",
             _percent(kept / max(read["characters"], 1)), str(source["broken"]["count"])]
        )  # fmt: skip
        for kind in ("removed", "changed"):
            for rule, entry in source[kind].items():
                removed.append(
                    [name, f"{kind}: {rule}", f"{entry['documents']:,}", _percent(entry["share_of_characters"])]
                )
    tables = [
        Table(
            "Sources",
            ["source", "documents", "million characters", "for training", "held out", "characters kept", "broken"],
            rows,
        ),
        Table("What was filtered", ["source", "rule", "documents", "of all characters"], removed),
    ]
    if found.get("evaluations"):
        seen = [[n, f"{e['items']:,}", f"{e['seen']:,}", _percent(e["share"])] for n, e in found["evaluations"].items()]
        tables.append(Table("Evaluation sets found in the text, and cut out", ["set", "items", "seen", "share"], seen))
    return Section("Text that it was pre-trained on", "", tables)


def _pretraining(run: RunFiles) -> Section | None:
    stage = run.stages.get("pretrain")
    if not stage:
        return None
    results, xz = stage["results"], run.stages.get("tokens", {}).get("results", {}).get("sources", {})
    rows = [
        [name, f"{bits:.3f}", f"{xz[name]['xz_bits_per_byte']:.3f}" if name in xz else ""]
        for name, bits in results.get("held_out", {}).items()
    ]
    shares = [[name, _percent(share), f"{results['epochs'][name]:.2f}"] for name, share in results["shares"].items()]
    model = stage["begun_with"]["settings"]["model"]
    about = (
        f"{results['parameters']:,} parameters (Gemma {model['generation']}: {model['num_layers']} layers, width {model['embed_dim']}, "
        f"vocabulary {model['vocab_size']:,}); {results['steps']:,} steps, {results.get('tokens', 0):,} tokens."
    )
    figure = curve(run.entries("pretrain"), "held_out", "held-out bits per byte")
    return Section(
        "Pre-training", about,
        [Table("Held-out text", ["source", "bits per byte", "xz -9"], rows), Table("Mixture", ["source", "share of tokens", "times through"], shares)],
        [Figure("Loss and held-out bits per byte", figure)] if figure else [],
    )  # fmt: skip


def _taught(run: RunFiles, name: str, title: str) -> Section | None:
    found = run.data(f"{name}/report.json")
    if not found:
        return None
    rows = [
        [
            source,
            f"{c['read']:,}",
            f"{c['train']:,}",
            f"{c['held_out']:,}",
            str(c["broken"]["count"]),
            f"{sum(e['count'] for e in c['removed'].values()):,}",
        ]
        for source, c in found["sources"].items()
    ]
    gone = [
        [source, rule, f"{entry['count']:,}"]
        for source, c in found["sources"].items()
        for rule, entry in c["removed"].items()
    ]
    gone += [
        [source, "cannot be used", line] for source, c in found["sources"].items() for line in c["broken"]["first"][:3]
    ]
    return Section(
        title, "",
        [Table("Sources", ["source", "read", "for training", "held out", "broken", "filtered"], rows), Table("What was filtered", ["source", "rule", "count"], gone)],
    )  # fmt: skip


def _tuning(run: RunFiles) -> Section | None:
    stage = run.stages.get("sft")
    if not stage:
        return None
    results = stage["results"]
    before, after = results["before"].get("held_out_loss", {}), results.get("held_out_loss", {})
    rows = [[name, f"{before[name]:.3f}", f"{after[name]:.3f}"] for name in after]
    figure = curve(run.entries("sft"), "held_out_loss", "held-out loss")
    return Section(
        "Supervised fine-tuning", f"{results['learnt']:,} parameters learnt, {results['steps']:,} steps. Loss in nats for each token that the model says.",
        [Table("Held-out loss", ["source", "before", "after"], rows)], [Figure("Loss", figure)] if figure else [],
    )  # fmt: skip


def _rewarding(run: RunFiles) -> Section | None:
    stage = run.stages.get("reward")
    pairs = stage["results"].get("held_out_pairs") if stage else None
    if not stage or not pairs:
        return None
    low, high = pairs["interval"]
    titles = {
        "longer": "the better answer is longer",
        "shorter": "the better answer is shorter",
        "as_long": "both are as long",
    }
    rows = [["all", str(pairs["pairs"]), f"{_percent(pairs['accuracy'])} [{100 * low:.1f}, {100 * high:.1f}]"]]
    rows += [[titles[name], str(one["pairs"]), _percent(one["accuracy"])] for name, one in pairs["by_length"].items()]
    rows += [[f"source {name}", "", _percent(share)] for name, share in pairs["by_source"].items()]
    bins = [[_percent(b["confidence"]), str(b["pairs"]), _percent(b["accuracy"])] for b in pairs["calibration"]["bins"]]
    return Section(
        "Reward model",
        f"Bradley-Terry on pairs. Expected calibration error {100 * pairs['calibration']['error']:.1f} points on held-out pairs.",
        [
            Table("Held-out pairs", ["pairs", "count", "judged right"], rows),
            Table("Calibration", ["confidence", "pairs", "right"], bins),
        ],
    )


def _reinforcing(run: RunFiles) -> Section | None:
    stage = run.stages.get("rlhf")
    entries = [entry for entry in run.entries("rlhf") if "watched" in entry] if stage else []
    if not stage or not entries:
        return None
    rows = []
    for entry in entries:
        w = entry["watched"]
        rows.append(
            [str(entry["step"]), _percent(w["success"]), f"{w['reward']:.3f}" if w["reward"] is not None else "", f"{entry.get('kl', 0.0):.3f}",
             f"{w['answer_tokens']:.1f}", _percent(w["repetition"]), _percent(w["win_rate"])]
        )  # fmt: skip
    stopped = stage["results"].get("stop")
    said = f" Stopped: {stopped}." if stopped else " At no time did success fall while the reward rose."
    figure = watched_curve(run.entries("rlhf"))
    return Section(
        "Learning from rewards",
        "Watched on held-out prompts, answered greedily; KL is of sampled answers to the model before, in nats an answer. The parameters of the "
        f"highest success are kept.{said}",
        [
            Table(
                "On the way", ["step", "true success", "reward", "KL", "tokens", "repeated", "better than before"], rows
            )
        ],
        [Figure("Reward and true success", figure)] if figure else [],
    )


SECTIONS = (
    _answers,
    _curated,
    _pretraining,
    lambda run: _taught(run, "instructions", "Conversations that it was taught by"),
    _tuning,
    lambda run: _taught(run, "preferences", "Preferences that the reward model learnt from"),
    _rewarding,
    _reinforcing,
)
"""Each makes a section of a run, or None where the run has nothing of it."""
