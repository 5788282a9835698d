"""README says what is: its scripts exist, its tables are the code's own. tests/test_examples.py runs its examples."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import click

from rawmerge import command_group, errors
from rawmerge.cli import cli
from rawmerge.formats import adapter_fields as fields
from rawmerge.methods import ADAPTER_KINDS
from tests.test_architecture import FLOORS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def rows_after(heading: str) -> list[list[str]]:
    """Return the cells of the first table after `heading`, without its two head lines."""
    lines = README[README.index(heading) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def code_words(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found
    return found[1]


def test_every_script_exists_and_is_executable() -> None:
    for name in set(re.findall(r"(?:scripts|\.ci)/\w+(?:\.py)?", README)):
        assert (ROOT / name).stat().st_mode & 0o100, name


def test_shell_scripts_are_short() -> None:
    for path in (path for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix):
        assert len(path.read_text().splitlines()) < 20, path


def test_the_option_table_is_the_command_s() -> None:
    options = {name for row in rows_after("| `merge` option") for name in code_words(row[0])}
    known = {
        name
        for parameter in cli.commands["merge"].params
        if isinstance(parameter, click.Option)
        for name in parameter.opts
    }
    assert options == known


def test_the_field_tables_are_the_code_s() -> None:
    followed, init, variants, ignored, refused = (row for row in rows_after("What each field of") if code_words(row[0]))
    assert code_words(followed[0]) == fields.SUPPORTED_FIELDS
    assert code_words(init[0]) == {"init_lora_weights"}
    assert code_words(init[1]) == fields.PLAIN_INITS | fields.REPEATED_INITS
    assert code_words(variants[0]) | {"init_lora_weights"} == fields.LORA_VARIANT_FIELDS.followed.keys()
    assert code_words(ignored[0]) == fields.IGNORED_FIELDS | set(fields.LORA_VARIANT_FIELDS.ignored)
    assert code_words(refused[0]) == fields.REFUSED_FIELDS.keys()


def test_the_tables_of_kinds_are_the_registry_s() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/make_kind_tables.py", "--check"], check=False)
    assert done.returncode == 0, "run scripts/make_kind_tables.py"
    assert [kind for kind in ADAPTER_KINDS if f"`{kind}`" not in README] == []


def test_the_exit_codes_are_the_code_s() -> None:
    stated = {int(code) for row in rows_after("## Exit codes") for code in row[0].split(", ")}
    raised = {
        value.exit_code
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.RawmergeError)
    }
    assert stated == raised | {0, 2, command_group.INTERRUPTED, 128 + signal.SIGTERM}


def test_the_floors_are_the_house_s() -> None:
    rows = rows_after("| floor | modules")
    named: list[str] = []
    for floors, modules, _ in rows:
        low, _, high = floors.partition("-")
        rooms = [room for name in code_words(modules) for room in FLOORS if room == name or room.startswith(f"{name}.")]
        assert {int(low), int(high or low)} == {
            min(map(FLOORS.__getitem__, rooms)),
            max(map(FLOORS.__getitem__, rooms)),
        }, modules
        named += rooms
    assert sorted(named) == sorted(FLOORS)
