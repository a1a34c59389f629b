"""The report's two runs, and larger Gemmas, compiled for the chips they would run on: docs/scale.md.

    python benchmarks/scale.py --out docs/scale.md          (libtpu: pip install 'gemmary[tpu]'; about half an hour on two cores)

Every number is `gemmary plan`'s; `benchmarks/results/scale.json` keeps them all. `--only NAME,…` plans some again and leaves the others as the file has them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemmary.hardware import PUE, parse_topology
from gemmary.model.transformer import Remat
from gemmary.plan.budget import TOKENS
from gemmary.plan.job import training_job
from gemmary.plan.planned import plan
from gemmary.presets import PRESETS

RESULTS = Path(__file__).parent / "results" / "scale.json"
REPORT_TONNES = 131


@dataclass(frozen=True)
class Run:
    """One plan of the page."""

    name: str
    preset: str
    slices: int
    data: int
    model: int
    rows: int
    length: int = 8192
    remat: Remat = "dots"
    part: str = "report"


RUNS = [
    Run("7B, the report's layout", "gemma-7b", 16, 16, 16, 512),
    Run("7B, weights gathered instead", "gemma-7b", 16, 256, 1, 4096, remat="layers"),
    Run("2B, the report's layout", "gemma-2b", 2, 256, 1, 512),
    Run("Gemma 2 9B", "gemma2-9b", 16, 256, 1, 4096, remat="layers", part="later"),
    Run("Gemma 3 27B", "gemma3-27b", 16, 256, 1, 4096, remat="layers", part="later"),
    *(Run(f"7B on {n} pods", "gemma-7b", n, 16, 16, 32 * n, part="pods") for n in (1, 4, 64)),
    Run("2B at 2k", "gemma-2b", 2, 256, 1, 2048, 2048, "layers", "context"),
    Run("2B at 8k", "gemma-2b", 2, 256, 1, 512, 8192, "layers", "context"),
    Run("2B at 32k", "gemma-2b", 2, 256, 1, 512, 32768, "layers", "context"),
    Run("2B at 128k", "gemma-2b", 2, 32, 8, 64, 131072, "layers", "context"),
]


def made(run: Run) -> dict[str, Any]:
    """A run's plan as data."""
    job = training_job(
        run.preset, PRESETS[run.preset].config, parse_topology("v5e:16x16"), slices=run.slices, data=run.data, model=run.model,
        tokens=run.rows * run.length, length=run.length, remat=run.remat,
    )  # fmt: skip
    found = plan(job, tokens=float(TOKENS[run.preset]), say=print).to_json()
    return {**found, "part": run.part, "name": run.name}


def main() -> None:
    """Plan, keep, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/scale.md"))
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    kept = {one["name"]: one for one in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    wanted = [name for name in given.only.split(";") if name]
    for run in RUNS:
        if wanted and run.name not in wanted:
            continue
        if not wanted and run.name in kept:
            continue
        started = time.perf_counter()
        kept[run.name] = made(run)
        print(f"{run.name}: {time.perf_counter() - started:.0f} s, MFU {kept[run.name]['mfu']:.1%}", flush=True)
        RESULTS.write_text(json.dumps(list(kept.values()), indent=1) + "\n")
    given.out.write_text(page([kept[run.name] for run in RUNS if run.name in kept]))


def gib(count: float) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:.2f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]])


def page(found: list[dict[str, Any]]) -> str:
    """The page."""
    parts = {part: [one for one in found if one["part"] == part] for part in ("report", "later", "pods", "context")}
    text = (Path(__file__).parent / "scale_page.md").read_text()
    first = [one for part in ("report", "later") for one in parts[part]]
    return text.format(
        runs=table(
            ["run", "chips", "mesh", "tokens a step", "made again", "GiB a chip", "a step", "MFU", "bound by"],
            [
                [
                    one["name"], str(one["chips"]), mesh(one), f"{one['tokens_per_step'] / 2**20:g}Mi", one["remat"],
                    f"{gib(one['memory']['total'])}{'' if one['fits'] else ' (does not fit)'}", f"{one['step_seconds']:.2f} s", f"{one['mfu']:.1%}", one["bound"],
                ]
                for one in first
            ],
        ),
        memory=table(
            ["run", "parameters", "optimizer", "gradients", "activations", "temporaries", "total"],
            [
                [one["name"], *(gib(one["memory"][kind]) for kind in ("parameters", "optimizer", "gradients", "activations", "temporaries", "total"))]
                for one in first
            ],
        ),
        seconds=table(
            ["run", "products", "memory", "collectives not hidden", "products beyond the model's", "TFLOP of the model, a chip"],
            [
                [
                    one["name"], f"{one['seconds']['compute']:.3f} s", f"{one['seconds']['memory']:.3f} s", f"{one['seconds']['exposed']:.3f} s",
                    f"{one['flops']['made_again'] / one['flops']['model']:.1%}", f"{one['flops']['model'] / 1e12:.1f}",
                ]
                for one in first
            ],
        ),
        traffic=traffic(parts["report"]),
        budgets=table(
            ["run", "tokens", "steps", "days", "chip-hours", "MWh", "tCO2eq"],
            [
                [
                    one["name"], f"{one['budget']['tokens'] / 1e12:g}T", f"{one['budget']['steps']:,.0f}", f"{one['budget']['days']:.1f}",
                    f"{one['budget']['chip_hours']:,.0f}", f"{one['budget']['megawatt_hours']:,.0f}", f"{one['budget']['tonnes']:,.0f}",
                ]
                for one in first
            ],
        ),
        pods=grown([parts["report"][0], *parts["pods"]], "slices", "pods") if parts["report"] else "",
        context=grown(parts["context"], "length", "tokens a row"),
        sources=sources(first),
        report_tonnes=REPORT_TONNES,
        together=f"{sum(one['budget']['tonnes'] for one in parts['report'] if 'layout' in one['name']):,.0f}",
        pue=f"{float(PUE):g}",
    )  # fmt: skip


def mesh(one: dict[str, Any]) -> str:
    """A mesh in a few words."""
    return " x ".join(f"{axis} {size}" for axis, size in one["mesh"].items() if size > 1)


def traffic(found: list[dict[str, Any]]) -> str:
    """The largest collectives of each run."""
    rows = []
    for one in found:
        for part in one["collectives"][:6]:
            rows.append(
                [
                    one["name"],
                    part["kind"],
                    part["axes"],
                    str(part["count"]),
                    gib(part["bytes"]),
                    f"{1000 * part['seconds']:.0f} ms",
                    f"{1000 * part['exposed']:.0f} ms",
                ]
            )
    return table(["run", "collective", "along", "runs", "GiB a chip", "time", "not hidden"], rows)


def grown(found: list[dict[str, Any]], key: str, what: str) -> str:
    """How a step grows with one number."""
    rows = []
    for one in sorted(found, key=lambda one: one[key]):
        between = sum(part["seconds"] for part in one["collectives"] if part["crosses_slices"])
        inside = sum(part["bytes"] for part in one["collectives"] if not part["crosses_slices"])
        rows.append(
            [
                f"{one[key]:,}", f"{one['chips']:,}", mesh(one), f"{one['tokens_per_step'] / 2**20:g}Mi", f"{gib(one['memory']['total'])}{'' if one['fits'] else ' (does not fit)'}", gib(inside),
                f"{1000 * between:.1f} ms", f"{one['step_seconds']:.2f} s", f"{one['mfu']:.1%}",
            ]
        )  # fmt: skip
    return table(
        [
            what,
            "chips",
            "mesh",
            "tokens a step",
            "GiB a chip",
            "GiB sent inside a pod",
            "between pods",
            "a step",
            "MFU",
        ],
        rows,
    )


def sources(found: list[dict[str, Any]]) -> str:
    """Where the numbers of energy are from."""
    chip = parse_topology("v5e:16x16").chip
    lines = [f"- {what}: {text}" for what, text in found[0]["budget"]["sources"].items()]
    facts = (
        ("peak", chip.flops),
        ("memory", chip.memory_rate),
        ("links", chip.link),
        ("network between pods", chip.network),
    )
    lines += [f"- {what}: {value.source}" for what, value in facts]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
