"""KaSA, MiCA, BD-LoRA, VeLoRA, MonteCLoRA, EVA and LoRA-FA against PEFT, and against the formulas in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from rawmerge.errors import AdapterError, UnsupportedAdapterError
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, *oracle.QUIET]
variants = pytest.importorskip("peft.tuners.lora.config")
optimizers = pytest.importorskip("peft.optimizers")

RANK, ALPHA = 4, 6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Of Llama's targets: A has blocks, B has blocks, neither.
IN_BLOCKS, OUT_BLOCKS = ["q_proj", "down"], ["k_proj", "gate_proj"]


def config(*targets: str, **fields: Any) -> Any:
    names = list(targets or kinds.LLAMA_TARGETS)
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, **fields)


def blocks(count: int = 2, **fields: Any) -> Any:
    lists = {"target_modules_bd_a": IN_BLOCKS, "target_modules_bd_b": OUT_BLOCKS}
    return variants.BdLoraConfig(**{**lists, "nblocks": count, **fields})


def case(**fields: Any) -> kinds.Case:
    return kinds.Case(lambda: config(**fields))


def minor_components(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    assert any("lora_B" in name and bool(tensor.any()) for name, tensor in tensors.items())
    return tensors


CASES = {
    "kasa": case(kasa_config=variants.KasaConfig()),
    "kasa, other ranks": case(kasa_config=variants.KasaConfig(), rank_pattern={"q_proj": 7}, use_rslora=True),
    "kasa on a head": kinds.Case(
        lambda: config("lm_head", "k_proj", kasa_config=variants.KasaConfig()), targets=("lm_head", "k_proj")
    ),
    "mica": replace(case(init_lora_weights="mica"), edit=minor_components),
    "MiCA": case(init_lora_weights="MiCA"),
    "mica on Conv1D": kinds.Case(
        lambda: config(*kinds.GPT2_TARGETS, init_lora_weights="mica"), model=tiny.gpt2, targets=kinds.GPT2_TARGETS
    ),
    "mica on an embedding": kinds.Case(
        lambda: config("embed_tokens", "k_proj", init_lora_weights="mica"), targets=("embed_tokens", "k_proj")
    ),
    "bdlora": case(use_bdlora=blocks()),
    "bdlora in part": case(use_bdlora=blocks(4, target_modules_bd_b=None, match_strict=False)),
    "bdlora of one block": case(use_bdlora=blocks(1)),
    "velora": case(velora_config=variants.VeloraConfig(num_groups=4)),
    "monteclora": case(monteclora_config=variants.MontecloraConfig(num_samples=2)),
    "eva": case(init_lora_weights="eva", rank_pattern={"q_proj": 6}, alpha_pattern={"q_proj": 9}),
    "gaussian": case(init_lora_weights="gaussian"),
    "orthogonal": case(init_lora_weights="orthogonal"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_merge_is_bit_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kinds.check_merge(CASES[name], tmp_path, dtype)


@pytest.mark.parametrize("name", ["kasa", "mica", "bdlora"])
def test_weights_of_several_tiles_are_bit_equal(tmp_path: Path, name: str) -> None:
    kinds.check_merge(replace(CASES[name], model=tiny.tall_llama), tmp_path, torch.bfloat16)


def test_an_adapter_of_lora_fa_is_plain(tmp_path: Path) -> None:
    """LoRA-FA is an optimizer that freezes A; its files are LoRA's."""
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.llama(num_hidden_layers=1), torch.float32)
    wrapped = peft.get_peft_model(oracle.load_pretrained(base, tiny.CAUSAL), config())
    optimizer = optimizers.create_lorafa_optimizer(wrapped, r=RANK, lora_alpha=ALPHA, lr=0.1)
    for _ in range(2):
        wrapped(input_ids=torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss.backward()
        optimizer.step()
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = oracle.merge_with_peft(oracle.pretrained(base, tiny.CAUSAL), tmp_path / "adapter", tmp_path / "peft")
    assert oracle.changed_names(oracle.read_tensors(base), expected)
    rawmerge.merge_adapter(base, tmp_path / "adapter", tmp_path / "ours")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)


# --- the formulas ---


def _path(name: str) -> str:
    return f"base_model.model.{name.removesuffix('.weight')}"


def kasa_formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    path = _path(name)
    if f"{path}.lora_diag" not in own:
        return None
    vectors = np.linalg.eigh(weight.numpy().T @ weight.numpy())[1]
    kept = torch.from_numpy(vectors[:, -(min(weight.shape) - RANK) :].copy())
    left, middle, right = (own[f"{path}.{part}"] for part in ("lora_B.weight", "lora_diag", "lora_A.weight"))
    return weight @ kept @ kept.T + ALPHA / RANK * left @ torch.diag(middle) @ right


def test_float64_is_the_formula_of_kasa(tmp_path: Path) -> None:
    # the truncated base is training's, made in float32
    kinds.check_float64(CASES["kasa"], tmp_path, kasa_formula, tolerance=2**-18)


def test_float64_is_the_formula_of_bdlora(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = _path(name)
        if f"{path}.lora_A.weight" not in own:
            return None
        left, right = own[f"{path}.lora_B.weight"], own[f"{path}.lora_A.weight"]
        result = weight.clone()
        rows, columns, count = len(weight), weight.shape[1], 2
        for out in range(rows):
            for rank in range(RANK):
                first = rank * count // RANK  # the block of this rank
                if any(pattern in name for pattern in IN_BLOCKS):
                    width = columns // count
                    span = slice(first * width, (first + 1) * width)
                    result[out, span] += ALPHA / RANK * left[out, rank] * right[rank]
                elif out * count // rows == first:
                    result[out] += ALPHA / RANK * left[out, rank % (RANK // count)] * right[rank]
        return result

    kinds.check_float64(CASES["bdlora"], tmp_path, formula)


@pytest.mark.parametrize("name", ["mica", "velora", "monteclora"])
def test_float64_is_lora_s_formula(tmp_path: Path, name: str) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = _path(name)
        if f"{path}.lora_A.weight" not in own:
            return None
        return weight + ALPHA / RANK * own[f"{path}.lora_B.weight"] @ own[f"{path}.lora_A.weight"]

    kinds.check_float64(CASES[name], tmp_path, formula)


# --- refusals ---


@pytest.mark.parametrize("name", ["kasa", "mica", "bdlora", "velora", "monteclora"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str) -> None:
    kinds.check_damage(CASES[name], tmp_path, unneeded=["velora", "monteclora"])


@pytest.mark.parametrize("name", ["velora", "monteclora"])
def test_what_training_alone_needs_is_told_as_ignored(tmp_path: Path, name: str) -> None:
    base, adapter = kinds.write_case(CASES[name], tmp_path, torch.float32)
    extra = {tensor for tensor in load_file(adapter / kinds.WEIGHTS) if name in tensor}
    uses = {use.name: use for use in rawmerge.plan_merge(base, adapter).adapter_uses}
    assert extra
    assert all(uses[tensor].use == "ignored" and uses[tensor].reason for tensor in extra)


REFUSED_CONFIGS = {
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens(.|\n)*acts on some tokens only"),
    "Arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config(.|\n)*routes each token"),
    "QALoRA": ({"use_qalora": True}, "use_qalora(.|\n)*quantised weights only"),
    "DoRA and KaSA": (
        {"use_dora": True, "kasa_config": {}, "velora_config": {"a": 1}},
        "one variant of LoRA at a time",
    ),
    "DoRA and MiCA": ({"use_dora": True, "init_lora_weights": "mica"}, "one variant of LoRA at a time"),
    "DoRA and a bias": ({"use_dora": True, "lora_bias": True}, "lora_bias.*PEFT does not train DoRA with it"),
    "DoRA on a parameter": ({"use_dora": True, "target_parameters": ["w"]}, "use_dora.*with target_parameters"),
}


@pytest.mark.parametrize(("fields", "says"), REFUSED_CONFIGS.values(), ids=REFUSED_CONFIGS)
def test_what_has_no_merge_is_refused_with_the_reason(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    base, adapter = kinds.write_case(case(), tmp_path, torch.float32)
    kinds.edit_config(adapter, **fields)
    with pytest.raises(UnsupportedAdapterError, match=says):
        rawmerge.plan_merge(base, adapter)


BAD_TABLES = {
    "no table": {"use_bdlora": True},
    "an unknown field": {"use_bdlora": {"nblocks": 2, "shape": 3}},
    "no blocks": {"use_bdlora": {"nblocks": 0}},
    "half a block": {"use_bdlora": {"nblocks": 1.5}},
    "no list": {"use_bdlora": {"target_modules_bd_a": "q_proj"}},
    "no names": {"use_bdlora": {"target_modules_bd_b": [1]}},
    "a loud switch": {"use_bdlora": {"match_strict": "yes"}},
    "a list": {"kasa_config": [1]},
    "a field of the future": {"kasa_config": {"delta": 1}},
    "no number": {"kasa_config": {"beta": "1"}},
}


@pytest.mark.parametrize("fields", BAD_TABLES.values(), ids=BAD_TABLES)
def test_tables_of_wrong_values_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    base, adapter = kinds.write_case(case(), tmp_path, torch.float32)
    kinds.edit_config(adapter, **fields)
    with pytest.raises(AdapterError, match=f"{next(iter(fields))}.*a table"):
        rawmerge.plan_merge(base, adapter)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_modules_bd_b": ["gate_proj"]}, "k_proj.*in none, with match_strict"),
        ({"target_modules_bd_b": [*OUT_BLOCKS, "self_attn.q"]}, "q_proj.*in both"),
        ({"nblocks": 3}, "3 blocks of the same height"),
    ],
)
def test_modules_that_blocks_do_not_fit_are_refused(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    base, adapter = kinds.write_case(CASES["bdlora"], tmp_path, torch.float32)
    kinds.edit_config(adapter, use_bdlora={**vars(blocks()), **fields})
    with pytest.raises(rawmerge.RefusedError, match=says):
        rawmerge.plan_merge(base, adapter)


@pytest.mark.parametrize(
    "fields", [{"kasa_config": {}}, {"use_bdlora": vars(blocks())}, {"init_lora_weights": "mica"}], ids=str
)
def test_convolutions_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    lists = {"target_modules_bd_a": ["convolution"], "target_modules_bd_b": None}
    fields = {name: {**value, **lists} if name == "use_bdlora" else value for name, value in fields.items()}
    images = kinds.Case(lambda: config("convolution"), "AutoModelForImageClassification", tiny.resnet)
    base, adapter = kinds.write_case(images, tmp_path, torch.float32)
    kinds.edit_config(adapter, **fields)
    with pytest.raises(UnsupportedAdapterError, match=r"convolution.*a linear weight"):
        rawmerge.plan_merge(base, adapter)


@pytest.mark.parametrize("fields", [{"kasa_config": {}}, {"use_bdlora": {"target_modules_bd_a": ["c_attn"]}}], ids=str)
def test_conv1d_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    conv1d = kinds.Case(lambda: config("c_attn"), model=tiny.gpt2)
    base, adapter = kinds.write_case(conv1d, tmp_path, torch.float32)
    kinds.edit_config(adapter, **fields)
    with pytest.raises(UnsupportedAdapterError, match=r"c_attn.*stored \(out, in\)"):
        rawmerge.plan_merge(base, adapter)


def test_a_diagonal_without_the_switch_is_refused(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(CASES["kasa"], tmp_path, torch.float32)
    kinds.edit_config(adapter, kasa_config=None)
    with pytest.raises(rawmerge.RefusedError, match="lora_diag"):
        rawmerge.plan_merge(base, adapter)


def test_a_bias_beside_blocks_of_b_is_refused(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(CASES["bdlora"], tmp_path, torch.float32)
    tensors = load_file(adapter / kinds.WEIGHTS)
    name = next(name for name in tensors if "k_proj.lora_B" in name)
    save_file({**tensors, name.replace("weight", "bias"): torch.ones(32)}, adapter / kinds.WEIGHTS)
    kinds.edit_config(adapter, lora_bias=True)
    with pytest.raises(UnsupportedAdapterError, match="no bias beside a block diagonal lora_B"):
        rawmerge.plan_merge(base, adapter)
