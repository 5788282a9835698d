"""Tensors that an adapter stores whole: what replaces, what is laid over, what is added, what may be ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge.errors import RefusedError
from tests.builders import PREFIX, RANK, lora_pair, merged, random_tensor, raw, read_all, write_adapter, write_base

Q, EMBEDDING, HEAD = "model.layers.0.q_proj", "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def base_tensors(rows: int = 20) -> Tensors:
    return {
        EMBEDDING: random_tensor((rows, 8), torch.float32),
        f"{Q}.weight": random_tensor((12, 8), torch.float32),
        f"{Q}.bias": random_tensor((12,), torch.float32),
        HEAD: random_tensor((rows, 8), torch.float32, seed=1),
    }


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "vocab_size": 20}


def write(
    folder: Path, tensors: Tensors, base: Tensors | None = None, config: Any = LLAMA, **fields: Any
) -> tuple[Path, Path]:
    """Write a base and an adapter of a pair and these tensors."""
    stored = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    adapter = write_adapter(folder / "adapter", {**lora_pair(Q, 12, 8), **stored}, **fields)
    return write_base(folder / "base", [base or base_tensors()], config), adapter


def merge(folder: Path, *args: Any, options: dict[str, Any] | None = None, **fields: Any) -> Tensors:
    rawmerge.merge_adapter(*write(folder, *args, **fields), folder / "out", **(options or {}))
    return read_all(folder / "out")


def refuse(folder: Path, says: str, *args: Any, **fields: Any) -> None:
    with pytest.raises(RefusedError, match=says):
        rawmerge.merge_adapter(*write(folder, *args, **fields), folder / "out")
    assert not (folder / "out").exists()


def uses(folder: Path, *args: Any, **fields: Any) -> dict[str, tuple[str, str]]:
    """Return what becomes of each stored tensor, and why."""
    plan = rawmerge.plan_merge(*write(folder, *args, **fields))
    found = {use.name.removeprefix(PREFIX): (use.use, use.reason) for use in plan.adapter_uses}
    return {name: use for name, use in found.items() if ".lora_" not in name}


def test_a_stored_bias_replaces_the_base_s(tmp_path: Path) -> None:
    bias = torch.arange(12.0)
    assert raw(merge(tmp_path, {f"{Q}.bias": bias}, bias="all")[f"{Q}.bias"]) == raw(bias)


def test_a_bias_that_the_config_does_not_train_is_refused(tmp_path: Path) -> None:
    says = r"q_proj\.bias': expected a tensor of a LoRA pair, of a module in modules_to_save, or a bias"
    refuse(tmp_path, says, {f"{Q}.bias": torch.zeros(12)})


def test_a_trained_bias_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    says = r"a base tensor 'model\.layers\.0\.k_proj\.bias' that it replaces, found none"
    refuse(tmp_path, says, {"model.layers.0.k_proj.bias": torch.ones(12)}, bias="all")


def test_copies_that_peft_keeps_of_a_saved_module_are_ignored_with_the_reason(tmp_path: Path) -> None:
    trained = torch.ones(20, 8)
    stored = {
        HEAD: trained,
        "lm_head.modules_to_save.default.weight": trained.clone(),
        "lm_head.original_module.weight": base_tensors()[HEAD],
    }
    assert uses(tmp_path, stored, modules_to_save=["lm_head"]) == {
        HEAD: ("replaces", ""),
        "lm_head.modules_to_save.default.weight": (
            "ignored",
            "a copy of the tensor that is stored under its own name",
        ),
        "lm_head.original_module.weight": ("ignored", "the untrained copy of a saved module"),
    }
    rawmerge.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert raw(read_all(tmp_path / "out")[HEAD]) == raw(trained)


def test_a_saved_copy_alone_replaces(tmp_path: Path) -> None:
    trained = torch.ones(20, 8)
    found = merge(tmp_path, {"lm_head.modules_to_save.default.weight": trained}, modules_to_save=["lm_head"])
    assert raw(found[HEAD]) == raw(trained)


def test_a_tied_tensor_stored_under_a_name_that_the_base_lacks_is_ignored(tmp_path: Path) -> None:
    base = {"shared.weight": random_tensor((20, 8), torch.float32), f"{Q}.weight": random_tensor((12, 8))}
    stored = {"shared.weight": torch.ones(20, 8), "encoder.embed_tokens.weight": torch.ones(20, 8)}
    config = {"model_type": "own", "architectures": ["OwnModel"]}
    assert uses(tmp_path, stored, base, config, modules_to_save=["shared", "embed_tokens"]) == {
        "shared.weight": ("replaces", ""),
        "encoder.embed_tokens.weight": ("ignored", "equal to 'shared.weight', which the base ties to it"),
    }


def test_a_head_that_the_base_lacks_is_added_in_the_base_s_dtype(tmp_path: Path) -> None:
    head = random_tensor((3, 8), torch.bfloat16)
    found = merge(tmp_path, {"score.weight": head}, modules_to_save=["score"])
    assert raw(found["score.weight"]) == raw(head.float())


def test_a_head_of_other_labels_replaces_the_base_s(tmp_path: Path) -> None:
    base = base_tensors() | {"score.weight": torch.zeros(2, 8)}
    found = merge(tmp_path, {"score.weight": torch.ones(5, 8)}, base, modules_to_save=["score"])
    assert raw(found["score.weight"]) == raw(torch.ones(5, 8))


def grown(rows: int = 24) -> Tensors:
    """Return embeddings of a larger vocabulary that begin as the base's do."""
    base = base_tensors()
    return {name: torch.cat([base[name], torch.ones(rows - 20, 8)]) for name in (EMBEDDING, HEAD)}


def test_a_grown_vocabulary_replaces_both_embeddings(tmp_path: Path) -> None:
    found = merge(tmp_path, grown())
    assert {name: raw(found[name]) for name in grown()} == {name: raw(tensor) for name, tensor in grown().items()}


@pytest.mark.parametrize(("lacking", "left"), [(HEAD, HEAD), (EMBEDDING, EMBEDDING)])
def test_a_vocabulary_that_grows_on_one_side_only_is_refused(tmp_path: Path, lacking: str, left: str) -> None:
    stored = {name: tensor for name, tensor in grown().items() if name != lacking}
    says = rf"'{left}': expected one for each of the 24 tokens(.|\n)*save_embedding_layers"
    refuse(tmp_path, says, stored)


def test_a_number_for_each_token_must_grow_too(tmp_path: Path) -> None:
    base = base_tensors() | {"lm_head.bias": torch.zeros(20), "final_logits_bias": torch.zeros(1, 20)}
    with pytest.raises(RefusedError) as caught:
        rawmerge.merge_adapter(*write(tmp_path, grown(), base), tmp_path / "out")
    assert {problem.subject for problem in caught.value.problems} == {"lm_head.bias", "final_logits_bias"}
    assert "expected one for each of the 24 tokens" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_smaller_vocabulary_is_refused_with_the_way_to_merge_it(tmp_path: Path) -> None:
    stored = {name: tensor[:16] for name, tensor in grown().items()}
    refuse(
        tmp_path, r"shape \[20, 8\], found \[16, 8\](.|\n)*4 rows less than the base's(.|\n)*--vocab overlay", stored
    )


def test_an_overlay_takes_the_first_rows_and_a_delta_goes_to_these(tmp_path: Path) -> None:
    stored = {EMBEDDING: torch.cat([base_tensors()[EMBEDDING][:12], torch.ones(4, 8)])}
    pair = {
        "model.embed_tokens.lora_embedding_A": random_tensor((4, 16), torch.float32),
        "model.embed_tokens.lora_embedding_B": random_tensor((8, 4), torch.float32),
    }
    found = merge(tmp_path, stored | pair, options={"vocab": "overlay"})[EMBEDDING]
    product = (
        pair["model.embed_tokens.lora_embedding_B"].double() @ pair["model.embed_tokens.lora_embedding_A"].double()
    )
    expected = stored[EMBEDDING].double() + product.T * 1.5
    torch.testing.assert_close(found[:16].double(), expected, atol=1e-6, rtol=0)
    assert raw(found[16:]) == raw(base_tensors()[EMBEDDING][16:])


def test_a_frozen_embedding_unlike_the_base_s_is_refused_but_by_force(tmp_path: Path) -> None:
    stored = {EMBEDDING: torch.ones(20, 8)}
    says = r"embed_tokens\.weight': expected rows equal to the base's.*0% of 64(.|\n)*--force"
    refuse(tmp_path, says, stored)
    found = merge(tmp_path, stored, options={"force": True})
    assert raw(found[EMBEDDING]) == raw(torch.ones(20, 8))


def embedding_adapter(folder: Path, seed: int) -> Path:
    """Write a LoRA on the input embedding that brings the frozen embedding, as PEFT stores it."""
    pair = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": random_tensor((RANK, 20), torch.float32, seed),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": random_tensor((8, RANK), torch.float32, seed),
    }
    copy = {f"{PREFIX}model.embed_tokens.base_layer.weight": base_tensors()[EMBEDDING]}
    return write_adapter(folder, pair | copy)


def test_a_frozen_copy_over_an_earlier_merge_s_delta_is_refused_with_what_would_be_lost(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [base_tensors()], LLAMA)
    first, second = embedding_adapter(tmp_path / "first", 1), embedding_adapter(tmp_path / "second", 2)
    rawmerge.merge_adapter(base, first, tmp_path / "merged")
    with pytest.raises(RefusedError) as refusal:
        rawmerge.plan_merge(tmp_path / "merged", second)
    (problem,) = refusal.value.problems
    assert "changed in this tensor is lost" in problem.hint
    assert "rawmerge merge BASE FIRST SECOND" in problem.hint
    forced = rawmerge.plan_merge(tmp_path / "merged", second, force=True)
    assert any("taken by force" in note and "is lost" in note for note in forced.notes)


def test_a_frozen_copy_over_an_earlier_merge_s_few_rows_is_told(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [base_tensors()], LLAMA)
    rows = {f"{PREFIX}{ROWS}": torch.full((1, 8), 9.0), **lora_pair(Q, 12, 8)}
    first = write_adapter(tmp_path / "first", rows, trainable_token_indices={"embed_tokens": [7]})
    rawmerge.merge_adapter(base, first, tmp_path / "merged")
    plain = write_adapter(tmp_path / "plain", lora_pair(Q, 12, 8, seed=3))
    rawmerge.merge_adapter(base, plain, tmp_path / "other")
    second = embedding_adapter(tmp_path / "second", 2)
    told = [
        [note for note in rawmerge.plan_merge(tmp_path / name, second).notes if "is lost" in note]
        for name in ("merged", "other", "base")
    ]
    assert [len(notes) for notes in told] == [1, 0, 0]
    assert "merge both adapters at once" in told[0][0]


def test_the_part_of_a_fused_tensor_is_not_replaced(tmp_path: Path) -> None:
    base = base_tensors() | {"model.layers.0.mlp.gate_up_proj.weight": random_tensor((24, 8), torch.float32)}
    stored = {"model.layers.0.mlp.gate_proj.weight": torch.ones(12, 8)}
    says = r"expected (a|one whole) base tensor .*'model\.layers\.0\.mlp\.gate_proj\.weight' that it replaces"
    refuse(tmp_path, says, stored, base, {"model_type": "hrm_text"}, modules_to_save=["gate_proj"])


def test_a_dtype_that_no_cast_reaches_is_refused(tmp_path: Path) -> None:
    base = base_tensors() | {"model.position_ids": torch.zeros(4, dtype=torch.int64)}
    says = r"position_ids': expected dtype I64, found F32"
    refuse(tmp_path, says, {"model.position_ids": torch.zeros(4)}, base, modules_to_save=["model"])


ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize("indices", [[17, 2], {"embed_tokens": [17, 2]}])
def test_trained_rows_replace_rows_in_the_order_that_the_config_states(tmp_path: Path, indices: Any) -> None:
    trained = random_tensor((2, 8), torch.float32, seed=5)
    found = merge(tmp_path, {ROWS: trained}, trainable_token_indices=indices)
    expected = base_tensors()[EMBEDDING]
    expected[17], expected[2] = trained
    assert raw(found[EMBEDDING]) == raw(expected)
    assert raw(found[HEAD]) == raw(base_tensors()[HEAD])


def test_trained_rows_lie_over_the_stored_embedding(tmp_path: Path) -> None:
    stored = grown()
    found = merge(tmp_path, stored | {ROWS: torch.zeros(1, 8)}, trainable_token_indices=[22])
    stored[EMBEDDING][22] = 0
    assert raw(found[EMBEDDING]) == raw(stored[EMBEDDING])


def two_sets() -> Tensors:
    return {ROWS: torch.zeros(1, 8), "embed_tokens.token_adapter.trainable_tokens_delta": torch.zeros(1, 8)}


BAD_ROWS: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "no indices for the module": (
        {ROWS: torch.zeros(1, 8)},
        {"trainable_token_indices": {"lm_head": [1]}},
        "expected trainable_token_indices that say which rows these are, found none for this module",
    ),
    "no such tensor": (
        {ROWS.replace("embed_tokens", "wte"): torch.zeros(1, 8)},
        {"trainable_token_indices": {"wte": [1]}},
        r"a base tensor 'model\.wte\.weight' whose rows these are, found none",
    ),
    "beyond the vocabulary": (
        {ROWS: torch.zeros(1, 8)},
        {"trainable_token_indices": [20]},
        r"expected token indices below 20, found \[20\]",
    ),
    "two sets": (two_sets(), {"trainable_token_indices": [1]}, r"one set of trained rows for .*, found another"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_have_no_place_are_refused(tmp_path: Path, name: str) -> None:
    tensors, fields, says = BAD_ROWS[name]
    refuse(tmp_path, says, tensors, **fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_of_a_pair_is_scaled_and_added(tmp_path: Path, dtype: torch.dtype) -> None:
    base = {name: tensor.to(dtype) for name, tensor in base_tensors().items()}
    bias = random_tensor((12,), torch.float32, seed=7)
    found = merge(tmp_path, {f"{Q}.lora_B.bias": bias}, base, lora_bias=True)
    assert raw(found[f"{Q}.bias"]) == raw((base[f"{Q}.bias"].float() + bias * 1.5).to(dtype))
    pair = lora_pair(Q, 12, 8)
    lora_a, lora_b = (pair[f"{PREFIX}{Q}.lora_{factor}.weight"] for factor in "AB")
    assert raw(found[f"{Q}.weight"]) == raw(merged(base[f"{Q}.weight"], lora_a, lora_b, 1.5))


def test_the_bias_of_a_pair_on_a_module_of_another_size_is_refused(tmp_path: Path) -> None:
    says = r"lora_B\.bias': expected a vector of the base bias's shape \[12\], found shape \[11\]"
    refuse(tmp_path, says, {f"{Q}.lora_B.bias": torch.zeros(11)}, lora_bias=True)


def test_a_bias_without_its_pair_is_refused(tmp_path: Path) -> None:
    says = r"k_proj\.lora_B\.bias': expected lora_a and lora_b beside this bias, found none"
    refuse(tmp_path, says, {"model.layers.0.k_proj.lora_B.bias": torch.zeros(12)}, lora_bias=True)


def test_a_pair_of_integers_is_refused(tmp_path: Path) -> None:
    pair = {name.removeprefix(PREFIX): tensor.to(torch.int8) for name, tensor in lora_pair(Q, 12, 8).items()}
    refuse(tmp_path, r"lora_A\.weight': expected a plain float dtype \(F64, F32, BF16, F16\), found I8", pair)
