"""What the oracles make once and hand out again is what they would make anew, whatever a test did to its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny
from tests.parity.folder_cache import FolderCache, described

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, *oracle.QUIET]

CASE = kinds.Case(lambda: peft.VeraConfig(r=5, target_modules=["q_proj"], save_projection=False), targets=["q_proj"])


def test_a_second_case_has_the_first_one_s_bytes_and_its_own_files(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(CASE, tmp_path / "first", torch.bfloat16)
    expected = oracle.read_tensors(base), oracle.read_tensors(adapter)
    for path in [*base.iterdir(), *adapter.iterdir()]:
        path.write_bytes(b"changed")
    base, adapter = kinds.write_case(CASE, tmp_path / "second", torch.bfloat16)
    assert (oracle.read_tensors(base), oracle.read_tensors(adapter)) == expected
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert oracle.read_tensors(kinds.write_case(CASE, tmp_path / "wide", torch.float32)[0]) != expected[0]


def test_what_is_written_again_leaves_the_random_state_of_what_was_made(tmp_path: Path) -> None:
    def make() -> None:
        (tmp_path / "made").mkdir()
        torch.rand(3)

    cache, drawn = FolderCache(), []
    for name in ("made", "written"):
        torch.manual_seed(7)
        cache.fill(tmp_path / name, "a key", make)
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


def test_a_key_that_names_an_address_is_none() -> None:
    assert described({"a": 1}, torch.float32) == described({"a": 1}, torch.float32)
    assert described({"a": 2}) != described({"a": 1})
    assert described(object()) is None


def test_a_model_that_a_test_changed_is_loaded_as_its_checkpoint_is(tmp_path: Path) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.llama(tie_word_embeddings=True), torch.bfloat16)
    changed: Any = oracle.copy_pretrained(base, tiny.CAUSAL)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.zero_()
    again: Any = oracle.copy_pretrained(base, tiny.CAUSAL)
    expected = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto").state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.name_or_path == again.config.name_or_path == str(base)


def test_a_checkpoint_that_a_test_changed_is_loaded_anew(tmp_path: Path) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.llama(), torch.float32)
    oracle.copy_pretrained(base, tiny.CAUSAL)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.25}))
    loaded: Any = oracle.copy_pretrained(base, tiny.CAUSAL)
    assert loaded.config.rms_norm_eps == 0.25
