"""config.json of a base: what is read from it, and the edits that keep it true."""

from __future__ import annotations

import importlib.util
import json
import re
from contextlib import suppress
from pathlib import Path
from time import process_time
from typing import Any

import pytest

from rawmerge.errors import CheckpointError
from rawmerge.formats.model_config import (
    CONV1D_MODULES,
    TEXT_KEYS,
    TIED_BY_DEFAULT,
    ModelConfig,
    parse_model_config,
    with_dtype,
    with_untied_embeddings,
)


def parse(**fields: Any) -> ModelConfig:
    return parse_model_config(json.dumps(fields, indent=2).encode(), "config.json")


def dtypes_after(**fields: Any) -> Any:
    return json.loads(with_dtype(parse(**fields), "float32"))


def untied(**fields: Any) -> Any:
    config = parse(**fields)
    return json.loads(with_untied_embeddings(config, config.text))


def test_the_text_is_kept_as_it_stands() -> None:
    raw = '{"eps" :1.0E-05,\t"name":"\\u00e9 é"}\n'.encode()
    assert parse_model_config(raw, "config.json").text.encode() == raw


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "Expecting value"),
        (b"[]", "not a JSON object but list"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_broken_config_is_refused(raw: bytes, fault: str) -> None:
    with pytest.raises(CheckpointError, match=f"'config.json': expected a config of strict JSON, found .*{fault}"):
        parse_model_config(raw, "config.json")


def test_the_infinity_of_mamba2_configs_is_accepted_and_kept() -> None:
    raw = b'{"dtype": "bfloat16", "time_step_limit": [0.0, Infinity]}'
    config = parse_model_config(raw, "config.json")
    assert with_dtype(config, "float32").encode() == raw.replace(b"bfloat16", b"float32")


@pytest.mark.parametrize("value", [None, 3, ["llama"], {}], ids=str)
def test_fields_of_a_wrong_type_count_as_missing(value: Any) -> None:
    config = parse(model_type=value, architectures="LlamaForCausalLM", tie_word_embeddings=value)
    assert (config.model_type, config.architectures, config.ties_embeddings) == ("", (), False)


def test_model_type_and_architectures_are_read() -> None:
    config = parse(model_type="llama", architectures=["LlamaForCausalLM", 3])
    assert (config.model_type, config.architectures) == ("llama", ("LlamaForCausalLM",))


def test_a_base_without_config_is_of_no_type_and_ties_nothing() -> None:
    config = ModelConfig("", {})
    assert (config.model_type, config.architectures, config.ties_embeddings) == ("", (), False)
    assert with_dtype(config, "float32") == ""


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("model_type", ["gemma", "llama"])
def test_what_the_file_says_of_the_tie_wins_over_the_family(model_type: str, stated: bool) -> None:
    assert parse(model_type=model_type, tie_word_embeddings=stated).ties_embeddings is stated


@pytest.mark.parametrize(("model_type", "ties"), [("gemma", True), ("gpt2", True), ("llama", False), ("new", False)])
def test_a_file_that_does_not_say_follows_its_family(model_type: str, ties: bool) -> None:
    assert parse(model_type=model_type).ties_embeddings is ties


def ties_by_default(config_class: Any) -> bool:
    with suppress(Exception):  # some cannot be made without arguments
        return bool(config_class().tie_word_embeddings)
    return bool(getattr(config_class, "tie_word_embeddings", False))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scope", ["causal models", pytest.param("all models", marks=pytest.mark.slow)])
def test_the_families_that_tie_are_those_of_transformers(scope: str) -> None:
    configs = pytest.importorskip("transformers").CONFIG_MAPPING
    causal = pytest.importorskip("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    families = {name for name in configs if scope == "all models" or name in causal}
    theirs = {name for name in families if ties_by_default(configs[name])}
    assert len(theirs) > 50
    assert theirs == families & TIED_BY_DEFAULT


@pytest.mark.parametrize("name", ["c_attn", "c_proj", "c_fc", "q_attn"])
@pytest.mark.parametrize("nested", [False, True])
def test_gpt2_s_projections_are_stored_transposed_wherever_it_is_nested(name: str, nested: bool) -> None:
    fields = {"model_type": "gpt2"}
    config = parse(model_type="encoder-decoder", decoder={"inner": fields}) if nested else parse(**fields)
    assert config.is_conv1d(name)


@pytest.mark.parametrize("name", ["lm_head", "my_c_attn", "c_attn.deeper", ""])
def test_other_modules_of_gpt2_are_not(name: str) -> None:
    assert not parse(model_type="gpt2").is_conv1d(name)


@pytest.mark.parametrize("model_type", ["llama", "unheard of", None])
def test_no_module_of_another_family_is_stored_transposed(model_type: Any) -> None:
    assert not parse(model_type=model_type).is_conv1d("c_attn")


def test_model_types_are_those_of_nested_configs_too() -> None:
    found = parse(model_type="llava", text_config={"model_type": "llama"}, a={"b": {"model_type": "gpt2"}}, c=[3])
    assert found.model_types == {"llava", "llama", "gpt2"}


@pytest.mark.parametrize(
    ("fields", "is_of_transformers"),
    [({"model_type": "llama"}, True), ({"model_type": "llama", "auto_map": {}}, False), ({}, False)],
)
def test_a_model_with_code_of_its_own_is_not_transformers(fields: Any, is_of_transformers: bool) -> None:
    assert parse(**fields).is_of_transformers is is_of_transformers


@pytest.mark.parity
def test_the_modules_stored_transposed_are_transformers_conv1ds() -> None:
    pytest.importorskip("transformers")
    spec = importlib.util.find_spec("transformers")
    assert spec
    assert spec.origin
    found = {}
    for path in (Path(spec.origin).parent / "models").glob("*/modeling_*.py"):
        if names := set(re.findall(r"self\.(\w+) = Conv1D\(", path.read_text())):
            found[path.parent.name.replace("openai", "openai-gpt")] = names
    assert found.keys() == CONV1D_MODULES.keys() - {"clvp_decoder"}
    assert all(names <= CONV1D_MODULES[model_type] for model_type, names in found.items())


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("stated", ["float64", "float32", "float16", "bfloat16"])
def test_a_stated_dtype_is_changed_under_either_name(key: str, stated: str) -> None:
    assert dtypes_after(a=1, **{key: stated}) == {"a": 1, key: "float32"}


def test_nested_dtypes_are_changed_with_the_outer_one() -> None:
    found = dtypes_after(dtype="float16", text_config={"dtype": "bfloat16", "inner": {"torch_dtype": "float16"}})
    assert found == {"dtype": "float32", "text_config": {"dtype": "float32", "inner": {"torch_dtype": "float32"}}}


@pytest.mark.parametrize("stated", ["auto", "float8_e4m3fn", "int8", None, 16, ["float16"]], ids=str)
def test_what_is_no_plain_float_dtype_is_left_alone(stated: Any) -> None:
    assert dtypes_after(dtype=stated) == {"dtype": stated}


def test_the_dtypes_of_a_quantisation_are_left_alone() -> None:
    quantised = {"quantization_config": {"dtype": "float16", "inner": {"dtype": "float16"}}}
    assert dtypes_after(dtype="float16", **quantised, vision=quantised) == {
        "dtype": "float32",
        **quantised,
        "vision": quantised,
    }


def test_a_config_without_a_dtype_gets_none() -> None:
    config = parse(model_type="llama", text_config={})
    assert with_dtype(config, "float32") == config.text


def test_a_tie_is_undone_where_it_stands() -> None:
    assert untied(tie_word_embeddings=True, a=1) == {"tie_word_embeddings": False, "a": 1}


def test_a_nested_tie_is_undone_and_an_outer_one_stated() -> None:
    found = untied(text_config={"tie_word_embeddings": True, "b": 2})
    assert found == {"text_config": {"tie_word_embeddings": False, "b": 2}, "tie_word_embeddings": False}


@pytest.mark.parametrize("fields", [{}, {"model_type": "gemma"}])
def test_a_tie_by_default_is_undone_by_a_new_last_member(fields: Any) -> None:
    assert list(untied(**fields).items()) == [*fields.items(), ("tie_word_embeddings", False)]


def test_a_tie_inside_a_table_of_that_name_is_undone() -> None:
    inner = {"tie_word_embeddings": True}
    assert untied(tie_word_embeddings=inner) == {"tie_word_embeddings": {"tie_word_embeddings": False}}


def test_ties_are_undone_at_every_depth() -> None:
    edited = untied(thinker_config={"text_config": {"tie_word_embeddings": True}}, tie_word_embeddings=True)
    expected = {"thinker_config": {"text_config": {"tie_word_embeddings": False}}, "tie_word_embeddings": False}
    assert edited == expected


def test_a_nested_family_that_ties_unsaid_is_told_not_to() -> None:
    nested = {"text_config": {"model_type": "gemma"}, "vision_config": {"model_type": "gemma"}}
    edited = untied(**nested)
    assert edited["text_config"] == {"model_type": "gemma", "tie_word_embeddings": False}
    assert edited["vision_config"] == {"model_type": "gemma"}
    assert edited["tie_word_embeddings"] is False


def test_thousands_of_nested_families_are_untied_in_one_go() -> None:
    keys = sorted(TEXT_KEYS)
    nested: dict[str, Any] = {"model_type": "gemma"}
    for _ in range(3):
        nested = {"model_type": "gemma", **dict.fromkeys(keys, nested)}
    started = process_time()
    edited = json.dumps(untied(**nested))
    assert process_time() - started < 20  # once it took ten minutes: the text was gone through for each
    assert edited.count('"tie_word_embeddings": false') == sum(len(keys) ** depth for depth in range(4))


def test_a_nested_family_that_does_not_tie_is_left_alone() -> None:
    nested = {"text_config": {"model_type": "llama"}}
    assert untied(**nested) == {**nested, "tie_word_embeddings": False}


def test_the_name_that_lfm2_gives_the_tie_counts_too() -> None:
    assert parse(model_type="new", tie_embedding=True).ties_embeddings
    assert untied(tie_embedding=True) == {"tie_embedding": False, "tie_word_embeddings": False}


def test_a_tie_that_is_null_is_stated_false() -> None:
    nested = {"text_config": {"tie_word_embeddings": None}}
    assert untied(**nested, tie_word_embeddings=None) == {
        "text_config": {"tie_word_embeddings": False},
        "tie_word_embeddings": False,
    }


@pytest.mark.parametrize(("key", "ties"), [("text_config", True), ("decoder", True), ("vision_config", False)])
def test_a_nested_text_config_that_does_not_say_follows_its_family(key: str, ties: bool) -> None:
    assert parse(model_type="llava", **{key: {"model_type": "gemma"}}).ties_embeddings is ties


def test_what_is_stated_anywhere_wins_over_nested_families() -> None:
    assert not parse(tie_word_embeddings=False, text_config={"model_type": "gemma"}).ties_embeddings


def test_text_configs_are_found_by_their_keys_outer_ones_first() -> None:
    config = parse(thinker_config={"text_config": {"a": 1}, "audio_config": {"text_config": {}}}, text_config=[1])
    assert [path for path, _ in config.text_sides()] == [(), ("thinker_config",), ("thinker_config", "text_config")]


def test_undoing_a_tie_keeps_earlier_edits() -> None:
    config = parse(dtype="float16", tie_word_embeddings=True)
    edited = json.loads(with_untied_embeddings(config, with_dtype(config, "float32")))
    assert edited == {"dtype": "float32", "tie_word_embeddings": False}
