#!/usr/bin/env python3
"""Fuzz what rawmerge reads from strangers; needs the extra `fuzz`, and `parity` for adapters of every kind.

`python scripts/fuzz.py pickle --seconds 600` fuzzes one target, `--all --seconds 1800` each for an equal part of the
time, `--seconds 0` reads the corpus only. What is found lies in CORPUS/TARGET.findings, one folder for each place in
rawmerge and kind of error: the input, and the traceback. Exit code 1: something was found.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

TARGETS: Final = tuple(
    "header index config adapter-config adapter pattern pickle plan journal record manifest".split()  # noqa: SIM905
)
#: Longest input, in bytes.
MAX_BYTES: Final = 1 << 16
_LAST: Final = re.compile(r"^#(\d+)\s+\S+\s+cov: (\d+) ft: (\d+) corp: (\d+)/(\S+)", re.MULTILINE)


def main() -> int:
    """Fuzz the targets named, each in a process of its own; return the exit code."""
    options = _options()
    if options.child:
        _fuzz(options.targets[0], options.seconds, options.corpus)
    targets = TARGETS if options.all else options.targets
    found = 0
    for target in targets:
        found += _supervise(target, options.seconds // len(targets), options.corpus)
    return int(found > 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help="what to fuzz")
    parser.add_argument("--all", action="store_true", help="every target")
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"), help="folder of inputs and findings")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.all and not options.targets:
        parser.error("name a target, or --all")
    return options


def _supervise(target: str, seconds: int, corpus: Path) -> int:
    """Fuzz one target in a process of its own, tell how far it came, and return how many findings there are."""
    corpus.mkdir(parents=True, exist_ok=True)
    log = corpus / f"{target}.log"
    shared = Path("/dev/shm")
    with log.open("wb") as file, tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as root:
        command = [sys.executable, __file__, target, "--child", "--seconds", str(seconds), "--corpus", str(corpus)]
        environment = os.environ | {"RAWMERGE_FUZZ_ROOT": root, "XDG_CACHE_HOME": f"{root}/cache"}
        code = subprocess.run(command, stderr=file, stdout=file, env=environment, check=False).returncode
    text = log.read_text(errors="replace")
    found = sorted(path.name for path in (corpus / f"{target}.findings").glob("*"))
    last = _LAST.findall(text)
    runs, cov, features, inputs, size = last[-1] if last else (0, 0, 0, 0, 0)
    state = "" if code == 0 else f", ended with {code}: see {log}"
    told = f"{runs} runs, coverage {cov}, features {features}, corpus {inputs}/{size}"
    print(f"{target}: {told}, findings {len(found)}{state}", flush=True)
    return len(found) + (code != 0)


def _fuzz(target: str, seconds: int, corpus: Path) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris  # type: ignore[import-untyped]

    with atheris.instrument_imports(include=["rawmerge", "pickletools", "zipfile"]):
        from fuzzing.targets import TARGETS as KNOWN
        from fuzzing.workplace import Workplace

    inputs, findings = corpus / target, corpus / f"{target}.findings"
    inputs.mkdir(parents=True, exist_ok=True)
    root = Path(os.environ["RAWMERGE_FUZZ_ROOT"])
    place, chosen = Workplace(root), KNOWN[target]
    seeds = chosen.seeds(root)
    for seed in seeds:
        (inputs / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
    more = {"custom_mutator": chosen.mutator(seeds)} if chosen.mutator else {}
    length = f"-max_total_time={seconds}" if seconds else "-runs=0"
    limits = [f"-max_len={MAX_BYTES}", "-timeout=120", "-rss_limit_mb=4096"]
    arguments = [sys.argv[0], str(inputs), length, *limits, f"-artifact_prefix={corpus}/{target}-"]
    atheris.Setup(arguments, _kept(chosen.check, place, findings), **more)
    atheris.Fuzz()


def _kept(check: Callable[..., None], place: object, findings: Path) -> Callable[[bytes], None]:
    """Return a check that keeps what it finds, one input for each place and kind, and goes on."""

    def test(data: bytes) -> None:
        try:
            check(place, data)
        except BaseException as error:  # this is where everything that is no refusal ends
            if isinstance(error, KeyboardInterrupt):
                raise
            folder = findings / _signature(error)
            if not folder.exists():
                folder.mkdir(parents=True)
                (folder / "input").write_bytes(data)
                (folder / "traceback.txt").write_text("".join(traceback.format_exception(error)), errors="replace")

    return test


def _signature(error: BaseException) -> str:
    """Return a name for the kind of an error and the place in rawmerge that it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/rawmerge/" in frame.filename]
    at = frames[-1] if frames else None
    where = f"{Path(at.filename).stem}-{at.name}" if at else str(error)[:30]
    return re.sub(r"[^\w.-]", "_", f"{type(error).__name__}-{where}")


if __name__ == "__main__":
    sys.exit(main())
