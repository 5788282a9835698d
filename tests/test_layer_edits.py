"""config.json of a model whose layers are repeated: the count, the lists, and what cannot be followed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rawmerge.errors import PlanError
from rawmerge.formats.layer_edits import layer_config_paths, with_layer_count
from rawmerge.formats.model_config import ModelConfig, parse_model_config

ORDER = [0, 1, 1, 2]


def parse(**fields: Any) -> ModelConfig:
    return parse_model_config(json.dumps(fields, indent=2).encode(), "config.json")


def edited(*path: str, **fields: Any) -> Any:
    config = parse(**fields)
    return json.loads(with_layer_count(config, config.text, path, ORDER))


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
def test_the_count_is_changed_under_the_name_that_the_family_gives_it(key: str) -> None:
    assert edited(model_type="llama", **{key: 3}) == {"model_type": "llama", key: 4}


def test_two_names_of_one_count_are_both_changed() -> None:
    found = edited(model_type="falcon", n_layer=3, num_hidden_layers=3)
    assert found == {"model_type": "falcon", "n_layer": 4, "num_hidden_layers": 4}


@pytest.mark.parametrize("key", ["layer_types", "mlp_layer_types", "no_rope_layers"])
def test_what_is_said_of_each_layer_moves_with_it(key: str) -> None:
    found = edited(model_type="qwen2", num_hidden_layers=3, max_window_layers=3, **{key: ["a", "b", "c"]})
    assert found["max_window_layers"] == 3
    assert found[key] == ["a", "b", "b", "c"]


def test_only_the_named_config_is_edited() -> None:
    text = {"model_type": "llama", "num_hidden_layers": 3}
    found = edited("text_config", text_config=text, num_hidden_layers=3, vision_config={"num_hidden_layers": 3})
    assert found == {
        "text_config": {"model_type": "llama", "num_hidden_layers": 4},
        "num_hidden_layers": 3,
        "vision_config": {"num_hidden_layers": 3},
    }


def test_the_configs_with_layers_are_found_at_every_depth() -> None:
    config = parse(n_layer=2, a={"b": {"num_layers": 5}}, c={"num_hidden_layers": True}, d={"num_layers": 0}, e=[1])
    assert layer_config_paths(config) == {(): 2, ("a", "b"): 5}
    assert layer_config_paths(ModelConfig("", {})) == {}


@pytest.mark.parametrize(
    ("fields", "subject"),
    [
        ({"model_type": "qwen2_moe", "mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"model_type": "qwen2_moe", "decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"model_type": "deepseek_v2", "first_k_dense_replace": 1}, "first_k_dense_replace"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "llama", "full_attn_idxs": [1]}, "full_attn_idxs"),
        ({"model_type": "llama", "cross_attention_layers": [1]}, "cross_attention_layers"),
        ({"model_type": "gemma2"}, "layer_types"),
        ({"model_type": "gemma2", "layer_types": None}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": ["a", "b"]}, "layer_types"),
        ({"model_type": "llama", "n_layer": 4}, "num_hidden_layers"),
        ({"model_type": "jamba"}, "model_type"),
        ({"model_type": "t5"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({}, "model_type"),
    ],
    ids=str,
)
def test_a_layer_that_is_what_its_index_makes_it_cannot_be_moved(fields: Any, subject: str) -> None:
    with pytest.raises(PlanError) as refusal:
        edited(num_hidden_layers=3, **fields)
    assert [problem.subject for problem in refusal.value.problems] == [subject]


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen2_moe", "mlp_only_layers": [], "decoder_sparse_step": 1},
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["a", "b", "c"]},
        {"model_type": "bert", "cross_attention_layers": None},
        {"model_type": "gemma2", "layer_types": ["a", "b", "c"]},
    ],
    ids=str,
)
def test_rules_that_pick_no_layer_do_no_harm(fields: Any) -> None:
    assert edited(num_hidden_layers=3, **fields)["num_hidden_layers"] == 4


@pytest.mark.parametrize("order", [[], [3], [-1], [0, 1, 2, 3]], ids=str)
def test_layers_that_the_base_does_not_have_are_refused(order: list[int]) -> None:
    with pytest.raises(PlanError, match="'layer_replication': expected layers from 0 to 2"):
        with_layer_count(parse(model_type="llama", num_hidden_layers=3), "{}", (), order)


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(PlanError) as refusal:
        edited(model_type="new", num_hidden_layers=3, layer_types=["a"], mlp_only_layers=[1])
    assert [problem.subject for problem in refusal.value.problems] == ["model_type", "layer_types", "mlp_only_layers"]


def test_every_other_byte_stays() -> None:
    text = '{"eps" :1.0E-05,\t"num_hidden_layers":3, "model_type": "llama"}\n'
    config = parse_model_config(text.encode(), "config.json")
    assert with_layer_count(config, text, (), ORDER) == text.replace(":3", ":4")
