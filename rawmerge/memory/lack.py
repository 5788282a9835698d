"""What is said where the system gives no more memory, which libraries tell in several ways."""

from __future__ import annotations

from typing import Final

#: What Python, and torch's allocator, say in a RuntimeError.
_TEXTS: Final = ("can't start new thread", "can't allocate memory", "not enough memory")


def ran_out(error: RuntimeError) -> bool:
    """Whether an error says that there is no more memory for the processor."""
    return any(text in str(error) for text in _TEXTS)


def lack_text(error: BaseException) -> str:
    """Return a message for an error that comes of a lack of memory, or of a library that could not be loaded."""
    what = "a library" if isinstance(error, ImportError) else "more memory"
    state = ", ".join(getattr(error, "__notes__", ())) or "nothing was published"
    return (
        f"expected {what}, found {str(error) or 'none left'}; {state}\n"
        "    hint: ulimit -v and -d may be too low; --threads 1 and --max-memory make a merge smaller"
    )
