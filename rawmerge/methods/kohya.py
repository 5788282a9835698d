"""LoRA, LoHa and LoKr as kohya's scripts and LyCORIS save them: W + alpha / rank * delta, an alpha for each module.

LoKr of two full factors has no rank, and is not scaled. `dora_scale` scales the rows of the sum to trained norms.

Source: kohya-ss/sd-scripts `networks/merge_lora.py` `merge_to_sd_model`; LyCORIS 4.1.3 `modules/locon.py`, `loha.py`,
`lokr.py` as they compute when they run (`forward`): the last two scale twice when they merge (`get_diff_weight`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.formats.foreign_adapters import KOHYA
from rawmerge.methods.delta import row_delta, upcast, whole_delta
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
from rawmerge.methods.loha import LohaMethod
from rawmerge.methods.lokr import kronecker_rows
from rawmerge.methods.lora import PreparedLora
from rawmerge.methods.row_magnitude import PreparedMagnitude

if TYPE_CHECKING:
    import torch

_DORA: Final = "dora_scale"
_EPSILON: Final = 2.0**-23  # float32's, whatever is computed in


class KohyaLoraMethod:
    """`lora_up @ lora_down`, with `lora_mid` of convolutions between them."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; factors are matrices, or kernels of one pixel beside the one that has the weight's."""
        import torch

        own, scaling = upcast(tensors, context), number(settings, "scaling")
        up, down = own["lora_up"], own["lora_down"]
        if "lora_mid" in own:
            delta = torch.einsum("m n ..., i m, n j -> i j ...", own["lora_mid"], up.flatten(1), down.flatten(1))
            return _decomposed(whole_delta(delta * scaling), own)
        if len(context.shape) == 2:  # a projection that was a convolution of one pixel when it was trained
            up, down = up.flatten(1), down.flatten(1)
        return _decomposed(PreparedLora(down, up, scaling, is_transposed=False, rounding_dtype=None), own)


class KohyaLohaMethod:
    """Both products, multiplied element by element, as PEFT's LoHa."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update."""
        own = {role.removeprefix("hada_"): tensor for role, tensor in tensors.items() if role != _DORA}
        return _decomposed(LohaMethod().prepare(settings, own, context), upcast(tensors, context))


class KohyaLokrMethod:
    """The Kronecker product of two factors, each of them whole or a product."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; kernels of convolutions count as columns of the second factor."""
        own, scaling = upcast(tensors, context), number(settings, "scaling")
        first = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
        product = partial(kronecker_rows, first, _second_factor(own).flatten(1), scaling)
        return _decomposed(row_delta(product, (context.shape[0], prod(context.shape[1:]))), own)


def _second_factor(own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return (rows, columns, *kernel)."""
    import torch

    if "lokr_w2" in own:
        return own["lokr_w2"]
    if "lokr_t2" in own:
        return torch.einsum("i j ..., i p, j r -> p r ...", own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
    return own["lokr_w2_a"] @ own["lokr_w2_b"].flatten(1)


def _decomposed(delta: PreparedUpdate, own: Mapping[str, torch.Tensor]) -> PreparedUpdate:
    return PreparedMagnitude(delta, own[_DORA].flatten(), _EPSILON) if _DORA in own else delta


_LORA: Final = ("lora_up", "lora_down", "lora_mid")
_LOHA: Final = tuple(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
_LOKR: Final = tuple(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))


class KohyaKind(AdapterKind):
    """Files of kohya's scripts and of LyCORIS; each module has a kind of its own."""

    peft_type: ClassVar[str] = KOHYA
    title: ClassVar[str] = "kohya and LyCORIS: LoRA, LoHa, LoKr, DoRA"
    formula: ClassVar[str] = "W + alpha/r·(up@down), LoHa or LoKr; dora_scale: rows of the sum scaled to its norms"
    modules: ClassVar[str] = "Linear, Conv1d/2d/3d"
    bits: ClassVar[str] = "equal to sd-scripts' float32 merge"
    parts: ClassVar[Mapping[str, str]] = {
        **{f"{part}.weight": part for part in _LORA},
        **{part: part for part in (*_LOHA, *_LOKR, _DORA, "alpha")},
    }
    ignored: ClassVar[Mapping[str, str]] = {"alpha": "the plan holds what it says, the scaling"}
    integers: ClassVar[tuple[str, ...]] = ("alpha",)
    methods: ClassVar[Mapping[str, Method]] = {
        "kohya_lora": KohyaLoraMethod(),
        "kohya_loha": KohyaLohaMethod(),
        "kohya_lokr": KohyaLokrMethod(),
    }
    is_foreign: ClassVar[bool] = True
    has_flat_names: ClassVar[bool] = True

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in), kernels of convolutions counted as inputs; None where the tensors do not tell."""
        if "lora_up" in shapes and "lora_down" in shapes:
            middle = shapes.get("lora_mid", (1, 1))
            rows, columns = shapes["lora_up"][:1], shapes["lora_down"][1:]
            return (*rows, prod(columns) * prod(middle[2:])) if rows and columns else None
        left, right = shapes.get("hada_w1_a", ()), shapes.get("hada_w1_b", ())
        if len(left) == len(right) == 2:
            return (left[1], right[1] * prod(shapes["hada_t1"][2:])) if "hada_t1" in shapes else (left[0], right[1])
        return None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        if module.is_transposed:
            hint = "kohya's scripts and LyCORIS do not train such"
            raise UnmergeableError(
                "a weight stored (out, in)", f"one stored (in, out), {list(module.base_shape)}", hint
            )
        if len(module.base_shape) < 2:
            raise UnmergeableError("a matrix or a kernel", f"shape {list(module.base_shape)}")
        own = [role for role in module.shapes if role not in {"alpha", _DORA}]
        kinds = {
            kind: roles for kind, roles in (("lora", _LORA), ("loha", _LOHA), ("lokr", _LOKR)) if {*roles} & {*own}
        }
        if len(kinds) != 1:
            raise UnmergeableError(
                "factors of one kind", f"those of {len(kinds)}", "the file is incomplete, or damaged"
            )
        ((kind, roles),) = kinds.items()
        rank, working = {"lora": _check_lora, "loha": _check_loha, "lokr": _check_lokr}[kind](module)
        used = [role for role in roles if role in module.shapes]
        if _DORA in module.shapes:
            used.append(_check_magnitude(module))
        scaling = module.values["alphas"].get(module.path, rank) / rank if rank else 1.0
        settings: dict[str, Setting] = {"rank": rank, "scaling": float(scaling)}
        yield PlannedUpdate(f"kohya_{kind}", tuple(used), settings, working_bytes=4 * working)


def _check_lora(module: TargetModule) -> tuple[int, int]:
    """Return the rank, and how many elements are computed at once beside the factors."""
    module.need("lora_up", "lora_down")
    out, inside, *kernel = module.base_shape
    rank = (*module.shapes["lora_down"], 0)[0]
    ones = [1] * (len(module.shapes["lora_up"]) - 2)
    has_mid = "lora_mid" in module.shapes
    if ones and kernel and len(ones) != len(kernel):
        module.refuse("lora_up", f"{2 + len(kernel)} dimensions", f"shape {list(module.shapes['lora_up'])}")
    module.expect("lora_up", out, rank or -1, *(ones if not kernel else [1] * len(kernel)))
    module.expect("lora_down", -1, inside, *(ones if not kernel else [1] * len(kernel) if has_mid else kernel))
    if has_mid:
        module.expect("lora_mid", rank, rank, *kernel)
    factors = rank * (out + inside * prod(kernel))
    return rank, factors + (2 * prod(module.base_shape) if has_mid else 0)


def _check_loha(module: TargetModule) -> tuple[int, int]:
    module.need("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    out, inside, *kernel = module.base_shape
    rank = (*module.shapes["hada_w1_b"], 0)[0]
    has_kernel = "hada_t1" in module.shapes or "hada_t2" in module.shapes
    for half in ("1", "2"):
        if has_kernel:
            module.expect(f"hada_t{half}", rank or -1, rank or -1, *kernel)
            module.expect(f"hada_w{half}_a", rank or -1, out)
            module.expect(f"hada_w{half}_b", rank or -1, inside)
        else:
            module.expect(f"hada_w{half}_a", out, rank or -1)
            module.expect(f"hada_w{half}_b", rank or -1, inside * prod(kernel))
    factors = 2 * rank * (out + inside * prod(kernel))
    return rank, factors + (3 * prod(module.base_shape) if has_kernel else 0)


def _check_lokr(module: TargetModule) -> tuple[int, int]:
    """Return the rank, 0 where both factors are whole."""
    first, rank_1 = _factor(module, "w1")
    second, rank_2 = _factor(module, "w2")
    out, inside, *kernel = module.base_shape
    product = (first[0] * second[0], first[1] * second[1])
    if product != (out, inside * prod(kernel)):
        expected = f"factors whose product has the base's shape {list(module.base_shape)}"
        module.refuse("lokr_w1" if "lokr_w1" in module.shapes else "lokr_w1_a", expected, f"one of {list(product)}")
    if rank_1 and rank_2 and rank_1 != rank_2:
        module.refuse("lokr_w2_a", f"rank {rank_1} like lokr_w1_a", f"rank {rank_2}")
    return rank_1 or rank_2, 2 * (prod(first) + prod(second))


def _factor(module: TargetModule, half: str) -> tuple[tuple[int, int], int]:
    """Return the shape of a factor, kernels counted as columns, and its rank, 0 for a whole one."""
    whole, left, right, kernel = (f"lokr_{half}", f"lokr_{half}_a", f"lokr_{half}_b", f"lokr_t{half[-1]}")
    kernels = module.base_shape[2:] if half == "w2" else ()
    if whole in module.shapes:
        if left in module.shapes or right in module.shapes:
            module.refuse(whole, f"either it, or {left} and {right}", "both")
        module.expect(whole, -1, -1, *kernels)
        rows, *columns = module.shapes[whole]
        return (rows, prod(columns)), 0
    module.need(left, right)
    if kernel in module.shapes:
        rank = (*module.shapes[kernel], 0)[0]
        module.expect(kernel, -1, rank, *kernels)
        module.expect(left, rank, -1)
        module.expect(right, rank, -1)
        return (module.shapes[left][1], module.shapes[right][1] * prod(kernels)), rank
    module.expect(left, -1, -1)
    rank = module.shapes[left][1]
    module.expect(right, rank, -1, *(kernels if len(module.shapes[right]) > 2 else ()))
    return (module.shapes[left][0], prod(module.shapes[right][1:])), rank


def _check_magnitude(module: TargetModule) -> str:
    """Check the norms of the rows; LyCORIS of before 3.1 trained those of the columns."""
    found = module.shapes[_DORA]
    rows = module.base_shape[0]
    if found != (rows, *[1] * (len(module.base_shape) - 1)):
        hint = "norms of columns, as LyCORIS trained them unless told wd_on_output=True, are not merged"
        module.refuse(_DORA, f"norms of {rows} rows, shape ({rows}, 1…)", f"shape {list(found)}", hint)
    return _DORA
