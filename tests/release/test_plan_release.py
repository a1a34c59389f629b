"""Steps really compiled by libtpu, for two topologies: what their programs say."""

from __future__ import annotations

from typing import Any

import pytest

from gemmary.hardware import parse_topology
from gemmary.plan import shapes_of
from gemmary.plan.arithmetic import made_again
from gemmary.plan.job import training_job
from gemmary.plan.planned import Plan, plan
from gemmary.presets import PRESETS

pytestmark = pytest.mark.release
pytest.importorskip("libtpu", reason="pip install 'gemmary[tpu]'")

JOBS: dict[str, dict[str, Any]] = {
    # Multi-query attention, no model axis, two slices; and grouped queries, windows, soft-caps, four chips along model.
    "v5e:4x4": {"name": "gemma-2b", "slices": 2, "data": 16, "model": 1, "remat": "layers"},
    "v6e:4x4": {"name": "gemma2-2b", "slices": 1, "data": 4, "model": 4, "remat": "ffw"},
}
LENGTH = 4096


@pytest.fixture(scope="module", params=JOBS)
def made(request: pytest.FixtureRequest) -> Plan:
    """A compiled plan."""
    options = dict(JOBS[request.param])
    name = options.pop("name")
    tokens = options["slices"] * options["data"] * LENGTH
    job = training_job(
        name, PRESETS[name].config, parse_topology(request.param), tokens=tokens, length=LENGTH, **options
    )
    found = plan(job)
    assert found.compiled, found.why
    return found


def test_it_fits_and_its_memory_is_the_compilers(made: Plan) -> None:
    assert made.built is not None
    assert made.fits
    assert made.memory.total == pytest.approx(made.built.memory.total, rel=0.01)
    assert made.memory.parameters + made.memory.optimizer == pytest.approx(made.built.memory.arguments, rel=0.02)


def test_its_products_are_the_models_and_what_is_made_again(made: Plan) -> None:
    # XLA leaves out of what is made again the products that nothing needs, and attention is in whole blocks.
    assert 0.6 < made.made_again / made_again(made.job) < 1.5
    assert 0.1 < made.mfu < 0.95


def test_nobody_gathers_the_embedding_and_nothing_is_square(made: Plan) -> None:
    assert made.program is not None
    config = made.job.config
    whole = [
        s.dims for _, s in shapes_of(made.program, "all-gather") if s.elements >= config.vocab_size * config.embed_dim
    ]
    square = [s.dims for _, s in shapes_of(made.program) if s.dims[-2:] == (LENGTH, LENGTH)]
    assert not whole
    assert not square


def test_slices_meet_for_gradients_alone(made: Plan) -> None:
    crossing = [part for part in made.sent if part.crosses_slices]
    assert bool(crossing) == (made.job.slices > 1)
    for part in crossing:
        assert part.kind == "all-reduce"
        assert part.bytes == pytest.approx(made.memory.gradients, rel=0.02)


def test_the_compiled_step_is_saved(made: Plan, tmp_path: Any) -> None:
    from gemmary.plan.saved import save

    save(made, tmp_path / "step")
    assert {path.name for path in (tmp_path / "step").iterdir()} == {"step.pjrt", "step.stablehlo", "plan.json"}
    assert (tmp_path / "step" / "step.pjrt").stat().st_size > 10**5
