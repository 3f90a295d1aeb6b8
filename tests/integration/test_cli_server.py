"""The command line against a real server: what the pages print works, and errors help.

Commands run in this process, so that there is time for many; the server is one of its own.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.support import tiny_models
from tests.support.config_text import DISK, ROOTS, device_table, model_table
from tests.support.server import (
    COMMAND,
    ROOT,
    ServerProcess,
    child_environment,
    eventually,
    server_process,
)
from typer.testing import CliRunner, Result

from modelyard import Admin, EventType
from modelyard_server.cli.main import app

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Shell:
    """Runs commands against a server, in a folder.

    Args:
        target: the server's address.
        folder: where relative paths are.
    """

    def __init__(self, target: str, folder: Path) -> None:
        self._target = target
        self._folder = folder

    async def run(self, *arguments: str, typed: str = "") -> Result:
        """Runs `modelyard ARGUMENTS` to its end."""
        paths = (str(self._folder / each) if each.endswith(".toml") else each for each in arguments)
        command = list(paths)

        def call() -> Result:
            environment = {"MODELYARD_SERVER": self._target, "NO_COLOR": "1"}
            return CliRunner().invoke(app, command, input=typed, env=environment)

        # The server is another process: while it works this loop may wait.
        return await asyncio.to_thread(call)

    async def done(self, *arguments: str, typed: str = "") -> str:
        """What it prints; it must end well."""
        result = await self.run(*arguments, typed=typed)
        assert result.exit_code == 0, (arguments, result.output)
        return str(result.stdout)

    async def json(self, *arguments: str) -> Any:
        """What it prints with --json."""
        return json.loads(await self.done(*arguments, "--json"))

    async def refused(self, *arguments: str, code: int = 1) -> str:
        """The one line on stderr that it ends with."""
        result = await self.run(*arguments)
        assert result.exit_code == code, (arguments, result.output)
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        return str(result.stderr).removeprefix("error: ").rstrip("\n")


def config_with(devices: str) -> str:
    config = devices + ROOTS
    for name, keys in (("sentiment", ["acme/reviews"]), ("translator", [])):
        config += model_table(
            name, "transformers", task="text-classification", device="cuda:1", keys=keys
        )
    return config + model_table("echo", "identity")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServerProcess]:
    base = tmp_path_factory.mktemp("cli")
    for seed, name in enumerate(("sentiment", "translator")):
        tiny_models.make_tiny_bert(base / "store" / name, seed=seed, labels=["bad", "good"])
    devices = "".join(device_table(f"cuda:{i}", "4MB", logical=True) for i in range(2))
    async with server_process(config_with(devices + DISK), base) as process:
        yield process
        assert "Traceback" not in process.stderr and "defect" not in process.stderr


@pytest.fixture
def shell(server: ServerProcess, tmp_path: Path) -> Iterator[Shell]:
    with Admin(server.target) as admin:
        before = admin.get_plan()
        yield Shell(server.target, tmp_path)
        admin.apply_plan(type(before)(devices=before.devices, models=before.models), timeout_s=30)


# --- The pages ------------------------------------------------------------------------------------


def blocks_of(page: str, language: str) -> list[str]:
    """What a page prints in a language, "" for commands."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block for found, block in FENCED.findall(text) if found == language]


def commands_of(page: str) -> list[list[str]]:
    """The commands that a page prints, as a shell reads them."""
    lines = [line for block in blocks_of(page, "") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("modelyard ")]


async def test_the_page_about_devices_works_as_it_is_printed(shell: Shell, tmp_path: Path) -> None:
    page = "docs/devices.md"
    (plan,) = [block for block in blocks_of(page, "toml") if block.startswith("# new.toml")]
    # Its machine is larger.
    assert '"12GiB"' in plan
    (tmp_path / "new.toml").write_text(plan.replace("12GiB", "3MB"))
    ran = 0
    for command in commands_of(page):
        if command[0] != "watch":
            assert await shell.done(*command, typed="y\n")
            ran += 1
    assert ran >= 7
    plan_now = await shell.json("devices", "plan")
    assert plan_now["devices"]["cuda:0"]["budget"] == "3MB"
    assert plan_now["models"] == {
        "echo": None,
        "sentiment": "cuda:0",
        "translator": "balanced",
    }


async def test_the_first_page_works_as_it_is_printed(tmp_path: Path) -> None:
    page = "README.md"
    config, plan = blocks_of(page, "toml")
    tiny_models.make_tiny_bert(
        tmp_path / "models" / "sentiment", seed=1, labels=["negative", "positive"]
    )
    (tmp_path / "modelyard.toml").write_text(config)
    (tmp_path / "new.toml").write_text(plan)
    async with server_process(config, tmp_path, name="served") as process:
        shell = Shell(process.target, tmp_path)
        ran = 0
        for command in commands_of(page):
            if command[0] in ("demo", "serve"):
                continue
            assert await shell.done(*command, typed="y\n")
            ran += 1
        assert ran >= 6
        assert "cuda:0" in await shell.done("models", "show", "sentiment")


# --- Every command --------------------------------------------------------------------------------

PLAN = """
[devices."cuda:0"]
budget = "3MB"

[models]
sentiment = "cuda:0"
translator = { "bert.encoder" = "cuda:0", "" = "cuda:1" }
"""


async def test_every_command_prints_json_for_programs(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "new.toml").write_text(PLAN)
    ids = {"models/sentiment", "models/translator", "models/echo"}
    assert {each["name"] for each in await shell.json("models", "list")} == ids
    assert {each["model"] for each in await shell.json("residency")} == ids
    assert [each["device"] for each in await shell.json("devices", "list")] == [
        *("cuda:0", "cuda:1", "disk")
    ]
    before = await shell.json("devices", "plan")
    report = await shell.json("devices", "plan", "new.toml")
    assert [each["model"] for each in report["models"]] == ["models/sentiment", "models/translator"]
    assert await shell.json("devices", "plan") == before
    applied = await shell.json("devices", "apply", "new.toml", "--yes")
    assert applied["plan"]["models"]["sentiment"] == "cuda:0"
    drained = await shell.json("devices", "drain", "cuda:1", "--wait")
    assert drained["device"]["drained"] and drained["pinned_models"] == []
    assert not (await shell.json("devices", "undrain", "cuda:1"))["drained"]
    assert (await shell.json("devices", "rebalance", "--dry-run"))["moves"] == []
    assert (await shell.json("devices", "budget", "cuda:0", "2MB"))["budget_bytes"] == 2_000_000
    assert (await shell.json("budget", "cuda:0", "3MB"))["budget_bytes"] == 3_000_000

    added = await shell.json("models", "add", "new", "--runtime", "identity", "--key", "a/b")
    assert added["keys"] == ["a/b"]
    assert (await shell.json("models", "show", "new"))["etag"] == added["etag"]
    changed = await shell.json("models", "update", "new", "--device", "balanced", "--no-keys")
    assert changed["keys"] == [] and changed["placement"]["strategy"] == "balanced"
    assert (await shell.json("models", "pin", "new"))["pinned"]
    assert not (await shell.json("models", "unpin", "new"))["pinned"]
    assert (await shell.json("models", "load", "new"))["model"] == "models/new"
    assert (await shell.json("models", "unload", "new"))["state"] == "cold"
    told = await shell.json("explain", "new")
    kinds = [event["type"] for event in told["events"]]
    assert kinds[0] == "model_created" and {"pinned", "unpinned", "model_updated"} <= set(kinds)
    assert await shell.json("models", "rm", "new") == {"removed": "models/new"}


async def test_the_plan_that_is_printed_can_be_applied_once(shell: Shell, tmp_path: Path) -> None:
    printed = tmp_path / "now.json"
    printed.write_text(await shell.done("devices", "plan", "--json"))
    await shell.done("devices", "apply", str(printed), "--yes")
    # It has an etag, and the plan is another one now.
    assert "ETAG_MISMATCH" in await shell.refused(
        "devices", "apply", str(printed), "--yes", "--json"
    )


async def test_what_is_told_of_a_model_is_told_once(shell: Shell) -> None:
    await shell.done("unload", "sentiment")
    await shell.done("predict", "acme/reviews", "the cat")
    told = await shell.done("explain", "sentiment")
    (loaded,) = [line for line in told.splitlines() if "load_done" in line][-1:]
    assert loaded.count("loaded in") == 1
    assert not re.search(r"\d{5,} bytes", told)
    assert "after it was asked for" in told.splitlines()[0]


async def test_tables_name_devices_as_they_are_written(shell: Shell) -> None:
    for command in (["devices"], ["devices", "plan"], ["devices", "rebalance"]):
        found = await shell.done(*command)
        assert "cuda:1" in found and "cuda-1" not in found


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("devices drain cuda:9", 1, ["DEVICE_NOT_FOUND", "there are: cuda:0, cuda:1, disk"]),
        ("devices drain cuda:128", 1, ["DEVICE_NOT_FOUND"]),
        ("devices plan nowhere.toml", 2, ["No such file"]),
        ("devices apply nowhere.toml --json", 2, ["--yes"]),
        ("budget cuda:0 300", 2, ["300MB"]),
        ("budget cuda:0 300mb", 2, ["write 'MB'"]),
        ("budget cuda:0 99999TB", 1, ["INVALID_FIELD", "at most"]),
        ("models show sentimint", 1, ["MODEL_NOT_FOUND", "did you mean sentiment?"]),
        ("explain sentimint", 1, ["MODEL_NOT_FOUND", "did you mean sentiment?"]),
        ("pin translater", 1, ["MODEL_NOT_FOUND", "did you mean translator?"]),
        ("predict acme/revews hello", 1, ["KEY_NOT_FOUND", "did you mean acme/reviews?"]),
        ("predict q hello", 1, ["KEY_NOT_FOUND: no model goes by the key 'q'"]),
        ("models rm sentiment", 1, ["CONFIG_OWNED", "configuration file"]),
        ("models update sentiment --key k", 1, ["CONFIG_OWNED"]),
        ("models update sentiment", 2, ["nothing to change"]),
        ("models add New --runtime identity", 1, ["INVALID_FIELD", "model_id"]),
        ("models add new --runtime identty", 1, ["there are: identity, torch, transformers"]),
        ("models add new --runtime identity --device disk", 2, ["disk"]),
        (
            "models add new --runtime identity --device cuda:7",
            1,
            ["PLACEMENT_INVALID", "there are"],
        ),
        ("""models add new --runtime identity --device '{"a": "cuda:0"}'""", 1, ["cannot split"]),
        ("""models add new --runtime identity --device '{"a":}'""", 2, ["no JSON"]),
        ("models add new --runtime identity --option size_bytes=x", 2, ["no JSON"]),
        ("models add new --runtime identity --option size_bytes=1e300", 1, ["size_bytes"]),
        ("models add new --runtime identity --option top_k=5", 1, ["known are: size_bytes"]),
        ("models add new --runtime transformers --folder x", 2, ["root and folder go together"]),
        ("watch --past", 2, ["--events"]),
    ],
)
async def test_errors_are_one_line_that_helps(
    shell: Shell, command: str, code: int, words: list[str]
) -> None:
    found = await shell.refused(*shlex.split(command), code=code)
    for word in words:
        assert word in found


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--root", "stor", "--folder", "sentiment"], "there is no root 'stor'; there are: store"),
        (["--root", "store", "--folder", "nowhere"], "the model's folder is missing"),
        ([], "is required: it holds the model's files"),
    ],
)
async def test_a_wrong_source_is_told_once(shell: Shell, given: list[str], words: str) -> None:
    transformers = ("--runtime", "transformers", "--task", "feature-extraction")
    found = await shell.refused("models", "add", "new", *transformers, *given)
    assert found == f"INVALID_FIELD: model.source: {words}"


async def test_a_plan_that_cannot_be_applied_names_the_part_and_the_likely_one(
    shell: Shell, tmp_path: Path
) -> None:
    (tmp_path / "new.toml").write_text(
        '[models]\nsentiment = { "bert.encodr" = "cuda:0", "" = "cuda:1" }\n'
    )
    for command in (["plan", "new.toml"], ["apply", "new.toml"], ["apply", "new.toml", "--yes"]):
        result = await shell.run("devices", *command)
        assert result.exit_code == 1
        assert "PLACEMENT_INVALID" in result.stdout
        assert "did you mean 'bert.encoder'?" in result.stdout
        assert "the plan cannot be applied" in result.stdout


async def test_nothing_is_applied_without_an_answer(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "new.toml").write_text(PLAN)
    before = await shell.json("devices", "plan")
    for typed in ("", "n\n"):
        result = await shell.run("devices", "apply", "new.toml", typed=typed)
        assert result.exit_code == 1
    assert await shell.json("devices", "plan") == before


async def test_without_a_server_the_exit_code_is_3(tmp_path: Path) -> None:
    found = await Shell("127.0.0.1:1", tmp_path).refused("devices", "--timeout", "1", code=3)
    assert "127.0.0.1:1" in found


# --- Watching -------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Lets children be interrupted, also where the tests run in the background.

    A shell without job control has such a process ignore SIGINT, and its children inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
async def test_a_watch_tells_what_an_operator_does_until_it_is_interrupted(
    server: ServerProcess, shell: Shell
) -> None:
    watches = [
        await asyncio.create_subprocess_exec(
            str(COMMAND),
            *("watch", *more, "--server", server.target),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(),
        )
        for more in ([], ["--events", "--past", "--json"])
    ]
    try:
        plain, events = watches
        assert plain.stdout is not None and events.stdout is not None
        assert (await plain.stdout.readline()).decode() == "-- as it is now --\n"
        assert json.loads(await events.stdout.readline())["event"]["revision"] == 1
        await shell.done("pin", "translator")
        await shell.done("devices", "drain", "cuda:0")
        await shell.done("unpin", "translator")
        seen: list[dict[str, Any]] = []
        async with asyncio.timeout(20):
            # From the beginning, which other tests have had a part in.
            unpinned = (str(EventType.UNPINNED), "models/translator")
            while unpinned not in [(event["type"], event["subject"]) for event in seen[-1:]]:
                seen.append(json.loads(await events.stdout.readline())["event"])
            told = ""
            while "translator resident cuda:1" not in told or "pinned" not in told:
                told += (await plain.stdout.readline()).decode()
        drained = [event for event in seen if event["type"] == str(EventType.DEVICE_DRAINED)][-1]
        assert (drained["subject"], drained["cause"]) == ("devices/cuda-0", "operator")
        for watch in watches:
            watch.send_signal(signal.SIGINT)
        for watch in watches:
            _, stderr = await asyncio.wait_for(watch.communicate(), 20)
            assert (watch.returncode, stderr) == (130, b"")
    finally:
        for watch in watches:
            if watch.returncode is None:
                watch.kill()
                await watch.wait()
    assert await eventually("the server goes on", lambda: shell.json("stats"))
