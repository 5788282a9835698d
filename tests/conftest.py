"""Fixtures that several files share, and the versions in pytest's header."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.builders import tiny_merge


def pytest_report_header() -> str:
    """Return the versions that results may depend on."""
    found = []
    for name in ("torch", "safetensors", "numpy", "peft", "transformers", "huggingface_hub"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """Return a tiny base of two shards and an adapter on two of its tensors."""
    return tiny_merge(tmp_path)
