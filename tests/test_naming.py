"""Where names lead: by themselves, by prefix, by family, by a unique end; never to another tower, never to two."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge.errors import RefusedError
from tests.builders import PREFIX, lora_pair, random_tensor, read_all, write_adapter, write_base

Shapes = dict[str, tuple[int, ...]]


def base_of(folder: Path, shapes: Shapes, **config: Any) -> Path:
    tensors = {name: random_tensor(shape, torch.float32, seed) for seed, (name, shape) in enumerate(shapes.items())}
    return write_base(folder / "base", [tensors], {"model_type": "own", **config})


def pairs_of(folder: Path, shapes: dict[str, tuple[int, int]], **fields: Any) -> Path:
    tensors = {
        key: value for path, (rows, columns) in shapes.items() for key, value in lora_pair(path, rows, columns).items()
    }
    return write_adapter(folder / "adapter", tensors, **fields)


def places(base: Path, adapter: Path) -> set[str]:
    return {use.tensor_name for use in rawmerge.plan_merge(base, adapter).adapter_uses}


LAYERS: Shapes = {
    "language_model.model.layers.0.q_proj.weight": (12, 8),
    "language_model.model.layers.1.q_proj.weight": (12, 8),
    "language_model.model.embed_tokens.weight": (20, 8),
    "vision_tower.layers.0.q_proj.weight": (12, 8),
}


def test_a_stack_of_layers_goes_where_all_of_it_fits(tmp_path: Path) -> None:
    # layer 0 alone would fit the vision tower as well
    adapter = pairs_of(tmp_path, {"model.layers.0.q_proj": (12, 8), "model.layers.1.q_proj": (12, 8)})
    expected = {"language_model.model.layers.0.q_proj.weight", "language_model.model.layers.1.q_proj.weight"}
    assert places(base_of(tmp_path, LAYERS), adapter) == expected


@pytest.mark.parametrize("front", ["talker.model", "vision_tower", "image", "model.audio"])
def test_shapes_alone_do_not_choose_a_tower(tmp_path: Path, front: str) -> None:
    base = base_of(tmp_path, {"model.layers.0.q_proj.weight": (12, 9), f"{front}.layers.0.q_proj.weight": (12, 8)})
    for path in ("layers.0.q_proj", "model.layers.0.q_proj", "text_model.layers.0.q_proj"):
        with pytest.raises(RefusedError):
            rawmerge.merge_adapter(base, pairs_of(tmp_path, {path: (12, 8)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tower_that_names_itself_is_found_inside_another_model(tmp_path: Path) -> None:
    shapes: Shapes = {"language_model.layers.0.q.weight": (12, 8), "tower.vision_model.layers.0.q.weight": (12, 8)}
    adapter = pairs_of(tmp_path, {"vision_model.layers.0.q": (12, 8)})
    assert places(base_of(tmp_path, shapes), adapter) == {"tower.vision_model.layers.0.q.weight"}


def test_two_towers_that_fit_are_both_named(tmp_path: Path) -> None:
    base = base_of(tmp_path, {"text.layers.0.q_proj.weight": (12, 8), "image.layers.0.q_proj.weight": (12, 8)})
    with pytest.raises(RefusedError) as caught:
        rawmerge.merge_adapter(base, pairs_of(tmp_path, {"layers.0.q_proj": (12, 8)}), tmp_path / "out")
    assert "'image.layers.0.q_proj.weight', 'text.layers.0.q_proj.weight'" in str(caught.value)
    assert "full path" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["vision_tower.layers.0.q_proj", "audio.layers.0.q_proj", "decoder.layers.0.q_proj"])
def test_a_tower_that_the_base_lacks_is_not_fitted_to_another(tmp_path: Path, path: str) -> None:
    base = base_of(tmp_path, {"model.layers.0.q_proj.weight": (12, 8)})
    with pytest.raises(RefusedError, match=rf"a base tensor '{re.escape(path)}\.weight' for this pair, found none"):
        rawmerge.plan_merge(base, pairs_of(tmp_path, {path: (12, 8)}))


def test_whole_segments_only(tmp_path: Path) -> None:
    base = base_of(tmp_path, {"model.layers.0.my_q_proj.weight": (12, 8)})
    with pytest.raises(RefusedError, match="found none"):
        rawmerge.plan_merge(base, pairs_of(tmp_path, {"layers.0.q_proj": (12, 8)}))


def test_a_head_of_another_tower_is_not_the_text_model_s(tmp_path: Path) -> None:
    base = base_of(tmp_path, {"model.embed_tokens.weight": (20, 8), "talker.lm_head.weight": (20, 8)})
    with pytest.raises(RefusedError, match=r"a base tensor 'lm_head\.weight' for this pair, found none"):
        rawmerge.plan_merge(base, pairs_of(tmp_path, {"lm_head": (20, 8)}))


def test_an_embedding_goes_the_way_its_layers_went(tmp_path: Path) -> None:
    shapes = {**LAYERS, "thinker.embed_tokens.weight": (20, 8)}
    adapter = pairs_of(tmp_path, {"model.layers.0.q_proj": (12, 8), "model.layers.1.q_proj": (12, 8)})
    embedding = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": random_tensor((4, 20), torch.float32),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": random_tensor((8, 4), torch.float32),
    }
    both = write_adapter(tmp_path / "both", {**read_all(adapter), **embedding})
    assert "language_model.model.embed_tokens.weight" in places(base_of(tmp_path, shapes), both)


@pytest.mark.parametrize(
    ("model_type", "prefix"), [("bert", "bert"), ("gpt2", "transformer"), ("llama", "model"), ("roberta", "roberta")]
)
@pytest.mark.parametrize("is_on_disk", [False, True])
def test_the_base_model_prefix_is_added_and_taken_away(
    tmp_path: Path, model_type: str, prefix: str, is_on_disk: bool
) -> None:
    bare, full = "blocks.0.proj", f"{prefix}.blocks.0.proj"
    on_disk, trained = (full, bare) if is_on_disk else (bare, full)
    base = base_of(tmp_path, {f"{on_disk}.weight": (12, 8)}, model_type=model_type)
    assert places(base, pairs_of(tmp_path, {trained: (12, 8)})) == {f"{on_disk}.weight"}


def test_every_unmatched_tensor_is_named_with_its_nearest(tmp_path: Path) -> None:
    base = base_of(tmp_path, {"model.layers.0.q_proj.weight": (12, 8), "model.layers.0.k_proj.weight": (12, 8)})
    adapter = pairs_of(tmp_path, {"model.layers.0.q_prok": (12, 8), "model.layers.0.k_prok": (12, 8)})
    with pytest.raises(RefusedError) as caught:
        rawmerge.plan_merge(base, adapter)
    assert [problem.subject.split(".")[-3] for problem in caught.value.problems] == ["k_prok", "q_prok"]
    assert "did you mean 'model.layers.0.q_proj.weight'" in str(caught.value)


def test_modules_that_targets_name_and_the_file_lacks_are_told(tmp_path: Path) -> None:
    base = base_of(tmp_path, {f"model.layers.{layer}.q_proj.weight": (12, 8) for layer in range(3)})
    adapter = pairs_of(tmp_path, {"model.layers.0.q_proj": (12, 8)}, target_modules=["q_proj"])
    (note,) = rawmerge.plan_merge(base, adapter).notes
    assert "'model.layers.*.q_proj' (x 2)" in note
    fields = {"target_modules": ["q_proj"], "exclude_modules": ["1.q_proj", "2.q_proj"]}
    assert rawmerge.plan_merge(base, pairs_of(tmp_path, {"model.layers.0.q_proj": (12, 8)}, **fields)).notes == ()
