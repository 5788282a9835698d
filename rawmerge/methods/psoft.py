"""PSOFT: W + s * B @ (R - I) @ A, where B and A are W's highest singular vectors and R turns and scales among them.

Source: PEFT 0.21.2 `tuners/psoft/layer.py`: `PsoftLayer._compute_svd_factors` and `_build_psoft_ab_cache_buffers`,
`OrthLayer.get_matrix`, `Linear.get_delta_weight`. The seeded decomposition is `torch._lowrank._svd_lowrank`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from rawmerge.formats.kind_fields import Field, KindFields, finite_number, is_finite, one_of, switch, whole_number
from rawmerge.methods.delta import decomposition_bytes, upcast
from rawmerge.methods.interface import (
    WHOLE,
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    TargetModule,
    TileContext,
    UnmergeableError,
    number,
)
from rawmerge.methods.lora import PreparedLora
from rawmerge.methods.randomness import generator_of, matrix_of_linear, seed_field

if TYPE_CHECKING:
    import torch


class PsoftMethod:
    """The delta of one module, as a LoRA pair."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; the base is decomposed whole."""
        import torch

        own, rank, scaling = upcast(tensors, context), int(number(settings, "rank")), number(settings, "scaling")
        # vectors' signs are free, and R was trained with those of float32: another precision may give others
        parts = _decomposed(context.whole().to(torch.float32), rank, settings)
        left, values, right = (part.to(context.compute_dtype) for part in parts)
        values = values / scaling
        if settings["is_pissa"]:
            roots = torch.diag(torch.sqrt(values))
            factor_a, factor_b = roots @ right, left @ roots
        else:
            factor_a, factor_b = right, left @ torch.diag(values)
        turned = _turn(own, rank, settings) - torch.eye(rank, dtype=context.compute_dtype)
        return PreparedLora(factor_a.contiguous(), factor_b @ turned, scaling, False, context.rounding_dtype)


def _decomposed(
    weight: torch.Tensor, rank: int, settings: Mapping[str, Setting]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the highest left vectors (out, rank), values (rank) and right vectors (rank, in) of a weight."""
    import torch

    if "seed" not in settings:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    is_wide = weight.shape[0] < weight.shape[1]
    tall = weight.mH if is_wide else weight
    generator = generator_of(int(number(settings, "seed")))
    # torch.svd_lowrank draws this from the generator of the whole process, which other threads must not see seeded
    basis = torch.linalg.qr(tall @ torch.randn(tall.shape[1], rank, dtype=tall.dtype, generator=generator)).Q
    for _ in range(int(number(settings, "iterations"))):
        basis = torch.linalg.qr(tall.mH @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    inner, values, right = torch.linalg.svd(basis.mH @ tall, full_matrices=False)
    left = basis.matmul(inner)
    return (right.mH, values, left.mH) if is_wide else (left, values, right)


def _turn(own: Mapping[str, torch.Tensor], rank: int, settings: Mapping[str, Setting]) -> torch.Tensor:
    """Return R (rank, rank): of an orthogonal one by Cayley's transform or a series, its rows and columns scaled."""
    import torch

    turn = own["weight"]
    if settings["is_orthogonal"]:
        upper = torch.zeros(rank, rank, dtype=turn.dtype)
        upper[tuple(torch.triu_indices(rank, rank, 1))] = turn
        skew = upper - upper.transpose(0, 1)
        identity = torch.eye(rank, dtype=turn.dtype)
        if "terms" in settings:
            turn = _series(skew, identity, settings)
        else:
            turn = torch.linalg.solve(identity - skew, identity + skew, left=False)
    turn = own["vector_b"][:, None] * turn if "vector_b" in own else turn
    return turn * own["vector_a"][None, :] if "vector_a" in own else turn


def _series(skew: torch.Tensor, identity: torch.Tensor, settings: Mapping[str, Setting]) -> torch.Tensor:
    """Return the first terms of Neumann's series for Cayley's transform; the last of them counts once, not twice."""
    import torch

    terms, most = int(number(settings, "terms")), number(settings, "most")
    norm = torch.linalg.norm(skew, ord="fro")
    if most and torch.isfinite(norm) and norm > most:
        skew = skew * (most / (norm + 1e-12))
    total = identity.clone()
    if terms > 1:
        total.add_(skew, alpha=2.0)
    if terms > 2:
        power = skew @ skew
        total.add_(power, alpha=2.0)
        for _ in range(3, terms - 1):
            power = power @ skew
            total.add_(power, alpha=2.0)
        total.add_(power @ skew)
    return total


class PsoftKind(AdapterKind):
    """PSOFT, orthogonal fine-tuning in the principal subspace."""

    peft_type: ClassVar[str] = "PSOFT"
    title: ClassVar[str] = "PSOFT"
    formula: ClassVar[str] = "W + s·B@(R - I)@A, the base's highest singular vectors"
    modules: ClassVar[str] = "Linear"
    bits: ClassVar[str] = "equal; `lowrank` in float32 ≤ 2⁻¹⁸: products depend on where PEFT's W lies in memory"
    parts: ClassVar[Mapping[str, str]] = {
        "psoft_R.weight": "weight",
        "psoft_R.vector_a": "vector_a",
        "psoft_R.vector_b": "vector_b",
    }
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "r": whole_number(32, 1),
            "psoft_alpha": finite_number(32),
            "ab_svd_init": one_of("psoft_init", "pissa_init"),
            "psoft_svd": one_of("full", "lowrank"),
            "psoft_svd_lowrank_niter": whole_number(10, 0, 1000),
            "random_seed": seed_field(0),
            "psoft_orth": switch(True),
            "psoft_mag_a": switch(True),
            "psoft_mag_b": switch(True),
            "use_cayley_neumann": switch(False),
            "num_cayley_neumann_terms": whole_number(5, 1, 1000),
            "cayley_neumann_eps": Field(lambda value: is_finite(value) and 0 < value < 1, "a number between 0 and 1"),
        },
        ignored=("psoft_dropout", "init_weights"),
    )
    methods: ClassVar[Mapping[str, Method]] = {"psoft": PsoftMethod()}

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update; the adapter's tensors tell nothing of the base's shape."""
        module.refuse_transposed()
        rows, columns = matrix_of_linear(module)
        values, rank = module.values, module.values["r"]
        most, alpha = min(rows, columns), values["psoft_alpha"]
        if rank > most:
            raise UnmergeableError(f"r of at most {most}, for it selects singular values", f"{rank}")
        if alpha <= 0:
            raise UnmergeableError("a psoft_alpha above 0, for the factors are divided by it", f"{alpha}")
        if module.base_dtype == "F64":
            raise UnmergeableError("a base of float32 or less, for PEFT trains PSOFT on nothing else", "float64")
        working = decomposition_bytes(rows, columns) + 4 * (rank * (rows + columns) + 8 * rank * rank)
        yield PlannedUpdate("psoft", _roles(module), _settings(module), reach=WHOLE, working_bytes=working)


def _roles(module: TargetModule) -> tuple[str, ...]:
    """Check the tensors; return their roles."""
    values, rank = module.values, module.values["r"]
    roles = ["weight"]
    module.need("weight")
    # of rank 1 there is nothing to turn: a tensor of no elements
    shape = (rank * (rank - 1) // 2,) if values["psoft_orth"] else (rank, rank)
    if module.shapes["weight"] != shape:
        module.refuse("weight", f"shape {list(shape)}", f"shape {list(module.shapes['weight'])}")
    for side in ("a", "b"):
        if values[f"psoft_mag_{side}"]:
            module.expect(f"vector_{side}", rank)
            roles.append(f"vector_{side}")
    return tuple(roles)


def _settings(module: TargetModule) -> dict[str, Setting]:
    values = module.values
    settings: dict[str, Setting] = {
        "rank": values["r"],
        "scaling": values["psoft_alpha"] / values["r"],
        "is_pissa": values["ab_svd_init"] == "pissa_init",
        "is_orthogonal": values["psoft_orth"],
    }
    if values["psoft_svd"] == "lowrank":
        settings |= {"seed": values["random_seed"], "iterations": values["psoft_svd_lowrank_niter"]}
    if values["use_cayley_neumann"]:
        most = values["cayley_neumann_eps"]
        settings |= {"terms": values["num_cayley_neumann_terms"], "most": 0.0 if most is None else most}
    return settings
