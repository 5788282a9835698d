"""What other tools' merge files come to: every key's fate, the job, and the plain command."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rawmerge
from rawmerge.errors import RefusedError
from rawmerge.exporting.axolotl import axolotl_job
from rawmerge.exporting.export_job import ExportJob
from rawmerge.exporting.llamafactory import llamafactory_job
from rawmerge.exporting.llamafactory_keys import IDLE, KNOWN, REFUSED, USED, nearest
from rawmerge.exporting.mergekit import mergekit_job
from rawmerge.exporting.yaml_file import parse_yaml

#: As in LLaMA-Factory's README and examples/merge_lora.
EXAMPLE: dict[str, Any] = {
    "model_name_or_path": "base",
    "adapter_name_or_path": "saves/lora",
    "template": "llama3",
    "finetuning_type": "lora",
    "export_dir": "merged",
    "export_size": 2,
    "export_device": "cpu",
    "export_legacy_format": False,
}
V1: dict[str, Any] = {
    "model": "base",
    "peft_config": {
        "name": "lora",
        "adapter_name_or_path": ["one", "two"],
        "export_dir": "merged",
        "export_size": 5,
        "infer_dtype": "auto",
        "export_legacy_format": False,
    },
}


def problems(table: dict[str, Any], job: Any = llamafactory_job) -> dict[str, rawmerge.Problem]:
    with pytest.raises(RefusedError) as caught:
        job(table)
    return {problem.subject: problem for problem in caught.value.problems}


# --- LLaMA-Factory: the job ---


def test_the_example_is_taken_as_it_is() -> None:
    assert llamafactory_job(EXAMPLE) == ExportJob(
        tool="LLaMA-Factory",
        base="base",
        adapters=("saves/lora",),
        output="merged",
        max_shard_size=2_000_000_000,
        tokenizer="adapter",
        template="llama3",
        pads_left=True,
    )


def test_the_nested_form_is_the_flat_one_without_a_modelfile() -> None:
    flat = {**EXAMPLE, "adapter_name_or_path": "one, two", "export_size": 5}
    assert llamafactory_job({**V1, "template": "llama3"}) == replace(llamafactory_job(flat), template="")
    assert llamafactory_job(V1).adapters == ("one", "two")


def test_training_keys_of_the_nested_form_are_no_problem() -> None:
    nested = {**V1["peft_config"], "r": 8, "lora_alpha": 16, "target_modules": "all"}
    made = llamafactory_job({**V1, "peft_config": nested, "kernel_config": {"name": "auto"}, "trust_remote_code": True})
    assert any("kernel_config" in note for note in made.notes)


def test_the_nested_form_s_keys_are_named_as_the_file_has_them() -> None:
    assert problems({"model": 3, "peft_config": {"export_size": "x", "export_dir": "out", "expotr_dir": 1}}).keys() == {
        "model",
        "peft_config.export_size",
        "peft_config.expotr_dir",
        "adapter_name_or_path",
    }
    assert "peft_config" in problems({**EXAMPLE, "peft_config": "lora"})


@pytest.mark.parametrize(
    ("value", "adapters"),
    [
        ("one", ("one",)),
        ("one,two", ("one", "two")),
        (" one , two,three ", ("one", "two", "three")),
        (["one", "two"], ("one", "two")),
        (["one"], ("one",)),
    ],
)
def test_adapters_stand_between_commas_or_in_a_list(value: Any, adapters: tuple[str, ...]) -> None:
    assert llamafactory_job({**EXAMPLE, "adapter_name_or_path": value}).adapters == adapters


@pytest.mark.parametrize("value", [None, "", []])
def test_without_an_adapter_nothing_is_merged(value: Any) -> None:
    found = problems({**EXAMPLE, "adapter_name_or_path": value})
    assert found.keys() == {"adapter_name_or_path"}
    assert "copy it" in found["adapter_name_or_path"].hint


def test_the_adapter_s_folder_goes_for_every_adapter(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "pissa_init").mkdir(parents=True)
    table = {**EXAMPLE, "adapter_name_or_path": f"{tmp_path}/one,{tmp_path}/two", "adapter_folder": "pissa_init"}
    assert llamafactory_job(table).adapters == (f"{tmp_path}/one/pissa_init", f"{tmp_path}/two/pissa_init")
    remote = problems({**EXAMPLE, "adapter_name_or_path": "org/lora", "adapter_folder": "pissa_init"})
    assert "hf download org/lora --include 'pissa_init/*'" in remote["adapter_folder"].hint


def test_a_folder_that_a_local_adapter_lacks_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    found = problems({**EXAMPLE, "adapter_name_or_path": "lora", "adapter_folder": "pissa_init"})
    assert found.keys() == {"adapter_folder"}
    assert "there is no 'lora/pissa_init'" in found["adapter_folder"].hint


def test_a_weight_goes_behind_folder_and_revision(tmp_path: Path) -> None:
    (tmp_path / "lora/inner").mkdir(parents=True)
    table = {**EXAMPLE, "adapter_name_or_path": f"{tmp_path}/lora:0.5", "adapter_folder": "inner"}
    assert llamafactory_job(table).adapters == (f"{tmp_path}/lora/inner:0.5",)
    table = {**EXAMPLE, "adapter_name_or_path": "org/lora:0.5", "model_revision": "v2"}
    assert llamafactory_job(table).adapters == ("org/lora@v2:0.5",)


def test_the_revision_goes_to_what_is_not_on_this_machine(tmp_path: Path) -> None:
    table = {**EXAMPLE, "model_name_or_path": "org/base", "adapter_name_or_path": f"{tmp_path},org/lora"}
    assert llamafactory_job({**table, "model_revision": "main"}).base == "org/base"
    job = llamafactory_job({**table, "model_revision": "v2"})
    assert (job.base, job.adapters) == ("org/base@v2", (str(tmp_path), "org/lora@v2"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_dtype_is_the_output_s(dtype: str) -> None:
    assert llamafactory_job({**EXAMPLE, "infer_dtype": dtype}).dtype == dtype
    assert llamafactory_job({**EXAMPLE, "infer_dtype": "auto"}).dtype is None


def test_shards_stay_the_base_s_where_no_size_is_given() -> None:
    job = llamafactory_job({**EXAMPLE, "export_size": None})
    assert job.max_shard_size is None
    assert any("export_size" in note and "5 GB" in note for note in job.notes)


def test_devices() -> None:
    auto = llamafactory_job({**EXAMPLE, "export_device": "auto"})
    assert auto.device == "cpu"
    assert any("export_device=cuda" in note for note in auto.notes)
    assert llamafactory_job({**EXAMPLE, "export_device": "cuda:1"}).device == "cuda:1"


def test_the_reward_stage_has_a_value_head() -> None:
    assert llamafactory_job({**EXAMPLE, "stage": "rm"}).has_value_head
    assert not llamafactory_job({**EXAMPLE, "stage": "dpo"}).has_value_head


def test_an_empty_system_message_is_one() -> None:
    assert llamafactory_job({**EXAMPLE, "default_system": ""}).default_system == ""
    assert llamafactory_job(EXAMPLE).default_system is None


def test_new_tokens_must_come_with_the_adapter() -> None:
    table = {**EXAMPLE, "resize_vocab": True, "add_tokens": "<a>,<b>", "add_special_tokens": ""}
    assert llamafactory_job(table).added_tokens_by == ("resize_vocab", "add_tokens")
    assert llamafactory_job({**EXAMPLE, "resize_vocab": False}).added_tokens_by == ()


# --- LLaMA-Factory: every key ---

#: The keys that an export looks at, by LLaMA-Factory's source.
LOOKED_AT = """
    model_name_or_path adapter_name_or_path adapter_folder finetuning_type stage template default_system tool_format
    enable_thinking preserve_thinking infer_dtype export_dir export_size export_device export_legacy_format
    export_quantization_bit export_quantization_dataset export_quantization_nsamples export_quantization_maxlen
    export_hub_model_id hf_hub_token ms_hub_token om_hub_token model_revision cache_dir trust_remote_code
    low_cpu_mem_usage resize_vocab add_tokens add_special_tokens new_special_tokens_config init_special_tokens
    rope_scaling mixture_of_depths use_unsloth use_kt flash_attn quantization_bit quantization_method
    quantization_type double_quantization use_fast_tokenizer split_special_tokens cutoff_len image_max_pixels
""".split()  # noqa: SIM905  # a list would take a line for each


@pytest.mark.parametrize("key", LOOKED_AT)
def test_every_key_that_an_export_looks_at_has_a_fate(key: str) -> None:
    assert key in KNOWN


def test_a_key_has_one_fate() -> None:
    fates = [set(USED), set(REFUSED), *(set(group.names) for group in IDLE)]
    assert sum(map(len, fates)) == len(KNOWN)


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_done_is_refused_with_the_way_forward(key: str) -> None:
    found = problems({**EXAMPLE, key: 4})
    assert found.keys() == {key}
    assert found[key].hint
    assert not llamafactory_job({**EXAMPLE, key: None}).notes
    for value in REFUSED[key].idle:
        assert not llamafactory_job({**EXAMPLE, key: value}).notes


def test_ignored_keys_are_told_in_one_note_for_each_reason() -> None:
    job = llamafactory_job({**EXAMPLE, "learning_rate": 1e-4, "lora_rank": 8, "temperature": 0.7, "cutoff_len": 4096})
    assert list(job.notes) == [
        "learning_rate, lora_rank: ignored, for they concern training",
        "cutoff_len: ignored, for it concerns data",
        "temperature: ignored, for it concerns generation",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_name_or_path", 7),
        ("model_name_or_path", None),
        ("model_name_or_path", ""),
        ("model_name_or_path", "a\0b"),
        ("adapter_name_or_path", 7),
        ("adapter_name_or_path", ["a", 7]),
        ("adapter_name_or_path", "a,,b"),
        ("adapter_name_or_path", {"a": 1}),
        ("adapter_folder", 3),
        ("export_dir", None),
        ("export_dir", 2026),
        ("export_dir", ["a"]),
        ("export_size", 0),
        ("export_size", -1),
        ("export_size", 2.5),
        ("export_size", "2GB"),
        ("export_size", True),
        ("export_size", 10**12),
        ("export_device", "gpu"),
        ("export_device", 0),
        ("export_legacy_format", "false"),
        ("infer_dtype", "half"),
        ("infer_dtype", 16),
        ("finetuning_type", "full"),
        ("finetuning_type", "freeze"),
        ("finetuning_type", "dora"),
        ("stage", "orpo"),
        ("template", 3),
        ("default_system", 3),
        ("model_revision", 7),
        ("resize_vocab", "yes"),
        ("cache_dir", "elsewhere"),
        ("export_sise", 2),
        ("<<", {"a": 1}),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(key: str, value: Any) -> None:
    found = problems({**EXAMPLE, key: value})
    assert found.keys() == {key}
    assert found[key].expected


def test_all_that_is_wrong_is_told_at_once() -> None:
    found = problems({"export_size": "x", "stage": 1, "quantization_bit": 4, "exprot_dir": "out", "learning_rate": 1})
    assert found.keys() == {
        "export_size",
        "stage",
        "quantization_bit",
        "exprot_dir",
        "model_name_or_path",
        "adapter_name_or_path",
        "export_dir",
    }
    assert found["exprot_dir"].hint == "did you mean export_dir?"


def test_secrets_are_never_shown() -> None:
    secret = "hf_abcdefghijkl"
    job = llamafactory_job({**EXAMPLE, "hf_hub_token": secret, "swanlab_api_key": secret})
    assert any("hf_hub_token" in note for note in job.notes)
    assert secret not in repr(job)
    assert secret not in str(problems({**EXAMPLE, "hf_hub_tokne": secret, "my_token": secret})["my_token"])


@pytest.mark.parametrize(
    ("typed", "meant"), [("export_dri", "export_dir"), ("model_name", "model_name_or_path"), ("zzzz", "")]
)
def test_the_nearest_key_is_named(typed: str, meant: str) -> None:
    assert nearest(typed) == meant


def test_other_formats_and_caches_are_notes_or_refused(tmp_path: Path) -> None:
    assert any("safetensors" in note for note in llamafactory_job({**EXAMPLE, "export_legacy_format": True}).notes)
    local = {**EXAMPLE, "model_name_or_path": str(tmp_path), "adapter_name_or_path": str(tmp_path)}
    assert llamafactory_job({**local, "cache_dir": "elsewhere"}).base == str(tmp_path)
    assert "HF_HUB_CACHE" in problems({**EXAMPLE, "cache_dir": "elsewhere"})["cache_dir"].hint


# --- axolotl ---


def test_axolotl_merges_into_a_folder_of_its_output() -> None:
    table = {"base_model": "org/base", "output_dir": "./outputs/out/", "adapter": "lora", "sequence_len": 4096}
    job = axolotl_job(table)
    assert (job.base, job.adapters, job.output) == ("org/base", ("./outputs/out/",), "./outputs/out/merged")
    assert "other keys (1) are ignored, for they concern training" in job.notes
    assert axolotl_job({**table, "lora_model_dir": "elsewhere"}).adapters == ("elsewhere",)


def test_axolotl_s_qlora_is_merged_into_the_base_as_stored() -> None:
    job = axolotl_job({"base_model": "org/base", "output_dir": "out", "adapter": "qlora"})
    assert any("4 bits" in note for note in job.notes)


@pytest.mark.parametrize(
    ("table", "keys"),
    [
        ({"base_model": "", "output_dir": "out"}, {"base_model"}),
        ({"base_model": "b"}, {"output_dir"}),
        ({"base_model": 3, "output_dir": 4, "adapter": "ia3"}, {"base_model", "output_dir", "adapter"}),
    ],
)
def test_axolotl_files_that_say_too_little_are_refused(table: dict[str, Any], keys: set[str]) -> None:
    assert problems(table, axolotl_job).keys() == keys


# --- mergekit ---


def test_a_reference_is_base_and_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = rawmerge.read_export("org/base@v1+org/lora@main", ["export_dir=out", "dtype=bfloat16"])
    assert job == ExportJob(
        tool="mergekit", base="org/base@v1", adapters=("org/lora@main",), output="out", dtype="bfloat16"
    )


@pytest.mark.parametrize("method", ["passthrough", "linear", None])
def test_a_file_with_one_model_is_a_merge_of_its_adapter(method: str | None) -> None:
    table = {"merge_method": method, "models": [{"model": "base+lora", "parameters": {"weight": 1.0}}]}
    assert mergekit_job({**table, "export_dir": "out"}).adapters == ("lora",)


@pytest.mark.parametrize(
    ("table", "keys"),
    [
        ({"models": [{"model": "a+b"}, {"model": "c"}]}, {"models"}),
        ({"models": [{"model": "a"}]}, {"models"}),
        ({"models": "a+b"}, {"models"}),
        ({"models": [{"model": "a+b", "parameters": {"weight": 0.5}}]}, {"models"}),
        ({"slices": [{"sources": []}]}, {"slices"}),
        ({"models": [{"model": "a+b"}], "merge_method": "slerp"}, {"merge_method"}),
        ({"models": [{"model": "a+b"}], "dtype": "int8"}, {"dtype"}),
        ({"models": [{"model": "a+b"}], "out_dtype": 3}, {"out_dtype"}),
        ({"models": [{"model": "a+b"}], "export_dir": None}, {"export_dir"}),
        ({"models": [{"model": "a+b+c"}]}, {"a+b+c"}),
        ({"models": [{"model": "+c"}]}, {"+c"}),
    ],
)
def test_mergekit_files_that_mix_models_are_refused(table: dict[str, Any], keys: set[str]) -> None:
    assert problems({"export_dir": "out", **table}, mergekit_job).keys() == keys


# --- the command ---


def test_the_command_is_quoted_for_a_shell() -> None:
    job = ExportJob(
        tool="LLaMA-Factory",
        base="my base",
        adapters=("it's", "-x"),
        output="$HOME/out",
        dtype="float16",
        max_shard_size=2 * 10**9,
        device="cuda",
        tokenizer="adapter",
    )
    expected = "rawmerge merge 'my base' 'it'\"'\"'s' ./-x --output '$HOME/out' --order serial --dtype float16 "
    expected += "--max-shard-size 2GB --tokenizer adapter --device cuda --overwrite"
    assert job.command(overwrite=True) == expected


def test_the_command_names_one_adapter_plainly() -> None:
    job = ExportJob(tool="axolotl", base="b", adapters=("a",), output="o", max_shard_size=1234)
    assert job.command() == "rawmerge merge b a --output o --max-shard-size 1234B"


@pytest.mark.parametrize("adapters", [("a",), ("a", "b")])
def test_the_command_line_takes_the_command(adapters: tuple[str, ...]) -> None:
    from rawmerge.cli import cli

    made = ExportJob(tool="", base="b", adapters=adapters, output="o", dtype="float16", max_shard_size=10**9)
    name, *arguments = shlex.split(replace(made, tokenizer="adapter").command(overwrite=True))[1:]
    assert cli.commands[name].make_context(name, arguments).params["tokenizer"] == "adapter"


# --- which tool's ---


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        ("model_name_or_path: b\nadapter_name_or_path: a\nexport_dir: o\n", "LLaMA-Factory"),
        ("model: b\npeft_config: {name: lora, adapter_name_or_path: [a], export_dir: o}\n", "LLaMA-Factory"),
        ("base_model: b\noutput_dir: o\n", "axolotl"),
        ("models: [{model: b+a}]\nmerge_method: passthrough\nexport_dir: o\n", "mergekit"),
    ],
)
def test_the_tool_is_known_by_its_keys(tmp_path: Path, text: str, tool: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    assert rawmerge.read_export(tmp_path / "job.yaml").tool == tool


def test_reading_a_file_asks_no_hub_and_imports_nothing_heavy(tmp_path: Path) -> None:
    from tests.test_architecture import loaded_after

    (tmp_path / "job.yaml").write_text("model_name_or_path: org/b\nadapter_name_or_path: org/a\nexport_dir: o\n")
    loaded = loaded_after(f"import rawmerge; rawmerge.read_export({os.fspath(tmp_path / 'job.yaml')!r})")
    assert not loaded & {"torch", "numpy", "huggingface_hub", "safetensors", "transformers", "omegaconf"}
    assert not re.search(r"^yaml", " ".join(loaded_after("import rawmerge.cli")))


# --- README ---


def test_the_readme_s_table_has_every_key_that_is_not_ignored() -> None:
    from tests.test_readme import code_words, rows_after

    rows = rows_after("### Coming from LLaMA-Factory")
    named = {name for row in rows for name in code_words(row[0])} | code_words(rows[0][1])
    assert named == {*USED, *REFUSED}


def test_the_readme_s_example_is_taken() -> None:
    from tests.test_readme import block

    assert llamafactory_job(parse_yaml(block("yaml"))).max_shard_size == 2 * 10**9


def test_an_axolotl_file_takes_the_output_from_the_command_line_and_no_other_key(tmp_path: Path) -> None:
    path = tmp_path / "ax.yaml"
    path.write_text("base_model: b\nlora_model_dir: a\noutput_dir: zz\nadapter: lora\nsequence_len: 512\n")
    assert rawmerge.read_export(path).output == "zz/merged"
    assert rawmerge.read_export(path, ["export_dir=xo"]).output == "xo"
    with pytest.raises(RefusedError, match="outptu_dir"):
        rawmerge.read_export(path, ["outptu_dir=yy"])
