"""A small mirror of data sets as the hub has them, with a few made-up rows each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["mirror", "write_data_set"]

_WORDS = [
    "red",
    "green",
    "blue",
    "round",
    "square",
    "heavy",
    "light",
    "warm",
    "cold",
    "early",
    "late",
    "open",
    "shut",
    "near",
    "far",
]


def write_data_set(folder: Path, name: str, configs: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """DIR/<org>/<name>/README.md with `configs:`, and the rows of each split as JSON lines."""
    where = folder / name
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            path = where / "data" / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            lines += [f"  - split: {split}", f"    path: data/{config}/{split}.jsonl"]
    (where / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def mirror(folder: Path) -> Path:
    """Questions of several kinds: choices, short answers, programs, pairs of sentences, and texts with scores."""
    piqa = [
        {"goal": f"to make it {word}", "sol1": f"paint it {word}", "sol2": "wait", "label": i % 2}
        for i, word in enumerate(_WORDS)
    ]
    write_data_set(folder, "baber/piqa", {"default": {"train": piqa[:3], "validation": piqa, "test": piqa}})
    nq = [{"question": f"which one is {word}", "answer": [f"the {word} one"]} for word in _WORDS]
    write_data_set(folder, "google-research-datasets/nq_open", {"nq_open": {"train": nq[:4], "validation": nq}})
    humaneval = [
        {
            "task_id": f"Test/{i}", "prompt": f'def plus{i}(n):\n    """n and {i}."""\n', "entry_point": f"plus{i}",
            "canonical_solution": f"    return n + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(2) == {2 + i}\n    assert candidate(-1) == {i - 1}\n",
        }
        for i in range(3)
    ]  # fmt: skip
    write_data_set(folder, "openai/openai_humaneval", {"openai_humaneval": {"test": humaneval}})
    gsm8k = [{"question": f"{i} and {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in range(8)]
    write_data_set(folder, "openai/gsm8k", {"main": {"train": gsm8k, "test": gsm8k[:3]}})
    write_data_set(folder, "allenai/real-toxicity-prompts", {"default": {"train": toxic_texts()}})
    write_data_set(folder, "AmazonScience/bold", {"default": {"train": bold()}})
    wino = {f"type{kind}_{side}": {"test": winobias(side)} for kind in (1, 2) for side in ("pro", "anti")}
    write_data_set(folder, "uclanlp/wino_bias", wino)
    return folder


def toxic_texts() -> list[dict[str, Any]]:
    """Half of them rude, as their scores say."""
    rows = []
    for i in range(60):
        rude = i % 2 == 0
        said = f"you {'filthy stupid idiot' if rude else 'kind and clever friend'} of number {i}"
        part = {"text": said, "toxicity": 0.9 if rude else 0.05}
        rows.append(
            {"filename": f"{i}", "begin": 0, "end": 1, "challenging": False, "prompt": part, "continuation": part}
        )
    return rows


def bold() -> list[dict[str, Any]]:
    """Two entries, of two prompts and of one."""
    return [
        {
            "domain": "profession",
            "name": "a",
            "category": "c",
            "prompts": ["A baker is", "A cook is"],
            "wikipedia": ["", ""],
        },
        {"domain": "profession", "name": "b", "category": "c", "prompts": ["A nurse is"], "wikipedia": [""]},
    ]


def winobias(side: str) -> list[dict[str, Any]]:
    """One sentence, its mentions by the places of their words; and one whose occupations cannot be told."""
    pronoun = "he" if side == "pro" else "she"
    tokens = f"The developer argued with the designer because {pronoun} did not like it .".split()
    other = f"The developer said that {pronoun} was late .".split()
    return [
        {"document_id": "1", "tokens": tokens, "coreference_clusters": ["0", "1", "7", "7"]},
        {"document_id": "2", "tokens": other, "coreference_clusters": ["0", "1", "4", "4"]},
    ]
