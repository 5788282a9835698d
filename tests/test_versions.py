"""Versions told without importing anything large."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from rawmerge.versions import installed_version


@pytest.mark.parametrize("package", ["torch", "numpy", "click", "safetensors", "huggingface_hub"])
def test_it_is_what_the_metadata_say(package: str) -> None:
    assert installed_version(package) == version(package)


def test_a_package_that_is_not_there_has_none() -> None:
    assert installed_version("no_such_package_anywhere") == ""


def test_nothing_is_imported_for_it() -> None:
    code = "import sys; from rawmerge.versions import installed_version as v; v('torch'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "importlib.metadata"} & set(loaded)
