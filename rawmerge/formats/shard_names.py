"""What the files of a checkpoint are called, and what those of one format are called in the other.

Source: transformers 5.24 `utils/__init__.py` (`WEIGHTS_NAME`, `SAFE_WEIGHTS_NAME`) and huggingface_hub 2.4
`serialization/_base.py` (numbers).
"""

from __future__ import annotations

import re
from typing import Final

from rawmerge.formats.weight_map import PICKLE_SUFFIX, SHARD_SUFFIX

SINGLE_NAME: Final = "model.safetensors"
PICKLE_NAME: Final = "pytorch_model.bin"
#: One shard of several, of either format.
NUMBERED_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(safetensors|bin)")
#: A whole model as a pickle, or a shard of it; other pickles beside a model are a trainer's.
PICKLED_SHARD: Final = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin")


def shard_names(count: int) -> tuple[str, ...]:
    """Return the file names of a checkpoint of `count` shards.

    Example:
        >>> shard_names(1), shard_names(2)[1]
        (('model.safetensors',), 'model-00002-of-00002.safetensors')
    """
    if count == 1:
        return (SINGLE_NAME,)
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def output_name(name: str) -> str:
    """Return the file name of what a file of the base becomes.

    Example:
        >>> output_name("pytorch_model-00001-of-00002.bin"), output_name("model.safetensors")
        ('model-00001-of-00002.safetensors', 'model.safetensors')
    """
    if not name.endswith(PICKLE_SUFFIX):
        return name
    stem = name.removesuffix(PICKLE_SUFFIX)
    return (stem.removeprefix("pytorch_") if PICKLED_SHARD.fullmatch(name) else stem) + SHARD_SUFFIX


def pickle_name(name: str) -> str:
    """Return the file name of a shard of the output where it is written as `torch.save` writes.

    Example:
        >>> pickle_name("model-00001-of-00002.safetensors"), pickle_name("weights.safetensors")
        ('pytorch_model-00001-of-00002.bin', 'weights.bin')
    """
    legacy = f"pytorch_{name.removesuffix(SHARD_SUFFIX)}{PICKLE_SUFFIX}"
    return legacy if PICKLED_SHARD.fullmatch(legacy) else name.removesuffix(SHARD_SUFFIX) + PICKLE_SUFFIX


def is_pickle(name: str) -> bool:
    """Whether a file of this name is one of `torch.save`, which is what loaders take it for."""
    return name.endswith(PICKLE_SUFFIX)
