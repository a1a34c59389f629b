"""The CPU kernels against plain JAX, on every instruction set that this machine has, and under sanitizers."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from gemmary import kernels
from gemmary.kernels import library
from gemmary.model.attention import Marks, attend, attend_among, attend_directly
from gemmary.model.cache import LayerCache, write

Sets = Callable[[], Iterator[str]]
HERE = Path(__file__).parent
NATIVE = HERE.parent / "src" / "gemmary" / "kernels" / "native"
CASES = [  # B, T, N, K, H, window, softcap, documents
    (1, 1, 2, 1, 8, None, None, 1), (2, 37, 4, 1, 64, None, None, 1), (2, 37, 4, 2, 8, None, None, 4),
    (1, 300, 3, 3, 24, 40, None, 5), (2, 300, 4, 2, 64, None, 50.0, 6), (2, 131, 4, 2, 72, 17, 5.0, 6),
    (3, 64, 2, 1, 256, None, None, 1), (1, 129, 6, 2, 16, 1, 2.0, 1), (2, 161, 2, 1, 32, 128, None, 2),
    (2, 300, 4, 2, 24, None, None, 0), (1, 280, 3, 1, 64, 20, 5.0, 0),  # trees
]  # fmt: skip


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object] | None:
    """A second copy of the library, with the second best instruction set that this machine has; None where it has one alone."""
    if kernels.instructions() != "avx512":
        assert kernels.instructions() in ("avx2", "native")
        return None
    (path,) = (at for folder in kernels.__path__ if (at := Path(folder) / library._LIBRARY).is_file())
    copy = ctypes.CDLL(str(shutil.copy(path, tmp_path_factory.mktemp("narrow"))))
    copy.gemmary_instructions.restype = ctypes.c_char_p
    before = os.environ.get("GEMMARY_INSTRUCTIONS")
    os.environ["GEMMARY_INSTRUCTIONS"] = "avx2"
    try:
        assert copy.gemmary_instructions() == b"avx2"  # which it stays at
    finally:
        os.environ.pop("GEMMARY_INSTRUCTIONS") if before is None else os.environ.update(GEMMARY_INSTRUCTIONS=before)
    for target in library._TARGETS:
        jax.ffi.register_ffi_target(f"narrow_{target}", jax.ffi.pycapsule(getattr(copy, target)), platform="cpu")
    return lambda name, results, **options: jax.ffi.ffi_call(f"narrow_gemmary_{name}", results, **options)


@pytest.fixture
def sets(narrow: Callable[..., object] | None, monkeypatch: pytest.MonkeyPatch) -> Sets:
    """Goes through the instruction sets: between one and the next, kernels run with it."""
    called: list[str] = []

    def asked(name: str, *shapes: object, **options: object) -> object:
        called.append(name)
        return narrow(name, *shapes, **options)  # type: ignore[misc]

    def each() -> Iterator[str]:
        yield str(kernels.instructions())
        if narrow is not None:
            with monkeypatch.context() as patch:
                for module in ("attention", "choice", "products"):
                    patch.setattr(sys.modules[f"gemmary.kernels.{module}"], "kernel", asked)
                called.clear()
                yield "avx2"
            assert called, "nothing was asked of the narrower instructions"

    return each


def marks_of(rng: np.random.Generator, B: int, T: int, documents: int) -> Marks:
    """Packed documents of unequal lengths, the last two tokens padding where there is room."""
    positions, segments = np.full((B, T), -1, np.int32), np.full((B, T), -1, np.int32)
    end = T - 2 if T > 4 else T
    for row in range(B):
        cuts = np.sort(rng.choice(np.arange(1, end), documents - 1, replace=False)) if documents > 1 else []
        start = 0
        for i, cut in enumerate([*cuts, end]):
            positions[row, start:cut], segments[row, start:cut] = np.arange(cut - start), i
            start = cut
    return Marks(jnp.asarray(positions), jnp.asarray(segments))


def plain(q, k, v, marks, window, softcap):  # type: ignore[no-untyped-def]
    """All scores at once, in the order of the tokens; what sees nothing is 0."""
    B, T, N, H = q.shape
    grouped = q.reshape(B, T, k.shape[2], -1, H).transpose(0, 2, 3, 1, 4)
    out = attend_directly(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), marks, marks, window=window, softcap=softcap)
    out = out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return jnp.where((marks.positions >= 0)[..., None, None], out, 0)


def farthest(a: object, b: object) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def tree_of(rng: np.random.Generator, B: int, T: int) -> Marks:
    """Texts that share beginnings, depth first: each stretch grows from any on the way to the one before it, or from nothing."""
    positions, segments, ends = (np.full((B, T), -1, np.int32) for _ in range(3))
    for row in range(B):
        path: list[tuple[int, int, slice]] = []  # segment, position after it, where its tokens are
        at = segment = 0
        while at < T - 2:
            left = path[: rng.integers(0, len(path) + 1)]
            for _, _, where in path[len(left) :]:
                ends[row, where] = segment
            size, begin = int(rng.integers(1, 9)), left[-1][1] if left else 0
            where = slice(at, min(at + size, T - 2))
            at = where.stop
            positions[row, where], segments[row, where] = (
                np.arange(begin, begin + size)[: where.stop - where.start],
                segment,
            )
            path = [*left, (segment, begin + size, where)]
            segment += 1
        for _, _, where in path:
            ends[row, where] = segment
    return Marks(jnp.asarray(positions), jnp.asarray(segments), jnp.asarray(ends))


@pytest.mark.parametrize(("B", "T", "N", "K", "H", "window", "softcap", "documents"), CASES)
def test_attention_and_its_gradients_are_those_of_plain_jax(
    B, T, N, K, H, window, softcap, documents, sets: Sets
) -> None:  # type: ignore[no-untyped-def]
    assert kernels.serves_attention(H), "this machine's kernels are not built: is there a C++ compiler?"
    rng = np.random.default_rng(T)
    q, k, v, d = (
        jnp.asarray(rng.standard_normal((B, T, heads, H)) * scale, jnp.float32)
        for heads, scale in ((N, 2 * H**-0.5), (K, 1.0), (K, 1.0), (N, 1.0))
    )
    marks = marks_of(rng, B, T, documents) if documents else tree_of(rng, B, T)
    wanted, backward = jax.vjp(lambda *x: plain(*x, marks, window, softcap), q, k, v)
    wanted_gradients = backward(d)
    for _ in sets():
        out, gradient = jax.vjp(lambda *x: attend_among(*x, marks, window=window, softcap=softcap), q, k, v)
        assert farthest(out, wanted) < 1e-5
        for mine, other in zip(gradient(d), wanted_gradients, strict=True):
            assert farthest(mine, other) < 1e-5 * max(1.0, farthest(other, 0))


def test_large_scores_neither_overflow_nor_vanish(sets: Sets) -> None:
    q = jnp.full((1, 40, 2, 16), 30.0)
    k = jnp.concatenate([jnp.full((1, 20, 1, 16), -30.0), jnp.full((1, 20, 1, 16), 30.0)], axis=1)
    v = jnp.arange(40.0)[None, :, None, None] * jnp.ones((1, 40, 1, 16))
    marks = Marks(jnp.arange(40)[None])
    for _ in sets():
        out, gradient = jax.vjp(lambda q, k, v: attend_among(q, k, v, marks, window=None, softcap=None), q, k, v)
        assert np.allclose(out[0, :20, 0, 0], np.arange(20) / 2, atol=1e-4)  # all keys are equally far
        assert np.allclose(out[0, 20:, 0, 0], 20 + np.arange(20) / 2, atol=1e-4)  # the later ones are all there is
        assert all(bool(jnp.isfinite(g).all()) for g in gradient(jnp.ones_like(out)))


def test_a_value_that_is_no_number_stays_one(sets: Sets) -> None:
    q, k, v = jnp.ones((1, 8, 1, 8)), jnp.ones((1, 8, 1, 8)).at[0, 3, 0, 0].set(jnp.nan), jnp.ones((1, 8, 1, 8))
    for _ in sets():
        out = attend_among(q, k, v, Marks(jnp.arange(8)[None]), window=None, softcap=None)
        assert bool(jnp.isfinite(out[0, :3]).all())
        assert bool(jnp.isnan(out[0, 3:]).all())


def test_bfloat16_is_attended_to_in_float32() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 50, n, 32)), jnp.bfloat16) for n in (4, 2, 2))
    marks = Marks(jnp.arange(50)[None])
    out = attend_among(q, k, v, marks, window=None, softcap=None)
    wide = attend_among(*(x.astype(jnp.float32) for x in (q, k, v)), marks, window=None, softcap=None)
    assert out.dtype == jnp.bfloat16
    assert bool((out == wide.astype(jnp.bfloat16)).all())


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_few_rows_times_a_matrix(rows: int, turned: bool, dtype: object, sets: Sets) -> None:
    rng = np.random.default_rng(rows)
    for k, n in ((1, 1), (5, 3), (37, 19), (64, 33), (640, 300)):
        assert kernels.serves_rows(rows, dtype)
        x, d = (jnp.asarray(rng.standard_normal((rows, side)), jnp.float32) for side in (k, n))
        w = jnp.asarray(rng.standard_normal((n, k) if turned else (k, n)), dtype)
        matrix = np.asarray(w, np.float64).T if turned else np.asarray(w, np.float64)
        wanted = np.asarray(d).T @ np.asarray(x) if turned else np.asarray(x).T @ np.asarray(d)
        for _ in sets():
            out, gradient = jax.vjp(lambda x, w: kernels.products(x, [kernels.Factor(w, turned)])[0], x, w)
            np.testing.assert_allclose(out, np.asarray(x, np.float64) @ matrix, atol=2e-5 * k**0.5)
            dx, dw = gradient(d)
            np.testing.assert_allclose(dx, np.asarray(d) @ matrix.T, atol=2e-5 * n**0.5)
            np.testing.assert_allclose(
                np.asarray(dw, np.float32), wanted, atol=1e-4, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5
            )
    assert not kernels.serves_rows(9, dtype)
    assert not kernels.serves_rows(rows, jnp.int16)


def blocks(rng: np.random.Generator, kind: str, n: int, k: int) -> np.ndarray:
    """Random blocks with scales of a moderate size; what they mean, ggml's own package says."""
    values, size = kernels.BLOCKS[kind]
    packed = rng.integers(0, 256, (n, k // values, size), dtype=np.uint8)
    scales = (rng.standard_normal((n, k // values, 2)) * 0.01).astype(np.float16).view(np.uint8)
    if kind == "Q6_K":
        packed[..., 208:] = scales[..., :2]
    else:
        packed[..., :2] = scales[..., :2]
    if kind in ("Q4_K", "Q5_K"):
        packed[..., 2:4] = scales[..., 2:]
    return packed.reshape(n, -1)


@pytest.mark.parametrize("kind", kernels.BLOCKS)
def test_blocks_are_what_ggml_says_and_multiply_so(kind: str, sets: Sets) -> None:
    rng = np.random.default_rng(1)
    for n, k in ((1, 256), (33, 512), (70, 768), (100, 2048)):
        packed = blocks(rng, kind, n, k)
        matrix = dequantize(packed, GGMLQuantizationType[kind])
        rows = jnp.asarray([0, n - 1, n // 2])
        for _ in sets():
            found = kernels.lookup(rows, jnp.asarray(packed), kind, k)
            np.testing.assert_allclose(found, matrix[rows], rtol=1e-6, atol=1e-6)
        for m in (1, 2, 5, 16, 17, 100, 600):
            x = rng.standard_normal((m, k)).astype(np.float32)
            factor = kernels.Factor(jnp.asarray(packed), True, kind)
            wanted = x.astype(np.float64) @ matrix.T.astype(np.float64)
            size = (np.abs(x) @ np.abs(matrix.T)).max()
            rounding = 1e-5 if m <= 16 else 1e-6  # few rows are made 16-bit numbers
            for _ in sets():
                out = np.asarray(kernels.products(jnp.asarray(x), [factor])[0])
                assert np.abs(out - wanted).max() < rounding * size
                both = np.asarray(kernels.products(jnp.asarray(x), [factor, factor], gated=True)[0])
                gelu = out / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (out + 0.044715 * out**3)))
                assert np.abs(both - gelu * out).max() < 1e-5 * max(1, np.abs(out).max() ** 2)


def test_a_row_of_blocks_comes_to_the_same_beside_others(sets: Sets) -> None:
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((16, 512)), jnp.float32)
    factor = kernels.Factor(jnp.asarray(blocks(rng, "Q5_0", 50, 512)), True, "Q5_0")
    for _ in sets():
        whole = kernels.products(x, [factor])[0]
        for rows in (1, 2, 3, 7, 8):
            assert bool((np.asarray(kernels.products(x[:rows], [factor])[0]) == np.asarray(whole)[:rows]).all())


def test_through_int8_the_gradient_goes_to_the_rows() -> None:
    rng = np.random.default_rng(0)
    x, w = (
        jnp.asarray(rng.standard_normal((3, 40)), jnp.float32),
        jnp.asarray(rng.integers(-127, 128, (40, 24)), jnp.int8),
    )
    out, gradient = jax.vjp(lambda x: kernels.products(x, [kernels.Factor(w, False)])[0], x)
    np.testing.assert_allclose(out, x @ w.astype(jnp.float32), rtol=1e-5, atol=1e-3)
    (dx,) = gradient(out)
    np.testing.assert_allclose(dx, out @ w.T.astype(jnp.float32), rtol=1e-4)


def test_blocks_have_no_gradient_and_say_so() -> None:
    factor = kernels.Factor(jnp.asarray(blocks(np.random.default_rng(0), "Q8_0", 4, 32)), True, "Q8_0")
    with pytest.raises(TypeError, match="no gradient: dequantize the weights to train them"):
        jax.grad(lambda x: kernels.products(x, [factor])[0].sum())(jnp.ones((1, 32)))


def test_a_row_that_there_is_not_is_no_number(sets: Sets) -> None:
    packed = jnp.asarray(blocks(np.random.default_rng(0), "Q4_0", 4, 32))
    for _ in sets():
        found = kernels.lookup(jnp.asarray([3, 4, -1]), packed, "Q4_0", 32)
        assert jnp.isnan(found).all(axis=1).tolist() == [False, True, True]


CACHES = [  # B, T, N, K, H, slots, window, softcap
    (1, 1, 4, 1, 64, 512, None, None), (3, 1, 4, 2, 24, 100, None, 5.0), (2, 3, 4, 4, 64, 37, 20, None),
    (2, 5, 6, 2, 8, 300, 100, 50.0), (4, 16, 2, 2, 16, 80, 33, None),
]  # fmt: skip


@pytest.mark.parametrize(("B", "T", "N", "K", "H", "S", "window", "softcap"), CACHES)
def test_attention_to_a_cache_is_that_of_plain_jax(B, T, N, K, H, S, window, softcap, sets: Sets) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(S)
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, n, H)) * H**-0.25, jnp.float32) for n in (N, K, K))
    keys, values = (jnp.asarray(rng.standard_normal((B, K, S, H)) * H**-0.25, jnp.float32) for _ in range(2))
    start = np.array([S - T - 3 if row == 0 else S // 2 for row in range(B)])
    held = jnp.asarray(np.where(np.arange(S) < start[:, None], np.arange(S), -1), jnp.int32)
    positions = np.asarray(start[:, None] + np.arange(T), np.int32)
    positions[-1, T // 2 + 1 :] = -1
    marks = Marks(jnp.asarray(positions))
    written = write(LayerCache(keys, values, held), k, v, marks.positions)
    wanted = attend(q, written.k, written.v, marks, Marks(written.positions), window=window, softcap=softcap)
    wanted = jnp.where((marks.positions >= 0)[..., None, None], wanted, 0)
    for _ in sets():
        out, cache = LayerCache(keys, values, held).attend(q, k, v, marks, first=False, window=window, softcap=softcap)
        assert farthest(out, wanted) < 1e-5
        for mine, other in zip(jax.tree.leaves(cache), jax.tree.leaves(written), strict=True):
            assert bool((np.asarray(mine) == np.asarray(other)).all())


def test_the_highest_and_their_log_sum(sets: Sets) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 30_000)).round(2), jnp.float32)  # many are equal
    wanted, places = jax.lax.top_k(x[:, :29_000], 20)
    for _ in sets():
        ids, values, total = kernels.choose(x, 29_000, 20)
        assert bool((ids == places).all())
        assert bool((values == wanted).all())
        np.testing.assert_allclose(total, jax.nn.logsumexp(x, axis=1), rtol=1e-6)


@pytest.mark.parametrize(("check", "says"), [("attention", "60 shapes"), ("decoding", "240 shapes")])
def test_nothing_is_read_or_written_outside(check: str, says: str, tmp_path: Path) -> None:
    """The kernels as a program of their own, under the address and undefined-behaviour sanitizers."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert compiler, "the kernels are built with a C++ compiler; so is this test"
    program = tmp_path / "program"
    name = kernels.instructions() or "native"
    narrow = ["-mavx2", "-mfma"]
    flags = {"avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"], "avx2": narrow}
    command = [
        compiler, "-std=gnu++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-psabi",
        *flags.get(name, []), f"-DGEMMARY_KERNELS={name}_kernels", f'-DGEMMARY_NAME="{name}"', f"-I{NATIVE}",
        str(NATIVE / "kernels.cc"), str(NATIVE / "halves.cc"), str(HERE / "native" / f"check_{check}.cc"), "-o", str(program), "-pthread",
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert says in done.stdout


def test_matrices_of_several_kinds_at_once() -> None:
    """A file may keep one matrix plain and the next in blocks, in any order."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((2, 256)), jnp.float32)
    plain = rng.standard_normal((30, 256)).astype(np.float32)
    packed = blocks(rng, "Q4_K", 20, 256)
    factors = [kernels.Factor(jnp.asarray(plain), True), kernels.Factor(jnp.asarray(packed), True, "Q4_K")]
    for order in (factors, factors[::-1]):
        for factor, out in zip(order, kernels.products(x, order), strict=True):
            matrix = dequantize(packed, GGMLQuantizationType["Q4_K"]) if factor.kind else plain
            size = (np.abs(x) @ np.abs(matrix.T)).max()
            assert np.abs(out - np.asarray(x, np.float64) @ matrix.T).max() < 1e-5 * size


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_rows_that_are_no_numbers_stay_none(wrong: float) -> None:
    factor = kernels.Factor(jnp.asarray(blocks(np.random.default_rng(0), "Q8_0", 5, 64)), True, "Q8_0")
    out = kernels.products(jnp.ones((2, 64)).at[0, 40].set(wrong), [factor])[0]
    assert bool(jnp.isnan(out[0]).all())
    assert bool(jnp.isfinite(out[1]).all())
    nothing = kernels.products(jnp.full((1, 64), 1e-40), [factor])[0]
    assert float(jnp.abs(nothing).max()) < 1e-35
