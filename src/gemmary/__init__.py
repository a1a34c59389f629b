"""gemmary: the complete Gemma system, one codebase for a model's whole life.

    import gemmary
    model = gemmary.load("sample")
    print(model.generate("The capital of France is", max_new_tokens=16).text)

The legend of the house, in einsum strings (lower case) and shapes (upper case) alike: B batch, T query position,
S key position, L layer, D embed, N query heads, K key/value heads, G = N/K, H head_dim, F ffw, V vocab, R rank.
An *axis* is a mesh or named dimension, a *dim* is a size.
"""

from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.gemma import Completion, Gemma, load
from gemmary.infer.sampling import Sampling
from gemmary.presets import PRESETS

__all__ = ["PRESETS", "Completion", "Config", "Gemma", "GemmaryError", "Sampling", "__version__", "load"]

__version__ = "0.1.0"
