from typing_extensions import Buffer

LEVEL: int
PANEL: int
CHANGED: int
CARE: int

def merge(
    stored: Buffer,
    result: Buffer,
    pairs: tuple[tuple[Buffer, Buffer, int, int, float, bool, Buffer | None], ...],
    sizes: tuple[int, int],
    dtypes: tuple[int, int],
    is_double: bool,
    rounds_between: bool,
    finds_changes: bool,
    level: int,
    sampled: tuple[int, int],
    /,
) -> int: ...
def measure(
    before: Buffer,
    after: Buffer,
    now: Buffer,
    sums: Buffer,
    sizes: tuple[int, int],
    first_row: int,
    stride: int,
    in_dtype: int,
    out_dtype: int,
    is_double: bool,
    level: int,
    /,
) -> None: ...
def pack(
    stored: Buffer, packed: Buffer, dtype: int, sizes: tuple[int, int, int, int], is_right: bool, is_double: bool, /
) -> None: ...
