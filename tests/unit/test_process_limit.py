"""What bounds this process, on machines that are folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from modelyard_server.devices.process_limit import (
    LimitSource,
    ProcessLimit,
    headroom,
    process_limit_bytes,
)

GIB = 2**30
MACHINE = {"proc/meminfo": "MemTotal:       16777216 kB\nMemFree:         1 kB\n"}
UNLIMITED_V1 = "9223372036854771712\n"
V2_MOUNT = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"


def machine(root: Path, files: Mapping[str, str]) -> Path:
    """A root folder with these files, and 16 GiB."""
    for name, text in {**MACHINE, **files}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def limit(root: Path, files: Mapping[str, str]) -> tuple[int, LimitSource]:
    found = process_limit_bytes(machine(root, files))
    return found.bytes, found.source


def v2(group: str, **limits: str) -> dict[str, str]:
    """Files of a machine with the unified hierarchy. Folders are written with "__" for "/"."""
    return {
        "proc/self/cgroup": f"0::{group}\n",
        "proc/self/mountinfo": V2_MOUNT,
        **{
            f"sys/fs/cgroup/{folder.replace('__', '/')}/memory.max": text
            for folder, text in limits.items()
        },
    }


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert limit(tmp_path, {}) == (16 * GIB, LimitSource.MACHINE)


def test_the_process_s_own_group_is_asked(tmp_path: Path) -> None:
    files = v2("/a/b", a__b=f"{GIB}\n", a__c="17\n", other="18\n")
    assert limit(tmp_path, files) == (GIB, LimitSource.CGROUP_V2)


def test_the_narrowest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    files = v2("/a/b/c", a=f"{2 * GIB}\n", a__b="max\n", a__b__c=f"{3 * GIB}\n")
    assert limit(tmp_path, files) == (2 * GIB, LimitSource.CGROUP_V2)


def test_the_group_at_the_mount_itself_counts(tmp_path: Path) -> None:
    files = v2("/") | {"sys/fs/cgroup/memory.max": f"{GIB}\n"}
    assert limit(tmp_path, files) == (GIB, LimitSource.CGROUP_V2)


def test_nothing_above_the_mount_is_asked(tmp_path: Path) -> None:
    files = v2("/a", a="max\n") | {"sys/fs/memory.max": "1\n", "memory.max": "1\n"}
    assert limit(tmp_path, files) == (16 * GIB, LimitSource.MACHINE)


def test_a_limit_above_the_machine_s_memory_is_none(tmp_path: Path) -> None:
    assert limit(tmp_path, v2("/a", a=f"{17 * GIB}\n")) == (16 * GIB, LimitSource.MACHINE)


@pytest.mark.parametrize("text", ["max\n", "", "\n", "-1\n", "1e9\n", "٣\n", "9" * 21, "\0\xff"])
def test_what_is_no_number_is_no_limit(tmp_path: Path, text: str) -> None:
    assert limit(tmp_path, v2("/a", a=text)) == (16 * GIB, LimitSource.MACHINE)


def test_the_first_generation_has_a_hierarchy_for_memory_alone(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "9:pids:/p\n4:cpuacct,memory:/box/app\n1:name=systemd:/s\n0::/u\n",
        "proc/self/mountinfo": V1_MOUNT
        + "30 31 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n",
        "sys/fs/cgroup/memory/box/app/memory.limit_in_bytes": UNLIMITED_V1,
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys/fs/cgroup/pids/p/memory.limit_in_bytes": "7\n",
    }
    assert limit(tmp_path, files) == (4 * GIB, LimitSource.CGROUP_V1)


def test_where_both_generations_are_mounted_the_narrower_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/m\n0::/u\n",
        "proc/self/mountinfo": V1_MOUNT
        + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/memory/m/memory.limit_in_bytes": f"{5 * GIB}\n",
        "sys/fs/cgroup/unified/u/memory.max": f"{3 * GIB}\n",
    }
    assert limit(tmp_path, files) == (3 * GIB, LimitSource.CGROUP_V2)
    (tmp_path / "sys/fs/cgroup/unified/u/memory.max").write_text("max")
    assert process_limit_bytes(tmp_path).source is LimitSource.CGROUP_V1


def test_a_container_s_mount_shows_its_own_group_as_the_root(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/1f/app\n",
        "proc/self/mountinfo": V1_MOUNT.replace(" / ", " /docker/1f "),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/app/memory.limit_in_bytes": f"{GIB}\n",
    }
    assert limit(tmp_path, files) == (GIB, LimitSource.CGROUP_V1)


@pytest.mark.parametrize("group", ["/../outside", "/elsewhere/app"])
def test_a_group_out_of_sight_leaves_the_root_of_the_mount(tmp_path: Path, group: str) -> None:
    files = {
        "proc/self/cgroup": f"0::{group}\n",
        "proc/self/mountinfo": V2_MOUNT.replace(" / ", " /box "),
        "sys/fs/cgroup/memory.max": f"{GIB}\n",
        "sys/fs/outside/memory.max": "1\n",
    }
    assert limit(tmp_path, files) == (GIB, LimitSource.CGROUP_V2)


def test_a_mount_point_may_have_blanks(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a b\n",
        "proc/self/mountinfo": V2_MOUNT.replace("/sys/fs/cgroup", "/my\\040groups"),
        "my groups/a b/memory.max": f"{GIB}\n",
    }
    assert limit(tmp_path, files) == (GIB, LimitSource.CGROUP_V2)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("sys/fs/cgroup/memory.max", LimitSource.CGROUP_V2),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", LimitSource.CGROUP_V1),
    ],
)
def test_without_a_list_of_mounts_the_usual_places_are_asked(
    tmp_path: Path, file: str, source: LimitSource
) -> None:
    assert limit(tmp_path, {file: f"{GIB}\n"}) == (GIB, source)


@pytest.mark.parametrize(
    "junk",
    [
        "",
        "garbage\n\n:::\n0:\n - \n",
        "4:memory\n1 2 - cgroup2\n",
        "0::x\n1 2 3 / here rw - cgroup2 a b\n1 2 3 there /x rw - cgroup2 a b\n",
        "0::/x\n1 2 3 / /\\000 rw - cgroup2 a b\n",
    ],
)
def test_files_of_nonsense_bound_nothing(tmp_path: Path, junk: str) -> None:
    files = {"proc/self/cgroup": junk, "proc/self/mountinfo": junk}
    assert limit(tmp_path, files) == (16 * GIB, LimitSource.MACHINE)


def test_files_that_cannot_be_read_bound_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, v2("/a/b", a=f"{GIB}\n"))
    # A folder in the file's place fails for everybody, also for those whom permissions do not stop.
    (root / "sys/fs/cgroup/a/b/memory.max").mkdir(parents=True)
    assert process_limit_bytes(root) == ProcessLimit(bytes=GIB, source=LimitSource.CGROUP_V2)


def test_a_system_without_proc_still_has_memory(tmp_path: Path) -> None:
    found = process_limit_bytes(tmp_path)
    assert found.source is LimitSource.MACHINE
    assert found.bytes > 2**20


def test_this_machine_has_a_limit() -> None:
    found = process_limit_bytes()
    assert 2**20 < found.bytes <= process_limit_bytes(Path("/nowhere")).bytes


class TestHeadroom:
    LIMIT = ProcessLimit(bytes=4 * GIB, source=LimitSource.CGROUP_V2)

    def test_what_fits_is_no_matter_for_a_warning(self) -> None:
        found = headroom(self.LIMIT, [GIB, 2 * GIB], GIB // 4, GIB // 4)
        assert (found.needed_bytes, found.allowed_bytes) == (7 * GIB // 2, 4 * GIB * 9 // 10)
        assert found.suffices
        assert found.warning == ""

    def test_nine_tenths_are_the_bound_and_belong_to_it(self) -> None:
        hundred = ProcessLimit(bytes=100, source=LimitSource.MACHINE)
        assert headroom(hundred, [80], 5, 5).warning == ""
        assert headroom(hundred, [80], 5, 6).warning != ""
        assert not headroom(hundred, [80], 6, 5).suffices

    def test_the_warning_has_all_numbers_and_says_who_bounds(self) -> None:
        found = headroom(self.LIMIT, [7 * GIB, GIB // 2], 400 * 2**20, 900)
        assert not found.suffices
        assert "promise 7.5 GiB" in found.warning
        assert "takes 400.0 MiB and runs up to 900 bytes" in found.warning
        assert "may use 4.0 GiB (cgroup v2), of which 90 % are 3.6 GiB" in found.warning
        assert "\n" not in found.warning

    def test_a_server_without_host_devices_needs_only_itself(self) -> None:
        assert headroom(self.LIMIT, [], GIB, 0).needed_bytes == GIB

    def test_the_host_tier_is_promised_like_the_rest_and_named(self) -> None:
        hundred = ProcessLimit(bytes=100, source=LimitSource.MACHINE)
        assert headroom(hundred, [40], 5, 5, 40).suffices
        found = headroom(hundred, [40], 5, 5, 41)
        assert found.needed_bytes == 91
        assert "promise 81 bytes (the host tier 41 bytes of it), the process" in found.warning
        assert "host tier" not in headroom(hundred, [80], 5, 6).warning
