"""A server whose answers each test chooses, and the clients that ask it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from tests.support.asking import Asker
from tests.support.fake_api import FakeServer, serving

from modelyard.admin import Admin


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        yield fake


@pytest.fixture
def admin(server: FakeServer) -> Iterator[Admin]:
    with Admin(server.address) as made:
        yield made


@pytest.fixture(params=["blocking", "asyncio"])
async def asker(request: pytest.FixtureRequest, server: FakeServer) -> AsyncIterator[Asker]:
    made = Asker(request.param, server.address)
    yield made
    await made.close()
