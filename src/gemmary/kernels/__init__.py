"""The CPU kernels: C++ in one library that the package's build makes, called through XLA on XLA's own threads.

They are optional. Where there was no compiler, on a processor without AVX2 and on devices other than the CPU, plain XLA
serves, with the same results to rounding; `instructions()` tells.
"""

from gemmary.kernels.attention import (
    attention,
    cached_attention,
    late_attention,
    paged_attention,
    put_in_pages,
    serves_attention,
    serves_cached,
)
from gemmary.kernels.choice import choose, serves_choice
from gemmary.kernels.flash import CONTEXT, flash_attention, serves_flash
from gemmary.kernels.library import instructions
from gemmary.kernels.products import BLOCKS, Factor, lookup, products, row_bytes, serves_blocks, serves_rows

__all__ = [
    "BLOCKS",
    "CONTEXT",
    "Factor",
    "attention",
    "cached_attention",
    "choose",
    "flash_attention",
    "instructions",
    "late_attention",
    "lookup",
    "paged_attention",
    "products",
    "put_in_pages",
    "row_bytes",
    "serves_attention",
    "serves_blocks",
    "serves_cached",
    "serves_choice",
    "serves_flash",
    "serves_rows",
]
