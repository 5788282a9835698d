"""TinyLoRA: W + B @ R @ A, where R is a sum of fixed random matrices, weighted by one short vector for many modules.

Source: PEFT 0.21.2 `tuners/tinylora/layer.py`: `TinyLoraLayer._init_projection`, `_compute_R` and `get_delta_weight`;
`tuners/tinylora/model.py`: `_build_target_key_mapping` and `_create_and_replace`, for which vector a module has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from rawmerge.formats.kind_fields import Field, KindFields, is_finite, switch, whole_number
from rawmerge.methods.delta import upcast
from rawmerge.methods.interface import (
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    Shape,
    TargetModule,
    TileContext,
    number,
)
from rawmerge.methods.lora import PreparedLora
from rawmerge.methods.randomness import generator_of, matrix_of_linear
from rawmerge.methods.registration import registered_places

if TYPE_CHECKING:
    import torch


class TinyloraMethod:
    """The delta of one module, as a LoRA pair."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; the random matrices are drawn where they are not among the tensors."""
        import torch

        own = upcast(tensors, context)
        vector = next(tensor for role, tensor in own.items() if role.startswith("v."))
        if "matrices" in own:
            matrices = own["matrices"]
        else:
            drawn = _drawn(len(vector), own["a"].shape[0], int(number(settings, "seed")))
            # as training saw them: PEFT moves them to where the base is, dtype included
            matrices = drawn.to(context.base_dtype).to(context.compute_dtype)
        inner = torch.einsum("i,ijk->jk", vector, matrices)
        return PreparedLora(own["a"], own["b"] @ inner, 1.0, bool(settings["is_transposed"]), None)


def _drawn(count: int, rank: int, seed: int) -> torch.Tensor:
    """Return the random matrices of one module: (count, rank, rank), float32."""
    import torch

    return torch.normal(mean=0.0, std=1.0 / (rank**0.5), size=(count, rank, rank), generator=generator_of(seed))


class TinyloraKind(AdapterKind):
    """TINYLORA, a few trained numbers for a whole model."""

    peft_type: ClassVar[str] = "TINYLORA"
    title: ClassVar[str] = "TinyLoRA"
    formula: ClassVar[str] = "W + B@(Σ vₖ·Pₖ)@A"
    modules: ClassVar[str] = "Linear, Conv1D, Embedding"
    parts: ClassVar[Mapping[str, str]] = {"tinylora_A": "a", "tinylora_B": "b", "tinylora_P": "matrices"}
    shared: ClassVar[Mapping[str, str]] = {"tinylora_v.*": "v.*"}
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "r": whole_number(2, 1),
            "u": whole_number(64, 1),
            "weight_tying": Field(lambda value: is_finite(value) and 0 <= value <= 1, "a number from 0 to 1", 0.0),
            "projection_seed": whole_number(42, 0, 2**63),
            "save_projection": switch(True),
        },
        ignored=("init_v_bound", "tinylora_dropout", "init_weights"),
    )
    methods: ClassVar[Mapping[str, Method]] = {"tinylora": TinyloraMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in); of an embedding as it is stored, (vocabulary, dimension)."""
        left, right = shapes.get("b", ()), shapes.get("a", ())
        return (left[0], right[1]) if len(left) == len(right) == 2 else None

    def needs_all_targets(self, values: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Whether a module that is missing changes what the others get: vectors are dealt out by their count."""
        return True

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update; PEFT lowers r to what the weight has."""
        values, (rows, columns) = module.values, matrix_of_linear(module)
        rank, count = min(values["r"], rows, columns), values["u"]
        module.expect("a", rank, columns)
        module.expect("b", rows, rank)
        settings: dict[str, Setting] = {"is_transposed": module.needs_transpose}
        # embeddings have theirs whatever the config says, but only if the file was saved so
        has_matrices = values["save_projection"] or "matrices" in module.shapes
        if has_matrices:
            module.expect("matrices", count, rank, rank)
        else:
            settings["seed"] = values["projection_seed"] + registered_places(module)[module.path]
        group = _group_of(module)
        vector = f"v.{group}"
        if vector not in module.shared:
            module.refuse("a", f"the vector base_model.tinylora_v.{group}, which belongs to this module", "none")
        module.expect(vector, count)
        roles = ("a", "b", vector, *(["matrices"] if has_matrices else []))
        working = 8 * (rank * (2 * rows + columns) + (count + 1) * rank * rank)
        yield PlannedUpdate("tinylora", roles, settings, working_bytes=working)


def _group_of(module: TargetModule) -> int:
    """Return which of the vectors is the module's: neighbours in the model share one."""
    count = len(module.peers)
    groups = max(1, round(count * (1.0 - float(module.values["weight_tying"]))))
    if groups == 1:
        return 0
    return min(registered_places(module)[module.path] // max(1, count // groups), groups - 1)
