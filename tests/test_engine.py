"""The engine against the oracle: greedy answers, batches, chunks, stops, and what it refuses."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from models import small, tokens

from gemmary.errors import GemmaryError
from gemmary.infer.engine import Engine, Token
from gemmary.infer.sampling import Sampling
from gemmary.infer.session import Session
from gemmary.params import stack


def _engine(kind: str, chunk: int = 512) -> tuple[oracle.Spec, oracle.Weights, Engine]:
    spec, weights, config, params = small(kind)
    return spec, weights, Engine(params, config, chunk=chunk)


def _rows(steps: list[list[Token]], count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    for step in steps:
        for token in step:
            rows[token.row].append(token.id)
    return rows


def _greedy(spec: oracle.Spec, weights: oracle.Weights, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(oracle.logits(spec, weights, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("kind", "chunk"), [("gemma1-mqa", 512), ("gemma2", 8), ("gemma3", 16)])
def test_unequal_batches_answer_as_the_oracle_does(kind: str, chunk: int) -> None:
    spec, weights, engine = _engine(kind, chunk)
    prompts = [list(map(int, tokens(length, spec.vocab))) for length in (1, 5, 19, 33)]
    steps = list(engine.generate(prompts, max_new_tokens=10))
    assert _rows(steps, 4) == [_greedy(spec, weights, prompt, 10) for prompt in prompts]
    assert [token.finish for token in steps[-1]] == ["length"] * 4
    assert all(token.finish is None for step in steps[:-1] for token in step)


@pytest.mark.parametrize("kind", ["gemma1-mqa", "gemma2", "gemma3"])
def test_a_session_answers_as_if_all_were_read_anew(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns that go on, that part from what was said, near and far back, that outgrow the cache, and after a broken one."""
    spec, weights, engine = _engine(kind, chunk=16)
    text = list(map(int, tokens(60, spec.vocab)))
    turns = [
        (text[:20], 5),
        (text[:32], 6),
        (text[:33], 3),
        (text[:20] + text[40:43], 9),
        (text[:50], 4),
        (text, 6),
        ([7], 2),
    ]
    session, read = Session(), list[int]()
    for prompt, count in turns:
        given = session.take
        monkeypatch.setattr(session, "take", lambda *a, given=given: read.append((found := given(*a))[1]) or found)
        steps = engine.generate([prompt], max_new_tokens=count, session=session)
        assert _rows(list(steps), 1)[0] == _greedy(spec, weights, prompt, count)
        monkeypatch.undo()
    assert read[0] == read[-1] == 0
    assert read[1:3] == [20, 32]
    said = next(steps := engine.generate([text[:20]], max_new_tokens=12, session=session))[0].id
    steps.close()
    assert _rows(list(engine.generate([[*text[:20], said, 5]], max_new_tokens=4, session=session)), 1)[0] == _greedy(
        spec, weights, [*text[:20], said, 5], 4
    )
    with pytest.raises(GemmaryError, match="one text"):
        next(engine.generate([[1], [2]], max_new_tokens=1, session=session))


def test_log_probs_are_the_oracles() -> None:
    spec, weights, engine = _engine("gemma3", chunk=16)
    ids = list(map(int, tokens(45, spec.vocab)))
    logits = oracle.logits(spec, weights, ids)
    expected = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    expected -= logits.max(-1, keepdims=True)
    np.testing.assert_allclose(engine.log_probs(ids), expected[np.arange(44), ids[1:]], atol=1e-4)
    (step,) = engine.generate([ids], max_new_tokens=1, top_logprobs=5)
    best = np.argsort(-expected[-1])[:5]
    assert [i for i, _ in step[0].top_logprobs] == best.tolist()
    np.testing.assert_allclose([p for _, p in step[0].top_logprobs], expected[-1][best], atol=1e-4)
    assert step[0].logprob == pytest.approx(step[0].top_logprobs[0][1])


def test_a_seeded_row_is_the_same_alone_and_in_company() -> None:
    spec, _, engine = _engine("gemma2")
    prompt = list(map(int, tokens(7, spec.vocab)))
    setting = Sampling(1.0, top_p=0.95, seed=5)
    alone = _rows(list(engine.generate([prompt], max_new_tokens=12, sampling=setting)), 1)[0]
    company = [prompt, list(map(int, tokens(20, spec.vocab))), prompt]
    settings = [Sampling(0.0), Sampling(2.0, seed=5), setting]
    rows = _rows(list(engine.generate(company, max_new_tokens=12, sampling=settings)), 3)
    assert rows[2] == alone
    assert rows[0] != alone


def test_stop_ids_end_a_row_and_not_the_others() -> None:
    spec, weights, engine = _engine("gemma1-mha")
    prompts = [list(map(int, tokens(length, spec.vocab))) for length in (4, 9)]
    answers = [_greedy(spec, weights, prompt, 8) for prompt in prompts]
    stop = next(i for i in answers[0] if i not in answers[1])
    at = answers[0].index(stop)
    steps = list(engine.generate(prompts, max_new_tokens=8, stop_ids=[stop]))
    assert _rows(steps, 2) == [answers[0][: at + 1], answers[1]]
    assert steps[at][0].finish == "stop"


def test_the_context_ends_an_answer() -> None:
    spec, _, config, params = small("gemma2")
    engine = Engine(params, config.replace(context=20))
    steps = list(engine.generate([list(map(int, tokens(15, spec.vocab)))], max_new_tokens=100))
    assert len(steps) == 5
    assert steps[-1][0].finish == "length"


def test_stacked_parameters_are_unstacked() -> None:
    spec, _, config, params = small("gemma3")
    prompt = list(map(int, tokens(6, spec.vocab)))
    answers = [_rows(list(Engine(p, config).generate([prompt], max_new_tokens=4)), 1) for p in (params, stack(params))]
    assert answers[0] == answers[1]


def test_what_is_refused() -> None:
    spec, _, engine = _engine("gemma2")
    for prompts, options, message in (
        ([], {}, "there is no prompt"),
        ([[]], {}, "no tokens"),
        ([[spec.vocab]], {}, f"from 0 to {spec.vocab - 1}"),
        ([[-1]], {}, "from 0 to"),
        ([[1] * 4096], {}, "4096 tokens and the model's context is 4096: shorten it"),
        ([[1]], {"sampling": [Sampling(), Sampling()]}, "1 prompts and 2 sampling settings"),
        ([[1]], {"top_logprobs": 21}, "from 0 to 20"),
    ):
        with pytest.raises(GemmaryError, match=message):
            next(engine.generate(prompts, max_new_tokens=1, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gemma1-mqa", "gemma2", "gemma3"])
def test_long_prompts_are_read_in_chunks(kind: str) -> None:
    """Chunks of more tokens than the kernel for few takes, over rings that have wrapped, one row ending before the other."""
    spec, weights, engine = _engine(kind, chunk=32)
    prompts = [list(map(int, tokens(length, spec.vocab))) for length in (150, 97, 40)]
    steps = list(engine.generate(prompts, max_new_tokens=4))
    assert _rows(steps, 3) == [_greedy(spec, weights, prompt, 4) for prompt in prompts]
