"""The floors of the house, held by measurement: imports go down, files stay small, torch stays out of start-up."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "rawmerge"

#: Module (without `rawmerge.`) to its floor; README draws the same picture. A subject's package (`engine`) has modules
#: on several floors; one that is named here whole (`formats`) is a single room.
FLOORS = {
    "_version": 0,
    "byte_sizes": 0,
    "dtypes": 0,
    "errors": 0,
    "file_errors": 0,
    "merge_options": 1,
    "run_options": 1,
    "user_cache": 0,
    "versions": 0,
    "families": 1,
    "formats": 1,
    "native": 1,
    "signals": 1,
    "methods": 2,
    "merge_plan": 3,
    "layer_replication": 4,
    "plan_json": 4,
    "pickled_plan": 4,
    "resharding": 4,
    "matching": 5,
    "adapter_source": 0,
    "combination": 4,
    "window": 1,
    "combined_plan": 6,
    "adapter_order": 5,
    "weighted_plan": 4,
    "planner": 7,
    "planning": 15,
    "plan": 8,
    "run_request": 10,
    "shard_run": 11,
    "plain_run": 13,
    "inspection": 13,
    "leftovers": 13,
    "run": 14,
    "report": 15,
    "summary_report": 16,
    "api": 16,
    "__init__": 17,
    "command_group": 16,
    "command_options": 16,
    "progress_bar": 16,
    "demo": 17,
    "cli": 18,
    "__main__": 19,
    "computing.base_rows": 5,
    "computing.blas_threads": 1,
    "computing.cast_loss": 1,
    "computing.cast_meter": 2,
    "computing.cast_steps": 4,
    "computing.losses": 2,
    "computing.overflow": 4,
    "computing.rounding": 1,
    "computing.survival": 1,
    "computing.tile_scratch": 1,
    "computing.devices": 2,
    "computing.row_meter": 2,
    "computing.device_tiles": 3,
    "computing.large_factors": 4,
    "computing.last_cast": 5,
    "computing.magnitudes": 1,
    "computing.random_masks": 1,
    "computing.prepared_combination": 5,
    "computing.plain_pairs": 4,
    "computing.shared_tensors": 4,
    "computing.windowed_update": 4,
    "computing.certificates": 5,
    "computing.factor_parts": 5,
    "computing.step_paths": 6,
    "computing.sliced_lora": 7,
    "computing.stages": 4,
    "computing.tensor_reading": 3,
    "computing.calibration": 8,
    "computing.pair_computer": 8,
    "computing.tile_computer": 8,
    "computing.computers": 9,
    "consuming.plan_difference": 4,
    "consuming.consumption": 6,
    "consuming.consumption_check": 5,
    "consuming.finished_merge": 5,
    "consuming.journal": 5,
    "consuming.resumption": 7,
    "consuming.unfinished": 6,
    "consuming.consuming_run": 12,
    "engine.anonymous_memory": 0,
    "engine.page_edges": 1,
    "engine.tiles": 1,
    "engine.shard_target": 3,
    "engine.shard_writer": 3,
    "engine.archived_shard": 4,
    "engine.kept_ranges": 4,
    "engine.write_behind": 4,
    "engine.jobs": 9,
    "engine.engine": 10,
    "exporting.chat_templates": 1,
    "exporting.export_job": 1,
    "exporting.llamafactory_keys": 1,
    "exporting.value_head": 3,
    "exporting.tokenizer_tokens": 3,
    "exporting.yaml_file": 3,
    "exporting.differences": 4,
    "exporting.interpolation": 4,
    "exporting.modelfile": 4,
    "exporting.typed_keys": 4,
    "exporting.axolotl": 5,
    "exporting.llamafactory": 5,
    "exporting.mergekit": 5,
    "exporting.job_file": 6,
    "exporting.export_run": 17,
    "inputs.file_status": 1,
    "inputs.hub_cache": 1,
    "inputs.tensor_source": 2,
    "inputs.adapter": 3,
    "inputs.base_checkpoint": 3,
    "inputs.comparison": 3,
    "inputs.identity": 4,
    "inputs.input_check": 4,
    "inputs.hub": 14,
    "memory.lack": 1,
    "memory.limit": 1,
    "memory.plan_size": 6,
    "memory.process_peak": 1,
    "memory.tile_memory": 6,
    "memory.torch_need": 6,
    "memory.forecast": 7,
    "memory.budget": 8,
    "output.side_files": 2,
    "output.manifest": 3,
    "output.exchange": 0,
    "output.folder_lock": 2,
    "output.output_directory": 3,
    "output.staging_directory": 4,
    "output.earlier_output": 4,
    "output.linking": 4,
    "output.outcome": 5,
    "output.shard_file": 4,
    "output.record": 4,
    "output.shard_identity": 4,
    "output.untouched_shards": 4,
    "output.model_card": 6,
    "output.card_sources": 7,
    "output.output_config": 6,
    "output.small_files": 6,
    "output.same_shard": 4,
    "output.cast_losses": 2,
    "output.loss_fields": 3,
    "output.shard_outcome": 5,
    "output.survivals": 2,
    "output.shard_journal": 5,
    "output.shard_origins": 11,
    "output.finished_shards": 11,
    "saved_model.meta_model": 0,
    "saved_model.saved_layout": 0,
    "saved_model.layout_request": 4,
    "saved_model.peft_differences": 6,
    "saved_model.like_saved": 7,
    "verifying.findings": 1,
    "verifying.tensor_tally": 2,
    "verifying.compared_shard": 4,
    "verifying.piece_sums": 1,
    "verifying.checkpoint_check": 5,
    "verifying.config_check": 9,
    "verifying.folder_check": 4,
    "verifying.merge_record": 5,
    "verifying.model_shape": 6,
    "verifying.diagnosis": 5,
    "verifying.file_check": 6,
    "verifying.replay": 11,
    "verifying.verification": 12,
}
#: Third-party modules that may be imported, and by whom; torch at module level only where tiles are computed.
THIRD_PARTY = {
    "click": {"cli", "command_group", "command_options"},
    "tqdm": {"progress_bar"},
    "huggingface_hub": {"inputs.hub", "saved_model.meta_model"},
    "transformers": {"saved_model.meta_model"},
    "yaml": {"exporting.yaml_file", "formats"},
    "safetensors": {"demo"},
    "numpy": {
        "verifying.tensor_tally",
        "verifying.piece_sums",
        "demo",
        "computing.rounding",
        "computing.random_masks",
        "inputs.comparison",
        "methods",
    },
    "torch": {
        "computing.tile_computer",
        "computing.last_cast",
        "computing.magnitudes",
        "computing.prepared_combination",
        "computing.random_masks",
        "computing.calibration",
        "computing.sliced_lora",
        "computing.tile_scratch",
        "computing.devices",
        "computing.stages",
        "computing.tensor_reading",
        "computing.device_tiles",
        "computing.rounding",
        "computing.row_meter",
        "computing.base_rows",
        "computing.cast_meter",
        "computing.overflow",
        "computing.windowed_update",
        "computing.blas_threads",
        "methods",
        "computing.shared_tensors",
        "demo",
        "saved_model.meta_model",
    },
}
TORCH_AT_IMPORT = {
    "computing.tile_computer",
    "computing.last_cast",
    "computing.magnitudes",
    "computing.prepared_combination",
    "computing.random_masks",
    "computing.sliced_lora",
    "computing.calibration",
    "computing.tile_scratch",
    "computing.devices",
    "computing.stages",
    "computing.tensor_reading",
    "computing.device_tiles",
    "computing.rounding",
    "computing.row_meter",
    "computing.base_rows",
    "computing.cast_meter",
    "computing.overflow",
    "computing.windowed_update",
    "computing.blas_threads",
}


def module_files() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.parent == ROOT or not is_subject(path))


def is_subject(path: Path) -> bool:
    """Whether a file is the `__init__` of a package whose modules have floors of their own."""
    return path.name == "__init__.py" and path.parent.name not in FLOORS


def room(path: Path) -> str:
    """Return the key of `FLOORS` that a file belongs to."""
    return room_of(path.relative_to(ROOT).with_suffix("").parts)


def room_of(parts: Sequence[str]) -> str:
    """Return the key of `FLOORS` for a module's path below `rawmerge`."""
    return parts[0] if parts[0] in FLOORS else ".".join(parts[:2])


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


def test_subjects_say_what_they_are_about_and_hold_nothing() -> None:
    subjects = [path for path in ROOT.rglob("__init__.py") if path.parent != ROOT and is_subject(path)]
    assert {path.parent.name for path in subjects} == {name.split(".")[0] for name in FLOORS if "." in name}
    for path in subjects:
        assert len(ast.parse(path.read_text()).body) == 1, path
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("path", module_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for name, node in imports(tree):
        parts = name.split(".")
        if parts[0] != "rawmerge" or len(parts) == 1 or node.lineno in type_checking_lines(tree):
            continue
        target = room_of(parts[1:])
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
    assert "rawmerge.verifying.verification" not in loaded  # a tenth of a small merge's start


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
