"""[catalog], [weights], [engine] and [roots]: what is where on the disk, and where models run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.config_problems import CPU, only_problem

from modelyard_server.config import EngineConfig, WeightsConfig, load_config, parse_config


class TestCatalog:
    def test_it_is_beside_the_file_unless_the_file_says_otherwise(self, base: Path) -> None:
        file = base / "yard.toml"
        for text, path in [
            ("", base / "modelyard.db"),
            ("[catalog]\ndurable = true\n", base / "modelyard.db"),
            ('[catalog]\nfile = "models/yard.db"\n', base / "models" / "yard.db"),
            (f'[catalog]\nfile = "{base}/x.db"\n', base / "x.db"),
            ("[catalog]\ndurable = false\n", None),
            ('[catalog]\nfile = "x.db"\ndurable = false\n', None),
        ]:
            file.write_text(f"{text}{CPU}", encoding="utf-8")
            assert load_config(file).catalog.path == path, text

    def test_a_text_without_a_file_has_it_in_memory_unless_told_otherwise(self, base: Path) -> None:
        assert parse_config(CPU, base=base).catalog.path is None
        config = parse_config(CPU, base=base, default_catalog=base / "x.db")
        assert config.catalog.path == base / "x.db"
        config = parse_config(f'[catalog]\nfile = "y.db"\n{CPU}', base=base)
        assert config.catalog.path == base / "y.db"

    @pytest.mark.parametrize(
        ("setting", "text"),
        [
            ('file = "absent/x.db"', "folder of"),
            ('file = "models"', "not a file"),
            ('file = ""', "path of a file"),
            ('file = "~/x.db"', "not expanded"),
            ('file = "sqlite:///x.db"', "not a URL"),
            (f'file = "{"x" * 5000}"', "cannot be opened"),
            ("file = 1", "got an integer"),
            ('durable = "no"', "true or false"),
            ('path = "x.db"', "unknown field"),
        ],
    )
    def test_what_cannot_be_is_refused(self, base: Path, setting: str, text: str) -> None:
        line, key, problem = only_problem(f"[catalog]\n{setting}\n{CPU}", base)
        assert (line, key) == (2, f"catalog.{setting.split()[0]}")
        assert text in problem


class TestWeightsAndEngine:
    def test_the_store_is_beside_the_file_unless_the_file_says_otherwise(self, base: Path) -> None:
        file = base / "yard.toml"
        for text, store in [
            ("", base / "modelyard-store"),
            ('[weights]\nstore = "models/store"\n', base / "models" / "store"),
            ("[weights]\nin_place = true\n", None),
            ('[weights]\nstore = "x"\nin_place = true\n', None),
        ]:
            file.write_text(f"{text}{CPU}", encoding="utf-8")
            assert load_config(file).weights.store == store, text
        assert parse_config(CPU, base=base).weights == WeightsConfig()

    def test_what_is_said_is_what_counts(self, base: Path) -> None:
        text = '[weights]\nread = "arena"\narena = "1MiB"\nkeep_unused_s = 0.5\n'
        text += '[engine]\nkind = "thread"\nstrikes = 5\n'
        config = parse_config(text + CPU, base=base)
        assert (config.weights.read, config.weights.arena) == ("arena", 2**20)
        assert config.weights.keep_unused_s == 0.5
        assert WeightsConfig().keep_unused_s == 86_400
        assert config.engine == EngineConfig(kind="thread", strikes=5)
        assert EngineConfig().kind == "process"

    @pytest.mark.parametrize(
        ("setting", "text"),
        [
            ('weights.store = "absent/x"', "does not exist"),
            ('weights.store = "a-file"', "not a folder"),
            ('weights.store = "s3://bucket"', "not a URL"),
            ("weights.store = 1", "got an integer"),
            ('weights.in_place = "no"', "true or false"),
            ('weights.read = "slab"', "map"),
            ("weights.arena = -1", "must be 0 to"),
            ("weights.keep_unused_s = -1", "0"),
            ("weights.keep_unused_s = inf", "must be"),
            ('weights.path = "x"', "unknown field"),
            ('engine.kind = "fork"', "process"),
            ("engine.run_limit_s = 0", "0.01"),
            ('engine.headroom = "-1"', "size"),
            ("engine.strikes = 0", "1"),
        ],
    )
    def test_what_cannot_be_is_refused(self, base: Path, setting: str, text: str) -> None:
        (base / "a-file").write_text("")
        line, key, problem = only_problem(f"{setting}\n{CPU}", base)
        assert (line, key) == (1, setting.split()[0])
        assert text in problem


class TestRoots:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ('"absent"', "does not exist"),
            ('"file"', "not a folder"),
            ('"file/below"', "cannot be opened"),
            ('"loop"', "cannot be opened"),
            ('""', "path of a folder"),
            ('"~/models"', "not expanded"),
            ('"file:///models"', "not a URL"),
            ('"s3://bucket/models"', "not a URL"),
            ('"a\\u0000b"', "control characters"),
            (f'"{"x" * 5000}"', "cannot be opened"),
            ("1", "got an integer"),
        ],
    )
    def test_folders_that_are_not_there_are_refused(
        self, base: Path, value: str, text: str
    ) -> None:
        (base / "file").touch()
        (base / "loop").symlink_to("loop")
        line, key, problem = only_problem(f"[roots]\nstore = {value}\n{CPU}", base)
        assert (line, key) == (2, "roots.store")
        assert text in problem
