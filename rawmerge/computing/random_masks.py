"""Which elements of a tensor are kept by chance: the same for any tile that asks. Importing it imports torch.

Each element has a number of its own, found from its place without drawing those before it, by a counter-based generator
(Philox 4x64, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), whose raw stream numpy keeps the same.

Source: PEFT 0.21.2 `utils/merge_utils.py`: `random_pruning`, which draws from torch's one generator, unseeded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

#: Numbers of 32 bits that one step of the counter gives, as four of 64 bits.
_NUMBERS: Final = 8


@dataclass(frozen=True, slots=True)
class RandomMask:
    """The elements of one adapter's delta of one tensor that are kept.

    Attributes:
        key: the generator's, 128 bits.
        density: the share that is kept, above 0 and below 1.
    """

    key: int
    density: float

    def kept(self, first: int, count: int) -> torch.Tensor:
        """Return whether each of `count` elements from number `first` on is kept, (count), bool.

        Element i is kept if the i-th number of 32 bits is below `density` of all there are.
        """
        step, skipped = divmod(first, _NUMBERS)
        generator = np.random.Philox(key=self.key)
        generator.advance(step)
        drawn = generator.random_raw(-(-(skipped + count) // _NUMBERS) * _NUMBERS // 2)
        numbers = drawn.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]
        limit = min(max(1, round(self.density * 2**32)), 2**32 - 1)
        return torch.from_numpy(numbers < np.uint32(limit))


def mask_key(seed: int, tensor: str, place: int) -> int:
    """Return the key for one adapter's delta: another for each tensor, adapter's place and seed."""
    digest = hashlib.sha256(f"{seed} {place} {tensor}".encode()).digest()
    return int.from_bytes(digest[:16], "little")
