"""A small run on a mesh, as one of several processes: a program of its own, for tests that compare, kill and stop them.

    python tests/process_runs.py INPUTS FOLDER [--stage sft|rlhf|…] [--devices N] [--slices N] [--data N] [--model N]
        [--coordinator HOST:PORT --process-id I --processes N] [--pause SECONDS] [--set NAME=VALUE]

It says `step N` after each step, and at the end what it came to. See `training_runs` for inputs, and why XLA has one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import training_runs
from training_runs import ONE_THREAD

LOST_AFTER = 10


def free_port() -> int:
    """One that nobody listens to."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def quiet_environment() -> dict[str, str]:
    """Of a process that has a CPU, whatever is installed."""
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


def start(inputs: Path, folder: Path, processes: int = 1, **options: Any) -> list[subprocess.Popen[str]]:
    """All processes of a run, started."""
    command = [sys.executable, __file__, str(inputs), str(folder)]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            command.append(f"--{name.replace('_', '-')}={one}")
    if processes > 1:
        command += [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"]
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    which = [["--process-id", str(i)] for i in range(processes)] if processes > 1 else [[]]
    return [subprocess.Popen([*command, *one], **pipe) for one in which]


def ended(runs: list[subprocess.Popen[str]], seconds: float = 120) -> list[tuple[int, str]]:
    """Exit code and all that it said, of each."""
    found = []
    for run in runs:
        try:
            said = run.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            for other in runs:
                other.kill()
            said = f"{run.communicate()[0]}\nhung"
        found.append((run.returncode, said))
    return found


def came_to(inputs: Path, folder: Path, processes: int = 1, **options: Any) -> str:
    """The first process's last line, all having ended well: `complete` or `stopped`, and what it came to."""
    found = ended(start(inputs, folder, processes, **options))
    assert [code for code, _ in found] == [0] * processes, found
    return found[0][1].splitlines()[-1]


def losses(folder: Path) -> list[float]:
    """Of each step."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def sum_of(state: Any, place: Any) -> str:
    """SHA-256 of a state, wherever its arrays lie, and of a place in the data. All processes call it alike."""
    import jax

    from gemmary.train.meshed import host

    digest = hashlib.sha256(json.dumps(place).encode())
    for array in jax.tree.leaves((state.params, state.opt_state, state.step, jax.random.key_data(state.rng))):
        digest.update(host(array).tobytes())
    return digest.hexdigest()


def _run(arguments: argparse.Namespace, say: Any) -> Any:
    from gemmary.train.meshed import MeshSettings

    mesh = MeshSettings(slices=arguments.slices, data=arguments.data, model=arguments.model).mesh()

    def report(entry: dict[str, Any]) -> None:
        print("step", entry["step"], flush=True)
        time.sleep(arguments.pause)

    changes = {name: json.loads(value) for name, _, value in (one.partition("=") for one in arguments.set)}
    calls: dict[str, Any] = {"report": report, "say": say, "mesh": mesh, **changes}
    if arguments.stage == "pretrain":
        from gemmary.train import pretrain as module

        module.peak_flops = lambda: 1e9  # which takes half a second of measuring
        kept: list[Any] = []
        of_run = module.run
        module.run = lambda *given, **options: (
            kept.append(of_run(*given, **options)) or kept[0]
        )  # the state is not a result
        training_runs.run(arguments.inputs, arguments.folder, **calls)
        return kept[0]
    return training_runs.tune(arguments.inputs, arguments.folder, arguments.stage, **calls)


def main() -> None:
    """Run, and print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", default="pretrain")
    for name, default in (("devices", 1), ("slices", 1), ("data", None), ("model", 1), ("process-id", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--coordinator")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    os.environ.update(ONE_THREAD)
    os.environ["XLA_FLAGS"] += (
        f" --xla_force_host_platform_device_count={arguments.devices} --xla_backend_optimization_level=1"
    )
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(arguments.inputs / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    from gemmary import processes
    from gemmary.errors import GemmaryError

    def say(line: str) -> None:
        print(line, flush=True)

    given = arguments.coordinator, arguments.process_id, arguments.processes
    try:
        with processes.joined(*given, lost_after=LOST_AFTER):
            done = _run(arguments, say)
            place = json.loads((training_runs.checkpoints_of(arguments.folder)[-1] / "state.json").read_bytes())["data"]
            print("complete" if done.complete else "stopped", sum_of(done.state, place), flush=True)
    except GemmaryError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
