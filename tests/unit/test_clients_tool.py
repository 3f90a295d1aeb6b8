"""What `make clients` makes of what programs say, and that everybody speaks of the same steps."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from tools import clients
from tools.client_yard import AFFINITY_COUNT, SALT, WEIGHTS, affinities, branch_of
from tools.clients import LANGUAGES, STEPS, Outcome, outcome_of, summary_of, table_of

from modelyard_server.routing.affinity import choose

ROOT = clients.ROOT
GO = next(language for language in LANGUAGES if language.id == "go")
SOURCES = {
    "python": "scenario.py",
    "node": "src/scenario.ts",
    "go": "cmd/scenario/main.go",
    "cpp": "src/scenario.cpp",
    "java": "src/dev/modelyard/client/Scenario.java",
}


def judged(output: str, *, status: int = 0, steps: str = "load,watch", errors: str = "") -> Outcome:
    return outcome_of(GO, steps.split(","), status, output, errors)


class TestOutcomes:
    def test_all_steps_ok(self) -> None:
        outcome = judged("ok load\nok watch\n")
        assert (outcome.ok, outcome.passed, outcome.asked, outcome.problems) == (True, 2, 2, ())

    def test_a_step_that_is_not_ok_is_told_with_its_reason(self) -> None:
        outcome = judged("ok load\nnot ok watch: state is 1, not 4: cold\n", status=1)
        assert (outcome.passed, outcome.asked) == (1, 2)
        assert outcome.problems == ("not ok watch: state is 1, not 4: cold",)

    @pytest.mark.parametrize(
        ("output", "status", "problem"),
        [
            ("ok load\n", 1, "no word of watch"),
            ("", -11, "no word of load"),
            ("ok load\nok watch\n", 1, "its exit status is 1"),
            ("ok load\nnot ok watch: x\n", 0, "its exit status is 0"),
            ("ok load\nok watch\nok route\n", 0, "it said: ok route"),
            ("ok load\nok load\nok watch\n", 0, "it said: ok load"),
            ("ok watch\nok load\n", 0, "its steps are not in their order"),
            ("okay load\nok watch\n", 1, "it said: okay load"),
            ("not load\nok watch\n", 1, "it said: not load"),
        ],
    )
    def test_whatever_a_program_should_not_do_fails(
        self, output: str, status: int, problem: str
    ) -> None:
        outcome = judged(output, status=status)
        assert not outcome.ok
        assert problem in outcome.problems

    def test_a_program_that_dies_is_told_with_its_last_words(self) -> None:
        outcome = judged("ok load\n", status=2, errors="panic: no\n")
        assert {"its exit status is 2", "it wrote: panic: no"} <= set(outcome.problems)


def test_the_table_has_a_line_a_language_and_says_what_was_skipped() -> None:
    outcomes = [
        Outcome(language=GO, build_s=12.345, passed=2, asked=2),
        Outcome(language=GO, build_s=1.0, passed=1, asked=2, problems=("not ok watch: x",)),
        Outcome(language=GO, problems=("no compiler",)),
        Outcome(language=GO, skipped=True),
    ]
    text = io.StringIO()
    Console(file=text, width=100).print(table_of(outcomes))
    rows = [re.findall(r"[\w./]+", line) for line in text.getvalue().splitlines() if "Go" in line]
    assert rows == [
        ["Go", "12.3", "2/2", "ok"],
        ["Go", "1.0", "1/2", "FAILED"],
        ["Go", "FAILED"],
        ["Go", "skipped"],
    ]
    assert summary_of(outcomes) == "clients: 1 passed, 2 failed, 1 skipped"


class TestSteps:
    def test_the_page_has_the_steps_in_their_order(self) -> None:
        page = (ROOT / "client" / "SCENARIO.md").read_text(encoding="utf-8")
        assert tuple(re.findall(r"^### (\S+)$", page, re.MULTILINE)) == STEPS

    @pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.id)
    def test_every_program_has_them_too(self, language: clients.Language) -> None:
        source = (language.folder / SOURCES[language.id]).read_text(encoding="utf-8")
        # Names that stand before what they name. Fields of messages do too, but the table is whole.
        table = re.findall(
            r'^\W*(?:STEPS\.put\()?"?([a-z-]+)"?[:,] (?=[&({*S])', source, re.MULTILINE
        )
        assert " ".join(STEPS) in " ".join(name for name in table if name in STEPS)

    def test_a_step_that_does_not_exist_is_refused(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            clients.main(["--steps", "load,walk"])
        assert ended.value.code == 2
        assert "no such step: walk" in capsys.readouterr().err


class TestMissingTools:
    @staticmethod
    def asked(part: str, folder: Path, *, apt: bool) -> subprocess.CompletedProcess[str]:
        """Asks for a part where there is nothing but what the script itself runs."""
        for name in ("bash", "mktemp", "rm", "id", "paste", *(["apt-get"] if apt else [])):
            (folder / name).symlink_to(shutil.which(name) or "/bin/true")
        return subprocess.run(
            [shutil.which("bash") or "bash", ROOT / "tools" / "system_needs.sh", part],
            env={"PATH": str(folder), "MODELYARD_NO_INSTALL": "1", "JARS": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )

    @pytest.mark.parametrize(
        ("part", "package"),
        [
            ("clients-node", "npm"),
            ("clients-go", "protoc-gen-go-1-3"),
            ("clients-cpp", "libgrpc++-dev"),
            ("clients-java", "libgrpc-java"),
        ],
    )
    def test_the_command_that_brings_them_is_said(
        self, part: str, package: str, tmp_path: Path
    ) -> None:
        done = self.asked(part, tmp_path, apt=True)
        assert done.returncode == 3, done.stderr
        assert "skipped: the client in " in done.stderr
        command = next(line for line in done.stderr.splitlines() if "apt-get install" in line)
        assert package in command.split()

    def test_what_is_needed_is_said_where_no_package_manager_is_known(self, tmp_path: Path) -> None:
        done = self.asked("clients-java", tmp_path, apt=False)
        assert done.returncode == 3, done.stderr
        assert "with your system's package manager: a JDK, grpc-java" in done.stderr

    def test_a_language_without_its_tools_is_skipped_and_no_failure(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        tool = tmp_path / "tools" / "system_needs.sh"
        tool.parent.mkdir()
        tool.write_text("#!/bin/sh\nexit 3\n")
        tool.chmod(0o755)
        monkeypatch.setattr(clients, "ROOT", tmp_path)
        assert clients.main(["--only", "go"]) == 0
        outcome = clients.build(GO)
        assert outcome.skipped and outcome.ok and outcome.asked == 0

    def test_a_build_that_fails_is_told_with_its_log(self, tmp_path: Path) -> None:
        language = clients.Language(
            name="X",
            id="x",
            part=None,
            build=(("sh", "-c", "echo so it is >&2; exit 7"),),
            run=(),
            folder=tmp_path,
        )
        outcome = clients.build(language)
        assert outcome.build_s is None and not outcome.ok
        assert outcome.problems[-1] == "so it is"
        assert "ended with 7" in outcome.problems[0]


class TestAffinities:
    def test_the_list_is_what_the_server_would_say(self) -> None:
        # Two implementations of one page: this tool's and the server's.
        branches = list(WEIGHTS.items())
        names = affinities()
        assert len(set(names)) == AFFINITY_COUNT
        theirs = [branches[choose(SALT, branches, name)][0] for name in names]
        assert [branch_of(name) for name in names] == theirs
        assert set(theirs) == set(WEIGHTS)

    def test_each_branch_has_about_its_weight(self) -> None:
        counts = Counter(map(branch_of, affinities()))
        # 750 of 1,000; the list is always the same.
        assert abs(counts["blue"] - 750) < 60


class TestContract:
    """What the builds in client/ take for granted."""

    PROTOS = sorted((ROOT / "proto" / "modelyard" / "v1").glob("*.proto"))

    def test_optional_fields_are_written_as_the_build_in_go_rewrites_them(self) -> None:
        pattern = re.compile(r"^ *optional [A-Za-z0-9_.]+ [a-z0-9_]+ = [0-9]+;$")
        lines = [line for file in self.PROTOS for line in file.read_text().splitlines()]
        found = [line for line in lines if line.strip().startswith("optional ")]
        assert found and all(pattern.match(line) for line in found)

    def test_services_are_in_files_named_for_them_alone(self) -> None:
        # The build in C++ generates services of these only.
        for file in self.PROTOS:
            has_service = re.search(r"^service ", file.read_text(), re.MULTILINE) is not None
            assert has_service == file.stem.endswith("_service"), file.name
