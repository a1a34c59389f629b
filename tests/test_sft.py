"""Supervised fine-tuning: what is learnt and what is not, whole models and adapters, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuning_runs import COLOURS, LENGTH, THINGS, config, dialogue, params, said, saved, tokenizer, tuned

import gemmary
from gemmary.adapters import adapt, join, merge
from gemmary.checkpoints import open_model
from gemmary.data.packing import Batch, stacked
from gemmary.data.tokens import Tokens
from gemmary.data.turns import lay_out
from gemmary.errors import GemmaryError
from gemmary.model.transformer import forward
from gemmary.params import Params
from gemmary.quantization import quantize
from gemmary.train.finetune import LoraSettings, TuneSettings, learner
from gemmary.train.head import Head
from gemmary.train.model_files import AdapterFiles
from gemmary.train.objectives import language_loss
from gemmary.train.run import Ended
from gemmary.train.sft import held_out_loss, sft
from gemmary.weights import Int8, dequantize

ALL = [(f"paint {thing} {colour}", f"{colour} {thing}") for colour in COLOURS for thing in THINGS]
UNSEEN = ALL[::7]
SEEN = [one for one in ALL if one not in UNSEEN]
ADAPTED = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"}


class Run(NamedTuple):
    """A run that has ended, its folder, and the weights it was given."""

    ended: Ended
    folder: Path
    given: Params


class Data(NamedTuple):
    train: Tokens
    held_out: Tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    return Data(said(folder / "train", SEEN), said(folder / "held_out", UNSEEN))


def ran(folder: Path, data: Data, given: Params, base: str = "", **changes: Any) -> Run:
    ended = sft(
        TuneSettings(**tuned(**changes)), config(), given, tokenizer(), {"paint": data.train}, {"paint": data.held_out},
        folder, weights={"paint": 1.0}, base=base,
    )  # fmt: skip
    return Run(ended, folder, given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Run:
    """All of a model learnt, until it knows its conversations."""
    return ran(tmp_path_factory.mktemp("sft") / "run", data, params(), steps=150, evaluate_every=50)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Run:
    """Adapters over a model on disk."""
    folder = tmp_path_factory.mktemp("lora")
    base = saved(folder / "base", params())
    lora = LoraSettings(rank=4, alpha=8.0)
    return ran(folder / "run", data, params(), base=str(base), lora=lora, steps=40, learning_rate=3e-2)


@pytest.fixture(scope="module")
def over_int8(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Run:
    lora = LoraSettings(rank=4, targets=("attn.q", "mlp.up"), base_bits=8)
    return ran(tmp_path_factory.mktemp("int8") / "run", data, params(), lora=lora, steps=30, learning_rate=3e-2)


def held_out(run: Run) -> list[float]:
    return [entry["held_out_loss"]["all"] for entry in run.ended.entries if "held_out_loss" in entry]


# --- What is learnt ---------------------------------------------------------------------------------------------------


def test_it_lowers_the_loss_of_conversations_that_it_has_not_seen(whole: Run) -> None:
    before, *later = held_out(whole)
    assert len(later) == 3
    assert before > 5
    assert later[-1] < 0.3 * before


def test_the_parameters_of_the_least_held_out_loss_are_kept(whole: Run) -> None:
    best = json.loads(next((whole.folder / "best").glob("*/best.json")).read_text())
    assert best["value"] == min(held_out(whole)[1:])
    assert whole.ended.parameters == whole.folder / "best" / f"step_{best['step']:08d}" / "model"
    assert (whole.folder / "model").resolve() == whole.ended.parameters.resolve()


def test_held_out_loss_is_the_mean_over_what_the_model_says(data: Data, tmp_path: Path) -> None:
    """Plainly, each conversation alone; a source of short answers and one of long ones count by their tokens."""
    settings = TuneSettings(**tuned())
    pupil = learner(settings, config(), params(), tokenizer(), seed=0, base="")
    long = [("say", "white boats black doors grey birds white"), ("say red", "green hats green hats")]
    found = held_out_loss(pupil, params(), {"short": data.held_out, "long": said(tmp_path / "long", long)}, settings)
    plain = jax.jit(lambda ids: jax.nn.log_softmax(forward(params(), config(), ids)))

    def nats(conversations: list[tuple[str, str]]) -> list[float]:
        each: list[float] = []
        for one in (dialogue(*turns) for turns in conversations):
            every = np.asarray(plain(jnp.asarray([one.ids + [0] * (LENGTH - len(one.ids))])))[0]
            each += [-float(every[i, one.ids[i + 1]]) for i in range(len(one.ids) - 1) if one.loss_mask[i + 1]]
        return each

    short, more = nats(UNSEEN), nats(long)
    wanted = {"all": np.mean(short + more), "short": np.mean(short), "long": np.mean(more)}
    assert found == pytest.approx(wanted, rel=1e-5)


def test_an_answer_ends_with_end_of_turn(whole: Run, data: Data, tmp_path: Path) -> None:
    """Learnt because it is a target: greedily, the model says what it was taught and stops."""
    newest = whole.folder / "checkpoints" / f"step_{int(whole.ended.state.step):08d}" / "model"
    model = gemmary.load(newest)
    right = 0
    for asked, answer in SEEN[:6]:
        found = model.chat([{"role": "user", "content": asked}], max_new_tokens=6)
        assert found.finish_reason == "stop"
        assert found.token_ids[-1] == tokenizer().end_of_turn
        right += found.text == answer
    assert right >= 4


def row() -> tuple[Batch, np.ndarray, np.ndarray]:
    """A conversation of two answers; where its targets are learnt, and where they are `<end_of_turn>` behind an answer."""
    one = dialogue("paint hats red", "red hats", "paint boats blue", "blue boats")
    batch = stacked([lay_out([(np.array(one.ids), np.array(one.loss_mask, np.uint8))], LENGTH, 0)])
    learnt = np.zeros(LENGTH, bool)
    learnt[: len(one.ids) - 1] = one.loss_mask[1:]
    return batch, learnt, learnt & (batch.targets[0] == tokenizer().end_of_turn)


def test_the_models_turns_and_their_ends_are_the_targets() -> None:
    batch, learnt, ends = row()
    said = batch.targets[0][learnt].tolist()
    end = tokenizer().end_of_turn
    assert said == [*tokenizer().encode("red hats"), end, *tokenizer().encode("blue boats"), end]
    assert ends.sum() == 2
    np.testing.assert_array_equal(batch.mask[0] != 0, learnt)


def test_a_gradient_follows_no_other_target() -> None:
    """Another token in a user's turn, or behind the last answer, changes no gradient; another at any learnt place does."""
    batch, learnt, ends = row()
    loss = language_loss(config(), head=Head(16, sparse=True))
    pull = jax.jit(jax.grad(lambda w, targets: loss(w, batch._replace(targets=targets), jax.random.key(0)).total))
    start, targets = params(), jnp.asarray(batch.targets)
    true = pull(start, targets)

    def changes(places: np.ndarray) -> bool:
        other = pull(start, jnp.where(places, (targets + 7) % config().vocab_size, targets))
        return not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(true), jax.tree.leaves(other), strict=True))

    assert not changes(~learnt)
    for place in np.flatnonzero(learnt):
        assert changes(np.arange(LENGTH) == place)
    assert changes(ends)


def test_the_given_weights_stay_as_they_were(whole: Run, adapted: Run, over_int8: Run) -> None:
    """A step takes its state's memory, and not that of who called."""
    for run in (whole, adapted, over_int8):
        for a, b in zip(jax.tree.leaves(run.given), jax.tree.leaves(params()), strict=True):
            np.testing.assert_array_equal(a, b)


# --- Adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_learn_too(adapted: Run, over_int8: Run) -> None:
    for run in (adapted, over_int8):
        before, after = held_out(run)
        assert after < 0.8 * before


def test_adapters_are_written_alone(adapted: Run) -> None:
    folder = adapted.ended.parameters
    assert adapted.ended.parameters.name == "adapter"
    assert (adapted.folder / "adapter").resolve() == folder.resolve()
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    about = json.loads((folder / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["task_type"]) == (4, 8, "CAUSAL_LM")
    whole = sum(leaf.size for leaf in jax.tree.leaves(adapted.given))
    assert sum(leaf.size for leaf in jax.tree.leaves(adapted.ended.state.params)) < whole / 2
    assert set(adapted.ended.state.params) == ADAPTED


def test_what_was_learnt_is_what_opens(adapted: Run) -> None:
    """From the run's link, over the model that it names, the same logits as the state's."""
    with open_model(adapted.folder / "adapter") as checkpoint:
        opened = checkpoint.params(jnp.float32)
    trained = join(adapted.ended.state.params, adapted.given)
    ids = jnp.asarray([dialogue("paint hats red", "red hats").ids])
    run = jax.jit(lambda w: forward(w, config(), ids))
    np.testing.assert_allclose(run(opened), run(trained), atol=1e-5)
    assert float(jnp.abs(run(opened) - run(adapted.given)).max()) > 0.1


def test_a_base_of_eight_bits_is_eight_bits_in_the_step() -> None:
    settings = TuneSettings(**tuned(lora=LoraSettings(rank=4, targets=("attn.q",), base_bits=8)))
    pupil = learner(settings, config(), params(), tokenizer(), seed=0, base="")
    assert pupil.rest is not None
    assert isinstance(pupil.rest["embed"], Int8)
    assert all(isinstance(w, Int8) for w in jax.tree.leaves(pupil.rest["attn.q"], is_leaf=_is_int8))
    assert not any(isinstance(w, Int8) for w in jax.tree.leaves(pupil.rest["final_norm"], is_leaf=_is_int8))
    assert set(pupil.learnt) == {"attn.q"}


def _is_int8(w: Any) -> bool:
    return isinstance(w, Int8)


def test_a_model_of_eight_bits_is_widened_to_be_learnt_whole() -> None:
    narrow = quantize(params(), 8)
    pupil = learner(TuneSettings(**tuned()), config(), narrow, tokenizer(), seed=0, base="")
    assert pupil.rest is None
    np.testing.assert_array_equal(pupil.learnt["embed"], dequantize(narrow["embed"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(pupil.learnt)} == {np.dtype(np.float32)}


def test_an_adapted_model_is_merged_to_be_learnt_whole_and_refused_as_a_base() -> None:
    before = jax.tree.map(lambda x: x + 0.1, adapt(params(), jax.random.key(0), 2, targets=["attn.q"]))
    pupil = learner(TuneSettings(**tuned()), config(), before, tokenizer(), seed=0, base="")
    np.testing.assert_array_equal(pupil.learnt["attn.q"][1], merge(before)["attn.q"][1])
    with pytest.raises(GemmaryError, match=r"attn\.q is already adapted: merge it first"):
        learner(TuneSettings(**tuned(lora=LoraSettings())), config(), before, tokenizer(), seed=0, base="")


def test_beneath_adapters_eight_bits_stay_those_that_they_were() -> None:
    narrow = quantize(params(), 8)
    lora = LoraSettings(rank=2, base_bits=8)
    pupil = learner(TuneSettings(**tuned(lora=lora)), config(), narrow, tokenizer(), seed=0, base="")
    assert pupil.rest is not None
    np.testing.assert_array_equal(pupil.rest["embed"].values, narrow["embed"].values)


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_adapters_come_back_in_every_bit(tmp_path: Path, form: str) -> None:
    """As a run that goes on reads them: in the form that it has them in, the score beside them."""
    settings = TuneSettings(**tuned(lora=LoraSettings(rank=3)))
    pupil = learner(settings, config(), params(), tokenizer(), seed=0, base="here", score=True)
    learnt = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape), pupil.learnt)
    if form == "stacked":
        stack = lambda *x: jnp.stack(x)  # noqa: E731
        learnt = {name: w if name == "score" else jax.tree.map(stack, *w) for name, w in learnt.items()}
    files = AdapterFiles(pupil.config, "here")
    files.write(tmp_path / "adapter", learnt)
    found = files.read(tmp_path / "adapter", learnt)
    assert jax.tree.structure(found) == jax.tree.structure(learnt)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(learnt), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("attn.q", "embed")}, r"lora\.targets: embed; they are among attn\.q"),
        ({"targets": ("final_norm",)}, r"lora\.targets: final_norm"),
        ({"targets": ()}, r"lora\.targets: none"),
        ({"rank": 0}, r"lora\.rank is 0"),
    ],
)
def test_adapters_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GemmaryError, match=message):
        LoraSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 3, "epochs": 1.0}, "either steps, at least 1, or epochs"),
        ({"steps": None}, "either steps, at least 1, or epochs"),
        ({"steps": 0}, "either steps, at least 1, or epochs"),
        ({"steps": None, "epochs": 0.0}, "either steps, at least 1, or epochs"),
        ({"batch": 4, "accumulate": 3}, "batch is 4, which 3 equal parts"),
        ({"length": 1}, "length is 1"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GemmaryError, match=message):
        TuneSettings(**{**tuned(), **changes})


@pytest.mark.parametrize(
    ("of", "changes", "message"),
    [
        ({"vocab_size": 500, "num_tokens": 500}, {}, "the tokenizer has 584 pieces and the model takes 500"),
        ({"vocab_size": 700, "num_tokens": 500}, {}, "the tokenizer has 584 pieces and the model takes 500"),
        ({"context": 32}, {}, "length is 48 and the model's context is 32"),
        ({}, {"length": 12}, r"the source paint has 1\d tokens in one piece, and a row takes 12"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, data: Data, of: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    settings = TuneSettings(**{**tuned(), **changes})
    with pytest.raises(GemmaryError, match=message):
        sft(
            settings, config().replace(**of), params(), tokenizer(), {"paint": data.train}, {}, tmp_path / "run",
            weights={"paint": 1.0},
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_an_epoch_is_every_row_once() -> None:
    settings = TuneSettings(epochs=2.0, batch=4)
    assert [settings.total(rows) for rows in (1, 2, 6, 7)] == [1, 1, 3, 4]
    assert TuneSettings(steps=5).total(1000) == 5


def test_what_only_keeps_the_run_is_not_decisive() -> None:
    a, b = TuneSettings(steps=5), TuneSettings(steps=5, log_every=1, save_every=7, keep=9, tensorboard=True)
    assert a.decisive() == b.decisive() != TuneSettings(steps=5, length=64).decisive()
