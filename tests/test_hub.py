"""Hub ids and paths: what is fetched, what is not, and what is said when it fails.

huggingface_hub reads its environment when imported, so whatever reaches it runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import pytest
import torch

import rawmerge.inputs.hub
from rawmerge.errors import MissingFileError
from rawmerge.inputs.hub import ResolvedSource, resolve_adapter, resolve_base
from tests.builders import folder_bytes, lora_pair, random_tensor, write_adapter
from tests.fake_hub import FakeHub

RESOLVE = """
import json, sys
from pathlib import Path
from rawmerge import errors
from rawmerge.inputs import hub

def resolve(kind, spec):
    try:
        source = getattr(hub, "resolve_" + kind)(spec)
    except errors.RefusedError as error:
        return {"error": type(error).__name__, "text": str(error), "cause": type(error.__cause__).__name__}
    files = [p.relative_to(source.path).as_posix() for p in source.path.rglob("*") if p.is_file()]
    return {"path": str(source.path), "revision": source.revision, "files": sorted(files)}

outcomes = [resolve(*call) for call in json.loads(sys.argv[1])]
print(json.dumps({"outcomes": outcomes, "imports_hub": "huggingface_hub" in sys.modules}))
"""

MERGE = """
import sys, rawmerge
rawmerge.merge_adapter(*sys.argv[1:])
"""

# Leaves a listing of the whole repo in the cache, after which huggingface_hub itself refuses a part of it offline.
CACHE_A_PART = """
from huggingface_hub import snapshot_download, utils
utils.disable_progress_bars()
snapshot_download("org/partial", allow_patterns=["config.json", "model.safetensors.index.json"])
"""

INDEX = "model.safetensors.index.json"
CONFIG = b'{"model_type": "llama"}'
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def index_of(*shard_names: str) -> bytes:
    weight_map = {f"layer.{number}.weight": name for number, name in enumerate(shard_names)}
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


# Every content is its own: the hub's cache fetches files of equal content only once.
WANTED_FILES = {
    **{name: name.encode() for name in SHARDS},
    INDEX: index_of(*SHARDS),
    "config.json": CONFIG,
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer.model": b"tokens",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"licence",
    "README.md": b"# model",
    ".gitattributes": b"*.safetensors filter=lfs",
    "modeling_own.py": b"pass",
    "1_Pooling/config.json": b'{"dim": 8}',
    "2_Dense/model.safetensors": b"small",
    "2_Dense/pytorch_model.bin": b"small too",
}
UNWANTED_NAMES = """
    model.safetensors consolidated.safetensors consolidated-00001-of-00002.safetensors model.fp16.safetensors
    adapter_config.json adapter_model.safetensors pytorch_model.bin pytorch_model.bin.index.json optimizer.pt
    other.safetensors.index.json rng_state.pth last.ckpt model-Q4_K.GGUF tf_model.h5 flax_model.msgpack
    model.onnx rust_model.ot model.tflite original/params.json original/consolidated.00.pth onnx/config.json
    onnx/model.onnx openvino/model.xml checkpoint-500/config.json .cache/notes.txt
    ../outside.py
"""
UNWANTED_FILES = {name: name.encode() for name in UNWANTED_NAMES.split()}


class Outcome(TypedDict, total=False):  # the first three, or an error's three
    path: str
    revision: str
    files: list[str]
    error: str
    text: str
    cause: str


class Result(TypedDict):
    outcomes: list[Outcome]
    imports_hub: bool


@dataclass
class Runner:  # starts processes that share one hub and one cache
    hub: FakeHub
    folder: Path

    def __call__(self, *calls: tuple[str, str], **extra: str) -> list[Outcome]:
        """Return the outcome of each (kind, spec), resolved in one process."""
        return self.resolve(*calls, **extra)["outcomes"]

    def resolve(self, *calls: tuple[str, str], **extra: str) -> Result:
        result: Result = json.loads(self.python(RESOLVE, json.dumps(calls), **extra))
        return result

    def python(self, code: str, *arguments: str, **extra: str) -> str:
        hub_words = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(hub_words) and "proxy" not in k.lower()}
        own = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(Path(rawmerge.inputs.hub.__file__).parents[1]),
        }
        command = [sys.executable, "-c", code, *arguments]
        environment = {**kept, **own, **extra}
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")  # the library prints nothing, nor does it warn
        return done.stdout


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Runner]:
    with FakeHub() as hub:
        yield Runner(hub, tmp_path)


def test_base_fetches_what_a_merge_needs_once(run: Runner) -> None:
    commit = run.hub.commit("org/base", {**UNWANTED_FILES, **WANTED_FILES})
    listing = "/api/models/org/base/revision/main"
    anchor = "/org/base/resolve/main/config.json"

    (first,) = run(("base", "org/base"))
    pinned = {f"/org/base/resolve/{commit}/{name}" for name in set(WANTED_FILES) - {"config.json"}}
    expected = {("GET", listing), *((verb, path) for path in {anchor, *pinned} for verb in ("HEAD", "GET"))}
    assert run.hub.take_requests() == dict.fromkeys(expected, 1)
    assert first["files"] == sorted(WANTED_FILES)
    assert first["revision"] == commit

    (again,) = run(("base", "org/base"))
    assert again == first
    assert run.hub.take_requests() == {("GET", listing): 1, ("HEAD", anchor): 1}

    offline = run(("base", "org/base"), ("base", "org/base@main"), ("base", f"org/base@{commit}"), HF_HUB_OFFLINE="1")
    assert offline == [first, first, first]
    assert not run.hub.take_requests()


def test_single_file_base_and_adapter_fetch_their_files_only(run: Runner) -> None:
    base = {"model.safetensors": b"weights", "config.json": CONFIG}
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "tokenizer.json": b"{}"}
    adapter["README.md"] = b"# lora"  # its licence is told in the output's card
    run.hub.commit("org/single", {**base, "pytorch_model.bin": b"twin", "other.safetensors": b"other"})
    run.hub.commit("org/bare", {"model.safetensors": b"weights"})
    run.hub.commit("org/lora", {**adapter, "adapter_model.bin": b"twin", "config.json": CONFIG})
    calls = [("base", "org/single"), ("base", "org/bare"), ("adapter", "org/lora")]
    online = run(*calls)
    assert [outcome["files"] for outcome in online] == [sorted(base), ["model.safetensors"], sorted(adapter)]
    run.hub.take_requests()
    assert run(*calls, HF_HUB_OFFLINE="1") == online
    assert not run.hub.take_requests()


def test_adapters_of_other_formats_fetch_their_files_only(run: Runner) -> None:
    pickled = {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"}
    mlx = {"adapter_config.json": b"{ }", "adapters.safetensors": b"mlx"}
    run.hub.commit("org/pickle", {**pickled, "optimizer.pt": b"", "pytorch_model.bin": b"large"})
    run.hub.commit("org/mlx", {**mlx, "0000100_adapters.safetensors": b"earlier"})
    run.hub.commit("org/kohya", {"style.safetensors": b"kohya", "README.md": b"", "style.png": b"picture"})
    calls = [("adapter", "org/pickle"), ("adapter", "org/mlx")]
    online = run(*calls)
    assert [outcome["files"] for outcome in online] == [sorted(pickled), sorted(mlx)]
    (kohya, either) = run(("adapter", "org/kohya"), ("either", "org/kohya"))
    assert Path(kohya["path"]).name == "style.safetensors"
    assert Path(kohya["path"]).read_bytes() == b"kohya"
    assert either == kohya
    run.hub.take_requests()
    assert run(*calls, HF_HUB_OFFLINE="1") == online
    assert not run.hub.take_requests()


def test_pickles_of_a_base_are_fetched_where_no_safetensors_stand_beside_them(run: Runner) -> None:
    shards = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    index = "pytorch_model.bin.index.json"
    sharded = {index: index_of(*shards), **{name: name.encode() for name in shards}, "config.json": CONFIG}
    single = {"pytorch_model.bin": b"pickle", "config.json": CONFIG, "tokenizer.json": b"tokens"}
    both = {"model.safetensors": b"weights", "config.json": CONFIG}
    others = {"optimizer.bin": b"o", "training_args.bin": b"t", "tf_model.h5": b"h", "pytorch_model.fp16.bin": b"f"}
    run.hub.commit("org/sharded", {**sharded, **others, "pytorch_model.bin": b"another"})
    run.hub.commit("org/single", {**single, **others})
    run.hub.commit("org/bare", {"pytorch_model.bin": b"alone"})
    run.hub.commit("org/both", {**both, **sharded, "pytorch_model.bin": b"twin"})
    calls = [("base", f"org/{name}") for name in ("sharded", "single", "bare", "both")]
    online = run(*calls)
    expected = [sorted(sharded), sorted(single), ["pytorch_model.bin"], sorted(both)]
    assert [outcome["files"] for outcome in online] == expected
    run.hub.take_requests()
    assert run(*calls, HF_HUB_OFFLINE="1") == online
    assert not run.hub.take_requests()


def test_a_pickled_repo_merges_as_its_files_do(run: Runner) -> None:
    folder = run.folder / "local"
    folder.mkdir()
    torch.save({"q.weight": random_tensor((12, 8)), "k.weight": random_tensor((3, 8))}, folder / "pytorch_model.bin")
    (folder / "config.json").write_bytes(CONFIG)
    adapter = write_adapter(run.folder / "adapter", lora_pair("q", 12, 8))
    run.hub.commit("org/pickled", folder)
    run.python(MERGE, "org/pickled", str(adapter), "from-hub")
    run.python(MERGE, str(folder), str(adapter), "from-files")
    one, other = (folder_bytes(run.folder / name) for name in ("from-hub", "from-files"))
    assert one["model.safetensors"] == other["model.safetensors"]
    assert sorted(one) == sorted(other)
    assert "pytorch_model.bin" not in one


def test_revision_pins_one_commit(run: Runner) -> None:
    old = run.hub.commit("org/base", {"model.safetensors": b"old", "config.json": CONFIG}, "v1")
    pull = run.hub.commit("org/base", {"model.safetensors": b"pull", "config.json": CONFIG}, "refs/pr/1")
    new = run.hub.commit("org/base", {"model.safetensors": b"new", "config.json": CONFIG})
    specs = ["org/base", "org/base@v1", f"org/base@{old}", "org/base@refs/pr/1"]
    outcomes = run(*(("base", spec) for spec in specs))
    assert [outcome["revision"] for outcome in outcomes] == [new, old, old, pull]
    weights = [Path(outcome["path"], "model.safetensors").read_bytes() for outcome in outcomes]
    assert weights == [b"new", b"old", b"old", b"pull"]


def test_a_branch_that_moves_meanwhile_cannot_mix_two_commits(run: Runner) -> None:
    files = {"model.safetensors": b"old", "config.json": CONFIG}
    old = run.hub.commit("org/early", files)
    run.hub.commit("org/late", files)
    run.hub.afterwards["/api/models/org/early/revision/main"] = lambda: run.hub.commit("org/early", files)
    run.hub.afterwards["/org/late/resolve/main/config.json"] = lambda: run.hub.commit("org/late", files)
    early, late = run(("base", "org/early"), ("base", "org/late"))
    assert early["error"] == "HubError"
    assert f"expected commit {old}" in early["text"]
    assert "run again" in early["text"]
    assert late["files"] == sorted(files)


REFUSED = {
    # what is typed: (kind, error class, its cause, words of the message)
    "org/missing": ("base", "HubError", "RepositoryNotFoundError", ["no such repo", "hf auth login"]),
    "org/gated": ("base", "HubError", "GatedRepoError", ["gated repo", "ask for access"]),
    "org/base@v9": ("base", "HubError", "RevisionNotFoundError", ["no such revision", "follows the @"]),
    "org/a--b": ("base", "HubError", "HFValidationError", ["does not allow"]),
    "org/gguf": ("base", "HubError", "NoneType", ["model.safetensors in commit", "'model.gguf'"]),
    "org/lora": ("base", "HubError", "NoneType", ["this is an adapter"]),
    "org/empty": ("adapter", "HubError", "NoneType", ["adapter_model.safetensors in", "repo of a PEFT adapter"]),
    "org/base": ("adapter", "HubError", "NoneType", ["adapter_config.json", "repo of a PEFT adapter"]),
    "org/escape": ("base", "CheckpointError", "NoneType", ["plain", "../../secret.safetensors"]),
    "org/absolute": ("base", "CheckpointError", "NoneType", ["plain", "/etc/x.safetensors"]),
    "org/garbage": ("base", "CheckpointError", "StrictJsonError", [INDEX]),
    "org/gap": ("base", "HubError", "NoneType", [f"{SHARDS[1]} in commit", "incomplete"]),
    "org/pickles": ("base", "CheckpointError", "NoneType", ["plain", "../pytorch_model.bin"]),
}  # fmt: skip


def test_refusals_name_the_repo_the_finding_and_a_way_out(run: Runner) -> None:
    run.hub.commit("org/gated", {"model.safetensors": b"", "config.json": CONFIG}, is_gated=True)
    run.hub.commit("org/base", {"model.safetensors": b""})
    run.hub.commit("org/gguf", {"model.gguf": b""})
    run.hub.commit("org/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    run.hub.commit("org/empty", {"adapter_config.json": b"{}", "pytorch_model.bin": b""})
    run.hub.commit("org/escape", {INDEX: index_of("../../secret.safetensors"), "config.json": CONFIG})
    run.hub.commit("org/absolute", {INDEX: index_of("/etc/x.safetensors"), "config.json": CONFIG})
    run.hub.commit("org/garbage", {INDEX: b"<html>", "config.json": CONFIG})
    run.hub.commit("org/gap", {INDEX: index_of(*SHARDS), SHARDS[0]: b"", "config.json": CONFIG})
    run.hub.commit("org/pickles", {"pytorch_model.bin.index.json": index_of("../pytorch_model.bin")})
    outcomes = run(*((kind, spec) for spec, (kind, *_) in REFUSED.items()))
    for (spec, (_, error, cause, words)), outcome in zip(REFUSED.items(), outcomes, strict=True):
        assert (outcome.get("error"), outcome.get("cause")) == (error, cause), outcome
        assert [word for word in [spec, *words] if word not in outcome["text"]] == [], outcome
    fetched = [path for verb, path in run.hub.requests if verb == "GET" and path.endswith(".safetensors")]
    assert fetched == []


def test_an_incomplete_cache_is_refused_offline_and_works_once_it_has_what_a_merge_needs(run: Runner) -> None:
    run.hub.commit("org/partial", {**UNWANTED_FILES, **WANTED_FILES})
    run.python(CACHE_A_PART)
    run.hub.take_requests()
    uncached, partial = run(("base", "org/uncached"), ("base", "org/partial"), HF_HUB_OFFLINE="1")
    assert (uncached["error"], partial["error"]) == ("HubError", "HubError")
    assert "'org/uncached': expected revision main in the hub's cache" in uncached["text"]
    assert "unset HF_HUB_OFFLINE" in uncached["text"]
    assert f"expected {SHARDS[1]} in the hub's cache" in partial["text"]
    assert not run.hub.take_requests()

    (online,) = run(("base", "org/partial"))
    run.hub.take_requests()
    assert run(("base", "org/partial"), HF_HUB_OFFLINE="1") == [online]
    assert online["files"] == sorted(WANTED_FILES)
    assert not run.hub.take_requests()


def test_an_unreachable_hub_is_refused_even_with_a_cache(run: Runner) -> None:
    run.hub.commit("org/base", {"model.safetensors": b"", "config.json": CONFIG})
    run(("base", "org/base"))
    (outcome,) = run(("base", "org/base"), HF_ENDPOINT="http://127.0.0.1:9")
    assert outcome["error"] == "HubError"
    assert "HF_HUB_OFFLINE=1 uses what is cached" in outcome["text"]


def test_a_local_path_never_imports_huggingface_hub(run: Runner) -> None:
    (run.folder / "org" / "base").mkdir(parents=True)
    (run.folder / "base.safetensors").touch()
    specs = ["org/base", "base.safetensors", str(run.folder), "missing/model.safetensors", "a/b/c", "./a/b"]
    result = run.resolve(*(("base", spec) for spec in specs))
    assert not result["imports_hub"]
    assert [outcome.get("path") for outcome in result["outcomes"]] == [*specs[:3], None, None, None]
    assert not run.hub.requests


NOT_HUB_IDS = [
    "", "base", "./org/name", "../org/name", "/org/name", "~/org-that-is-not/name", "~nobody-at-all/name",
    "org/name/more", "org\\name", "org/name.safetensors", "org/model.json", "org/", "org/name@", "org/name@a/b",
    "org/name@refs/../x", ".org/name", "org/.name", "org/na me", "org/näme", "org/name\n", "org/name\0",
]  # fmt: skip


@pytest.mark.parametrize("spec", NOT_HUB_IDS)
def test_what_cannot_be_a_hub_id_is_a_missing_path(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError) as caught:
        resolve_base(spec)
    (problem,) = caught.value.problems
    assert problem.subject == spec
    assert "org/name@revision" in problem.hint


def test_a_path_object_is_local_even_if_it_looks_like_a_hub_id() -> None:
    with pytest.raises(MissingFileError, match="no such file"):
        resolve_adapter(Path("org/name"))


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    assert resolve_base("~/base") == ResolvedSource(tmp_path / "base")


def test_a_broken_link_is_a_missing_path_not_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/name").symlink_to("nowhere")
    with pytest.raises(MissingFileError, match="org/name"):
        resolve_base("org/name")


def test_what_is_not_said_to_be_a_base_is_fetched_as_the_adapter_it_is(run: Runner) -> None:
    run.hub.commit("org/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", "config.json": b"{}"})
    (lora,) = run(("either", "org/lora"))
    assert lora["files"] == ["adapter_config.json", "adapter_model.safetensors"]
