"""A plan made like another program's output: what is dropped, cast, rounded on the way, ordered, refused and told.

What transformers would say is written down here; `tests/parity/test_as_llamafactory.py` asks it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save

import rawmerge
from rawmerge.cli import cli
from rawmerge.errors import MergeError, PlanError, RefusedError
from rawmerge.exporting.export_job import KEPT_SHARDS, LEGACY_FORMAT, ExportJob
from rawmerge.exporting.export_run import plan_export
from rawmerge.exporting.llamafactory import llamafactory_job
from rawmerge.merge_plan import KeepTensor, ReplaceTensor, UpdateTensor
from rawmerge.saved_model import layout_request, meta_model
from tests.builders import (
    ALPHA,
    PREFIX,
    RANK,
    lora_pair,
    random_tensor,
    raw,
    read_all,
    shard_name,
    write_adapter,
    write_base,
)

Q, V, NORM, HEAD, MTP = (
    "model.layers.0.q_proj.weight",
    "model.layers.10.v_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
    "mtp.fc.weight",
)
SCALING = ALPHA / RANK
MAKER = "TinyForCausalLM of transformers 5.99.0"
Answers = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base in bfloat16, but for a norm and a matrix in float32; the adapter is on both matrices."""
    tensors = {
        HEAD: random_tensor((20, 8)),
        Q: random_tensor((12, 8)),
        V: random_tensor((6, 8), torch.float32),
        NORM: random_tensor((8,), torch.float32) + 1,
        MTP: random_tensor((8, 8)),
    }
    write_base(tmp_path / "base", [tensors])
    write_adapter(tmp_path / "adapter", lora_pair(Q[:-7], 12, 8) | lora_pair(V[:-7], 6, 8, seed=3))
    return tmp_path


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Return a function that sets what transformers saves: files of [name, shape], all loaded and saved in a dtype."""

    def tell(*files: list[list[Any]], saved: str = "bfloat16", held: Mapping[str, str] | None = None) -> None:
        def tensors(file: list[list[Any]]) -> list[list[Any]]:
            return [[name, saved, shape, (held or {}).get(name, "bfloat16")] for name, shape in file]

        count = len(files)
        names = [shard_name(at, count) for at in range(1, count + 1)] if count > 1 else ["model.safetensors"]
        weight_map = {name: shard for shard, file in zip(names, files, strict=True) for name, _ in file}
        index = json.dumps({"metadata": {"total_parameters": 1}, "weight_map": weight_map}) if count > 1 else ""
        layout = {"shards": list(zip(names, map(tensors, files), strict=True)), "index": index}
        about = {"class": "TinyForCausalLM", "version": "5.99.0", "loaded": "bfloat16", "pairs": []}
        monkeypatch.setattr(layout_request, "_answer", lambda *_: json.dumps({**about, "untied": layout}))
        monkeypatch.setattr(layout_request, "find_spec", lambda _: True)

    return tell


def plan(folder: Path, **choices: Any) -> rawmerge.MergePlan:
    return rawmerge.plan_merge(folder / "base", folder / "adapter", like="llamafactory", **choices)


def merge(folder: Path, **choices: Any) -> dict[str, torch.Tensor]:
    rawmerge.run_plan(plan(folder, **choices), folder / "out", verify=True)
    return read_all(folder / "out")


def refused(folder: Path, **choices: Any) -> dict[str, rawmerge.Problem]:
    with pytest.raises(RefusedError) as caught:
        plan(folder, **choices)
    return {problem.subject: problem for problem in caught.value.problems}


def in_turn(folder: Path, name: str, *dtypes: torch.dtype) -> torch.Tensor:
    """Return what loading in the first dtype, merging in it and casting to the others gives."""
    adapter = load_file(folder / "adapter/adapter_model.safetensors")
    low, high = (adapter[f"{PREFIX}{name[:-7]}.lora_{factor}.weight"] for factor in "AB")
    weight: torch.Tensor = read_all(folder / "base")[name].to(dtypes[0])
    weight = (weight.float() + (high @ low) * SCALING).to(dtypes[0])
    for dtype in dtypes[1:]:
        weight = weight.to(dtype)
    return weight


ALL = [[HEAD, [20, 8]], [Q, [12, 8]], [V, [6, 8]], [NORM, [8]]]


# --- values ---


def test_what_is_cast_when_loaded_is_rounded_before_the_merge(folder: Path, answers: Answers) -> None:
    answers(ALL)
    base, found = read_all(folder / "base"), merge(folder)
    assert set(found) == {HEAD, Q, V, NORM}
    assert raw(found[V]) == raw(in_turn(folder, V, torch.bfloat16))
    assert raw(found[V]) != raw(in_turn(folder, V, torch.float32, torch.bfloat16))
    assert raw(found[Q]) == raw(in_turn(folder, Q, torch.bfloat16))
    assert raw(found[NORM]) == raw(base[NORM].bfloat16())
    assert raw(found[HEAD]) == raw(base[HEAD])


def test_what_is_cast_at_last_is_rounded_twice(folder: Path, answers: Answers) -> None:
    answers(ALL, saved="float16")
    base, found = read_all(folder / "base"), merge(folder, dtype="float16")
    for name in (Q, V):
        assert raw(found[name]) == raw(in_turn(folder, name, torch.bfloat16, torch.float16))
    assert raw(found[NORM]) == raw(base[NORM].bfloat16().half()) != raw(base[NORM].half())
    assert raw(found[HEAD]) == raw(base[HEAD].half())


def test_what_the_class_keeps_in_float32_is_merged_in_it(folder: Path, answers: Answers) -> None:
    answers(ALL, held={V: "float32", NORM: "float32", HEAD: "float32"})
    base, found = read_all(folder / "base"), merge(folder)
    assert raw(found[V]) == raw(in_turn(folder, V, torch.float32, torch.bfloat16))
    assert raw(found[NORM]) == raw(base[NORM].bfloat16())
    kept = next(step for step in plan(folder).steps() if step.entry.name == HEAD)
    assert isinstance(kept, KeepTensor)  # up and down again leaves it as it is


def test_what_an_adapter_stores_whole_is_rounded_on_the_way(folder: Path, answers: Answers) -> None:
    head = torch.randn(20, 8, generator=torch.Generator().manual_seed(5))
    write_adapter(folder / "adapter", {f"{PREFIX}{HEAD}": head}, modules_to_save=["lm_head"], target_modules=None)
    answers(ALL, saved="float16")
    found = merge(folder, dtype="float16")
    assert raw(found[HEAD]) == raw(head.bfloat16().half()) != raw(head.half())
    step = next(step for step in plan(folder, dtype="float16").steps() if step.entry.name == HEAD)
    assert isinstance(step, ReplaceTensor)
    assert step.held_dtype == "BF16"


def test_half_precision_that_an_adapter_stores_is_no_copy_where_the_base_is_bfloat16(
    folder: Path, answers: Answers
) -> None:
    head = torch.randn(20, 8, generator=torch.Generator().manual_seed(5)).half()
    write_adapter(folder / "adapter", {f"{PREFIX}{HEAD}": head}, modules_to_save=["lm_head"], target_modules=None)
    answers(ALL, saved="float16")
    assert raw(merge(folder, dtype="float16")[HEAD]) == raw(head.bfloat16().half()) != raw(head)


def test_a_value_beyond_the_last_dtype_ends_the_merge(folder: Path, answers: Answers) -> None:
    large = {f"{PREFIX}{Q[:-7]}.lora_A.weight": torch.full((RANK, 8), 300.0)}
    large[f"{PREFIX}{Q[:-7]}.lora_B.weight"] = torch.full((12, RANK), 300.0)
    write_adapter(folder / "adapter", large)
    answers(ALL, saved="float16")
    made = plan(folder, dtype="float16")
    with pytest.raises(MergeError, match=r"inf in at least 96 of 96 elements: beyond 65504"):
        rawmerge.run_plan(made, folder / "out")
    assert not (folder / "out").exists()


# --- files ---


def test_a_file_has_the_bytes_of_the_safetensors_library(folder: Path, answers: Answers) -> None:
    answers(ALL)
    found = merge(folder)
    assert (folder / "out/model.safetensors").read_bytes() == save(found, metadata={"format": "pt"})


def test_files_and_index_are_those_that_are_told(folder: Path, answers: Answers) -> None:
    answers([[HEAD, [20, 8]]], [[Q, [12, 8]], [V, [6, 8]], [NORM, [8]]])
    made = plan(folder, max_shard_size="1KB")
    assert [shard.name for shard in made.shards] == [shard_name(1, 2), shard_name(2, 2)]
    assert [step.entry.name for step in made.shards[1].steps] == [Q, V, NORM]
    index = next(file.text for file in made.written_files if file.name == "model.safetensors.index.json")
    assert index == json.loads(layout_request._answer("", ""))["untied"]["index"]
    with_metadata = [json.loads(shard.header_text)["__metadata__"] for shard in made.shards]
    assert with_metadata == [{"format": "pt"}] * 2


def test_wider_dtypes_come_first_and_then_names(folder: Path, answers: Answers) -> None:
    base = folder / "base"
    tensors = read_all(base) | {"model.steps": torch.arange(3), "model.flag": torch.tensor([True])}
    write_base(base, [tensors])
    whole = {"model.steps": "int64", "model.flag": "bool"}
    answers([["model.flag", [1]], *ALL, ["model.steps", [3]]], held=whole)
    before = layout_request._answer("", "")
    document = json.loads(before)
    for at in document["untied"]["shards"][0][1]:
        at[1] = whole.get(at[0], at[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_request, "_answer", lambda *_: json.dumps(document))
        found = merge(folder)
    with safe_open(folder / "out/model.safetensors", "pt") as file:
        assert file.offset_keys() == ["model.steps", HEAD, Q, V, NORM, "model.flag"]
    assert (folder / "out/model.safetensors").read_bytes() == save(found, metadata={"format": "pt"})


# --- what is told ---


def test_each_difference_is_told_in_a_line(folder: Path, answers: Answers) -> None:
    answers(ALL, saved="float16")
    assert plan(folder, dtype="float16", max_shard_size="5GB").notes[-4:] == (
        f"dropped, for {MAKER} does not save them: 1 tensor, '{MTP}'",
        f"cast before the merge, as {MAKER} loads them: 2 tensors, 'model.layers.*.v_proj.weight', '{NORM}'",
        "cast to F16 after the merge, as LLaMA-Factory casts the model: all 4 float tensors",
        f"the tensors lie in one file, in the order of {MAKER}",
    )


def test_of_what_is_cast_at_last_only_some_are_named(folder: Path, answers: Answers) -> None:
    answers(ALL, held={V: "float32"})
    told = "cast to BF16 after the merge, as LLaMA-Factory casts the model: 1 tensor, 'model.layers.10.v_proj.weight'"
    assert told in plan(folder).notes


def test_many_names_are_cut_short(folder: Path, answers: Answers) -> None:
    extra = {f"mtp.{chr(97 + at)}.weight": random_tensor((2,)) for at in range(25)}
    write_base(folder / "base", [read_all(folder / "base") | extra])
    answers(ALL)
    note = next(note for note in plan(folder).notes if note.startswith("dropped"))
    assert ": 26 tensors, " in note
    assert note.endswith("'mtp.s.weight' and 6 more")


# --- refusals ---


def test_an_adapter_is_never_lost_with_a_dropped_tensor(folder: Path, answers: Answers) -> None:
    answers([[HEAD, [20, 8]], [Q, [12, 8]], [NORM, [8]]])
    found = refused(folder)
    assert set(found) == {V}
    assert found[V].found == f"one that {MAKER} does not save"
    assert found[V].expected == "a tensor for what the adapter changes"


def test_all_that_does_not_fit_is_told_at_once(folder: Path, answers: Answers) -> None:
    write_base(folder / "base", [read_all(folder / "base") | {NORM: torch.ones(8, dtype=torch.float64)}])
    answers([[HEAD, [24, 8]], [Q, [12, 8]], [V, [6, 8]], [NORM, [8]], ["score.weight", [2, 8]]])
    found = refused(folder)
    assert set(found) == {HEAD, NORM, "score.weight"}
    assert found[HEAD].expected == f"[24, 8], which {MAKER} saves"
    assert found[NORM].found == "F64, loaded as BF16 and saved as BF16"
    assert found["score.weight"].found == (
        f"none of this name, which {MAKER} saves: it would be drawn by chance, or has another name"
    )


@pytest.mark.parametrize(
    ("choices", "flag"),
    [
        ({"compute_dtype": "float64"}, "--compute-dtype"),
        ({"order": "once"}, "--order"),
        ({"combine": "average"}, "--combine"),
        ({"vocab": "overlay"}, "--vocab"),
        ({"format": "bin"}, "--format"),
    ],
)
def test_choices_that_llamafactory_does_not_have_are_refused(
    folder: Path, answers: Answers, choices: dict[str, Any], flag: str
) -> None:
    answers(ALL)
    with pytest.raises(PlanError) as caught:
        rawmerge.plan_merge(folder / "base", [folder / "adapter"] * 2, like="llamafactory", **choices)
    found = {problem.subject: problem for problem in caught.value.problems}
    assert found[flag].expected == "its default, for --like llamafactory equals what LLaMA-Factory writes"


def test_options_as_a_value_need_a_dtype_and_a_size(folder: Path, answers: Answers) -> None:
    answers(ALL)
    options = rawmerge.choose_options(like="llamafactory")
    assert (options.dtype, options.max_shard_size) == ("auto", 5 * 10**9)
    assert rawmerge.plan_merge(folder / "base", folder / "adapter", options=options) == plan(folder)
    with pytest.raises(PlanError, match="a dtype and a max_shard_size beside it"):
        rawmerge.plan_merge(folder / "base", folder / "adapter", options=rawmerge.MergeOptions(like="llamafactory"))


def test_without_transformers_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_request, "find_spec", lambda _: None)
    problem = refused(folder)["--like llamafactory"]
    assert problem.found == "no transformers and no accelerate"
    assert problem.hint == "pip install accelerate 'transformers>=5', which rawmerge's extra llamafactory names"


def test_a_base_that_cannot_be_built_is_refused(folder: Path, answers: Answers) -> None:
    answers(ALL)
    config = folder / "base/config.json"
    config.write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", "quantization_config": {"bits": 4}}))
    assert "quantization_config" in refused(folder)
    config.write_text(json.dumps({"model_type": "llama", "dtype": "float16"}))
    assert refused(folder)["config.json"].found == "bfloat16"
    config.write_text(json.dumps({"model_type": "llama"}))
    assert refused(folder, dtype="bfloat16")["config.json"].expected == "the dtype in which the model is loaded"
    config.unlink()
    assert refused(folder, dtype="bfloat16")["config.json"].found == "none"


def test_repeated_layers_are_refused(folder: Path, answers: Answers) -> None:
    first, last = "model.layers.0.q_proj", "model.layers.1.q_proj"
    write_base(folder / "base", [{f"{name}.weight": random_tensor((12, 8)) for name in (first, last)}])
    write_adapter(folder / "adapter", lora_pair(first, 12, 8), layer_replication=[[0, 2], [1, 2]])
    answers([[f"{name}.weight", [12, 8]] for name in (first, last)])  # the copy would be dropped, for none knows it
    found = refused(folder)
    assert set(found) == {"layer_replication"}
    assert found["layer_replication"].expected == "an adapter for the base's own layers"


EMBEDDING = "model.embed_tokens.weight"
TIED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": True}


@pytest.mark.parametrize(("ensured", "stored"), [(False, 1), (True, 1), (False, 2), (False, 3)])
def test_both_sides_of_a_tie_may_not_be_replaced(folder: Path, answers: Answers, ensured: bool, stored: int) -> None:
    table, new = random_tensor((20, 8)), random_tensor((20, 8), seed=4)
    head = {HEAD: table.clone() if stored == 2 else table * 2} if stored > 1 else {}
    write_base(folder / "base", [{EMBEDDING: table, Q: random_tensor((12, 8)), **head}], TIED)
    both = {f"{PREFIX}{EMBEDDING}": new, f"{PREFIX}{HEAD}": new.clone()}
    saved: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": ensured}
    write_adapter(folder / "adapter", both | lora_pair(Q[:-7], 12, 8), **saved)
    answers([[EMBEDDING, [20, 8]], [Q, [12, 8]], *([[HEAD, [20, 8]]] if stored == 3 else [])])
    if ensured or stored == 3:  # such bases have two embeddings in everyone's eyes
        assert plan(folder).shards
        return
    found = refused(folder)
    assert set(found) == {"modules_to_save"}
    assert found["modules_to_save"].found == (
        f"both sides replaced, '{EMBEDDING}' and '{HEAD}': PEFT unties them and two are saved"
    )


def test_a_tie_that_is_undone_is_refused(folder: Path, answers: Answers) -> None:
    write_base(folder / "base", [{EMBEDDING: random_tensor((20, 8)), Q: random_tensor((12, 8))}], TIED)
    one = {f"{PREFIX}{EMBEDDING}": random_tensor((20, 8), seed=4)}
    write_adapter(folder / "adapter", one | lora_pair(Q[:-7], 12, 8), modules_to_save=["embed_tokens"])
    answers([[EMBEDDING, [20, 8]], [Q, [12, 8]]])
    found = refused(folder)["tie_word_embeddings"]
    assert found.found == "an adapter after which the two sides differ"
    assert "unties what it replaces" in found.hint


SINGLE, SHARED = "model.layers.0.mlp.experts.1.gate_proj", "model.layers.0.mlp.shared_expert.gate_proj"


@pytest.mark.parametrize(
    ("model_type", "told"), [("qwen2_moe", SINGLE), ("jamba", SINGLE), ("qwen3_next", SHARED), ("llama", "")]
)
def test_pairs_that_peft_does_not_load_are_merged_and_told(
    folder: Path, answers: Answers, model_type: str, told: str
) -> None:
    single = SINGLE if model_type != "jamba" else SINGLE.replace(".mlp.", ".feed_forward.")
    names = (SHARED, single) if model_type != "llama" else (SHARED, Q[:-7])
    tensors = {f"{name}.weight": random_tensor((12, 8)) for name in names}
    write_base(folder / "base", [tensors], {"model_type": model_type, "dtype": "bfloat16"})
    write_adapter(folder / "adapter", {key: at for name in names for key, at in lora_pair(name, 12, 8).items()})
    answers([[name, [12, 8]] for name in tensors])
    notes = [note for note in plan(folder).notes if "PEFT" in note]
    told = single if told == SINGLE else told
    assert notes == [f"{LEFT_OUT} '{model_type}': 1 tensor, '{told}.weight'"] * bool(told)
    assert all(raw(at) != raw(tensors[name]) for name, at in merge(folder).items())


LEFT_OUT = (
    "merged, where LLaMA-Factory leaves the base's values, for PEFT 0.21 with transformers 5 does not load what "
    "adapters have for them in"
)


def test_of_several_adapters_what_peft_does_not_load_is_told_once(folder: Path, answers: Answers) -> None:
    write_base(folder / "base", [{f"{SINGLE}.weight": random_tensor((12, 8))}], {**TIED, "model_type": "qwen2_moe"})
    for name in ("adapter", "other"):
        write_adapter(folder / name, lora_pair(SINGLE, 12, 8, seed=len(name)))
    answers([[f"{SINGLE}.weight", [12, 8]]])
    made = rawmerge.plan_merge(folder / "base", [folder / "adapter", folder / "other"], like="llamafactory")
    assert [note for note in made.notes if "PEFT" in note] == [f"{LEFT_OUT} 'qwen2_moe': 1 tensor, '{SINGLE}.weight'"]


def test_shapes_that_are_not_the_config_s_are_told_by_tensor(
    folder: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(ALL)
    unlike = [["model.layers.0.q_proj.weight", [12, 8], [16, 8]], ["model.layers.1.q_proj.weight", [12, 8], [16, 8]]]
    document = {**json.loads(layout_request._answer("", "")), "unlike": [*unlike, [HEAD, [20, 8], [24, 8]]]}
    monkeypatch.setattr(layout_request, "_answer", lambda *_: json.dumps(document))
    found = refused(folder)
    assert set(found) == {"model.layers.*.q_proj.weight", HEAD}
    assert found["model.layers.*.q_proj.weight"].found == "[12, 8], in 2 tensors"
    assert found[HEAD].found == "[20, 8]"
    assert found[HEAD].expected == f"[24, 8], which config.json gives {MAKER}"


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_decoder_layers", "t2u_encoder_layers", "n_layer", "depth"])
def test_more_layers_than_tensors_are_not_built(name: str) -> None:
    meta_model._check_layers({"text_config": {name: 4, "max_window_layers": 28, "id2label": {0: "a"}}}, 4)
    with pytest.raises(ValueError, match=f"config.json states {name} 5, and the checkpoint has 4 tensors"):
        meta_model._check_layers({"text_config": {name: 5}}, 4)


def test_deep_stages_are_added_up() -> None:
    meta_model._check_layers({"depths": [2, 2], "mlp_only_layers": [0, 5]}, 4)
    with pytest.raises(ValueError, match=r"config.json states depths \[2, 3\]"):
        meta_model._check_layers({"depths": [2, 3]}, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold to the limit")
@pytest.mark.parametrize(("taken", "told"), [("bytearray(1 << 20)", ""), ("bytearray(3 << 30)", "more than 1 GiB")])
def test_a_model_that_takes_too_much_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str, told: str
) -> None:
    program = tmp_path / "program.py"
    lines = ["import sys", f"sys.path.insert(0, {str(Path(rawmerge.__file__).parents[1])!r})"]
    lines += ["from rawmerge.saved_model import meta_model", f"meta_model._answer = lambda _: len({taken})"]
    program.write_text("\n".join([*lines, "meta_model.main()"]))
    monkeypatch.setattr(layout_request, "meta_model", SimpleNamespace(__file__=str(program)))
    monkeypatch.setattr(layout_request, "_MEMORY_GIB", 1)
    request = json.dumps({"most_memory": 2**30, "taken": taken})
    if not told:
        assert layout_request._answer(request, "") == str(1 << 20)
        return
    with pytest.raises(PlanError, match="one that takes more than 1 GiB to build the model's shapes"):
        layout_request._answer(request, "")


# --- the plan, its record, the command ---


def test_a_plan_comes_back_from_json_and_is_not_trusted(folder: Path, answers: Answers) -> None:
    answers(ALL, saved="float16")
    made = plan(folder, dtype="float16")
    assert any(isinstance(step, UpdateTensor) and step.held_dtype == "BF16" for step in made.steps())
    text = rawmerge.format_plan(made)
    assert rawmerge.parse_plan(text) == made
    with pytest.raises(PlanError, match="a float dtype to be held in"):
        rawmerge.parse_plan(text.replace('"held_dtype": "BF16"', '"held_dtype": "I8"'))


def test_the_record_tells_it_and_verify_goes_by_it(folder: Path, answers: Answers) -> None:
    answers(ALL)
    merge(folder)
    record = json.loads((folder / "out/rawmerge.json").read_text())
    assert {name: record["options"][name] for name in ("like", "dtype", "max_shard_size")} == {
        "like": "llamafactory",
        "dtype": "bfloat16",
        "max_shard_size": 5 * 10**9,
    }
    verified = rawmerge.verify_merge(folder / "out", folder / "base", folder / "adapter")
    assert (verified.findings, verified.tensor_count) == ((), 4)
    answers(ALL[:2] + ALL[3:] + [[MTP, [8, 8]]])  # another version of transformers may load other tensors
    with pytest.raises(PlanError, match="does not save"):
        rawmerge.verify_merge(folder / "out", folder / "base", folder / "adapter")


def test_verify_is_told_what_an_output_without_a_record_is_like(folder: Path, answers: Answers) -> None:
    answers(ALL)
    merge(folder)
    (folder / "out/rawmerge.json").unlink()
    (folder / "out/README.md").unlink()
    inputs = (folder / "base", folder / "adapter")
    assert not rawmerge.verify_merge(folder / "out", *inputs).is_equal
    assert rawmerge.verify_merge(folder / "out", *inputs, like="llamafactory").is_equal
    assert rawmerge.verify_merge(folder / "out", *inputs, options=rawmerge.choose_options(like="llamafactory")).is_equal
    command = ["verify", str(folder / "out"), "--base", str(inputs[0]), "--adapter", str(inputs[1])]
    assert CliRunner().invoke(cli, command).exit_code == 5
    assert CliRunner().invoke(cli, [*command, "--like", "llamafactory"]).exit_code == 0


def test_a_plain_merge_over_it_takes_nothing_over(folder: Path, answers: Answers) -> None:
    answers(ALL)
    rawmerge.run_plan(plan(folder), folder / "out")
    plain = rawmerge.merge_adapter(folder / "base", folder / "adapter", folder / "out", overwrite=True)
    assert plain.counts["kept"] == 3
    assert MTP in read_all(folder / "out")


@pytest.fixture
def file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merge file of LLaMA-Factory, seen from the working directory."""
    path = folder / "merge.yaml"
    path.write_text("model_name_or_path: base\nadapter_name_or_path: adapter\nexport_dir: merged\n")
    monkeypatch.chdir(folder)
    return path


def test_the_command_tells_the_merge_that_it_stands_for(file: Path, answers: Answers) -> None:
    answers(ALL)
    done = CliRunner().invoke(cli, ["export", str(file), "--as-llamafactory"], catch_exceptions=False)
    assert done.exit_code == 0
    plain = "rawmerge merge base adapter --output merged --like llamafactory --max-shard-size 5GB --tokenizer adapter"
    assert done.stderr.splitlines()[0] == plain
    assert f"note: dropped, for {MAKER} does not save them: 1 tensor, '{MTP}'" in done.stderr
    assert "LLaMA-Factory drops them" not in done.stderr
    assert "stay those of the base" not in done.stderr
    again = CliRunner().invoke(cli, [*plain.replace("--output merged", "--output again").split()[1:]])
    assert again.exit_code == 0
    names = ("model.safetensors", "config.json", "rawmerge.json")
    for name in names[:2]:
        assert (file.parent / "merged" / name).read_bytes() == (file.parent / "again" / name).read_bytes()


def test_a_job_as_llamafactory() -> None:
    table = {"model_name_or_path": "b", "adapter_name_or_path": "a", "export_dir": "o"}
    job = llamafactory_job({**table, "export_legacy_format": True})
    assert {KEPT_SHARDS, LEGACY_FORMAT} <= set(job.notes)
    like = job.as_llamafactory()
    assert (like.like, like.max_shard_size, like.format) == ("llamafactory", 5 * 10**9, "safetensors")
    assert not {KEPT_SHARDS, LEGACY_FORMAT} & set(like.notes)
    assert "export_legacy_format: ignored, as transformers 5 does; safetensors are written" in like.notes
    assert llamafactory_job({**table, "export_size": 2}).as_llamafactory().max_shard_size == 2 * 10**9


def test_a_float32_base_is_told(folder: Path, answers: Answers) -> None:
    base = {name: tensor.float() for name, tensor in read_all(folder / "base").items()}
    write_base(folder / "base", [base], {"model_type": "llama", "dtype": "float32"})
    answers(ALL, saved="float32", held=dict.fromkeys(base, "float32"))
    answer = json.loads(layout_request._answer("", ""))
    job = ExportJob(tool="LLaMA-Factory", base="base", adapters=("adapter",), output="out").as_llamafactory()
    job = replace(job, base=str(folder / "base"), adapters=(str(folder / "adapter"),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_request, "_answer", lambda *_: json.dumps({**answer, "loaded": "float32"}))
        notes = plan_export(job).notes
    assert any(note.startswith("float32 is kept; where there is a GPU") for note in notes)


def test_a_base_may_give_way(folder: Path, answers: Answers) -> None:
    tensors = read_all(folder / "base")
    (folder / "base/model.safetensors").unlink()
    write_base(folder / "base", [{name: tensors[name]} for name in (HEAD, Q, V, NORM, MTP)])
    answers([[HEAD, [20, 8]], [Q, [12, 8]]], [[V, [6, 8]], [NORM, [8]]])
    whole = merge(folder)
    choices: dict[str, Any] = {"like": "llamafactory", "consume_base": True}
    rawmerge.merge_adapter(folder / "base", folder / "adapter", folder / "other", **choices)
    other = read_all(folder / "other")
    assert {name: raw(tensor) for name, tensor in other.items()} == {name: raw(at) for name, at in whole.items()}
    with pytest.raises(RefusedError, match="this very merge, finished"):
        rawmerge.merge_adapter(folder / "base", folder / "adapter", folder / "other", **choices)
