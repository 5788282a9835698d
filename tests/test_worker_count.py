"""How many processes share the tests under `scripts/test`."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_xdist_auto_num_workers


def workers(expression: str, cores: int | None, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    config: Any = SimpleNamespace(option=SimpleNamespace(markexpr=expression))
    return pytest_xdist_auto_num_workers(config)


@pytest.mark.parametrize("expression", ["not slow", "parity", "real and not slow"])
@pytest.mark.parametrize(("cores", "count"), [(2, 2), (4, 4), (64, 4), (1, 0), (None, 0)])
def test_there_is_one_for_each_core_up_to_four(
    monkeypatch: pytest.MonkeyPatch, expression: str, cores: int | None, count: int
) -> None:
    assert workers(expression, cores, monkeypatch) == count


@pytest.mark.parametrize("expression", ["slow", "slow and parity", "slow or not slow", ""])
def test_tests_that_measure_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch, expression: str) -> None:
    assert workers(expression, 2, monkeypatch) == 0
