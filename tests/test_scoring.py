"""Log-probabilities of many continuations are those of each text read alone, whatever they share and in whatever order they are asked for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, values_of

from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.infer import scoring
from gemmary.infer.engine import Engine
from gemmary.infer.scoring import Asked, score
from gemmary.model.transformer import forward
from gemmary.params import Params, layered_names

KINDS = ["gemma1-mqa", "gemma3"]


def engine_of(config: Config) -> Engine:
    values = values_of(config, np.float32)
    params: Params = {}
    for name, layer in layered_names(config):
        w = jnp.asarray(values[name, layer])
        params[name] = w if name in ("embed", "final_norm") else (*params.get(name, ()), w)
    return Engine(params, config)


_logits = jax.jit(forward, static_argnums=1)


def alone(engine: Engine, one: Asked) -> tuple[float, bool]:
    """From the logits of the one text, in float64."""
    text = [*one.context, *one.continuation]
    ids = np.zeros((1, 300), np.int32)  # what stands behind is not seen
    ids[0, : len(text)] = text
    logits = np.asarray(_logits(engine.params, engine.config, jnp.asarray(ids)))[0].astype(np.float64)
    peak = logits.max(-1, keepdims=True)
    logprobs = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    last, known = range(len(one.context) - 1, len(text) - 1), engine.config.num_tokens
    greedy = all(logits[i, :known].argmax() == text[i + 1] for i in last)
    return float(sum(logprobs[i, text[i + 1]] for i in last)), greedy


def questions(rng: np.random.Generator) -> list[Asked]:
    """Few-shot prefixes with questions behind them, each with answers; lone texts; the same question twice."""
    draw = lambda n: rng.integers(3, 1000, n).tolist()  # noqa: E731
    found = []
    for examples in (draw(40), draw(70)):
        for _ in range(4):
            context = [2, *examples, *draw(int(rng.integers(1, 30)))]
            found += [Asked(context, draw(int(rng.integers(1, 12)))) for _ in range(4)]
            found += [Asked(context, [token]) for token in draw(7)]  # more than one lookup takes
    found += [Asked([2], draw(5)), Asked([2], draw(5)), Asked([2, *draw(200)], draw(30))]
    return [*found, found[3]]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_each_text_alone(kind: str) -> None:
    engine = engine_of(CONFIGS[kind])
    asked = questions(np.random.default_rng(0))
    found = dict(score(engine, asked))
    assert sorted(found) == list(range(len(asked)))
    for number, one in enumerate(asked):
        logprob, greedy = alone(engine, one)
        assert found[number].logprob == pytest.approx(logprob, abs=2e-4)
        assert found[number].greedy == greedy
    order = np.random.default_rng(1).permutation(len(asked)).tolist()
    other = dict(score(engine, [asked[i] for i in order]))
    assert [found[i].logprob for i in order] == pytest.approx([other[i].logprob for i in range(len(asked))], abs=1e-4)


def test_what_the_model_would_say_is_greedy() -> None:
    engine = engine_of(CONFIGS["gemma3"])
    prompt = [2, *range(5, 60)]
    said = [step[0].id for step in engine.generate([prompt], max_new_tokens=6)]
    other = [*said[:-1], said[-1] + 1 if said[-1] < 900 else 5]
    found = dict(score(engine, [Asked(prompt, said), Asked(prompt, other)]))
    assert found[0].greedy
    assert not found[1].greedy


def test_a_beginning_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(CONFIGS["gemma1-mqa"])
    read = []
    plain = scoring._hidden
    monkeypatch.setattr(scoring, "_hidden", lambda *args: read.append((args[4][0] >= 0).sum()) or plain(*args))
    context = [2, *range(10, 110)]
    asked = [Asked(context, [*range(at, at + 5)]) for at in range(200, 240)]
    assert len(list(score(engine, asked))) == 40
    assert sum(read) == len(context) + 40 * 4  # and never a last token


def test_rows_are_filled_and_no_text_is_cut_in_two() -> None:
    engine = engine_of(CONFIGS["gemma1-mqa"].replace(context=20_000))
    rng = np.random.default_rng(3)
    texts = [[2, *rng.integers(3, 1000, int(rng.integers(100, 1500))).tolist()] for _ in range(40)]
    asked = [Asked(text[:-3], text[-3:]) for text in texts]
    fed = [scoring._fed(engine, one) for one in asked]
    rows = list(scoring._rows(fed, asked, sorted(range(40), key=lambda i: fed[i])))
    assert sum(len(row.tokens) for row in rows) <= sum(map(len, fed))
    assert all(len(row.tokens) <= scoring._MOST for row in rows)
    assert len(rows) <= sum(map(len, fed)) / (scoring._MOST - 1500) + 1
    for row in rows:
        tokens, (positions, places, ends) = row.laid()
        for at, _, number in row.wanted:
            path = [k for k in range(at + 1) if places[0, k] <= at < ends[0, k]]
            assert tokens[0, path].tolist() == fed[number][: len(path)]
            assert positions[0, path].tolist() == list(range(len(path)))


def test_a_text_longer_than_the_context_keeps_its_bos_and_its_end() -> None:
    engine = engine_of(CONFIGS["gemma2"])
    rng = np.random.default_rng(5)
    context, continuation = [2, *rng.integers(3, 1000, 400).tolist()], [7, 8, 9]
    found = dict(score(engine, [Asked(context, continuation)]))
    room = engine.config.context
    kept = Asked([2, *context[len(context) - (room - 3) :]], continuation)
    assert len(kept.context) + 2 == room
    assert found[0].logprob == pytest.approx(alone(engine, kept)[0], abs=2e-4)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Asked([], [5]), "at least one token each"),
        (Asked([2], []), "at least one token each"),
        (Asked([2], [5] * 300), "does not fit in the context of 256"),
        (Asked([2], [5, 10_000]), "token ids go from 0"),
        (Asked([2, -1], [5]), "token ids go from 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(asked: Asked, said: str) -> None:
    with pytest.raises(GemmaryError, match=said):
        list(score(engine_of(CONFIGS["gemma2"]), [asked]))


def test_nothing_asked_is_nothing_said() -> None:
    assert list(score(engine_of(CONFIGS["gemma2"]), [])) == []
