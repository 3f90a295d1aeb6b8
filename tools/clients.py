"""Builds the clients, and runs their scenario in every language against one live server.

    python -m tools.clients [--only LANGUAGE]... [--steps STEP,STEP,...]

Prints a line for every step that is not ok and a table: language, seconds to build, steps passed.
A language whose tools are not on the machine is skipped, and what would bring them is said (or
installed; see tools/system_needs.sh). client/SCENARIO.md says what the steps are. The exit status
is 1 if a client could not be built, if a step was not ok, or if a program left anything behind on
the server; skipped ones do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from modelyard import Admin

__all__ = [
    "LANGUAGES",
    "STEPS",
    "Language",
    "Outcome",
    "build",
    "main",
    "outcome_of",
    "run",
    "summary_of",
    "table_of",
]

ROOT: Final = Path(__file__).resolve().parents[1]
CLIENTS: Final = ROOT / "client"
BUILD: Final = ROOT / "build" / "clients"

STEPS: Final = (
    "create-models",
    "create-route",
    "load",
    "watch",
    "predict",
    "route",
    "stream",
    "generate",
    "errors",
    "delete",
)
"""The steps of client/SCENARIO.md, in their order."""

_BUILD_S: Final = 900
_RUN_S: Final = 300
_MISSING: Final = 3
"""Exit status of tools/system_needs.sh for: optional parts are missing, and it said which."""

console = Console()


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """A client in one language.

    Attributes:
        name: for people.
        id: on the command line, and the prefix of what it makes on the server.
        part: of tools/system_needs.sh, which brings its tools; None if it needs none.
        build: commands that build it, run one after the other in its folder.
        run: the command that runs its scenario, in its folder; the words are added.
        folder: where its sources are.
    """

    name: str
    id: str
    part: str | None
    build: tuple[tuple[str, ...], ...]
    run: tuple[str, ...]
    folder: Path


LANGUAGES: Final = (
    Language(
        name="Python",
        id="python",
        part=None,
        build=(),
        run=(sys.executable, "scenario.py"),
        folder=CLIENTS / "python",
    ),
    Language(
        name="Node",
        id="node",
        part="clients-node",
        build=(
            ("npm", "ci", "--ignore-scripts", "--no-fund", "--no-audit"),
            ("npm", "run", "--silent", "build"),
        ),
        run=("node", "dist/scenario.js"),
        folder=CLIENTS / "node",
    ),
    Language(
        name="Go",
        id="go",
        part="clients-go",
        build=(("./build.sh", str(BUILD / "go")),),
        run=(str(BUILD / "go" / "scenario"),),
        folder=CLIENTS / "go",
    ),
    Language(
        name="C++",
        id="cpp",
        part="clients-cpp",
        build=(
            ("cmake", "-S", ".", "-B", str(BUILD / "cpp"), "--log-level=WARNING"),
            ("cmake", "--build", str(BUILD / "cpp"), "--parallel", "2"),
        ),
        run=(str(BUILD / "cpp" / "scenario"),),
        folder=CLIENTS / "cpp",
    ),
    Language(
        name="Java",
        id="java",
        part="clients-java",
        build=(("./build.sh", str(BUILD / "java")),),
        run=(str(BUILD / "java" / "scenario"),),
        folder=CLIENTS / "java",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one client.

    Attributes:
        language: whose.
        build_s: seconds its build took; None if it was not built.
        passed: steps that were ok.
        asked: steps that it was asked for; 0 if it was not run.
        problems: everything that was not as it should be, a line each.
        skipped: True if its tools are not on this machine.
    """

    language: Language
    build_s: float | None = None
    passed: int = 0
    asked: int = 0
    problems: tuple[str, ...] = ()
    skipped: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong with it. True for one that was skipped."""
        return not self.problems


def outcome_of(
    language: Language, steps: Sequence[str], status: int, output: str, errors: str
) -> Outcome:
    """Judges what a program said by client/SCENARIO.md.

    Args:
        language: whose program.
        steps: what it was asked for.
        status: its exit status.
        output: its standard output.
        errors: its standard error.
    """
    said: dict[str, str] = {}
    problems = []
    for line in output.splitlines():
        verdict, _, why = line.partition(": ")
        step = verdict.removeprefix("not ").removeprefix("ok ")
        if verdict not in (f"ok {step}", f"not ok {step}") or step not in steps or step in said:
            problems.append(f"it said: {line}")
        else:
            said[step] = why if verdict.startswith("not ") else ""
            if verdict.startswith("not "):
                problems.append(line)
    passed = [step for step, why in said.items() if f"not ok {step}: {why}" not in problems]
    if list(said) != [step for step in steps if step in said]:
        problems.append("its steps are not in their order")
    problems += [f"no word of {step}" for step in steps if step not in said]
    if status != (0 if len(passed) == len(steps) else 1):
        problems.append(f"its exit status is {status}")
        problems += [f"it wrote: {line}" for line in errors.splitlines()[-20:]]
    return Outcome(
        language=language, passed=len(passed), asked=len(steps), problems=tuple(problems)
    )


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """The table that `make clients` ends with."""
    table = Table("language", "build s", "steps passed", "")
    for outcome in outcomes:
        table.add_row(
            outcome.language.name,
            "" if outcome.build_s is None else f"{outcome.build_s:.1f}",
            f"{outcome.passed}/{outcome.asked}" if outcome.asked else "",
            "skipped" if outcome.skipped else "ok" if outcome.ok else "FAILED",
        )
    return table


def summary_of(outcomes: Sequence[Outcome]) -> str:
    """The last line: how many passed, failed and were skipped."""
    skipped = sum(outcome.skipped for outcome in outcomes)
    failed = sum(not outcome.ok for outcome in outcomes)
    passed = len(outcomes) - skipped - failed
    return f"clients: {passed} passed, {failed} failed, {skipped} skipped"


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds and runs what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools.clients", description=__doc__)
    parser.add_argument(
        "--only",
        action="append",
        choices=[language.id for language in LANGUAGES],
        help="this language only; may be given more than once",
    )
    parser.add_argument(
        "--steps", default=",".join(STEPS), help="the steps to run, with a comma between"
    )
    options = parser.parse_args(arguments)
    steps = options.steps.split(",")
    if unknown := [step for step in steps if step not in STEPS]:
        parser.error(f"no such step: {unknown[0]} (there are: {', '.join(STEPS)})")
    chosen = [
        language
        for language in LANGUAGES
        if options.only in (None, []) or language.id in options.only
    ]
    built = [build(language) for language in chosen]
    with tempfile.TemporaryDirectory(prefix="modelyard-clients-") as base:
        outcomes = asyncio.run(_run_all(built, steps, Path(base)))
    for outcome in outcomes:
        for problem in outcome.problems:
            # As it is: markup would be taken out of it, and lines broken.
            console.print(
                f"{outcome.language.name}: {problem}", markup=False, highlight=False, soft_wrap=True
            )
    console.print(table_of(outcomes))
    console.print(summary_of(outcomes), highlight=False)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def build(language: Language) -> Outcome:
    """Builds one client, or says why it could not be."""
    if language.part is not None:
        needs = subprocess.run([ROOT / "tools" / "system_needs.sh", language.part], check=False)
        if needs.returncode == _MISSING:
            return Outcome(language=language, skipped=True)
        if needs.returncode != 0:
            return Outcome(
                language=language, problems=(f"system_needs.sh ended with {needs.returncode}",)
            )
    console.print(f"building the client in {language.name}", highlight=False)
    begin = time.monotonic()
    for command in language.build:
        done = _run(command, language.folder, _BUILD_S)
        if done.returncode != 0:
            log = (done.stdout + done.stderr).splitlines()[-20:]
            problem = f"{' '.join(command)} ended with {done.returncode}"
            return Outcome(language=language, problems=(problem, *log))
    return Outcome(language=language, build_s=time.monotonic() - begin)


async def _run_all(built: Sequence[Outcome], steps: Sequence[str], base: Path) -> list[Outcome]:
    if not any(outcome.build_s is not None for outcome in built):
        return list(built)
    # Here, because it brings torch, which nobody should wait for whose build fails.
    from tools.client_yard import yard

    outcomes = []
    async with yard(base) as server:
        for outcome in built:
            if outcome.build_s is not None:
                outcome = replace(
                    await asyncio.to_thread(run, outcome.language, server.words, steps),
                    build_s=outcome.build_s,
                )
            outcomes.append(outcome)
    return outcomes


def run(language: Language, words: Mapping[str, str], steps: Sequence[str]) -> Outcome:
    """Runs the scenario of a client that is built, and looks at what it leaves behind.

    Args:
        language: whose.
        words: as ClientYard.words.
        steps: the steps to run.
    """
    console.print(f"running the scenario in {language.name}", highlight=False)
    given = {**words, "prefix": language.id, "steps": ",".join(steps)}
    command = (*language.run, *(f"{name}={value}" for name, value in given.items()))
    done = _run(command, language.folder, _RUN_S)
    outcome = outcome_of(language, steps, done.returncode, done.stdout, done.stderr)
    with Admin(words["target"]) as admin:
        left = [route.name for route in admin.list_routes()]
        left += [model.name for model in admin.list_models()]
    if "delete" in steps and left:
        outcome = replace(outcome, problems=(*outcome.problems, f"left behind: {', '.join(left)}"))
    return outcome


def _run(
    command: Sequence[str], folder: Path, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; a timeout or a missing program is a status like any other."""
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env=_environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode(errors="replace") if error.stdout else ""
        return subprocess.CompletedProcess(command, -1, text, f"no end within {timeout_s} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, -1, "", str(error))


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What builds and programs run with."""
    scripts = sysconfig.get_path("scripts")
    return {
        **environment,
        # cmake is among the build tools of .venv.
        "PATH": os.pathsep.join([scripts, environment.get("PATH", "")]),
        # googleapis-common-protos has the messages of error details as .proto files.
        "GOOGLEAPIS": environment.get("GOOGLEAPIS", sysconfig.get_path("purelib")),
        # gRPC asks a proxy for the loopback, too, where one is named.
        "no_proxy": "127.0.0.1,localhost",
    }


if __name__ == "__main__":
    sys.exit(main())
