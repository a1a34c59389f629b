"""Operations counted by hand for a small model, and against published sizes."""

import pytest

from gemmary.presets import PRESETS, nano
from gemmary.train.flops import peak_flops, train_flops


def test_operations_of_a_small_model_by_hand() -> None:
    config = nano(1, 100)  # one layer: width 64, one head of 64, ffw 256
    matrices = 4 * 64 * 64 + 3 * 64 * 256 + 3 * 64 + 100 * 64  # norms are counted with the rest: one in a thousand
    keys = (1 + 10) / 2  # of a causal row of 10, on average
    assert train_flops(config, 10) == pytest.approx(3 * (2 * matrices + 4 * 64 * keys))


def test_a_window_bounds_what_attention_costs() -> None:
    config = PRESETS["gemma3-270m"].config
    everywhere = config.replace(window_pattern=(False,))
    assert train_flops(config, 512) == train_flops(everywhere, 512)
    assert train_flops(config, 8192) < train_flops(everywhere, 8192)


def test_six_operations_a_parameter_where_attention_is_small() -> None:
    # 6 N D (Kaplan et al., arXiv 2001.08361), N with the tied output: the 7B at a short length.
    config = PRESETS["gemma-7b"].config
    assert train_flops(config, 128) == pytest.approx(6 * (7_751_248_896 + 786_825_216), rel=0.01)


def test_a_cpu_says_what_it_reaches() -> None:
    assert peak_flops() > 1e9
