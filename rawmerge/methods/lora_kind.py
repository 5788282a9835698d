"""LoRA with its variants: which of them a config asks for, and what that does to a module.

Source: PEFT 0.21.2 `tuners/lora/layer.py` (`LoraLayer.update_layer`, `resolve_lora_variant`, and the `lora_variants` of
each layer), `tuners/lora/variants.py`. PEFT compares the names of initialisations letter by letter, but for OLoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final

from rawmerge.formats.adapter_fields import LORA, LORA_VARIANT_FIELDS, lora_variants
from rawmerge.formats.kind_fields import KindFields
from rawmerge.methods import (
    bdlora,
    combined_lora,
    dora,
    expert_lora,
    kasa,
    lora,
    lora_bias,
    multihead,
    pissa,
    token_rows,
)
from rawmerge.methods.interface import (
    AdapterKind,
    KindRow,
    Method,
    ModuleFacts,
    PlannedUpdate,
    Setting,
    Shape,
    TargetModule,
    UnmergeableError,
)

_BIAS_ROLE: Final = "lora_b_bias"
_MICA: Final = "mica"
_SAMPLER: Final = "MonteCLoRA samples in training only"
#: By the config field that asks for a variant, or the value of `init_lora_weights`.
_VARIANTS: Final = {
    "use_dora": KindRow(
        "DoRA", "`use_dora`", "Linear, Conv1D, Conv1d/2d/3d, Embedding", "m/‖V‖ * V, V = W + s·B@A", "equal"
    ),
    "pissa": KindRow(
        "PiSSA", '`init_lora_weights` `"pissa"`', "Linear, Conv1D", "W - s·B0@A0 + s·B@A, from the base's SVD", "equal"
    ),
    "olora": KindRow(
        "OLoRA", '`init_lora_weights` `"olora"`', "Linear", "W - s·B0@A0 + s·B@A, from the base's QR", "equal"
    ),
    "kasa_config": KindRow(
        "KaSA",
        "`kasa_config`",
        "Linear",
        "Wt + s·(B*diag)@A, Wt the base without its r lowest singular values",
        "equal",
    ),
    "mica": KindRow(
        "MiCA", '`init_lora_weights` `"mica"`', "Linear, Conv1D", "W + s·B@A, the delta rounded first", "equal"
    ),
    "use_bdlora": KindRow("BD-LoRA", "`use_bdlora`", "Linear", "W + s·B@A, one factor block-diagonal", "equal"),
    "use_rslora": KindRow("rsLoRA scaling", "`use_rslora`", "as LoRA", "s = alpha / √r", "equal"),
}
_PLAIN_VARIANTS: Final = (
    KindRow("VeLoRA, MonteCLoRA", "`velora_config`, `monteclora_config`", "Linear", "as LoRA", "equal"),
    KindRow("EVA, LoRA-FA, LoRA+", "none that matters", "as LoRA", "as LoRA", "equal"),
    KindRow(
        "LoRA on MultiheadAttention",
        "none",
        "in_proj, out_proj",
        "in_proj once, out_proj's delta twice, as PEFT trains it",
        "equal",
    ),
)


class LoraKind(AdapterKind):
    """LORA: pairs on linear, transposed, embedding, convolution and attention weights, and on bare parameters."""

    peft_type: ClassVar[str] = LORA
    title: ClassVar[str] = "LoRA"
    formula: ClassVar[str] = "W + s·B@A"
    modules: ClassVar[str] = "Linear, Conv1D, Conv1d/2d/3d, Embedding, MultiheadAttention, experts"
    parts: ClassVar[Mapping[str, str]] = {
        "lora_magnitude_vector.weight": dora.MAGNITUDE,  # as old versions of PEFT save it
        "lora_magnitude_vector": dora.MAGNITUDE,
        "lora_diag": kasa.DIAGONAL,
        "lora_velora_embed": "projection",
        "lora_monteclora_sampler.expert_weights": "expert_weights",
        "lora_monteclora_sampler.expert_weights_prior": "expert_weights_prior",
        "lora_monteclora_sampler.gaussian_var_prior": "gaussian_var_prior",
        "lora_monteclora_sampler.std_prior": "std_prior",
    }
    ignored: ClassVar[Mapping[str, str]] = {
        "projection": "VeLoRA uses it in the backward pass only",
        "expert_weights": _SAMPLER,
        "expert_weights_prior": _SAMPLER,
        "gaussian_var_prior": _SAMPLER,
        "std_prior": _SAMPLER,
    }
    in_parts: ClassVar[tuple[str, ...]] = (lora.KIND, dora.KIND)
    fields: ClassVar[KindFields] = LORA_VARIANT_FIELDS
    methods: ClassVar[Mapping[str, Method]] = {
        lora.KIND: lora.LoraMethod(),
        lora_bias.KIND: lora_bias.LoraBiasMethod(),
        expert_lora.KIND: expert_lora.ExpertLoraMethod(),
        token_rows.KIND: token_rows.TokenRowsMethod(),
        dora.KIND: dora.DoraMethod(),
        dora.COLUMN_KIND: dora.DoraColumnsMethod(),
        pissa.PISSA: pissa.PissaMethod(),
        pissa.OLORA: pissa.OloraMethod(),
        kasa.KIND: kasa.KasaMethod(),
        kasa.TRUNCATION: kasa.KasaTruncationMethod(),
        bdlora.KIND: bdlora.BdLoraMethod(),
        multihead.KIND: multihead.TwiceMethod(),
        combined_lora.KIND: combined_lora.CombinedLoraMethod(),
    }

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:
        """Return (out, in, *kernel) of B @ A."""
        shape_a, shape_b = (shapes[role] for roles in lora.PAIRS for role in roles if role in shapes)
        if not (shape_a and shape_b):
            return ()
        if values.get("use_bdlora") is not None and len(shape_a) == len(shape_b) == 2 and "lora_a" in shapes:
            return bdlora.delta_shape(shape_a, shape_b, values)
        return (shape_b[0], *shape_a[1:])

    def variants(self, values: Mapping[str, Any]) -> Iterable[str]:
        """Return the variants that a config asks for, rsLoRA's scaling among them."""
        asked = {str(values.get("init_lora_weights")).lower()}
        asked |= {name for name in ("use_dora", "kasa_config", "use_bdlora", "use_rslora") if values.get(name)}
        return [row.title for key, row in _VARIANTS.items() if key in asked]

    def rows(self) -> Iterable[KindRow]:
        """Return LoRA's row, and one for each variant."""
        return [*super().rows(), *_VARIANTS.values(), *_PLAIN_VARIANTS]

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield what the initialisation did to the base, the pair's update, and its bias's."""
        roles = tuple(role for roles in lora.PAIRS for role in roles if role in module.shapes)
        settings = _pair_settings(module, roles)
        if module.is_attention or module.is_inner:
            yield from _attention(module, roles, settings)
        else:
            if init := _residual_init(module.values):
                yield from pissa.plan_residual(module, init)
            yield from _variant(module, roles, settings)
        if _BIAS_ROLE in module.shapes:
            yield from _bias(module)


def _residual_init(values: Mapping[str, Any]) -> str:
    """Return which initialisation changes the base in a way that can be repeated, empty for none."""
    init = values.get("init_lora_weights")
    if init == pissa.PISSA:
        return pissa.PISSA
    return pissa.OLORA if isinstance(init, str) and init.lower() == pissa.OLORA else ""


def _pair_settings(module: TargetModule, roles: Iterable[str]) -> Mapping[str, Setting]:
    """Return the settings of the pair, all shapes and the rank checked."""
    shapes = {role: module.shapes[role] for role in roles}
    if module.values.get("use_bdlora") is not None:
        shapes = dict(bdlora.full_shapes(module, shapes))
    facts = ModuleFacts(
        base_shape=module.base_shape,
        rank=module.rank,
        scaling=module.scaling,
        square_is_transposed=module.is_transposed,
        rounds_delta=module.rounds_delta,
    )
    return lora.LoraMethod().settings(shapes, facts)


def _variant(module: TargetModule, roles: tuple[str, ...], settings: Mapping[str, Setting]) -> Iterator[PlannedUpdate]:
    """Yield the pair's update, as the config's variant makes it."""
    values = module.values
    if values.get("use_dora"):
        yield from dora.plan_dora(module, roles, settings)
    elif values.get("kasa_config") is not None:
        yield from kasa.plan_kasa(module, roles, settings)
    elif values.get("use_bdlora") is not None and bdlora.block_role(module.path, values):
        yield from bdlora.plan_bdlora(module, roles, settings)
    else:
        rounds = values.get("use_bdlora") is not None or _is_mica(module)
        yield PlannedUpdate(lora.KIND, roles, {**settings, "rounds_delta": rounds or settings["rounds_delta"]})


def _is_mica(module: TargetModule) -> bool:
    """Whether PEFT treats the pair as MiCA's, whose delta it rounds first."""
    if module.values.get("init_lora_weights") != _MICA:
        return False
    if len(module.base_shape) != 2:
        shape = list(module.base_shape)
        raise UnmergeableError("a linear weight or embedding, for MiCA is of nothing else", f"one of shape {shape}")
    return True


def _attention(
    module: TargetModule, roles: tuple[str, ...], settings: Mapping[str, Setting]
) -> Iterator[PlannedUpdate]:
    """Yield the pair's update on nn.MultiheadAttention or its out_proj."""
    if variants := lora_variants(module.values):
        expected = "plain LoRA, for PEFT trains nn.MultiheadAttention with nothing else"
        raise UnmergeableError(expected, f"a variant by {', '.join(variants)}")
    multihead.check_attention(module)
    if module.is_inner:
        yield PlannedUpdate(multihead.KIND, roles, settings)
    else:
        yield PlannedUpdate(lora.KIND, roles, {**settings, "rounds_delta": True})


def _bias(module: TargetModule) -> Iterator[PlannedUpdate]:
    shape = module.shapes[_BIAS_ROLE]
    facts = ModuleFacts(module.bias_shape or shape, module.rank, module.scaling, None)
    settings = lora_bias.LoraBiasMethod().settings({_BIAS_ROLE: shape}, facts)
    yield PlannedUpdate(lora_bias.KIND, (_BIAS_ROLE,), settings, parameter="bias")
