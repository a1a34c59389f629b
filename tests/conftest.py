"""Fixtures for all tests. Array shapes in public signatures are checked at run time while tests run."""

import io
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxtyping import install_import_hook

# Tests compile hundreds of small programs and run each once: spend less on optimizing them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_force_host_platform_device_count=8")

# Before anything imports gemmary: every annotated shape of the mathematics is checked on every call.
with install_import_hook(["gemmary.model", "gemmary.infer", "gemmary.weights"], "beartype.beartype"):
    import gemmary  # noqa: F401

import jax
import pytest
import sentencepiece
from servers import Server, started
from small_models import CONFIGS, values_of, write_native

from gemmary.checkpoints import open_model
from gemmary.gemma import Gemma, load
from gemmary.text import Tokenizer

jax.config.update("jax_platforms", "cpu")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # what the command line keeps between runs

# Names of pieces that a real vocabulary has first.
GEMMA1_MARKS = [
    "<mask>",
    "<2mass>",
    "[@BOS@]",
    *(f"<unused{i}>" for i in range(99)),
    "<start_of_turn>",
    "<end_of_turn>",
]
RUNS = ["\n" * n for n in range(1, 32)] + ["▁" * n for n in range(2, 32)]
TAGS = ["<table>", "</table>", "<h1>", "</h1>", "<b>", "</b>", "<code>", "</code>", "<s>", "</s>"]


@pytest.fixture(scope="module", autouse=True)
def few_mappings() -> Iterator[None]:
    """Each compiled program maps some memory, and a process may have only 65,530 mappings: thousands of them are let go in time."""
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and len(maps.read_bytes().splitlines()) > 25_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def sample() -> Gemma:
    """The real Gemma 3 270M, from the packaged GGUF."""
    return load("sample")


@pytest.fixture(scope="session")
def gemma3() -> Tokenizer:
    """The real Gemma 3 vocabulary, from the packaged GGUF."""
    with open_model("sample") as checkpoint:
        tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model() -> bytes:
    """A small SentencePiece model, trained with Gemma's options and with Gemma 1's first ids."""
    corpus = Path(random.__file__).read_text(encoding="utf-8").splitlines()
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=trained, model_type="bpe", vocab_size=1000, byte_fallback=True,
        split_digits=True, add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
        allow_whitespace_only_pieces=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", unk_piece="<unk>", user_defined_symbols=[*GEMMA1_MARKS, *RUNS, *TAGS], minloglevel=2,
        character_coverage=1.0, num_threads=1,
    )  # fmt: skip
    return trained.getvalue()


@pytest.fixture(scope="session")
def tiny(tiny_model: bytes) -> Tokenizer:
    return Tokenizer.from_sentencepiece(tiny_model)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, tiny: Tokenizer) -> Path:
    """A random nano model with turns, on disk."""
    config = CONFIGS["gemma3"].replace(context=2048)
    return write_native(tmp_path_factory.mktemp("served") / "model", config, tiny, values_of(config))


@pytest.fixture(scope="session")
def server(served: Path) -> Iterator[Server]:
    """A server of that model, shared by all tests that leave it as it was."""
    with started(served, "--slots", "2", "--queue", "40") as running:
        yield running
        assert running.process.poll() is None
