"""MLX's LoRA and DoRA: W + (s * lora_b.T) @ lora_a.T, the delta rounded to the base's dtype first.

MLX's adapter of an embedding is lora_a (rows, rank) and lora_b (rank, dim), so its delta is the transposed one of a
linear layer's. DoRA scales the rows of the sum to trained norms.

Source: mlx-lm 0.32.2 `tuner/lora.py` (`LoRALinear.fuse`, `LoRAEmbedding.fuse`), `tuner/dora.py`. Its DoRA takes norms
of rounded rows when it fuses, but not when it trains; here they are those of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.formats.foreign_adapters import MLX
from rawmerge.methods.interface import (
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    Shape,
    TargetModule,
    TileContext,
    UnmergeableError,
    number,
)
from rawmerge.methods.lora import PreparedLora
from rawmerge.methods.row_magnitude import PreparedMagnitude

if TYPE_CHECKING:
    import torch

_ROLES: Final = ("lora_a", "lora_b", "m")
_EMBEDDING_ROLES: Final = {"lora_a": "lora_embedding_a", "lora_b": "lora_embedding_b", "m": "lora_embedding_m"}
_ROLE_OF: Final = {on_embedding: role for role, on_embedding in _EMBEDDING_ROLES.items()}


class MlxMethod:
    """The delta of one module, and its rows' norms where they are trained."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; factors (in, rank) and (rank, out), or (rows, rank) and (rank, dim)."""
        own = {_ROLE_OF.get(role, role): tensor.to(context.compute_dtype) for role, tensor in tensors.items()}
        lora = PreparedLora(
            lora_a=own["lora_a"].T.contiguous(),
            lora_b=own["lora_b"].T.mul(number(settings, "scaling")),
            scaling=1.0,
            is_transposed=bool(settings["is_transposed"]),
            rounding_dtype=None if "m" in own else context.rounding_dtype,
        )
        return PreparedMagnitude(lora, own["m"], 0.0) if "m" in own else lora


class MlxKind(AdapterKind):
    """MLX's adapters, which mlx-lm trains."""

    peft_type: ClassVar[str] = MLX
    title: ClassVar[str] = "MLX LoRA and DoRA"
    formula: ClassVar[str] = "W + s·lora_bᵀ@lora_aᵀ; DoRA: rows of the sum scaled to norms m"
    modules: ClassVar[str] = "Linear, Embedding"
    bits: ClassVar[str] = "those of torch's product; MLX's own differs in the last bits"
    parts: ClassVar[Mapping[str, str]] = {"lora_a": "lora_a", "lora_b": "lora_b", "m": "m"}
    methods: ClassVar[Mapping[str, Method]] = {"mlx": MlxMethod()}
    is_foreign: ClassVar[bool] = True
    embedding_roles: ClassVar[Mapping[str, str]] = _EMBEDDING_ROLES

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in); of an embedding (dim, rows)."""
        own = {_ROLE_OF.get(role, role): shape for role, shape in shapes.items()}
        left, right = own.get("lora_a", ()), own.get("lora_b", ())
        return (right[1], left[0]) if len(left) == len(right) == 2 else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        lora_a, lora_b, magnitude = _EMBEDDING_ROLES.values() if module.is_embedding else _ROLES
        module.need(lora_a, lora_b)
        if any(len(module.shapes[role]) == 3 for role in (lora_a, lora_b)):
            hint = "factors of several experts at once lie in MLX's own layout"
            raise UnmergeableError("factors of one matrix", "three dimensions", hint)
        is_transposed = module.is_embedding or module.needs_transpose
        rows, columns = module.base_shape if len(module.base_shape) == 2 else (0, 0)
        out, inside = (columns, rows) if is_transposed else (rows, columns)
        module.expect(lora_a, inside, module.rank)
        module.expect(lora_b, module.rank, out)
        roles: tuple[str, ...] = (lora_a, lora_b)
        if module.values["is_dora"]:
            if is_transposed and not module.is_embedding:
                raise UnmergeableError("DoRA on a weight stored (out, in)", f"one stored (in, out), {[rows, columns]}")
            module.expect(magnitude, rows)
            roles = (lora_a, lora_b, magnitude)
        scale = float(module.values["scale"])
        settings: dict[str, Setting] = {"rank": module.rank, "scaling": scale, "is_transposed": is_transposed}
        yield PlannedUpdate("mlx", roles, settings, working_bytes=8 * module.rank * (rows + columns))
