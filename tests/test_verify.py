"""A verification tells good outputs from bad ones, and what these come from. Outputs here are torch's own sums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import rawmerge
from rawmerge.cli import cli
from rawmerge.engine.shard_writer import OutputFile
from rawmerge.errors import MemoryLimitError, OutputError
from rawmerge.verifying.compared_shard import ComparedShard
from tests.builders import ALPHA, PREFIX, RANK, lora_pair, random_tensor, write_adapter, write_base

Tensors = dict[str, torch.Tensor]
Paths = tuple[Path, Path]
#: in != out, and a square one
SHAPES = {"q_proj": (96, 64), "o_proj": (64, 64)}
MODULES = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in SHAPES]
SCALING = ALPHA / RANK


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    weights = {f"{path}.weight": random_tensor(SHAPES[path.split(".")[-1]], seed=at) for at, path in enumerate(MODULES)}
    norms = {f"model.layers.{layer}.input_layernorm.weight": random_tensor((64,), seed=9 + layer) for layer in range(3)}
    base = write_base(tmp_path / "base", [weights, {**norms, "model.ids": torch.arange(7)}], {"dtype": "bfloat16"})
    (base / "tokenizer.json").write_text("{}")
    pairs: Tensors = {}
    for at, path in enumerate(MODULES):
        pairs |= lora_pair(path, *SHAPES[path.split(".")[-1]], seed=at)
    return base, write_adapter(tmp_path / "adapter", pairs, target_modules=list(SHAPES))


def base_tensors(paths: Paths) -> Tensors:
    return {name: at for path in sorted(paths[0].glob("*.safetensors")) for name, at in load_file(path).items()}


def summed(paths: Paths, weight: float = 1.0, dtype: torch.dtype = torch.float32, scaling: float = SCALING) -> Tensors:
    """Return the merge by torch, with a weight on the delta, and sums in `dtype`."""
    pairs = load_file(paths[1] / "adapter_model.safetensors")
    tensors = base_tensors(paths)
    for path in MODULES:
        lora_a, lora_b = (pairs[f"{PREFIX}{path}.lora_{part}.weight"].to(dtype) for part in "AB")
        before = tensors[f"{path}.weight"]
        tensors[f"{path}.weight"] = (before.to(dtype) + (lora_b @ lora_a) * (scaling * weight)).to(before.dtype)
    return tensors


def write_output(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a checkpoint as another program would: one file, names in another order."""
    folder.mkdir()
    save_file(dict(sorted(tensors.items(), reverse=True)), folder / "model.safetensors")
    return folder


def verify(output: Path, paths: Paths, **options: Any) -> rawmerge.Verification:
    return rawmerge.verify_merge(output, *paths, **options)


def test_our_own_output_is_equal(paths: Paths, tmp_path: Path) -> None:
    choices: list[dict[str, Any]] = [{}, {"compute_dtype": "float64"}, {"dtype": "float16"}]
    for options in choices:
        output = tmp_path / "-".join(["out", *options])
        rawmerge.merge_adapter(*paths, output, **options)
        made = verify(output, paths)
        assert (made.is_equal, made.findings, made.differences) == (True, (), ())
        assert (made.replayed, made.tensor_count) == (True, 10)
        assert made.element_count == 3 * (96 * 64 + 64 * 64 + 64) + 7


@pytest.mark.parametrize("choices", [{}, {"threads": 1}, {"without": ["kernel"]}, {"threads": 3, "max_memory": 10**9}])
def test_an_output_of_others_is_compared_by_name_whatever_its_layout(
    paths: Paths, tmp_path: Path, choices: dict[str, Any]
) -> None:
    output = write_output(tmp_path / "out", summed(paths))
    made = verify(output, paths, **choices)
    assert made.findings == ()
    assert any("tokenizer.json" in note for note in made.notes)


@pytest.mark.parametrize(
    ("weight", "meaning"),
    [
        (0.0, "the adapter was not applied"),
        (0.5, "with a weight of 0.5"),
        (2.0, "merged twice"),
        (-1.0, "subtracted"),
        (RANK**0.5, "scaled by rsLoRA's"),
        (1 / SCALING, "alpha / r was left out"),
        (1.001, "with a weight of 1.00"),
    ],
)
def test_another_weight_on_the_delta_is_told(paths: Paths, tmp_path: Path, weight: float, meaning: str) -> None:
    output = write_output(tmp_path / "out", summed(paths, weight))
    (finding,) = verify(output, paths).findings
    assert meaning in finding.hint
    assert finding.subject.startswith("model.layers.*.self_attn.")


def test_an_output_that_was_merged_twice_is_told(paths: Paths, tmp_path: Path) -> None:
    once = write_base(tmp_path / "once", [summed(paths)])
    output = write_output(tmp_path / "out", summed((once, paths[1])))
    (finding,) = verify(output, paths).findings
    assert "merged twice" in finding.hint


def test_a_delta_that_only_some_tensors_have_is_told(paths: Paths, tmp_path: Path) -> None:
    tensors = {**summed(paths), f"{MODULES[1]}.weight": base_tensors(paths)[f"{MODULES[1]}.weight"]}
    (finding,) = verify(write_output(tmp_path / "out", tensors), paths).findings
    assert finding.found == "the base without the delta in 1 tensor of 6"
    assert finding.subject == f"{MODULES[1]}.weight"
    assert finding.hint == "the adapter was applied to the others only"


def test_another_base_is_told(paths: Paths, tmp_path: Path) -> None:
    other = {
        name: random_tensor(at.shape, seed=77) for name, at in base_tensors(paths).items() if at.is_floating_point()
    }
    moved = write_base(tmp_path / "other", [{**other, "model.ids": torch.arange(7)}])
    findings = verify(write_output(tmp_path / "out", summed((moved, paths[1]))), paths).findings
    assert ["made from another base" in finding.hint for finding in findings] == [True, False]
    assert "another base" in findings[1].hint


def test_other_rounding_passes_within_a_tolerance_and_is_counted(paths: Paths, tmp_path: Path) -> None:
    exact, merged = summed(paths, dtype=torch.float64), summed(paths)
    nudged = {**merged, f"{MODULES[0]}.weight": nudge(merged[f"{MODULES[0]}.weight"])}
    output = write_output(tmp_path / "out", nudged)
    made = verify(output, paths)
    (finding,) = made.findings
    assert finding.found == "other bits in 3 of 6144 elements (0.00049) of 1 tensor, at most 1 ulp away"
    assert finding.subject == f"{MODULES[0]}.weight"
    assert finding.hint == "so few are damage; --tolerance 1 lets it pass"
    (difference,) = made.differences
    assert (difference.differing, difference.element_count, difference.max_ulps) == (3, 96 * 64, 1.0)
    within = verify(output, paths, tolerance=1)
    assert (within.findings, within.differences) == ((), made.differences)
    assert verify(write_output(tmp_path / "exact", exact), paths, compute_dtype="float64").findings == ()


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.001])
def test_no_tolerance_lets_a_wrong_scale_pass(paths: Paths, tmp_path: Path, weight: float) -> None:
    output = write_output(tmp_path / "out", summed(paths, weight))
    assert len(verify(output, paths, tolerance=1024).findings) == 1


def nudge(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with three elements that are one unit in the last place larger."""
    bits = tensor.view(torch.int16).clone()
    large = tensor.abs().flatten().argsort(descending=True)[[0, 5, 9]]
    bits.view(-1)[large] += 1
    return bits.view(tensor.dtype)


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.ids"])
def test_a_kept_tensor_must_be_equal_whatever_the_tolerance(paths: Paths, tmp_path: Path, name: str) -> None:
    tensors = summed(paths)
    tensors[name] = tensors[name].clone()
    tensors[name][3] *= 2
    made = verify(write_output(tmp_path / "out", tensors), paths, tolerance=1024)
    (finding,) = made.findings
    assert (made.differences[0].name, made.differences[0].differing) == (name, 1)
    assert "changed, or damaged" in finding.hint


def test_damage_in_part_of_a_tensor_is_no_scale(paths: Paths, tmp_path: Path) -> None:
    tensors = summed(paths)
    tensors[f"{MODULES[2]}.weight"][10:12] = 0
    (finding,) = verify(write_output(tmp_path / "out", tensors), paths).findings
    assert "parts were damaged" in finding.hint
    assert finding.subject == f"{MODULES[2]}.weight"


def test_tensors_that_are_missing_too_many_or_of_another_layout_are_told(paths: Paths, tmp_path: Path) -> None:
    tensors = summed(paths)
    tensors["model.extra"] = torch.ones(2)
    del tensors["model.ids"]
    norm = "model.layers.0.input_layernorm.weight"
    tensors[norm] = tensors[norm].float()
    tensors[f"{MODULES[0]}.weight"] = tensors[f"{MODULES[0]}.weight"].T.contiguous()
    findings = {finding.subject: finding for finding in verify(write_output(tmp_path / "out", tensors), paths).findings}
    assert findings.keys() == {"model.extra", "model.ids", norm, f"{MODULES[0]}.weight"}
    assert findings["model.ids"].found == "no such tensor"
    assert (findings[norm].expected, findings[norm].found) == ("BF16 [64]", "F32 [64]")
    assert findings[norm].hint == "if it was merged so, give --dtype float32"


EDITS: dict[str, Callable[[Path], object]] = {
    "tokenizer.json": lambda out: (out / "tokenizer.json").write_text("[]"),
    "config.json": lambda out: (out / "config.json").write_text('{"dtype": "float32"}'),
    "rawmerge.json": lambda out: (out / "rawmerge.json").write_text("{garbage"),
    "rawmerge.json: history": lambda out: edit_json(out / "rawmerge.json", history=7),
    "rawmerge.json: dtype": lambda out: edit_json(out / "rawmerge.json", options={"dtype": "int3"}),
    "rawmerge.json: options": lambda out: edit_json(out / "rawmerge.json", options=[]),
    "model.safetensors.index.json": lambda out: edit_json(out / "model.safetensors.index.json", metadata={}),
    "model-00002-of-00002.safetensors": lambda out: rewrite(out / "model-00002-of-00002.safetensors"),
    "rawmerge.json: base": lambda out: edit_json(out / "rawmerge.json", base={"shards": []}),
    "rawmerge.json: adapters": lambda out: edit_json(out / "rawmerge.json", adapters=[]),
}


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(path: Path) -> None:
    save_file(load_file(path), path, metadata={"format": "pt", "by": "another"})


@pytest.mark.parametrize("name", EDITS)
def test_each_file_of_our_own_output_is_compared(paths: Paths, tmp_path: Path, name: str) -> None:
    rawmerge.merge_adapter(*paths, tmp_path / "out", dtype="float32")
    EDITS[name](tmp_path / "out")
    assert name in {finding.subject for finding in verify(tmp_path / "out", paths).findings}


def test_another_adapter_is_told_by_record_and_values(paths: Paths, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(paths[1], other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({name: at.flip(0).contiguous() for name, at in tensors.items()}, other / "adapter_model.safetensors")
    rawmerge.merge_adapter(paths[0], other, tmp_path / "out")
    findings = verify(tmp_path / "out", paths).findings
    assert {"rawmerge.json: adapters"} < {finding.subject for finding in findings}
    assert any("another adapter" in finding.hint for finding in findings)


def test_the_record_tells_the_options_and_options_given_come_first(paths: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*paths, tmp_path / "out", dtype="float16")
    assert verify(tmp_path / "out", paths).is_equal
    assert len(verify(tmp_path / "out", paths, dtype="float32").findings) >= 6


def test_an_output_alone_is_looked_at_for_what_contradicts_itself(paths: Paths, tmp_path: Path) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*paths, output)
    made = rawmerge.verify_merge(output)
    assert (made.is_equal, made.replayed, made.tensor_count) == (True, False, 10)
    assert "values were not looked at" in made.notes[0]
    edit_json(output / "model.safetensors.index.json", metadata={"total_size": 5})
    edit_json(output / "config.json", dtype="float32")
    edit_json(output / "rawmerge.json", tensors={"kept": 3})
    made = rawmerge.verify_merge(output)
    assert {finding.subject for finding in made.findings} == {"model.safetensors.index.json", "rawmerge.json"}
    assert "config.json says float32, and most of the tensors are BF16" in made.notes


def test_a_record_that_cannot_be_read_hides_no_other_change(paths: Paths, tmp_path: Path) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*paths, output)
    (output / "rawmerge.json").write_text("{garbage")
    (output / "tokenizer.json").write_text("[]")
    assert {finding.subject for finding in verify(output, paths).findings} == {"rawmerge.json", "tokenizer.json"}


def test_a_tie_of_which_one_side_is_stored_is_no_finding(tmp_path: Path) -> None:
    config = {"model_type": "llama", "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    path = "model.layers.0.q_proj"
    weights = {"model.embed_tokens.weight": random_tensor((20, 8)), f"{path}.weight": random_tensor((12, 8))}
    base = write_base(tmp_path / "base", [weights], config)
    rows = random_tensor((20, 8), torch.float32, 5)
    saved = {f"{PREFIX}model.embed_tokens.weight": rows, f"{PREFIX}lm_head.weight": rows.clone()}
    fields = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}
    adapter = write_adapter(tmp_path / "adapter", {**lora_pair(path, 12, 8), **saved}, **fields)
    assert rawmerge.merge_adapter(base, adapter, tmp_path / "out", verify=True).verified
    assert rawmerge.verify_merge(tmp_path / "out").is_equal
    assert rawmerge.verify_merge(tmp_path / "out", base, adapter).is_equal
    tensors = {
        **load_file(tmp_path / "out/model.safetensors"),
        "model.embed_tokens.weight": weights["model.embed_tokens.weight"],
    }
    (finding,) = rawmerge.verify_merge(write_output(tmp_path / "bare", tensors), base, adapter).findings
    assert finding.found == "the base without the delta in 1 tensor of 2"


def test_a_config_whose_dtype_no_tensor_has_is_no_finding(paths: Paths, tmp_path: Path) -> None:
    edit_json(paths[0] / "config.json", dtype="float16")
    assert rawmerge.merge_adapter(*paths, tmp_path / "out", verify=True).verified


def test_a_delta_that_is_missing_in_some_rows_is_no_scale(paths: Paths, tmp_path: Path) -> None:
    tensors, base = summed(paths), base_tensors(paths)
    for path in MODULES[:2]:
        tensors[f"{path}.weight"][:40] = base[f"{path}.weight"][:40]
    (finding,) = verify(write_output(tmp_path / "out", tensors), paths).findings
    assert finding.found.startswith("the base without the delta in part of 2 tensors")
    assert "some rows, experts or blocks" in finding.hint
    assert verify(tmp_path / "out", paths, tolerance=1024).findings == (finding,)


def test_a_broken_output_is_a_finding_and_a_broken_input_a_refusal(paths: Paths, tmp_path: Path) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*paths, output)
    shard = next(output.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-3])
    for arguments in ((), paths):
        (finding,) = rawmerge.verify_merge(output, *arguments).findings
        assert finding.subject == str(shard)
    (paths[1] / "adapter_config.json").unlink()
    with pytest.raises(rawmerge.RefusedError):
        verify(output, paths)


@pytest.mark.parametrize("name", ["nothing", "adapter", "a" * 300, "a/" * 3000])
def test_what_is_no_checkpoint_is_refused(paths: Paths, tmp_path: Path, name: str) -> None:
    for arguments in ((), paths):
        with pytest.raises(rawmerge.RefusedError):
            rawmerge.verify_merge(tmp_path / name, *arguments)
    assert invoke("verify", tmp_path / name).exit_code == 3


def test_a_verification_changes_no_file(paths: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*paths, tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    verify(tmp_path / "out", paths)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_wrong_calls_are_errors(paths: Paths, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="go together"):
        rawmerge.verify_merge(tmp_path, paths[0])
    with pytest.raises(ValueError, match="tolerance"):
        verify(tmp_path, paths, tolerance=float("nan"))
    with pytest.raises(ValueError, match="dtype"):
        verify(tmp_path, paths, dtype="int8")
    rawmerge.merge_adapter(*paths, tmp_path / "out")
    with pytest.raises(MemoryLimitError, match=r"40\.0 MB for comparing"):
        verify(tmp_path / "out", paths, max_memory=10**6)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MemoryLimitError, match=r"40\.0 MB for comparing"):
        rawmerge.merge_adapter(*paths, tmp_path / "other", max_memory=10**6, verify=True)
    assert sorted(tmp_path.iterdir()) == before


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_command_line_tells_by_text_json_and_exit_code(paths: Paths, tmp_path: Path) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*paths, output)
    command = ("verify", output, "--base", paths[0], "--adapter", paths[1])
    good = invoke(*command)
    assert (good.exit_code, good.stdout) == (0, "10 tensors, 30919 elements: what base and adapter give, bit for bit\n")
    assert invoke("verify", output).exit_code == 0
    shutil.copytree(paths[0], tmp_path / "copy")
    bad = invoke("verify", tmp_path / "copy", *command[2:])
    assert bad.exit_code == 5
    assert "hint: the adapter was not applied" in bad.stdout
    document = json.loads(invoke("verify", tmp_path / "copy", *command[2:], "--json").stdout)
    assert (document["is_equal"], document["findings"][0]["hint"]) == (False, "the adapter was not applied")
    assert len(document["differences"]) == 6
    assert invoke("verify", output, "--base", paths[0]).exit_code == 2


def test_a_value_that_is_not_finite_is_json_still(paths: Paths, tmp_path: Path) -> None:
    tensors = summed(paths)
    tensors[f"{MODULES[0]}.weight"][0, 0] = float("nan")
    output = write_output(tmp_path / "out", tensors)
    told = invoke("verify", output, "--base", paths[0], "--adapter", paths[1], "--json")
    document = json.loads(told.stdout, parse_constant=lambda word: pytest.fail(word))
    assert document["differences"][0]["max_ulps"] == "inf"


def test_a_merge_that_verifies_reads_back_before_it_publishes(paths: Paths, tmp_path: Path) -> None:
    seen: list[rawmerge.Progress] = []

    def look(progress: rawmerge.Progress) -> None:
        assert not (tmp_path / "out").exists()
        seen.append(progress)

    summary = rawmerge.merge_adapter(*paths, tmp_path / "out", verify=True, progress=look)
    assert summary.verified
    assert [at.done_bytes for at in seen].count(summary_bytes(paths)) == 2
    assert not rawmerge.merge_adapter(*paths, tmp_path / "other").verified


def summary_bytes(paths: Paths) -> int:
    return rawmerge.plan_merge(*paths).tensor_bytes


@pytest.mark.parametrize("name", ["_write_direct", "_write_cached"])
def test_a_write_that_goes_wrong_is_found_and_nothing_is_published(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write = getattr(OutputFile, name)

    def flipped(self: OutputFile, offset: int, buffer: memoryview) -> None:
        damaged = bytearray(buffer)
        if offset and len(damaged) > 64:  # not the header, which would be told as such
            damaged[len(damaged) // 2] ^= 1
        write(self, offset, memoryview(damaged))

    monkeypatch.setattr(OutputFile, name, flipped)
    without = ["direct-io"] if name == "_write_cached" else []
    with pytest.raises(rawmerge.VerificationError, match="nothing was published") as caught:
        rawmerge.merge_adapter(*paths, tmp_path / "out", verify=True, without=without)
    assert any("bits" in problem.found for problem in caught.value.problems)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_command_line_tells_what_it_verified(paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = invoke("merge", *paths, "-o", tmp_path / "out", "--verify")
    assert told.exit_code == 0
    assert "read back and verified" in told.stderr
    monkeypatch.setattr(
        ComparedShard,
        "_compare",
        lambda self, tensor, first, expected: tensor.tally.add_bytes(memoryview(b"\1"), memoryview(b"\0"), 0),
    )
    bad = invoke("merge", *paths, "-o", tmp_path / "bad", "--verify", "--json")
    assert bad.exit_code == 5
    document = json.loads(bad.stdout)
    assert (document["error"], document["exit_code"]) == ("VerificationError", 5)
    assert document["problems"]
    assert not (tmp_path / "bad").exists()


def test_what_cannot_be_verified_is_refused_beforehand(paths: Paths, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="--consume-base"):
        rawmerge.merge_adapter(*paths, tmp_path / "out", verify=True, consume_base=True)
    with pytest.raises(OutputError, match="--compute-dtype float64"):
        rawmerge.merge_adapter(*paths, tmp_path / "out", verify=True, device="cuda")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
