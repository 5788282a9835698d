"""Whether the files in an output's folder are those that its checksums, and loaders, should find there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Final

from rawmerge.errors import Problem, RefusedError, quote
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.tensor_source import read_small_file
from rawmerge.output.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, MAX_TOLD, manifest_problems, parse_manifest
from rawmerge.output.side_files import CHECKSUM_FILES, left_out_reason

#: What trainers leave beside weights, and no loader takes for them.
_OF_TRAINING: Final = re.compile(
    r"(optimizer|scheduler|scaler|training_args|rng_state|random_states).*|value_head\.(safetensors|bin)"
)
_MAX_NAMES: Final = 8


class FolderCheck:
    """The folder of an output: its `SHA256SUMS`, and weights beside those that are its own."""

    def __init__(self, found: BaseCheckpoint, *, is_ours: bool) -> None:
        """Read the manifest, where there is one.

        Args:
            found: the output.
            is_ours: whether rawmerge made it, which leaves no other weights in it.
        """
        self._found = found
        self._is_ours = is_ours
        self.has_manifest = found.is_directory and os.path.lexists(found.root / MANIFEST_NAME)
        self._unreadable: tuple[Problem, ...] = ()
        self._digests: Mapping[str, str] = self._read() if self.has_manifest else {}

    def problems(self) -> Iterator[Problem]:
        """Yield what contradicts the manifest, and stray weights that nothing lists.

        A file of weights that no index names is a danger: some loaders take it, and it does not hold the merge. Where
        rawmerge made the folder, or a manifest says what is in it, somebody put it there afterwards; one that they
        entered in the manifest is meant. In other folders it may be meant as well, and is a note.
        """
        yield from self._unreadable
        if self.has_manifest and not self._unreadable:
            yield from manifest_problems(self._found.root, self._digests, self._own_names())
        strays = [name for name in self._strays() if self._is_finding(name)]
        if len(strays) > MAX_TOLD:
            yield Problem(str(self._found.root), "no weights but its own", f"{len(strays)} files of others")
        for name in strays[:MAX_TOLD]:
            hint = f"some loaders take it: move it away, or list it in {MANIFEST_NAME} if it is meant"
            yield Problem(name, "no weights beside the checkpoint's own", "a file of weights that nothing lists", hint)

    def notes(self) -> Iterator[str]:
        """Yield which other weights the folder holds, where they may be meant."""
        if names := [name for name in self._strays() if not self._is_finding(name)]:
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            listed = ", ".join(map(quote, names[:_MAX_NAMES]))
            yield f"it also holds {listed}{more}, which some loaders take for its weights"

    def _is_finding(self, name: str) -> bool:
        return (self._is_ours or self.has_manifest) and not self._unreadable and name not in self._digests

    def _own_names(self) -> list[str]:
        return [shard.path.name for shard in self._found.shards]

    def _strays(self) -> list[str]:
        """Return the names of weights at the top of the folder that are not the output's."""
        if not self._found.is_directory:
            return []
        own = {self._found.index_name, *self._own_names(), *CHECKSUM_FILES}
        names = sorted(path.name for path in self._found.root.iterdir() if not path.is_dir())
        return [
            name for name in names if name not in own and left_out_reason(name, 0) and not _OF_TRAINING.fullmatch(name)
        ]

    def _read(self) -> Mapping[str, str]:
        try:
            return parse_manifest(read_small_file(self._found.root / MANIFEST_NAME, MAX_MANIFEST_BYTES))
        except RefusedError as error:
            self._unreadable = error.problems
        except ValueError as error:
            expected = "lines of a digest and a file's name in the folder, each once"
            hint = f"once the files are known to be right, make it anew: sha256sum * > {MANIFEST_NAME}"
            self._unreadable = (Problem(MANIFEST_NAME, expected, str(error), hint),)
        return {}
