"""Models on disk, in every format that Gemma is published in."""

from gemmary.checkpoints.checkpoint import Checkpoint
from gemmary.checkpoints.convert import FORMATS, convert, quantize_model
from gemmary.checkpoints.open import SAMPLE, open_model

__all__ = ["FORMATS", "SAMPLE", "Checkpoint", "convert", "open_model", "quantize_model"]
