"""What a verification tells of an output without base and adapter: its config against its tensors, and its record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import rawmerge
from rawmerge.cli import cli
from tests.builders import lora_pair, random_tensor, write_adapter, write_base
from tests.test_readme import code_words, rows_after

Tensors = dict[str, torch.Tensor]
EMBEDDING, HEAD, PROJECTION = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.q_proj"
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 20,
    "tie_word_embeddings": False,
}


def weights(rows: int = 20, **others: torch.Tensor) -> Tensors:
    made = {EMBEDDING: random_tensor((rows, 8)), HEAD: random_tensor((rows, 8), seed=1)}
    return {**made, f"{PROJECTION}.weight": random_tensor((12, 8)), **others}


def verify(folder: Path, tensors: Tensors, **fields: Any) -> rawmerge.Verification:
    return rawmerge.verify_merge(write_base(folder, [tensors], {**LLAMA, **fields}))


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


NESTED = {"model_type": "llava", "vocab_size": 20, "text_config": {"vocab_size": 32}}
GOOD: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "plain": (weights(), {}),
    "padded rows": (weights(64), {}),
    "nothing stated": (weights(), {"vocab_size": None, "tie_word_embeddings": None, "dtype": None}),
    "one of two sizes": (weights(), NESTED),
    "rows that are packed": ({**weights(), EMBEDDING: torch.zeros(5, 8, dtype=torch.uint8)}, {}),
    "quantised": (without(weights(10), HEAD), {"quantization_config": {"bits": 4}, "dtype": "float32"}),
    "no embedding": (without(weights(), EMBEDDING, HEAD), {}),
    "a tie": (without(weights(), HEAD), {"tie_word_embeddings": True}),
    "a tie by the family": (without(weights(), HEAD), {"model_type": "gemma", "tie_word_embeddings": None}),
    "a tie in the text config": (
        without(weights(), HEAD),
        {"text_config": {"model_type": "llama", "tie_word_embeddings": True}},
    ),
    "a tie by a nested family": (without(weights(), HEAD), {"text_config": {"model_type": "gemma"}}),
    "a tie with equal copies": ({**weights(), HEAD: weights()[EMBEDDING]}, {"tie_word_embeddings": True}),
    "no head": (without(weights(), HEAD), {"architectures": ["LlamaModel"]}),
    "a classifier": (without(weights(), HEAD), {"architectures": ["LlamaForSequenceClassification"]}),
    "the inner model": (
        {EMBEDDING.removeprefix("model."): weights()[EMBEDDING], "layers.0.q_proj.weight": random_tensor((12, 8))},
        {},
    ),
    "code of its own": (without(weights(), HEAD), {"auto_map": {"AutoModelForCausalLM": "m.M"}}),
    "a packed head": ({**without(weights(), HEAD), "lm_head.qweight": torch.zeros(4, 8, dtype=torch.int32)}, {}),
    "torch's name": (weights(), {"dtype": None, "torch_dtype": "torch.bfloat16"}),
    "another dtype in part": ({**weights(), "model.norm.weight": torch.ones(8)}, {}),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_checkpoint_that_loads_raises_no_alarm(tmp_path: Path, case: str) -> None:
    tensors, fields = GOOD[case]
    made = verify(tmp_path / "out", tensors, **fields)
    assert (made.findings, made.notes) == ((), ("base and adapter were not given: values were not looked at",))


DEEP: dict[str, tuple[dict[str, Any], str]] = {  # of two layers and a width of 8: what else a config says, and why
    "as stated": ({"num_hidden_layers": 2, "hidden_size": 8}, ""),
    "a layer that predicts a further token": ({"num_hidden_layers": 1, "num_nextn_predict_layers": 1}, ""),
    "a list of layers": ({"num_hidden_layers": 5, "layer_types": ["full_attention"] * 2}, ""),
    "narrow embeddings": ({"hidden_size": 64, "embedding_size": 8}, ""),
    "a nested text model": ({"text_config": {"num_hidden_layers": 2, "hidden_size": 8}}, ""),
    "another tower": ({"num_hidden_layers": 5, "vision_config": {"num_hidden_layers": 2}}, ""),
    "code of its own": ({"num_hidden_layers": 5, "hidden_size": 9, "auto_map": {"AutoModel": "m.M"}}, ""),
    "an unknown family": ({"num_hidden_layers": 5, "hidden_size": 9, "model_type": "of_my_own"}, ""),
    "sublayers": ({"num_hidden_layers": 4, "model_type": "dory"}, ""),
    "quantised": ({"hidden_size": 9, "quantization_config": {"bits": 4}}, ""),
    "no numbers": ({"num_hidden_layers": "2", "hidden_size": True}, ""),
    "too many": ({"num_hidden_layers": 1}, "1 layers, by num_hidden_layers in config.json"),
    "too few": ({"text_config": {"num_hidden_layers": 3}}, "3 layers, by num_hidden_layers in config.json"),
    "wider": ({"hidden_size": 64}, "64 columns, by hidden_size in config.json"),
    "as wide as it sees": (
        {"hidden_size": 64, "vision_config": {"hidden_size": 8}},
        "64 columns, by hidden_size in config.json",
    ),
}


@pytest.mark.parametrize("case", DEEP)
def test_depth_and_width_are_findings_where_the_config_has_no_other_place_for_them(tmp_path: Path, case: str) -> None:
    fields, expected = DEEP[case]
    tensors = {**weights(), "model.layers.1.q_proj.weight": random_tensor((12, 8), seed=2)}
    made = verify(tmp_path / "out", tensors, **fields)
    assert [finding.expected for finding in made.findings] == [expected] * bool(expected)
    assert all("config.json is of another model" in finding.hint for finding in made.findings)
    assert verify_file(tmp_path / "out/model.safetensors").findings == ()


def verify_file(path: Path) -> rawmerge.Verification:
    """Verify a file alone, which may be one of several."""
    return rawmerge.verify_merge(path)


def test_a_config_of_ten_thousand_text_models_takes_no_time(tmp_path: Path) -> None:
    sides = {f"predict_{number}": number + 100 for number in range(20_000)}
    fields = {"num_hidden_layers": 77, **sides, "text_config": {"num_hidden_layers": 78, "decoder": sides}}
    for _ in range(40):
        fields = {"num_hidden_layers": 77, "text_config": fields}
    assert verify(tmp_path / "out", weights(), **fields).findings == ()


def test_an_embedder_of_sentence_transformers_needs_no_head(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/modules.json").write_text("[]")
    assert verify(tmp_path / "out", without(weights(), HEAD)).findings == ()


@pytest.mark.parametrize(
    "fields",
    [{"vocab_size": 33}, {"vocab_size": 33, "text_config": {"vocab_size": 34}}, {"text_config": {"vocab_size": 33}}],
)
def test_a_vocabulary_without_rows_is_a_finding(tmp_path: Path, fields: dict[str, Any]) -> None:
    smallest = {"vocab_size": None} | fields
    (finding,) = verify(tmp_path / "out", weights(), **smallest).findings
    assert (finding.subject, finding.found) == (EMBEDDING, "20")
    assert finding.expected == "33 rows or more, by vocab_size in config.json"


def test_an_output_projection_that_is_neither_stored_nor_tied_is_a_finding(tmp_path: Path) -> None:
    (finding,) = verify(tmp_path / "out", without(weights(), HEAD)).findings
    assert (finding.subject, finding.found) == (HEAD, "no such tensor")
    assert "tie_word_embeddings" in finding.hint


def test_a_tie_of_unlike_values_is_a_note(tmp_path: Path) -> None:
    made = verify(tmp_path / "out", weights(), tie_word_embeddings=True)
    assert made.findings == ()
    assert "with other values" in made.notes[0]


@pytest.mark.parametrize(
    "fields", [{"dtype": "float32"}, {"dtype": None, "text_config": {"torch_dtype": "torch.float32"}}]
)
def test_a_dtype_that_no_tensor_has_is_a_note(tmp_path: Path, fields: dict[str, Any]) -> None:
    made = verify(tmp_path / "out", weights(), **fields)
    assert made.findings == ()
    assert made.notes[0] == "config.json says float32, and most of the tensors are BF16"


def test_what_the_bases_config_says_wrongly_is_no_finding_of_the_merge(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [weights()], {**LLAMA, "vocab_size": 33})
    adapter = write_adapter(tmp_path / "adapter", lora_pair(PROJECTION, 12, 8), target_modules=["q_proj"])
    assert rawmerge.merge_adapter(base, adapter, tmp_path / "out", verify=True).verified
    made = rawmerge.verify_merge(tmp_path / "out", base, adapter)
    assert made.findings == ()
    assert any("33 rows" in note for note in made.notes)


CONFIGS: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda path: path.write_text("{garbage"),
    "no object": lambda path: path.write_text("[1, 2]"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\0"),
    "nested": lambda path: path.write_text("[" * 10_000),
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_read_does_not_end_the_verification(
    tiny: tuple[Path, Path], tmp_path: Path, case: str
) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, output, checksum=True)
    shard = next(output.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    (output / "config.json").unlink()
    CONFIGS[case](output / "config.json")
    alone, against = rawmerge.verify_merge(output), rawmerge.verify_merge(output, *tiny)
    for made in (alone, against):
        assert made.tensor_count > 0
        assert made.findings[0].subject == str(output / "config.json")
        assert any(finding.subject == shard.name for finding in made.findings)
        assert any("config cannot be read" in note for note in made.notes)
    assert len(against.differences) == 1


def test_a_shard_that_cannot_be_read_ends_it_and_says_so(tiny: tuple[Path, Path]) -> None:
    (tiny[0] / "config.json").write_text("{garbage")
    shard = next(tiny[0].glob("*.safetensors"))
    shard.write_bytes(b"")
    made = rawmerge.verify_merge(tiny[0])
    assert ([finding.subject for finding in made.findings], made.tensor_count) == ([str(shard)], 0)
    assert "nothing else was looked at" in made.notes[0]


def test_thousands_of_findings_are_a_short_text_and_whole_as_json(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, output)
    shard = next(output.glob("*.safetensors"))
    names = [f"extra{number}x{number % 7}" for number in range(3000)]
    save_file({**load_file(shard), **dict.fromkeys(names, torch.ones(1)[:0])}, shard)
    command = ("verify", output, "--base", tiny[0], "--adapter", tiny[1])
    told = invoke(*command)
    assert told.exit_code == 5
    assert len(told.stdout.splitlines()) < 60
    assert "more kinds (--json lists all)" in told.stdout
    document = json.loads(invoke(*command, "--json").stdout)
    assert {finding["subject"] for finding in document["findings"]} > set(names)


INTERRUPTED = """
import signal
import rawmerge.{module} as module
def sent(*arguments, **options):
    signal.raise_signal(signal.{number})
module.{name} = sent
from rawmerge.__main__ import main
main()
"""


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize(("module", "name"), [("verifying.verification", "replay"), ("planning", "resolve_base")])
def test_an_interruption_says_that_it_was_not_verified(
    tiny: tuple[Path, Path], module: str, name: str, number: str, code: int
) -> None:
    script = INTERRUPTED.format(module=module, name=name, number=number)
    command = [sys.executable, "-c", script, "verify", tiny[0], "--base", tiny[0], "--adapter", tiny[1]]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == "rawmerge: interrupted; it was not verified\n"


def test_the_readme_has_every_field_of_the_json(tiny: tuple[Path, Path]) -> None:
    command = ("verify", tiny[0], "--base", tiny[0], "--adapter", tiny[1], "--json")
    document = json.loads(invoke(*command).stdout)
    for heading, fields in (("`verify --json` prints", document), ("| field of a", document["differences"][0])):
        table = rows_after(heading)
        assert {word for name, _ in table for word in code_words(name)} == fields.keys()
    assert {"subject", "expected", "found", "hint"} == document["findings"][0].keys()


def test_an_inspection_says_that_a_folder_is_a_merge(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    assert "merge by rawmerge" not in rawmerge.inspect_path(tiny[0]).facts
    rawmerge.merge_adapter(*tiny, tmp_path / "out", dtype="float16")
    rawmerge.merge_adapter(tmp_path / "out", tiny[1], tmp_path / "twice", force=True)
    facts = json.loads(invoke("inspect", tmp_path / "out", "--json").stdout)["facts"]
    assert facts["merge by rawmerge"] == rawmerge.__version__
    assert all(path.name in facts["merged base"] for path in tiny[0].glob("*.safetensors"))
    (adapter,) = facts["merged adapters"]
    assert adapter.startswith("local files: adapter_model.safetensors")
    assert facts["merged with"] == ["dtype float16"]
    assert facts["adapters before"] == 0
    assert rawmerge.inspect_path(tmp_path / "twice").facts["adapters before"] == 1
    text = invoke("inspect", tmp_path / "out").stdout
    assert "merge by rawmerge" in text
    assert "dtype float16" in text


@pytest.mark.parametrize(
    "record",
    [
        '{"versions": 1, "options": [], "base": {"shards": [1, {"bytes": "x"}]}, "adapters": [null, {"files": {}}]}',
        '{"history": 5, "adapters": {"a": 1}, "base": null, "versions": {"rawmerge": {"a": ["\\u001b[31m"]}}}',
        "{garbage",
        "{}",
    ],
)
def test_a_strangers_record_breaks_no_inspection(tiny: tuple[Path, Path], record: str) -> None:
    (tiny[0] / "rawmerge.json").write_text(record)
    told = invoke("inspect", tiny[0])
    assert told.exit_code == 0
    assert "\x1b" not in told.stdout
    assert json.loads(invoke("inspect", tiny[0], "--json").stdout)["kind"] == "base"


def test_shards_without_their_index_are_a_finding(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    assert rawmerge.verify_merge(tmp_path / "out").findings == ()
    (tmp_path / "out/model.safetensors.index.json").unlink()
    (finding,) = rawmerge.verify_merge(tmp_path / "out").findings
    assert (finding.subject, finding.expected) == ("model.safetensors.index.json", "an index of 2 shards")


def test_what_is_wrong_with_a_record_is_not_said_of_a_base(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    (tmp_path / "out/rawmerge.json").write_text("{")
    findings = rawmerge.verify_merge(tmp_path / "out").findings
    assert any(finding.subject == "rawmerge.json" for finding in findings)
    assert not any("the base's" in finding.found for finding in findings)
