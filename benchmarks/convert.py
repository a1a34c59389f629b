"""A random 2B model through hf -> gguf -> native -> hf: peak memory of each step, time, and whether every bit came back.

    python benchmarks/convert.py [--preset gemma-2b] [--directory DIR] [--json OUT]

Each step is a `gemmary convert` in a process of its own; its peak is what the kernel counted (ru_maxrss). Needs about 16 GB
of disk, which it frees.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from gemmary.checkpoints import convert, open_model
from gemmary.checkpoints.huggingface import write_side_files
from gemmary.checkpoints.names import layout, stored_shape
from gemmary.checkpoints.safetensors_file import SafetensorsReader, SafetensorsWriter
from gemmary.config import Config
from gemmary.presets import preset


def make(directory: Path, config: Config) -> None:
    """A Hugging Face directory of random bf16 bits, all finite."""
    rows = [(row, i) for row in layout("hf", config) for i in range(config.num_layers if row.layered else 1)]
    directory.mkdir()
    plan = [(row.at(i), stored_shape(row, config), np.dtype(ml_dtypes.bfloat16)) for row, i in rows]
    rng = np.random.default_rng(0)
    with SafetensorsWriter(directory, plan) as writer:
        for name, shape, dtype in plan:
            bits = rng.integers(0, 1 << 16, shape, np.uint16)
            bits &= np.uint16(0xBFFF)  # exponents below 2: any sign, any fraction, nothing infinite
            writer.write(name, bits.view(dtype))
    write_side_files(directory, config, "bfloat16", None)


def digest(directory: Path) -> str:
    """SHA-256 over all tensors by name."""
    file, total = SafetensorsReader(directory), hashlib.sha256()
    for name in sorted(file.entries):
        total.update(name.encode() + file.read(name).tobytes())
    return total.hexdigest()


def step(source: Path, destination: Path, to: str, result: Any) -> None:
    """One conversion, alone in its process."""
    started = time.perf_counter()
    with open_model(source) as checkpoint:
        convert(checkpoint, destination, to)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result.send({"to": to, "seconds": time.perf_counter() - started, "peak_bytes": peak})


def main() -> None:
    """Run the round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gemma-2b-256000")
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="convert-", dir=arguments.directory))
    spawn = multiprocessing.get_context("spawn")
    table = Table("step", "seconds", "peak memory", title=f"{arguments.preset}, random bf16 weights")
    try:
        source = root / "start"
        make(source, preset(arguments.preset).config)
        before, steps = digest(source), []
        for to, name in (("gguf", "model.gguf"), ("native", "native"), ("hf", "end")):
            receive, send = spawn.Pipe(duplex=False)
            process = spawn.Process(target=step, args=(source, root / name, to, send))
            process.start()
            send.close()
            steps.append(receive.recv())
            process.join()
            table.add_row(to, f"{steps[-1]['seconds']:.1f}", f"{steps[-1]['peak_bytes'] / 1e9:.2f} GB")
            source = root / name
        same = digest(source) == before
    finally:
        shutil.rmtree(root)
    Console().print(table)
    Console().print("every bit came back" if same else "[red]the weights differ")
    if arguments.json:
        result = {"preset": arguments.preset, "steps": steps, "bit_identical": same}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not same or max(step["peak_bytes"] for step in steps) > 3e9:
        raise SystemExit("missed: bit-identical with a peak under 3 GB")


if __name__ == "__main__":
    main()
