"""The grammar of adapter tensor names, against names that PEFT writes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from rawmerge.formats.adapter_names import PAIR_ENDINGS, PREFIX, describe_foreign, parse_adapter_name
from tests.strategies import SETTINGS, module_paths, texts

STORED, FOREIGN = "stored", "foreign"


def toy_model() -> Any:
    nn = pytest.importorskip("torch.nn")
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Conv2d(2, 3, 3)])
    parts = {"embed_tokens": nn.Embedding(8, 4), "layers": layers, "norm": nn.LayerNorm(4), "head": nn.Linear(4, 2)}
    return nn.ModuleDict(parts)


def names_from_peft(**fields: Any) -> list[str]:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, **{"target_modules": ["0", "1"], **fields})
    return list(peft.get_peft_model_state_dict(peft.get_peft_model(toy_model(), config), save_embedding_layers=False))


@pytest.mark.parametrize(
    ("name", "role", "module_path", "target"),
    [
        ("h.0.q.lora_A.weight", "lora_a", "h.0.q", "h.0.q.weight"),
        ("h.0.q.lora_B.weight", "lora_b", "h.0.q", "h.0.q.weight"),
        ("wte.lora_embedding_A", "lora_embedding_a", "wte", "wte.weight"),
        ("wte.lora_embedding_B", "lora_embedding_b", "wte", "wte.weight"),
        ("embed_tokens.base_layer.weight", STORED, "embed_tokens", "embed_tokens.weight"),
        ("score.weight", STORED, "score", "score.weight"),
        ("classifier.dense.bias", STORED, "classifier.dense", "classifier.dense.bias"),
        ("bn.running_mean", STORED, "bn", "bn.running_mean"),
        ("pooler", STORED, "", "pooler"),
    ],
)
def test_a_name_says_what_the_tensor_is_for(name: str, role: str, module_path: str, target: str) -> None:
    found = parse_adapter_name(PREFIX + name)
    assert (found.role, found.module_path, found.target) == (role, module_path, target)
    assert found.text == PREFIX + name


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("h.0.q.lora_A.weight", "a name without 'base_model.model.'"),
        ("model.h.0.q.lora_A.weight", "a name without 'base_model.model.'"),
        ("base_model.vera_A", "a name without 'base_model.model.'"),
        ("", "a name without 'base_model.model.'"),
        (f"{PREFIX}h.q.lora_magnitude_vector", "a DoRA magnitude"),
        (f"{PREFIX}h.q.lora_magnitude_vector.weight", "a DoRA magnitude"),
        (f"{PREFIX}wte.token_adapter.trainable_tokens_delta", "trained token rows"),
        (f"{PREFIX}h.q.base_layer.bias", "a pair on a nested module, or a trained bias"),
        (
            f"{PREFIX}score.modules_to_save.default.weight",
            "a saved module under the name it has in memory, as when the vocabulary was resized",
        ),
        (f"{PREFIX}h.q.lora_A.default.weight", "a LoRA tensor with a name PEFT does not save"),
        (f"{PREFIX}h.q.lora_A", "a LoRA tensor with a name PEFT does not save"),
        (f"{PREFIX}h.q.lora_B.bias", "a LoRA tensor with a name PEFT does not save, or a LoRA bias"),
        (f"{PREFIX}lora_A.weight", "a LoRA tensor with a name PEFT does not save"),
        (f"{PREFIX}wte.lora_embedding_A.default", "a LoRA tensor with a name PEFT does not save"),
        (f"{PREFIX}q.lora_embedding_B.weight", "a LoRA tensor with a name PEFT does not save"),
    ],
)
def test_a_name_outside_the_grammar_is_foreign_and_described(text: str, what: str) -> None:
    assert parse_adapter_name(text).role == FOREIGN
    assert describe_foreign(text) == what


def test_a_name_that_is_not_foreign_has_no_description_of_its_own() -> None:
    assert describe_foreign(f"{PREFIX}score.weight") == "an unknown name"


def test_parts_of_names_count_as_whole_segments_only() -> None:
    assert parse_adapter_name(f"{PREFIX}my_lora_A.base_layers.weight").role == STORED


@SETTINGS
@given(module_paths())
def test_any_module_s_pair_is_recognised(path: str) -> None:
    found = {parse_adapter_name(f"{PREFIX}{path}{ending}") for ending in PAIR_ENDINGS}
    assert {name.role for name in found} == set(PAIR_ENDINGS.values())
    assert {(name.module_path, name.target) for name in found} == {(path, f"{path}.weight")}


@SETTINGS
@given(texts(), texts())
def test_any_text_at_all_gets_a_role(text: str, module: str) -> None:
    for name in (text, PREFIX + text, f"{PREFIX}{module}.{text}"):
        found = parse_adapter_name(name)
        assert found.role in {STORED, FOREIGN, *PAIR_ENDINGS.values()}
        assert describe_foreign(name)


@pytest.mark.parity
def test_the_names_that_peft_saves_lead_to_the_model_s_own_parameters() -> None:
    names = names_from_peft(target_modules=["0", "1", "embed_tokens"], modules_to_save=["head", "norm"])
    found = [parse_adapter_name(name) for name in names]
    assert {name.target for name in found} == {*dict(toy_model().named_parameters())} - {
        "layers.0.bias",
        "layers.1.bias",
    }
    assert sorted({name.role for name in found}) == sorted([STORED, *PAIR_ENDINGS.values()])


@pytest.mark.parity
@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"use_dora": True}, "a DoRA magnitude"),
        ({"bias": "lora_only"}, "a pair on a nested module, or a trained bias"),
        ({"lora_bias": True}, "a LoRA tensor with a name PEFT does not save, or a LoRA bias"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trained token rows"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes a bias in lora_B for a broken factor
def test_tensors_beside_the_pairs_are_foreign(fields: dict[str, Any], what: str) -> None:
    extra = set(names_from_peft(**fields)) - set(names_from_peft())
    assert {parse_adapter_name(name).role for name in extra} == {FOREIGN}
    assert {describe_foreign(name) for name in extra} == {what}
