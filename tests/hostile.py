"""Mutations of good model files, and what must hold of each: refused or read, soon, in bounded memory, running nothing."""

from __future__ import annotations

import random
import resource
import shutil
import struct
import time
from pathlib import Path

import torch_files
from small_models import CONFIGS, values_of, write_native

from gemmary.checkpoints import convert, open_model
from gemmary.errors import GemmaryError
from gemmary.params import layered_names
from gemmary.text import Tokenizer

MOST_SECONDS = 1.0
MOST_BYTES = 256 << 20
"""Beyond what the process had: a mutated length must not be believed."""

_NUMBERS = [0, 1, 2, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]
_HEADER = 4096


def good_models(root: Path, tokenizer: Tokenizer) -> dict[str, Path]:
    """A small model in every format that comes from strangers; the file that is mutated in each."""
    config = CONFIGS["gemma3"]
    with open_model(write_native(root / "native", config, tokenizer, values_of(config))) as checkpoint:
        convert(checkpoint, root / "gguf" / "m.gguf", "gguf")
        convert(checkpoint, root / "hf", "hf")
        convert(checkpoint, root / "kaggle", "kaggle")
        tensors = {f"w{i}": value for i, value in enumerate(values_of(config).values())}
    (root / "torch").mkdir()
    torch_files.save(root / "torch" / "m.ckpt", tensors)
    return {
        "gguf": root / "gguf" / "m.gguf",
        "safetensors": root / "hf" / "model.safetensors",
        "config": root / "hf" / "config.json",
        "tokenizer": root / "hf" / "tokenizer.json",
        "sentencepiece": root / "hf" / "tokenizer.model",
        "torch": root / "torch" / "m.ckpt",
        "kaggle": root / "kaggle" / "_METADATA",
    }


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file cut, with bytes changed (mostly in its header), or with numbers where lengths may be."""
    out = bytearray(data)
    near = min(len(out), _HEADER)
    match rng.randrange(6):
        case 0:
            del out[rng.randrange(len(out)) :]
        case 1:
            for _ in range(rng.randrange(1, 20)):
                out[rng.randrange(near)] = rng.randrange(256)
        case 2:
            for _ in range(rng.randrange(1, 20)):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 3:
            at, size = rng.randrange(near), rng.choice((4, 8))
            number = rng.choice(_NUMBERS) % (1 << 8 * size)
            out[at : at + size] = struct.pack("<Q", number)[:size]
        case 4:
            start, stop = sorted((rng.randrange(near), rng.randrange(near)))
            del out[start:stop]
        case _:
            start, stop = sorted((rng.randrange(near), rng.randrange(near)))
            out[start:start] = out[start:stop]
    return bytes(out)


def attempt(path: Path, data: bytes) -> bool:
    """Open a model with that file in it and read all of it. Whether it was refused; fails where it does harm."""
    path.write_bytes(data)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    said = ""
    try:
        with open_model(path if path.suffix in (".gguf", ".ckpt") else path.parent) as checkpoint:
            checkpoint.tokenizer()
            for name, layer in layered_names(checkpoint.config):
                checkpoint.weight(name, layer)
    except GemmaryError as error:
        said = str(error)
    taken = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert "\n" not in said, said
    assert len(said) < 1000, said
    assert taken < MOST_SECONDS, f"{taken:.1f} s"
    assert grown < MOST_BYTES, f"{grown >> 20} MiB"
    return bool(said)


def run(kind: str, root: Path, tokenizer: Tokenizer, count: int, seed: int) -> int:
    """`count` mutations of one kind; how many were refused. A failure keeps its file and names it."""
    path = good_models(root, tokenizer)[kind]
    if kind == "tokenizer":  # tokenizer.model is read where there is one
        path.with_name("tokenizer.model").unlink()
    good, rng = path.read_bytes(), random.Random(f"{kind} {seed}")
    refused = 0
    for i in range(count):
        data = mutated(good, rng)
        try:
            refused += attempt(path, data)
        except BaseException as error:
            kept = shutil.copy(path, root / f"bad-{i}{path.suffix}")
            raise AssertionError(f"mutation {i} of {kind}, kept as {kept}: {type(error).__name__}: {error}") from error
    path.write_bytes(good)
    return refused
