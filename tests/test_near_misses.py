"""Suggestions for adapter targets that the base does not have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.matching.near_misses import near_misses, suggest
from tests.strategies import SETTINGS, module_paths

LLAMA = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1, 10) for name in ("q", "k", "v")]
BASE = [*LLAMA, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        ("layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("language_model.model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight"),
        ("model.language_model.layers.10.self_attn.v_proj.weight", "model.layers.10.self_attn.v_proj.weight"),
        ("decoder.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("model.layers.0.attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
    ],
)
def test_the_nearest_name_keeps_the_layer_and_the_projection(target: str, nearest: str) -> None:
    assert near_misses(target, BASE)[0] == nearest


@pytest.mark.parametrize("target", ["audio.conv1.bias", ""])
def test_a_target_like_nothing_in_the_base_has_no_near_miss(target: str) -> None:
    assert near_misses(target, BASE) == []
    assert suggest(target, BASE) == "is this the base the adapter was trained on?"


def test_the_same_tensor_of_another_layer_is_no_near_miss() -> None:
    assert near_misses("model.layers.7.self_attn.q_proj.weight", LLAMA) == []


def test_an_empty_base_has_no_near_miss() -> None:
    assert near_misses("model.norm.weight", []) == []


def test_a_number_inside_another_is_no_match_by_segments() -> None:
    base = ["model.layers.10.q_proj.weight", "model.layers.0.q_proj.weight"]
    assert near_misses("layers.0.q_proj.weight", base) == ["model.layers.0.q_proj.weight"]


def test_a_segment_that_ends_alike_is_no_match_by_segments() -> None:
    assert near_misses("proj.weight", ["h.q_proj.weight", "h.proj.weight"]) == ["h.proj.weight"]


def test_three_segments_in_common_are_a_match_however_different_the_rest_and_two_are_not() -> None:
    base = ["a.wrapper.of.many.quite.different.modules.mlp.fc.weight"]
    assert near_misses("x.mlp.fc.weight", base) == base
    assert near_misses("x.y.fc.weight", base) == []


def test_more_segments_in_common_come_first() -> None:
    base = ["m.decoder.0.q.weight", "m.encoder.0.q.weight"]
    assert near_misses("x.encoder.0.q.weight", base) == base[::-1]


def test_at_most_three_names_are_listed_in_the_base_s_order() -> None:
    base = [f"part{number}.norm.weight" for number in range(5)]
    assert near_misses("norm.weight", base) == base[:3]
    assert suggest("norm.weight", base[:2]).startswith(
        "did you mean 'part0.norm.weight'? shapes, layers or the tower's name do not fit there"
    )


def test_a_prefix_that_the_adapter_lacks_is_named() -> None:
    hint = suggest("layers.0.self_attn.q_proj.weight", BASE)
    assert hint.startswith("did you mean 'model.layers.0.self_attn.q_proj.weight'? shapes, layers or the tower's name")


def test_a_prefix_that_the_base_lacks_is_named() -> None:
    hint = suggest("wrapper.model.layers.0.self_attn.q_proj.weight", BASE)
    assert hint.startswith("did you mean 'model.layers.0.self_attn.q_proj.weight'? shapes, layers or the tower's name")


def test_names_that_differ_inside_are_only_listed() -> None:
    base = ["a.layers.0.q.weight", "b.layers.0.q.weight"]
    assert suggest("c.layers.0.q.weight", base) == "did you mean 'a.layers.0.q.weight' or 'b.layers.0.q.weight'?"


def test_a_hint_has_no_control_characters() -> None:
    assert suggest("norm.weight", ["\x1b[31m.norm.weight"]).isprintable()


@SETTINGS
@given(module_paths(), st.lists(module_paths(), max_size=8, unique=True))
def test_suggestions_are_names_of_the_base_without_repetition(target: str, base: list[str]) -> None:
    found = near_misses(target, base)
    assert len(found) == len(set(found)) <= 3
    assert set(found) <= set(base)
    assert suggest(target, base).isprintable()


@SETTINGS
@given(module_paths(), module_paths(), st.lists(module_paths(), max_size=8))
def test_a_base_with_more_in_front_is_always_found(front: str, target: str, others: list[str]) -> None:
    base = [name for name in others if not name.endswith(f".{target}")]
    assert near_misses(target, [*base, f"{front}.{target}"])[0] == f"{front}.{target}"
