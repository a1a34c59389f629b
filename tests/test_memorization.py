"""What a model recites: planted canaries are caught, text that it never saw is not, and the sampling is fair."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import CONFIGS, write_native

from gemmary import cli
from gemmary.data.readers import Broken, Document
from gemmary.errors import GemmaryError
from gemmary.evaluate.memorization import TOKENS, Passage, Recital, audit, passages, recite, summed_up
from gemmary.infer.engine import Engine
from gemmary.model.transformer import forward
from gemmary.params import Params, init, layered_names, unstack
from gemmary.text import Tokenizer

CONFIG = CONFIGS["gemma1-mqa"]
SECRET = "write to jane.roe@example.org or call +1 (555) 014-2297 "


def texts(seed: int, count: int) -> list[str]:
    """Documents of random words: nobody can know how one goes on who has not read it."""
    rng = np.random.default_rng(seed)
    return [
        " ".join("".join(map(chr, rng.integers(97, 123, rng.integers(2, 9)))) for _ in range(80)) for _ in range(count)
    ]


def documents(some: list[str]) -> list[Document]:
    return [Document(f"d{i}", text, {}) for i, text in enumerate(some)]


@pytest.fixture(scope="module")
def canaries(tiny: Tokenizer) -> list[str]:
    """Ten; the last has an address and a number where the model must go on."""
    some = texts(1, 10)
    start = tiny.decode(tiny.encode(some[-1])[:TOKENS])
    return [*some[:-1], start + " " + SECRET + some[-1]]


@pytest.fixture(scope="module")
def overfit(tiny: Tokenizer, canaries: list[str]) -> Params:
    """A model that has read ten canaries over and over."""
    ids = np.array([[tiny.bos, *tiny.encode(text)[: 2 * TOKENS]] for text in canaries])
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(
                forward(params, CONFIG, jnp.asarray(ids[:, :-1])), ids[:, 1:]
            ).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    params: Any = init(CONFIG, jax.random.key(0))
    state: Any = optimizer.init(params)
    for _ in range(400):
        params, state, value = step(params, state)
        if value < 0.005:
            break
    assert value < 0.05
    return unstack(params)


def test_canaries_are_caught_and_the_unseen_is_not(tiny: Tokenizer, canaries: list[str], overfit: Params) -> None:
    engine = Engine(overfit, CONFIG)
    found, records = audit(engine, tiny, {"canaries": documents(canaries)}, documents=100)
    control, _ = audit(engine, tiny, {"others": documents(texts(2, 40))}, documents=100)
    assert (found["all"]["documents"], found["all"]["exact"]["count"]) == (10, 10)
    assert (control["all"]["exact"]["count"], control["all"]["approximate"]["count"]) == (0, 0)
    low, high = control["all"]["exact"]["interval"]
    assert low == 0 < high < 0.1
    assert found["all"]["personal"]["count"] == 1
    assert found["all"]["secret"]["count"] == 0
    assert found["all"]["found"]["email"] == 1
    assert [one["document"] for one in records["canaries"]] == [f"d{i}" for i in range(10)]
    assert records["canaries"][-1]["said"] in canaries[-1]


def test_a_tenth_may_differ(tiny: Tokenizer, canaries: list[str], overfit: Params) -> None:
    """Edits of the document that the model does not know of: substitutions, and a token left out."""
    some, _ = passages(documents(canaries[:1]), tiny, 1)
    (exact,) = recite(Engine(overfit, CONFIG), tiny, some)
    assert (exact.distance, exact.exact, exact.approximate) == (0, True, True)
    for edits, approximate in ((1, True), (5, True), (6, False), (20, False)):
        rest = [(id + 1) % 900 + 50 if i % 2 == 0 and i < 2 * edits else id for i, id in enumerate(some[0].rest)]
        (one,) = recite(Engine(overfit, CONFIG), tiny, [Passage("x", some[0].prompt, tuple(rest))])
        assert (one.distance, one.exact, one.approximate) == (edits, False, approximate)
    shifted = (*some[0].rest[:10], *some[0].rest[11:], 77)
    (one,) = recite(Engine(overfit, CONFIG), tiny, [Passage("x", some[0].prompt, shifted)])
    assert one.distance == 2


def test_each_document_is_as_likely_as_another(tiny: Tokenizer) -> None:
    some = documents(texts(3, 30))
    some[7] = Document("short", "a few words", {})
    corpus: list[Document | Broken] = [*some, Broken("x.jsonl:31", "not JSON")]
    taken = Counter(one.document for seed in range(200) for one in passages(corpus, tiny, 10, seed)[0])
    assert sum(taken.values()) == 2000
    assert set(taken) == {one.id for one in some} - {"short"}
    expected = 2000 / 29
    assert sum((n - expected) ** 2 / expected for n in taken.values()) < 60  # 28 degrees of freedom: 56.9 at 0.1 %
    few, unfit = passages(corpus, tiny, 100)
    assert (len(few), unfit) == (29, 2)
    assert [one.document for one in few] == [one.id for one in some if one.id != "short"]
    first = few[0]
    assert [*first.prompt, *first.rest] == tiny.encode(some[0].text)[: 2 * TOKENS]
    assert passages(corpus, tiny, 10, 5) == passages(corpus, tiny, 10, 5)


def test_a_long_run_does_not_hide_a_document(tiny: Tokenizer) -> None:
    text = "x" + " " * 31 * 200 + texts(4, 1)[0]
    (one,), unfit = passages([Document("a", text, {})], tiny, 1)
    assert unfit == 0
    assert [*one.prompt, *one.rest] == tiny.encode(text)[: 2 * TOKENS]


def test_sums() -> None:
    some = [Recital("a", 0, "", {"email": 2}), Recital("b", 5, "", {"api_key": 1}), Recital("c", 6, "", {})]
    found = summed_up([*some, Recital("d", 50, "", {})])
    counts = {name: found[name]["count"] for name in ("exact", "approximate", "personal", "secret")}
    assert counts == {"exact": 1, "approximate": 2, "personal": 1, "secret": 1}
    assert found["approximate"]["share"] == 0.5
    assert found["found"] == {"email": 2, "api_key": 1}
    assert summed_up([])["exact"]["interval"] == (0.0, 1.0)


@pytest.fixture
def trained(tmp_path: Path, tiny: Tokenizer, canaries: list[str], overfit: Params) -> Path:
    """The model and two corpora, on disk."""
    values = {
        (name, i): np.asarray(overfit[name][i] if isinstance(overfit[name], tuple) else overfit[name])
        for name, i in layered_names(CONFIG)
    }
    write_native(tmp_path / "model", CONFIG, tiny, values)
    for name, some in (("canaries", canaries), ("others", texts(2, 12))):
        lines = [json.dumps({"id": f"{name}-{i}", "text": text}) for i, text in enumerate(some)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_the_command(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["memorization", str(trained / "model"), "--corpus", f"planted={trained / 'canaries.jsonl'}", "--unseen"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*asked, str(trained / "others.jsonl"), "--out", str(trained / "out"), "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seen"]["corpora"]["planted"]["exact"]["count"] == 10
    assert found["unseen"]["corpora"]["others"]["exact"]["count"] == 0
    assert json.loads((trained / "out" / "memorization.json").read_text(encoding="utf-8")) == found
    records = [
        json.loads(line) for line in (trained / "out" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert Counter(one["corpus"] for one in records) == {"seen/planted": 10, "unseen/others": 12}
    drawn = (trained / "out" / "memorization.svg").read_text(encoding="utf-8")
    assert all(word in drawn for word in ("planted", "others (unseen)", "exact", "approximate", "none"))
    with pytest.raises(SystemExit) as ended:
        cli.main([*asked, str(trained / "others.jsonl"), "--out", str(trained / "out")])
    assert ended.value.code == 2
    assert "name a new folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*asked, str(trained / "others.jsonl"), "--documents", "5"])
    assert "planted" in (shown := capsys.readouterr().out)
    assert "others" in shown


def test_a_run_brings_what_it_held_out(trained: Path, tmp_path: Path, canaries: list[str]) -> None:
    import gzip

    from gemmary.audits import corpora_of

    for split, some in (("train", canaries), ("held_out", texts(2, 3))):
        folder = tmp_path / "run" / "curate" / "documents" / "prose" / split
        folder.mkdir(parents=True)
        with gzip.open(folder / "0.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"id": f"{split}{i}", "text": text}) + "\n" for i, text in enumerate(some))
    found = corpora_of([str(tmp_path / "run")], [])
    assert [one.id for one in found["seen"]["prose"]] == [f"train{i}" for i in range(10)]
    assert [one.id for one in found["unseen"]["prose"]] == [f"held_out{i}" for i in range(3)]


BAD: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda path: [], "nothing to audit"),
    (lambda path: ["--corpus", str(path / "gone.jsonl")], "is not there"),
    (lambda path: ["--corpus", str(path / "model" / "gemmary.json")], "is not .jsonl"),
    (lambda path: ["--corpus", str(path / "others.jsonl"), "--corpus", str(path / "others.jsonl")], "two corpora"),
    (lambda path: ["--corpus", str(path / "others.jsonl"), "--documents", "0"], "at least 1"),
    (lambda path: ["--corpus", str(path / "short.jsonl")], "no document has 100 tokens"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_mistakes(
    trained: Path, capsys: pytest.CaptureFixture[str], arguments: Callable[[Path], list[str]], message: str
) -> None:
    (trained / "short.jsonl").write_text('{"text": "short"}\nno JSON\n', encoding="utf-8")
    out = trained / "out"
    with pytest.raises(SystemExit) as ended:
        cli.main(["memorization", str(trained / "model"), *arguments(trained), "--out", str(out)])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said
    assert not out.exists()


def test_nothing_is_left_half_written(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemmary import audits

    monkeypatch.setattr(audits, "chart", lambda found: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        audits.write_audit(trained / "out", {}, {})
    assert not [path for path in trained.iterdir() if "out" in path.name]


def test_too_few_is_said(tiny: Tokenizer, overfit: Params) -> None:
    with pytest.raises(GemmaryError, match="0: no document has"):
        audit(Engine(overfit, CONFIG), tiny, {"0": []})
