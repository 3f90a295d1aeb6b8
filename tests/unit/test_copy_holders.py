"""Which worker keeps whose copy, and until when."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from modelyard_server.execution.workers.copy_holders import CopyHolders
from modelyard_server.execution.workers.worker_process import WorkerProcess


class FakeWorker:
    """A worker that is gone, and over, when the test says so."""

    def __init__(self) -> None:
        self.exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_gone = False


def worker() -> tuple[FakeWorker, WorkerProcess]:
    fake = FakeWorker()
    return fake, cast(WorkerProcess, fake)


async def test_a_model_has_one_copy_until_it_is_forgotten() -> None:
    _, one = worker()
    holders = CopyHolders()
    holders.begin(1)
    assert (holders.is_being_made(1), holders.holder(1)) == (True, None)
    with pytest.raises(ValueError, match="model 1"):
        holders.begin(1)
    holders.end(1, one)
    assert (holders.is_being_made(1), holders.holder(1)) == (False, one)
    with pytest.raises(ValueError, match="model 1"):
        holders.begin(1)
    holders.forget(1, one)
    assert holders.holder(1) is None
    holders.begin(1)
    holders.end(1, None)
    holders.begin(1)


async def test_the_copies_of_a_worker_are_there_until_its_process_is_over() -> None:
    """It is killed in an instant, but much memory is not free in one."""
    (fake, one), (_, other) = worker(), worker()
    holders = CopyHolders()
    for model, holder in ((1, one), (2, one), (3, other)):
        holders.begin(model)
        holders.end(model, holder)
    fake.is_gone = True
    assert holders.lost(one) == {1, 2}
    assert holders.holder(1) is one
    fake.exited.set_result(None)
    await asyncio.sleep(0)
    assert [holders.holder(model) for model in (1, 2, 3)] == [None, None, other]


async def test_a_new_copy_is_not_forgotten_with_the_old_ones_worker() -> None:
    (fake, old), (_, new) = worker(), worker()
    holders = CopyHolders()
    holders.begin(1)
    holders.end(1, old)
    fake.is_gone = True
    assert holders.lost(old) == {1}
    holders.begin(1)
    holders.end(1, new)
    fake.exited.set_result(None)
    await asyncio.sleep(0)
    assert holders.holder(1) is new
    holders.forget(1, old)
    assert holders.holder(1) is new
    holders.clear()
    assert holders.holder(1) is None
