"""modelyard check-config and modelyard import."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import pytest
import torch
import typer
import typer.main
from tests.support.config_problems import CPU, ECHO
from typer.testing import CliRunner

from modelyard_server.cli.config import register


class TestCommands:
    @pytest.fixture
    def app(self) -> typer.Typer:
        app = typer.Typer()
        register(app)
        return app

    def test_a_good_file_is_ok(self, app: typer.Typer, base: Path) -> None:
        file = base / "yard.toml"
        file.write_text(CPU + ECHO, encoding="utf-8")
        result = CliRunner().invoke(app, ["check-config", str(file)])
        assert (result.exit_code, result.stdout) == (0, "ok: 1 models, 1 devices\n")
        result = CliRunner().invoke(app, ["check-config", str(file), "--json"])
        assert result.exit_code == 0
        assert json.loads(result.stdout) == {
            "ok": True,
            "file": str(file),
            "models": 1,
            "devices": 1,
        }

    def test_a_bad_file_is_told_line_by_line(self, app: typer.Typer, base: Path) -> None:
        file = base / "yard.toml"
        file.write_text(f"{CPU}bugdet = 1\n[server]\nmax_deadline_s = 1\n", encoding="utf-8")
        result = CliRunner().invoke(app, ["check-config", str(file)])
        assert result.exit_code == 2
        assert result.stdout.splitlines() == [
            f'{file}:4: devices[0].bugdet: unknown field; did you mean "budget"?',
            f"{file}:5: server.default_deadline_s: "
            "must not be above max_deadline_s: 30 is more than 1",
        ]
        result = CliRunner().invoke(app, ["check-config", "--json", str(file)])
        assert result.exit_code == 2
        told = json.loads(result.stdout)
        assert told["ok"] is False
        assert [(each["line"], each["key"]) for each in told["problems"]] == [
            (4, "devices[0].bugdet"),
            (5, "server.default_deadline_s"),
        ]

    def test_a_missing_file_is_one_line(self, app: typer.Typer, base: Path) -> None:
        result = CliRunner().invoke(app, ["check-config", str(base / "absent.toml")])
        assert result.exit_code == 2
        assert result.stdout == (f"{base / 'absent.toml'}:1: cannot be read: {os.strerror(2)}\n")

    def test_an_import_says_what_it_wrote(self, app: typer.Typer, base: Path) -> None:
        checkpoint = base / "net.pth"
        torch.save({"epoch": 3, "state_dict": {"w": torch.zeros(256, 4)}}, checkpoint)
        result = CliRunner().invoke(app, ["import", str(checkpoint), str(base / "net")])
        assert result.exit_code == 0, result.output
        first, *rest = result.stdout.splitlines()
        assert first == f"imported {checkpoint} into {base / 'net'}: 1 tensors, 4KiB"
        assert rest == ['left out: "epoch"']
        assert list((base / "net").glob("*.safetensors"))

    def test_a_refused_import_is_one_line_and_exit_code_two(
        self, app: typer.Typer, base: Path
    ) -> None:
        result = CliRunner().invoke(app, ["import", str(base / "absent"), str(base / "new")])
        assert result.exit_code == 2
        assert result.stderr.startswith("refused: ")
        assert result.stderr.count("\n") == 1
        assert not (base / "new").exists()

    def test_the_commands_have_their_names(self, app: typer.Typer) -> None:
        group = typer.main.get_command(app)
        assert isinstance(group, click.Group | typer.core.TyperGroup)
        assert set(group.commands) == {"check-config", "import"}
