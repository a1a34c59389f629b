"""What tuning does to real weights: adapters of Gemma 3 270M on conversations, and a reward model on preferences.

    python benchmarks/sample_tuning.py --instructions FILE … --preferences FILE … [--steps 120]
        [--reward-steps 60] [--out out/sample] [--json OUT]

`runs/lora.toml` over the files (each a source, a tenth of it held out): the held-out loss before the first step and after the
last, and how many answers to held-out questions end by themselves within 96 tokens, before and after. Then a reward model, by
adapters from the same weights: its accuracy on held-out pairs with the 95 % interval. A run that is there already is read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import gemmary
from gemmary.data.conversations import Conversation
from gemmary.data.instructions import read_gathered
from gemmary.train.reward import interval

RECIPE, NEW, AT_ONCE = Path(__file__).parent.parent / "runs" / "lora.toml", 96, 8


def recipe(arguments: argparse.Namespace) -> Path:
    """`runs/lora.toml` with these files as its sources, and a reward model that learns the same way."""
    text = RECIPE.read_text()
    model, _, tuning = text.partition("[[instructions.source]]")

    def settings(steps: int) -> str:
        text = tuning[tuning.index("[sft]") :].replace("steps = 60", f"steps = {steps}")
        return text.replace("evaluate_every = 30", f"evaluate_every = {steps}")

    sources = "".join(
        f'[[{kind}.source]]\nname = "{file.name.split(".")[0]}"\npath = "{file.resolve()}"\nheld_out = 0.1\n\n'
        for kind in ("instructions", "preferences")
        for file in getattr(arguments, kind)
    )
    wide = settings(arguments.reward_steps).replace("sft", "reward").replace("length = 512", "length = 1024")
    arguments.out.mkdir(parents=True, exist_ok=True)
    written: Path = arguments.out / "recipe.toml"
    written.write_text(
        f'{model}{sources}{settings(arguments.steps)}\n{wide}\n[instructions]\npersonal = "keep"\n\n[preferences]\npersonal = "keep"\n'
    )
    return written


def stage(name: str, written: Path, out: Path) -> dict[str, Any]:
    """Run it, or find it done; its record."""
    command = [str(Path(sys.executable).with_name("gemmary")), name, str(written), "--out", str(out)]
    subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((out / name / "stage.json").read_text())
    return found


def ended(model: str, out: Path, sources: list[str], each: int) -> dict[str, Any]:
    """Of `each` held-out questions of every source: how many answers end within `NEW` tokens, and the first ones' texts."""
    gemma, done, asked, shown = gemmary.load(model), 0, 0, []
    for source in sources:
        questions = islice(read_gathered(out / "instructions", source, "held_out"), each)
        prompts = [gemma.dialogue_ids(one.prompt) for one in questions if isinstance(one, Conversation)]
        prompts = [ids for ids in prompts if len(ids) <= 400]
        for at in range(0, len(prompts), AT_ONCE):
            some = prompts[at : at + AT_ONCE]
            answers: list[list[int]] = [[] for _ in some]
            for tokens in gemma.engine.generate(some, max_new_tokens=NEW, stop_ids=gemma.tokenizer.stop_ids):
                for token in tokens:
                    answers[token.row].append(token.id)
                    done += token.finish == "stop"
            asked += len(some)
            if at == 0:
                shown += [gemma.tokenizer.decode(ids) for ids in answers[:2]]
    return {"ended": done, "asked": asked, "interval": interval(done, asked), "first": shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", type=Path, nargs="+", required=True)
    parser.add_argument("--preferences", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--reward-steps", type=int, default=60)
    parser.add_argument("--questions", type=int, default=24, help="of each source")
    parser.add_argument("--out", type=Path, default=Path("out/sample"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    written, out = recipe(arguments), arguments.out
    started = time.perf_counter()
    tuned = stage("sft", written, out)["results"]
    sources = [file.name.split(".")[0] for file in arguments.instructions]
    seconds = time.perf_counter() - started
    answers = {
        name: ended(model, out, sources, arguments.questions)
        for name, model in (("before", "sample"), ("after", str(out / "sft" / "adapter")))
    }
    pairs = stage("reward", written, out)["results"]
    found = {"steps": arguments.steps, "sft_seconds": seconds, "sft": tuned, "answers": answers, "reward": pairs}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    console = Console(width=120)
    table = Table("", "before", "after", title=f"Gemma 3 270M, {arguments.steps} steps of 2 x 512 tokens")
    for name in tuned["before"]["held_out_loss"]:
        losses = [one["held_out_loss"][name] for one in (tuned["before"], tuned)]
        table.add_row(f"held-out loss, {name}", *(f"{loss:.3f}" for loss in losses))
    table.add_row("answers that end", *(f"{one['ended']} of {one['asked']}" for one in answers.values()))
    for when, one in (("before", pairs["before"]["held_out_pairs"]), ("after", pairs["held_out_pairs"])):
        low, high = one["interval"]
        console.print(f"reward {when}: {one['accuracy']:.3f} of {one['pairs']} pairs ({low:.3f} to {high:.3f})")
    console.print(table)


if __name__ == "__main__":
    main()
