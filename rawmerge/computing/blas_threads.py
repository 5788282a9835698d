"""How many threads torch's matrix products use, held still while bits depend on it.

Products of very low matrices have other bits with another thread count. torch keeps the count partly per thread and
partly per process, so whoever needs a count other than one keeps all others from changing it meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

_COUNT_LOCK: Final = threading.Lock()


class BlasThreads:
    """The thread count of one merge: one, but the caller's own for low products.

    PEFT computes a tensor whole, with torch's own count; the same call with the same count has the same bits.
    Anything higher has the same bits with one thread as with many.
    """

    def __init__(self) -> None:
        self._whole_count = 0

    def adopt(self) -> None:
        """Prepare the calling worker thread; to be called once in each."""
        with _COUNT_LOCK:
            # torch gives a new thread the process's count at its first question, which must come before our answer
            count = torch.get_num_threads()
            self._whole_count = self._whole_count or count
            torch.set_num_threads(1)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Use the caller's own count in this thread, in the block."""
        with _COUNT_LOCK:
            torch.set_num_threads(self._whole_count)
            try:
                yield
            finally:
                torch.set_num_threads(1)

    def restore(self) -> None:
        """Give torch back the count that it had before the merge."""
        if self._whole_count:
            with _COUNT_LOCK:
                torch.set_num_threads(self._whole_count)
