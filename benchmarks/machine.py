"""What a result was measured on; nothing that tells one machine of a kind from another."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil

PACKAGES: Final = ("rawmerge", "torch", "safetensors", "peft", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Hardware, system and versions.

    Attributes:
        processor: the model name that Linux reports, or the architecture.
        cores: processor cores this process may use.
        memory_bytes: size of main memory.
        file_system: type of the one that holds the checkpoints.
        system: kernel and version, without the builder's suffix.
        python: version.
        packages: versions of the packages involved; absent ones are left out.
        commit: of the repository, empty outside of one.
    """

    processor: str
    cores: int
    memory_bytes: int
    file_system: str
    system: str
    python: str
    packages: dict[str, str]
    commit: str

    def __str__(self) -> str:
        parts = [
            f"{self.cores} cores ({self.processor})",
            f"{self.memory_bytes / 2**30:.0f} GiB memory",
            self.file_system,
            self.system,
            f"Python {self.python}",
            *(f"{name} {number}" for name, number in self.packages.items()),
            f"commit {self.commit or 'unknown'}",
        ]
        return ", ".join(parts)


def describe_machine(workdir: Path) -> Machine:
    """Return what is known of the machine; `workdir` is where the checkpoints lie."""
    return Machine(
        processor=processor_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        file_system=file_system_type(workdir),
        system=f"{platform.system()} {platform.release().partition('-')[0]}",
        python=platform.python_version(),
        packages=package_versions(),
        commit=commit(),
    )


def processor_name() -> str:
    """Return the processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def file_system_type(path: Path) -> str:
    """Return the type of the file system mounted nearest above `path`."""
    types = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    resolved = path.resolve()
    return next((types[place] for place in (resolved, *resolved.parents) if place in types), "unknown")


def package_versions() -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def commit() -> str:
    """Return the short hash of the repository's commit, marked when files differ from it."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip()
