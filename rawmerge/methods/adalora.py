"""AdaLoRA: W + (B @ (A * E)) * alpha / (init_r + 1e-5), of the ranks that training kept.

Source: PEFT 0.21.2 `tuners/adalora/layer.py` `SVDLinear.get_delta_weight`, `SVDConv2d.get_delta_weight`;
`tuners/adalora/model.py` `resize_modules_by_rank_pattern`: modules that it resizes lose their dtype, so that PEFT
loads their factors rounded to the base's. The rank in the formula is that before pruning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.formats.kind_fields import Field, KindFields, finite_number, whole_number
from rawmerge.methods.delta import row_delta
from rawmerge.methods.interface import (
    AdapterKind,
    Method,
    MissingTensorError,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    Shape,
    TargetModule,
    TileContext,
    number,
)

if TYPE_CHECKING:
    import torch

_ROLES: Final = ("A", "B", "E")
_GATHERED: Final = "an empty or flat tensor comes from a ZeRO-3 or FSDP save that was not gathered; save it again"


class AdaloraMethod:
    """The delta of one module."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; the divisor is a number of the base's dtype, as PEFT makes it."""
        import torch

        is_rounded = settings["is_resized"] and context.rounding_dtype is not None
        loaded = {role: tensor.to(context.rounding_dtype) if is_rounded else tensor for role, tensor in tensors.items()}
        own = {role: tensor.to(context.compute_dtype) for role, tensor in loaded.items()}
        right, left = own["A"] * own["E"], own["B"]
        first_rank = torch.tensor(
            [number(settings, "first_rank")], dtype=context.rounding_dtype or context.compute_dtype
        )
        divisor, scaling = first_rank.to(context.compute_dtype) + 1e-5, number(settings, "scaling")
        product = partial(_rows, left, right, bool(settings["is_transposed"]), scaling, divisor)
        return row_delta(product, (context.shape[0], prod(context.shape[1:])))


def _rows(
    left: torch.Tensor, right: torch.Tensor, is_transposed: bool, scaling: float, divisor: torch.Tensor, *part: int
) -> torch.Tensor:
    """Return the delta's rows `part`, (start, stop)."""
    rows = slice(*part)
    delta = (left @ right[:, rows]).T if is_transposed else left[rows] @ right
    return delta.mul_(scaling).div_(divisor)


class AdaloraKind(AdapterKind):
    """ADALORA, LoRA in the form of a singular value decomposition whose rank training prunes."""

    peft_type: ClassVar[str] = "ADALORA"
    title: ClassVar[str] = "AdaLoRA"
    formula: ClassVar[str] = "W + B@(A·E)·alpha/(init_r + 1e-5)"
    modules: ClassVar[str] = "Linear, Conv1D, Conv2d"
    parts: ClassVar[Mapping[str, str]] = {f"lora_{role}": role for role in _ROLES}
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "init_r": whole_number(12, 1, 2**20),
            "lora_alpha": finite_number(8),
            "rank_pattern": Field(lambda value: _is_masks(value), "a table from lora_E to lists of true and false", {}),
        },
        # PEFT's AdaLoRA shares LoRA's config, and looks at none of these
        ignored=(
            "r",
            "target_r",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
            "orth_reg_weight",
            "total_step",
            "alpha_pattern",
            "lora_dropout",
            "init_lora_weights",
            "use_rslora",
            "megatron_core",
            "qalora_group_size",
        ),
    )
    methods: ClassVar[Mapping[str, Method]] = {"adalora": AdaloraMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in); of convolutions (out, in * kernel)."""
        left, right = shapes.get("B", ()), shapes.get("A", ())
        return (left[0], right[1]) if len(left) == len(right) == 2 else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update, of no effect where training pruned all ranks."""
        rows, columns = module.matrix_shape
        mask = _mask_of(module)
        first_rank = module.values["init_r"]
        rank = first_rank if mask is None else sum(mask)
        for role, shape in (("A", (rank, columns)), ("B", (rows, rank)), ("E", (rank, 1))):
            if role not in module.shapes:
                raise MissingTensorError(role)
            if module.shapes[role] != shape:  # `expect` would refuse a rank of 0
                hint = _GATHERED if 0 in module.shapes[role] else "init_r or rank_pattern of another adapter, or base?"
                module.refuse(role, f"shape {list(shape)}", f"shape {list(module.shapes[role])}", hint)
        alpha = module.values["lora_alpha"]
        settings: dict[str, Setting] = {
            "scaling": alpha if alpha > 0 else float(rank),
            "first_rank": first_rank,
            "is_resized": mask is not None,
            "is_transposed": module.needs_transpose,
        }
        yield PlannedUpdate("adalora", _ROLES, settings, working_bytes=8 * rank * (rows + 2 * columns))


def _mask_of(module: TargetModule) -> list[bool] | None:
    """Return which of the first ranks are kept; None where the config does not say, so that all are.

    Raises:
        ShapeMismatchError: there are not as many as the config says.
    """
    table, name = module.values["rank_pattern"], f"{module.path}.lora_E"
    found = [mask for key, mask in table.items() if key == name or key.rpartition(".")[0] == name]
    if not found:
        return None
    mask: list[bool] = found[0]
    if len(mask) != module.values["init_r"] or len(found) > 1:
        module.refuse("E", f"one rank_pattern of init_r = {module.values['init_r']} masks", f"{len(mask)}")
    return mask


def _is_masks(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(mask, list) and all(isinstance(kept, bool) for kept in mask) for mask in value.values()
    )
