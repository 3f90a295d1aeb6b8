"""The real command: starting, serving, stopping, and what it says when it cannot."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support import faulty_models, tiny_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, device_table, model_table
from tests.support.server import (
    ServerProcess,
    child_environment,
    eventually,
    refusal_of,
    run_command,
    server_process,
)

from modelyard import Admin, AsyncClient, LoadFailed, ModelFailed

X = np.ones(3, np.float32)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def torch_model(base: Path, name: str, factory: str, **factory_options: object) -> str:
    faulty_models.make_weights(base / "store" / name, value=2.0)
    options: dict[str, object] = {"factory": faulty_models.factory(factory)}
    if factory_options:
        options["factory_options"] = factory_options
    return model_table(name, "torch", device="cpu", options=options)


# One server for what leaves it as it was.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServerProcess]:
    base = tmp_path_factory.mktemp("server")
    tiny_models.make_tiny_bert(base / "store" / "mood", seed=1, labels=["bad", "good"])
    config = CPU + ROOTS + ALLOWED
    config += model_table("mood", "transformers", task="text-classification", keys=["acme/mood"])
    config += model_table("echo", "identity")
    config += torch_model(base, "raising", "Raising", kind="ValueError")
    config += torch_model(base, "endless", "Raising", kind="recursion")
    config += torch_model(base, "mutating", "Mutating")
    async with server_process(config, base) as process:
        yield process


async def test_the_server_says_where_it_serves_and_is_healthy(server: ServerProcess) -> None:
    assert server.stdout == f"modelyard is serving on {server.target}\n"
    async with grpc.aio.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "modelyard.v1.InferenceService", "modelyard.v1.AdminService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == SERVING, service
    info = await asyncio.to_thread(lambda: _ask(server, Admin.info))
    assert info.process_id == server.pid


def _ask(server: ServerProcess, question: Any, *arguments: Any) -> Any:
    with Admin(server.target) as admin:
        return question(admin, *arguments)


async def test_a_models_traceback_is_in_the_log_and_nowhere_else(server: ServerProcess) -> None:
    async with AsyncClient(server.target) as client:
        for model, name in (("raising", "ValueError"), ("endless", "RecursionError")):
            error = await refusal_of(client.predict(model, X))
            assert isinstance(error, ModelFailed)
            assert error.exception_type == name
            assert error.error_id is not None
            told = str(error) + str(error.metadata)
            for inside in ("Traceback", "faulty_models", "secret", "/srv", ".py"):
                assert inside not in told
            log = server.stderr
            assert f"error_id={error.error_id}" in log
            story = log[log.index(error.error_id) :]
            assert "Traceback" in story
            assert name in story
            assert "faulty_models.py" in story
        # It goes on serving.
        assert (await client.predict("echo", "a")).only == ["a"]


async def test_what_a_client_sends_cannot_forge_a_line_of_the_log(server: ServerProcess) -> None:
    def forge(admin: Admin) -> None:
        for name in ("x\n2026-01-01 ERROR forged: line", "\x1b[31mforged"):
            with pytest.raises(Exception, match=r"model|name"):
                admin.create_model(name, runtime="identity", keys=[name])

    await asyncio.to_thread(_ask, server, forge)
    async with AsyncClient(server.target) as client:
        await refusal_of(client.predict("x\nforged", "a"))
    assert not any(line.startswith(("2026-01-01", "forged")) for line in server.stderr.split("\n"))
    assert "\x1b" not in server.stderr


async def test_a_model_that_writes_to_its_input_changes_nobody_elses(server: ServerProcess) -> None:
    # One byte: such values the interpreter may share between all who use them.
    value = np.array([0xF7], np.uint8)
    async with AsyncClient(server.target) as client:
        assert np.asarray((await client.predict("echo", value)).only).tolist() == [0xF7]
        await client.predict("mutating", value)
        assert np.asarray((await client.predict("echo", value)).only).tolist() == [0xF7]


async def test_the_commands_talk_to_the_server(server: ServerProcess) -> None:
    async def ask(*arguments: str) -> Any:
        done = await run_command(*arguments, "--server", server.target, "--json")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout)

    predicted = await ask("predict", "acme/mood", "the dog ran", "i hate this")
    assert len(predicted["outputs"]["label"]) == 2
    assert set(predicted["outputs"]["label"]) <= {"bad", "good"}
    assert predicted["served"]["model"] == "models/mood"

    models = await ask("models")
    assert [model["name"] for model in models] == sorted(
        f"models/{name}" for name in ("mood", "echo", "raising", "endless", "mutating")
    )
    (device,) = await ask("devices")
    assert device["name"] == "devices/cpu"
    assert 0 < device["resident_bytes"] == device["measured_bytes"] <= device["budget_bytes"]
    residencies = {item["model"]: item for item in await ask("residency")}
    assert residencies["models/mood"]["state"] == "resident"
    charged = sum(
        charge["size_bytes"] for item in residencies.values() for charge in item["charges"]
    )
    assert charged - device["saved_bytes"] == device["resident_bytes"]
    told = await ask("stats")
    assert told["server"]["process_id"] == server.pid
    assert told["stats"]["answered_count"] >= 1


async def test_the_command_tells_what_the_server_refused(server: ServerProcess) -> None:
    done = await run_command("predict", "nobody", "a", "--server", server.target)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: KEY_NOT_FOUND: ")
    assert done.stderr.count("\n") == 1


async def test_a_second_server_on_the_same_port_says_so_in_one_line(
    server: ServerProcess, tmp_path: Path
) -> None:
    config = f'[server]\nlisten = "{server.target}"\n' + CPU
    async with server_process(config, tmp_path, serves=False) as second:
        assert await second.exit_code() == 2
        assert second.stdout == ""
        assert second.stderr.count("\n") == 1, second.stderr
        assert server.target in second.stderr
        assert "in use" in second.stderr
    # The first one has not noticed.
    async with AsyncClient(server.target) as client:
        assert (await client.predict("echo", "a")).only == ["a"]


# Stopping


async def watch_health(target: str, served: asyncio.Event) -> int:
    """Sets the event once the server is healthy, and returns what it says next."""
    async with grpc.aio.insecure_channel(target) as channel:
        watch: Any = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        async for answer in watch:
            if answer.status != SERVING:
                return int(answer.status)
            served.set()
    raise AssertionError("the server ended without a word")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_server_that_is_told_to_stop_says_so_and_answers_what_runs(
    tmp_path: Path, number: signal.Signals
) -> None:
    config = CPU + ROOTS + ALLOWED
    config += torch_model(tmp_path, "stuck", "StuckInRun", gate=tmp_path / "gate")
    # On a lane of its own: on the other one it would wait for its turn.
    config += device_table("cpu:1", "1MB", logical=True)
    config += model_table("echo", "identity", device="cpu:1")
    async with server_process(config, tmp_path) as process, AsyncClient(process.target) as client:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            runs = asyncio.create_task(client.predict("stuck", X))
            await eventually("the model runs", gate.is_waited_at)
            served = asyncio.Event()
            health = asyncio.create_task(watch_health(process.target, served))
            async with asyncio.timeout(60):
                await served.wait()
                process.send(number)
                assert await health == NOT_SERVING
            # Who has not heard yet is still served.
            assert (await client.predict("echo", "a")).only == ["a"]
            assert not runs.done()
        np.testing.assert_array_equal((await runs).only, X + 2)
        assert await process.exit_code(15) == 0
        assert "Traceback" not in process.stderr


async def test_an_idle_server_stops_at_once(tmp_path: Path) -> None:
    config = "[server]\nshutdown_grace_s = 60\n" + CPU + model_table("echo", "identity")
    async with server_process(config, tmp_path) as process:
        async with AsyncClient(process.target) as client:
            await client.predict("echo", "a")
            process.send(signal.SIGTERM)
            assert await process.exit_code(10) == 0
        assert "Traceback" not in process.stderr


async def test_a_model_that_never_answers_cannot_keep_the_server_from_stopping(
    tmp_path: Path,
) -> None:
    config = "[server]\nshutdown_grace_s = 1\n" + CPU + ROOTS + ALLOWED
    config += torch_model(tmp_path, "stuck", "StuckInRun", gate=tmp_path / "gate")
    async with server_process(config, tmp_path) as process, AsyncClient(process.target) as client:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            runs = asyncio.create_task(client.predict("stuck", X))
            await eventually("the model runs", gate.is_waited_at)
            process.send(signal.SIGTERM)
            assert await process.exit_code(10) == 0
            await refusal_of(runs)


async def test_a_load_that_never_ends_cannot_keep_the_server_from_stopping(tmp_path: Path) -> None:
    config = "[server]\nshutdown_grace_s = 1\n" + CPU + ROOTS + ALLOWED
    config += torch_model(tmp_path, "stuck", "StuckInLoad", gate=tmp_path / "gate")
    async with server_process(config, tmp_path) as process:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            await asyncio.to_thread(_ask, process, Admin.load, "stuck")
            await eventually("the load is stuck", gate.is_waited_at)
            process.send(signal.SIGTERM)
            assert await process.exit_code(10) == 0


async def test_a_quarantine_does_not_delay_the_end(tmp_path: Path) -> None:
    config = "[server]\nshutdown_grace_s = 300\n" + CPU + ROOTS + ALLOWED
    config += torch_model(tmp_path, "leaking", "Keeping")
    async with server_process(config, tmp_path) as process:
        async with AsyncClient(process.target) as client:
            await client.predict("leaking", X)
        unloaded = await asyncio.to_thread(_ask, process, Admin.unload, "leaking")
        assert unloaded.quarantined != ()
        # Looked for after 0.1 s, after 1 s more, after 5 s more, and then after 30 s: an end that
        # waits for that one is late by half a minute.
        loop = asyncio.get_running_loop()
        begin = loop.time()
        await eventually("the next look is far", lambda: loop.time() - begin > 6.5)
        process.send(signal.SIGTERM)
        assert await process.exit_code(15) == 0


async def test_a_model_whose_constructor_exits_does_not_end_the_server(tmp_path: Path) -> None:
    config = CPU + ROOTS + ALLOWED + model_table("echo", "identity")
    config += torch_model(tmp_path, "exiting", "Exiting", flag=tmp_path / "flag")
    async with server_process(config, tmp_path) as process, AsyncClient(process.target) as client:
        (tmp_path / "flag").touch()
        error = await refusal_of(client.predict("exiting", X, timeout_s=5))
        assert isinstance(error, LoadFailed)
        assert (await client.predict("echo", "a")).only == ["a"]

        def create(admin: Admin) -> object:
            return admin.create_model(
                "second",
                runtime="torch",
                root="store",
                folder="exiting",
                options={
                    "factory": faulty_models.factory("Exiting"),
                    # Another value, because what was looked at once is remembered.
                    "factory_options": {"flag": f"{tmp_path}/./flag"},
                },
            )

        error = await refusal_of(asyncio.to_thread(_ask, process, create))
        assert isinstance(error, LoadFailed)
        assert (await client.predict("echo", "a")).only == ["a"]
        process.send(signal.SIGTERM)
        assert await process.exit_code(15) == 0


# What cannot start


async def test_a_port_that_somebody_else_has_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        target = f"127.0.0.1:{taken.getsockname()[1]}"
        config = f'[server]\nlisten = "{target}"\n' + CPU
        async with server_process(config, tmp_path, serves=False) as process:
            assert await process.exit_code() == 2
            assert process.stdout == ""
            assert process.stderr == f"modelyard: cannot listen on {target}: the port is in use\n"


async def test_every_error_of_a_configuration_names_its_line_and_key(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(
        "[server]\n"
        'listen = "0.0.0.0:1"\n'
        "max_mesage_bytes = 1\n"
        "\n"
        "[[devices]]\n"
        'device = "gpu"\n'
        'budget = "3"\n'
        "\n"
        "[models.Echo]\n"
        'runtime = "identity"\n'
        "[models.other]\n"
        'runtime = "pickle"\n'
    )
    served = await run_command("serve", "--config", file)
    checked = await run_command("check-config", file)
    assert served.returncode == checked.returncode == 2
    assert served.stdout == ""
    # Both say the same, each where its reader looks for it.
    assert served.stderr == checked.stdout
    places = [line.removeprefix(f"{file}:").split(": ")[:2] for line in served.stderr.splitlines()]
    assert places == [
        ["2", "server.listen"],
        ["3", "server.max_mesage_bytes"],
        ["6", "devices[0].device"],
        ["7", "devices[0].budget"],
        ["9", "models.Echo"],
        ["12", "models.other.runtime"],
    ]


@pytest.mark.parametrize("kind", ["missing", "folder", "no TOML", "no text"])
async def test_a_configuration_that_cannot_be_read_is_one_line(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "yard.toml"
    match kind:
        case "folder":
            file.mkdir()
        case "no TOML":
            file.write_text("[server\n")
        case "no text":
            file.write_bytes(b"\xff\xfe")
    done = await run_command("serve", "--config", file)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{file}:1: ")
    assert done.stderr.count("\n") == 1


async def test_a_device_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "yard.toml"
    file.write_text('[[devices]]\ndevice = "xpu:5"\nbudget = "1MB"\n')
    done = await run_command("serve", "--config", file)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "xpu:5" in done.stderr


async def test_the_client_needs_neither_torch_nor_the_server() -> None:
    program = (
        "import sys, modelyard\n"
        "from modelyard import *\n"
        "Client(); Admin(); AsyncClient()\n"
        "found = {'torch', 'transformers', 'modelyard_server'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=child_environment(),
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
