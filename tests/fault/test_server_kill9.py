"""A real server is killed at random points while operators change models and device plans.

MODELYARD_SERVER_KILLS says how often (5); MODELYARD_SEED repeats what is written. The benchmark
`make bench-plan` does the same 200 times.
"""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.kill9 import Kill9Report, kill_again_and_again

KILLS = int(os.environ.get("MODELYARD_SERVER_KILLS", "5"))
SEED = int(os.environ.get("MODELYARD_SEED", str(random.randrange(2**32))))


@pytest.mark.timeout(120 + 10 * KILLS)
async def test_a_killed_server_has_all_it_acknowledged_and_no_plan_in_part(tmp_path: Path) -> None:
    print(f"MODELYARD_SEED={SEED}")
    report = await kill_again_and_again(tmp_path, kills=KILLS, seed=SEED)
    print(report)
    assert report.problems == ()
    assert report.acknowledged >= KILLS  # Or it was not writing that was interrupted.
    assert report.plans > 0


def _lose_models(connection: sqlite3.Connection) -> int:
    # One alone could be the one that a call which was killed has removed.
    several = "(SELECT count(*) FROM models WHERE owner = 'api') > 1"
    return connection.execute(f"DELETE FROM models WHERE owner = 'api' AND {several}").rowcount


def _lose_a_plan(connection: sqlite3.Connection) -> int:
    return connection.execute("UPDATE plan SET revision = revision - 1 WHERE revision > 0").rowcount


def _halve_a_plan(connection: sqlite3.Connection) -> int:
    return connection.execute(
        "UPDATE devices SET budget_bytes = budget_bytes + 1 WHERE name = 'devices/cuda-1'"
    ).rowcount


def _halve_an_update(connection: sqlite3.Connection) -> int:
    return connection.execute("UPDATE routes SET key = key || '0'").rowcount


@pytest.mark.parametrize(
    ("do_damage", "shows"),
    [
        (_lose_models, lambda report: report.lost),
        (_lose_a_plan, lambda report: report.lost),
        (_halve_a_plan, lambda report: report.half_applied),
        (_halve_an_update, lambda report: report.half_applied),
    ],
)
async def test_the_check_sees_what_is_lost_or_half_there(
    do_damage: Callable[[sqlite3.Connection], int],
    shows: Callable[[Kill9Report], tuple[str, ...]],
    tmp_path: Path,
) -> None:
    damaged_after: list[int] = []

    def damage(kill: int, catalog: Path) -> None:
        # After every kill: an early one may have left nothing that could be damaged, and what is
        # damaged may be the very thing that the interrupted call was removing.
        if catalog.exists():
            with closing(sqlite3.connect(catalog)) as connection, connection:
                connection.execute("PRAGMA foreign_keys = ON")
                if do_damage(connection):
                    damaged_after.append(kill)

    report = await kill_again_and_again(tmp_path, kills=20, seed=SEED, after_kill=damage)
    assert damaged_after
    assert shows(report), report
    assert report.kills < 20
