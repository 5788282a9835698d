"""Adapters that PEFT did not write: how they are known, and their settings as an `AdapterConfig`.

kohya: one safetensors file without a config, names of modules mostly flattened (`lora_te_encoder_layers_0_fc1`), a
scalar `alpha` beside each module's factors. MLX: `adapters.safetensors` with an `adapter_config.json` of its own.

Source: kohya-ss/sd-scripts `networks/lora.py`, `networks/merge_lora.py`; LyCORIS 4.1.3 `wrapper.py`, `modules/`;
mlx-lm 0.32.2 `tuner/utils.py` (`load_adapters`), `lora.py` (`CONFIG_DEFAULTS`).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from rawmerge.errors import AdapterError, Problem, ProblemCollector, UnsupportedAdapterError
from rawmerge.formats.adapter_config import AdapterConfig
from rawmerge.formats.kind_fields import is_finite

KOHYA: Final = "KOHYA"
MLX: Final = "MLX"
ALPHA_SUFFIX: Final = ".alpha"
_KOHYA_NAME: Final = re.compile(r".+\.(lora_(down|up)(\.[^.]+)?\.weight|hada_w[12]_[ab]|lokr_w[12](_[ab])?)")
_ALPHA_FORMATS: Final = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
_MLX_PARAMETERS: Final = frozenset({"rank", "scale", "dropout", "keys", "alpha"})
#: What mlx-community's conversions are called; what follows `4bit` stands once, at the end, else it takes for ever.
_MLX_COPY: Final = re.compile(
    r"([-_](mlx|[a-z]*[0-9]+[-_]?bits?|bf16|fp16|fp32|dwq))*[-_](mlx|[a-z]*[0-9]+[-_]?bits?|bf16|fp16|fp32|dwq"
    r"|[48]bit[\w.-]*)$",
    re.IGNORECASE,
)
#: Longer names are no repo's: the hub allows 96 characters.
_LONGEST_NAME: Final = 200


def is_kohya(names: Iterable[str]) -> bool:
    """Return whether the tensors of a file without a config are named as kohya's or LyCORIS's are."""
    names = list(names)
    return any(map(_KOHYA_NAME.fullmatch, names)) and not any(name.startswith("base_model.") for name in names)


def kohya_config(alphas: Mapping[str, float]) -> AdapterConfig:
    """Return the settings of a kohya file.

    Args:
        alphas: path of a module, as the file has it, to its alpha.

    Raises:
        AdapterError: an alpha is 0 or not finite; all of them at once.
    """
    hint = "some trainers take 0 for the rank, others for no effect; set it to what the training used"
    problems = [
        Problem(f"{path}{ALPHA_SUFFIX}", "a finite number other than 0", f"{alpha:g}", hint)
        for path, alpha in alphas.items()
        if not math.isfinite(alpha) or alpha == 0
    ]
    if problems:
        raise AdapterError(*problems)
    return AdapterConfig(rank=0, alpha=0.0, kind=KOHYA, values={"alphas": dict(alphas)})


def parse_alpha(name: str, raw: bytes, dtype: str, shape: tuple[int, ...]) -> float:
    """Return the value of a module's scalar.

    Raises:
        AdapterError: it is no scalar, or of a dtype that none has.
    """
    if shape not in {(), (1,)} or dtype not in {*_ALPHA_FORMATS, "BF16"}:
        raise AdapterError(Problem(name, "one number", f"{dtype} of shape {list(shape)}"))
    if dtype == "BF16":  # the upper half of a float32
        raw, dtype = b"\0\0" + raw, "F32"
    (value,) = struct.unpack(_ALPHA_FORMATS[dtype], raw)
    return float(value)


def is_mlx(fields: Mapping[str, Any]) -> bool:
    """Return whether a config is one that mlx-lm writes."""
    return "peft_type" not in fields and bool({"lora_parameters", "fine_tune_type"} & fields.keys())


def mlx_config(fields: Mapping[str, Any], path: str) -> AdapterConfig:
    """Return the settings of an MLX adapter.

    Args:
        fields: its `adapter_config.json`.
        path: where that lies, for messages.

    Raises:
        UnsupportedAdapterError: a kind of training, or a parameter, that is not followed; AdapterError: a value that
            cannot be used. All of them at once.
    """
    kind = fields.get("fine_tune_type") or ("dora" if fields.get("use_dora") is True else "lora")
    if kind not in ("lora", "dora"):  # no set: a stranger's value may have no hash
        hint = "a full fine-tuning holds whole tensors in MLX's own layout, not an adapter" if kind == "full" else ""
        raise UnsupportedAdapterError(Problem("fine_tune_type", "lora or dora", ascii(kind)[:80], hint))
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterError(Problem(path, "lora_parameters with rank and scale", "none"))
    problems = ProblemCollector()
    problems.add(UnsupportedAdapterError, _unknown_parameters(parameters))
    problems.add(AdapterError, _bad_parameters(parameters))
    problems.add(UnsupportedAdapterError, _unclear_alpha(fields, parameters))
    problems.raise_if_any()
    rank, scale = parameters["rank"], float(parameters["scale"])
    return AdapterConfig(
        rank=rank,
        alpha=scale * rank,
        base_model_name=_mlx_base_name(fields.get("model")),
        kind=MLX,
        values={"scale": scale, "is_dora": kind == "dora"},
    )


def _unknown_parameters(parameters: Mapping[str, Any]) -> Iterator[Problem]:
    for name, value in parameters.items():
        if value and name not in _MLX_PARAMETERS:
            hint = "a newer mlx-lm may mean something by it that would be lost; remove it if you know it does not"
            yield Problem(f"lora_parameters.{name}", "a parameter that rawmerge knows", ascii(value)[:80], hint)


def _bad_parameters(parameters: Mapping[str, Any]) -> Iterator[Problem]:
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if type(rank) is not int or not 0 < rank < 2**31:
        yield Problem("lora_parameters.rank", "a positive whole number", ascii(rank)[:80])
    if not is_finite(scale):
        yield Problem("lora_parameters.scale", "a finite number", ascii(scale)[:80])


def _unclear_alpha(fields: Mapping[str, Any], parameters: Mapping[str, Any]) -> Iterator[Problem]:
    """Refuse an alpha that may be a factor: in early 2024 mlx-lm multiplied by alpha / rank, since then it does not.

    Files that have `num_layers` (before: `lora_layers`) are of after that.
    """
    alpha = parameters.get("alpha")
    if alpha is None or "num_layers" in fields or alpha == parameters.get("rank"):
        return
    hint = "old versions of mlx-lm multiplied by scale * alpha / rank, later ones by scale: set scale to the product "
    yield Problem("lora_parameters.alpha", "it to be unset", ascii(alpha)[:80], f"{hint}in force, and remove alpha")


def _mlx_base_name(model: object) -> str:
    """Return the last part of the base's name without MLX's marks: its conversions are repos of their own."""
    name = model.replace("\\", "/").rstrip("/").rpartition("/")[2] if isinstance(model, str) else ""
    return name if len(name) > _LONGEST_NAME else "" if name == "mlx_model" else _MLX_COPY.sub("", name)
