"""The order in which models register their layers: paths with and without prefix, and what is not known."""

from __future__ import annotations

import json

import pytest

from rawmerge.formats.model_config import ModelConfig, parse_model_config
from rawmerge.matching.module_order import registration_order


def config(model_type: str, **fields: object) -> ModelConfig:
    return parse_model_config(json.dumps({"model_type": model_type, **fields}).encode(), "config.json")


ORDERED = [
    "layers.0.self_attn.q_proj",
    "layers.0.self_attn.k_proj",
    "layers.0.mlp.gate_proj",
    "layers.0.mlp.down_proj",
    "layers.2.self_attn.q_proj",
    "layers.10.self_attn.q_proj",
]


@pytest.mark.parametrize("prefix", ["", "model."])
def test_layers_are_in_the_order_of_their_classes_and_numbers(prefix: str) -> None:
    ordered = [*(f"{prefix}{path}" for path in ORDERED), "lm_head"]
    assert registration_order(config("llama"), sorted(ordered)) == ordered


@pytest.mark.parametrize(
    "path", ["model.layers.0.self_attn", "model.layers.0.mlp.up", "layers", "", "model..", "model.layers.٣.mlp.up_proj"]
)
def test_what_is_no_layer_of_the_family_makes_the_order_unknown(path: str) -> None:
    assert registration_order(config("llama"), [*ORDERED, path]) is None


def test_numbers_too_long_to_count_make_the_order_unknown() -> None:
    assert registration_order(config("llama"), [f"layers.{'9' * 5000}.mlp.up_proj"]) is None


def test_one_layer_by_two_names_makes_the_order_unknown() -> None:
    assert registration_order(config("llama"), [ORDERED[0], f"model.{ORDERED[0]}"]) is None


@pytest.mark.parametrize("unknown", [config("my_model"), config(""), config("llama", auto_map={"AutoModel": "x.Y"})])
def test_the_order_of_a_model_that_is_not_known_is_not_guessed(unknown: ModelConfig) -> None:
    assert registration_order(unknown, ORDERED) is None
