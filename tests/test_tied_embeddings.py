"""Tied embeddings: each side gets its own change, and the tie stays only where both sides are equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge.errors import RefusedError
from tests.builders import ALPHA, PREFIX, RANK, lora_pair, random_tensor, raw, read_all, write_adapter, write_base

INPUT, OUTPUT, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.q_proj"
ROWS_IN = "model.embed_tokens.token_adapter.trainable_tokens_delta"
ROWS_OUT = "lm_head.token_adapter.trainable_tokens_delta"
TIED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 20}
Tensors = dict[str, torch.Tensor]
EMBEDDING = random_tensor((20, 8), torch.float32)


def base_tensors(name: str = INPUT) -> Tensors:
    return {name: EMBEDDING.clone(), f"{Q}.weight": random_tensor((12, 8), torch.float32)}


def embedding_pair(path: str = "model.embed_tokens", seed: int = 0) -> Tensors:
    return {
        f"{path}.lora_embedding_A": random_tensor((RANK, 20), torch.float32, seed),
        f"{path}.lora_embedding_B": random_tensor((8, RANK), torch.float32, seed),
    }


def head_pair() -> Tensors:
    return {name.removeprefix(PREFIX): tensor for name, tensor in lora_pair("lm_head", 20, 8).items()}


def delta(pair: Tensors) -> torch.Tensor:
    """Return what a pair adds to (rows, dim), in float64."""
    factor_a, factor_b = (tensor.double() for _, tensor in sorted(pair.items()))
    product = factor_b @ factor_a * (ALPHA / RANK)
    return product if product.shape == (20, 8) else product.T


def write(
    folder: Path, tensors: Tensors, base: Tensors | None = None, config: Any = TIED, **fields: Any
) -> tuple[Path, Path]:
    stored = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    adapter = write_adapter(folder / "adapter", {**lora_pair(Q, 12, 8), **stored}, **fields)
    return write_base(folder / "base", [base or base_tensors()], config), adapter


def merge(folder: Path, *args: Any, options: dict[str, Any] | None = None, **fields: Any) -> tuple[Tensors, bool]:
    """Return the output's tensors, and whether its config ties them."""
    rawmerge.merge_adapter(*write(folder, *args, **fields), folder / "out", **(options or {}))
    config = json.loads((folder / "out" / "config.json").read_text())
    return read_all(folder / "out"), config["tie_word_embeddings"]


def refuse(folder: Path, says: str, *args: Any, **fields: Any) -> None:
    with pytest.raises(RefusedError, match=says):
        rawmerge.merge_adapter(*write(folder, *args, **fields), folder / "out")
    assert not (folder / "out").exists()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # values below 1 in float32: a few units in the last place
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_a_delta_on_the_input_leaves_the_output_as_it_was(tmp_path: Path) -> None:
    found, is_tied = merge(tmp_path, embedding_pair())
    close(found[INPUT], EMBEDDING.double() + delta(embedding_pair()))
    assert raw(found[OUTPUT]) == raw(EMBEDDING)
    assert not is_tied


def test_a_delta_on_the_output_leaves_the_input_as_it_was(tmp_path: Path) -> None:
    found, is_tied = merge(tmp_path, head_pair())
    close(found[OUTPUT], EMBEDDING.double() + delta(head_pair()))
    assert raw(found[INPUT]) == raw(EMBEDDING)
    assert not is_tied


def test_each_side_gets_its_own_delta(tmp_path: Path) -> None:
    found, is_tied = merge(tmp_path, embedding_pair() | head_pair())
    close(found[INPUT], EMBEDDING.double() + delta(embedding_pair()))
    close(found[OUTPUT], EMBEDDING.double() + delta(head_pair()))
    assert not is_tied


def test_a_copy_of_the_head_on_disk_gets_its_own_delta(tmp_path: Path) -> None:
    found, is_tied = merge(tmp_path, head_pair(), base_tensors() | {OUTPUT: EMBEDDING.clone()})
    close(found[OUTPUT], EMBEDDING.double() + delta(head_pair()))
    assert raw(found[INPUT]) == raw(EMBEDDING)
    assert not is_tied


def transposed_pair() -> Tensors:
    """Return the output side's pair as `ensure_weight_tying` makes it: the input side's factors, transposed."""
    pair = embedding_pair()
    return {
        "lm_head.lora_A.weight": pair["model.embed_tokens.lora_embedding_B"].T.contiguous(),
        "lm_head.lora_B.weight": pair["model.embed_tokens.lora_embedding_A"].T.contiguous(),
    }


@pytest.mark.parametrize("is_written", [False, True])
def test_one_delta_for_both_sides_is_added_once_and_they_stay_tied(tmp_path: Path, is_written: bool) -> None:
    base = base_tensors() | ({OUTPUT: EMBEDDING.clone()} if is_written else {})
    found, is_tied = merge(tmp_path, embedding_pair() | transposed_pair(), base, ensure_weight_tying=True)
    expected = EMBEDDING.double() + delta(embedding_pair())
    close(found[INPUT], expected)
    assert (OUTPUT in found) == is_written
    if is_written:
        close(found[OUTPUT], expected)
    assert is_tied


def test_the_account_says_that_the_second_side_s_pair_is_the_first_s(tmp_path: Path) -> None:
    paths = write(tmp_path, embedding_pair() | transposed_pair(), ensure_weight_tying=True)
    ignored = [use for use in rawmerge.plan_merge(*paths).adapter_uses if use.use == "ignored"]
    assert [use.name for use in ignored] == [f"{PREFIX}{name}" for name in transposed_pair()]
    assert {use.reason for use in ignored} == {
        "the input embedding's, transposed; ensure_weight_tying keeps the two one tensor"
    }


def test_two_deltas_with_one_tie_are_refused(tmp_path: Path) -> None:
    says = (
        r"'lm_head\.weight': expected the change of 'model\.embed_tokens\.weight', transposed, as ensure_weight_tying"
    )
    refuse(tmp_path, says, embedding_pair() | head_pair(), ensure_weight_tying=True)


def test_another_number_of_changes_with_one_tie_is_refused(tmp_path: Path) -> None:
    tensors = embedding_pair() | transposed_pair() | {ROWS_IN: torch.ones(1, 8)}
    says = "found another change, or one side alone"
    refuse(tmp_path, says, tensors, ensure_weight_tying=True, trainable_token_indices=[3])


def test_a_whole_embedding_trained_for_both_sides_stays_tied(tmp_path: Path) -> None:
    stored = {INPUT: torch.ones(20, 8), OUTPUT: torch.ones(20, 8)}
    found, is_tied = merge(tmp_path, stored, modules_to_save=["embed_tokens", "lm_head"])
    assert raw(found[INPUT]) == raw(torch.ones(20, 8))
    assert OUTPUT not in found
    assert is_tied


@pytest.mark.parametrize("name", [INPUT, OUTPUT])
def test_a_whole_side_trained_alone_unties(tmp_path: Path, name: str) -> None:
    found, is_tied = merge(tmp_path, {name: torch.ones(20, 8)}, modules_to_save=["embed_tokens", "lm_head"])
    assert {side: raw(found[side]) == raw(torch.ones(20, 8)) for side in (INPUT, OUTPUT)} == {
        INPUT: name == INPUT,
        OUTPUT: name == OUTPUT,
    }
    assert not is_tied


def test_trained_rows_are_the_tied_tensor_s(tmp_path: Path) -> None:
    found, is_tied = merge(tmp_path, {ROWS_IN: torch.ones(2, 8)}, trainable_token_indices=[3, 7])
    expected = EMBEDDING.clone()
    expected[[3, 7]] = 1
    assert raw(found[INPUT]) == raw(expected)
    assert OUTPUT not in found
    assert is_tied


@pytest.mark.parametrize("is_equal", [True, False])
def test_rows_stored_for_both_sides(tmp_path: Path, is_equal: bool) -> None:
    stored = {ROWS_IN: torch.ones(2, 8), ROWS_OUT: torch.ones(2, 8) * (1 if is_equal else 2)}
    found, is_tied = merge(tmp_path, stored, trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [3, 7]})
    assert is_tied == is_equal
    assert (OUTPUT in found) != is_equal
    assert found[INPUT][3].tolist() == [1] * 8
    if not is_equal:
        assert found[OUTPUT][[3, 7]].tolist() == [[2] * 8] * 2


def test_the_head_s_own_delta_lies_over_the_tied_rows(tmp_path: Path) -> None:
    found, is_tied = merge(tmp_path, {ROWS_IN: torch.ones(1, 8)} | head_pair(), trainable_token_indices=[3])
    rows = EMBEDDING.clone()
    rows[3] = 1
    assert raw(found[INPUT]) == raw(rows)
    close(found[OUTPUT], rows.double() + delta(head_pair()))
    assert not is_tied


def test_a_resized_embedding_beside_a_delta_is_the_output_s_too(tmp_path: Path) -> None:
    grown = torch.cat([EMBEDDING, torch.ones(4, 8)])
    pair = embedding_pair() | {"model.embed_tokens.lora_embedding_A": random_tensor((RANK, 24), torch.float32)}
    found, is_tied = merge(tmp_path, {INPUT: grown} | pair)
    assert raw(found[OUTPUT]) == raw(grown)
    product = (
        pair["model.embed_tokens.lora_embedding_B"].double() @ pair["model.embed_tokens.lora_embedding_A"].double()
    )
    close(found[INPUT], grown.double() + product.T * 1.5)
    assert not is_tied


def test_sides_of_two_vocabularies_are_refused(tmp_path: Path) -> None:
    says = r"'lm_head\.weight': expected as many rows as 'model\.embed_tokens\.weight' has now, 20, found 24"
    refuse(tmp_path, says, {OUTPUT: torch.ones(24, 8)}, modules_to_save=["lm_head"])


@pytest.mark.parametrize(
    ("name", "config", "output"),
    [
        ("transformer.wte.weight", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, OUTPUT),
        (
            "transformer.word_embeddings.weight",
            {"model_type": "bloom", "architectures": ["BloomForCausalLM"]},
            OUTPUT,
        ),
        (
            "language_model.model.embed_tokens.weight",
            {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
            f"language_model.{OUTPUT}",
        ),
    ],
)
def test_the_output_is_written_where_its_family_looks_for_it(
    tmp_path: Path, name: str, config: Any, output: str
) -> None:
    module = name.removesuffix(".weight")
    config = {**config, "tie_word_embeddings": True}
    found, is_tied = merge(tmp_path, embedding_pair(module), base_tensors(name), config)
    close(found[name], EMBEDDING.double() + delta(embedding_pair(module)))
    assert raw(found[output]) == raw(EMBEDDING)
    assert not is_tied


def test_an_encoder_s_embedding_has_no_output_to_untie(tmp_path: Path) -> None:
    name = "embeddings.word_embeddings.weight"
    config = {"model_type": "bert", "architectures": ["BertModel"], "tie_word_embeddings": True}
    found, is_tied = merge(tmp_path, embedding_pair("embeddings.word_embeddings"), base_tensors(name), config)
    assert OUTPUT not in found
    assert is_tied


@pytest.mark.parametrize("name", ["model.tok.weight", "decoder.embed_tokens.weight"])
def test_an_output_of_an_unknown_name_is_not_untied(tmp_path: Path, name: str) -> None:
    config = {"model_type": "biogpt", "architectures": ["BioGptForCausalLM"], "tie_word_embeddings": True}
    says = rf"'{name}': expected a base whose output projection is 'lm_head\.weight'.*tied embeddings in BioGptFor"
    refuse(tmp_path, says, embedding_pair(name.removesuffix(".weight")), base_tensors(name), config)


def test_positions_are_not_tied_to_any_output(tmp_path: Path) -> None:
    name = "model.position_embeddings.weight"
    found, is_tied = merge(tmp_path, embedding_pair("model.position_embeddings"), base_tensors(name))
    close(found[name], EMBEDDING.double() + delta(embedding_pair("model.position_embeddings")))
    assert is_tied


def test_another_tensor_s_delta_leaves_the_tie_alone(tmp_path: Path) -> None:
    found, is_tied = merge(tmp_path, {})
    assert raw(found[INPUT]) == raw(EMBEDDING)
    assert OUTPUT not in found
    assert is_tied


def test_an_embedding_that_may_be_the_tied_one_is_refused(tmp_path: Path) -> None:
    base = {"qformer.word_embeddings.weight": EMBEDDING.clone(), "text.decoder.embed_tokens.weight": EMBEDDING.clone()}
    config = TIED | {"model_type": "own", "architectures": ["OwnForConditionalGeneration"]}
    pair = embedding_pair("text.decoder.embed_tokens")
    refuse(tmp_path, "tied embeddings in OwnForConditionalGeneration", pair, base_tensors() | base, config)


def test_rows_reach_both_copies_that_the_disk_holds(tmp_path: Path) -> None:
    base = base_tensors() | {OUTPUT: EMBEDDING.clone()}
    rows = random_tensor((2, 8), torch.float32, seed=5)
    ours, is_tied = merge(tmp_path, {ROWS_IN: rows}, base, trainable_token_indices=[7, 3])
    expected = EMBEDDING.clone()
    expected[[7, 3]] = rows
    assert is_tied
    assert raw(ours[INPUT]) == raw(ours[OUTPUT]) == raw(expected)


def test_rows_lie_under_a_delta_of_the_copied_output(tmp_path: Path) -> None:
    base = base_tensors() | {OUTPUT: EMBEDDING.clone()}
    rows = random_tensor((1, 8), torch.float32, seed=5)
    ours, is_tied = merge(tmp_path, {ROWS_IN: rows, **head_pair()}, base, trainable_token_indices=[7])
    expected = EMBEDDING.clone()
    expected[7] = rows
    assert not is_tied
    assert raw(ours[INPUT]) == raw(expected)
    torch.testing.assert_close(ours[OUTPUT].double(), expected.double() + delta(head_pair()), atol=1e-6, rtol=1e-6)


def test_one_change_with_another_scaling_is_not_the_same_change(tmp_path: Path) -> None:
    pair = embedding_pair()
    factor_a, factor_b = pair.values()
    head = {"lm_head.lora_A.weight": factor_b.T.contiguous(), "lm_head.lora_B.weight": factor_a.T.contiguous()}
    fields = {"ensure_weight_tying": True, "alpha_pattern": {"lm_head": 60}}
    refuse(tmp_path, "as ensure_weight_tying says, found another change", {**pair, **head}, **fields)


def test_rows_laid_over_a_tied_input_are_those_of_the_written_output_too(tmp_path: Path) -> None:
    overlay = torch.cat([EMBEDDING[:12], torch.full((4, 8), 9.0)])
    stored = {"model.embed_tokens.base_layer.weight": overlay}
    pair = {
        "model.embed_tokens.lora_embedding_A": random_tensor((RANK, 16), torch.float32),
        "model.embed_tokens.lora_embedding_B": random_tensor((8, RANK), torch.float32),
    }
    ours, is_tied = merge(tmp_path, stored | pair, options={"vocab": "overlay"})
    assert not is_tied
    assert raw(ours[OUTPUT]) == raw(torch.cat([overlay, EMBEDDING[16:]]))


def test_both_sides_of_a_smaller_vocabulary_are_laid_over(tmp_path: Path) -> None:
    stored = {INPUT: torch.full((16, 8), 2.0), OUTPUT: torch.full((16, 8), 3.0)}
    fields = {"modules_to_save": ["embed_tokens", "lm_head"]}
    ours, is_tied = merge(tmp_path, stored, options={"vocab": "overlay"}, **fields)
    assert not is_tied
    for name, value in ((INPUT, 2.0), (OUTPUT, 3.0)):
        assert raw(ours[name]) == raw(torch.cat([torch.full((16, 8), value), EMBEDDING[16:]]))
