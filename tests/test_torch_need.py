"""Where a limit has no room for torch, the refusal says what torch is for and what may be done about it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import rawmerge
from rawmerge.computing import certificates
from rawmerge.computing.certificates import machine_key
from rawmerge.errors import MemoryLimitError, Problem
from rawmerge.memory import budget as memory_budget
from rawmerge.memory.budget import choose_budget
from rawmerge.memory.limit import MemoryLimit
from rawmerge.native import kernel, library_path
from rawmerge.report import plan_text
from rawmerge.run_options import RunOptions
from tests.builders import PREFIX, folder_bytes, lora_pair, random_tensor, write_adapter, write_base

LITTLE = RunOptions(max_memory=100 * 10**6)

needs_kernel = pytest.mark.skipif(kernel() is None, reason="the kernel is not compiled, or not for this processor")


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """Return a base of two weights and a norm, and a LoRA on one weight."""
    weights = {"net.weight": random_tensor((600, 200)), "other.weight": random_tensor((96, 80)), "norm": torch.ones(9)}
    base = write_base(tmp_path / "base", [{name: tensor.bfloat16() for name, tensor in weights.items()}])
    return base, write_adapter(tmp_path / "adapter", lora_pair("net", 600, 200))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of what is remembered, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rawmerge"


def refusal(base: Path, adapter: Path, options: RunOptions = LITTLE, dtype: str | None = None) -> Problem:
    with pytest.raises(MemoryLimitError) as refused:
        choose_budget(rawmerge.plan_merge(base, adapter, dtype=dtype), options)
    return refused.value.problems[0]


@needs_kernel
def test_a_cast_is_named_with_what_is_cast(inputs: tuple[Path, Path]) -> None:
    problem = refusal(*inputs, dtype="float16")
    assert "219.0 MB for torch (" in problem.found
    assert "for the cast to float16 ('norm' and 1 more)" in problem.found
    assert "without --dtype, plain LoRA takes no torch" in problem.hint
    assert "for the cast to float16" in plan_text(rawmerge.plan_merge(*inputs, dtype="float16"))


@needs_kernel
def test_a_kind_is_named_with_its_tensors(inputs: tuple[Path, Path]) -> None:
    tensors = lora_pair("net", 600, 200) | {f"{PREFIX}net.lora_magnitude_vector.weight": torch.ones(600)}
    problem = refusal(inputs[0], write_adapter(inputs[1], tensors, use_dora=True))
    assert "219.0 MB for torch (for DoRA ('net.weight'))" in problem.found
    assert problem.hint.startswith("give it --max-memory 2")


def test_a_kernel_that_is_switched_off_is_named(inputs: tuple[Path, Path]) -> None:
    problem = refusal(*inputs, RunOptions(max_memory=10**8, without=["kernel"]))
    assert "for torch (for all that changes, as no kernel computes here ('net.weight'))" in problem.found


def test_tensors_that_are_taken_over_whole_need_no_torch(inputs: tuple[Path, Path]) -> None:
    replaced = {f"{PREFIX}other.weight": random_tensor((96, 80), seed=1)}
    adapter = write_adapter(inputs[1], replaced, modules_to_save=["other"])
    assert choose_budget(rawmerge.plan_merge(inputs[0], adapter), LITTLE)[1].torch == 0


@needs_kernel
@pytest.mark.usefixtures("cache")
def test_the_first_merge_names_both_ways(inputs: tuple[Path, Path]) -> None:
    problem = refusal(*inputs)
    assert "for torch (to be asked how it sums, once)" in problem.found
    assert "give it --max-memory 2" in problem.hint
    assert "copy its products.json to " in problem.hint


@needs_kernel
@pytest.mark.usefixtures("cache")
def test_no_hint_leads_beyond_the_control_groups_limit(
    inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever says --max-memory would be killed there."""
    monkeypatch.setattr(memory_budget, "group_limit", lambda: MemoryLimit(10**8, "/group/memory.max"))
    of_group, told = refusal(*inputs, RunOptions()).hint, refusal(*inputs).hint
    assert "raise that limit to 2" in of_group
    assert "give it --max-memory" not in of_group
    assert "raise /group/memory.max to 2" in told


@needs_kernel
def test_what_was_found_elsewhere_may_be_copied(
    cache: Path, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's file has other times there; with the copy, the first merge keeps a limit without room for torch."""
    rawmerge.merge_adapter(*inputs, tmp_path / "there")
    refound = json.loads((cache / "products.json").read_text())["machine"]
    path = library_path()
    assert path is not None
    installed = shutil.copy(path, tmp_path / path.name)
    os.utime(installed, (1, 1))
    monkeypatch.setattr(certificates, "library_path", lambda: Path(installed))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    assert refusal(*inputs)
    (tmp_path / "here" / "rawmerge").mkdir(parents=True)
    shutil.copy(cache / "products.json", tmp_path / "here" / "rawmerge")
    assert machine_key() == refound
    rawmerge.merge_adapter(*inputs, tmp_path / "out", max_memory=10**8)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "there")


def test_another_kernel_is_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number] * 8))
    keys = set()
    for file in files:
        monkeypatch.setattr(certificates, "library_path", lambda own=file: own)
        keys.add(machine_key())
    assert len(keys) == 2
