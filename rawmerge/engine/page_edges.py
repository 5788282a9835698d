"""Parts of pages at the edges of written ranges, gathered until their pages are whole.

What goes past the page cache is whole pages. Ranges begin and end within pages, two of them on either side of one: the
range that is written last takes the other's part, and writes the page with its own. To write each part at once would
hold up the others, for a file takes either kind of write at a time, and a disk takes as long for a page as for many.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from rawmerge.engine.anonymous_memory import PAGE_BYTES


def cut_at_pages(offset: int, byte_count: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield (start, count) of parts of a range at `offset` of a file, cut where pages of the file begin.

    Starts count from the range's own; no part has more than `most` bytes, a multiple of a page.
    """
    done = 0
    while done < byte_count:
        count = min(most - (offset + done) % PAGE_BYTES, byte_count - done)
        yield done, count
        done += count


def place_in(pages: memoryview, offset: int, byte_count: int) -> memoryview:
    """Return the part of whole pages of memory that lies in them as a range at `offset` lies in pages of a file."""
    return pages[offset % PAGE_BYTES :][:byte_count]


class PageEdges:
    """Parts of pages of one file; from any thread."""

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[int, bytes]]] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._parts)

    def complete(self, offset: int, byte_count: int, pages: memoryview) -> tuple[int, int]:
        """Fill up the first and the last page of a range with what others left there, or leave them its own parts.

        Args:
            offset: of the range in the file.
            byte_count: of the range.
            pages: memory of whole pages, which the range lies in as it does in pages of the file.

        Returns:
            (start, end) of the pages in the file that are whole now; none if they are the same.
        """
        end = offset + byte_count
        first, last = offset // PAGE_BYTES * PAGE_BYTES, end // PAGE_BYTES * PAGE_BYTES
        with self._lock:
            whole_from = first if self._fill(pages, first, (first, offset)) else first + PAGE_BYTES
            if whole_from > last:  # all of it is within a page that begins with what is not there yet
                self.put(offset, pages[offset - first : end - first])
                return first, first
            if whole_from > first:
                self.put(offset, pages[offset - first : PAGE_BYTES])
            if end > last and self._fill(pages, first, (end, last + PAGE_BYTES)):
                return whole_from, last + PAGE_BYTES
            self.put(last, pages[last - first : end - first])
            return whole_from, last

    def _fill(self, pages: memoryview, first: int, gap: tuple[int, int]) -> bool:
        """Move what others left of a gap within a page to `pages`, if it is all there."""
        start, end = gap
        number = start // PAGE_BYTES
        page = self._parts.get(number, [])
        found = [(offset, part) for offset, part in page if start <= offset < end]
        if sum(len(part) for _, part in found) < end - start:  # ranges do not overlap
            return False
        for offset, part in found:
            pages[offset - first : offset - first + len(part)] = part
        if found:
            self._parts[number] = [at for at in page if at not in found]
            if not self._parts[number]:
                del self._parts[number]
        return True

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
