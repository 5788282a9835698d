"""Adapters and bases named by other versions of transformers, by other wrappers and by other classes of one model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from tests import builders
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny
from tests.parity.family_models import FAMILIES, Family, linear_modules

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, *oracle.QUIET]

Renames: TypeAlias = Sequence[tuple[str, str]]
TODAY: Renames = ()

CLIP_VISION = Family(
    "AutoModel",
    lambda: transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    ),
)


class Namings(NamedTuple):
    """What versions of transformers call a family's tensors.

    Attributes:
        adapters: label to renames of the adapter's module paths as PEFT writes them today.
        disks: label to renames of the base's tensors as `save_pretrained` writes them today.
    """

    adapters: Mapping[str, Renames]
    disks: Mapping[str, Renames]


def _image_text(tower: str) -> Namings:
    """LLaVA and the families built like it; `tower` is a level that the vision tower had before 5.0."""
    adapters = {
        "4.51": [
            (r"^model\.language_model\.", "language_model.model."),
            (r"^lm_head", "language_model.lm_head"),
            (r"^model\.vision_tower\.", f"vision_tower.{tower}"),
            (r"^model\.multi_modal_projector", "multi_modal_projector"),
        ],
        "4.57": [(r"^model\.vision_tower\.", f"model.vision_tower.{tower}")],
        "today": TODAY,
    }
    disks = {
        "4.51": [(r"^vision_tower\.", f"vision_tower.{tower}")],
        "4.57": [
            (r"^language_model\.lm_head", "lm_head"),
            (r"^language_model\.model\.", "model.language_model."),
            (r"^vision_tower\.", f"model.vision_tower.{tower}"),
            (r"^multi_modal_projector", "model.multi_modal_projector"),
        ],
        "today": TODAY,
    }
    return Namings(adapters, disks)


_QWEN_VL = Namings(
    {"4.51": [(r"^model\.language_model\.", "model."), (r"^model\.visual", "visual")], "4.57": TODAY},
    {"4.51": TODAY, "4.57": [(r"^model\.", "model.language_model."), (r"^visual", "model.visual")]},
)
_OLD_THINKER = [(r"^model\.language_model\.", "model."), (r"^model\.(?=visual\.|audio_tower\.)", "")]
_OLD_VIT = [
    (r"\.layers\.", ".encoder.layer."),
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.k_proj", "attention.attention.key"),
    (r"attention\.v_proj", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
]
_NEW_VIT = [
    (r"\.encoder\.layer\.", ".layers."),
    (r"attention\.attention\.query", "attention.q_proj"),
    (r"attention\.attention\.key", "attention.k_proj"),
    (r"attention\.attention\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
]
_VISION_MODEL = [(r"^", "vision_model.")]

NAMINGS: dict[str, Namings] = {
    "llava": _image_text("vision_model."),
    "llava-onevision": _image_text("vision_model."),
    "gemma3": _image_text("vision_model."),
    "mistral3": _image_text(""),
    "qwen2-vl": _QWEN_VL,
    "qwen2.5-vl": _QWEN_VL,
    "qwen2.5-omni-thinker": Namings(
        {
            "4.57": _OLD_THINKER,
            "4.57-whole-model": [*_OLD_THINKER, (r"^", "thinker.")],
            "today": TODAY,
        },
        {"today": TODAY, "whole-model": [(r"^", "thinker.")]},
    ),
    "gpt-neox": Namings(
        {"4.57": [(r"^lm_head", "embed_out")], "today": TODAY}, {"4.57": TODAY, "renamed": [(r"^embed_out", "lm_head")]}
    ),
    "vit": Namings({"4.57": _OLD_VIT, "today": TODAY}, {"4.57": TODAY, "renamed": _NEW_VIT}),
    "clip-vision": Namings({"4.57": _VISION_MODEL, "today": TODAY}, {"4.57": _VISION_MODEL, "bare": TODAY}),
}
COMBINATIONS = [
    (name, disk, adapter) for name, namings in NAMINGS.items() for disk in namings.disks for adapter in namings.adapters
]


def renamed(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name, count=1)
    return name


def rename_base(base: Path, folder: Path, renames: Renames) -> Path:
    """Write the base with its tensors renamed, in the file and in the index."""
    folder.mkdir()
    for path in base.iterdir():
        target = folder / path.name
        if path.suffix == ".safetensors":
            tensors = {renamed(name, renames): tensor for name, tensor in load_file(path).items()}
            save_file(tensors, target, metadata={"format": "pt"})
        elif path.name.endswith(".index.json"):
            index = json.loads(path.read_text())
            index["weight_map"] = {renamed(name, renames): file for name, file in index["weight_map"].items()}
            target.write_text(json.dumps(index))
        else:
            target.write_bytes(path.read_bytes())
    return folder


def rename_adapter(adapter: Path, folder: Path, renames: Renames) -> Path:
    """Write the adapter with its module paths renamed: those of its tensors, and those in its config."""
    folder.mkdir()
    weights = load_file(adapter / "adapter_model.safetensors")
    paths = {name: name.removeprefix(builders.PREFIX) for name in weights}
    tensors = {builders.PREFIX + renamed(paths[name], renames): tensor for name, tensor in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    modules = {path.partition(".lora_")[0] for path in paths.values()}
    # PEFT shortens long lists to common endings; those have no names to change
    targets = [renamed(path, renames) if path in modules else path for path in config["target_modules"]]
    config["target_modules"] = targets
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = {renamed(path, renames): value for path, value in config[field].items()}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Trained(NamedTuple):
    """A base and an adapter as of today, and PEFT's merge of the two."""

    base: Path
    adapter: Path
    expected: dict[str, oracle.RawTensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Trained] = {}

    def make(name: str) -> Trained:
        family, folder = FAMILIES.get(name, CLIP_VISION), tmp_path_factory.mktemp(name)
        base = oracle.save_base(folder / "base", family.auto, family.config(), torch.bfloat16)
        load = oracle.pretrained(base, family.auto)
        targets = linear_modules(load())
        patterns: dict[str, Any] = {"rank_pattern": {targets[0]: 3}, "alpha_pattern": {targets[0]: 7, targets[-1]: 5.5}}
        adapter = oracle.save_adapter(load, folder / "adapter", r=6, lora_alpha=9, target_modules=targets, **patterns)
        return Trained(base, adapter, oracle.merge_with_peft(load, adapter, folder / "peft"))

    return lambda name: made.get(name) or made.setdefault(name, make(name))


@pytest.mark.parametrize(("name", "disk", "adapter"), COMBINATIONS, ids=map("/".join, COMBINATIONS))
def test_every_naming_of_the_adapter_on_every_naming_of_the_base(
    trained: Any, tmp_path: Path, name: str, disk: str, adapter: str
) -> None:
    today: Trained = trained(name)
    disk_names, adapter_names = NAMINGS[name].disks[disk], NAMINGS[name].adapters[adapter]
    base = rename_base(today.base, tmp_path / "base", disk_names)
    rawmerge.merge_adapter(base, rename_adapter(today.adapter, tmp_path / "adapter", adapter_names), tmp_path / "ours")
    expected = {renamed(tensor, disk_names): value for tensor, value in today.expected.items()}
    assert len(oracle.changed_names(oracle.read_tensors(base), expected)) >= 5
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)


@pytest.mark.parametrize(("name", "disk"), [(name, disk) for name, each in NAMINGS.items() for disk in each.disks])
def test_transformers_loads_every_naming_of_the_base_whole(trained: Any, tmp_path: Path, name: str, disk: str) -> None:
    base = rename_base(trained(name).base, tmp_path / "base", NAMINGS[name].disks[disk])
    auto_class = getattr(transformers, FAMILIES.get(name, CLIP_VISION).auto)
    _, info = auto_class.from_pretrained(base, output_loading_info=True)
    assert not any(info.values()), info


def test_thinkers_adapter_goes_to_the_thinker_never_to_the_talker(trained: Any, tmp_path: Path) -> None:
    today: Trained = trained("qwen2.5-omni-thinker")
    base = rename_base(today.base, tmp_path / "base", [(r"^", "thinker.")])
    whole = {f"thinker.{name}": tensor for name, tensor in today.expected.items()}
    talker = {name.replace("thinker.", "talker."): tensor + 1 for name, tensor in builders.read_all(base).items()}
    one = builders.write_base(tmp_path / "both", [builders.read_all(base), talker], {"model_type": "qwen2_5_omni"})
    rawmerge.merge_adapter(one, today.adapter, tmp_path / "ours")
    ours, before = oracle.read_tensors(tmp_path / "ours"), oracle.read_tensors(one)
    oracle.assert_same_checkpoint(ours, whole | {name: before[name] for name in talker})


# --- prefixes: hand-made files, formula by torch ---

ADAPTER_PREFIXES = {
    "peft": "base_model.model.model.layers.{}.weight",
    "extra": "base_model.model.model.model.layers.{}.weight",
    "missing": "base_model.model.layers.{}.weight",
    "compiled": "_orig_mod.base_model.model.model.layers.{}.weight",
    "compiled-inside": "base_model.model._orig_mod.model.layers.{}.weight",
    "default": "base_model.model.model.layers.{}.default.weight",
    "none": "model.layers.{}.weight",
}
DISK_PREFIXES = ["model.layers", "model.language_model.layers", "language_model.model.layers", "thinker.model.layers"]
MODULES = {"0.self_attn.q_proj": (12, 12), "1.self_attn.q_proj": (12, 12), "1.mlp.up_proj": (20, 12)}


def prefixed_pair(template: str, module: str, seed: int) -> dict[str, torch.Tensor]:
    rows, columns = MODULES[module]
    pair = builders.lora_pair("x", rows, columns, seed=seed)
    return {template.format(f"{module}.{name.split('.')[-2]}"): tensor for name, tensor in pair.items()}


def write_prefixed(folder: Path, disk: str, template: str) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Write a base and an adapter on all of its modules, and return what the merge is."""
    weights = {
        module: builders.random_tensor(shape, seed=place) for place, (module, shape) in enumerate(MODULES.items())
    }
    kept = {disk.replace("layers", "norm.weight"): builders.random_tensor((12,))}
    shards = [{f"{disk}.{module}.weight": weight} for module, weight in weights.items()]
    base = builders.write_base(folder / "base", [*shards, kept])
    pairs: dict[str, torch.Tensor] = {}
    expected = dict(kept)
    for place, (module, weight) in enumerate(weights.items()):
        pair = prefixed_pair(template, module, seed=place)
        pairs |= pair
        lora_a, lora_b = pair.values()
        expected[f"{disk}.{module}.weight"] = builders.merged(weight, lora_a, lora_b, builders.ALPHA / builders.RANK)
    return base, builders.write_adapter(folder / "adapter", pairs), expected


@pytest.mark.parametrize("disk", DISK_PREFIXES)
@pytest.mark.parametrize("prefix", ADAPTER_PREFIXES)
def test_prefixes_of_wrappers_change_no_result(tmp_path: Path, prefix: str, disk: str) -> None:
    base, adapter, expected = write_prefixed(tmp_path, disk, ADAPTER_PREFIXES[prefix])
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    ours = builders.read_all(tmp_path / "ours")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def refuse(folder: Path, base_modules: Sequence[str], adapter_module: str) -> str:
    """Return the text of the refusal, after which nothing is there."""
    shards = [
        {f"{module}.weight": builders.random_tensor((8, 8), seed=place)} for place, module in enumerate(base_modules)
    ]
    base = builders.write_base(folder / "base", shards)
    adapter = builders.write_adapter(folder / "adapter", builders.lora_pair(adapter_module, 8, 8))
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(rawmerge.RefusedError) as caught:
        rawmerge.merge_adapter(base, adapter, folder / "ours")
    assert sorted(path.name for path in folder.iterdir()) == before
    return str(caught.value)


def test_refused_where_two_towers_fit_and_both_are_named(tmp_path: Path) -> None:
    towers = [f"model.{tower}.layers.0.self_attn.q_proj" for tower in ("language_model", "vision_tower")]
    text = refuse(tmp_path, towers, "layers.0.self_attn.q_proj")
    assert all(tower in text for tower in towers)


@pytest.mark.parametrize("tower", ["vision_tower", "model.vision_tower", "model.audio_tower", "visual", "talker.model"])
def test_refused_where_the_base_lacks_the_adapters_tower(tmp_path: Path, tower: str) -> None:
    text = refuse(tmp_path, ["model.layers.0.q_proj", "model.layers.1.q_proj"], f"{tower}.layers.0.q_proj")
    assert f"{tower}.layers.0.q_proj" in text


def test_refused_where_the_base_has_fewer_layers(tmp_path: Path) -> None:
    refuse(tmp_path, ["model.layers.0.q_proj", "model.layers.1.q_proj"], "model.layers.2.q_proj")


# --- classes with a head and without ---

#: Name: auto class with a head, config, the prefix that this class puts in front, target modules.
CLASSES: dict[str, tuple[str, Any, str, list[str]]] = {
    "gpt2": (tiny.CAUSAL, tiny.gpt2, "transformer.", ["c_attn", "c_proj"]),
    "bert": ("AutoModelForMaskedLM", tiny.bert, "bert.", ["query", "intermediate.dense"]),
    "llama": (tiny.CAUSAL, tiny.llama, "model.", ["q_proj", "down_proj"]),
}


@pytest.mark.parametrize("trained_with_head", [False, True])
@pytest.mark.parametrize("saved_with_head", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_trained_on_one_class_of_a_model_and_saved_by_another(
    tmp_path: Path, name: str, saved_with_head: bool, trained_with_head: bool
) -> None:
    head_class, config, prefix, targets = CLASSES[name]
    saved_auto, trained_auto = (
        head_class if has_head else "AutoModel" for has_head in (saved_with_head, trained_with_head)
    )
    base = oracle.save_base(tmp_path / "base", saved_auto, config(), torch.bfloat16)
    load = oracle.pretrained(base, trained_auto)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=targets)
    before, merged = oracle.read_tensors(base), oracle.merge_with_peft(load, adapter, tmp_path / "peft")
    # by the bare name: the class with a head puts its prefix before the names of the one without
    bare = {tensor.removeprefix(prefix): value for tensor, value in merged.items()}
    expected = before | {tensor: bare[short] for tensor in before if (short := tensor.removeprefix(prefix)) in bare}
    assert len(oracle.changed_names(before, expected)) == 2 * len(targets) + 2 * (name == "gpt2")
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)
