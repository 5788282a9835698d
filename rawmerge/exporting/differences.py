"""What LLaMA-Factory would have written otherwise, in a sentence each.

Source: LLaMA-Factory `train/tuner.py` (`export_model`): the model is loaded in its config's dtype, merged, cast as a
whole, and saved by transformers, which knows no tensors but those of its own class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rawmerge.dtypes import DTYPES, OUTPUT_DTYPES
from rawmerge.errors import quote
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.model_config import ModelConfig, parse_model_config
from rawmerge.inputs.tensor_source import read_small_file
from rawmerge.merge_plan import KeepTensor, MergePlan, ReplaceTensor, Step, UpdateTensor

_LAYER: Final = re.compile(r"(?:language_model\.)?model\.(?:language_model\.)?layers\.(\d{1,9})\.")
_FLOAT32: Final = (
    "float32 is kept; where there is a GPU, LLaMA-Factory writes bfloat16 or float16 (infer_dtype: bfloat16)"
)
_PREDICTOR: Final = re.compile(r"(^|\.)(mtp|mtp_block|nextn)(\.|$)")


def llamafactory_differences(plan: MergePlan) -> Iterator[str]:
    """Yield a sentence for each way in which LLaMA-Factory's tensors would be others.

    Args:
        plan: of a merge whose base is a directory.

    Raises:
        RefusedError: the base's config cannot be read any more.
    """
    path = Path(plan.base_root) / CONFIG_NAME
    config = parse_model_config(read_small_file(path), str(path)) if path.is_file() else ModelConfig("", {})
    if plan.options.like:
        yield from _float32_difference(plan, config.stated_dtype)
        return
    yield from _dtype_differences(plan, config.stated_dtype)
    layers = next((count for _, at in config.text_sides() if type(count := at.get("num_hidden_layers")) is int), None)
    names = [step.entry.name for step in plan.steps() if _is_unknown(step.entry.name, layers)]
    if names:
        yield f"kept: {len(names)} of the tensors that transformers does not load, such as {quote(names[0])}; " + (
            "LLaMA-Factory drops them"
        )


def _dtype_differences(plan: MergePlan, stated: str) -> Iterator[str]:
    asked = plan.options.dtype
    if asked:
        rounded = {step.base_dtype for step in plan.steps() if isinstance(step, UpdateTensor) and step.updates}
        if rounded & {"BF16", "F16"} - {OUTPUT_DTYPES[asked]}:
            yield f"each merged value is rounded once, to {asked}; LLaMA-Factory rounds it to the base's dtype first"
    elif stated == "float32":
        yield _FLOAT32
    elif stated in OUTPUT_DTYPES:
        others = sum(_is_other_float(_base_dtype(step), OUTPUT_DTYPES[stated]) for step in plan.steps())
        if others:
            yield (
                f"not cast: {others} of the tensors, in a float dtype of their own; LLaMA-Factory casts all to {stated}"
                f", as `infer_dtype={stated}` does here"
            )


def _float32_difference(plan: MergePlan, stated: str) -> Iterator[str]:
    """Yield that a float32 base stays one: the dtype that is asked for is not told from the config's."""
    if plan.options.dtype == stated == "float32":
        yield _FLOAT32


def _base_dtype(step: Step) -> str:
    if isinstance(step, UpdateTensor):
        return step.base_dtype
    if isinstance(step, ReplaceTensor):
        return step.base.dtype if step.base else step.entry.dtype
    assert isinstance(step, KeepTensor)
    return step.source.dtype


def _is_other_float(dtype: str, usual: str) -> bool:
    return DTYPES[dtype].is_mergeable and dtype != usual


def _is_unknown(name: str, layer_count: int | None) -> bool:
    """Whether a tensor belongs to a layer behind the model's last, or to a multi-token predictor."""
    layer = _LAYER.match(name)
    is_behind = layer is not None and layer_count is not None and int(layer[1]) >= layer_count
    return is_behind or _PREDICTOR.search(name) is not None
