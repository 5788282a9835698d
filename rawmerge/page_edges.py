"""Parts of pages at the edges of written ranges, gathered until they are written together.

What goes past the page cache is whole pages. Ranges begin and end within pages, two of them on either side of one; to
write each part at once would hold up the others, for a file takes either kind of write at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from rawmerge.anonymous_memory import PAGE_BYTES


def cut_at_pages(offset: int, byte_count: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield (start, count) of parts of a range at `offset` of a file, cut where pages of the file begin.

    Starts count from the range's own; no part has more than `most` bytes, a multiple of a page.
    """
    done = 0
    while done < byte_count:
        count = min(most - (offset + done) % PAGE_BYTES, byte_count - done)
        yield done, count
        done += count


class PageEdges:
    """Parts of pages of one file; from any thread."""

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[int, bytes]]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._parts)

    def put(self, offset: int, part: memoryview) -> None:
        """Keep a copy of bytes that lie within one page of the file, from `offset` on."""
        if len(part):
            with self._lock:
                self._parts.setdefault(offset // PAGE_BYTES, []).append((offset, bytes(part)))

    def take(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of all parts, in file order and joined where they touch; they are kept no longer."""
        with self._lock:
            parts, self._parts = self._parts, {}
        start, joined = 0, b""
        for offset, part in sorted(part for page in parts.values() for part in page):
            if joined and start + len(joined) == offset:
                joined += part
                continue
            if joined:
                yield start, joined
            start, joined = offset, part
        if joined:
            yield start, joined
