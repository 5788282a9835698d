"""adapter_config.json: followed as PEFT follows it, or refused by the name of the field."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.errors import AdapterError, PlanError, UnsupportedAdapterError
from rawmerge.formats.adapter_config import (
    TASK_HEADS,
    AdapterConfig,
    is_saved_module,
    matches_target,
    parse_adapter_config,
)
from rawmerge.formats.adapter_fields import (
    IGNORED_FIELDS,
    LORA_B_LAYOUTS,
    LORA_VARIANT_FIELDS,
    PLAIN_INITS,
    REFUSED_FIELDS,
    SUPPORTED_FIELDS,
)
from rawmerge.formats.adapter_values import MAX_LAYERS, MAX_TOKEN_INDICES
from tests.strategies import SETTINGS, json_scalars, module_paths, module_patterns, texts

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def parse(**fields: Any) -> AdapterConfig:
    return parse_adapter_config(json.dumps({**PLAIN, **fields}).encode(), "adapter_config.json")


def saved_by_peft(folder: Path, **fields: Any) -> bytes:
    peft = pytest.importorskip("peft")
    peft.LoraConfig(**fields).save_pretrained(folder)
    return (folder / "adapter_config.json").read_bytes()


def regex_is_valid(key: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(rf"(.*\.)?({key})$")
    except re.error:
        return False
    return True


def test_the_fields_that_decide_a_merge_are_read() -> None:
    config = parse(use_rslora=True, fan_in_fan_out=True, modules_to_save=["head"], base_model_name_or_path="org/name")
    assert config == AdapterConfig(8, 16.0, {}, {}, True, True, ("head",), "org/name", values=config.values)


def test_the_least_config_has_peft_s_defaults() -> None:
    config = parse()
    assert config == AdapterConfig(rank=8, alpha=16.0, values=config.values)
    assert {name: value for name, value in config.values.items() if value} == {"init_lora_weights": True}


@pytest.mark.parametrize(
    ("field", "value", "attribute", "expected"),
    [
        ("bias", "none", "bias", "none"),
        ("bias", "all", "bias", "all"),
        ("bias", "lora_only", "bias", "lora_only"),
        ("lora_bias", True, "lora_bias", True),
        ("ensure_weight_tying", True, "ensure_weight_tying", True),
        ("target_parameters", ["experts.down_proj", "w"], "target_parameters", ("experts.down_proj", "w")),
        ("trainable_token_indices", [5, 0, 3], "token_indices", {"": (5, 0, 3)}),
        ("trainable_token_indices", {"wte": [2, 1], "head": []}, "token_indices", {"wte": (2, 1), "head": ()}),
        ("layer_replication", [[0, 4], [2, 5]], "layer_replication", ((0, 4), (2, 5))),
        ("layer_replication", [[0, MAX_LAYERS]], "layer_replication", ((0, MAX_LAYERS),)),
        ("lora_B_layout", "rank_major", "lora_b_layout", "rank_major"),
        ("lora_B_layout", "grouped_by_expert", "lora_b_layout", "grouped_by_expert"),
        ("base_model_name_or_path", "org/name", "base_model_name", "org/name"),
        ("revision", "main", "revision", "main"),
        ("task_type", "CAUSAL_LM", "task_type", "CAUSAL_LM"),
        ("peft_version", "0.18.1.dev0@abc", "peft_version", "0.18.1.dev0@abc"),
        ("auto_mapping", {"base_model_class": "A", "parent_library": "l"}, "base_model_class", "A"),
        ("auto_mapping", {"parent_library": "l", "base_model_class": None}, "base_model_class", ""),
        ("auto_mapping", {}, "base_model_class", ""),
        ("target_modules", "all-linear", "target_modules", "all-linear"),
        ("target_modules", ["q", "v"], "target_modules", ("q", "v")),
        ("exclude_modules", r".*\.head", "exclude_modules", r".*\.head"),
        ("exclude_modules", ["head"], "exclude_modules", ("head",)),
    ],
)
def test_a_field_is_read_into_its_attribute_and_no_other(field: str, value: Any, attribute: str, expected: Any) -> None:
    assert parse(**{field: value}) == dataclasses.replace(parse(), **{attribute: expected})


@pytest.mark.parametrize(
    ("path", "rank", "alpha"),
    [
        ("layers.0.q_proj", 4, 16.0),
        ("layers.1.q_proj", 2, 16.0),
        ("layers.1.v_proj", 8, 7.0),
        ("layers.1.xv_proj", 8, 16.0),
        ("v_proj", 8, 7.0),
        ("layers.0.v_proj.deeper", 8, 16.0),
    ],
)
def test_the_first_pattern_that_fits_the_end_of_a_path_wins(path: str, rank: int, alpha: float) -> None:
    config = parse(rank_pattern={r"0\.q_proj": 4, "q_proj": 2}, alpha_pattern={"v_proj": 7})
    assert (config.rank_of(path), config.alpha_of(path)) == (rank, alpha)


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 16 / 4), (True, 16 / 4**0.5)])
def test_scaling_uses_the_rank_of_the_layer(use_rslora: bool, scaling: float) -> None:
    assert parse(rank_pattern={"q_proj": 4}, use_rslora=use_rslora).scaling_of("h.q_proj") == scaling


@pytest.mark.parity
@SETTINGS
@given(st.dictionaries(module_patterns(), st.integers(1, 99), max_size=4), module_paths())
def test_patterns_are_resolved_as_peft_resolves_them(pattern: dict[str, int], path: str) -> None:
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    pattern = {key: value for key, value in pattern.items() if regex_is_valid(key)}
    expected = pattern.get(get_pattern_key(pattern.keys(), path))
    config = parse(rank_pattern=pattern, alpha_pattern=pattern)
    assert config.rank_of(path) == (expected or 8)
    assert config.alpha_of(path) == (expected or 16)


@pytest.mark.parity
def test_a_key_that_is_the_path_itself_counts_even_where_it_is_no_fitting_regex() -> None:
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    pattern = {"h.c+": 3}
    assert parse(rank_pattern=pattern).rank_of("h.c+") == pattern[get_pattern_key(pattern, "h.c+")]


@pytest.mark.parity
@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_is_peft_s_for_every_layer(tmp_path: Path, use_rslora: bool) -> None:
    peft, nn = pytest.importorskip("peft"), pytest.importorskip("torch.nn")
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["0", "1", "2"], rank_pattern={"1": 5}, alpha_pattern={"1|2": 11}
    )
    config.use_rslora = use_rslora
    model = peft.get_peft_model(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), config)
    model.save_pretrained(tmp_path)
    ours = parse_adapter_config((tmp_path / "adapter_config.json").read_bytes(), "config")
    layers = model.base_model.model
    assert [ours.scaling_of(str(number)) for number in range(3)] == [layer.scaling["default"] for layer in layers]


@pytest.mark.parity
def test_a_default_config_of_peft_is_accepted(tmp_path: Path) -> None:
    found = parse_adapter_config(saved_by_peft(tmp_path), "config")
    assert found == AdapterConfig(8, 8.0, peft_version=pytest.importorskip("peft").__version__, values=parse().values)


@pytest.mark.parity
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"], "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
        {"target_modules": {"q", "v"}, "layers_to_transform": [0, 2], "layers_pattern": "layers", "revision": "main"},
        {"rank_pattern": {"q": 4}, "alpha_pattern": {"^model.q": 3}, "use_rslora": True, "modules_to_save": ["head"]},
        {"init_lora_weights": False, "fan_in_fan_out": True, "megatron_core": "megatron.core"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_plain_lora_as_peft_saves_it_is_accepted(tmp_path: Path, fields: dict[str, Any]) -> None:
    found = parse_adapter_config(saved_by_peft(tmp_path, r=6, **fields), "config")
    assert found.rank == 6
    assert found.use_rslora == fields.get("use_rslora", False)


@pytest.mark.parity
def test_every_field_of_peft_is_supported_ignored_or_refused() -> None:
    fields = {field.name for field in dataclasses.fields(pytest.importorskip("peft").LoraConfig)}
    variants = {*LORA_VARIANT_FIELDS.followed, *LORA_VARIANT_FIELDS.ignored}
    known = SUPPORTED_FIELDS | IGNORED_FIELDS | set(REFUSED_FIELDS) | variants
    assert fields == known - {"lora_B_layout"}  # Unsloth's, not PEFT's


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "value", "attribute", "expected"),
    [
        ("bias", "all", "bias", "all"),
        ("bias", "lora_only", "bias", "lora_only"),
        ("lora_bias", True, "lora_bias", True),
        ("layer_replication", [(0, 4), (2, 5)], "layer_replication", ((0, 4), (2, 5))),
        ("target_parameters", ["experts.gate_up_proj"], "target_parameters", ("experts.gate_up_proj",)),
        ("trainable_token_indices", [1, 2], "token_indices", {"": (1, 2)}),
        ("trainable_token_indices", {"embed_tokens": [3]}, "token_indices", {"embed_tokens": (3,)}),
        ("ensure_weight_tying", True, "ensure_weight_tying", True),
        ("target_modules", {"q"}, "target_modules", ("q",)),
        ("target_modules", "all-linear", "target_modules", "all-linear"),
        ("revision", "abc", "revision", "abc"),
        ("base_model_name_or_path", "org/name", "base_model_name", "org/name"),
    ],
)
def test_what_is_followed_is_read_in_peft_s_own_spelling(
    tmp_path: Path, name: str, value: Any, attribute: str, expected: Any
) -> None:
    fields = {"target_modules": ["q"], "task_type": "CAUSAL_LM", name: value}
    found = parse_adapter_config(saved_by_peft(tmp_path, **fields), "config")
    assert getattr(found, attribute) == expected
    assert (found.task_type, found.peft_version) == ("CAUSAL_LM", pytest.importorskip("peft").__version__)


@pytest.mark.parity
def test_peft_names_the_trained_model_s_class_where_there_is_no_task_type(tmp_path: Path) -> None:
    peft, nn = pytest.importorskip("peft"), pytest.importorskip("torch.nn")
    peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    found = parse_adapter_config((tmp_path / "adapter_config.json").read_bytes(), "config")
    assert (found.base_model_class, found.task_type) == ("Sequential", "")


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_qalora", True),
        ("alora_invocation_tokens", [7]),
        ("init_lora_weights", "pissa_niter_16"),
        ("arrow_config", {"top_k": 2}),
    ],
)
def test_what_is_not_merged_is_refused_in_peft_s_own_spelling(tmp_path: Path, name: str, value: Any) -> None:
    raw = saved_by_peft(tmp_path, target_modules=["q"], task_type="CAUSAL_LM", **{name: value})
    with pytest.raises(UnsupportedAdapterError, match=f"'{name}': expected "):
        parse_adapter_config(raw, "config")


@pytest.mark.parametrize("name", sorted(REFUSED_FIELDS))
@pytest.mark.parametrize("value", [True, "x", [1], {"a": [1]}, 1], ids=str)
def test_a_field_that_is_not_merged_is_refused_by_name_with_its_reason(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedAdapterError, match=re.escape(f"'{name}': expected it to be unset, found")) as caught:
        parse(**{name: value})
    assert [problem.hint for problem in caught.value.problems] == [REFUSED_FIELDS[name]]


@pytest.mark.parametrize("name", [*sorted(REFUSED_FIELDS), "a_field_of_a_newer_peft"])
@pytest.mark.parametrize("value", [None, False, 0, "", [], {}], ids=str)
def test_a_field_that_is_unset_changes_nothing(name: str, value: Any) -> None:
    assert parse(**{name: value}) == parse()


@pytest.mark.parametrize("name", sorted(IGNORED_FIELDS))
@pytest.mark.parametrize("value", ["x", ["x"], {"x": 1}, 3], ids=str)
def test_an_ignored_field_changes_nothing_whatever_it_says(name: str, value: Any) -> None:
    unread: dict[str, Any] = {"layers_to_transform": (), "layers_pattern": ()}  # read for a note only
    assert replace(parse(**{name: value}), **unread) == parse()


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedAdapterError, match="'use_newlora': expected a config field that rawmerge knows"):
        parse(use_newlora=True)


@pytest.mark.parametrize("init", [True, False, None, *sorted(PLAIN_INITS)], ids=str)
def test_an_init_that_leaves_the_base_alone_is_accepted(init: Any) -> None:
    found, plain = parse(init_lora_weights=init), parse()
    assert replace(found, values={}) == replace(plain, values={})
    assert found.values == {**plain.values, "init_lora_weights": True if init is None else init}


@pytest.mark.parametrize(
    "init", ["loftq", "corda", "lora_ga", "pissa_niter_4", "of the future", 1, ["gaussian"], {"a": 1}], ids=str
)
def test_an_init_that_may_have_changed_the_base_is_refused(init: Any) -> None:
    with pytest.raises(UnsupportedAdapterError, match="'init_lora_weights': expected true, false or one of eva"):
        parse(init_lora_weights=init)


@pytest.mark.parametrize("peft_type", ["LOHA", "lora", "ADALORA", "IA3", 3, ["LORA"], {"LORA": 1}, True], ids=str)
def test_another_adapter_type_is_refused(peft_type: Any) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"'peft_type': expected one of LORA, found .*\n.*a newer PEFT"):
        parse(peft_type=peft_type)


@pytest.mark.parametrize("raw", [b"{}", b'{"peft_type": null}', b'{"model_type": "llama"}'])
def test_a_config_without_a_type_is_taken_for_no_adapter(raw: bytes) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"found none\n.*is this the folder of a PEFT adapter"):
        parse_adapter_config(raw, "config")


@pytest.mark.parametrize("rank", [None, 0, -1, 8.0, "8", True, [8], 2**31, float("1e3")], ids=str)
def test_a_rank_must_be_a_positive_whole_number(rank: Any) -> None:
    with pytest.raises(AdapterError, match="'r': expected a positive whole number"):
        parse(r=rank)
    with pytest.raises(AdapterError, match=r"rank_pattern\['q'\].*expected a number that can be used"):
        parse(rank_pattern={"q": rank})


@pytest.mark.parametrize("alpha", [None, 0, 0.0, "16", True, [16], 2**53], ids=str)
def test_an_alpha_must_be_a_number_other_than_zero(alpha: Any) -> None:
    with pytest.raises(AdapterError, match="'lora_alpha': expected a finite number other than 0"):
        parse(lora_alpha=alpha)
    with pytest.raises(AdapterError, match=r"alpha_pattern\['q'\].*expected a number that can be used"):
        parse(alpha_pattern={"q": alpha})


@pytest.mark.parametrize("alpha", [1, -2, 0.5, 2**53 - 1, 1e-300])
def test_any_other_alpha_is_taken_exactly(alpha: float) -> None:
    config = parse(lora_alpha=alpha, alpha_pattern={"q": alpha})
    assert config.alpha == config.alpha_of("q") == alpha


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_an_alpha_that_is_no_number_is_refused(text: str) -> None:
    raw = f'{{"peft_type": "LORA", "r": 8, "lora_alpha": {text}}}'.encode()
    with pytest.raises(AdapterError, match=f"strict JSON, found {text} is"):
        parse_adapter_config(raw, "config")


def test_a_missing_alpha_is_refused_with_where_to_find_it() -> None:
    with pytest.raises(
        AdapterError, match=r"'lora_alpha': expected .*, found nothing\n.*take it from the training script"
    ):
        parse_adapter_config(b'{"peft_type": "LORA", "r": 8}', "config")


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", ["q", ["q"], 3, True], ids=str)
def test_a_pattern_must_be_a_table(name: str, value: Any) -> None:
    with pytest.raises(AdapterError, match=f"'{name}': expected a table from module pattern to number"):
        parse(**{name: value})


@pytest.mark.parametrize("key", ["(", "*", "[", "a{99999999999}", "(?i)q", "(?P<a>", "\\"])
def test_a_pattern_that_is_no_regular_expression_where_it_is_used_is_refused(key: str) -> None:
    with pytest.raises(AdapterError, match=r"alpha_pattern\[.*expected a regular expression"):
        parse(alpha_pattern={key: 3})


@pytest.mark.parametrize("name", ["use_rslora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"])
@pytest.mark.parametrize("value", ["false", 1, [True]], ids=str)
def test_a_switch_must_be_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(AdapterError, match=f"'{name}': expected true or false, found"):
        parse(**{name: value})


@pytest.mark.parametrize("value", ["head", [1], {"head": 1}], ids=str)
def test_modules_to_save_must_be_a_list_of_names(value: Any) -> None:
    with pytest.raises(AdapterError, match="'modules_to_save': expected a list of module names"):
        parse(modules_to_save=value)


@pytest.mark.parametrize(
    "name",
    sorted(SUPPORTED_FIELDS - {"peft_type", "r", "lora_alpha"}),
)
def test_null_is_unset(name: str) -> None:
    assert parse(**{name: None}) == parse()


@pytest.mark.parametrize(
    "name", ["modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"]
)
def test_an_empty_list_is_unset(name: str) -> None:
    assert parse(**{name: []}) == parse()


@pytest.mark.parametrize(
    ("name", "expected", "values"),
    [
        ("bias", "one of none, all, lora_only", ["", "None", "vera_only", True, False, 0, ["all"], {"all": 1}]),
        ("target_parameters", "a list of parameter names", ["w", "", [1], ["w", None], [""], {"w": 1}, 0, True]),
        ("target_modules", "a pattern or a list of module names", [3, True, [1], [["q"]], {"q": 1}]),
        ("exclude_modules", "a pattern or a list of module names", [3, True, [1], [["q"]], {"q": 1}]),
        ("base_model_name_or_path", "text", [3, False, ["org/name"], {"name": 1}]),
        ("revision", "text", [3, 1.5, ["main"]]),
        ("task_type", "text", [1, ["CAUSAL_LM"]]),
        ("peft_version", "text", [0.19, 0, ["0.19"]]),
        ("auto_mapping", "a table whose base_model_class is a name", ["x", ["x"], 1, {"base_model_class": ["x"]}]),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, expected: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(AdapterError, match=f"'{name}': expected {expected}, found {re.escape(ascii(value))}$"):
            parse(**{name: value})


@pytest.mark.parametrize(
    "value",
    [
        0,
        3,
        False,
        "",
        "1",
        [1, "2"],
        [1.0],
        [True],
        [-1],
        [2**31],
        [[1]],
        [4, 7, 4],
        [None],
        {"wte": 1},
        {"wte": None},
        {"wte": [1, 1]},
        {"wte": {"a": 1}},
        {"": [1]},
        {"wte": [1], "head": ["x"]},
        list(range(MAX_TOKEN_INDICES + 1)),
        {"wte": list(range(MAX_TOKEN_INDICES)), "head": [1]},
    ],
    ids=lambda value: str(value)[:30],
)
def test_token_indices_must_be_rows_none_twice(value: Any) -> None:
    with pytest.raises(AdapterError, match="'trainable_token_indices': expected whole numbers, none twice") as caught:
        parse(trainable_token_indices=value)
    assert len(str(caught.value)) < 400


def test_as_many_token_indices_as_allowed_are_taken_in_their_order() -> None:
    indices = list(reversed(range(MAX_TOKEN_INDICES)))
    assert parse(trainable_token_indices=indices).token_indices == {"": tuple(indices)}


def test_a_module_trained_whole_and_by_rows_is_refused_as_peft_refuses_it() -> None:
    with pytest.raises(AdapterError, match="expected modules that are not in modules_to_save, found 'wte' in both"):
        parse(trainable_token_indices={"wte": [1], "head": [2]}, modules_to_save=["x", "wte"])
    assert parse(trainable_token_indices={"wte": [1]}, modules_to_save=["te"]).modules_to_save == ("te",)


@pytest.mark.parametrize(
    "value",
    [
        0,
        False,
        "",
        {"a": 1},
        {},
        [0, 4],
        [[0]],
        [[0, 1, 2]],
        [["0", "4"]],
        [[0, 4.0]],
        [[False, True]],
        [[2, 2]],
        [[3, 2]],
        [[-1, 2]],
        [[0, MAX_LAYERS + 1]],
        [[0, 2**70]],
        [[0, MAX_LAYERS], [0, 1]],
    ],
    ids=lambda value: str(value)[:30],
)
def test_replicated_layers_must_be_ranges_of_some_layers(value: Any) -> None:
    with pytest.raises(AdapterError, match=r"'layer_replication': expected a list of \[start, end\], start < end"):
        parse(layer_replication=value)


@pytest.mark.parametrize("value", ["expert_major", "RANK_MAJOR", True, 1, ["rank_major"], {"rank_major": 1}], ids=str)
def test_an_unknown_layout_of_lora_b_is_refused(value: Any) -> None:
    with pytest.raises(
        UnsupportedAdapterError, match=f"'lora_B_layout': expected one of {', '.join(LORA_B_LAYOUTS)}, found"
    ):
        parse(lora_B_layout=value)


def json_values() -> st.SearchStrategy[Any]:
    scalars = json_scalars() | st.sampled_from(["all", "default", 0, 1, 4])
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=2)
    )


@SETTINGS
@given(st.dictionaries(st.sampled_from(sorted(SUPPORTED_FIELDS - {"peft_type"})), json_values(), max_size=4))
def test_whatever_a_field_holds_it_is_read_or_refused(fields: dict[str, Any]) -> None:
    try:
        config = parse(**fields)
    except (AdapterError, PlanError) as refusal:
        problems = refusal.problems
    else:
        problems = ()
        assert config.bias in {"none", "all", "lora_only"}
        assert all(type(index) is int for indices in config.token_indices.values() for index in indices)
    assert {problem.subject.partition("[")[0] for problem in problems} <= fields.keys()


@pytest.mark.parametrize(
    ("targets", "path", "matches"),
    [
        (("q_proj",), "h.q_proj", True),
        (("q_proj",), "q_proj", True),
        (("q_proj",), "h.xq_proj", False),
        (("q_proj",), "h.q_proj.deeper", False),
        (("v", "0.q_proj"), "h.10.q_proj", False),
        (("v", "0.q_proj"), "h.0.q_proj", True),
        (("experts.down_proj",), "mlp.experts.down_proj", True),
        (("experts.down.proj",), "mlp.experts.down_proj", False),
        ((), "h.q_proj", False),
    ],
)
def test_a_target_is_a_path_or_its_end_at_a_dot(targets: tuple[str, ...], path: str, matches: bool) -> None:
    assert matches_target(targets, path) == matches


@pytest.mark.parity
@SETTINGS
@given(st.lists(module_paths(), min_size=1, max_size=3), module_paths())
def test_targets_match_as_peft_matches_them(targets: list[str], path: str) -> None:
    peft = pytest.importorskip("peft")
    check = pytest.importorskip("peft.tuners.tuners_utils").check_target_module_exists
    config = peft.LoraConfig(target_modules=targets)
    assert matches_target(tuple(targets), path) == bool(check(config, path))


@pytest.mark.parametrize(
    ("saved", "task_type", "path", "is_saved"),
    [
        (["head"], "", "head", True),
        (["head"], "", "lm_head", True),
        (["head"], "", "model.score_head", True),
        (["head"], "", "model.head.dense", True),
        (["head"], "", "model.headless", False),
        (["head"], "", "header.dense", False),
        (["a.head"], "", "a.head.dense.0", True),
        (["a.head"], "", "b.head", False),
        ([], "", "score", False),
        ([], "CAUSAL_LM", "score", False),
        ([], "SEQ_CLS", "score", True),
        ([], "SEQ_CLS", "classifier.dense", True),
        ([], "TOKEN_CLS", "model.classifier", True),
        ([], "QUESTION_ANS", "qa_outputs", True),
        (["head"], "SEQ_CLS", "pooler", False),
        (["head"], "SEQ_CLS", "", False),
    ],
)
def test_a_saved_module_is_one_whose_path_ends_in_a_name(
    saved: list[str], task_type: str, path: str, is_saved: bool
) -> None:
    assert is_saved_module(parse(modules_to_save=saved, task_type=task_type), path) == is_saved


@pytest.mark.parity
@pytest.mark.parametrize("task_type", sorted(TASK_HEADS))
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers 5.23
def test_peft_adds_these_heads_to_the_saved_modules(task_type: str) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(vocab_size=8, **sizes))
    model.score = model.classifier = model.qa_outputs
    config = peft.LoraConfig(target_modules=["query"], task_type=task_type)
    peft.get_peft_model(model, config)
    assert tuple(config.modules_to_save) == TASK_HEADS[task_type]


@pytest.mark.parity
@pytest.mark.parametrize("saved", [["0"], ["0.1"], ["x"], ["0", "head"]], ids=str)
def test_saved_modules_are_peft_s(saved: list[str]) -> None:
    peft, nn = pytest.importorskip("peft"), pytest.importorskip("torch.nn")

    def block() -> Any:
        return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))

    parts = {"q": nn.Linear(2, 2), "10": block(), "tax": nn.Linear(2, 2), "xs": nn.Linear(2, 2), "lm_head": block()}
    model = nn.ModuleDict(parts)
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q"], modules_to_save=saved))
    wrapped = {name.removesuffix(".modules_to_save") for name, _ in model.named_modules()}
    wrapped = {name for name in wrapped if f"{name}.modules_to_save" in dict(model.named_modules())}
    expected = {path for path in paths if any(f"{path}.".startswith(f"{above}.") for above in wrapped)}
    assert {path for path in paths if is_saved_module(parse(modules_to_save=saved), path)} == expected


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"r": 8, "r": 8}', b"\xff"])
def test_a_config_that_is_no_strict_json_is_refused(raw: bytes) -> None:
    with pytest.raises(AdapterError, match="'folder/config': expected an adapter config of strict JSON"):
        parse_adapter_config(raw, "folder/config")


def test_all_unsupported_fields_are_named_at_once() -> None:
    with pytest.raises(UnsupportedAdapterError, match="3 problems") as caught:
        parse(use_qalora=True, arrow_config={"a": 1}, unknown=1)
    assert [problem.subject for problem in caught.value.problems] == ["use_qalora", "arrow_config", "unknown"]


def test_unsupported_fields_and_bad_values_are_named_at_once() -> None:
    with pytest.raises(PlanError, match="2 problems") as caught:
        parse(use_qalora=True, r=0)
    assert [problem.subject for problem in caught.value.problems] == ["use_qalora", "r"]


def test_a_message_is_bounded_whatever_the_value() -> None:
    with pytest.raises(UnsupportedAdapterError, match="use_qalora") as caught:
        parse(use_qalora="\x1b" * 100_000)
    assert len(str(caught.value)) < 300
    assert "\x1b" not in str(caught.value)
