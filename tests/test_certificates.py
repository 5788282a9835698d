"""What is remembered of torch's sums: found by trial once, used without torch, forgotten when anything changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rawmerge
from rawmerge.computing.certificates import FILE_NAME, Certificates, machine_key
from rawmerge.native import kernel
from rawmerge.native.recipe import Recipe
from tests.builders import folder_bytes, write_adapter

RECIPE = Recipe(64, 96, 4, is_transposed=False, is_double=False, stored="BF16", result="BF16", rounds_delta=False)

needs_kernel = pytest.mark.skipif(kernel() is None, reason="the kernel is not compiled, or not for this processor")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that holds what is remembered, in a folder that does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rawmerge" / FILE_NAME


@pytest.fixture
def merge_inputs(tmp_path: Path) -> tuple[Path, Path]:
    """Return a base with one linear weight of several tiles' worth of rows, and a LoRA on it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    random = torch.Generator().manual_seed(5)
    weights = {"net.weight": torch.randn(400, 200, generator=random).bfloat16(), "other": torch.ones(3)}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    factors = {
        "base_model.model.net.lora_A.weight": torch.randn(6, 200, generator=random) / 8,
        "base_model.model.net.lora_B.weight": torch.randn(400, 6, generator=random) / 8,
    }
    write_adapter(adapter, factors, r=6, lora_alpha=9, target_modules=["net"])
    return base, adapter


def test_what_was_found_is_there_in_the_next_run(cache: Path) -> None:
    first = Certificates()
    assert first.missing([RECIPE, RECIPE]) == [RECIPE]
    first.add({RECIPE: 4})
    assert (first.block(RECIPE), Certificates().block(RECIPE)) == (4, 4)
    assert Certificates().missing([RECIPE]) == []
    assert list(cache.parent.iterdir()) == [cache]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '{"format": "other"}',
        '{"format": "rawmerge-products-1", "machine": "x", "blocks": {}}',
        "\0",
    ],
)
def test_a_file_that_says_something_else_is_forgotten(cache: Path, text: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert Certificates().block(RECIPE) is None


@pytest.mark.parametrize("block", [-1, 1.5, True, "4", None])
def test_only_numbers_are_blocks(cache: Path, block: Any) -> None:
    Certificates().add({RECIPE: 4})
    document = json.loads(cache.read_text())
    document["blocks"] = dict.fromkeys(document["blocks"], block)
    cache.write_text(json.dumps(document))
    assert Certificates().block(RECIPE) is None


@pytest.mark.parametrize("name", ["MKL_CBWR", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS"])
def test_another_variable_of_the_libraries_is_another_machine(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    Certificates().add({RECIPE: 4})
    monkeypatch.setenv(name, "1")
    assert Certificates().block(RECIPE) is None


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    certificates = Certificates()
    certificates.add({RECIPE: 4})
    assert certificates.block(RECIPE) == 4
    assert Certificates().block(RECIPE) is None
    assert machine_key() == machine_key()


SCRIPT = """
import sys
import rawmerge
rawmerge.merge_adapter(*sys.argv[1:4], without=sys.argv[4:])
print("torch" in sys.modules, "numpy" in sys.modules)
"""


def run(arguments: list[str], **variables: str) -> str:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)
    return done.stdout.strip()


@needs_kernel
def test_torch_is_imported_once_for_the_trial_and_then_no_more(
    cache: Path, merge_inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    inputs = [str(path) for path in merge_inputs]
    assert run([*inputs, str(tmp_path / "first")]) == "True True"
    assert list(json.loads(cache.read_text())["blocks"]) == ["400 200 6 False False BF16 BF16 False"]
    assert run([*inputs, str(tmp_path / "second")]) == "False False"
    assert run([*inputs, str(tmp_path / "third"), "kernel"]) == "True True"
    outputs = [folder_bytes(tmp_path / name) for name in ("first", "second", "third")]
    assert outputs[0] == outputs[1] == outputs[2]


@needs_kernel
def test_where_no_block_has_torch_s_bits_torch_computes(
    cache: Path, merge_inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rawmerge.merge_adapter(*merge_inputs, tmp_path / "plain", without=["kernel"])
    monkeypatch.setattr("rawmerge.computing.calibration.find_block", lambda recipe, blas: 0)
    rawmerge.merge_adapter(*merge_inputs, tmp_path / "none")
    assert set(json.loads(cache.read_text())["blocks"].values()) == {0}
    assert folder_bytes(tmp_path / "none") == folder_bytes(tmp_path / "plain")


@needs_kernel
def test_a_wrong_block_would_show(
    cache: Path, merge_inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rawmerge.merge_adapter(*merge_inputs, tmp_path / "plain", dtype="float32")
    cache.unlink()
    monkeypatch.setattr("rawmerge.computing.calibration.find_block", lambda recipe, blas: 2)
    rawmerge.merge_adapter(*merge_inputs, tmp_path / "wrong", dtype="float32")
    assert folder_bytes(tmp_path / "wrong") != folder_bytes(tmp_path / "plain")


@needs_kernel
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MKL's variable")
def test_the_libraries_own_compatible_mode_has_the_same_output_by_torch(
    cache: Path, merge_inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """MKL then sums in an order that no block has: the trial must see that, and leave the sums to it."""
    inputs = [str(path) for path in merge_inputs]
    assert run([*inputs, str(tmp_path / "trial")], MKL_CBWR="COMPATIBLE") == "True True"
    run([*inputs, str(tmp_path / "torch"), "kernel"], MKL_CBWR="COMPATIBLE")
    assert folder_bytes(tmp_path / "trial") == folder_bytes(tmp_path / "torch")


@needs_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_a_base_that_is_not_finite_has_the_bytes_of_the_other_path(
    cache: Path, merge_inputs: tuple[Path, Path], tmp_path: Path, bad: float, compute_dtype: str
) -> None:
    base, adapter = merge_inputs
    weight = torch.randn(400, 200, generator=torch.Generator().manual_seed(6)).bfloat16()
    weight[250, 3] = bad
    save_file({"net.weight": weight}, base / "model.safetensors", metadata={"format": "pt"})
    for name, without in (("kernel", []), ("torch", ["kernel"])):
        rawmerge.merge_adapter(base, adapter, tmp_path / name, compute_dtype=compute_dtype, without=without)
    assert folder_bytes(tmp_path / "kernel") == folder_bytes(tmp_path / "torch")


@needs_kernel
def test_an_overflow_is_refused_by_name(cache: Path, merge_inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = merge_inputs
    weight = torch.full((400, 200), torch.finfo(torch.float16).max, dtype=torch.float16)
    save_file({"net.weight": weight}, base / "model.safetensors", metadata={"format": "pt"})
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 9', '"lora_alpha": 9000'))
    rawmerge.merge_adapter(base, adapter, tmp_path / "wide", dtype="float32")
    with pytest.raises(rawmerge.MergeError, match=r"net\.weight"):
        rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_home_nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.chdir(tmp_path)
    Certificates().add({RECIPE: 4})
    assert Certificates().block(RECIPE) is None
    assert list(tmp_path.iterdir()) == []


LOW = """
import sys
import rawmerge
if sys.argv[4]:
    import torch
    torch.set_num_threads(int(sys.argv[4]))
rawmerge.merge_adapter(*sys.argv[1:4])
"""


@needs_kernel
@pytest.mark.slow
def test_low_products_follow_the_thread_count_of_a_caller_who_has_torch(cache: Path, tmp_path: Path) -> None:
    """Their bits depend on it, so what was found with torch's own count must not be used with another."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    random = torch.Generator().manual_seed(5)
    rows, columns, rank = 48, 40, 64
    save_file({"net.weight": torch.randn(rows, columns, generator=random)}, base / "model.safetensors")
    factors = {
        "base_model.model.net.lora_A.weight": torch.randn(rank, columns, generator=random),
        "base_model.model.net.lora_B.weight": torch.randn(rows, rank, generator=random),
    }
    write_adapter(adapter, factors, r=rank, lora_alpha=9, target_modules=["net"])
    for threads in ("1", "3"):
        for name, options in (("kernel", LOW), ("torch", LOW.replace("[1:4])", "[1:4], without=['kernel'])"))):
            output = str(tmp_path / f"{name}{threads}")
            subprocess.run([sys.executable, "-c", options, str(base), str(adapter), output, threads], check=True)
        assert folder_bytes(tmp_path / f"kernel{threads}") == folder_bytes(tmp_path / f"torch{threads}")


@needs_kernel
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_signs_of_zero_are_torch_s(cache: Path, tmp_path: Path, rank: int) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    random = torch.Generator().manual_seed(rank)
    weight = torch.randn(400, 200, generator=random).bfloat16()
    weight[::2] = -0.0
    save_file({"net.weight": weight}, base / "model.safetensors", metadata={"format": "pt"})
    lora_b = torch.randn(400, rank, generator=random)
    lora_b[::4] = -0.0
    factors = {
        "base_model.model.net.lora_A.weight": torch.randn(rank, 200, generator=random),
        "base_model.model.net.lora_B.weight": lora_b,
    }
    write_adapter(adapter, factors, r=rank, lora_alpha=9, target_modules=["net"])
    rawmerge.merge_adapter(base, adapter, tmp_path / "torch", without=["kernel"])
    rawmerge.merge_adapter(base, adapter, tmp_path / "kernel")
    assert folder_bytes(tmp_path / "kernel") == folder_bytes(tmp_path / "torch")


CUT = """
import sys
import rawmerge
rawmerge.merge_adapter(*sys.argv[1:4], without=sys.argv[4:])
"""


@needs_kernel
def test_a_tile_that_is_left_to_torch_is_cut_as_torch_cuts_it(cache: Path, tmp_path: Path) -> None:
    """The last tile of the kernel is one row, which alone is another product to a matrix library."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(512, 2046, generator=random)
    weight[511, 0] = float("inf")
    save_file({"net.weight": weight}, base / "model.safetensors", metadata={"format": "pt"})
    factors = {
        "base_model.model.net.lora_A.weight": torch.randn(64, 2046, generator=random),
        "base_model.model.net.lora_B.weight": torch.randn(512, 64, generator=random),
    }
    write_adapter(adapter, factors, r=64, lora_alpha=9, target_modules=["net"])
    for name, without in (("trial", []), ("kernel", []), ("torch", ["kernel"])):
        command = [sys.executable, "-c", CUT, str(base), str(adapter), str(tmp_path / name), *without]
        subprocess.run(command, check=True)
    assert folder_bytes(tmp_path / "trial") == folder_bytes(tmp_path / "kernel") == folder_bytes(tmp_path / "torch")


@needs_kernel
@pytest.mark.parametrize(
    "shape", [(1, 1, 17), (7, 1, 4), *(pytest.param(at, marks=pytest.mark.slow) for at in ((1, 1, 64), (2, 1, 9)))]
)
def test_a_few_elements_prove_no_order_of_sums(cache: Path, tmp_path: Path, shape: tuple[int, int, int]) -> None:
    rows, columns, rank = shape
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    random = torch.Generator().manual_seed(rank)
    save_file({"net.weight": torch.randn(rows, columns, generator=random)}, base / "model.safetensors")
    factors = {
        "base_model.model.net.lora_A.weight": torch.randn(rank, columns, generator=random),
        "base_model.model.net.lora_B.weight": torch.randn(rows, rank, generator=random),
    }
    write_adapter(adapter, factors, r=rank, lora_alpha=9, target_modules=["net"])
    run([str(base), str(adapter), str(tmp_path / "out")])
    assert not cache.exists()
