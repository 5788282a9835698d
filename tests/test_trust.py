"""A local path causes no network call, and nothing in a checkpoint is executed, whichever command reads it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rawmerge
from tests.builders import folder_bytes, lora_pair, random_tensor, tiny_merge, write_adapter

ROOT = Path(rawmerge.__file__).parents[1]
#: Not the user's own settings of the hub and of Python, so that a fetch would be tried.
_HUB_WORDS = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_", "PYTHON")


def environment(home: Path, **extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_HUB_WORDS)}
    own = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT)}
    return {**kept, **own, **extra}


# Runs command lines one after the other in one process, and tells of each its exit code and, in the end, every use of
# a socket, by whatever library, that Python's audit events show, and whether the hub's client was imported.
RUN_ALL = """
import json, socket, sys

used = []

def refuse(*arguments, **options):
    used.append(["socket", str(arguments)])
    raise OSError("no network here")

def watch(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")):
        used.append([event, str(arguments)[:200]])
        raise OSError("no network here")

commands, is_watched = json.loads(sys.argv[1])
if is_watched:
    sys.addaudithook(watch)
    socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
    class Refused(socket.socket):
        __init__ = refuse
    socket.socket = Refused

from click.testing import CliRunner
from rawmerge.cli import cli

results = [CliRunner().invoke(cli, command) for command in commands]
told = [[result.exit_code, result.stderr[-500:]] for result in results]
print(json.dumps({"told": told, "used": used, "imports_hub": "huggingface_hub" in sys.modules}))
"""


def run_all(folder: Path, commands: list[list[str]], *, is_watched: bool, **extra: str) -> dict[str, Any]:
    """Run them in a process that may not use a socket, or in one that has a network without any route."""
    prefix = [] if is_watched else ["unshare", "-rn"]
    done = subprocess.run(
        [*prefix, sys.executable, "-c", RUN_ALL, json.dumps([commands, is_watched])],
        cwd=folder,
        env=environment(folder / "home", **extra),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def can_unshare() -> bool:
    command = shutil.which("unshare")
    return (
        command is not None
        and subprocess.run([command, "-rn", "true"], capture_output=True, check=False).returncode == 0
    )


NO_NAMESPACE = pytest.mark.skipif(not can_unshare(), reason="this kernel lets no process have a network of its own")
CUT_OFF = pytest.mark.parametrize(
    "is_watched", [pytest.param(True, id="no sockets"), pytest.param(False, id="no routes", marks=NO_NAMESPACE)]
)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Return a folder with a base and an adapter under names of all kinds, some of which look like hub ids."""
    base, adapter = tiny_merge(tmp_path)
    fields = json.loads((adapter / "adapter_config.json").read_text())
    told = {"base_model_name_or_path": "org/trained-on", "revision": "v1"}  # what must not be looked up
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, **told}))
    for place in ("org", "org/at@v1", "home", "deep/er/folder"):
        shutil.copytree(base, tmp_path / place / "base")
        shutil.copytree(adapter, tmp_path / place / "lora")
    save_file({"q.weight": random_tensor((6, 5))}, tmp_path / "one.safetensors")
    write_adapter(tmp_path / "small", lora_pair("q", 6, 5))
    return tmp_path


PAIRS = [
    ("base", "adapter"),
    ("./base", "../{name}/adapter"),
    ("{folder}/base", "{folder}/adapter"),
    ("org/base", "org/lora"),
    ("org/at@v1/base", "./org/at@v1/lora"),
    ("~/base", "~/lora"),
    ("deep/er/folder/base/", "deep/er/folder/lora/adapter_config.json"),
    ("base/model.safetensors.index.json", "adapter/adapter_model.safetensors"),
    ("one.safetensors", "small"),
]
MISSING = ["nothing", "./org/nothing", "../nothing", "/nothing/at/all", "~/nothing", "a/b/c", "org/nothing.safetensors"]


def commands_of(number: int, base: str, adapter: str) -> list[list[str]]:
    output = f"out{number}"
    return [
        ["inspect", base],
        ["inspect", adapter],
        ["plan", base, adapter],
        ["plan", base, adapter, "--json", "--dtype", "float32"],
        ["merge", base, adapter, "-o", output, "--dry-run"],
        ["merge", base, adapter, "-o", output, "--verify", "--checksum"],
        ["merge", base, adapter, "-o", output, "--overwrite", "--link"],
        ["verify", output],
        ["verify", output, "--base", base, "--adapter", adapter],
    ]


@CUT_OFF
def test_no_command_on_local_paths_uses_the_network(world: Path, is_watched: bool) -> None:
    names = {"folder": str(world), "name": world.name}
    commands = [["demo", "demo"], ["verify", "demo/merged", "--base", "demo/base", "--adapter", "demo/adapter"]]
    for number, (base, adapter) in enumerate(PAIRS):
        commands += commands_of(number, base.format(**names), adapter.format(**names))
    commands += [["merge", "org/base", "org/lora", "-o", "org/merged"], ["verify", "org/merged"]]
    commands += [["merge", "base", "adapter", "-o", "consumed", "--consume-base"]]
    done = run_all(world, commands, is_watched=is_watched)
    assert [(*command, told) for command, told in zip(commands, done["told"], strict=True) if told[0]] == []
    assert (done["used"], done["imports_hub"]) == ([], False)


@CUT_OFF
def test_a_path_that_is_missing_is_not_looked_for_on_the_hub(world: Path, is_watched: bool) -> None:
    commands = [["inspect", path] for path in MISSING]
    commands += [["plan", path, "adapter"] for path in MISSING] + [["plan", "base", path] for path in MISSING]
    commands += [["merge", path, path, "-o", "out"] for path in MISSING]
    commands += [["verify", path] for path in [*MISSING, "org/nothing"]]  # an output is local whatever its name
    commands += [["verify", "base", "--base", path, "--adapter", path] for path in MISSING]
    done = run_all(world, commands, is_watched=is_watched)
    assert [(*command, told) for command, told in zip(commands, done["told"], strict=True) if told[0] != 3] == []
    assert (done["used"], done["imports_hub"]) == ([], False)
    assert not (world / "out").exists()


HUB_IDS = [["inspect", "org/nothing"], ["plan", "org/nothing@v1", "adapter"], ["merge", "base", "org/no", "-o", "out"]]


@CUT_OFF
def test_a_hub_id_without_a_network_is_refused_at_once_and_says_what_to_do(world: Path, is_watched: bool) -> None:
    started = time.monotonic()
    done = run_all(world, HUB_IDS, is_watched=is_watched)
    assert time.monotonic() - started < 30  # no retries for minutes; most of it is a busy machine's start
    for code, text in done["told"]:
        assert code == 3, text
        assert "of a repo on the hub (no local path has this name)" in text
        assert "check the network; HF_HUB_OFFLINE=1 uses what is cached; or name a local directory" in text
    assert bool(done["used"]) == is_watched  # so what watches sees the client's attempts
    assert done["imports_hub"]
    assert not (world / "out").exists()


@CUT_OFF
def test_a_hub_id_offline_is_not_even_tried(world: Path, is_watched: bool) -> None:
    done = run_all(world, HUB_IDS, is_watched=is_watched, HF_HUB_OFFLINE="1")
    for code, text in done["told"]:
        assert code == 3, text
        assert "in the hub's cache, as HF_HUB_OFFLINE is set, found nothing cached of it" in text
        assert "unset HF_HUB_OFFLINE to fetch it, or name a local directory" in text
    assert done["used"] == []
    assert not (world / "out").exists()


MODULES = [
    *("modeling_x", "configuration_x", "tokenization_x"),
    *("setup", "conftest", "sitecustomize", "usercustomize", "__init__", "__main__"),
    *("rawmerge", "torch", "safetensors", "numpy", "click", "tqdm", "huggingface_hub"),
    *("json", "typing", "gc", "re", "os", "ctypes", "hashlib", "tokenize", "_kernel"),
]
PACKAGES = ["rawmerge", "torch", "kernels", "numpy"]


class Payload:
    """What runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def lay_traps(folder: Path, marker: Path) -> dict[str, bytes]:
    """Put into a folder what would write to `marker` if anything ran it; return the files that a merge copies."""
    paths = [*(f"{name}.py" for name in MODULES), *(f"{name}/__init__.py" for name in PACKAGES)]
    copied = {path: f"open({str(marker)!r}, 'a').write({path!r})\n".encode() for path in paths}
    for path, code in copied.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(code)
    pickled = pickle.dumps({"state": Payload(f"echo pickle >> '{marker}'")})
    for path in ("training_args.bin", "optimizer.pt", "scheduler.pt", "pytorch_model.bin", "rng_state.pth"):
        (folder / path).write_bytes(pickled)
    lines = f"import os; os.system('echo pth >> {marker}')\n"
    for path in ("distutils-precedence.pth", "__editable__.pth"):
        (folder / path).write_text(lines)
    for path in ("_kernel.abi3.so", "libtorch.so", "libc.so.6", "setup.cfg", "pyproject.toml", "pyvenv.cfg"):
        (folder / path).write_text("home = .\n")
    return copied


@pytest.fixture
def trapped(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """Return a folder with a base and an adapter that are full of traps, and what a merge copies of them."""
    base, adapter = tiny_merge(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "bin").mkdir()
    # as pip writes it, in a folder of its own
    (tmp_path / "bin/rawmerge").write_text("import sys\nfrom rawmerge.__main__ import main\nsys.exit(main())\n")
    copied = lay_traps(base, tmp_path / "sprung")
    lay_traps(adapter, tmp_path / "sprung")
    for path, fields in (
        (base / "config.json", {"auto_map": {"AutoModel": "modeling_x.Model", "AutoConfig": "configuration_x.Config"}}),
        (adapter / "adapter_config.json", {"auto_mapping": {"base_model_class": "M", "parent_library": "modeling_x"}}),
    ):
        more = {"custom_code": True, "trust_remote_code": True} if path.parent == base else {}
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields, **more}))
    (base / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_x.Tokenizer", null]}}')
    return tmp_path, copied


def run_in(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command of Python with a checkpoint as the working directory."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=environment(folder.parent / "home"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_traps_spring(trapped: tuple[Path, dict[str, bytes]]) -> None:
    """What the tests below rely on; with `-m`, Python itself looks for modules in the working directory first."""
    folder = trapped[0]
    sprung = folder / "sprung"
    for command in (
        ["-c", "import modeling_x"],
        ["-c", "import kernels"],
        ["-c", "import pickle; pickle.load(open('training_args.bin', 'rb'))"],
        ["-c", "import site; site.addsitedir('.')"],
        ["-m", "rawmerge", "--version"],
    ):
        run_in(folder / "base", *command)
        assert sprung.exists(), command
        sprung.unlink()


def test_nothing_in_a_checkpoint_is_executed(trapped: tuple[Path, dict[str, bytes]]) -> None:
    folder, copied = trapped
    script = folder / "bin/rawmerge"
    replayed = ("--base", "../base", "--adapter", "../adapter")
    for command in (
        ["merge", ".", "../adapter", "-o", "../out", "--verify", "--tokenizer", "adapter"],
        ["plan", ".", "../adapter"],
        ["inspect", "."],
        ["inspect", "../adapter"],
        ["verify", "../out", *replayed, "--tokenizer", "adapter"],
        ["demo", "../demo"],
    ):
        done = run_in(folder / "base", script, *command)
        assert done.returncode == 0, done.stderr
    for command in (["plan", "../base", "."], ["inspect", "."]):
        done = run_in(folder / "adapter", script, *command)
        assert done.returncode == 0, done.stderr
    done = run_in(folder / "base", "-P", "-m", "rawmerge", "verify", "../out")
    assert done.returncode == 0, done.stderr
    assert not (folder / "sprung").exists()
    made = folder_bytes(folder / "out")
    assert {name: made.get(name) for name in copied} == copied  # they came along, as files
    assert not [name for name in made if name.endswith((".bin", ".pt", ".pth"))]


def test_a_payload_in_an_adapter_s_pickle_is_refused(trapped: tuple[Path, dict[str, bytes]]) -> None:
    folder = trapped[0]
    (folder / "adapter/adapter_model.safetensors").unlink()
    forms: dict[str, Any] = {
        "archive": {"_use_new_zipfile_serialization": True},
        "old": {"_use_new_zipfile_serialization": False},
    }
    for form, options in {**forms, "plain": {}}.items():
        tensors = {"base_model.model.q.lora_A.weight": torch.ones(4, 8), "x": Payload(f"echo > '{folder}/sprung'")}
        path = folder / "adapter/adapter_model.bin"
        path.write_bytes(pickle.dumps(tensors)) if form == "plain" else torch.save(tensors, path, **options)
        for command in (["merge", "../base", ".", "-o", "../out"], ["inspect", "."]):
            done = run_in(folder / "adapter", folder / "bin/rawmerge", *command)
            assert done.returncode == 3, (form, command, done.stdout + done.stderr)
    assert not (folder / "sprung").exists()
    assert not (folder / "out").exists()
