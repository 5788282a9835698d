"""`--as-llamafactory` beside what LLaMA-Factory does: load as the config says, merge with PEFT in turn, cast, save.

Source: LLaMA-Factory `model/loader.py`, `model/adapter.py`, `train/tuner.py` (`export_model`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from rawmerge.inputs.base_checkpoint import read_base
from rawmerge.saved_model import layout_request, meta_model
from rawmerge.saved_model.peft_differences import FUSED_TARGETS, not_loaded_by_peft
from tests.parity import expert_models as experts
from tests.parity import family_models as families
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
modeling_utils = pytest.importorskip("transformers.modeling_utils")
_torch = pytest.importorskip("huggingface_hub.serialization._torch")

pytestmark = [pytest.mark.parity, *oracle.QUIET]

INDEX: Final = "model.safetensors.index.json"
ATTENTION: Final[dict[str, Any]] = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"]}
Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program that asks transformers run here, but for where the process is what is tested: it takes 10 s."""

    def answer(text: str, _: str) -> str:
        with monkeypatch.context() as patch:  # that process does not mend what it changes in the libraries
            patch.setattr(modeling_utils, "safe_save_file", modeling_utils.safe_save_file)
            patch.setattr(_torch, "get_torch_storage_id", _torch.get_torch_storage_id)
            return json.dumps(meta_model._answer(json.loads(text)))

    if "own_process" not in request.fixturenames:
        monkeypatch.setattr(layout_request, "_answer", answer)


@pytest.fixture
def own_process() -> None:
    """Ask transformers in a process of its own, as users do."""


def tied_qwen2() -> Any:
    """Biases in the attention, one embedding for input and output."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return transformers.Qwen2Config(**sizes, **heads, tie_word_embeddings=True)


def edited(base: Path, edit: Edit) -> Path:
    """Change the tensors of a base; all get into one file, and what only transformers would drop may be among them."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (base / INDEX).unlink(missing_ok=True)
    edit(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


def llamafactory(
    base: Path, adapters: Sequence[Path], output: Path, *, infer_dtype: str, size: str, auto: str = tiny.CAUSAL
) -> Path:
    """Do what LLaMA-Factory does, on the CPU."""
    model: Any = oracle.load_pretrained(base, auto)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    dtype = model.config.dtype if infer_dtype == "auto" else getattr(torch, infer_dtype)
    model.config.dtype = dtype
    model.to(dtype).save_pretrained(output, max_shard_size=size)
    return output


def weights(folder: Path) -> Mapping[str, bytes]:
    """Return the bytes of all weight files and of their index."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if "model" in path.name and path.is_file()}


def check(
    base: Path,
    adapters: Sequence[Path],
    tmp_path: Path,
    *,
    infer_dtype: str = "auto",
    size: str = "20KB",
    auto: str = tiny.CAUSAL,
) -> rawmerge.MergePlan:
    """Export in both ways; names and bytes of all weight files and of the index must be equal. Return our plan."""
    theirs = llamafactory(base, adapters, tmp_path / "theirs", infer_dtype=infer_dtype, size=size, auto=auto)
    file = {"model_name_or_path": str(base), "export_dir": str(tmp_path / "ours"), "infer_dtype": infer_dtype}
    file["adapter_name_or_path"] = ",".join(map(str, adapters))
    (tmp_path / "merge.json").write_text(json.dumps(file))
    count = int(size.removesuffix("KB")) * 1000  # export_size is in gigabytes
    job = replace(rawmerge.read_export(tmp_path / "merge.json").as_llamafactory(), max_shard_size=count)
    rawmerge.run_export(job, verify=True)
    ours, expected = weights(tmp_path / "ours"), weights(theirs)
    assert sorted(ours) == sorted(expected)
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), oracle.read_tensors(theirs))
    assert ours == expected
    assert rawmerge.verify_merge(tmp_path / "ours", base, list(adapters)).findings == ()
    return rawmerge.plan_merge(base, list(adapters), dtype=job.dtype, like="llamafactory", max_shard_size=size)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A base in bfloat16, of several shards."""
    return oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.llama(), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.usefixtures("own_process")
def test_the_program_answers_in_a_process_of_its_own(tmp_path: Path, llama: Path) -> None:
    adapter = oracle.save_adapter(oracle.pretrained(llama, tiny.CAUSAL), tmp_path / "adapter", **ATTENTION)
    check(llama, [adapter], tmp_path)


@pytest.mark.parametrize("size", ["8KB", "40KB", "900KB"])
def test_shards_and_index_are_equal_in_all_their_bytes(tmp_path: Path, llama: Path, size: str) -> None:
    adapter = oracle.save_adapter(oracle.pretrained(llama, tiny.CAUSAL), tmp_path / "adapter", **ATTENTION)
    plan = check(llama, [adapter], tmp_path, size=size)
    assert (len(plan.shards) == 1) == (size == "900KB")


@pytest.mark.parametrize("infer_dtype", ["float16", "float32"])
def test_another_dtype_is_rounded_after_the_merge(tmp_path: Path, llama: Path, infer_dtype: str) -> None:
    load = oracle.pretrained(llama, tiny.CAUSAL)
    parts: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=4, lora_alpha=7, **parts)
    oracle.recast_adapter(adapter, torch.float32)  # what is stored whole is rounded to the base's dtype on the way
    check(llama, [adapter], tmp_path, infer_dtype=infer_dtype)


@pytest.mark.parametrize("infer_dtype", ["auto", "float16"])
def test_several_adapters_are_rounded_after_each(tmp_path: Path, llama: Path, infer_dtype: str) -> None:
    load = oracle.pretrained(llama, tiny.CAUSAL)
    one = oracle.save_adapter(load, tmp_path / "one", **ATTENTION)
    two = oracle.save_adapter(load, tmp_path / "two", r=4, lora_alpha=7, target_modules=["q_proj", "k_proj"])
    check(llama, [one, two], tmp_path, infer_dtype=infer_dtype)


def test_tensors_of_another_dtype_are_cast_before_the_merge(tmp_path: Path, llama: Path) -> None:
    adapter = oracle.save_adapter(oracle.pretrained(llama, tiny.CAUSAL), tmp_path / "adapter", **ATTENTION)

    def in_float32(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "norm" in name or "layers.1.self_attn.q_proj" in name]:
            tensors[name] = tensors[name].float() * 1.001  # what bfloat16 does not hold

    base = edited(llama, in_float32)
    for infer_dtype in ("auto", "float16"):
        (tmp_path / infer_dtype).mkdir()
        plan = check(base, [adapter], tmp_path / infer_dtype, infer_dtype=infer_dtype)
        assert [note for note in plan.notes if note.startswith("cast before the merge")] == [
            "cast before the merge, as LlamaForCausalLM of transformers "
            f"{transformers.__version__} loads them: 6 tensors, 'model.layers.*.input_layernorm.weight', "
            "'model.layers.*.post_attention_layernorm.weight', 'model.layers.*.self_attn.q_proj.weight', "
            "'model.norm.weight'"
        ]


def test_tensors_that_the_class_does_not_know_are_dropped(tmp_path: Path, llama: Path) -> None:
    adapter = oracle.save_adapter(oracle.pretrained(llama, tiny.CAUSAL), tmp_path / "adapter", **ATTENTION)

    def with_predictor(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.embed_tokens.weight"] = torch.ones(96, 64, dtype=torch.bfloat16)
        tensors["mtp.fc.weight"] = torch.ones(64, 128, dtype=torch.bfloat16)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    plan = check(edited(llama, with_predictor), [adapter], tmp_path)
    assert [note for note in plan.notes if note.startswith("dropped")] == [
        f"dropped, for LlamaForCausalLM of transformers {transformers.__version__} does not save them: 3 tensors, "
        "'model.layers.*.self_attn.rotary_emb.inv_freq', 'model.layers.*.embed_tokens.weight', 'mtp.fc.weight'"
    ]


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning:peft")
@pytest.mark.parametrize("stored", ["once", "twice", "twice, with other values"])
def test_tied_embeddings(tmp_path: Path, stored: str) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tied_qwen2(), torch.bfloat16)
    adapter = oracle.save_adapter(oracle.pretrained(base, tiny.CAUSAL), tmp_path / "adapter", **ATTENTION)

    def store(tensors: dict[str, torch.Tensor]) -> None:
        if stored != "once":
            factor = 2 if "other" in stored else 1
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor

    plan = check(edited(base, store), [adapter], tmp_path)
    names = {step.entry.name for step in plan.steps()}
    assert ("lm_head.weight" in names) == (stored == "twice, with other values")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("infer_dtype", ["auto", "float16"])
def test_experts_with_routers_in_float32(tmp_path: Path, name: str, infer_dtype: str) -> None:
    config = experts.FAMILIES[name].build()
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, config, torch.bfloat16)
    targets = ["q_proj", "v_proj"] if name != "deepseek_v3" else ["q_a_proj", "o_proj"]
    adapter = oracle.save_adapter(
        oracle.pretrained(base, tiny.CAUSAL), tmp_path / "adapter", r=4, lora_alpha=7, target_modules=targets
    )

    def in_float32(tensors: dict[str, torch.Tensor]) -> None:
        for at in [at for at in tensors if ".gate." in at]:
            tensors[at] = tensors[at].float() * 1.001

    check(edited(base, in_float32), [adapter], tmp_path, infer_dtype=infer_dtype, size="10KB")


def test_layers_stored_the_other_way_round(tmp_path: Path) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.gpt2(), torch.bfloat16)
    adapter = oracle.save_adapter(
        oracle.pretrained(base, tiny.CAUSAL), tmp_path / "adapter", r=6, lora_alpha=9, target_modules=["c_attn"]
    )
    check(base, [adapter], tmp_path, infer_dtype="float16")


def test_a_kind_that_looks_at_the_base(tmp_path: Path, llama: Path) -> None:
    load = oracle.pretrained(llama, tiny.CAUSAL)
    one = oracle.save_adapter(load, tmp_path / "one", r=4, lora_alpha=7, target_modules=["q_proj"], use_dora=True)
    two = oracle.save_adapter(load, tmp_path / "two", r=4, lora_alpha=7, target_modules=["q_proj", "embed_tokens"])
    check(llama, [one, two], tmp_path, infer_dtype="float16")


@pytest.mark.parametrize("name", ["qwen2-vl", "llava"])
def test_a_model_that_sees(tmp_path: Path, name: str) -> None:
    family = families.FAMILIES[name]
    base = oracle.save_base(tmp_path / "base", family.auto, family.config(), torch.bfloat16)
    adapter = oracle.save_adapter(oracle.pretrained(base, family.auto), tmp_path / "adapter", **ATTENTION)
    check(base, [adapter], tmp_path, auto=families.VLM)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_delta_on_all_experts(tmp_path: Path, name: str) -> None:
    family = experts.FAMILIES[name]
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, family.build(), torch.bfloat16)
    parts: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": family.targets()}
    adapter = oracle.save_adapter(
        oracle.pretrained(base, tiny.CAUSAL), tmp_path / "adapter", r=4, lora_alpha=7, **parts
    )
    check(base, [adapter], tmp_path, size="10KB")


@pytest.mark.usefixtures("own_process")
def test_code_beside_the_base_is_not_run(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = oracle.save_adapter(oracle.pretrained(llama, tiny.CAUSAL), tmp_path / "adapter", **ATTENTION)
    config = json.loads((llama / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "transformers.Config", "AutoModelForCausalLM": "transformers.Model"}
    (llama / "config.json").write_text(json.dumps(config))
    for name in ("transformers", "torch", "json"):
        (llama / f"{name}.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n")
    monkeypatch.chdir(llama)
    plan = rawmerge.plan_merge(llama, adapter, like="llamafactory")
    assert not (tmp_path / "was_run").exists()
    assert any(note.startswith("the base brings code of its own, which is never run") for note in plan.notes)


def refused(base: Path, adapter: Path) -> dict[str, rawmerge.Problem]:
    with pytest.raises(rawmerge.RefusedError) as caught:
        rawmerge.plan_merge(base, adapter, like="llamafactory")
    return {problem.subject: problem for problem in caught.value.problems}


def test_what_llamafactory_would_lose_or_mix_up_is_refused(tmp_path: Path) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tied_qwen2(), torch.bfloat16)
    load = oracle.pretrained(base, tiny.CAUSAL)
    one_side = oracle.save_adapter(load, tmp_path / "one", r=4, target_modules=["embed_tokens", "q_proj"])
    found = refused(base, one_side)
    assert found["tie_word_embeddings"].found == "an adapter after which the two sides differ"
    assert "PEFT changes both sides" in found["tie_word_embeddings"].hint


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning:peft")
@pytest.mark.parametrize("ensured", [False, True])
def test_both_sides_of_a_tie_replaced_are_saved_as_two(tmp_path: Path, ensured: bool) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tied_qwen2(), torch.bfloat16)
    saved: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": ensured}
    adapter = oracle.save_adapter(oracle.pretrained(base, tiny.CAUSAL), tmp_path / "adapter", **ATTENTION, **saved)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    if ensured:
        check(base, [adapter], tmp_path)
        return
    theirs = llamafactory(base, [adapter], tmp_path / "theirs", infer_dtype="auto", size="900KB")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(oracle.read_tensors(theirs))
    assert set(refused(base, adapter)) == {"modules_to_save"}


def test_repeated_layers_are_refused_as_they_are_by_transformers(tmp_path: Path, llama: Path) -> None:
    adapter = oracle.save_adapter(
        oracle.pretrained(llama, tiny.CAUSAL), tmp_path / "adapter", **ATTENTION, layer_replication=[[0, 2], [1, 2]]
    )
    with pytest.raises(RuntimeError, match="shared tensors"):
        llamafactory(llama, [adapter], tmp_path / "theirs", infer_dtype="auto", size="900KB")
    assert set(refused(llama, adapter)) == {"layer_replication"}


def old_adapter(base: Path, folder: Path) -> Path:
    """Write what transformers 4 with PEFT would have made of all MLPs and experts of a base, and of its attention."""
    tensors, names = {}, ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
    generator = torch.Generator().manual_seed(3)
    for name, weight in oracle.read_tensors(base).items():
        if name.removesuffix(".weight").endswith(names):
            for factor, shape in (("A", (4, weight.shape[1])), ("B", (weight.shape[0], 4))):
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_{factor}.weight"
                tensors[key] = torch.randn(shape, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({key.rsplit(".", 3)[-3] for key in tensors})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 7, "target_modules": targets, "peft_version": "0.17.1"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


SOME_LEFT_OUT = {"qwen2_moe": 30, "qwen3_next": 6, "deepseek_v3": 6, "jamba": 30, "lfm2_moe": 15, "phimoe": 30}


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning:peft")
@pytest.mark.parametrize("name", [*SOME_LEFT_OUT, "mixtral", "olmoe"])
def test_what_peft_does_not_load_of_an_old_adapter_is_told(tmp_path: Path, name: str) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, experts.FAMILIES[name].build(), torch.bfloat16)
    adapter = old_adapter(base, tmp_path / "adapter")
    theirs = llamafactory(base, [adapter], tmp_path / "theirs", infer_dtype="auto", size="900KB")
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours", like="llamafactory", max_shard_size="900KB")
    before, ours, expected = (oracle.read_tensors(folder) for folder in (base, tmp_path / "ours", theirs))
    different = {at for at in expected if ours[at] != expected[at]}
    assert different == {at for at in expected if ours[at] != before[at] == expected[at]}
    plan = rawmerge.plan_merge(base, adapter, like="llamafactory")
    assert set(not_loaded_by_peft(plan, read_base(base))) == different
    assert len(different) == SOME_LEFT_OUT.get(name, 0)
    notes = [note for note in plan.notes if "PEFT 0.21 with transformers 5 does not load" in note]
    assert [f"in '{name}': {len(different)} tensors, " in note for note in notes] == [True] * bool(different)


def test_families_whose_experts_peft_makes_fit_are_those_that_peft_has() -> None:
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    fitted = {
        name: frozenset(conversion._MOE_TARGET_MODULE_MAPPING[pattern]) - {"gate"}  # a router finds its parameter
        for name, pattern in conversion._MODEL_TO_CONVERSION_PATTERN.items()
        if pattern in conversion._MOE_TARGET_MODULE_MAPPING
    }
    assert fitted == FUSED_TARGETS


def test_shapes_that_the_config_does_not_give_are_named(tmp_path: Path, llama: Path) -> None:
    adapter = oracle.save_adapter(oracle.pretrained(llama, tiny.CAUSAL), tmp_path / "adapter", **ATTENTION)
    config = json.loads((llama / "config.json").read_text())
    size, width = config["intermediate_size"], config["hidden_size"]
    (llama / "config.json").write_text(json.dumps({**config, "intermediate_size": size + 8}))
    found = refused(llama, adapter)
    names = {kind: f"model.layers.*.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}
    assert set(found) == set(names.values())
    assert found[names["down"]].found == f"[{width}, {size}], in 2 tensors"
    assert found[names["down"]].expected.startswith(f"[{width}, {size + 8}], which config.json gives LlamaForCausalLM")


@pytest.mark.usefixtures("own_process")
def test_a_model_that_transformers_does_not_build_is_refused(tmp_path: Path, llama: Path) -> None:
    adapter = oracle.save_adapter(oracle.pretrained(llama, tiny.CAUSAL), tmp_path / "adapter", **ATTENTION)
    config = json.loads((llama / "config.json").read_text())
    for field, value, expected in (
        ("num_hidden_layers", 10**9, "config.json states num_hidden_layers 1000000000, and the checkpoint has"),
        ("model_type", "brand_new", "brand_new"),
    ):
        (llama / "config.json").write_text(json.dumps({**config, field: value}))
        problem = refused(llama, adapter)["config.json"]
        assert expected in problem.found
        assert problem.expected == "a model that the installed transformers loads and saves by its own code"
