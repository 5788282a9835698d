"""Whether base and adapter belong together, by the names that they give and by the base's own merge record.

Names are weak evidence: folders are renamed, and `_name_or_path` may name the model that a base was trained from. So
a merge is refused only where the base's place on the hub is known and the adapter names another; `--force` overrides.

Source: PEFT 0.21.2 `config.py` (`base_model_name_or_path`, `revision`); huggingface_hub 1.x `file_download.py` (the
cache's `models--org--name/snapshots/<commit>`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rawmerge.errors import MissingFileError, PlanError, Problem, quote
from rawmerge.formats.adapter_config import AdapterConfig
from rawmerge.formats.strict_json import StrictJsonError, parse_json_object
from rawmerge.inputs.adapter import Adapter
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.tensor_source import OpenFiles, TensorFile, TensorSource, read_small_file

RECORD_NAME: Final = "rawmerge.json"
#: The account of an adapter on each expert of a large model takes some 20 MB.
MAX_RECORD_BYTES: Final = 128 * 2**20
FORCE_HINT: Final = "--force merges all the same"

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_HUB_ID: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_CACHE: Final = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})(?=[/\\]|$)")
#: First parts of relative paths that look like hub ids.
_FOLDERS: Final = re.compile(
    r"(models?|base_?models?|pretrained(_models?)?|checkpoints?|ckpts?|weights|outputs?|out|results?|runs?|data|"
    r"experiments?|saves?|saved_models?|trained|merged(_models?)?|tmp|home|mnt|root|workspace|content)/.*",
    re.IGNORECASE,
)
#: What names of quantised copies end in, and Meta's name in front of its models; the values are the same base's.
_QUANTISED: Final = re.compile(
    r"(-unsloth)?[-_](bnb[-_]4bit|bnb[-_]8bit|4bit|8bit|gptq(-int[48])?|awq|int[48]|fp8)$", re.IGNORECASE
)
_VENDOR: Final = re.compile(r"^meta-(?=llama)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class IdentityFinding:
    """What the names say: a reason to refuse, or something that a user may want to know.

    Attributes:
        problem: the reason to refuse, None where there is none.
        note: a sentence, an empty string where there is none.
    """

    problem: Problem | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """The merge record in a base's directory.

    Attributes:
        fields: the parsed record, empty where there is none or it cannot be read.
        note: why a record that is there cannot be read, else empty.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def check_identity(base: BaseCheckpoint, adapter: Adapter, repo: str, *, is_forced: bool) -> tuple[str, ...]:
    """Return what a user may want to know about base and adapter.

    Args:
        base: the base.
        adapter: the adapter.
        repo: `org/name@commit` of a base from the hub, else empty.
        is_forced: make notes of what would be refused.

    Raises:
        PlanError: the adapter was trained on another base, or the base holds it already; all such reasons at once.
        InputChangedError: the adapter's file ends early.
    """
    named = check_base_name(base, repo, adapter.config) or IdentityFinding()
    record = read_record(base.root)
    problems = [item for item in (named.problem, already_merged(base.root, adapter.weights)) if item]
    if problems and not is_forced:
        raise PlanError(*problems)
    forced = (
        f"{quote(item.subject)}: expected {item.expected}, found {item.found}; merged by force" for item in problems
    )
    return tuple(note for note in (*forced, named.note, record.note) if note)


def base_names(base: BaseCheckpoint, repo: str) -> tuple[str, ...]:
    """Return every name by which the base is known, the surest first, each once.

    They are its hub id, the one in the path of a hub's cache, `_name_or_path` of its config, and its folder's name.

    Args:
        base: the base.
        repo: `org/name@commit` of a base from the hub, else empty.
    """
    stated = base.config.fields.get("_name_or_path")
    folder = _directory(base.root).absolute().name
    names = (*_hub_ids(base, repo), stated if isinstance(stated, str) else "", folder)
    return tuple(dict.fromkeys(name for name in names if name and not _COMMIT.fullmatch(name)))


def check_base_name(base: BaseCheckpoint, repo: str, config: AdapterConfig) -> IdentityFinding | None:
    """Compare the base with the name and revision that the adapter's config gives; None where all is well.

    Last parts of names are compared, whatever the case: `org/name` is `/data/Name`. A quantised copy's name stands for
    the base itself, with a note.

    Args:
        base: the base.
        repo: `org/name@commit` of a base from the hub, else empty.
        config: the adapter's config.
    """
    name = config.base_model_name
    if not name or _is_path_of(base, name):
        return None
    names = base_names(base, repo)
    if _last(name) not in {_last(other) for other in names}:
        return _other_name(base, repo, name)
    return _check_revision(base, repo, config)


def read_record(root: Path) -> BaseRecord:
    """Return the merge record beside a base's weights; one that cannot be read is no error.

    Args:
        root: the base's directory, or its file.
    """
    path = _directory(root) / RECORD_NAME
    if not path.exists():
        return BaseRecord()
    try:
        return BaseRecord(parse_json_object(read_small_file(path, MAX_RECORD_BYTES)))
    except (StrictJsonError, MissingFileError) as error:
        return BaseRecord(
            note=f"the base's {RECORD_NAME} cannot be read, so what was merged into it is not known: {error}"
        )


def merged_adapters(record: Mapping[str, Any]) -> frozenset[str]:
    """Return the SHA-256 of each adapter file that was merged into a base, by its record and the earlier ones in it."""
    merges = [*_tables(record.get("adapters")), *_tables(record.get("history"))]
    digests = (file.get("sha256") for merge in merges for file in _tables(merge.get("files")))
    return frozenset(digest for digest in digests if isinstance(digest, str))


def already_merged(root: Path, weights: TensorFile) -> Problem | None:
    """Return a reason to refuse where the base's record says that it holds this adapter; else the file is not read.

    Args:
        root: the base's directory, or its file.
        weights: the adapter's tensor file.

    Raises:
        InputChangedError: the adapter's file ends early.
    """
    known = merged_adapters(read_record(root).fields)
    if not known or _sha256(weights) not in known:
        return None
    found = f"one that it was merged into, by its {RECORD_NAME}"
    hint = f"start from the base that was not merged; {FORCE_HINT}, a second time"
    return Problem(str(weights.path), "a base without this adapter", found, hint)


def pinned_repo(root: Path, repo: str) -> str:
    """Return where on the hub files certainly are from, `org/name@commit`; empty where that is not known.

    Args:
        root: their directory, or a file in it.
        repo: `org/name@commit` of what was fetched from the hub, else empty.
    """
    cached = _CACHE.search(str(root.absolute()))
    return repo or (f"{cached['id'].replace('--', '/', 1)}@{cached['commit']}" if cached else "")


def trained_base(base: BaseCheckpoint, names: Iterable[str]) -> str:
    """Return the hub id of the base by what adapters say they were trained on; empty where that is not told for sure.

    It is none where they name several, a path, a quantised copy, or another model than the base's own config.

    Args:
        base: the base, whose own place on the hub is not known.
        names: `base_model_name_or_path` of each adapter.
    """
    name, *others = dict.fromkeys(filter(None, names)) or [""]
    stated = base.config.fields.get("_name_or_path")
    known = _last(stated) if isinstance(stated, str) and is_hub_id(stated) else _last(name)
    is_sure = not others and is_hub_id(name) and not _QUANTISED.search(name) and known == _last(name)
    return name if is_sure else ""


def is_hub_id(name: str) -> bool:
    """Return whether a text is a hub id, and not a relative path by its first folder."""
    is_id = bool(_HUB_ID.fullmatch(name)) and not _FOLDERS.fullmatch(name)
    return is_id and not re.fullmatch(r"(checkpoint|global_step)-?\d+", _last(name))


def _directory(root: Path) -> Path:
    return root if root.is_dir() else root.parent


def _hub_ids(base: BaseCheckpoint, repo: str) -> Iterator[str]:
    """Yield the hub ids that the base certainly has."""
    if repo:
        yield repo.partition("@")[0]
    if cached := _CACHE.search(str(base.root.absolute())):
        yield cached["id"].replace("--", "/", 1)


def _commit(base: BaseCheckpoint, repo: str) -> str:
    """Return the base's full commit hash, an empty string where it is not known."""
    cached = _CACHE.search(str(base.root.absolute()))
    return repo.partition("@")[2] or (cached["commit"] if cached else "")


def _is_path_of(base: BaseCheckpoint, name: str) -> bool:
    try:
        return Path(name).resolve(strict=True) in {base.root.resolve(), _directory(base.root).resolve()}
    except (OSError, ValueError, RuntimeError):  # no path at all, a loop of links, or nothing there
        return False


def _last(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()


def _plain(name: str) -> str:
    """Return the last part of a name without the marks of quantised and mirrored copies."""
    return _VENDOR.sub("", _QUANTISED.sub("", _last(name)))


def _other_name(base: BaseCheckpoint, repo: str, name: str) -> IdentityFinding:
    """Return what follows from an adapter that gives none of the base's names."""
    names = base_names(base, repo)
    here = names[0] if names else str(base.root)
    note = f"the adapter says it was trained on {quote(name)}; the base here is {quote(here)}"
    if _plain(name) in {_plain(other) for other in names}:
        return IdentityFinding(note=f"{note}, taken for the same model")
    stated = base.config.fields.get("_name_or_path")
    sure = tuple(_hub_ids(base, repo))
    known = sure or ((stated,) if isinstance(stated, str) and is_hub_id(stated) else ())
    if not known or not is_hub_id(name) or _exists(name):
        return IdentityFinding(note=note)
    where = "" if sure else ", by its config.json"
    hint = f"name the base that it was trained on; {FORCE_HINT}"
    expected = f"the base that the adapter was trained on, {quote(name)}"
    return IdentityFinding(Problem("base_model_name_or_path", expected, f"{quote(known[0])}{where}", hint))


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # longer than any name may be
        return False


def _check_revision(base: BaseCheckpoint, repo: str, config: AdapterConfig) -> IdentityFinding | None:
    """Compare the commits of a base and an adapter that agree on the name."""
    revision, commit = config.revision, _commit(base, repo)
    if revision in {"", "main", commit}:
        return None
    is_same_repo = config.base_model_name.lower() in {name.lower() for name in _hub_ids(base, repo)}
    if _COMMIT.fullmatch(revision) and commit and is_same_repo:
        hint = f"fetch that commit: {config.base_model_name}@{revision}; {FORCE_HINT}"
        return IdentityFinding(Problem("revision", f"the base's commit {revision}", commit, hint))
    here = f"commit {commit}" if commit else "of an unknown commit"
    return IdentityFinding(
        note=f"the adapter says it was trained on revision {quote(revision)} of the base; the base here is {here}"
    )


def _tables(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _sha256(file: TensorFile) -> str:
    digest = hashlib.sha256()
    with OpenFiles() as files:
        for chunk in files.chunks(TensorSource(str(file.path), 0, file.size, "U8", (file.size,))):
            digest.update(chunk)
    return digest.hexdigest()
