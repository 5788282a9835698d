"""What the system lets a process take, read from made-up trees of `/proc` and groups; sizes as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rawmerge.byte_sizes import parse_bytes
from rawmerge.memory.limit import group_limit

V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw"
V1_MOUNT = "31 23 0:27 {root} /sys/fs/cgroup/memory rw,nosuid shared:5 - cgroup cgroup rw,memory"
CPU_MOUNT = "32 23 0:28 / /sys/fs/cgroup/cpu rw,nosuid shared:6 - cgroup cgroup rw,cpu"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1B", 1),
        ("4096 b", 4096),
        ("512M", 512 * 2**20),
        ("512MiB", 512 * 2**20),
        ("512MB", 512 * 10**6),
        ("2GiB", 2 * 2**30),
        ("2g", 2 * 2**30),
        (" 3 kB ", 3000),
        ("1.5G", 3 * 2**29),
        ("1T", 2**40),
        ("100B", 100),
        ("55.3MB", 55_300_000),  # no float is exactly that
        ("9007199254740993B", 2**53 + 1),
    ],
)
def test_sizes_are_read_as_gnu_tools_read_them(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "0B", "0.0001B", "-1", "1X", "GiB", "1 0", "1e9", "0x10", "1GiBs", "\uff15\uff11\uff12M", "5\N{KELVIN SIGN}B"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["512", "1.5", "0"])
def test_a_number_without_a_unit_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(ValueError, match=f"a size with its unit, such as 512MiB, not '{text}'"):
        parse_bytes(text)


def make_tree(root: Path, groups: str, mounts: list[str], files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text("".join(f"{mount}\n" for mount in mounts))
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text + "\n")
    return root


def test_the_lowest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {"a/memory.max": "5000", "a/b/memory.max": "max", "a/b/memory.high": "max", "other/memory.max": "7"}
    root = make_tree(tmp_path, "0::/a/b\n", [V2_MOUNT.format(root="/")], files)
    limit = group_limit(root)
    assert limit is not None
    assert (limit.byte_count, limit.is_hard) == (5000, True)
    assert limit.origin.endswith("sys/fs/cgroup/a/memory.max")


def test_a_throttled_group_has_a_soft_limit(tmp_path: Path) -> None:
    files = {"a/memory.max": "5000", "a/memory.high": "4000"}
    limit = group_limit(make_tree(tmp_path, "0::/a\n", [V2_MOUNT.format(root="/")], files))
    assert limit is not None
    assert (limit.byte_count, limit.is_hard) == (4000, False)


def test_version_1_is_read_beside_version_2(tmp_path: Path) -> None:
    groups = "4:memory:/job/7\n2:cpu,cpuacct:/job\n0::/\n"
    files = {"memory/job/7/memory.limit_in_bytes": "6000", "memory/memory.limit_in_bytes": "9223372036854771712"}
    mounts = [CPU_MOUNT, V1_MOUNT.format(root="/"), V2_MOUNT.format(root="/")]
    limit = group_limit(make_tree(tmp_path, groups, mounts, files))
    assert limit is not None
    assert (limit.byte_count, limit.is_hard) == (6000, True)


@pytest.mark.parametrize("mounted", ["/docker/1", "/elsewhere"])
def test_a_container_sees_its_own_group_as_the_top(tmp_path: Path, mounted: str) -> None:
    """Its group's path is the host's, of which the part above the mount is not there."""
    files = {"memory/memory.limit_in_bytes": "8000", "memory/docker/1/memory.limit_in_bytes": "1"}
    root = make_tree(tmp_path, "4:memory:/docker/1\n", [V1_MOUNT.format(root=mounted)], files)
    limit = group_limit(root)
    assert limit is not None
    assert limit.byte_count == 8000


@pytest.mark.parametrize(
    ("groups", "mounts", "files"),
    [
        ("", [], {}),
        ("0::/\n", [V2_MOUNT.format(root="/")], {}),
        ("0::/a\n", [V2_MOUNT.format(root="/")], {"a/memory.max": "max"}),
        ("4:memory:/a\n", [V1_MOUNT.format(root="/")], {"memory/a/memory.limit_in_bytes": "9223372036854771712"}),
        ("2:cpu:/a\n", [CPU_MOUNT], {"cpu/a/memory.limit_in_bytes": "5"}),
        ("nonsense\n", ["nonsense", "a b c - d"], {}),
    ],
)
def test_no_limit_is_none(tmp_path: Path, groups: str, mounts: list[str], files: dict[str, str]) -> None:
    assert group_limit(make_tree(tmp_path, groups, mounts, files)) is None


def test_a_system_without_proc_has_no_limit(tmp_path: Path) -> None:
    assert group_limit(tmp_path) is None
