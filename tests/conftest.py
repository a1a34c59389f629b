"""Fixtures for all tests. Array shapes in public signatures are checked at run time while tests run."""

import os

from jaxtyping import install_import_hook

# Tests compile hundreds of small programs and run each once: spend less on optimizing them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_force_host_platform_device_count=8")

# Before anything imports gemmary: every annotated shape of the mathematics is checked on every call.
with install_import_hook(["gemmary.model", "gemmary.infer", "gemmary.weights"], "beartype.beartype"):
    import gemmary  # noqa: F401

import jax
import pytest

from gemmary.gemma import Gemma, load

jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="session")
def sample() -> Gemma:
    """The real Gemma 3 270M, from the packaged GGUF."""
    return load("sample")
