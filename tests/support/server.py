"""Real servers for tests: the application in this process, and `modelyard serve` as one of its own.

running_app       the wired application on a free port; checked for leftovers at the end
server_process    the real command; always reaped
eventually        waits until something holds, and says what did not
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc.aio

from modelyard import Admin, AsyncClient, ManagedDevice, ModelyardError, Residency, ResidencyState
from modelyard.devices import DeviceType
from modelyard_server.app import Application, build
from modelyard_server.config import EngineConfig, parse_config
from modelyard_server.devices.probes import Probe

__all__ = [
    "COMMAND",
    "ROOT",
    "RunningApp",
    "ServerProcess",
    "child_environment",
    "eventually",
    "refusal_of",
    "run_command",
    "running_app",
    "server_process",
    "told_refusal_of",
]

P = ParamSpec("P")
T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""

COMMAND = Path(sys.executable).with_name("modelyard")
"""The installed command."""

_POLL_S = 0.01
_SETTLE_S = 60.0
_START_S = 60.0
_STOP_S = 30.0
_ENGINE_THREADS = ("lane-", "load-", "price")


async def eventually(what: str, holds: Callable[[], Any], timeout_s: float = _SETTLE_S) -> Any:
    """Asks again and again until the answer is true, and returns it.

    Args:
        what: what is waited for; the text of the failure.
        holds: a question, plain or awaitable.
        timeout_s: longest time to wait.

    Raises:
        AssertionError: it did not come true in time.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_s
    while True:
        answer = holds()
        value = await answer if isinstance(answer, Awaitable) else answer
        if value:
            return value
        assert loop.time() < end, f"not within {timeout_s} s: {what} (last: {value!r})"
        await asyncio.sleep(_POLL_S)


async def refusal_of(call: Awaitable[object]) -> ModelyardError:
    """Awaits a call that must be refused and returns the error."""
    try:
        answer = await call
    except ModelyardError as error:
        return error
    raise AssertionError(f"the call was answered: {answer!r}")


async def told_refusal_of(ask: Callable[[], Awaitable[object]]) -> ModelyardError:
    """What the server says to a call whose deadline passes.

    It says so a little before: 5 % of the time. On a busy machine the client's own clock may be
    first all the same, which has no reason; then the call is made again.
    """
    for _ in range(10):
        error = await refusal_of(ask())
        if error.reason:
            return error
    raise AssertionError("the client's own clock was always first")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningApp:
    """An application that serves on a loopback port, in this process and on this loop.

    Attributes:
        app: the application, for looking inside.
        target: its address.
        client: a client of it.
        channel: a bare channel to it, for messages that no client would send. Does not retry.
    """

    app: Application
    target: str
    client: AsyncClient
    channel: grpc.aio.Channel
    _admin: Admin

    async def admin(
        self, question: Callable[Concatenate[Admin, P], T], *args: P.args, **settings: P.kwargs
    ) -> T:
        """Asks the blocking Admin from another thread: the server is on this one."""
        return await asyncio.to_thread(question, self._admin, *args, **settings)

    async def device(self, device: str = "cpu") -> ManagedDevice:
        """One device, as the server tells it."""
        return await self.admin(lambda admin: admin.get_device(device))

    async def residency(self, model: str) -> Residency:
        """Where a model stands, as the server tells it."""
        found = await self.admin(lambda admin: admin.list_residencies())
        return next(item for item in found if item.model == f"models/{model}")

    async def becomes(
        self, model: str, state: ResidencyState, timeout_s: float = _SETTLE_S
    ) -> Residency:
        """Waits until a model is in a state."""

        async def is_there() -> Residency | None:
            residency = await self.residency(model)
            return residency if residency.state is state else None

        found: Residency = await eventually(f"{model} is {state}", is_there, timeout_s)
        return found

    async def at_rest(self) -> None:
        """Waits until no request, load or unload is under way."""
        residency = self.app.residency

        def is_quiet() -> bool:
            uses = [residency.device_use(i) for i in range(len(self.app.devices))]
            return (
                residency.lease_count == 0
                and residency.waiting_count == 0
                and all(use.reserved == 0 and use.draining == 0 for use in uses)
            )

        await eventually("no lease, ticket, load or unload is left", is_quiet)


@asynccontextmanager
async def running_app(
    config_text: str, base: Path, *, probes: Mapping[DeviceType, Probe] | None = None
) -> AsyncIterator[RunningApp]:
    """Runs an application, and checks what it leaves behind.

    At the end of a body that did not fail: no lease and no ticket is out, the core's audit passes,
    every device is within its budget, and once it has stopped none of its tasks and threads lives.

    Args:
        config_text: TOML; its `listen` is replaced by a free loopback port. Models run in threads
            of this process unless it has an `[engine]`, and are read in place unless it has
            `[weights]`.
        base: folder that relative roots are relative to.
        probes: other probes of devices; those of this machine if None.
    """
    config = parse_config(_on_free_port(config_text), base=base)
    if "[engine]" not in config_text:
        config = replace(config, engine=EngineConfig(kind="thread"))
    tasks_before = asyncio.all_tasks()
    threads_before = set(threading.enumerate())
    app = build(config, probes=probes)
    try:
        port = await app.start()
    except BaseException:
        await app.stop(0)
        raise
    target = f"127.0.0.1:{port}"
    admin = Admin(target)
    channel = grpc.aio.insecure_channel(
        target,
        options=[
            ("grpc.enable_retries", 0),
            ("grpc.max_send_message_length", -1),
            # Ports come again: what other channels have met at this one is not to count.
            ("grpc.use_local_subchannel_pool", 1),
        ],
    )
    try:
        async with AsyncClient(target) as client:
            running = RunningApp(
                app=app, target=target, client=client, channel=channel, _admin=admin
            )
            yield running
            await running.at_rest()
            app.residency.audit()
            for index, device in enumerate(app.devices):
                use = app.residency.device_use(index)
                held = use.reserved + use.resident + use.draining + use.quarantined
                assert held <= use.budget + use.deficit, f"{device.name} is over budget: {use}"
    finally:
        await asyncio.to_thread(admin.close)
        await channel.close()
        async with asyncio.timeout(_STOP_S):
            await app.stop(5)
    # In a fixture this end of it is a task of its own.
    ours = asyncio.all_tasks() - tasks_before - {asyncio.current_task()}

    def leftovers() -> list[str]:
        return [task.get_name() for task in ours if not task.done()] + [
            thread.name
            for thread in threading.enumerate()
            if thread not in threads_before and thread.name.startswith(_ENGINE_THREADS)
        ]

    await eventually(f"no task or thread is left of {leftovers()}", lambda: not leftovers())


def _on_free_port(config_text: str) -> str:
    assert "[server]" not in config_text or "listen" not in config_text, "leave `listen` out"
    line = 'listen = "127.0.0.1:0"\n'
    if "[server]\n" in config_text:
        return config_text.replace("[server]\n", f"[server]\n{line}", 1)
    return f"[server]\n{line}\n{config_text}"


def child_environment() -> dict[str, str]:
    """The environment of a child that finds tests.support, for factories of faulty models."""
    # Behind it what this process was given: a work tree beside the installed one.
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}


class ServerProcess:
    """The command `modelyard serve` with one configuration file. See server_process.

    Attributes:
        target: its address, once it serves.
    """

    def __init__(self, config_file: Path) -> None:
        self.target = ""
        self._stdout = config_file.with_suffix(".stdout")
        self._stderr = config_file.with_suffix(".stderr")
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [COMMAND, "serve", "--config", config_file],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=child_environment(),
                cwd=config_file.parent,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return self._stdout.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        """What it has logged."""
        return self._stderr.read_text(encoding="utf-8")

    async def serves(self) -> None:
        """Waits for its line, and reads its address from it."""

        def address() -> str:
            assert self._process.poll() is None, f"it ended before it served:\n{self.stderr}"
            text = self.stdout
            if not text.endswith("\n"):
                return ""
            _, found, rest = text.partition(" is serving on ")
            return rest.split()[0] if found else ""

        self.target = str(await eventually("the server serves", address, _START_S))

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        self._process.send_signal(number)

    async def exit_code(self, timeout_s: float = _START_S) -> int:
        """Waits until it has ended."""
        try:
            return await asyncio.to_thread(self._process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"it did not end within {timeout_s} s; its log:\n{self.stderr[-4000:]}"
            ) from None

    def reap(self) -> None:
        """Kills it if it still runs, and collects it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


@asynccontextmanager
async def server_process(
    config_text: str, base: Path, *, name: str = "yard", serves: bool = True
) -> AsyncIterator[ServerProcess]:
    """Runs the real server as a process.

    Args:
        config_text: TOML; without `listen` it gets a free loopback port.
        base: folder that the configuration file is written to.
        name: of the files.
        serves: False for a server that is not expected to come up.
    """
    file = base / f"{name}.toml"
    file.write_text(config_text if "listen" in config_text else _on_free_port(config_text))
    process = ServerProcess(file)
    try:
        if serves:
            await process.serves()
        yield process
    finally:
        process.reap()


async def run_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the command `modelyard` to its end."""
    return await asyncio.to_thread(
        subprocess.run,
        [COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=child_environment(),
        timeout=_START_S,
        check=False,
    )
