"""Curation of real text with plants, and the same bytes from one process, from Ray on two nodes, and from Slurm's tasks.

Needs `--data PATH`: a folder with `documents/books.jsonl.gz` and `documents/web.jsonl.gz` ({"id", "text"} a line), and
local copies of evaluation sets under `hub/` (MMLU, HellaSwag, GSM8K, ARC, BoolQ).
"""

from __future__ import annotations

import gzip
import json
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_curate import _digests, _settings, _texts, corpus  # noqa: F401 (a fixture is asked for by its name)

from gemmary.data.curate import curate
from gemmary.data.curation_settings import CurateSettings
from gemmary.data.decontamination import EvaluationSet
from gemmary.data.readers import open_binary
from gemmary.data.sources import Source

pytestmark = pytest.mark.release

SETS = {
    "mmlu": ("cais/mmlu", ("question", "choices")),
    "hellaswag": ("Rowan/hellaswag", ("ctx", "endings")),
    "gsm8k": ("openai/gsm8k/main", ("question", "answer")),
    "arc": ("allenai/ai2_arc/ARC-Challenge", ("question", "choices")),
}
PLANTS = 40
FEW: dict[str, Any] = {"task_bytes": 400_000, "minhash_buckets": 5, "minhash_hashes": 5}
"""Each task on Ray and Slurm is a process that imports everything: a few are enough."""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open_binary(path) as file:
        yield from map(json.loads, file)


def _questions(data: Path) -> Iterator[tuple[str, str]]:
    """(set, question) of items with at least 13 words."""
    for name, (folder, keys) in SETS.items():
        files = sorted((data / "hub" / folder).rglob("*test*.jsonl.gz")) or sorted(
            (data / "hub" / folder).rglob("*.jsonl.gz")
        )
        every = [item[keys[0]] for path in files for item in _lines(path) if len(item[keys[0]].split()) > 15]
        yield from ((name, question) for question in random.Random(name).sample(every, PLANTS // len(SETS)))


@pytest.fixture(scope="module")
def planted(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, Any]], dict[str, Any]]:
    """Real documents and plants, curated: the folder, the plants by id, the report."""
    folder = tmp_path_factory.mktemp("planted")
    books = list(_lines(data / "documents" / "books.jsonl.gz"))
    web = [d for d in _lines(data / "documents" / "web.jsonl.gz") if 200 < len(d["text"].split()) < 2000]
    r, plants = random.Random(1), {}
    for i, original in enumerate(r.sample(web, PLANTS)):
        plants[f"exact{i}"] = {"text": original["text"], "of": original["id"]}
        words = original["text"].split(" ")
        for _ in range(3):
            words[r.randrange(len(words))] = r.choice(("granite", "yesterday", "seldom"))
        plants[f"near{i}"] = {"text": " ".join(words), "of": original["id"]}
    for i, (name, question) in enumerate(_questions(data)):
        page = " ".join(r.choice(books)["text"][5000 + 900 * i :][:6000].split(" ")[1:-1])
        plants[f"leak{i}"] = {"text": f"{page[:3000]}\n{question}\n{page[3000:]}", "question": question, "set": name}
    for i in range(PLANTS):
        page = books[i]["text"][9000:13000]
        secret = r.choice(("someone{}@mail.example.org", "(415) 555-2{:03d}", "AKIA" + "IOSFODNN7EXAM{:03d}"))
        plants[f"private{i}"] = {
            "text": page.replace(". ", f". Reach {secret.format(i)} now. ", 1),
            "private": secret.format(i),
        }
        noise = "".join(r.choice("abcdefghijklmnopqrstuvwxyz      .") for _ in range(4000))
        plants[f"gibberish{i}"] = {"text": noise}
    with gzip.open(folder / "planted.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": i, "text": p["text"]}) + "\n" for i, p in plants.items())
    sets = tuple(
        EvaluationSet(name=name, path=str(data / "hub" / path), keys=keys) for name, (path, keys) in SETS.items()
    )
    names = {"books": data / "documents" / "books.jsonl.gz", "web": data / "documents" / "web.jsonl.gz"}
    sources = {**names, "planted": folder / "planted.jsonl.gz"}
    settings = CurateSettings(
        source=tuple(Source(name=n, kind="jsonl", path=str(p), held_out=0) for n, p in sources.items()), evaluation=sets
    )
    return folder / "out", plants, curate(settings, folder / "out")


def test_every_plant_is_found(planted: tuple[Path, dict[str, dict[str, Any]], dict[str, Any]]) -> None:
    folder, plants, report = planted
    kept = _texts(folder, "planted")
    originals = _texts(folder, "web")
    missed = []
    for name, plant in plants.items():
        text = kept.get(name)
        if name.startswith(("exact", "near", "gibberish")):  # an original of bad quality goes too
            found = text is None
        elif name.startswith("leak"):
            found = text is None or " ".join(plant["question"].split()) not in " ".join(text.split())
        else:
            found = text is None or plant["private"] not in text
        if not found:
            missed.append(name)
    assert not missed
    assert sum(plant.get("of") in originals for plant in plants.values()) > PLANTS
    assert report["evaluations"]["gsm8k"]["seen"] >= PLANTS // len(SETS)


def test_books_stay(planted: tuple[Path, dict[str, dict[str, Any]], dict[str, Any]]) -> None:
    books = planted[2]["sources"]["books"]
    assert books["removed"] == {}
    assert (
        books["train"]["characters"] > 0.998 * books["read"]["characters"]
    )  # spaces at ends of lines, and what MMLU quotes of Paine


@pytest.mark.filterwarnings("default")  # an error in a thread of datatrove's would leave it waiting for ever
def test_ray_on_two_nodes_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    import ray
    from ray.cluster_utils import Cluster

    curate(_settings(corpus, **FEW), tmp_path / "local")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        assert len(ray.nodes()) == 2
        curate(_settings(corpus, executor="ray", workers=2, **FEW), tmp_path / "ray")
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert _digests(tmp_path / "ray") == _digests(tmp_path / "local")


SBATCH = """#!/bin/bash
# Stands in for Slurm: runs the array's tasks here, one after the other.
for script; do :; done
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
grep -q merge_stats "$script" && { echo Submitted batch job 2; exit; }
for ((task = 0; task <= last; task++)); do
    SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here RUN_OFFSET=0 bash "$script" >> "$SBATCH_LOG" 2>&1 || exit 1
done
echo Submitted batch job 1
"""


def test_slurm_tasks_give_the_same_bytes(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in {
        "sbatch": SBATCH,
        "srun": '#!/bin/bash\nshift 3\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
    }.items():
        (commands / name).write_text(script)
        (commands / name).chmod((commands / name).stat().st_mode | stat.S_IXUSR)
    python = Path(os.sys.executable).parent
    monkeypatch.setenv("PATH", f"{commands}:{python}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "log"))
    curate(_settings(corpus, **FEW), tmp_path / "local")
    curate(_settings(corpus, executor="slurm", **FEW), tmp_path / "slurm")
    assert _digests(tmp_path / "slurm") == _digests(tmp_path / "local")
