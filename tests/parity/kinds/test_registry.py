"""The registry against PEFT: every kind that it knows is merged or refused by name, every field has a meaning."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import rawmerge
from rawmerge.errors import UnsupportedAdapterError
from rawmerge.formats.adapter_config import parse_adapter_config
from rawmerge.formats.adapter_fields import COMMON_FIELDS, COMMON_IGNORED
from rawmerge.methods import ADAPTER_KINDS
from rawmerge.methods.refused import REFUSED_KINDS
from tests.builders import tiny_merge

peft = pytest.importorskip("peft")
mapping = pytest.importorskip("peft.mapping")
pytestmark = pytest.mark.parity

#: BONE is what PEFT called MISS.
OLD = {"BONE"}
KINDS = sorted(name for name, kind in ADAPTER_KINDS.items() if not kind.is_foreign and name not in {"LORA", *OLD})
#: Fields without a default that makes a config of the kind.
NEEDED: dict[str, dict[str, Any]] = {"ADALORA": {"total_step": 10}}
#: Fields of PEFT's that rawmerge refuses when they are set, by kind; everything else it follows or ignores.
REFUSED_WHEN_SET: dict[str, set[str]] = {
    # AdaLoRA's config is LoRA's and more
    "ADALORA": {
        "alora_invocation_tokens",
        "arrow_config",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "kasa_config",
        "layer_replication",
        "loftq_config",
        "lora_bias",
        "lora_ga_config",
        "megatron_config",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "velora_config",
    },
    "OSF": {"target_svd_config"},
}


def fields_of(kind: str) -> set[str]:
    config_class = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    return {field.name for field in dataclasses.fields(config_class)}


def test_every_kind_of_peft_is_merged_or_refused() -> None:
    known = {peft_type.value for peft_type in peft.PeftType}
    ours = {name for name, kind in ADAPTER_KINDS.items() if not kind.is_foreign}
    assert ours & REFUSED_KINDS.keys() == set()
    assert ours | REFUSED_KINDS.keys() == known | OLD


@pytest.mark.parametrize("kind", KINDS)
def test_a_default_config_is_accepted(kind: str, tmp_path: Path) -> None:
    config_class = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config_class(target_modules=["q_proj"], **NEEDED.get(kind, {})).save_pretrained(tmp_path)
    fields = {name: known.fields for name, known in ADAPTER_KINDS.items()}
    found = parse_adapter_config((tmp_path / "adapter_config.json").read_bytes(), "config", fields)
    assert found.kind == kind
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    for name, value in found.values.items():
        # what is absent gets PEFT's default, and so does null
        default = ADAPTER_KINDS[kind].fields.followed[name].default
        assert value == (default if stated.get(name) is None else stated[name])


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_peft_s(kind: str) -> None:
    config_class = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name, known in ADAPTER_KINDS[kind].fields.followed.items():
        theirs = defaults.get(name, dataclasses.MISSING)
        if theirs not in (dataclasses.MISSING, None) and not known.is_required:
            assert known.default == theirs, f"{name}: {known.default} here, {theirs} in PEFT"


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_meaning(kind: str) -> None:
    of_kind = ADAPTER_KINDS[kind].fields
    patterns = {f"{name}_pattern" for name in ("rank", "alpha") if getattr(of_kind, name)}
    known = {*COMMON_FIELDS, *COMMON_IGNORED, *of_kind.followed, *of_kind.ignored, of_kind.token_indices, *patterns}
    assert fields_of(kind) - known == REFUSED_WHEN_SET.get(kind, set())


@pytest.mark.parametrize("kind", sorted(REFUSED_KINDS))
def test_what_cannot_be_merged_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    base, adapter = tiny_merge(tmp_path)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(UnsupportedAdapterError, match="a kind that can be merged") as refusal:
        rawmerge.plan_merge(base, adapter)
    assert refusal.value.problems[0].hint == REFUSED_KINDS[kind]
    assert rawmerge.inspect_path(adapter).problems == refusal.value.problems


def test_a_mixture_names_the_adapters_that_can_be_merged_one_by_one(tmp_path: Path) -> None:
    base, adapter = tiny_merge(tmp_path)
    parts = {"maths": "adapters/maths", "poems": "adapters/poems"}
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "XLORA", "adapters": parts}))
    with pytest.raises(UnsupportedAdapterError, match=r"one by one: 'maths' \('adapters/maths'\), 'poems'"):
        rawmerge.plan_merge(base, adapter)


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    base, adapter = tiny_merge(tmp_path)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA3"}))
    with pytest.raises(UnsupportedAdapterError, match="found 'LORA3'") as refusal:
        rawmerge.plan_merge(base, adapter)
    for kind in KINDS:
        assert kind in refusal.value.problems[0].expected.removeprefix("one of ").split(", ")
