"""Whether two tensors on disk hold the same values, in bounded memory and without torch.

Values are compared as the output would hold them: both are rounded to one storage dtype, and then bit for bit, so that
zeros of different sign differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from rawmerge.dtypes import DTYPES
from rawmerge.inputs.tensor_source import CHUNK_BYTES, OpenFiles, TensorSource

if TYPE_CHECKING:
    import numpy as np

    _Array: TypeAlias = np.ndarray[Any, Any]

#: Elements that are held at once, of each tensor.
CHUNK_ELEMENTS: Final = CHUNK_BYTES // 8
MAX_TRANSPOSED_BYTES: Final = 256 * 2**20
#: numpy's names; it has no bfloat16, whose bits are the upper half of a float32's.
_NUMPY_NAMES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def same_values(a: TensorSource, b: TensorSource, dtype: str) -> bool:
    """Whether two tensors are equal, once both are rounded to `dtype`.

    Tensors of one dtype that is not a plain float, such as integers, are equal where their bytes are.

    Args:
        a: one tensor.
        b: the other.
        dtype: storage dtype code that both are rounded to, to nearest, ties to even.

    Raises:
        InputChangedError: a file ends early.
    """
    if a.shape != b.shape:
        return False
    with OpenFiles() as files:
        if a.dtype == b.dtype and _same_bytes(files, a, b):
            return True
        if not _are_floats(a.dtype, b.dtype, dtype):
            return False
        return all(
            bool((left == right).all())
            for left, right in zip(_rounded(files, a, dtype), _rounded(files, b, dtype), strict=True)
        )


def sample_rows_equal(a: TensorSource, b: TensorSource, rows: int, dtype: str) -> float:
    """Return the share, 0 to 1, of evenly spread rows in which two matrices agree once both are rounded to `dtype`.

    Shapes: a (m, n), b (k, n); the rows are among the first min(m, k). It is 0 where the rows cannot be compared.

    Args:
        a: one matrix.
        b: the other.
        rows: how many rows to compare, at most.
        dtype: storage dtype code that both are rounded to.

    Raises:
        InputChangedError: a file ends early.
    """
    common = min(a.shape[0], b.shape[0]) if a.shape and b.shape else 0
    if a.shape[1:] != b.shape[1:] or common == 0 or rows < 1 or a.byte_count == 0:
        return 0.0
    count = min(rows, common)
    chosen = sorted({index * (common - 1) // max(count - 1, 1) for index in range(count)})
    return sum(same_values(a.rows(row, 1), b.rows(row, 1), dtype) for row in chosen) / len(chosen)


def same_transposed(a: TensorSource, b: TensorSource) -> bool:
    """Whether one matrix is the other's transpose, value for value.

    Shapes: a (m, n), b (n, m). Tensors of more than `MAX_TRANSPOSED_BYTES` together are not read: False.

    Args:
        a: one matrix.
        b: the other; both are plain floats.

    Raises:
        InputChangedError: a file ends early.
    """
    is_comparable = len(a.shape) == 2 and a.shape == b.shape[::-1] and _are_floats(a.dtype, b.dtype)
    if not is_comparable or a.byte_count + b.byte_count > MAX_TRANSPOSED_BYTES:
        return False
    common = a.dtype if a.dtype == b.dtype else "F64" if "F64" in {a.dtype, b.dtype} else "F32"  # exact for both
    with OpenFiles() as files:
        left, right = _whole(files, a, common), _whole(files, b, common)
    return bool((left == right.T).all())


def same_bytes(a: TensorSource, b: TensorSource) -> bool:
    """Whether two byte ranges are equal.

    Raises:
        InputChangedError: a file ends early.
    """
    with OpenFiles() as files:
        return _same_bytes(files, a, b)


def _are_floats(*dtypes: str) -> bool:
    return all(DTYPES[dtype].is_mergeable for dtype in dtypes)


def _same_bytes(files: OpenFiles, a: TensorSource, b: TensorSource) -> bool:
    return a.byte_count == b.byte_count and all(
        # memoryviews would be compared element by element
        bytearray(left) == right
        for left, right in zip(files.chunks(a), files.chunks(b), strict=True)
    )


def _whole(files: OpenFiles, source: TensorSource, dtype: str) -> _Array:
    """Return the bits of a matrix rounded to `dtype`; one whose rounding is exact."""
    import numpy as np

    chunks = list(_rounded(files, source, dtype)) or [np.zeros(0, np.uint8)]
    return np.concatenate(chunks).reshape(source.shape)


def _rounded(files: OpenFiles, source: TensorSource, dtype: str) -> Iterator[_Array]:
    """Yield the bits of the elements rounded to `dtype`, `CHUNK_ELEMENTS` at a time."""
    import numpy as np

    item_bytes, total = DTYPES[source.dtype].bits // 8, prod(source.shape)
    for start in range(0, total, CHUNK_ELEMENTS):
        buffer = bytearray(min(CHUNK_ELEMENTS, total - start) * item_bytes)
        files.read_into(source.path, source.offset + start * item_bytes, memoryview(buffer))
        yield _round(np.frombuffer(buffer, _NUMPY_NAMES[source.dtype]), source.dtype, dtype)


def _round(values: _Array, source: str, target: str) -> _Array:
    """Return the bits of `values`, stored as `source`, rounded once to `target`: to nearest, ties to even."""
    import numpy as np

    if source == target:
        return values.view(f"<u{values.itemsize}")
    if source == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if target == "BF16":
            return _to_bfloat16(_round_to_odd(values) if source == "F64" else values.astype(np.float32))
        rounded = values.astype(_NUMPY_NAMES[target])
    return rounded.view(f"<u{rounded.itemsize}")


def _to_bfloat16(values: _Array) -> _Array:
    """Return the bits of float32 `values` as bfloat16."""
    import numpy as np

    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _round_to_odd(values: _Array) -> _Array:
    """Return float64 `values` in float32, inexact ones with an odd last bit, so that the next rounding is the only one.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    import numpy as np

    toward_zero = values.astype(np.float32)
    too_far = np.abs(toward_zero.astype(np.float64)) > np.abs(values)
    toward_zero[too_far] = np.nextafter(toward_zero[too_far], np.float32(0))
    is_inexact = (toward_zero.astype(np.float64) != values) & ~np.isnan(values)
    odd: _Array = toward_zero.view(np.uint32) | is_inexact
    return odd.view(np.float32)
