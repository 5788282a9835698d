"""What PEFT makes of a base and an adapter, and byte-exact comparison with it.

No expected value comes from rawmerge: checkpoints are read here with a reader of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.folder_cache import FolderCache, described
from tests.parity.model_cache import ModelCache

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
# neither is compared with anything, and both cost a tenth of the time of a tiny merge
peft.PeftModel.create_or_update_model_card = lambda _model, _folder: None
transformers.utils.logging.disable_progress_bar()

Loader: TypeAlias = Callable[[], torch.nn.Module]

_BASES: Final = FolderCache()
_MODELS: Final = ModelCache()

#: What PEFT and transformers warn of in every run, by message and place.
QUIET: Final = (
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning:peft"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning:peft"),
)


class RawTensor(NamedTuple):
    """A tensor as it lies in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_tensors(path: Path) -> dict[str, RawTensor]:
    """Return all tensors of a safetensors file, or of those at the top of a directory."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in _read_file(file).items()}


def _read_file(file: Path) -> dict[str, RawTensor]:
    raw = file.read_bytes()
    data_start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:data_start])
    header.pop("__metadata__", None)
    return {
        name: RawTensor(
            entry["dtype"],
            tuple(entry["shape"]),
            raw[data_start + entry["data_offsets"][0] : data_start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def save_base(folder: Path, auto: str, config: Any, dtype: torch.dtype, max_shard_size: str = "60KB") -> Path:
    """Save a model with random weights, norms and biases included; `auto` names a transformers auto class."""

    def make() -> None:
        torch.manual_seed(1)
        model = getattr(transformers, auto).from_config(config, dtype=dtype)
        _randomise(model, seed=2, spread=0.05, select=lambda _: True)
        model.save_pretrained(folder, max_shard_size=max_shard_size)

    _BASES.fill(folder, described(auto, type(config), config.to_dict(), dtype, max_shard_size), make)
    return folder


def pretrained(folder: Path, auto: str, dtype: torch.dtype | str = "auto") -> Loader:
    """Return a function that loads the checkpoint anew at every call."""
    return lambda: load_pretrained(folder, auto, dtype)


def load_pretrained(folder: Path, auto: str, dtype: torch.dtype | str = "auto") -> torch.nn.Module:
    """Load a checkpoint in evaluation mode; its weights are mapped from the files, as users have them."""
    model = getattr(transformers, auto).from_pretrained(folder, dtype=dtype, local_files_only=True)
    assert isinstance(model, torch.nn.Module)
    return model.eval()


def copy_pretrained(folder: Path, auto: str) -> torch.nn.Module:
    """Return a model to train: that of the checkpoint, its weights in memory of its own.

    Not to merge with: products may have other bits where mapped weights lie at no multiple of 16 bytes.
    """
    return _MODELS.load(folder, auto, lambda: load_pretrained(folder, auto))


def save_adapter(load: Loader, folder: Path, edits: Mapping[str, Any] | None = None, **lora: Any) -> Path:
    """Save a LoRA adapter for the loaded base, all of whose trained tensors are random.

    Args:
        load: the base.
        folder: where the adapter goes.
        edits: fields that adapter_config.json gets as they are, dict order included.
        **lora: fields of peft.LoraConfig.
    """
    wrapped = peft.get_peft_model(load(), peft.LoraConfig(init_lora_weights=False, **lora))
    _randomise(wrapped, seed=3, spread=0.2, select=lambda parameter: parameter.requires_grad)
    wrapped.save_pretrained(folder)
    config_path = folder / "adapter_config.json"
    config_path.write_text(json.dumps({**json.loads(config_path.read_text()), **(edits or {})}))
    return folder


def recast_adapter(folder: Path, dtype: torch.dtype) -> None:
    """Cast the adapter file's tensors, as `model.half()` before saving would have."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def merged_model(load: Loader, adapter: Path) -> Any:
    """Return the base with the adapter merged by PEFT, all defaults."""
    return peft.PeftModel.from_pretrained(load(), adapter).merge_and_unload()


def unmerged_model(load: Loader, adapter: Path) -> torch.nn.Module:
    """Return the base with the adapter beside it, as it was trained, in evaluation mode."""
    model = peft.PeftModel.from_pretrained(load(), adapter)
    assert isinstance(model, torch.nn.Module)
    return model.eval()


def merge_with_peft(load: Loader, adapter: Path, folder: Path) -> dict[str, RawTensor]:
    """Return what PEFT's merge is on disk; `folder` is where it is saved."""
    merged_model(load, adapter).save_pretrained(folder)
    return read_tensors(folder)


def changed_names(base: Mapping[str, RawTensor], merged: Mapping[str, RawTensor]) -> set[str]:
    """Return the tensors of `merged` that are not as in `base`."""
    return {name for name, tensor in merged.items() if base.get(name) != tensor}


def assert_same_checkpoint(ours: Mapping[str, RawTensor], expected: Mapping[str, RawTensor]) -> None:
    """Names, dtypes, shapes and bytes of all tensors are equal."""
    assert sorted(ours) == sorted(expected), sorted(ours.keys() ^ expected.keys())
    different = {
        name: f"{tensor.dtype}{list(tensor.shape)}: {_describe_difference(ours[name], tensor)}"
        for name, tensor in expected.items()
        if ours[name] != tensor
    }
    assert not different, different


def _describe_difference(ours: RawTensor, expected: RawTensor) -> str:
    if (ours.dtype, ours.shape) != (expected.dtype, expected.shape):
        return f"we have {ours.dtype}{list(ours.shape)}"
    count = sum(a != b for a, b in zip(ours.data, expected.data, strict=True))
    return f"{count} of {len(expected.data)} bytes differ"


def assert_kept_bytes(base: Mapping[str, RawTensor], ours: Mapping[str, RawTensor], names: Collection[str]) -> None:
    """The named tensors exist and are byte for byte those of the base."""
    assert names, "nothing to compare"
    touched = [name for name in names if ours[name] != base[name]]
    assert not touched, touched


def _randomise(model: Any, seed: int, spread: float, select: Callable[[torch.nn.Parameter], bool]) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if select(parameter):
                noise = torch.randn(parameter.shape, generator=generator)
                # the shift keeps sums from being symmetric around zero
                parameter.copy_(spread * noise + spread / 10)
