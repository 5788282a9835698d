"""Puts results between their markers in README files: `python -m benchmarks.report [FILE...]`.

`<!-- result: NAME -->` … `<!-- end of result -->` holds `results/NAME.md`, with links that lead from the README's
directory. What has no such file stays as it is.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Final

from benchmarks.result_files import RESULTS

ROOT: Final = Path(__file__).parent.parent
DEFAULT_FILES: Final = (Path(__file__).with_name("README.md"), ROOT / "README.md")
PLACE: Final = re.compile(r"(<!-- result: ([\w-]+) -->\n).*?(<!-- end of result -->)", re.DOTALL)
PLOT: Final = re.compile(r"\]\(([\w-]+\.svg)\)")


def fill(text: str, results: Path, directory: Path) -> str:
    """Return `text` with each result put in its place.

    Args:
        text: of a Markdown file.
        results: directory of the results.
        directory: of the Markdown file, from where links lead.
    """

    def replacement(place: re.Match[str]) -> str:
        path = results / f"{place[2]}.md"
        if not path.is_file():
            return place[0]
        prefix = Path(os.path.relpath(results, directory)).as_posix()
        body = PLOT.sub(rf"]({prefix}/\1)", path.read_text(encoding="utf-8"))
        return f"{place[1]}\n{body}\n{place[3]}"

    return PLACE.sub(replacement, text)


def update(path: Path, results: Path) -> bool:
    """Fill the file at `path`; return whether that changed it."""
    before = path.read_text(encoding="utf-8")
    after = fill(before, results, path.parent)
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before


def main() -> None:
    """Update the files that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=DEFAULT_FILES, help="default: both READMEs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results (default: ours)")
    options = parser.parse_args()
    for path in options.files:
        print(f"{path}: {'updated' if update(path, options.results) else 'unchanged'}")


if __name__ == "__main__":
    main()
