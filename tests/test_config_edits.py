"""Edits of config.json for a larger vocabulary and for a head; what is certain, and what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.formats.config_edits import head_facts, with_labels, with_vocab_size
from rawmerge.formats.model_config import ModelConfig, parse_model_config
from tests.strategies import SETTINGS


def parse(**fields: Any) -> ModelConfig:
    return parse_model_config(json.dumps(fields, indent=2).encode(), "config.json")


def resized(**fields: Any) -> tuple[Any, bool]:
    """Return the config after the embedding grew from 100 rows to 110, and whether that was certain."""
    config = parse(**fields)
    edit = with_vocab_size(config, config.text, 100, 110)
    return json.loads(edit.text), edit.is_certain


@pytest.mark.parametrize("key", ["vocab_size", "n_words", "n_token"])
def test_the_size_is_changed_under_the_name_that_the_family_gives_it(key: str) -> None:
    assert resized(model_type="a", **{key: 100}) == ({"model_type": "a", key: 110}, True)


def test_every_equal_size_of_the_text_model_is_changed() -> None:
    found = resized(vocab_size=100, text_config={"vocab_size": 100, "n_words": 100}, type_vocab_size=100)
    expected = {"vocab_size": 110, "text_config": {"vocab_size": 110, "n_words": 110}, "type_vocab_size": 100}
    assert found == (expected, True)


@pytest.mark.parametrize("key", ["vision_config", "audio_config", "vq_config", "talker_config", "draft"])
def test_what_sees_or_speaks_keeps_its_own_vocabulary(key: str) -> None:
    other = {key: {"vocab_size": 100, "text_config": {"vocab_size": 100}}}
    assert resized(text_config={"vocab_size": 100}, **other) == ({"text_config": {"vocab_size": 110}, **other}, True)


def test_a_text_model_deep_inside_is_found() -> None:
    found = resized(thinker_config={"text_config": {"vocab_size": 100}}, talker_config={"vocab_size": 100})
    assert found[0]["thinker_config"] == {"text_config": {"vocab_size": 110}}
    assert found[1]


def test_of_two_text_models_the_one_of_that_size_is_changed() -> None:
    found = resized(text_encoder={"vocab_size": 100}, decoder={"vocab_size": 20})
    assert found == ({"text_encoder": {"vocab_size": 110}, "decoder": {"vocab_size": 20}}, True)


@pytest.mark.parametrize(
    "fields",
    [
        {"encoder": {"vocab_size": 100}, "decoder": {"vocab_size": 100}},  # which of them grew?
        {"encoder": {"vocab_size": 100}, "decoder": {}},
        {"vocab_size": 128},  # neither the rows nor another config's size
        {"vocab_size": 100, "text_config": {"vocab_size": 90}},
        {"vocab_size": 100, "padded_vocab_size": 128},  # custom code reads one of them
        {"vocab_size": 90, "n_words": 80},
        {"lm_config": {"vocab_size": 100}},
        {"model_type": "a", "auto_map": {}},
        {},
    ],
    ids=str,
)
def test_what_the_config_leaves_open_is_not_certain(fields: Any) -> None:
    assert not resized(**fields)[1]


def test_a_single_stated_size_is_changed_though_it_is_not_the_rows() -> None:
    assert resized(vocab_size=128) == ({"vocab_size": 110}, False)


@pytest.mark.parametrize("value", [True, "100", 100.0, None, [100]], ids=str)
def test_a_size_that_is_no_whole_number_is_none(value: Any) -> None:
    edited, _ = resized(text_config={"vocab_size": 100}, vocab_size=value)
    assert edited == {"text_config": {"vocab_size": 110}, "vocab_size": value}


def test_a_base_without_config_has_nothing_to_edit() -> None:
    edit = with_vocab_size(ModelConfig("", {}), "", 100, 110)
    assert (edit.text, edit.is_certain) == ("", False)


def test_the_innermost_text_config_gets_a_size_beside_the_outer_one() -> None:
    found = resized(model_type="llava", vocab_size=100, text_config={"model_type": "llama"})
    expected = {"model_type": "llava", "vocab_size": 110, "text_config": {"model_type": "llama", "vocab_size": 110}}
    assert found == (expected, True)


@SETTINGS
@given(st.integers(1, 2**31), st.integers(1, 2**31))
def test_a_plain_size_is_the_only_byte_that_changes(old: int, new: int) -> None:
    text = f'{{"eps" :1.0E-05,\t"vocab_size":{old}, "other": {{"vocab_size": {old}}}}}\n'
    config = parse_model_config(text.encode(), "config.json")
    edit = with_vocab_size(config, text, old, new)
    assert edit.is_certain
    assert edit.text == text.replace(f'"vocab_size":{old}', f'"vocab_size":{new}')


# Heads


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, None),
        ({"num_labels": 4}, 4),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}, "num_labels": 4}, 3),
        ({"id2label": None, "num_labels": 4}, 4),
        ({"num_labels": "4"}, None),
    ],
    ids=str,
)
def test_the_number_of_labels_is_read_as_transformers_reads_it(fields: Any, count: int | None) -> None:
    assert head_facts(parse(**fields)).num_labels == count


def test_the_head_s_other_facts_are_read() -> None:
    facts = head_facts(parse(architectures=["A", "B"], problem_type="regression"))
    assert (facts.architectures, facts.problem_type) == (("A", "B"), "regression")
    assert head_facts(parse(problem_type=3)).problem_type == ""


def test_labels_are_inserted_where_there_are_none() -> None:
    config = parse(a=1)
    edited = with_labels(config, config.text, 3)
    assert edited
    assert edited.endswith('  "label2id": {\n    "LABEL_0": 0,\n    "LABEL_1": 1,\n    "LABEL_2": 2\n  }\n}')
    assert json.loads(edited)["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


@pytest.mark.parametrize("fields", [{"id2label": {"0": "a", "1": "b", "2": "c"}}, {"num_labels": 3}], ids=str)
def test_labels_of_that_number_stay_as_they_are(fields: Any) -> None:
    config = parse(**fields)
    assert with_labels(config, config.text, 3) == config.text
    assert with_labels(config, config.text, 2) is None


@pytest.mark.parametrize("fields", [{"label2id": {"a": 0}}, {"num_labels": "2"}, {"_num_labels": 2}], ids=str)
def test_labels_that_are_half_stated_are_left_to_the_user(fields: Any) -> None:
    config = parse(**fields)
    assert with_labels(config, config.text, 2) is None


def test_one_label_for_a_choice_of_one_is_no_config_that_loads() -> None:
    config = parse(problem_type="single_label_classification")
    assert with_labels(config, config.text, 1) is None
    assert with_labels(config, config.text, 2) == config.text


def test_edits_follow_one_another() -> None:
    config = parse(model_type="bert", vocab_size=100, architectures=["BertModel"])
    text = with_vocab_size(config, config.text, 100, 110).text
    text = with_labels(config, text, 1) or ""
    edited = json.loads(text)
    assert (edited["vocab_size"], edited["architectures"], edited["id2label"]) == (110, ["BertModel"], {"0": "LABEL_0"})
