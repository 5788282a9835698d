"""Output projections with other names than `lm_head`: tied in safetensors and pickles, changed on either side."""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import rawmerge
from rawmerge.matching.tied_outputs import TIED_OUTPUTS, TiedOutput
from tests.parity import peft_oracle as oracle
from tests.parity.family_models import FAMILIES

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    *oracle.QUIET,
    pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning:peft"),
]

CLASSES = [(tied, name) for tied in TIED_OUTPUTS for name in sorted(tied.classes)]


@pytest.mark.parametrize(("tied", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_the_table_says_what_transformers_ties(tied: TiedOutput, name: str) -> None:
    own = getattr(transformers, name, None) or getattr(
        importlib.import_module("transformers.models.nomic_bert.modeling_nomic_bert"), name
    )
    keys = dict(own._tied_weights_keys)
    inputs = keys.pop(f"{tied.output}.weight")
    assert f".{inputs}".endswith(f".{tied.input_end}.weight")
    assert keys == ({f"{tied.output}.bias": tied.bias} if tied.bias else {})


#: The family, its input embedding and its output projection.
MODELS = {
    "bert": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "roberta": ("roberta.embeddings.word_embeddings", "lm_head.decoder"),
    "deberta-v2": ("deberta.embeddings.word_embeddings", "cls.predictions.decoder"),
    "albert": ("albert.embeddings.word_embeddings", "predictions.decoder"),
    "electra": ("electra.embeddings.word_embeddings", "generator_lm_head"),
    "distilbert": ("distilbert.embeddings.word_embeddings", "vocab_projector"),
    "mamba": ("backbone.embeddings", "lm_head"),
    "whisper": ("model.decoder.embed_tokens", "proj_out"),
    "t5": ("shared", "lm_head"),
    "bart": ("model.shared", "lm_head"),
}


class Case(NamedTuple):
    """Fields of peft.LoraConfig, and whether the two sides come out equal."""

    fields: dict[str, Any]
    stays_tied: bool


INPUT, OUTPUT, ANY = "INPUT", "OUTPUT", "dense|q_lin|q_proj|in_proj|q"
CASES = {
    "lora-input": Case({"target_modules": [INPUT]}, False),
    "lora-output": Case({"target_modules": [OUTPUT]}, False),
    "lora-both": Case({"target_modules": [INPUT, OUTPUT]}, False),
    "saved-output": Case({"modules_to_save": [OUTPUT]}, False),
    "saved-input": Case({"modules_to_save": [INPUT]}, False),
    "rows": Case({"trainable_token_indices": [9, 4]}, True),
}
#: Encoder and decoder share their embedding with the output: only what leaves all of them equal is merged.
SHARED = {"t5", "bart"}
RUNS = [
    (name, case)
    for name in MODELS
    for case in CASES
    if case == "rows" or (name not in SHARED and (case.startswith("lora-") or name in {"bert", "electra"}))
]


def named(value: Any, model: tuple[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: named(each, model) for key, each in value.items()}
    names = {INPUT: model[0], OUTPUT: model[1]}
    return [names.get(each, each) for each in value]


def train(base: Path, name: str, case: Case, folder: Path) -> Path:
    """Save the case's adapter; where it targets no module of its own, it trains a linear layer, too."""
    fields = named(case.fields, MODELS[name])
    if "trainable_token_indices" in fields:
        fields["trainable_token_indices"] = {MODELS[name][0].rpartition(".")[2]: fields["trainable_token_indices"]}
    fields.setdefault("target_modules", rf".*\.({ANY})")
    return oracle.save_adapter(oracle.pretrained(base, FAMILIES[name].auto), folder, r=6, lora_alpha=9, **fields)


def pickled(base: Path, folder: Path, auto: str) -> Path:
    """Write the base as torch.save does: tied tensors under all names, over one storage."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(dict(oracle.load_pretrained(base, auto).state_dict()), folder / "pytorch_model.bin")
    return folder


def answers(model: Any) -> torch.Tensor:
    """Return what a model answers to some tokens."""
    tokens: dict[str, Any] = {"input_ids": torch.arange(3, 21).reshape(2, 9)}
    if model.config.is_encoder_decoder:
        tokens["decoder_input_ids"] = tokens["input_ids"]
    if "input_features" in model.main_input_name:
        tokens["input_features"] = torch.linspace(-1, 1, 2 * 8 * 32).reshape(2, 8, 32)
        del tokens["input_ids"]
    with torch.no_grad():
        logits = model(**tokens).logits
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What transformers logs; it does not pass that on by itself."""
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    return caplog


@pytest.mark.parametrize("form", ["safetensors", "pickled"])
@pytest.mark.parametrize(("name", "case_name"), RUNS, ids=map("-".join, RUNS))
def test_each_side_gets_its_own_change(
    tmp_path: Path, warned: pytest.LogCaptureFixture, name: str, case_name: str, form: str
) -> None:
    auto, case = FAMILIES[name].auto, CASES[case_name]
    source = oracle.save_base(tmp_path / "source", auto, FAMILIES[name].config(), torch.float32, "1GB")
    base = source if form == "safetensors" else pickled(source, tmp_path / "pickled", auto)
    adapter = train(source, name, case, tmp_path / "adapter")
    # PEFT leaves out the bias of an output projection whose rows it trains, until it merges them
    as_trained = oracle.merged_model if case.stays_tied else oracle.unmerged_model
    truth = answers(as_trained(oracle.pretrained(source, auto), adapter))
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    warned.clear()
    loaded, told = getattr(transformers, auto).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values()), told
    assert [record.message for record in warned.records if record.levelname == "WARNING"] == []
    torch.testing.assert_close(answers(loaded.eval()), truth, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["tie_word_embeddings"] == case.stays_tied
    assert rawmerge.verify_merge(tmp_path / "ours").findings == ()


@pytest.mark.parametrize("form", ["safetensors", "pickled"])
@pytest.mark.parametrize("name", sorted(SHARED))
@pytest.mark.parametrize("case_name", ["lora-input", "lora-output", "saved-input", "saved-output"])
def test_an_embedding_that_more_than_two_share_is_refused_in_both_forms(
    tmp_path: Path, name: str, case_name: str, form: str
) -> None:
    auto = FAMILIES[name].auto
    source = oracle.save_base(tmp_path / "source", auto, FAMILIES[name].config(), torch.float32, "1GB")
    base = source if form == "safetensors" else pickled(source, tmp_path / "pickled", auto)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = train(source, name, CASES[case_name], tmp_path / "adapter")
    with pytest.raises(rawmerge.RefusedError):
        rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
