"""All problems of a configuration at once, each with its key and its line."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
from tests.support.config_problems import CPU, only_problem, problems_of

from modelyard_server.config import ConfigError, load_config


class TestAllProblemsAtOnce:
    def test_every_problem_has_its_key_and_line(self, base: Path) -> None:
        text = dedent(
            """\
            title = "x"
            [server]
            listen = "0.0.0.0:8470"
            shutdown_grace = 3
            [yard]
            policy = "lfu"
            max_waiting = true
            [[devices]]
            device = "cpu"
            bugdet = "300MB"
            [[devices]]
            device = "cpu:0"
            budget = "300mb"
            [roots]
            store = "nowhere"
            [runtimes.jax]
            [models.a]
            keys = [
              "x",
              "no space",
              "b",
            ]
            runtime = "transformers"
            root = "sotre"
            folder = "../x"
            device = "cuda:1"
            [models.b]
            keys = ["x"]
            runtime = "identity"
            [models.b.device]
            encoder.layer = "cpu"
            "head" = "cuda:3"
            """
        )
        assert [(line, key) for line, key, _ in problems_of(text, base)] == [
            (1, "title"),
            (3, "server.listen"),
            (4, "server.shutdown_grace"),
            (6, "yard.policy"),
            (7, "yard.max_waiting"),
            (8, "devices[0].budget"),
            (10, "devices[0].bugdet"),
            (12, "devices[1].device"),
            (13, "devices[1].budget"),
            (15, "roots.store"),
            (16, "runtimes.jax"),
            (17, "models.a.task"),
            (20, "models.a.keys[1]"),
            (21, "models.a.keys[2]"),
            (24, "models.a.root"),
            (25, "models.a.folder"),
            (26, "models.a.device"),
            (28, "models.b.keys[0]"),
            (31, "models.b.device.encoder"),
            (32, "models.b.device.head"),
        ]

    def test_the_text_of_the_error_has_them_all(self, base: Path) -> None:
        file = base / "yard.toml"
        file.write_text("[server]\na = 1\nb = 2\n", encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(file)
        assert caught.value.source == file
        lines = str(caught.value).splitlines()
        assert lines[0].startswith(f"{file}:1: devices: is missing")
        assert lines[1].startswith(f"{file}:2: server.a: unknown field")
        assert lines[2].startswith(f"{file}:3: server.b: unknown field")

    @pytest.mark.parametrize(
        ("text", "line", "key", "advice"),
        [
            ('[server]\nlog_levle = "info"\n', 2, "server.log_levle", 'did you mean "log_level"?'),
            ("[yard]\nzzz = 1\n", 2, "yard.zzz", "known here: policy, "),
            ("[sever]\n", 1, "sever", 'did you mean "server"?'),
            ("[model.x]\n", 1, "model", 'did you mean "models"?'),
            ("[models.x]\nruntime = 'identity'\nid = 'y'\n", 3, "models.x.id", "known here"),
            ("[runtimes.torhc]\n", 1, "runtimes.torhc", "torch"),
            ("[runtimes.torch]\nallow = []\n", 2, "runtimes.torch.allow", "allowed_factories"),
        ],
    )
    def test_unknown_fields_are_named_with_the_nearest_known_one(
        self, base: Path, text: str, line: int, key: str, advice: str
    ) -> None:
        problem = only_problem(text + CPU, base)
        assert problem[:2] == (line, key)
        assert problem[2].startswith("unknown field")
        assert advice in problem[2]

    def test_one_mistake_is_not_reported_as_two(self, base: Path) -> None:
        # An unreadable device is not "undeclared", a root with a wrong folder not "unknown", an
        # unknown runtime neither needs nor forbids weights, a bad deadline contradicts nobody.
        text = (
            '[server]\nmax_deadline_s = "10"\n'
            '[[devices]]\ndevice = "cuda:O"\nbudget = 1\n[roots]\nstore = "nowhere"\n'
            '[models.a]\nruntime = "trch"\nroot = "store"\nfolder = "a"\ndevice = "cuda:0"\n'
        )
        assert [(line, key) for line, key, _ in problems_of(text, base)] == [
            (2, "server.max_deadline_s"),
            (4, "devices[0].device"),
            (7, "roots.store"),
            (9, "models.a.runtime"),
        ]

    def test_hostile_names_come_back_escaped_and_short(self, base: Path) -> None:
        escape = "\\u001b[31m\\n"
        text = f'["models"."{escape}"]\nruntime = "{escape}"\n["{"x" * 5000}"]\n{CPU}'
        for _, key, problem in problems_of(text, base):
            assert key.isprintable()
            assert problem.isprintable()
            assert len(key) + len(problem) < 400
