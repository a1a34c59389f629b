"""The library itself: found, loaded, and its functions made known to XLA."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

__all__ = ["instructions", "kernel"]

_LIBRARY = "libgemmary_kernels.so"
_TARGETS = (
    "gemmary_products",
    "gemmary_lookup",
    "gemmary_attend_cached",
    "gemmary_attend_pages",
    "gemmary_choose",
    "gemmary_attend",
    "gemmary_attend_gradient",
)


@functools.cache
def instructions() -> str | None:
    """The instruction set that the kernels run with here ("avx512", "avx2", …); None where there are none."""
    path = next((at for folder in sys.modules[__package__].__path__ if (at := Path(folder) / _LIBRARY).is_file()), None)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        logging.getLogger(__name__).warning("the CPU kernels cannot be loaded, plain XLA serves: %s", error)
        return None
    library.gemmary_instructions.restype = ctypes.c_char_p
    name: bytes | None = library.gemmary_instructions()
    if name is None:
        return None
    for target in _TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return name.decode()


def kernel(name: str, results: Any, **options: Any) -> Callable[..., Any]:
    """A kernel as a function of arrays, with results of these shapes (see `jax.ffi.ffi_call`)."""
    instructions()  # makes it known to XLA
    call: Callable[..., Any] = jax.ffi.ffi_call(f"gemmary_{name}", results, **options)
    return call
