"""A process that writes to the catalog's store is killed at random points, again and again.

MODELYARD_KILLS says how often (20); MODELYARD_SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import os
import random
import select
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tests.support import catalog_writer
from tests.support.catalog_writer import NOON, change_of, check_file

from modelyard_server.catalog.store import CatalogStore

KILLS = int(os.environ.get("MODELYARD_KILLS", "20"))
SEED = int(os.environ.get("MODELYARD_SEED", str(random.randrange(2**32))))
_START_S = 60.0


@pytest.mark.timeout(60 + 5 * KILLS)
def test_kill_9_loses_nothing_that_was_acknowledged_and_leaves_nothing_half_done(
    tmp_path: Path,
) -> None:
    print(f"MODELYARD_SEED={SEED}")
    rng = random.Random(SEED)
    path = tmp_path / "catalog.db"
    number = in_flight = 0
    for kill in range(KILLS):
        acknowledged = _write_until_killed(path, number, rng)
        number = check_file(path, acknowledged)
        in_flight += number > acknowledged
        print(f"kill {kill}: {acknowledged} acknowledged, {number} there")
    print(f"{KILLS} kills, {number} changes, of which {in_flight} were in flight and are there")
    assert number >= KILLS // 2  # Or it was not writing that was interrupted.


def _write_until_killed(path: Path, number: int, rng: random.Random) -> int:
    """Lets a process write from a number on, kills it, and returns what it acknowledged last."""
    command = [sys.executable, catalog_writer.__file__, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            enough = number + rng.randrange(40)
            # Every tenth dies while it opens the file, or before.
            opening = rng.random() < 0.1
            while not opening and number < enough:
                assert select.select([child.stdout], [], [], _START_S)[0], "the writer hangs"
                line = child.stdout.readline()
                assert line, "the writer died by itself"
                number = number if line == b"open\n" else int(line)
            # Some way into whatever it does next: the time is what is random here.
            select.select([], [], [], rng.uniform(0.0, 0.3 if opening else 0.004))
        finally:
            child.kill()
        rest = child.stdout.read().split()
    assert child.returncode == -9
    return max([number, *(int(line) for line in rest if line != b"open")])


def _lose(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE plan SET revision = revision - 1")


def _halve(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE models SET etag = 'change-2' WHERE id = 'lasting-1'")


def _forget(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM requests WHERE request_id = 'change-3'")


@pytest.mark.parametrize("damage", [_lose, _halve, _forget])
def test_the_check_sees_changes_that_are_lost_or_half_there(
    damage: Callable[[sqlite3.Connection], None], tmp_path: Path
) -> None:
    path = tmp_path / "catalog.db"
    asyncio.run(_write_three(path))
    assert check_file(path, 3) == check_file(path, 2) == 3
    with closing(sqlite3.connect(path)) as connection, connection:
        damage(connection)
    with pytest.raises(AssertionError):
        check_file(path, 3)


async def _write_three(path: Path) -> None:
    store = CatalogStore.open(path, now=lambda: NOON)
    for number in (1, 2, 3):
        await store.write(change_of(number))
    await store.close()
