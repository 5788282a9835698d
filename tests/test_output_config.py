"""The output's config.json: edited where the merge makes it untrue, and told where that is not certain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge.errors import RefusedError
from tests.builders import PREFIX, lora_pair, random_tensor, write_adapter, write_base

Q = "model.layers.0.q_proj"
Tensors = dict[str, torch.Tensor]
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def write(
    folder: Path, tensors: Tensors, base: Tensors | None = None, config: Any = LLAMA, **fields: Any
) -> tuple[Path, Path]:
    stored = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    whole = {f"{Q}.weight": random_tensor((12, 8), torch.float32), **(base or {})}
    adapter = write_adapter(folder / "adapter", {**lora_pair(Q, 12, 8), **stored}, **fields)
    return write_base(folder / "base", [whole], config), adapter


def edited(
    folder: Path, *args: Any, options: dict[str, Any] | None = None, **fields: Any
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the output's config, and the plan's notes."""
    paths = write(folder, *args, **fields)
    notes = rawmerge.plan_merge(*paths, **(options or {})).notes
    rawmerge.merge_adapter(*paths, folder / "out", **(options or {}))
    return json.loads((folder / "out" / "config.json").read_text()), notes


def refuse(folder: Path, says: str, *args: Any, **fields: Any) -> None:
    with pytest.raises(RefusedError, match=says):
        rawmerge.merge_adapter(*write(folder, *args, **fields), folder / "out")
    assert not (folder / "out").exists()


def test_a_merge_that_makes_nothing_untrue_keeps_every_byte(tmp_path: Path) -> None:
    config, notes = edited(tmp_path, {})
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    assert config == LLAMA
    assert notes == ()


def test_a_base_without_a_config_gets_none(tmp_path: Path) -> None:
    base, adapter = write(tmp_path, {"score.weight": torch.ones(3, 8)}, modules_to_save=["score"])
    (base / "config.json").unlink()
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def vocabularies(**rows: int) -> Tensors:
    names = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
    return {names[name]: torch.ones(count, 8) for name, count in rows.items()}


def test_the_vocabulary_s_size_follows_its_rows(tmp_path: Path) -> None:
    stored, base = vocabularies(embed=24, head=24), vocabularies(embed=20, head=20)
    config, notes = edited(tmp_path, stored, base, LLAMA | {"vocab_size": 20})
    assert config == LLAMA | {"vocab_size": 24}
    assert notes == ("the vocabulary grows from 20 to 24 rows; config.json follows",)


def test_a_size_that_may_mean_something_else_is_told(tmp_path: Path) -> None:
    stored, base = vocabularies(embed=24, head=24), vocabularies(embed=20, head=20)
    nested = {"text_config": {"vocab_size": 32}, "vocab_size": 30}
    _, notes = edited(tmp_path, stored, base, {"model_type": "own", "tie_word_embeddings": False, **nested})
    assert notes[-1] == "where config.json states the vocabulary's size is not certain; check vocab_size in it"


def test_two_vocabularies_that_grow_are_refused(tmp_path: Path) -> None:
    stored, base = vocabularies(embed=24, head=36), vocabularies(embed=20, head=30)
    says = "'vocabulary': expected one size of the grown vocabulary, found (36|24) in 'lm_head|model"
    refuse(tmp_path, says, stored, base, modules_to_save=["embed_tokens", "lm_head"])


@pytest.mark.parametrize("name", ["score.weight", "classifier.out_proj.weight"])
def test_labels_of_a_new_head_are_written(tmp_path: Path, name: str) -> None:
    config, notes = edited(tmp_path, {name: torch.ones(3, 8)}, modules_to_save=[name.partition(".")[0]])
    labels = {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert config == LLAMA | {"id2label": labels, "label2id": {label: int(at) for at, label in labels.items()}}
    (note,) = notes
    assert f"'{name}' is a head of 3 labels; config.json names LlamaForCausalLM: load the output with the class" in note


def test_labels_that_the_config_states_otherwise_are_left_and_told(tmp_path: Path) -> None:
    stated = {"model_type": "own", "num_labels": 5}
    config, notes = edited(tmp_path, {"score.weight": torch.ones(3, 8)}, None, stated, modules_to_save=["score"])
    assert config == stated
    (note,) = notes
    assert "config.json names no architecture" in note
    assert note.endswith("; config.json states 5 labels, correct it by hand")


def test_a_saved_layer_is_no_head(tmp_path: Path) -> None:
    stored = {"extra.weight": torch.ones(3, 8), "score.bias": torch.ones(3)}
    config, notes = edited(tmp_path, stored, modules_to_save=["extra", "score"])
    assert config == LLAMA
    assert notes == ()


REPLICATED = {"layer_replication": [[0, 1], [0, 1]]}


@pytest.mark.parametrize(
    ("stated", "found"),
    [({}, "none"), ({"num_hidden_layers": 1, "text_config": {"num_layers": 1}}, r"config\.json, text_config")],
)
def test_layers_are_replicated_where_the_config_has_one_number_of_them(
    tmp_path: Path, stated: dict[str, Any], found: str
) -> None:
    config = {"model_type": "own", **stated}
    says = rf"'layer_replication': expected one number of layers in config\.json, found {found}"
    refuse(tmp_path, says, {}, None, config, **REPLICATED)


def test_a_dtype_and_a_number_of_layers_are_both_edited(tmp_path: Path) -> None:
    stated = LLAMA | {"num_hidden_layers": 1, "dtype": "float32"}
    config, notes = edited(tmp_path, {}, None, stated, options={"dtype": "bfloat16"}, **REPLICATED)
    assert config == stated | {"num_hidden_layers": 2, "dtype": "bfloat16"}
    assert notes == ("1 of the base's layers become 2, each written with its own delta",)


def test_a_vocabulary_of_another_name_grows_in_the_config_too(tmp_path: Path) -> None:
    tensors = {"backbone.embeddings.weight": torch.ones(20, 8), "lm_head.weight": torch.ones(20, 8)}
    config = {"model_type": "mamba", "tie_word_embeddings": False, "vocab_size": 20}
    stored = {f"{PREFIX}{name}": torch.zeros(24, 8) for name in tensors}
    adapter = write_adapter(tmp_path / "adapter", stored, modules_to_save=["embeddings", "lm_head"])
    rawmerge.merge_adapter(write_base(tmp_path / "base", [tensors], config), adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"vocab_size": 24}
