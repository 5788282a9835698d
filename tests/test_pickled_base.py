"""Bases that `torch.save` wrote: read as torch reads them, never run, and written out as safetensors."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import rawmerge
from rawmerge.errors import CheckpointError, InputChangedError, MissingFileError
from tests.builders import (
    PREFIX,
    RANK,
    folder_bytes,
    layered_merge,
    lora_pair,
    random_tensor,
    raw,
    read_all,
    shard_name,
    write_adapter,
    write_base,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
Paths = tuple[Path, Path]


def bin_name(number: int, count: int) -> str:
    return f"pytorch_model-{number:05d}-of-{count:05d}.bin"


def write_bins(folder: Path, shards: Sequence[Mapping[str, Any]], **options: Any) -> Path:
    """Write a base of pickles, with an index where there are several."""
    folder.mkdir(parents=True)
    names = [BIN] if len(shards) == 1 else [bin_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        torch.save(OrderedDict(tensors), folder / name, **options)
    if len(shards) > 1:
        places = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": 1, "made_by": "others"}, "weight_map": places}
        (folder / BIN_INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return a base of three shards, its pickled twin, and an adapter for both."""
    base, adapter = layered_merge(tmp_path)
    shards = [load_file(path) for path in sorted(base.glob("*.safetensors"))]
    pickled = write_bins(tmp_path / "pickled", shards)
    shutil.copy(base / "config.json", pickled)
    return base, pickled, adapter


def loaded(base: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a pickled base, as torch reads them."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.bin")):
        found |= torch.load(path, weights_only=True)
    return found


def small(folder: Path, tensors: Mapping[str, Any], **options: Any) -> Paths:
    """Write a pickled base with `q.weight` and other tensors, and an adapter."""
    base = write_bins(folder / "base", [{"q.weight": random_tensor((12, 8)), **tensors}], **options)
    return base, write_adapter(folder / "adapter", lora_pair("q", 12, 8))


def test_the_merge_has_the_tensors_of_the_safetensors_twin_under_its_names(
    twins: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, pickled, adapter = twins
    rawmerge.merge_adapter(base, adapter, tmp_path / "one")
    summary = rawmerge.merge_adapter(pickled, adapter, tmp_path / "other", verify=True)
    one, other = folder_bytes(tmp_path / "one"), folder_bytes(tmp_path / "other")
    names = [shard_name(number, 3) for number in (1, 2, 3)]
    assert sorted(name for name in other if "model" in name) == sorted([INDEX, *names])
    assert {name: raw(value) for name, value in read_all(tmp_path / "other").items()} == {
        name: raw(value) for name, value in read_all(tmp_path / "one").items()
    }
    with safe_open(tmp_path / "other" / names[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    before, after = (json.loads(files[INDEX]) for files in (one, other))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"] == {"total_size": before["metadata"]["total_size"], "made_by": "others"}
    assert "the base is pickles: their tables of tensors were read, and nothing in them was run" in summary.notes
    assert rawmerge.verify_merge(tmp_path / "other", pickled, adapter).findings == ()


def test_every_other_tensor_is_what_torch_loads(tmp_path: Path) -> None:
    tensors = {
        "half.weight": random_tensor((3, 5), torch.float16),
        "single.weight": random_tensor((7,), torch.float32),
        "double.weight": random_tensor((2, 3), torch.float64),
        "steps": torch.tensor(3),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "none": torch.empty(0, 4),
        "parameter": nn.Parameter(random_tensor((3, 3), torch.float32)),
    }
    base, adapter = small(tmp_path, tensors)
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    before, after = loaded(base), read_all(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in tensors:
        assert (after[name].dtype, after[name].shape) == (before[name].dtype, before[name].shape)
        assert raw(after[name]) == raw(before[name].detach())
    with safe_open(tmp_path / "out" / SINGLE, "pt") as file:
        sizes = [file.get_tensor(name).element_size() for name in file.offset_keys()]
    assert sizes == sorted(sizes, reverse=True)


def test_parts_of_one_storage_are_tensors_of_their_own(tmp_path: Path) -> None:
    whole = random_tensor((6, 4), torch.float32)
    base, adapter = small(tmp_path, {"upper.weight": whole[:2], "lower.weight": whole[2:]})
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    after = read_all(tmp_path / "out")
    assert torch.equal(after["upper.weight"], whole[:2])
    assert torch.equal(after["lower.weight"], whole[2:])


def test_names_of_one_tensor_are_both_written(tmp_path: Path) -> None:
    shared = random_tensor((20, 8), torch.float32)
    tensors = {
        "model.embed_tokens.weight": shared,
        "model.layers.0.q_proj.weight": random_tensor((12, 8), torch.float32),
        "lm_head.weight": shared,
    }
    base = write_bins(tmp_path / "base", [tensors])
    (base / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    adapter = write_adapter(tmp_path / "adapter", lora_pair("model.layers.0.q_proj", 12, 8))
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    after = read_all(tmp_path / "out")
    assert raw(after["lm_head.weight"]) == raw(after["model.embed_tokens.weight"]) == raw(shared)


EMBEDDING, HEAD, Q = "model.embed_tokens", "lm_head", "model.layers.0.q_proj"
WORDS = random_tensor((20, 8), torch.float32)
TIED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 20}


def tied_bases(folder: Path) -> Paths:
    """Return a base that ties its embeddings, and its pickled twin, which lists the tensor under both names."""
    tensors = {f"{EMBEDDING}.weight": WORDS, f"{Q}.weight": random_tensor((12, 8), torch.float32)}
    twin = write_bins(folder / "twin", [{**tensors, f"{HEAD}.weight": WORDS}])
    (twin / "config.json").write_text(json.dumps(TIED))
    return write_base(folder / "base", [tensors], TIED), twin


def tied_adapter(folder: Path, kind: str) -> Path:
    """Write an adapter on one side of the tie or on other modules; `copied` ones store the frozen tensor as well."""
    seed = len(kind)
    inner = {f"{PREFIX}{EMBEDDING}.lora_embedding_A": random_tensor((RANK, 20), torch.float32, seed)}
    inner[f"{PREFIX}{EMBEDDING}.lora_embedding_B"] = random_tensor((8, RANK), torch.float32, seed)
    outer = lora_pair(HEAD, 20, 8)
    rows = {f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta": random_tensor((2, 8), torch.float32, 5)}
    tensors = {
        "input": inner,
        "input copied": inner | {f"{PREFIX}{EMBEDDING}.base_layer.weight": WORDS.clone()},
        "output": outer,
        "output copied": outer | {f"{PREFIX}{HEAD}.base_layer.weight": WORDS.clone()},
        "whole output": {f"{PREFIX}{HEAD}.weight": random_tensor((20, 8), torch.float32, 8)},
        "rows": lora_pair(Q, 12, 8) | rows,
    }
    fields: dict[str, Any] = {"rows": {"trainable_token_indices": [3, 7]}, "whole output": {"modules_to_save": [HEAD]}}
    return write_adapter(folder / kind, tensors[kind], **fields.get(kind, {}))


TIED_KINDS = ("input", "input copied", "output", "output copied", "whole output", "rows")


@pytest.mark.parametrize("order", ["serial", "once"])
@pytest.mark.parametrize("kinds", list(permutations(TIED_KINDS, 2)), ids=" then ".join)
def test_adapters_on_a_tied_base_go_together_as_on_its_safetensors_twin(
    tmp_path: Path, kinds: tuple[str, str], order: str
) -> None:
    adapters = [tied_adapter(tmp_path, kind) for kind in kinds]
    found: list[list[Any]] = []
    for number, base in enumerate(tied_bases(tmp_path)):
        try:
            rawmerge.merge_adapter(base, adapters, tmp_path / f"out{number}", order=order)
        except rawmerge.RefusedError as error:
            found.append([(problem.subject, problem.expected, problem.found) for problem in error.problems])
        else:
            found.append([(name, raw(tensor)) for name, tensor in sorted(read_all(tmp_path / f"out{number}").items())])
            found[-1].append(json.loads((tmp_path / f"out{number}/config.json").read_text()))
    assert found[0] == found[1]


@pytest.mark.parametrize("second", ["input", "input copied", "whole output"])
def test_rows_reach_the_output_that_a_later_adapter_parts_from_them(tmp_path: Path, second: str) -> None:
    adapters = [tied_adapter(tmp_path, kind) for kind in ("rows", second)]
    head = WORDS.clone()
    head[[3, 7]] = read_all(adapters[0])[f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta"]
    if second == "whole output":
        head = read_all(adapters[1])[f"{PREFIX}{HEAD}.weight"]
    for base in tied_bases(tmp_path):
        rawmerge.merge_adapter(base, adapters, tmp_path / f"out-{base.name}")
        assert raw(read_all(tmp_path / f"out-{base.name}")[f"{HEAD}.weight"]) == raw(head)


def test_a_tied_tensor_of_a_known_family_is_written_once(tmp_path: Path) -> None:
    base, twin = tied_bases(tmp_path)
    rawmerge.merge_adapter(twin, write_adapter(tmp_path / "adapter", lora_pair(Q, 12, 8)), tmp_path / "out")
    assert set(read_all(tmp_path / "out")) == set(read_all(base))
    assert json.loads((tmp_path / "out/config.json").read_text()) == TIED


def as_transformers_4(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    """Write a checkpoint that lists a tied tensor twice over one storage, and counts it once in its index."""
    places = {name: bin_name(1 + ("embed" not in name and "head" not in name), 2) for name in tensors}
    folder.mkdir()
    for file in set(places.values()):
        torch.save({name: at for name, at in tensors.items() if places[name] == file}, folder / file)
    once = {at.data_ptr(): at.nbytes for at in tensors.values()}
    index = {"metadata": {"total_size": sum(once.values())}, "weight_map": places}
    (folder / BIN_INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("given", [0, 1], ids=["safetensors", "pickled"])
@pytest.mark.parametrize(
    ("head", "config", "subjects"),
    [
        ("tied", {}, []),
        ("other", {}, [f"{HEAD}.weight"]),
        ("a part", {}, [f"{HEAD}.weight"]),
        ("tied", {"tie_word_embeddings": False}, [f"{HEAD}.weight"]),
        ("tied", {"architectures": ["OwnModel"], "model_type": "own"}, [f"{HEAD}.weight"]),
    ],
    ids=["tied", "of other bytes", "of another shape", "not tied by the config", "of an unknown family"],
)
def test_a_second_name_of_a_tied_tensor_is_no_finding(
    tmp_path: Path, given: int, head: str, config: dict[str, Any], subjects: list[str]
) -> None:
    base, adapter = tied_bases(tmp_path)[given], write_adapter(tmp_path / "adapter", lora_pair(Q, 12, 8))
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    tensors = {name: at.clone() for name, at in read_all(tmp_path / "out").items()}
    words = tensors[f"{EMBEDDING}.weight"]
    tensors[f"{HEAD}.weight"] = {"tied": words, "other": 2 * words, "a part": words[:10].clone()}[head]
    others = as_transformers_4(tmp_path / "others", tensors, TIED | config)
    found = rawmerge.verify_merge(others, base, adapter)
    assert [problem.subject for problem in found.findings] == subjects


def test_both_names_are_compared_where_the_tie_is_undone(tmp_path: Path) -> None:
    base, adapter = tied_bases(tmp_path)[1], tied_adapter(tmp_path, "input")
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    tensors = read_all(tmp_path / "out")
    assert raw(tensors[f"{HEAD}.weight"]) != raw(tensors[f"{EMBEDDING}.weight"])
    tensors[f"{HEAD}.weight"] = tensors[f"{EMBEDDING}.weight"]
    found = rawmerge.verify_merge(as_transformers_4(tmp_path / "others", tensors, TIED), base, adapter)
    assert [item.name for item in found.differences] == [f"{HEAD}.weight"]


def aliased(folder: Path) -> Path:
    """Write a base of a class of its own, whose input and output are one storage."""
    shared = WORDS.clone()
    base = write_bins(folder / "base", [{"body.w.weight": shared, "head.weight": shared}])
    (base / "config.json").write_text(json.dumps(TIED | {"model_type": "own", "architectures": ["OwnLMHeadModel"]}))
    return base


def test_trained_rows_reach_all_names_of_a_tensor(tmp_path: Path) -> None:
    rows = random_tensor((2, 8), torch.float32, 5)
    tensors = {f"{PREFIX}body.w.token_adapter.trainable_tokens_delta": rows}
    adapter = write_adapter(tmp_path / "adapter", tensors, trainable_token_indices={"w": [3, 7]})
    rawmerge.merge_adapter(aliased(tmp_path), adapter, tmp_path / "out")
    expected, after = WORDS.clone(), read_all(tmp_path / "out")
    expected[[3, 7]] = rows
    assert raw(after["head.weight"]) == raw(after["body.w.weight"]) == raw(expected)


def test_a_delta_on_one_name_of_a_tied_tensor_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", lora_pair("head", 20, 8))
    with pytest.raises(rawmerge.RefusedError, match=r"'head\.weight'.*tied embeddings in OwnLMHeadModel"):
        rawmerge.merge_adapter(aliased(tmp_path), adapter, tmp_path / "out")


@pytest.mark.parametrize("changed", [[0], [1], [0, 1], [2]])
def test_a_delta_on_one_of_several_names_is_refused_and_kept_ones_go_through(
    tmp_path: Path, changed: list[int]
) -> None:
    shared, own = random_tensor((12, 8), torch.float32), random_tensor((12, 8), torch.float32, 4)
    names = [f"model.layers.{number}.shared_transf.q_proj" for number in range(3)]
    tensors = dict(zip([f"{name}.weight" for name in names], [shared, shared, own], strict=True))
    base = write_bins(tmp_path / "base", [tensors | {"model.norm.weight": random_tensor((8,), torch.float32)}])
    pairs: dict[str, torch.Tensor] = {}
    for number in changed:
        pairs |= lora_pair(names[number], 12, 8, seed=number)
    adapter = write_adapter(tmp_path / "adapter", pairs)
    if {0, 1} & set(changed):
        with pytest.raises(rawmerge.RefusedError, match=r"2 names of the same bytes: .*layers\.0.*layers\.1"):
            rawmerge.merge_adapter(base, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        rawmerge.merge_adapter(base, adapter, tmp_path / "out")
        after = read_all(tmp_path / "out")
        assert raw(after[f"{names[0]}.weight"]) == raw(after[f"{names[1]}.weight"]) == raw(shared)
        assert raw(after[f"{names[2]}.weight"]) != raw(own)


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"turned.weight": random_tensor((3, 5)).T}, "turned.weight"),
        ({"wide.weight": torch.ones(1).expand(4)}, "wide.weight"),
        ({"parameter": nn.Parameter(random_tensor((3, 5)).T)}, "parameter"),
    ],
)
def test_tensors_that_are_not_stored_one_element_after_another_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, Any], name: str
) -> None:
    base, adapter = small(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        rawmerge.plan_merge(base, adapter)
    (problem,) = caught.value.problems
    assert problem.subject == f"{base / BIN}: {name}"
    assert problem.expected == "tensors whose elements lie one after another"
    assert problem.hint == "load it with transformers where you trust it, and save it with safe_serialization=True"


def test_tensors_that_overlap_in_part_are_refused_by_name(tmp_path: Path) -> None:
    whole = random_tensor((6, 4))
    with pytest.raises(CheckpointError, match=r"lower\.weight.*expected bytes of its own, or all of another's"):
        rawmerge.plan_merge(*small(tmp_path, {"upper.weight": whole[:3], "lower.weight": whole[2:]}))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, {"bomb": Bomb(tmp_path / "crater")})
    with pytest.raises(CheckpointError, match="a pickle of tensors alone"):
        rawmerge.plan_merge(base, adapter)
    assert not (tmp_path / "crater").exists()
    torch.load(base / BIN, weights_only=False)  # which runs it
    assert (tmp_path / "crater").exists()


def test_files_of_old_torch_and_other_pickles_are_refused(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, {}, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch before 1.6 wrote other files: load it with transformers"):
        rawmerge.plan_merge(base, adapter)
    (base / BIN).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"expected a zip archive, as torch\.save writes"):
        rawmerge.plan_merge(base, adapter)


# --- which files count ---


def test_safetensors_win_and_pickles_beside_them_are_left_out(twins: tuple[Path, Path, Path]) -> None:
    base, pickled, adapter = twins
    for path in pickled.glob("pytorch_model*"):
        shutil.copy(path, base)
    plan = rawmerge.plan_merge(base, adapter)
    assert {Path(file.path).suffix for file in plan.base_files} == {".safetensors"}
    assert {bin_name(1, 3), bin_name(2, 3)} <= {item.name for item in plan.left_out}


def test_nothing_is_said_of_the_pickles_that_are_read(twins: tuple[Path, Path, Path]) -> None:
    _, pickled, adapter = twins
    (pickled / "training_args.bin").write_bytes(b"not looked at")
    plan = rawmerge.plan_merge(pickled, adapter)
    assert [item.name for item in plan.left_out] == ["training_args.bin"]
    assert [Path(file.path).name for file in plan.base_files] == [bin_name(number, 3) for number in (1, 2, 3)]


def test_an_index_can_be_named_or_missing_and_a_file_named(twins: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, pickled, adapter = twins
    plan = rawmerge.plan_merge(pickled, adapter)
    assert rawmerge.plan_merge(pickled / BIN_INDEX, adapter) == plan
    (pickled / BIN_INDEX).unlink()
    assert rawmerge.plan_merge(pickled, adapter).shards == plan.shards
    with pytest.raises(CheckpointError, match="one of 3 shards"):
        rawmerge.plan_merge(pickled / bin_name(1, 3), adapter)
    (pickled / bin_name(2, 3)).unlink()
    with pytest.raises(MissingFileError, match="3 numbered shards"):
        rawmerge.plan_merge(pickled, adapter)
    base, adapter = small(tmp_path / "single", {})
    (base / BIN).rename(base / "mine.bin")
    rawmerge.merge_adapter(base / "mine.bin", adapter, tmp_path / "out")
    assert sorted(folder_bytes(tmp_path / "out")) == ["mine.safetensors", "rawmerge.json"]


@pytest.mark.parametrize("name", ["../x.bin", "/etc/x.bin", "model.safetensors", "con.bin"])
def test_an_index_names_plain_pickles_only(twins: tuple[Path, Path, Path], name: str) -> None:
    _, pickled, adapter = twins
    (pickled / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"plain \*\.bin file names"):
        rawmerge.plan_merge(pickled, adapter)


def test_an_index_that_lists_what_is_not_there_is_refused(twins: tuple[Path, Path, Path]) -> None:
    _, pickled, adapter = twins
    index = json.loads((pickled / BIN_INDEX).read_text())
    index["weight_map"]["other.weight"] = bin_name(1, 3)
    (pickled / BIN_INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"other\.weight"):
        rawmerge.plan_merge(pickled, adapter)


def test_a_folder_of_pickles_that_are_no_model_s_is_no_base(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, {})
    (base / BIN).rename(base / "optimizer.bin")
    with pytest.raises(MissingFileError, match=r"no \*\.safetensors file but optimizer\.bin"):
        rawmerge.plan_merge(base, adapter)


# --- what goes on from the plan ---


def test_a_file_that_is_another_than_planned_is_noticed(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, {"a.weight": torch.zeros(4), "b.weight": torch.zeros(4)})
    plan = rawmerge.plan_merge(base, adapter)
    assert rawmerge.parse_plan(rawmerge.format_plan(plan)) == plan
    tensors = loaded(base)
    torch.save({name.replace("b.weight", "c.weight"): tensor for name, tensor in tensors.items()}, base / BIN)
    with pytest.raises(InputChangedError, match="expected the file that the plan was made from"):
        rawmerge.run_plan(plan, tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "250B"}, {"max_shard_size": "1GB", "dtype": "float32"}])
def test_it_is_consumed_as_any_base(twins: tuple[Path, Path, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    base, pickled, adapter = twins
    rawmerge.merge_adapter(pickled, adapter, tmp_path / "plain", **options)
    rawmerge.merge_adapter(base, adapter, tmp_path / "twin", **options)
    golden = folder_bytes(tmp_path / "plain")
    summary = rawmerge.merge_adapter(pickled, adapter, tmp_path / "out", consume_base=True, **options)
    assert folder_bytes(tmp_path / "out") == golden
    assert (summary.consumed, list(pickled.glob("*.bin"))) == (3, [])
    assert {name: raw(value) for name, value in read_all(tmp_path / "out").items()} == {
        name: raw(value) for name, value in read_all(tmp_path / "twin").items()
    }


def test_no_shard_of_it_can_be_a_link(twins: tuple[Path, Path, Path], tmp_path: Path) -> None:
    assert rawmerge.merge_adapter(*twins[1:], tmp_path / "out", link=True).linked == 0


def test_it_is_inspected(twins: tuple[Path, Path, Path]) -> None:
    found = rawmerge.inspect_path(twins[1])
    assert (found.kind, found.facts["shards"], found.facts["index"]) == ("base", 3, "yes")
