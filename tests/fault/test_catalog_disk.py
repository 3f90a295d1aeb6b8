"""The catalog's store on disks that are full, read-only, or fail to sync."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.catalog_writer import NOON, change_of, check_file, integrity_of, state_of
from tests.support.disk import build_shim, shim_environment

from modelyard_server.catalog.store import CatalogStore, StorageFailed

_ROOT = Path(__file__).resolve().parents[2]
_PRELUDE = """
import asyncio, ctypes, os, resource, signal, sys
from pathlib import Path
from tests.support.catalog_writer import NOON, change_of, state_of
from modelyard_server.catalog.store import CatalogStore, StorageFailed

shim = ctypes.CDLL(None)
store = CatalogStore.open(Path(sys.argv[1]), now=lambda: NOON)

async def fails(number):
    before = store.read()
    try:
        await store.write(change_of(number))
    except StorageFailed as error:
        print(error.text)
    else:
        raise AssertionError("the write did not fail")
    assert store.read() == before, "a write that failed changed something"

def die():
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    await store.write(change_of(1))
"""


def run_child(path: Path, body: str, environment: dict[str, str] | None = None) -> str:
    """Runs a scenario in a process of its own; it may end by killing itself."""
    source = _PRELUDE + body + "\nasyncio.run(main())\n"
    child = subprocess.run(
        [sys.executable, "-c", source, str(path)],
        env=(environment or dict(os.environ)) | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode in (0, -9), child.stderr
    return child.stdout


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Writes a file until nothing more fits."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1024)):
                pass
        except OSError:
            pass
    return ballast


async def test_a_full_disk_fails_writes_and_nothing_else_until_space_returns(
    small_disk: Path,
) -> None:
    path = small_disk / "catalog.db"
    store = CatalogStore.open(path, now=lambda: NOON)
    await store.write(change_of(1))
    ballast = fill(small_disk)
    for _ in range(3):
        with pytest.raises(StorageFailed, match=str(path)):
            for number in range(2, 50):  # What is free in the log's last page is still used.
                await store.write(change_of(number))
    number = store.read().plan_revision
    assert store.read() == state_of(number)
    assert await store.request("change-1") == change_of(1).request
    ballast.unlink()
    for later in (number + 1, number + 2):
        assert await store.write(change_of(later)) == later
    await store.close()
    assert integrity_of(path) == "ok"


async def test_a_full_disk_keeps_nobody_from_opening_the_store(small_disk: Path) -> None:
    path = small_disk / "catalog.db"
    store = CatalogStore.open(path, now=lambda: NOON)
    await store.write(change_of(1))
    await store.close()
    ballast = fill(small_disk)
    store = CatalogStore.open(path, now=lambda: NOON)
    assert store.read() == state_of(1)
    with pytest.raises(StorageFailed):
        await store.write(change_of(2))
    ballast.unlink()
    await store.write(change_of(2))
    await store.close()
    assert integrity_of(path) == "ok"


async def test_a_new_store_on_a_full_disk_is_refused_and_made_once_there_is_space(
    small_disk: Path,
) -> None:
    path = small_disk / "catalog.db"
    ballast = fill(small_disk)
    with pytest.raises(StorageFailed):
        CatalogStore.open(path)
    ballast.unlink()
    store = CatalogStore.open(path)
    assert store.read() == state_of(0)
    await store.close()


def test_a_file_on_a_read_only_disk_is_refused_and_left_as_it_is(small_disk: Path) -> None:
    path = small_disk / "catalog.db"
    store = CatalogStore.open(path)
    asyncio.run(store.close())
    before = path.read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageFailed, match=str(path)):
        CatalogStore.open(path)
    with pytest.raises(StorageFailed, match="other"):
        CatalogStore.open(small_disk / "other.db")
    assert path.read_bytes() == before
    assert [file.name for file in small_disk.iterdir()] == [path.name]


def test_a_limit_on_file_sizes_fails_writes_until_it_is_raised(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    text = run_child(
        path,
        """
    log = os.stat(sys.argv[1] + "-wal").st_size
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log + 5000, hard))
    await fails(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    await fails(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    await store.write(change_of(2))
    await store.write(change_of(3))
    assert store.read() == state_of(3)
    await store.close()
""",
    )
    assert str(path) in text
    assert check_file(path, 3) == 3


@pytest.fixture
def failing(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that can make its own syncs fail."""
    shim = build_shim(tmp_path)
    if shim is None:
        pytest.skip("needs Linux and a C compiler, to let syncs fail")
    return shim_environment(shim, tmp_path)


FAILED_ONCE = """
    shim.disk_fail(1)
    await fails(2)
    die()
"""


def test_a_write_whose_sync_failed_is_not_there_after_a_crash(
    failing: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "catalog.db"
    run_child(path, FAILED_ONCE, failing)
    assert number_in(path) == 1


def test_without_emptying_the_log_a_write_whose_sync_failed_would_come_back(
    failing: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "catalog.db"
    run_child(path, "\n    CatalogStore._settle = lambda self: None" + FAILED_ONCE, failing)
    assert number_in(path) == 2


def test_after_syncs_that_failed_for_a_while_the_store_works_again(
    failing: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "catalog.db"
    run_child(
        path,
        """
    shim.disk_fail(1000)
    await fails(2)
    await fails(3)
    shim.disk_fail(0)
    await store.write(change_of(2))
    await store.write(change_of(3))
    die()
""",
        failing,
    )
    assert check_file(path, 3) == 3


def test_closing_while_syncs_fail_loses_nothing(failing: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    run_child(path, "\n    shim.disk_fail(1000)\n    await store.close()\n", failing)
    assert check_file(path, 1) == 1


def test_whichever_sync_of_the_first_opening_fails_the_next_opening_works(
    failing: dict[str, str], tmp_path: Path
) -> None:
    text = run_child(
        tmp_path / "catalog.db",
        """
    for skipped in range(8):
        path = Path(f"{sys.argv[1]}.{skipped}")
        shim.disk_fail_after(skipped, 1)
        try:
            other = CatalogStore.open(path, now=lambda: NOON)
        except StorageFailed:
            print("refused")
            shim.disk_fail(0)
            other = CatalogStore.open(path, now=lambda: NOON)
        shim.disk_fail(0)
        assert other.read() == state_of(0)
        await other.write(change_of(1))
        await other.close()
    await store.close()
""",
        failing,
    )
    # Not all of them: SQLite goes on when a folder cannot be synced, and there are fewer than 8.
    assert text.count("refused") >= 3
    for skipped in range(8):
        assert check_file(tmp_path / f"catalog.db.{skipped}", 1) == 1


def number_in(path: Path) -> int:
    """How many changes a file holds, none of them half."""
    store = CatalogStore.open(path)
    stored = store.read()
    asyncio.run(store.close())
    assert stored == state_of(stored.plan_revision)
    return stored.plan_revision
