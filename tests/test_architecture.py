"""The floors of the house, held by measurement: imports go down, files stay small, torch stays out of start-up."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "rawmerge"

#: Module (without `rawmerge.`) to its floor; README draws the same picture. A package's modules share its floor.
FLOORS = {
    "_version": 0,
    "errors": 0,
    "dtypes": 0,
    "merge_options": 0,
    "run_options": 0,
    "user_cache": 0,
    "anonymous_memory": 0,
    "versions": 0,
    "native": 1,
    "formats": 1,
    "methods": 2,
    "families": 1,
    "file_status": 1,
    "hub_cache": 1,
    "tiles": 1,
    "page_edges": 1,
    "rounding": 1,
    "blas_threads": 1,
    "signals": 1,
    "tile_scratch": 1,
    "devices": 2,
    "device_tiles": 3,
    "tensor_source": 2,
    "side_files": 2,
    "base_checkpoint": 3,
    "adapter": 3,
    "comparison": 3,
    "shard_writer": 3,
    "output_directory": 3,
    "merge_plan": 3,
    "byte_sizes": 0,
    "memory_limit": 1,
    "memory_lack": 1,
    "process_peak": 1,
    "large_factors": 4,
    "write_behind": 4,
    "factor_parts": 5,
    "step_paths": 6,
    "memory": 7,
    "memory_budget": 8,
    "sliced_lora": 7,
    "plan_json": 4,
    "untouched_shards": 4,
    "plan_difference": 4,
    "finished_merge": 5,
    "outcome": 4,
    "shard_identity": 4,
    "linking": 4,
    "earlier_output": 4,
    "record": 4,
    "input_check": 4,
    "consumption": 5,
    "consumption_check": 5,
    "journal": 5,
    "unfinished": 6,
    "resumption": 6,
    "small_files": 6,
    "identity": 4,
    "layer_replication": 4,
    "matching": 5,
    "output_config": 6,
    "plan": 7,
    "plain_pairs": 4,
    "kept_ranges": 4,
    "shared_tensors": 4,
    "certificates": 5,
    "tile_computer": 8,
    "calibration": 8,
    "pair_computer": 8,
    "computers": 9,
    "jobs": 9,
    "run_request": 10,
    "engine": 10,
    "shard_origins": 11,
    "shard_run": 11,
    "plain_run": 12,
    "consuming_run": 12,
    "run": 13,
    "inspection": 13,
    "report": 14,
    "hub": 14,
    "api": 15,
    "demo": 16,
    "__init__": 16,
    "command_options": 16,
    "cli": 17,
    "__main__": 18,
}
#: Third-party modules that may be imported, and by whom; torch at module level only where tiles are computed.
THIRD_PARTY = {
    "click": {"cli", "command_options"},
    "tqdm": {"cli"},
    "huggingface_hub": {"hub"},
    "safetensors": {"demo"},
    "numpy": {"demo", "rounding", "comparison", "methods"},
    "torch": {
        "tile_computer",
        "calibration",
        "sliced_lora",
        "tile_scratch",
        "devices",
        "device_tiles",
        "rounding",
        "blas_threads",
        "methods",
        "shared_tensors",
        "demo",
    },
}
TORCH_AT_IMPORT = {
    "tile_computer",
    "sliced_lora",
    "calibration",
    "tile_scratch",
    "devices",
    "device_tiles",
    "rounding",
    "blas_threads",
}


def module_files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    """Return the top-level module or package that a file belongs to."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node
            if node.module == "rawmerge":
                yield from ((f"rawmerge.{alias.name}", node) for alias in node.names)


def type_checking_lines(tree: ast.AST) -> set[int]:
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    return {line for block in blocks for line in range(block.lineno, (block.end_lineno or block.lineno) + 1)}


def test_every_module_has_a_floor() -> None:
    assert {room(path) for path in module_files()} == FLOORS.keys()


@pytest.mark.parametrize("path", module_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for name, node in imports(tree):
        parts = name.split(".")
        if parts[0] != "rawmerge" or len(parts) == 1 or node.lineno in type_checking_lines(tree):
            continue
        target = parts[1]
        if target in FLOORS and target != room(path):
            assert FLOORS[target] < FLOORS[room(path)], f"{path.name} imports {name}, which is not below it"


@pytest.mark.parametrize("path", module_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_third_party_modules_are_imported_at_their_seams_only(path: Path) -> None:
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for name, node in imports(tree):
        package = name.split(".")[0]
        if package == "rawmerge" or package in sys.stdlib_module_names or node.lineno in type_checking_lines(tree):
            continue
        assert room(path) in THIRD_PARTY.get(package, set()), f"{path.name} imports {package}"
        if package == "torch" and id(node) in top:
            assert room(path) in TORCH_AT_IMPORT


def loaded_after(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import rawmerge",
        "import rawmerge.cli",
        "import rawmerge; rawmerge.plan_merge, rawmerge.run_plan, rawmerge.inspect_path, rawmerge.parse_plan",
        "import rawmerge.report",
    ],
)
def test_start_up_imports_neither_torch_nor_the_hub(statement: str) -> None:
    heavy = {"torch", "numpy", "transformers", "peft", "huggingface_hub", "safetensors", "tqdm"}
    assert not loaded_after(statement) & heavy


def test_planning_imports_neither_torch_nor_the_hub(tiny: tuple[Path, Path]) -> None:
    base, adapter = map(str, tiny)
    loaded = loaded_after(f"import rawmerge; rawmerge.plan_merge({base!r}, {adapter!r})")
    assert not loaded & {"torch", "numpy", "huggingface_hub", "safetensors"}


def test_merging_imports_no_model_code_and_no_hub(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter, output = map(str, (*tiny, tmp_path / "out"))
    loaded = loaded_after(f"import rawmerge; rawmerge.merge_adapter({base!r}, {adapter!r}, {output!r})")
    assert not loaded & {"transformers", "peft", "huggingface_hub", "safetensors"}


def functions() -> Iterator[tuple[str, int]]:
    for path in module_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (node.end_lineno or 0) - (body[0].lineno if body else node.end_lineno or 0) + 1
                yield f"{path.name}:{node.name}", length


def test_functions_are_short() -> None:
    lengths = dict(functions())
    assert statistics.median(lengths.values()) <= 10
    assert {name: length for name, length in lengths.items() if length > 50} == {}


def test_files_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in module_files()}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_no_broad_except_no_print_no_global() -> None:
    for path in module_files():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Global), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", path
            if isinstance(node, ast.ExceptHandler):
                names = ast.unparse(node.type) if node.type else ""
                raises_again = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in node.body)
                assert names not in {"", "Exception", "BaseException"} or raises_again, path
