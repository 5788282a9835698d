"""Exports from file to output: what lies beside the weights, what is told, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import rawmerge
from rawmerge.cli import cli
from rawmerge.errors import OutputError, PlanError, RefusedError
from rawmerge.exporting.export_run import plan_export
from rawmerge.formats.strict_json import StrictJsonError
from rawmerge.formats.tokenizer_text import with_left_padding
from tests.builders import PREFIX, lora_pair, merged, random_tensor, read_all, write_adapter, write_base
from tests.test_export_modelfile import HEAD, LLAMA3

TOKENIZER = {
    "added_tokens_decoder": {"128008": {"content": "<|eom_id|>"}, "128009": {"content": "<|eot_id|>"}},
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "padding_side": "right",
}
EXAMPLE = """\
### examples/merge_lora
model_name_or_path: base
adapter_name_or_path: adapter
template: llama3
finetuning_type: lora

### export
export_dir: merged
export_size: 2
export_device: cpu
export_legacy_format: false
"""
Q = "model.layers.0.q_proj"


@pytest.fixture
def folder(tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the example's paths lie, as seen from the working directory."""
    base, adapter = tiny
    (adapter / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (base.parent / "merge.yaml").write_text(EXAMPLE)
    monkeypatch.chdir(base.parent)
    return base.parent


def export(*overrides: str, **choices: Any) -> rawmerge.MergeSummary:
    return rawmerge.run_export(rawmerge.read_export("merge.yaml", overrides), **choices)


def command(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["export", "merge.yaml", *arguments], catch_exceptions=False)


def test_the_example_ends_in_one_file_with_the_formula_s_values(folder: Path) -> None:
    summary = export()
    assert summary.counts["updated"] == 2
    assert (folder / "merged/model.safetensors").exists()  # 2 GB hold it all
    base, out, pairs = read_all(folder / "base"), read_all(folder / "merged"), read_all(folder / "adapter")
    assert out.keys() == base.keys()
    name = f"{PREFIX}{Q}"
    expected = merged(base[f"{Q}.weight"], pairs[f"{name}.lora_A.weight"], pairs[f"{name}.lora_B.weight"], 1.5)
    assert torch.equal(out[f"{Q}.weight"], expected)


def test_it_equals_the_plain_merge_but_for_what_an_export_adds(folder: Path) -> None:
    export("export_size=null")
    rawmerge.merge_adapter("base", "adapter", "plain", tokenizer="adapter")
    ours = {path.name: path.read_bytes() for path in (folder / "merged").iterdir()}
    plain = {path.name: path.read_bytes() for path in (folder / "plain").iterdir()}
    assert ours.keys() - plain.keys() == {"Modelfile"}
    assert {name for name in plain if plain[name] != ours[name]} <= {
        "tokenizer_config.json",
        "rawmerge.json",
        "README.md",
    }


def test_modelfile_and_padding_are_as_llamafactory_leaves_them(folder: Path) -> None:
    export()
    assert (folder / "merged/Modelfile").read_text() == HEAD + LLAMA3
    text = (folder / "merged/tokenizer_config.json").read_text()
    assert text == json.dumps(TOKENIZER).replace('"padding_side": "right"', '"padding_side": "left"')


def test_relative_paths_start_from_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "merge.yaml").rename(folder / "elsewhere/merge.yaml")
    rawmerge.run_export(rawmerge.read_export("elsewhere/merge.yaml"))
    assert (folder / "merged/config.json").exists()


def test_an_output_that_is_there_needs_overwrite(folder: Path) -> None:
    export()
    with pytest.raises(OutputError):
        export()
    assert export("template=", overwrite=True).output == "merged"
    assert not (folder / "merged/Modelfile").exists()


def test_what_was_exported_is_verified(folder: Path) -> None:
    (folder / "adapter/value_head.safetensors").write_bytes(b"any bytes")
    assert export("stage=rm", verify=True).verified
    assert rawmerge.verify_merge("merged", "base", "adapter").findings == ()
    tokenizer = folder / "merged/tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|eot_id|>", "<|oet_id|>"))
    assert [at.subject for at in rawmerge.verify_merge("merged", "base", "adapter").findings] == [tokenizer.name]


@pytest.mark.parametrize(
    ("names", "copied"),
    [
        (("value_head.safetensors", "value_head.bin"), "value_head.safetensors"),
        (("value_head.bin",), "value_head.bin"),
        ((), ""),
    ],
)
def test_a_reward_model_s_value_head_is_copied(folder: Path, names: tuple[str, ...], copied: str) -> None:
    for name in names:
        (folder / "adapter" / name).write_bytes(name.encode())
    notes = export("stage=rm").notes
    heads = [path for path in (folder / "merged").iterdir() if path.name.startswith("value_head")]
    assert [(path.name, path.read_bytes()) for path in heads] == ([(copied, copied.encode())] if copied else [])
    assert any("stage rm" in note and (copied or "none is copied") in note for note in notes)


def test_without_the_reward_stage_no_value_head_is_copied(folder: Path) -> None:
    (folder / "adapter/value_head.safetensors").write_bytes(b"x")
    export()
    assert not (folder / "merged/value_head.safetensors").exists()


@pytest.mark.parametrize(
    ("template", "note"),
    [
        ("lama3", "rawmerge does not know it (llama3, perhaps?)"),
        ("chatglm3", "rawmerge does not know it"),
    ],
)
def test_an_unknown_template_makes_no_modelfile(folder: Path, template: str, note: str) -> None:
    assert any(note in found for found in export(f"template={template}").notes)
    assert not (folder / "merged/Modelfile").exists()


def test_a_tokenizer_that_cannot_be_read_is_told_and_copied(folder: Path) -> None:
    (folder / "adapter/tokenizer_config.json").unlink()
    (folder / "base/tokenizer_config.json").write_text('{"a": 1, "a": 2}')
    notes = export().notes
    assert (folder / "merged/tokenizer_config.json").read_text() == '{"a": 1, "a": 2}'
    assert not (folder / "merged/Modelfile").exists()
    assert sum("cannot be read" in note for note in notes) == 2


def test_without_a_tokenizer_config_there_is_no_modelfile(folder: Path) -> None:
    (folder / "adapter/tokenizer_config.json").unlink()
    assert any("there is no tokenizer_config.json" in note for note in export().notes)


def test_a_modelfile_of_the_base_gives_way(folder: Path) -> None:
    (folder / "base/Modelfile").write_text("FROM elsewhere")
    export()
    assert (folder / "merged/Modelfile").read_text().startswith(HEAD)


def test_several_adapters_are_merged_one_after_the_other(folder: Path) -> None:
    write_adapter(folder / "second", lora_pair(Q, 12, 8, seed=9))
    export("adapter_name_or_path=adapter,second")
    base, out = read_all(folder / "base"), read_all(folder / "merged")
    value = base[f"{Q}.weight"]
    for pairs in (read_all(folder / "adapter"), read_all(folder / "second")):
        name = f"{PREFIX}{Q}"
        value = merged(value, pairs[f"{name}.lora_A.weight"], pairs[f"{name}.lora_B.weight"], 1.5)
    assert torch.equal(out[f"{Q}.weight"], value)


def test_adapters_that_bring_the_same_tokenizer_bring_it(folder: Path) -> None:
    second = write_adapter(folder / "second", lora_pair(Q, 12, 8, seed=9))
    (second / "tokenizer_config.json").write_bytes((folder / "adapter/tokenizer_config.json").read_bytes())
    notes = export("adapter_name_or_path=adapter,second").notes
    assert json.loads((folder / "merged/tokenizer_config.json").read_text()) == TOKENIZER | {"padding_side": "left"}
    assert not any("differ" in note for note in notes)
    assert rawmerge.verify_merge("merged", "base", ["adapter", "second"]).findings == ()


def test_adapters_whose_tokenizers_differ_leave_the_base_s(folder: Path) -> None:
    second = write_adapter(folder / "second", lora_pair(Q, 12, 8, seed=9))
    (second / "tokenizer_config.json").write_text(json.dumps(TOKENIZER | {"eos_token": "<|eom_id|>"}))
    (folder / "base/tokenizer_config.json").write_text('{"padding_side": "left", "bos_token": "<b>"}')
    notes = export("adapter_name_or_path=adapter,second").notes
    assert (folder / "merged/tokenizer_config.json").read_text() == '{"padding_side": "left", "bos_token": "<b>"}'
    assert "the adapters bring tokenizers that differ: the output gets the base's" in notes
    assert 'TEMPLATE """<b>' in (folder / "merged/Modelfile").read_text()
    told = command("adapter_name_or_path=adapter,second", "--dry-run", "export_dir=other").stderr.splitlines()[0]
    assert told == "rawmerge merge base adapter second --output other --order serial --max-shard-size 2GB"


def test_an_adapter_that_may_not_be_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("rawmerge.exporting.export_run.list_tokenizer_files", denied)
    with pytest.raises(RefusedError) as caught:
        export("adapter_name_or_path=adapter,adapter")
    assert caught.value.problems[0].found == "Permission denied"


@pytest.mark.parametrize("weight", ["nan", "inf"])
def test_an_adapter_s_weight_must_be_finite(folder: Path, weight: str) -> None:
    with pytest.raises(PlanError) as caught:
        export(f"adapter_name_or_path=adapter:{weight}")
    assert caught.value.problems[0].subject == f"adapter:{weight}"


def test_new_tokens_without_their_rows_are_refused(folder: Path) -> None:
    with pytest.raises(PlanError) as caught:
        export("resize_vocab=true", "add_tokens='<a>,<b>'")
    (problem,) = caught.value.problems
    assert problem.subject == "resize_vocab, add_tokens"
    assert "random" in problem.hint
    assert not (folder / "merged").exists()


def test_new_tokens_come_with_the_adapter_s_embeddings(folder: Path) -> None:
    rows = random_tensor((24, 8), seed=5)
    (folder / "base/config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 20}))
    pairs = lora_pair(Q, 12, 8) | {f"{PREFIX}model.embed_tokens.weight": rows}
    write_adapter(folder / "grown", pairs, modules_to_save=["embed_tokens"])
    export("adapter_name_or_path=grown", "resize_vocab=true")
    assert torch.equal(read_all(folder / "merged")["model.embed_tokens.weight"], rows)


# --- what LLaMA-Factory would have done otherwise ---


def test_differences_are_told_in_a_line_each(tmp_path: Path) -> None:
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "num_hidden_layers": 1}
    tensors = {
        f"{Q}.weight": random_tensor((12, 8)),
        "model.layers.0.router.weight": random_tensor((4, 8), torch.float32),
        "model.layers.1.eh_proj.weight": random_tensor((4, 8)),
        "mtp.fc.weight": random_tensor((4, 8)),
        "vision_tower.encoder.layers.5.weight": random_tensor((4, 8)),
    }
    base = write_base(tmp_path / "base", [tensors], config)
    adapter = write_adapter(tmp_path / "adapter", lora_pair(Q, 12, 8))
    assert notes_of(base, adapter) == [
        "not cast: 1 of the tensors, in a float dtype of their own; LLaMA-Factory casts all to bfloat16, as "
        "`infer_dtype=bfloat16` does here",
        "kept: 2 of the tensors that transformers does not load, such as 'model.layers.1.eh_proj.weight'; "
        "LLaMA-Factory drops them",
    ]
    assert any("rounded once, to float16" in note for note in notes_of(base, adapter, infer_dtype="float16"))
    assert len(notes_of(base, adapter, infer_dtype="bfloat16")) == 1


def test_a_float32_base_stays_one(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{f"{Q}.weight": random_tensor((12, 8), torch.float32)}], {"dtype": "float32"})
    adapter = write_adapter(tmp_path / "adapter", lora_pair(Q, 12, 8))
    assert any("float32 is kept" in note for note in notes_of(base, adapter))
    assert notes_of(base, adapter, infer_dtype="bfloat16") == []  # merged in float32, then cast: the same there


def notes_of(base: Path, adapter: Path, **keys: str) -> list[str]:
    """Return the notes that speak of LLaMA-Factory's weights."""
    overrides = [f"{key}={value}" for key, value in keys.items()]
    file = base.parent / "job.yaml"
    file.write_text(f"model_name_or_path: {base}\nadapter_name_or_path: {adapter}\nexport_dir: out\nexport_size: 5\n")
    plan = plan_export(rawmerge.read_export(file, overrides))
    return [note for note in plan.notes if "LLaMA-Factory" in note]


# --- the command ---


def test_the_command_tells_the_plain_merge_and_prints_the_folder(folder: Path) -> None:
    done = command("export_dir=out dir", "learning_rate=1e-4")
    assert done.exit_code == 0
    assert done.stdout == "out dir\n"
    first, *rest = done.stderr.splitlines()
    assert first == "rawmerge merge base adapter --output 'out dir' --max-shard-size 2GB --tokenizer adapter"
    assert "note: learning_rate: ignored, for it concerns training" in rest


def test_the_command_overwrites_and_verifies(folder: Path) -> None:
    assert command().exit_code == 0
    assert command().exit_code == 3
    done = command("--overwrite", "--verify", "--threads", "2", "--max-memory", "2GiB", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["verified"] is True


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    done = command("--dry-run", "--json")
    assert done.exit_code == 0
    assert "Modelfile" in {file["name"] for file in json.loads(done.stdout)["written_files"]}
    assert not (folder / "merged").exists()


def test_all_that_is_wrong_is_told_as_json_too(folder: Path) -> None:
    done = command("export_size=x", "foo=1", "--json")
    assert done.exit_code == 3
    told = json.loads(done.stdout)
    assert [problem["subject"] for problem in told["problems"]] == ["foo", "export_size"]


@pytest.mark.parametrize("text", ["", "a: [", "\x00", "- 1", "&a [*a]", "a: !!python/object:os.x {}", "{{}}", "💥"])
def test_garbage_is_exit_code_3_and_no_traceback(folder: Path, text: str) -> None:
    (folder / "merge.yaml").write_text(text)
    done = command()
    assert done.exit_code == 3
    assert done.stderr.startswith("rawmerge: ")


def test_a_missing_file_is_told_by_name(folder: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        rawmerge.read_export("none.yaml")
    assert caught.value.problems[0].subject == "none.yaml"


# --- the edit of the tokenizer ---


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"a": 1.0}', '{"a": 1.0,\n  "padding_side": "left"\n}'),
        ('{"padding_side":"right","a":"\\u00e9"}', '{"padding_side":"left","a":"\\u00e9"}'),
        ('{ "padding_side" : "left" }', '{ "padding_side" : "left" }'),
        (
            '{"padding_side": null, "x": {"padding_side": "right"}}',
            '{"padding_side": "left", "x": {"padding_side": "right"}}',
        ),
        ('{"model_max_length": Infinity}', '{"model_max_length": Infinity,\n  "padding_side": "left"\n}'),
    ],
)
def test_padding_is_edited_in_place(before: str, after: str) -> None:
    assert with_left_padding(before.encode()).decode() == after


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1', '{"a": 1, "a": 2}', "\xff"])
def test_what_is_no_config_is_not_edited(text: str) -> None:
    with pytest.raises(StrictJsonError):
        with_left_padding(text.encode("latin-1"))
