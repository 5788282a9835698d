"""Fixtures that several files share, and the versions in pytest's header."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

# Read by torch's thread pool when it is loaded, so before anything imports torch. Threads that wait for work sleep and
# leave the cores to the other processes; how many there are, and so every bit, stays as users have it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes share the tests under `-n auto`, which `scripts/test` says; 0: none but pytest's own.

    Slow tests measure memory, so they run one after the other. Torch takes all cores in each process, as it does for
    users, so more than a few processes would stand in each other's way.
    """
    measures = not config.option.markexpr or "slow" in config.option.markexpr.replace("not slow", "")
    cores = os.cpu_count() or 1
    return 0 if measures or cores == 1 else min(cores, 4)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what rawmerge remembers of outputs out of the user's own cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """Return a tiny base of two shards and an adapter on two of its tensors."""
    return tiny_merge(tmp_path)
