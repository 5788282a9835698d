"""Trainable tokens against PEFT: the trained rows, byte for byte, on one side of a tie and on both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, *oracle.QUIET]

TOKENS = [7, 95, 0, 31]


def case(model: Callable[[], Any], targets: Any = None, changed: tuple[str, ...] = (), auto: str = tiny.CAUSAL) -> Any:
    return kinds.Case(
        lambda: peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=targets), auto, model, changed
    )


def tied() -> Any:
    return tiny.llama(tie_word_embeddings=True)


CASES = {
    "default": case(tiny.llama, None, ("embed_tokens",)),
    "named": case(tiny.llama, ["embed_tokens"], ("embed_tokens",)),
    "pattern": case(tiny.llama, r".*embed_tokens", ("embed_tokens",)),
    "output": case(tiny.llama, ["lm_head"], ("lm_head",)),
    "both": case(tiny.llama, ["embed_tokens", "lm_head"], ("embed_tokens", "lm_head")),
    "positions": case(
        lambda: tiny.bert(max_position_embeddings=128), ["position_embeddings"], ("position_",), "AutoModel"
    ),
    "tied": case(tied, None, ("embed_tokens",)),
    "tied_gpt2": case(tiny.gpt2, None, ("wte",)),
    "tied_bloom": case(tiny.bloom, None, ("word_embeddings.weight",)),
    "bert": case(tiny.bert, None, ("word_embeddings",), "AutoModel"),
    "t5": case(tiny.t5, None, ("shared",), "AutoModelForSeq2SeqLM"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_merge_has_the_trained_bytes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kinds.check_merge(CASES[name], tmp_path, dtype)


def test_trained_rows_are_the_files_numbers(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(CASES["both"], tmp_path, torch.float32)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    before, ours = oracle.read_tensors(base), oracle.read_tensors(tmp_path / "ours")
    trained = load_file(adapter / kinds.WEIGHTS)
    for module in ("model.embed_tokens", "lm_head"):
        expected = kinds.as_tensor(before[f"{module}.weight"])
        for token, row in zip(TOKENS, trained[f"base_model.model.{module}.trainable_tokens_delta"], strict=True):
            expected[token] = row.double()
        assert torch.equal(kinds.as_tensor(ours[f"{module}.weight"]), expected)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(CASES["both"], tmp_path)


@pytest.mark.parametrize(
    "tokens", [[7, 95, 0, 96], [7, 95, 0], [7, 95, 0, 7], [7, 95, 0, -1], {"embed_tokens": TOKENS}, []]
)
def test_tokens_that_do_not_fit_are_refused(tmp_path: Path, tokens: Any) -> None:
    base, adapter = kinds.write_case(CASES["named"], tmp_path, torch.float32)
    kinds.edit_config(adapter, token_indices=tokens)
    with pytest.raises(rawmerge.RefusedError, match=r"token_indices|trainable_tokens_delta"):
        rawmerge.plan_merge(base, adapter)


def test_rows_of_a_tied_module_must_be_those_of_the_other(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(CASES["tied"], tmp_path, torch.float32)
    tensors = load_file(adapter / kinds.WEIGHTS)
    tensors["base_model.model.lm_head.trainable_tokens_delta"] += 1
    save_file(tensors, adapter / kinds.WEIGHTS)
    with pytest.raises(rawmerge.RefusedError, match=r"lm_head.trainable_tokens_delta.*target_modules"):
        rawmerge.plan_merge(base, adapter)


def test_what_peft_nests_where_both_sides_of_a_tie_are_targeted_is_refused(tmp_path: Path) -> None:
    both = case(tied, ["embed_tokens", "lm_head"])
    base, adapter = kinds.write_case(both, tmp_path, torch.float32)
    with pytest.raises(rawmerge.RefusedError, match=r"lm_head.base_layer.trainable_tokens_delta"):
        rawmerge.plan_merge(base, adapter)


def test_rows_of_a_module_that_is_not_targeted_are_refused(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(CASES["named"], tmp_path, torch.float32)
    tensors = {
        name.replace("model.embed_tokens", "lm_head"): tensor
        for name, tensor in load_file(adapter / kinds.WEIGHTS).items()
    }
    save_file(tensors, adapter / kinds.WEIGHTS)
    with pytest.raises(rawmerge.RefusedError, match=r"lm_head.trainable_tokens_delta"):
        rawmerge.plan_merge(base, adapter)
