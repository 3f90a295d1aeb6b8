"""Models with random tensors in common come, answer, change and go; the books are kept beside."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.config_text import device_table
from tests.support.server import running_app
from tests.support.sharing import (
    ROWS,
    SHARED_STORE,
    Books,
    auditing,
    create_mixture,
    make_mixture,
    mixed,
)

from modelyard import Admin

NAMES = [f"x{i}" for i in range(8)]
TENSORS = 3
"""Of each kind, for each place in a model: few, so that there is much in common."""
BUDGET = 2000
"""Room for three or four of them: there is always somebody who has to leave."""
DEEDS = ("predict", "unload", "delete", "update", "overwrite")
WEIGHTS = (10, 2, 1, 3, 1)


@pytest.mark.parametrize(
    ("seed", "engine", "steps"), [(1, "thread", 200), (2, "thread", 200), (3, "process", 80)]
)
async def test_the_books_are_right_after_every_step(
    tmp_path: Path, seed: int, engine: str, steps: int
) -> None:
    chance = random.Random(seed)
    books = Books()
    wanted: dict[str, np.ndarray[Any, Any]] = {}
    (tmp_path / "models").mkdir()

    def make(folder: str = "") -> str:
        folder = folder or f"v{len(wanted)}"
        path = tmp_path / "models" / folder
        make_mixture(path, [chance.randrange(TENSORS) for _ in range(4)])
        wanted[folder] = mixed(path)
        return folder

    config = SHARED_STORE + f'\n[engine]\nkind = "{engine}"\n'
    config += device_table("cpu", BUDGET, threads=1)
    done: Counter[str] = Counter()
    folders: dict[str, str] = {}
    with auditing():
        async with running_app(config, tmp_path) as yard:
            for _ in range(steps):
                name = chance.choice(NAMES)
                deed = chance.choices(DEEDS, WEIGHTS)[0] if name in folders else "create"
                done[deed] += 1
                match deed:
                    case "create":
                        folders[name] = make()
                        await create_mixture(yard, name, folder=folders[name])
                    case "unload":
                        await yard.admin(Admin.unload, name)
                    case "delete":
                        await yard.admin(Admin.delete_model, name)
                        del folders[name], books.sizes[name]
                    case "update":
                        folders[name] = make()
                        await yard.admin(
                            Admin.update_model, name, root="models", folder=folders[name]
                        )
                    case "overwrite":
                        # Behind the server's back, while it is not in memory.
                        await yard.admin(Admin.unload, name)
                        make(folders[name])
                if name in folders:
                    books.add_mixture(name, tmp_path / "models" / folders[name])
                if deed in ("predict", "overwrite"):
                    answer = await yard.client.predict(name, ROWS, timeout_s=60)
                    np.testing.assert_array_equal(answer.only, wanted[folders[name]])
                await books.check(yard)
            device = await yard.device()
            assert device.eviction_count > steps // 20
            assert min(done[deed] for deed in ("create", *DEEDS)) > 1, done
            for name in sorted(folders):
                await yard.admin(Admin.delete_model, name)
            await books.check(yard)
            device = await yard.device()
            assert device.accounted_bytes == device.measured_bytes == 0
