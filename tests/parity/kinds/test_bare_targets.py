"""Adapters that hold one shared vector and no tensor of any module: which modules they mean, against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity


def make(targets: Any = kinds.LLAMA_TARGETS, **fields: Any) -> Callable[[], Any]:
    named = targets if isinstance(targets, str) else list(targets)
    return lambda: peft.UniLoraConfig(**{"r": 3, "theta_d_length": 50, "target_modules": named, **fields})


def eleven_layers() -> Any:
    return tiny.llama(num_hidden_layers=11, hidden_size=16, intermediate_size=24)


CASES = {
    "names": kinds.Case(make()),
    "a seed": kinds.Case(make(proj_seed=7)),
    "a vector longer than the adapter": kinds.Case(make(theta_d_length=50_000)),
    "conv1d": kinds.Case(make(kinds.GPT2_TARGETS), model=tiny.gpt2, targets=kinds.GPT2_TARGETS),
    "eleven layers": kinds.Case(make(["q_proj", "v_proj"]), model=eleven_layers, targets=["q_proj", "v_proj"]),
    "a pattern": kinds.Case(make(r"model\.layers\.1\..*(q|v)_proj"), targets=["1.self_attn.q_proj"]),
    "all linear": kinds.Case(make("all-linear"), targets=["q_proj", "o_proj", "down_proj"]),
    "some layers": kinds.Case(make(["q_proj"], layers_to_transform=[1]), targets=["1.self_attn.q_proj"]),
    "a layer of a list": kinds.Case(
        make(["q_proj", "v_proj"], layers_to_transform=0, layers_pattern="layers"), targets=["0.self_attn.q_proj"]
    ),
    "bert": kinds.Case(make(["query", "value"]), auto="AutoModel", model=tiny.bert, targets=["query", "value"]),
    "a saved head": kinds.Case(make(["q_proj"], modules_to_save=["lm_head"]), targets=["q_proj", "lm_head"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_merge_is_bit_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kinds.check_merge(CASES[name], tmp_path, dtype)


@pytest.mark.parametrize("model", [tiny.tall_llama, tiny.tall_gpt2])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, model: Callable[[], Any]) -> None:
    targets = kinds.LLAMA_TARGETS if model is tiny.tall_llama else kinds.GPT2_TARGETS
    kinds.check_merge(kinds.Case(make(targets), model=model, targets=targets), tmp_path, torch.bfloat16)


REFUSED = {
    "two stacks": (kinds.Case(make(["q"]), auto="AutoModelForSeq2SeqLM", model=tiny.t5), "module order unknown"),
    "a head": (kinds.Case(make(["q_proj", "lm_head"])), "one on 'lm_head'"),
    "what some classes lack": (kinds.Case(make(["dense"]), auto="AutoModel", model=tiny.bert), "one on 'pooler.dense'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_the_class_of_the_model_decides_nothing_is_guessed(tmp_path: Path, name: str) -> None:
    case, says = REFUSED[name]
    base, adapter = kinds.write_case(case, tmp_path, torch.float32)
    with pytest.raises(rawmerge.RefusedError, match=f"{says}(.|\n)*save_indices=True"):
        rawmerge.plan_merge(base, adapter)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("model_type", "my_model", "module order unknown"),
        ("num_hidden_layers", 3, "as the base's config states, 3"),
        ("num_hidden_layers", 1, "as the base's config states, 1"),
    ],
)
def test_a_base_that_is_not_what_its_config_says_is_refused(
    tmp_path: Path, field: str, value: object, says: str
) -> None:
    base, adapter = kinds.write_case(CASES["names"], tmp_path, torch.float32)
    edit = (base / "config.json").read_text()
    before = {"model_type": '"llama"', "num_hidden_layers": "2"}[field]
    after = f'"{value}"' if isinstance(value, str) else f"{value}"
    (base / "config.json").write_text(edit.replace(f'"{field}": {before}', f'"{field}": {after}'))
    with pytest.raises(rawmerge.RefusedError, match=says):
        rawmerge.plan_merge(base, adapter)


@pytest.mark.parametrize("targets", [[], ["not_there"], r".*\.not_there", "(", ["layers"]])
def test_targets_that_fit_nothing_are_refused(tmp_path: Path, targets: Any) -> None:
    base, adapter = kinds.write_case(CASES["names"], tmp_path, torch.float32)
    kinds.edit_config(adapter, target_modules=targets)
    with pytest.raises(rawmerge.RefusedError, match="unilora_theta_d"):
        rawmerge.plan_merge(base, adapter)


@pytest.mark.parametrize("fields", [{"theta_d_length": 51}, {"theta_d_length": 2**31}])
def test_a_vector_of_another_length_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    base, adapter = kinds.write_case(CASES["names"], tmp_path, torch.float32)
    kinds.edit_config(adapter, **fields)
    with pytest.raises(rawmerge.RefusedError, match="unilora_theta_d"):
        rawmerge.plan_merge(base, adapter)


def test_the_stream_of_places_stays_the_same() -> None:
    # by PEFT 0.21.2's UniLoraModel.generate_index(12, 5, 42), with numpy 2
    from rawmerge.methods.unilora import _draw

    places, scales = _draw(12, 5, 42)
    assert places.tolist() == PLACES
    assert scales.tolist() == pytest.approx([count**-0.5 for count in COUNTS])


PLACES: list[int] = [3, 3, 4, 1, 0, 3, 4, 0, 2, 1, 2, 0]
COUNTS: list[int] = [3, 2, 2, 3, 2]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": list(kinds.LLAMA_TARGETS)},
        {"target_modules": r".*(q_proj|k_proj|gate_proj|down_proj)"},
        {"target_modules": r"model\.layers\..*(q_proj|k_proj|gate_proj|down_proj)"},
        {"target_modules": list(kinds.LLAMA_TARGETS), "layers_to_transform": [0, 1]},
    ],
)
def test_a_lost_module_is_refused_however_targets_are_told(tmp_path: Path, fields: dict[str, Any]) -> None:
    """TinyLoRA's vectors are dealt out by the number of modules."""

    def without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.down_proj" not in name}

    case = kinds.Case(lambda: peft.TinyLoraConfig(r=3, u=5, weight_tying=0.5, **fields), edit=without)
    base, adapter = kinds.write_case(case, tmp_path, torch.float32)
    with pytest.raises(rawmerge.RefusedError, match=r"every module that target_modules fits(.|\n)*down_proj"):
        rawmerge.plan_merge(base, adapter)


def test_a_pattern_that_could_take_for_ever_is_refused(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(kinds.Case(make()), tmp_path, torch.float32)
    kinds.edit_config(adapter, target_modules="(a+)+b")
    with pytest.raises(rawmerge.RefusedError, match="'target_modules': expected at most"):
        rawmerge.plan_merge(base, adapter)
