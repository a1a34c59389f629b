"""A small training run as a program of its own, for tests that kill, fill and stop it; and what a run came to.

    python tests/training_runs.py INPUTS FOLDER [--stage sft|reward|rlhf] [--core N] [--kind muon] [--save-every N] [--pause SECONDS]

It says `step N` after each step, pauses, and at the end says what it came to. XLA's CPU backend promises the same bits only
with one thread (https://github.com/jax-ml/jax/issues/39741), so the program takes one core and tells XLA so. What it
compiles is kept in INPUTS, so that starting again is quick.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

STEPS, TUNED, SAVE_EVERY = 40, 16, 3
ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "NPROC": "1", "JAX_PLATFORMS": "cpu"}


def one_core(number: int) -> None:
    """Before JAX is imported: this process runs on one core, and XLA makes one thread."""
    os.environ.update(ONE_THREAD)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def make_inputs(folder: Path) -> Path:
    """A tokenizer of 600 pieces, and a module of Python's as its tokens."""
    from gemmary.data.tokens import write_tokens
    from gemmary.text.training import TokenizerSettings, train_tokenizer

    texts = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (argparse, textwrap)]
    tokenizer = train_tokenizer(texts, TokenizerSettings(vocab_size=600, threads=1))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer.to_sentencepiece())
    for name, text in zip(("long", "short"), texts, strict=True):
        write_tokens(folder / name, text.split("\n\n"), tokenizer, threads=1)
    _write_lessons(folder, tokenizer)
    return folder


def _write_lessons(folder: Path, tokenizer: Any) -> None:
    """Conversations and pairs, the first eight of each held out."""
    from gemmary.data.lessons import lessons
    from gemmary.data.tokens import write_dialogues
    from gemmary.text.dialogue import encode_dialogue

    taught = [*lessons("refusal", 48, 0)]
    for name, answers in {
        "chosen": [one.answer for one in taught], "rejected": [one.wrong[0] for one in taught]
    }.items():  # fmt: skip
        turns = [
            [{"role": "user", "content": one.question}, {"role": "model", "content": answer}]
            for one, answer in zip(taught, answers, strict=True)
        ]
        ids = [encode_dialogue(tokenizer, one, generation=1, open_turn=False) for one in turns]
        write_dialogues(folder / f"{name}_held_out", ids[:8], tokenizer)
        write_dialogues(folder / name, ids[8:], tokenizer)


def run(inputs: Path, folder: Path, **changes: Any) -> Any:
    """The run, from its newest checkpoint on; what `pretrain` gives. `changes` are of its settings."""
    from gemmary.data.mixture import MixtureSettings, Stage
    from gemmary.data.tokens import Tokens
    from gemmary.presets import nano
    from gemmary.text import Tokenizer
    from gemmary.train.optimizer import OptimizerSettings
    from gemmary.train.pretrain import PretrainSettings, pretrain

    calls = {name: changes.pop(name) for name in ("say", "report", "hooks", "mesh") if name in changes}
    settings: dict[str, Any] = {"steps": STEPS, "save_every": SAVE_EVERY, "length": 32, "batch": 2, "log_every": 1}
    settings["optimizer"] = OptimizerSettings(kind=changes.pop("kind", "muon"))
    tokenizer = Tokenizer.from_sentencepiece(inputs / "tokenizer.model")
    config = nano(1, tokenizer.size).replace(num_layers=2, embed_dim=32, ffw_dim=64, head_dim=16, context=32)
    return pretrain(
        PretrainSettings(**{**settings, **changes}), config, tokenizer,
        MixtureSettings(stage=(Stage(weights={"long": 0.7, "short": 0.3}),)),
        {name: Tokens(inputs / name) for name in ("long", "short")}, {}, folder, **calls,
    )  # fmt: skip


def tune(inputs: Path, folder: Path, stage: str, **changes: Any) -> Any:
    """A run of tuning from random weights, or on from its newest checkpoint; what `run` gives. `changes` are of its settings."""
    import jax

    from gemmary.data.lessons import lessons
    from gemmary.data.tokens import Tokens
    from gemmary.params import init, unstack
    from gemmary.presets import nano
    from gemmary.text import Tokenizer
    from gemmary.text.dialogue import encode_dialogue
    from gemmary.train import reward, rlhf, sft
    from gemmary.train.finetune import TuneSettings
    from gemmary.train.rewards import exact_answer
    from gemmary.train.rollouts import Prompt

    tokenizer = Tokenizer.from_sentencepiece(inputs / "tokenizer.model")
    config = nano(1, tokenizer.size).replace(num_layers=2, embed_dim=32, ffw_dim=64, head_dim=16, context=256)
    params = unstack(init(config, jax.random.key(0)))
    calls: dict[str, Any] = {name: changes.pop(name) for name in ("say", "report", "mesh") if name in changes}
    shared: dict[str, Any] = {
        "steps": TUNED, "save_every": SAVE_EVERY, "log_every": 1, "length": 256, "batch": 2, "evaluate_every": 4, **changes
    }  # fmt: skip
    tokens = {name: Tokens(inputs / name) for name in ("chosen", "rejected", "chosen_held_out", "rejected_held_out")}
    given = (config, params, tokenizer)
    calls |= {"weights": {"lessons": 1.0}}
    if stage == "sft":
        data = ({"lessons": tokens["chosen"]}, {"lessons": tokens["chosen_held_out"]})
        return sft.sft(TuneSettings(**shared), *given, *data, folder, **calls)
    if stage == "reward":
        train, held_out = (
            {"lessons": reward.Pairs(tokens[f"chosen{end}"], tokens[f"rejected{end}"])} for end in ("", "_held_out")
        )
        return reward.reward(TuneSettings(**shared), *given, train, held_out, folder, **calls)
    asked = []
    for one in lessons("refusal", 24, 0):
        message = {"role": "user", "content": one.question}
        ids = encode_dialogue(tokenizer, [message], generation=1, open_turn=True).ids
        asked.append(Prompt(tuple(ids), one.question, one.ends))

    def long(rollouts: Any) -> list[float]:
        return [len(set(one.ids)) / 8 for one in rollouts]

    settings = rlhf.RlhfSettings(**shared, prompts=2, answers=2, max_new_tokens=8, watched=4)
    return rlhf.rlhf(
        settings, *given, {"lessons": asked[4:]}, asked[:4], long, exact_answer, folder, digest="lessons", **calls
    )


def checkpoints_of(folder: Path) -> list[Path]:
    """The run's checkpoints by name, whole or damaged, the oldest first."""
    return sorted((folder / "checkpoints").glob("step_*"))


def came_to(folder: Path) -> str:
    """SHA-256 of all that the newest checkpoint holds: params, optimizer, key, step and place in the data."""
    import safetensors.numpy

    from gemmary.checkpoints.manifest import verify_manifest
    from gemmary.checkpoints.native import open_native
    from gemmary.params import layered_names

    path = checkpoints_of(folder)[-1]
    verify_manifest(path)
    digest = hashlib.sha256()
    with open_native(path / "model") as checkpoint:
        for name, layer in layered_names(checkpoint.config):
            digest.update(f"{name} {layer}".encode() + checkpoint.weight(name, layer).tobytes())
    for name, array in sorted(safetensors.numpy.load_file(path / "optimizer.safetensors").items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    digest.update(json.dumps([state[name] for name in ("step", "rng", "data")]).encode())
    for best in sorted((folder / "best").glob("step_*")):
        digest.update((best / "best.json").read_bytes())
        with open_native(best / "model") as checkpoint:
            for name, layer in layered_names(checkpoint.config):
                digest.update(checkpoint.weight(name, layer).tobytes())
    return digest.hexdigest()


def start(inputs: Path, folder: Path, **options: Any) -> subprocess.Popen[str]:
    """The program, started."""
    command = [sys.executable, __file__, str(inputs), str(folder)]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(process: subprocess.Popen[str], word: str) -> str:
    """All that the program says up to the first line with that word, or to its end."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith(word):
            break
    return said


def finished(process: subprocess.Popen[str], said: str = "") -> str:
    """The last line of a program that ended well, `said` being what was read of it: `complete` or `stopped`, and what it came to."""
    said += until(process, "never")
    process.stdout.close()  # type: ignore[union-attr]
    assert process.wait() == 0, said
    return said.splitlines()[-1]


def main() -> None:
    """Run, and print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", default="pretrain")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--kind", default="muon")
    parser.add_argument("--save-every", type=int, default=SAVE_EVERY)
    parser.add_argument("--pause", type=float, default=0.0)
    arguments = parser.parse_args()
    one_core(arguments.core)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(arguments.inputs / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    from gemmary.train import pretrain as module

    module.peak_flops = lambda: 1e9  # which takes half a second of measuring

    def report(entry: dict[str, Any]) -> None:
        print("step", entry["step"], flush=True)
        time.sleep(arguments.pause)

    calls: dict[str, Any] = {"report": report, "say": lambda line: print(line, flush=True)}
    if arguments.stage == "pretrain":
        kinds = {"kind": arguments.kind, "save_every": arguments.save_every}
        ended = run(arguments.inputs, arguments.folder, **kinds, **calls)
    else:
        ended = tune(arguments.inputs, arguments.folder, arguments.stage, **calls)
    print("complete" if ended.complete else "stopped", came_to(arguments.folder), flush=True)


if __name__ == "__main__":
    main()
