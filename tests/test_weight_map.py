"""The index: which are trusted, and the text that comes out."""

from __future__ import annotations

import json
import ntpath
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.errors import CheckpointError
from rawmerge.formats.weight_map import INDEX_NAME, WeightMap, format_weight_map, is_safe_file_name, parse_weight_map
from tests.strategies import SETTINGS, texts

SHARD = "model-00001-of-00002.safetensors"


def parse(document: Any) -> WeightMap:
    return parse_weight_map(json.dumps(document).encode(), "index.json")


def is_reserved_on_windows(name: str) -> bool:
    modern = getattr(ntpath, "isreserved", None)  # Python 3.13, which deprecates the other
    return bool(modern(name)) if modern else PureWindowsPath(name).is_reserved()


def test_an_index_gives_its_map_its_metadata_and_its_shards_sorted() -> None:
    mapping = {"b": "x2.safetensors", "a": "x1.safetensors", "c": "x2.safetensors"}
    found = parse({"metadata": {"total_size": 12}, "weight_map": mapping})
    assert (found.shard_by_tensor, found.metadata) == (mapping, {"total_size": 12})
    assert found.shard_names == ("x1.safetensors", "x2.safetensors")


@pytest.mark.parametrize("document", [{"weight_map": {"a": SHARD}}, {"metadata": None, "weight_map": {"a": SHARD}}])
def test_an_index_without_metadata_is_read(document: Any) -> None:
    assert parse(document).metadata == {}


@pytest.mark.parity
def test_an_index_that_transformers_wrote_is_formatted_to_the_same_bytes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=4, n_head=1, n_layer=11, vocab_size=8)
    transformers.GPT2Model(config).save_pretrained(tmp_path, max_shard_size="1KB")
    raw = (tmp_path / INDEX_NAME).read_bytes()
    assert format_weight_map(parse_weight_map(raw, "index.json")).encode() == raw


@SETTINGS
@given(st.dictionaries(texts(), st.just(SHARD), min_size=1), st.dictionaries(texts(), st.integers() | texts()))
def test_a_formatted_index_is_read_back(mapping: dict[str, str], metadata: dict[str, Any]) -> None:
    weight_map = WeightMap(mapping, metadata)
    assert parse_weight_map(format_weight_map(weight_map).encode(), "index.json") == weight_map


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "an index of strict JSON, found Expecting value"),
        (b"[]", "not a JSON object but list"),
        (b"{}", r"a table 'weight_map' and a table 'metadata', found \[\]"),
        (b'{"weight_map": {}}', r"found \['weight_map'\]"),
        (b'{"weight_map": ["a"]}', "a table 'weight_map'"),
        (b'{"metadata": [1], "weight_map": {"a": "b.safetensors"}}', "a table 'metadata'"),
        (b'{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "'a' occurs twice"),
        (b'{"metadata": {"total_size": 1e999}, "weight_map": {"a": "b.safetensors"}}', "1e999 is beyond any float"),
    ],
)
def test_a_broken_index_is_refused(raw: bytes, fault: str) -> None:
    with pytest.raises(CheckpointError, match=f"'index.json': expected .*{fault}"):
        parse_weight_map(raw, "index.json")


@pytest.mark.parametrize("shard", [None, 3, True, [SHARD], {SHARD: SHARD}], ids=str)
def test_a_shard_name_that_is_no_text_is_refused(shard: Any) -> None:
    with pytest.raises(CheckpointError, match=r"plain \*.safetensors file names, found"):
        parse({"weight_map": {"a": SHARD, "b": shard}})


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../model.safetensors",
        "/etc/model.safetensors",
        "folder/model.safetensors",
        "folder\\model.safetensors",
        "C:model.safetensors",
        "model.safetensors:stream.safetensors",
        "mo\0del.safetensors",
        "mo\ndel.safetensors",
        "mo\u202edel.safetensors",
        "mode\u0301l.safetensors",
        " model.safetensors",
        ".safetensors",
        "nul.safetensors",
        "CON.safetensors",
        "con .safetensors",
        "Com1.model.safetensors",
        "com\u00b9.safetensors",
        "CONOUT$.safetensors",
        "mo*del.safetensors",
    ],
    ids=ascii,
)
def test_a_name_that_is_no_plain_file_name_is_refused(name: str) -> None:
    assert not is_safe_file_name(name)
    with pytest.raises(CheckpointError, match=r"plain \*.safetensors file names, found"):
        parse({"weight_map": {"a": name}})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors.bin", "model.SAFETENSORS", "model"])
def test_shards_of_other_formats_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"plain \*.safetensors file names, found '"):
        parse({"weight_map": {"a": name}})


@pytest.mark.parametrize(
    "name", ["model.safetensors", SHARD, "modèle 7b.safetensors", "a..b.safetensors", "console.safetensors"]
)
def test_plain_file_names_are_safe(name: str) -> None:
    assert is_safe_file_name(name)
    assert parse({"weight_map": {"a": name}}).shard_names == (name,)


def test_names_that_differ_in_case_only_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"differ in more than case, found 'A.safetensors' and 'a.safetensors'"):
        parse({"weight_map": {"a": "a.safetensors", "b": "A.safetensors"}})


@SETTINGS
@given(
    st.text("abC.:/\\ ~$0\u0301\u00b9\n", max_size=8) | st.sampled_from(["con", "AUX.x", "lpt9", "conin$ .x"]) | texts()
)
def test_a_safe_name_is_one_component_on_every_system(name: str) -> None:
    if is_safe_file_name(name):
        assert Path("/folder", name).parent == Path("/folder")
        assert Path("/folder", name).name == PureWindowsPath("C:\\folder", name).name == name
        assert not is_reserved_on_windows(name)
