"""`--max-shard-size`: the output in other shards than the base's, cut as huggingface_hub cuts a state dict."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open

import rawmerge
from rawmerge.byte_sizes import byte_limit
from rawmerge.cli import cli
from rawmerge.errors import OutputError
from rawmerge.merge_plan import MergePlan
from rawmerge.output.untouched_shards import untouched_shards
from tests.builders import (
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
from tests.test_cut_off import cut_off
from tests.test_resume import aged
from tests.test_resume import cut_off as cut_off_plainly

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LAYER_BYTES = (12 * 8 + 8) * 2
#: Sizes at which tensors of a layered base end, one less and one more; and far too small and large ones.
SIZES = [1, 15, 16, 17, 191, 192, 193, LAYER_BYTES, 2 * LAYER_BYTES - 1, 2 * LAYER_BYTES, 5 * LAYER_BYTES, 10**12]
Paths = tuple[Path, Path]


@pytest.fixture
def layered(tmp_path: Path) -> Paths:
    """Return a base of three shards, of which an adapter changes the first two."""
    return layered_merge(tmp_path)


def in_base_order(base: Path) -> dict[str, torch.Tensor]:
    """Return the base's tensors, shard after shard, in the order of their bytes."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.offset_keys()}
    return found


def hub_split(tensors: dict[str, torch.Tensor], size: int | str) -> dict[str, set[str]]:
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=size)
    return {name: set(names) for name, names in split.filename_to_tensors.items()}


def planned_split(plan: MergePlan) -> dict[str, set[str]]:
    return {shard.name: {step.entry.name for step in shard.steps} for shard in plan.shards}


def held(folder: Path) -> dict[str, set[str]]:
    """Return file to its tensors, read by the safetensors library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = set(file.keys())
    return found


def assert_same_tensors(folder: Path, other: Path) -> None:
    ours, theirs = read_all(folder), read_all(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if raw(ours[name]) != raw(theirs[name])] == []


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(cli, list(map(str, arguments)))


# --- which tensor goes where ---


@pytest.mark.parametrize("size", SIZES)
def test_tensors_are_split_as_the_hub_s_client_splits_them(layered: Paths, tmp_path: Path, size: int) -> None:
    tensors = in_base_order(layered[0])
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=size)
    rawmerge.merge_adapter(*layered, tmp_path / "out", max_shard_size=size)
    rawmerge.merge_adapter(*layered, tmp_path / "plain")
    assert held(tmp_path / "out") == hub_split(tensors, size)
    assert_same_tensors(tmp_path / "out", tmp_path / "plain")
    assert (tmp_path / "out" / INDEX).exists() == split.is_sharded
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        assert (tmp_path / "out" / INDEX).read_text() == json.dumps(index, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("seed", range(12))
def test_random_sizes_are_split_as_the_hub_s_client_splits_them(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 40, (30,), generator=generator).tolist()
    tensors = {f"model.layers.{number}.norm.weight": random_tensor((count, 3)) for number, count in enumerate(rows)}
    tensors["model.layers.0.q_proj.weight"] = random_tensor((12, 8))
    names = sorted(tensors)
    base = write_base(tmp_path / "base", [{name: tensors[name] for name in names[at::3]} for at in range(3)])
    adapter = write_adapter(tmp_path / "adapter", lora_pair("model.layers.0.q_proj", 12, 8))
    size = int(torch.randint(1, 700, (), generator=generator))
    plan = rawmerge.plan_merge(base, adapter, max_shard_size=size)
    assert planned_split(plan) == hub_split(in_base_order(base), size)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert plan.tensor_bytes == sum(shard.byte_count - shard.data_start for shard in plan.shards) == total


def test_sizes_are_those_of_the_output_s_dtype(layered: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", max_shard_size=2 * LAYER_BYTES, dtype="float32")
    rawmerge.merge_adapter(*layered, tmp_path / "plain", dtype="float32")
    merged = {name: tensor.float() for name, tensor in in_base_order(layered[0]).items()}
    assert held(tmp_path / "out") == hub_split(merged, 2 * LAYER_BYTES)
    assert len(held(tmp_path / "out")) == 3
    assert_same_tensors(tmp_path / "out", tmp_path / "plain")
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"] == 6 * LAYER_BYTES


def test_larger_tensors_are_told(layered: Paths) -> None:
    assert rawmerge.plan_merge(*layered, max_shard_size=192).notes == ()
    assert rawmerge.plan_merge(*layered, max_shard_size=191).notes == (
        "3 tensors are larger than --max-shard-size 191 B and in shards of their own: up to 192 B",
    )


# --- files ---


def test_every_tensor_lies_at_a_multiple_of_its_element_s_size(tmp_path: Path) -> None:
    # each shard is aligned, and would not be behind the odd number of bytes of the one before
    odd = torch.ones(3, dtype=torch.uint8)
    shards: list[dict[str, torch.Tensor]] = [
        {"model.layers.0.q_proj.weight": random_tensor((12, 8)), "a.mask": odd},
        {"model.layers.1.q_proj.weight": random_tensor((12, 8), torch.float32), "b.mask": odd},
        {"c.step": torch.tensor(7), "c.scale": torch.tensor(0.5, dtype=torch.bfloat16)},
    ]
    base = write_base(tmp_path / "base", shards)
    pairs = lora_pair("model.layers.0.q_proj", 12, 8) | lora_pair("model.layers.1.q_proj", 12, 8)
    adapter = write_adapter(tmp_path / "adapter", pairs)
    plan = rawmerge.plan_merge(base, adapter, max_shard_size=10**6)
    rawmerge.run_plan(plan, tmp_path / "out")
    rawmerge.merge_adapter(base, adapter, tmp_path / "plain")
    assert_same_tensors(tmp_path / "out", tmp_path / "plain")
    with safe_open(tmp_path / "out" / SINGLE, "pt") as file:
        sizes = [file.get_tensor(name).element_size() for name in file.offset_keys()]
        assert file.metadata() == {"format": "pt"}
    assert sizes == [8, 4, 2, 2, 1, 1]
    assert plan.shards[0].data_start % 8 == 0


def test_a_base_without_an_index_gets_one_with_transformers_fields(tmp_path: Path) -> None:
    tensors = {"model.layers.0.q_proj.weight": random_tensor((12, 8)), "model.position_ids": torch.arange(5)}
    base = write_base(tmp_path / "base", [tensors])
    adapter = write_adapter(tmp_path / "adapter", lora_pair("model.layers.0.q_proj", 12, 8))
    rawmerge.merge_adapter(base, adapter, tmp_path / "out", max_shard_size="100B")
    found = json.loads((tmp_path / "out" / INDEX).read_text())
    # transformers counts parameters, which integers are not
    assert found["metadata"] == {"total_parameters": 12 * 8, "total_size": 12 * 8 * 2 + 5 * 8}
    weights = [name for name in folder_bytes(tmp_path / "out") if "safetensors" in name]
    assert sorted(weights) == sorted([INDEX, shard_name(1, 2), shard_name(2, 2)])


def test_what_the_base_s_index_says_stays(tmp_path: Path) -> None:
    base, adapter = layered_merge(tmp_path)
    index = json.loads((base / INDEX).read_text())
    index["metadata"] |= {"total_parameters": 5, "made_by": "others"}
    (base / INDEX).write_text(json.dumps(index))
    rawmerge.merge_adapter(base, adapter, tmp_path / "out", max_shard_size=2 * LAYER_BYTES)
    found = json.loads((tmp_path / "out" / INDEX).read_text())
    assert found["metadata"] == {"total_parameters": 5, "made_by": "others", "total_size": 3 * LAYER_BYTES}


def test_the_base_s_own_cut_changes_no_byte(layered: Paths, tmp_path: Path) -> None:
    text = (layered[0] / INDEX).read_text() + "\n\n"  # not as anybody would write it
    (layered[0] / INDEX).write_text(text)
    rawmerge.merge_adapter(*layered, tmp_path / "plain")
    rawmerge.merge_adapter(*layered, tmp_path / "out", max_shard_size=LAYER_BYTES)
    ours, plain = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "plain")
    records = [json.loads(files.pop("rawmerge.json")) for files in (ours, plain)]
    cards = [files.pop("README.md").decode() for files in (ours, plain)]  # they tell the options
    assert [f"--max-shard-size {LAYER_BYTES}B" in card for card in cards] == [True, False]
    assert [record["options"].get("max_shard_size") for record in records] == [LAYER_BYTES, None]
    assert ours == plain
    assert ours[INDEX].decode() == text


def test_a_base_that_is_a_file_stays_one_file_unless_asked(layered: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "whole", max_shard_size="1GB")
    base = shutil.copy(tmp_path / "whole" / SINGLE, tmp_path / "mine.safetensors")
    for size, names in ((None, ["mine.safetensors"]), (2 * LAYER_BYTES, [INDEX, shard_name(1, 2), shard_name(2, 2)])):
        out = tmp_path / f"out{size}"
        rawmerge.merge_adapter(base, layered[1], out, max_shard_size=size)
        assert sorted(folder_bytes(out)) == sorted([*names, "rawmerge.json"])
        assert rawmerge.verify_merge(out, base, layered[1]).findings == ()


# --- what goes on from a plan ---


def test_a_plan_keeps_its_shards_through_json(layered: Paths) -> None:
    plan = rawmerge.plan_merge(*layered, max_shard_size="300B")
    assert rawmerge.parse_plan(rawmerge.format_plan(plan)) == plan
    assert plan.options.max_shard_size == 300


@pytest.mark.parametrize("size", [17, LAYER_BYTES, 2 * LAYER_BYTES, 10**9])
def test_an_output_is_verified_in_its_own_shards(layered: Paths, tmp_path: Path, size: int) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", max_shard_size=size, verify=True, checksum=True)
    found = rawmerge.verify_merge(tmp_path / "out", *layered)
    assert (found.findings, found.notes) == ((), ())
    assert rawmerge.verify_merge(tmp_path / "out").findings == ()


@pytest.mark.parametrize("size", [True, -3, "5GB", 1.5])
def test_a_record_s_size_that_is_none_is_a_finding(layered: Paths, tmp_path: Path, size: object) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", max_shard_size=LAYER_BYTES)
    record = json.loads((tmp_path / "out/rawmerge.json").read_text())
    record["options"]["max_shard_size"] = size
    (tmp_path / "out/rawmerge.json").write_text(json.dumps(record))
    (found, *_) = rawmerge.verify_merge(tmp_path / "out").findings
    assert (found.subject, found.expected) == ("rawmerge.json: max_shard_size", "a positive number of bytes")


def test_shards_that_stay_the_same_are_links_whatever_their_names(layered: Paths, tmp_path: Path) -> None:
    (layered[0] / INDEX).unlink()
    for number in (1, 2, 3):  # as an older program named them
        (layered[0] / shard_name(number, 3)).rename(layered[0] / f"part-{number:05d}-of-00003.safetensors")
    last = layered[0] / "part-00003-of-00003.safetensors"
    raw_bytes = last.read_bytes()  # a header with other spaces than ours is the base's all the same
    length = int.from_bytes(raw_bytes[:8], "little")
    header, data = raw_bytes[8 : 8 + length].rstrip(), raw_bytes[8 + length :]
    spaced = header.replace(b'":{"dtype', b'": {"dtype').ljust(length + 8)
    last.write_bytes(len(spaced).to_bytes(8, "little") + spaced + data)
    plan = rawmerge.plan_merge(*layered, max_shard_size=LAYER_BYTES)
    assert untouched_shards(plan) == {shard_name(3, 3): str(last)}
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", max_shard_size=LAYER_BYTES, link=True)
    assert summary.linked == 1
    assert (tmp_path / "out" / shard_name(3, 3)).samefile(last)
    assert untouched_shards(rawmerge.plan_merge(*layered, max_shard_size=2 * LAYER_BYTES)) == {
        shard_name(2, 2): str(last)
    }
    assert untouched_shards(rawmerge.plan_merge(*layered, max_shard_size=LAYER_BYTES - 1)) == {}


@pytest.mark.parametrize(("size", "reads"), [(3 * LAYER_BYTES // 2, 7), (2 * LAYER_BYTES, 4), (10**9, 4)])
def test_a_base_shard_goes_once_no_later_shard_reads_it(tmp_path: Path, size: int, reads: int) -> None:
    base, adapter = layered_merge(tmp_path, layers=4, changed=(0, 1, 2, 3))
    rawmerge.merge_adapter(base, adapter, tmp_path / "plain", max_shard_size=size)
    golden, files = folder_bytes(tmp_path / "plain"), held(tmp_path / "plain")
    readers = {name: {out for out, names in files.items() if names & own} for name, own in held(base).items()}
    assert sum(map(len, readers.values())) == reads
    seen: dict[str, set[str]] = {}

    def look(at: rawmerge.Progress) -> None:
        seen.setdefault(at.shard_name, {path.name for path in base.glob("*.safetensors")})

    choices: dict[str, Any] = {"max_shard_size": size, "consume_base": True, "progress": look}
    summary = rawmerge.merge_adapter(base, adapter, tmp_path / "out", **choices)
    assert folder_bytes(tmp_path / "out") == golden
    assert (summary.consumed, list(base.glob("*.safetensors"))) == (4, [])
    order = list(seen)
    for place, shard in enumerate(order):
        assert seen[shard] >= {name for name, outs in readers.items() if outs & set(order[place:])}
    assert len(order) == len(files)
    assert len(seen[order[-1]]) < 4 or len(order) == 1  # some went before the end


@pytest.mark.parametrize("size", [LAYER_BYTES + 16, 10**9])
def test_a_consuming_merge_that_is_cut_off_goes_on_with_the_same_size_only(
    layered: Paths, tmp_path: Path, size: int
) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "plain", max_shard_size=size)
    golden = folder_bytes(tmp_path / "plain")
    names = sorted(held(tmp_path / "plain"))
    if len(names) > 1:
        cut_off(layered, tmp_path / "out", names[-1], max_shard_size=size)
        with pytest.raises(OutputError) as caught:
            rawmerge.merge_adapter(*layered, tmp_path / "out", max_shard_size=size + 1, consume_base=True)
        *_, problem = caught.value.problems
        assert (problem.subject, problem.found) == ("--max-shard-size", str(size + 1))
        assert problem.expected == f"{size}, as when the unfinished merge began"
    rawmerge.merge_adapter(*layered, tmp_path / "out", max_shard_size=size, consume_base=True)
    assert folder_bytes(tmp_path / "out") == golden
    again = invoke("merge", *layered, "-o", tmp_path / "out", "--max-shard-size", f"{size}B", "--consume-base")
    assert again.exit_code == 3
    assert "this very merge, finished" in again.stderr


def test_a_merge_that_is_cut_off_goes_on_from_its_shards(tmp_path: Path) -> None:
    layered = aged(layered_merge(tmp_path, changed=(0, 1, 2)))
    size = LAYER_BYTES + 16
    rawmerge.merge_adapter(*layered, tmp_path / "plain", max_shard_size=size)
    cut_off_plainly(layered, tmp_path / "out", 1, max_shard_size=size)
    other = rawmerge.merge_adapter(*layered, tmp_path / "out", max_shard_size=size)
    assert other.resumed == 1
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "plain")
    cut_off_plainly(layered, tmp_path / "again", 1, max_shard_size=size)
    other = rawmerge.merge_adapter(*layered, tmp_path / "again", max_shard_size=1)
    assert other.resumed == 0
    assert f"--max-shard-size was '{size}', now '1'" in " ".join(other.notes)


@pytest.mark.slow
def test_more_shards_than_a_process_may_open(tmp_path: Path) -> None:
    shards = [{f"model.layers.{at}.q_proj.weight": random_tensor((12, 8), seed=at) for at in range(300)}]
    base = write_base(tmp_path / "base", shards)
    adapter = write_adapter(tmp_path / "adapter", lora_pair("model.layers.7.q_proj", 12, 8))
    code = (
        "import resource, rawmerge, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400)); "
        "rawmerge.merge_adapter(*sys.argv[1:4], max_shard_size=192); "
        "assert not rawmerge.verify_merge(sys.argv[3], *sys.argv[1:3]).findings"
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 400
    command = [sys.executable, "-c", code, str(base), str(adapter), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(held(tmp_path / "out")) == 300


# --- how it is asked for ---


def test_the_command_takes_decimal_and_binary_units(layered: Paths, tmp_path: Path) -> None:
    for text, size in (("0.3kB", 300), ("0.3KiB", 307), (f"{LAYER_BYTES}B", LAYER_BYTES)):
        out = tmp_path / text
        done = invoke("merge", *layered, "-o", out, "--max-shard-size", text)
        assert done.exit_code == 0, done.output
        assert json.loads((out / "rawmerge.json").read_text())["options"]["max_shard_size"] == size
        planned = invoke("plan", *layered, "--max-shard-size", text, "--json")
        assert [shard["name"] for shard in json.loads(planned.stdout)["shards"]] == sorted(held(out))


@pytest.mark.parametrize("text", ["5", "0GB", "-5GB", "GB", "much", "0.001B"])
def test_what_is_no_size_is_refused(layered: Paths, text: str) -> None:
    done = invoke("plan", *layered, f"--max-shard-size={text}")
    assert done.exit_code == 2
    assert "expected a size" in done.stderr
    assert repr(text) in done.stderr
    with pytest.raises(ValueError, match="max_shard_size: expected a size"):
        rawmerge.plan_merge(*layered, max_shard_size=text)


@pytest.mark.parametrize("size", [0, -1, True, 1.5])
def test_a_number_that_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=r"max_shard_size must be a size of at least one byte, or None, not"):
        byte_limit("max_shard_size", size)
