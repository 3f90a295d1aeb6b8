"""[models]: ids, keys, folders, placements and options, and [runtimes]."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.config_problems import CPU, only_problem, problems_of, with_model

from modelyard_server.config import parse_config


class TestModels:
    @pytest.mark.parametrize(
        "model_id", ["", "A", "-a", ".a", "a..b", "a/b", "a b", "ä", "a" * 129, "../a", "a\\n"]
    )
    def test_ids_follow_their_grammar(self, base: Path, model_id: str) -> None:
        line, _, problem = only_problem(f'{CPU}[models."{model_id}"]\nruntime="identity"', base)
        assert line == 4
        assert "the name must" in problem

    @pytest.mark.parametrize("model_id", ["a", "0", "a.b", "a-b_c.1", "a" * 128])
    def test_good_ids_are_taken(self, base: Path, model_id: str) -> None:
        config = parse_config(f'{CPU}[models."{model_id}"]\nruntime="identity"', base=base)
        assert config.models[0].id == model_id

    @pytest.mark.parametrize(
        "key", ["", "-a", "/a", "a..b", "../a", "a b", "a\\u0000", "é", "a\\u202e", "k" * 257]
    )
    def test_keys_follow_their_grammar(self, base: Path, key: str) -> None:
        line, found, _ = only_problem(
            with_model(f'runtime = "identity"\nkeys = ["fine", "{key}"]\n'), base
        )
        assert (line, found) == (11, "models.m.keys[1]")

    @pytest.mark.parametrize("key", ["A", "a/b:c.d_e-f", "0", "k" * 256, "m"])
    def test_good_keys_are_taken(self, base: Path, key: str) -> None:
        config = parse_config(with_model(f'runtime = "identity"\nkeys = ["{key}"]\n'), base=base)
        assert config.models[0].keys == (key,)

    @pytest.mark.parametrize("value", ['"a"', "1", "{}", "[1]", "[['a']]"])
    def test_keys_are_an_array_of_strings(self, base: Path, value: str) -> None:
        line, key, _ = only_problem(with_model(f'runtime = "identity"\nkeys = {value}\n'), base)
        assert (line, key.removesuffix("[0]")) == (11, "models.m.keys")

    def test_a_key_means_one_model(self, base: Path) -> None:
        text = (
            f'{CPU}[models.a]\nruntime = "identity"\nkeys = ["x", "x", "b"]\n'
            '[models.b]\nruntime = "identity"\nkeys = ["x", "y", "a"]\n'
        )
        problems = problems_of(text, base)
        assert [(line, key) for line, key, _ in problems] == [
            (6, "models.a.keys[1]"),
            (6, "models.a.keys[2]"),
            (9, "models.b.keys[0]"),
            (9, "models.b.keys[2]"),
        ]
        assert "twice" in problems[0][2]
        assert "id of another model" in problems[1][2]
        assert "models.a" in problems[2][2]
        assert "id of another model" in problems[3][2]

    @pytest.mark.parametrize(
        "folder",
        [
            "",
            "/etc",
            "//host/share",
            "..",
            "a/../b",
            "a/..",
            ".",
            "./a",
            "a//b",
            "a/",
            "a\\\\b",
            "a\\u0000b",
            "a\\nb",
            "http://host/a",
            "file:a",
            "s3://a/b",
            "C:/a",
            "x" * 256,
            "x/" * 600 + "x",
        ],
    )
    def test_folders_cannot_leave_their_root(self, base: Path, folder: str) -> None:
        text = with_model(f'runtime = "torch"\nroot = "store"\nfolder = "{folder}"\n')
        assert only_problem(text, base)[:2] == (12, "models.m.folder")

    def test_an_undeclared_root_is_named_with_those_there_are(self, base: Path) -> None:
        text = with_model('runtime = "torch"\nroot = "sotre"\nfolder = "a"\n')
        line, key, problem = only_problem(text, base)
        assert (line, key) == (11, "models.m.root")
        assert "there: store" in problem

    @pytest.mark.parametrize(
        ("settings_text", "line", "key", "text"),
        [
            ("", 9, "runtime", "is missing"),
            ("runtime = 'onnx'\n", 10, "runtime", "must be one of transformers, torch, identity"),
            ("runtime = 'torch'\nfolder = 'a'\n", 9, "root", "is missing"),
            ("runtime = 'torch'\nroot = 'store'\n", 9, "folder", "is missing"),
            ("runtime = 'identity'\nroot = 'store'\n", 11, "root", "no weights"),
            ("runtime = 'identity'\nfolder = 'a'\n", 11, "folder", "no weights"),
            ("runtime = 'identity'\ntask = 'fill-mask'\n", 11, "task", "does one thing"),
            (
                "runtime = 'transformers'\nroot = 'store'\nfolder = 'a'\n",
                9,
                "task",
                "is missing",
            ),
            (
                "runtime = 'transformers'\nroot = 'store'\nfolder = 'a'\ntask = 'fill'\n",
                13,
                "task",
                "fill-mask",
            ),
            ("runtime = 'identity'\npinned = 'yes'\n", 11, "pinned", "true or false"),
        ],
    )
    def test_what_a_runtime_needs_has_to_be_there(
        self, base: Path, settings_text: str, line: int, key: str, text: str
    ) -> None:
        problem = only_problem(with_model(settings_text), base)
        assert problem[:2] == (line, f"models.m.{key}")
        assert text in problem[2]

    @pytest.mark.parametrize(
        ("device", "line", "key", "text"),
        [
            ('device = "cuda:1"', 11, "device", "use one of cpu, cuda:0"),
            ('device = "disk"', 11, "device", "only be used as a part of device maps"),
            ('device = "balanced_low_0"', 11, "device", "use one of cpu"),
            ('device = "gpu"', 11, "device", "use one of cpu, cuda, disk, mps, xpu"),
            ("device = 1", 11, "device", "got an integer"),
            ("device = {}", 11, "device", "at least one part"),
            ('device = { "a" = "cuda:1" }', 11, "device.a", "not declared"),
            ('device = { a = "cpu", "a.b" = "disk" }', 11, 'device."a.b"', "not declared"),
            ('device = { strategy = "fair" }', 11, "device.strategy", "auto, balanced, sequential"),
            ('device = { strategy = "auto", x = 1 }', 11, "device.x", "unknown field"),
            (
                'device = { strategy = "balanced", devices = "cpu" }',
                11,
                "device.devices",
                "must be an array",
            ),
            (
                'device = { strategy = "balanced", devices = ["cpu", "gpu"] }',
                11,
                "device.devices[1]",
                "use one of cpu, cuda, disk",
            ),
            (
                'device = { strategy = "balanced", devices = ["cpu", "cpu:0"] }',
                11,
                "device.devices[1]",
                "listed twice",
            ),
            (
                '[models.m.device]\nstrategy = "balanced"\ndevices = ["cpu", "cuda:7"]',
                13,
                "device.devices[1]",
                "not declared",
            ),
            (
                'device = { strategy = "auto", devices = ["disk"] }',
                11,
                "device.devices",
                "cannot hold a whole model",
            ),
            ('device = { a.b = "cpu" }', 11, "device.a", "in quotes"),
            ("device = { a = 0 }", 11, "device.a", "must be a device"),
            ('device = { type = "both" }', 11, "device.type", '"single" or "multiple"'),
            ('device = { type = "single" }', 11, "device.device", "is missing"),
            ('device = { type = "single", device = 1 }', 11, "device.device", "must be a device"),
            (
                'device = { type = "single", device = "cpu", x = 1 }',
                11,
                "device.x",
                "unknown field",
            ),
            ('device = { type = "multiple", device_map = 1 }', 11, "device.device_map", "a table"),
            ('device = { device_map = { a = "cpu" } }', 11, "device.type", "it is missing"),
            (
                '[models.m.device]\ntype = "multiple"\n[models.m.device.device_map]\na = "cuda:1"',
                14,
                "device.device_map.a",
                "not declared",
            ),
            (
                '[models.m.device]\na = "cpu"\nb = "cuda:7"',
                13,
                "device.b",
                "not declared",
            ),
        ],
    )
    def test_placements_that_cannot_be_are_refused_where_they_are(
        self, base: Path, device: str, line: int, key: str, text: str
    ) -> None:
        problem = only_problem(with_model(f'runtime = "identity"\n{device}\n'), base)
        assert problem[:2] == (line, f"models.m.{key}")
        assert text in problem[2]

    @pytest.mark.parametrize(
        ("value", "key"),
        [
            ("1", "options"),
            ("{ a = 2020-01-01 }", "options.a"),
            ("{ a = 12:00:00 }", "options.a"),
            ("{ a = [1, nan] }", "options.a[1]"),
            ("{ a = { b = inf } }", "options.a.b"),
            ("{ a = 9007199254740993 }", "options.a"),
            (f"{{ a = {'[' * 20}{']' * 20} }}", "options.a" + "[0]" * 15),
        ],
    )
    def test_options_are_what_json_can_say(self, base: Path, value: str, key: str) -> None:
        text = with_model(f'runtime = "identity"\noptions = {value}\n')
        assert only_problem(text, base)[:2] == (11, f"models.m.{key}")

    @pytest.mark.parametrize(
        "name", ["", "a", "a:", ":b", "a:b.c", "a.b:c d", "a..b:c", "1a:b", "a:b()", "ä:b", "os:*"]
    )
    def test_factories_are_exact_names(self, base: Path, name: str) -> None:
        text = f'[runtimes.torch]\nallowed_factories = ["a.b:c", "{name}"]\n{CPU}'
        assert only_problem(text, base)[:2] == (2, "runtimes.torch.allowed_factories[1]")
