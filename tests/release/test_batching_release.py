"""T9 at length: see tests/test_batching.py."""

from __future__ import annotations

import pytest
from test_batching import different_in_company


@pytest.mark.release
def test_an_answer_does_not_depend_on_its_neighbours(pytestconfig: pytest.Config) -> None:
    assert different_in_company(pytestconfig.getoption("--company")) == 0
