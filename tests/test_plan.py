"""The decision: what a plan holds, and every refusal's class, text and hint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from rawmerge.errors import (
    AdapterError,
    CheckpointError,
    MissingFileError,
    PlanError,
    RefusedError,
    ShardFormatError,
    UnsupportedAdapterError,
)
from rawmerge.merge_plan import KeepTensor, ReplaceTensor, UpdateTensor
from tests.builders import PREFIX, lora_pair, random_tensor, write_adapter, write_base

Q = "model.layers.0.q_proj"
Paths = tuple[Path, Path]


def edit_config(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_plan_covers_every_base_tensor_once_in_file_order(tiny: Paths) -> None:
    plan = rawmerge.plan_merge(*tiny)
    names = [step.entry.name for step in plan.steps()]
    index = json.loads((tiny[0] / "model.safetensors.index.json").read_text())
    assert sorted(names) == sorted(index["weight_map"])
    kinds = {step.entry.name: type(step) for step in plan.steps()}
    assert kinds["model.norm.weight"] is KeepTensor
    assert kinds[f"{Q}.weight"] is UpdateTensor


def test_every_adapter_tensor_is_accounted_for(tiny: Paths) -> None:
    plan = rawmerge.plan_merge(*tiny)
    assert {use.name for use in plan.adapter_uses} == set(load_file(tiny[1] / "adapter_model.safetensors"))


def test_a_plan_survives_json(tiny: Paths) -> None:
    plan = rawmerge.plan_merge(*tiny, dtype="float32", compute_dtype="float64")
    assert rawmerge.parse_plan(rawmerge.format_plan(plan)) == plan


def test_a_plan_from_json_writes_the_same_bytes(tiny: Paths, tmp_path: Path) -> None:
    plan = rawmerge.plan_merge(*tiny)
    rawmerge.run_plan(plan, tmp_path / "one")
    rawmerge.run_plan(rawmerge.parse_plan(rawmerge.format_plan(plan)), tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": "rawmerge-plan-0"}', "nonsense", '{"a": "\ud800"}'])
def test_json_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="plan"):
        rawmerge.parse_plan(text)


def step_of(plan: Any, number: int = 1) -> Any:
    return plan["shards"][0]["steps"][number]


CONTRADICTIONS: dict[str, Callable[[Any], Any]] = {
    "a dtype that there is not": lambda plan: step_of(plan)["source"].update(dtype="F31"),
    "a dtype of the output that there is not": lambda plan: step_of(plan)["entry"].update(dtype="F31"),
    "a factor's dtype": lambda plan: step_of(plan)["updates"][0]["tensors"]["lora_a"].update(dtype="F31"),
    "a dtype of the base that there is not": lambda plan: step_of(plan).update(base_dtype="F31"),
    "a negative size": lambda plan: step_of(plan)["source"].update(shape=[-12, -8]),
    "a place before the file": lambda plan: step_of(plan)["source"].update(offset=-1),
    "more bytes than its shape": lambda plan: step_of(plan)["source"].update(byte_count=2**40),
    "a size that is true": lambda plan: step_of(plan)["source"].update(shape=[True]),
    "a kept tensor of another shape": lambda plan: step_of(plan, 0)["source"].update(shape=[8, 20]),
    "a tensor less": lambda plan: plan["shards"][0]["steps"].pop(),
    "a tensor twice": lambda plan: plan["shards"][0]["steps"].append(step_of(plan)),
    "a tensor of another name": lambda plan: step_of(plan)["entry"].update(name="other"),
    "a header that is none": lambda plan: plan["shards"][0].update(header_text="{"),
    "a header of other tensors": lambda plan: plan["shards"][0].update(header_text="{}"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_plan_that_contradicts_itself_is_refused(tiny: Paths, what: str) -> None:
    document = json.loads(rawmerge.format_plan(rawmerge.plan_merge(*tiny)))
    CONTRADICTIONS[what](document)
    with pytest.raises(PlanError):
        rawmerge.parse_plan(json.dumps(document))


@pytest.mark.parametrize(
    "option",
    [
        {"compute_dtype": "int8"},
        {"dtype": "float8"},
        {"vocab": "shrink"},
        {"tokenizer": "mine"},
        {"moe_lora_b_layout": "other"},
    ],
)
def test_an_option_outside_its_choices_is_a_programmers_error(tiny: Paths, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        rawmerge.plan_merge(*tiny, **option)


def drop(ending: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(f"{PREFIX}{Q}.{ending}")


def put(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.__setitem__(name, torch.ones(shape))


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"


@dataclass(frozen=True)
class Bad:
    """An adapter gone wrong, and what the refusal must say."""

    change: Callable[[dict[str, torch.Tensor]], object]
    error: type[RefusedError]
    says: str


BAD_TENSORS = {
    "A without B": Bad(drop("lora_B.weight"), AdapterError, r"lora_A\.weight.*its partner lora_b"),
    "B without A": Bad(drop("lora_A.weight"), AdapterError, r"lora_B\.weight.*its partner lora_a"),
    "another base": Bad(put(A, 4, 9), PlanError, r"a delta of \[12, 9\]"),
    "rank unlike partner": Bad(put(B, 12, 3), PlanError, r"lora_B.*expected rank 4 like lora_a, found rank 3"),
    "rank unlike config": Bad(
        lambda tensors: (put(A, 5, 8)(tensors), put(B, 12, 5)(tensors)), PlanError, "rank 4 as the config says.*rank 5"
    ),
    "empty tensor": Bad(put(A, 0), PlanError, r"shape \[0\](.|\n)*ZeRO-3"),
    "no such module": Bad(rename("layers.0", "layers.7"), PlanError, r"a base tensor 'model\.layers\.7\.q_proj"),
    "DoRA magnitude": Bad(put(f"{PREFIX}{Q}.lora_magnitude_vector", 12), PlanError, "lora_magnitude_vector.*LoRA uses"),
    "LoRA bias": Bad(
        put(f"{PREFIX}{Q}.lora_B.bias", 12), PlanError, r"'model\.layers\.0\.q_proj\.bias' that this bias"
    ),
    "trained bias": Bad(
        put(f"{PREFIX}{Q}.base_layer.bias", 12), UnsupportedAdapterError, "or a bias that the config trains"
    ),
    "token rows": Bad(
        put(f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 8),
        PlanError,
        "trainable_token_indices that say which rows",
    ),
    "one module under two names": Bad(
        lambda tensors: tensors.update({name.replace(PREFIX, "_orig_mod."): tensors[name].clone() for name in (A, B)}),
        AdapterError,
        "each tensor once",
    ),
    "one module at two depths": Bad(
        lambda tensors: tensors.update(
            {name.replace(f"{PREFIX}model.", PREFIX): tensors[name].clone() for name in (A, B)}
        ),
        PlanError,
        "one pair for 'model.layers.0.q_proj.weight'",
    ),
    "two adapters": Bad(
        lambda tensors: (
            rename("layers.0.q_proj.lora_A", "layers.0.q_proj.lora_A.mine")(tensors),
            rename("layers.1.q_proj.lora_A", "layers.1.q_proj.lora_A.yours")(tensors),
        ),
        AdapterError,
        "those of 2: 'mine', 'yours'",
    ),
    "undeclared tensor": Bad(put(f"{PREFIX}model.norm.weight", 8), UnsupportedAdapterError, "modules_to_save"),
    "no tensor": Bad(lambda tensors: tensors.clear(), PlanError, "no tensor at all"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_bad_adapter_is_refused_by_tensor_name(tiny: Paths, tmp_path: Path, name: str) -> None:
    bad = BAD_TENSORS[name]
    edit_tensors(tiny[1], bad.change)
    with pytest.raises(bad.error, match=bad.says):
        rawmerge.merge_adapter(*tiny, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


GOOD_NAMES = {
    "one prefix too many": rename("model.model.model", "model.model.model.model"),
    "one prefix too few": rename("model.model.model", "model.model"),
    "no PEFT prefix": rename(PREFIX, ""),
    "adapter name left in": rename(".weight", ".default.weight"),
    "compiled": rename(PREFIX, f"_orig_mod.{PREFIX}"),
    "another tower's text model": rename("model.model.model", "model.model.language_model"),
}


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_other_names_of_the_same_modules_are_found(tiny: Paths, name: str) -> None:
    expected = [(step.entry, type(step)) for step in rawmerge.plan_merge(*tiny).steps()]
    edit_tensors(tiny[1], GOOD_NAMES[name])
    plan = rawmerge.plan_merge(*tiny)
    assert [(step.entry, type(step)) for step in plan.steps()] == expected
    assert {use.use for use in plan.adapter_uses} == {"updates"}


BAD_FIELDS: dict[str, tuple[dict[str, Any], type[RefusedError], str]] = {
    "missing alpha": ({"lora_alpha": ...}, AdapterError, "'lora_alpha'.*found nothing"),
    "zero alpha": ({"lora_alpha": 0}, AdapterError, "'lora_alpha'.*found 0"),
    "zero rank": ({"r": 0}, AdapterError, "'r'.*found 0"),
    "zero in alpha_pattern": ({"alpha_pattern": {"q_proj": 0}}, AdapterError, "alpha_pattern.*q_proj"),
    "a pattern that takes for ever": (
        {"rank_pattern": {"(a+)+b": 4}},
        AdapterError,
        "none of a group",
    ),
    "unknown field": ({"use_magic": True}, UnsupportedAdapterError, "'use_magic'"),
    "QALoRA": ({"use_qalora": True}, UnsupportedAdapterError, "'use_qalora'"),
    "bias": ({"bias": "some"}, AdapterError, "'bias'.*'some'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, UnsupportedAdapterError, "'init_lora_weights'.*pissa"),
    "another type": ({"peft_type": "LILY"}, UnsupportedAdapterError, "'peft_type'.*LILY(.|\n)*router"),
    "unknown type": (
        {"peft_type": "LORA2"},
        UnsupportedAdapterError,
        "'peft_type': expected one of LORA, ADALORA.*'LORA2'",
    ),
    "no type": ({"peft_type": ...}, UnsupportedAdapterError, "'peft_type'.*none"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_bad_config_is_refused_by_field_name(tiny: Paths, name: str) -> None:
    fields, error, says = BAD_FIELDS[name]
    edit_config(tiny[1], **fields)
    with pytest.raises(error, match=says):
        rawmerge.plan_merge(*tiny)


def test_all_problems_of_base_and_adapter_come_at_once(tiny: Paths) -> None:
    edit_config(tiny[1], use_qalora=True, lora_alpha=0, use_magic=1)
    (tiny[0] / "model-00001-of-00002.safetensors").write_bytes(b"short")
    with pytest.raises(PlanError) as caught:
        rawmerge.plan_merge(*tiny)
    text = str(caught.value)
    assert text.startswith("4 problems")
    for part in ("use_qalora", "lora_alpha", "use_magic", "model-00001-of-00002.safetensors"):
        assert part in text


def test_all_unmatched_tensors_come_at_once(tiny: Paths) -> None:
    edit_tensors(tiny[1], rename("q_proj", "q_prok"))
    with pytest.raises(PlanError) as caught:
        rawmerge.plan_merge(*tiny)
    assert len(caught.value.problems) == 2
    assert "did you mean 'model.layers.0.q_proj.weight'" in str(caught.value)


def test_a_pair_on_packed_weights_is_refused(tmp_path: Path) -> None:
    packed = torch.zeros(6, 5, dtype=torch.float8_e4m3fn)
    base = write_base(tmp_path / "base", [{"q.weight": packed}])
    with pytest.raises(PlanError, match=r"'q\.weight': expected a plain float dtype.*found F8_E4M3"):
        rawmerge.plan_merge(base, write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5)))


@pytest.mark.parametrize("ending", ["qweight", "weight_packed"])
def test_a_pair_on_a_packed_base_is_told_to_take_the_unquantised_one(tmp_path: Path, ending: str) -> None:
    base = write_base(tmp_path / "base", [{f"q.{ending}": torch.zeros(6, 5, dtype=torch.int32)}])
    with pytest.raises(PlanError, match=rf"found packed weights, 'q\.{ending}'(.|\n)*unquantised base"):
        rawmerge.plan_merge(base, write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5)))


def square(folder: Path, base_config: dict[str, Any], **fields: Any) -> Paths:
    base = write_base(folder / "base", [{"h.0.c_proj.weight": random_tensor((6, 6))}], base_config)
    return base, write_adapter(folder / "adapter", lora_pair("h.0.c_proj", 6, 6), **fields)


def is_transposed(plan: rawmerge.MergePlan, name: str) -> bool:
    step = next(step for step in plan.steps() if step.entry.name == name)
    assert isinstance(step, UpdateTensor)
    return bool(step.updates[0].settings["is_transposed"])


@pytest.mark.parametrize(
    ("model_type", "flag", "expected"), [("gpt2", False, True), ("llama", False, False), ("llama", True, False)]
)
def test_a_square_weight_s_layout_comes_from_its_family(
    tmp_path: Path, model_type: str, flag: bool, expected: bool
) -> None:
    plan = rawmerge.plan_merge(*square(tmp_path, {"model_type": model_type}, fan_in_fan_out=flag))
    assert is_transposed(plan, "h.0.c_proj.weight") is expected


def test_a_square_weight_of_undecidable_layout_is_refused(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base", [{"c_attn.weight": random_tensor((6, 18)), "c_proj.weight": random_tensor((6, 6))}], {"a": 1}
    )
    pairs = lora_pair("c_attn", 18, 6) | lora_pair("c_proj", 6, 6)
    with pytest.raises(PlanError, match=r"'c_proj\.weight': expected a known layout"):
        rawmerge.plan_merge(base, write_adapter(tmp_path / "adapter", pairs, fan_in_fan_out=False))


def test_a_square_weight_follows_modules_of_its_name(tmp_path: Path) -> None:
    tensors = {"attn.c_proj.weight": random_tensor((6, 6)), "mlp.c_proj.weight": random_tensor((24, 6))}
    base = write_base(tmp_path / "base", [tensors], {"model_type": "own", "auto_map": {"AutoModel": "own.Model"}})
    pairs = lora_pair("attn.c_proj", 6, 6) | lora_pair("mlp.c_proj", 6, 24)
    plan = rawmerge.plan_merge(base, write_adapter(tmp_path / "adapter", pairs))
    assert is_transposed(plan, "attn.c_proj.weight")


def test_the_flag_alone_settles_no_square_weight(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"'h\.0\.c_proj\.weight': expected a known layout"):
        rawmerge.plan_merge(*square(tmp_path, {"a": 1}, fan_in_fan_out=True))


def test_modules_to_save_replace_and_are_told(tiny: Paths, tmp_path: Path) -> None:
    trained = torch.arange(8.0) / 3
    edit_tensors(tiny[1], lambda tensors: tensors.__setitem__(f"{PREFIX}model.norm.weight", trained))
    edit_config(tiny[1], modules_to_save=["norm"])
    plan = rawmerge.plan_merge(*tiny)
    assert [step.entry.name for step in plan.steps() if isinstance(step, ReplaceTensor)] == ["model.norm.weight"]
    rawmerge.run_plan(plan, tmp_path / "out")
    after = load_file(tmp_path / "out/model-00002-of-00002.safetensors")["model.norm.weight"]
    assert torch.equal(after, trained.bfloat16())


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("model.norm", (9,), r"expected the base's shape \[8\], found \[9\]"),
        ("model.embed_tokens", (20, 9), r"expected the base's shape \[20, 8\], found \[20, 9\]"),
        ("model.embed_tokens", (19, 8), "1 rows less than the base's, which may be padded; --vocab overlay"),
    ],
)
def test_a_replacement_that_does_not_fit_is_refused(tiny: Paths, name: str, shape: tuple[int, ...], says: str) -> None:
    edit_tensors(tiny[1], put(f"{PREFIX}{name}.weight", *shape))
    edit_config(tiny[1], modules_to_save=["norm", "score"])
    with pytest.raises(PlanError, match=says):
        rawmerge.plan_merge(*tiny)


def embedding_adapter(folder: Path) -> Path:
    pair = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": random_tensor((4, 20), torch.float32),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": random_tensor((8, 4), torch.float32),
    }
    return write_adapter(folder / "adapter", pair)


def tied_base(folder: Path, **fields: Any) -> Path:
    config = {"model_type": "llama", "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"], **fields}
    return write_base(folder / "base", [{"model.embed_tokens.weight": random_tensor((20, 8))}], config)


def test_a_tied_input_embedding_is_untied_by_a_delta(tmp_path: Path) -> None:
    base = tied_base(tmp_path)
    rawmerge.merge_adapter(base, embedding_adapter(tmp_path), tmp_path / "out")
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    after = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(after["lm_head.weight"], before)
    assert not torch.equal(after["model.embed_tokens.weight"], before)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_embedding_under_an_unknown_name_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"], "tie_word_embeddings": True}
    base = write_base(tmp_path / "base", [{"backbone.embeddings.weight": random_tensor((20, 8))}], config)
    pair = {
        f"{PREFIX}backbone.embeddings.lora_embedding_A": random_tensor((4, 20), torch.float32),
        f"{PREFIX}backbone.embeddings.lora_embedding_B": random_tensor((8, 4), torch.float32),
    }
    with pytest.raises(UnsupportedAdapterError, match="tied embeddings in OwnForCausalLM"):
        rawmerge.plan_merge(base, write_adapter(tmp_path / "adapter", pair))


def test_a_tie_stated_in_a_nested_config_counts(tmp_path: Path) -> None:
    nested = {"text_config": {"model_type": "qwen2", "tie_word_embeddings": True}}
    config = {"model_type": "own", "architectures": ["OwnForConditionalGeneration"], **nested}
    base = write_base(tmp_path / "base", [{"model.embed_tokens.weight": random_tensor((20, 8))}], config)
    with pytest.raises(UnsupportedAdapterError, match="tied embeddings in OwnForConditionalGeneration"):
        rawmerge.plan_merge(base, embedding_adapter(tmp_path))


def test_a_tied_embedding_with_an_unknown_head_is_refused(tmp_path: Path) -> None:
    base = tied_base(tmp_path, architectures=["T5ForConditionalGeneration"])
    with pytest.raises(UnsupportedAdapterError, match="T5ForConditionalGeneration"):
        rawmerge.plan_merge(base, embedding_adapter(tmp_path))


def dead_link(name: str) -> Callable[[Path], object]:
    def change(base: Path) -> None:
        (base / name).unlink()
        (base / name).symlink_to(base / "nothing")

    return change


BAD_BASES: dict[str, tuple[Callable[[Path], object], type[RefusedError], str]] = {
    "a shard is missing": (
        lambda base: (base / "model-00002-of-00002.safetensors").rename(base / "x"),
        MissingFileError,
        "model-00002-of-00002.safetensors",
    ),
    "a shard is cut": (
        lambda base: (base / "model-00002-of-00002.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}"),
        ShardFormatError,
        "model-00002-of-00002.safetensors",
    ),
    "the index lists a tensor that its shard lacks": (
        lambda base: save_file({"other": torch.ones(2)}, base / "model-00002-of-00002.safetensors"),
        CheckpointError,
        r"'model\.norm\.weight': expected it in model-00002",
    ),
    "two shards hold one tensor": (
        lambda base: save_file(
            {**load_file(base / "model-00001-of-00002.safetensors"), "model.norm.weight": torch.ones(8)},
            base / "model-00001-of-00002.safetensors",
        ),
        CheckpointError,
        r"'model\.norm\.weight': expected it in one shard",
    ),
    "the index is empty": (
        lambda base: (base / "model.safetensors.index.json").write_bytes(b""),
        CheckpointError,
        "index.json",
    ),
    "the index is a link to nothing": (dead_link("model.safetensors.index.json"), MissingFileError, "index.json"),
    "config is a link to nothing": (dead_link("config.json"), MissingFileError, "config.json"),
    "config is no JSON": (lambda base: (base / "config.json").write_text("{,}"), CheckpointError, "config.json"),
    "no weights": (
        lambda base: [path.rename(path.with_suffix(".old")) for path in base.glob("*.s*")],
        MissingFileError,
        "no \\*.safetensors",
    ),
    "the index leaves the folder": (
        lambda base: (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}'),
        CheckpointError,
        "plain",
    ),
}


@pytest.mark.parametrize("name", BAD_BASES)
def test_a_bad_base_is_refused(tiny: Paths, tmp_path: Path, name: str) -> None:
    change, error, says = BAD_BASES[name]
    change(tiny[0])
    with pytest.raises(error, match=says):
        rawmerge.merge_adapter(*tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stale_weight_sets_do_not_count_and_are_not_copied(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    for stale in ("model-00001-of-00004.safetensors", "consolidated.safetensors", "pytorch_model.bin", "x.gguf"):
        (base / stale).write_bytes(b"not even a header")
    plan = rawmerge.plan_merge(base, adapter)
    rawmerge.run_plan(plan, tmp_path / "out")
    assert len(plan.left_out) == 4
    assert not {item.name for item in plan.left_out} & {path.name for path in (tmp_path / "out").iterdir()}


def test_shards_in_a_hub_cache_are_links_that_are_read_but_not_copied_as_links(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(blobs / f"{number}")
        path.symlink_to(blobs / f"{number}")
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before


def test_swapped_arguments_are_told(tiny: Paths) -> None:
    with pytest.raises(RefusedError, match=r"found an adapter(.|\n)*the base comes first"):
        rawmerge.plan_merge(tiny[1], tiny[0])


def test_one_shard_of_several_is_no_base(tiny: Paths) -> None:
    with pytest.raises(CheckpointError, match=r"found one of 2 shards(.|\n)*name the folder"):
        rawmerge.plan_merge(tiny[0] / "model-00001-of-00002.safetensors", tiny[1])


def test_a_base_in_a_sub_folder_is_pointed_to(tiny: Paths, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name/snapshots"
    cache.mkdir(parents=True)
    tiny[0].rename(cache / "0123abcd")
    with pytest.raises(MissingFileError, match="did you mean a folder in it: snapshots/0123abcd"):
        rawmerge.plan_merge(tmp_path / "models--org--name", tiny[1])


def test_the_config_files_stand_for_their_folders(tiny: Paths) -> None:
    base, adapter = tiny
    plan = rawmerge.plan_merge(base / "model.safetensors.index.json", adapter / "adapter_config.json")
    assert plan == rawmerge.plan_merge(base, adapter)


def test_a_plan_runs_from_another_folder(tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny[0].parent)
    plan = rawmerge.plan_merge("base", "adapter")
    monkeypatch.chdir("/")
    rawmerge.run_plan(plan, tmp_path / "out")
    assert (tmp_path / "out/config.json").exists()


def test_a_saved_head_of_a_tied_base_is_written_and_the_tie_undone(tmp_path: Path) -> None:
    head = {f"{PREFIX}lm_head.weight": torch.ones(20, 8)}
    adapter = write_adapter(tmp_path / "adapter", head, modules_to_save=["lm_head"])
    plan = rawmerge.plan_merge(tied_base(tmp_path), adapter)
    assert [(use.use, use.tensor_name) for use in plan.adapter_uses] == [("adds", "lm_head.weight")]
    assert [step.entry.dtype for step in plan.steps() if step.entry.name == "lm_head.weight"] == ["BF16"]
    [config, _] = plan.written_files
    assert json.loads(config.text)["tie_word_embeddings"] is False


@pytest.mark.parametrize(("name", "notes"), [("somewhere/base", 0), ("org/another", 1)])
def test_a_base_of_another_name_is_noted(tiny: Paths, name: str, notes: int) -> None:
    edit_config(tiny[1], base_model_name_or_path=name)
    assert len(rawmerge.plan_merge(*tiny).notes) == notes


def test_an_adapter_in_a_sub_folder_is_pointed_to(tiny: Paths, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    tiny[1].rename(outer / "checkpoint-500")
    with pytest.raises(MissingFileError, match="did you mean a folder in it: checkpoint-500"):
        rawmerge.plan_merge(tiny[0], outer)


def test_a_file_that_is_no_pickle_is_refused_with_the_way_out(tiny: Paths) -> None:
    (tiny[1] / "adapter_model.safetensors").rename(tiny[1] / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"zip archive(.|\n)*safe_serialization"):
        rawmerge.plan_merge(*tiny)


def test_names_with_control_characters_are_escaped_in_messages(tiny: Paths) -> None:
    edit_tensors(tiny[1], put(f"{PREFIX}evil\x1b[31m\n.lora_A.weight", 4, 8))
    with pytest.raises(RefusedError) as caught:
        rawmerge.plan_merge(*tiny)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", str(caught.value))
    assert r"evil\x1b[31m\n" in str(caught.value)
