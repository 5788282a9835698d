"""`--dtype auto`: the dtype that the base's config states, and what becomes of float32 tensors without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import rawmerge
from rawmerge.cli import cli
from rawmerge.errors import OutputError, PlanError
from tests.builders import (
    ALPHA,
    PREFIX,
    RANK,
    folder_bytes,
    layered_merge,
    lora_pair,
    merged,
    random_tensor,
    raw,
    read_all,
    shard_name,
    write_adapter,
    write_base,
)
from tests.test_cut_off import cut_off

LLAMA = {"model_type": "llama"}
VISION: dict[str, Any] = {
    "model_type": "llava",
    "vision_config": {"model_type": "clip_vision_model", "dtype": "float16"},
}
STATED: list[tuple[dict[str, Any], str]] = [
    ({**LLAMA, "dtype": "bfloat16"}, "bfloat16"),
    ({**LLAMA, "torch_dtype": "float16"}, "float16"),
    ({**LLAMA, "torch_dtype": "float16", "dtype": "float32"}, "float32"),
    ({**LLAMA, "torch_dtype": "torch.bfloat16"}, "bfloat16"),
    ({**VISION, "dtype": "float32", "text_config": {**LLAMA, "dtype": "float16"}}, "float32"),
    ({**VISION, "dtype": None, "text_config": {**LLAMA, "torch_dtype": "bfloat16"}}, "bfloat16"),
]
NONE_STATED: list[tuple[dict[str, Any], str]] = [
    (LLAMA, "none"),
    ({**LLAMA, "dtype": None}, "none"),
    ({**LLAMA, "dtype": {"": "bfloat16"}}, """'{"": "bfloat16"}'"""),
    ({**LLAMA, "dtype": 5}, "'5'"),
    ({**LLAMA, "dtype": None, "torch_dtype": [16] * 99}, f"'[{'16, ' * 19}16,'"),
    ({**LLAMA, "dtype": "float64"}, "'float64'"),
    (VISION, "none"),
]


def mixed_base(folder: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """Write a bfloat16 base with a norm and a router in float32, and an adapter on a weight and the router."""
    tensors = {
        "model.layers.0.q_proj.weight": random_tensor((12, 8)),
        "model.layers.0.router.weight": random_tensor((6, 8), torch.float32),
        "model.norm.weight": random_tensor((8,), torch.float32),
        "model.position_ids": torch.arange(4),
    }
    pairs = lora_pair("model.layers.0.q_proj", 12, 8) | lora_pair("model.layers.0.router", 6, 8)
    return write_base(folder / "base", [tensors], config), write_adapter(folder / "adapter", pairs)


@pytest.mark.parametrize(("config", "dtype"), STATED)
def test_auto_is_what_the_config_states_and_is_recorded_as_that(
    tmp_path: Path, config: dict[str, Any], dtype: str
) -> None:
    paths = mixed_base(tmp_path, config)
    plan = rawmerge.plan_merge(*paths, dtype="auto")
    assert plan == rawmerge.plan_merge(*paths, dtype=dtype)
    assert plan.options.dtype == dtype


@pytest.mark.parametrize("config", [config for config, _ in STATED if "vision_config" not in config])
def test_it_is_what_transformers_reads(tmp_path: Path, config: dict[str, Any]) -> None:
    text = json.dumps(config).replace("torch.bfloat16", "bfloat16")  # only torch's own name has no prefix there
    base, adapter = mixed_base(tmp_path, json.loads(text))
    stated = pytest.importorskip("transformers").AutoConfig.from_pretrained(base).dtype
    assert str(stated) == f"torch.{rawmerge.plan_merge(base, adapter, dtype='auto').options.dtype}"


@pytest.mark.parametrize(("config", "found"), NONE_STATED)
def test_a_config_without_such_a_dtype_is_refused(tmp_path: Path, config: dict[str, Any], found: str) -> None:
    with pytest.raises(PlanError) as caught:
        rawmerge.plan_merge(*mixed_base(tmp_path, config), dtype="auto")
    (problem,) = caught.value.problems
    assert (problem.subject, problem.found) == ("dtype in config.json", found)
    assert problem.expected == "one of float32, bfloat16, float16, for --dtype auto"


def test_without_it_float32_tensors_of_a_bfloat16_base_stay_float32(tmp_path: Path) -> None:
    base, adapter = mixed_base(tmp_path, {**LLAMA, "dtype": "bfloat16"})
    rawmerge.merge_adapter(base, adapter, tmp_path / "kept")
    rawmerge.merge_adapter(base, adapter, tmp_path / "auto", dtype="auto")
    before, factors = read_all(base), read_all(adapter)
    kept, auto = read_all(tmp_path / "kept"), read_all(tmp_path / "auto")
    router = "model.layers.0.router"
    pair = factors[f"{PREFIX}{router}.lora_A.weight"], factors[f"{PREFIX}{router}.lora_B.weight"]
    exact = merged(before[f"{router}.weight"], *pair, ALPHA / RANK)
    assert exact.dtype == torch.float32
    assert raw(kept[f"{router}.weight"]) == raw(exact)
    assert raw(auto[f"{router}.weight"]) == raw(exact.bfloat16())
    assert raw(kept["model.norm.weight"]) == raw(before["model.norm.weight"])
    assert raw(auto["model.norm.weight"]) == raw(before["model.norm.weight"].bfloat16())
    assert raw(auto["model.position_ids"]) == raw(before["model.position_ids"])
    weight = "model.layers.0.q_proj.weight"
    assert raw(auto[weight]) == raw(kept[weight])
    record = json.loads((tmp_path / "auto/rawmerge.json").read_text())
    assert record["options"]["dtype"] == "bfloat16"
    assert rawmerge.verify_merge(tmp_path / "auto", base, adapter).findings == ()
    assert rawmerge.verify_merge(tmp_path / "auto", base, adapter, dtype="auto").findings == ()


def test_the_command_takes_it(tmp_path: Path) -> None:
    paths = map(str, mixed_base(tmp_path, {**LLAMA, "dtype": "float16"}))
    done = CliRunner().invoke(cli, ["plan", *paths, "--dtype", "auto", "--json"])
    assert json.loads(done.stdout)["options"]["dtype"] == "float16"


def test_a_consuming_merge_goes_on_with_it(tmp_path: Path) -> None:
    layered = layered_merge(tmp_path)  # its config states bfloat16
    config = layered[0] / "config.json"
    config.write_text(config.read_text().replace("bfloat16", "float32"))
    rawmerge.merge_adapter(*layered, tmp_path / "golden", dtype="auto")
    cut_off(layered, tmp_path / "out", shard_name(2, 3), dtype="auto")
    with pytest.raises(OutputError, match="--dtype"):
        rawmerge.merge_adapter(*layered, tmp_path / "out", dtype="float16", consume_base=True)
    rawmerge.merge_adapter(*layered, tmp_path / "out", dtype="auto", consume_base=True)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "golden")
    again = ["merge", *map(str, layered), "-o", str(tmp_path / "out"), "--dtype", "auto", "--consume-base"]
    assert "this very merge, finished" in CliRunner().invoke(cli, again).stderr


def test_a_consuming_merge_of_no_dtype_does_not_go_on_with_it(tmp_path: Path) -> None:
    layered = layered_merge(tmp_path)
    cut_off(layered, tmp_path / "out", shard_name(2, 3))
    with pytest.raises(OutputError, match="--dtype"):
        rawmerge.merge_adapter(*layered, tmp_path / "out", dtype="auto", consume_base=True)
