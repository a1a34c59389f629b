"""What a training step would take on chips that are not there: whether it fits, what it computes, moves and sends."""

from gemmary.plan.program import Program, read_program
from gemmary.plan.program_collectives import Collective, collectives
from gemmary.plan.program_costs import Costs, CustomCall, custom_calls, matmul_flops, memory_bytes, shapes_of
from gemmary.plan.program_text import Instruction, Shape

__all__ = [
    "Collective",
    "Costs",
    "CustomCall",
    "Instruction",
    "Program",
    "Shape",
    "collectives",
    "custom_calls",
    "matmul_flops",
    "memory_bytes",
    "read_program",
    "shapes_of",
]
