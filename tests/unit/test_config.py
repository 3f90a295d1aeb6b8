"""Reading, checking and documenting the configuration."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from decimal import Decimal
from pathlib import Path
from textwrap import dedent
from typing import Any

import click
import pytest
import torch
import typer
import typer.main
from typer.testing import CliRunner

from modelyard.devices import ComponentDevice, Device, DeviceMap
from modelyard.placements import AutomaticPlacement, Placement, PlacementStrategy
from modelyard_server.cli.config import register
from modelyard_server.config import (
    Budget,
    CatalogConfig,
    Config,
    ConfigError,
    DeviceConfig,
    EngineConfig,
    HostTierConfig,
    HttpConfig,
    ModelConfig,
    RouteConfig,
    ServerConfig,
    WeightsConfig,
    YardConfig,
    default_config_text,
    load_config,
    parse_config,
)
from modelyard_server.config.reading import MAX_CONFIG_BYTES
from modelyard_server.config.rules import RuleError
from modelyard_server.config.values import POLICIES, rule_of, settings
from modelyard_server.devices.sizes import MAX_SIZE_BYTES, format_size, parse_size
from modelyard_server.routing.targets import (
    Branch,
    Ensemble,
    Fallback,
    Link,
    Member,
    One,
    Sequence,
    Shadow,
    Split,
    Step,
    Target,
    Transform,
    Version,
    Versions,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"

CPU = '[[devices]]\ndevice = "cpu"\nbudget = "1GB"\n'
ECHO = '[models.echo]\nruntime = "identity"\n'

# What a caller without a type checker may pass.
WRONG: Any = object()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path


def problems_of(text: str, base: Path) -> list[tuple[int, str, str]]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, base=base)
    return [(found.line, found.key, found.text) for found in caught.value.problems]


def only_problem(text: str, base: Path) -> tuple[int, str, str]:
    problems = problems_of(text, base)
    assert len(problems) == 1, problems
    return problems[0]


def with_model(settings_text: str) -> str:
    """Return a configuration whose model has these settings, from line 10."""
    text = (
        '[[devices]]\ndevice = "cpu"\nbudget = 1\n'
        '[[devices]]\ndevice = "cuda:0"\nbudget = 1\n'
        '[roots]\nstore = "models"\n[models.m]\n'
    )
    return text + dedent(settings_text)


class TestGoodFiles:
    def test_every_setting_is_read(self, base: Path) -> None:
        config = parse_config(
            """
            [server]
            listen = "[::1]:0"
            default_deadline_s = 0.5
            max_deadline_s = 60
            max_message_bytes = "1MiB"
            shutdown_grace_s = 0
            log_level = "debug"
            [yard]
            policy = "lru"
            order = "fifo"
            max_waiting_per_model = 1
            max_waiting = 2
            overdue_after_s = 3
            backoff_initial_s = 4
            backoff_max_s = 5
            loads_per_device = 6
            explain_capacity = 7
            [[devices]]
            device = "cuda"
            budget = 300_000_000
            logical = true
            threads = 2
            [[devices]]
            device = "cpu"
            budget = "50%"
            [roots]
            store = "models"
            [runtimes.torch]
            allowed_factories = ["my_package.nets:make_net"]
            [models."a.b-c_d"]
            keys = ["Acme/sentiment:v1", "x"]
            runtime = "transformers"
            task = "fill-mask"
            root = "store"
            folder = "team-a/sentiment"
            device = "cuda:0"
            pinned = true
            [models."a.b-c_d".options]
            labels = ["a", "b"]
            nested = { x = 1, y = 2.5, z = true }
            """,
            base=base,
        )
        assert config == Config(
            server=ServerConfig(
                listen="[::1]:0",
                default_deadline_s=0.5,
                max_deadline_s=60,
                max_message_bytes=2**20,
                shutdown_grace_s=0,
                log_level="debug",
            ),
            yard=YardConfig(
                policy="lru",
                order="fifo",
                max_waiting_per_model=1,
                max_waiting=2,
                overdue_after_s=3,
                backoff_initial_s=4,
                backoff_max_s=5,
                loads_per_device=6,
                explain_capacity=7,
            ),
            devices=(
                DeviceConfig(
                    device=Device.gpu(0),
                    budget=Budget(size_bytes=300_000_000),
                    logical=True,
                    threads=2,
                ),
                DeviceConfig(device=Device.cpu(), budget=Budget(percent=Decimal(50))),
            ),
            roots={"store": base.resolve() / "models"},
            models=(
                ModelConfig(
                    id="a.b-c_d",
                    keys=("Acme/sentiment:v1", "x"),
                    runtime="transformers",
                    task="fill-mask",
                    root="store",
                    folder="team-a/sentiment",
                    device=ComponentDevice.from_str("cuda:0"),
                    pinned=True,
                    options={"labels": ["a", "b"], "nested": {"x": 1, "y": 2.5, "z": True}},
                ),
            ),
            allowed_factories=frozenset({"my_package.nets:make_net"}),
        )
        assert (config.server.host, config.server.port) == ("::1", 0)

    def test_what_is_left_out_has_its_default(self, base: Path) -> None:
        config = parse_config(CPU, base=base)
        assert config.server == ServerConfig()
        assert config.yard == YardConfig()
        assert config.catalog == CatalogConfig(path=None)
        assert config.devices[0] == DeviceConfig(
            device=Device.cpu(), budget=Budget(size_bytes=10**9), logical=False, threads=1
        )
        assert (config.roots, config.models, config.allowed_factories) == ({}, (), frozenset())

    @pytest.mark.parametrize(
        ("written", "placed"),
        [
            ('device = "cpu:0"', ComponentDevice.from_single(Device.cpu())),
            ('device = "cuda"', ComponentDevice.from_single(Device.gpu(0))),
            (
                'device = { type = "single", device = "cuda" }',
                ComponentDevice.from_single(Device.gpu(0)),
            ),
            (
                'device = { type = "multiple", device_map = { "a.b" = "cuda:0", "" = "cpu" } }',
                ComponentDevice.from_multiple(DeviceMap({"a.b": Device.gpu(0), "": Device.cpu()})),
            ),
            (
                'device = { "a.b" = "cuda:0", "" = "cpu" }',
                ComponentDevice.from_multiple(DeviceMap({"a.b": Device.gpu(0), "": Device.cpu()})),
            ),
            ('device = "auto"', AutomaticPlacement()),
            ('device = "balanced"', AutomaticPlacement(strategy=PlacementStrategy.BALANCED)),
            (
                'device = { strategy = "sequential", devices = ["cuda", "cpu:0"] }',
                AutomaticPlacement(
                    strategy=PlacementStrategy.SEQUENTIAL, devices=(Device.gpu(0), Device.cpu())
                ),
            ),
            # A part of a model that happens to be called like a field of a table.
            (
                'device = { strategy = "cpu", devices = "cuda:0" }',
                ComponentDevice.from_multiple(
                    DeviceMap({"strategy": Device.cpu(), "devices": Device.gpu(0)})
                ),
            ),
            (
                'device = { type = "cpu", device = "cuda:0" }',
                ComponentDevice.from_multiple(
                    DeviceMap({"type": Device.cpu(), "device": Device.gpu(0)})
                ),
            ),
        ],
    )
    def test_every_form_of_a_placement_is_read(
        self, base: Path, written: str, placed: Placement
    ) -> None:
        config = parse_config(with_model(f'runtime = "identity"\n{written}\n'), base=base)
        assert config.models[0].device == placed

    def test_values_cannot_be_changed_and_options_can_be_copied(self, base: Path) -> None:
        config = parse_config(
            with_model('runtime = "identity"\noptions = { a = [{ b = 1 }] }\n'), base=base
        )
        model = config.models[0]
        with pytest.raises(TypeError):
            model.options["a"] = 1  # type: ignore[index]  # That it is read-only is the point.
        with pytest.raises(TypeError):
            config.roots["a"] = base  # type: ignore[index]  # As above.
        plain = model.plain_options()
        assert plain == {"a": [{"b": 1}]}
        plain["a"].append(2)
        assert model.plain_options() == {"a": [{"b": 1}]}
        assert len({model, model}) == 1
        assert len({config, config}) == 1

    def test_roots_are_relative_to_the_file_and_resolved(self, base: Path) -> None:
        (base / "link").symlink_to("models")
        file = base / "yard.toml"
        file.write_text(f'{CPU}[roots]\na = "link"\nb = "{base}"\n', encoding="utf-8")
        roots = load_config(file).roots
        assert roots == {"a": base.resolve() / "models", "b": base.resolve()}

    def test_a_byte_order_mark_is_no_problem(self, base: Path) -> None:
        file = base / "yard.toml"
        file.write_bytes(b"\xef\xbb\xbf" + CPU.encode())
        assert len(load_config(file).devices) == 1


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


class TestSyntax:
    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("[server]\nlisten = \n", 2),
            ("a = 1\n\n\nb = 2\nb = 3\n", 5),
            ("[server\n", 1),
            ('x = 1\ny = """never closed\n\n', 2),
            ("[a]\n[a]\n", 2),
            (f"a = 1\nb = {'[' * 100_000}\n", 1),
            (f"a = 1\nb = {'1' * 100_000}\n", 2),
            ("a = 2020-13-45\n", 1),
        ],
    )
    def test_what_is_no_toml_is_one_problem_with_its_line(
        self, base: Path, text: str, line: int
    ) -> None:
        found_line, key, problem = only_problem(text, base)
        assert (found_line, key) == (line, "")
        assert "TOML" in problem
        assert "(at " not in problem

    @pytest.mark.parametrize(
        ("content", "line", "text"),
        [
            (b"a = 1\nb = '\xff'\n", 2, "UTF-8"),
            (b"#" * (MAX_CONFIG_BYTES + 1), 1, "larger"),
        ],
    )
    def test_what_is_no_text_is_refused(
        self, base: Path, content: bytes, line: int, text: str
    ) -> None:
        file = base / "yard.toml"
        file.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_config(file)
        (problem,) = caught.value.problems
        assert (problem.line, problem.key) == (line, "")
        assert text in problem.text

    @pytest.mark.parametrize("name", ["absent.toml", "models", "a\0b", "x" * 5000])
    def test_a_file_that_cannot_be_read_is_a_config_error(self, base: Path, name: str) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(base / name)


class TestServer:
    @pytest.mark.parametrize(
        "listen",
        ["127.0.0.1:1", "127.9.9.9:0", "localhost:65535", "[::1]:1", "[::ffff:127.0.0.1]:1"],
    )
    def test_loopback_addresses_are_taken(self, base: Path, listen: str) -> None:
        config = parse_config(f'[server]\nlisten = "{listen}"\n{CPU}', base=base)
        assert config.server.listen == listen

    @pytest.mark.parametrize(
        "listen", ["0.0.0.0:1", "[::]:1", "192.168.0.1:1", "example.com:1", "[::ffff:8.8.8.8]:1"]
    )
    def test_other_addresses_need_a_word_of_consent(self, base: Path, listen: str) -> None:
        text = f'[server]\nlisten = "{listen}"\n'
        line, key, problem = only_problem(text + CPU, base)
        assert (line, key) == (2, "server.listen")
        assert "no TLS yet" in problem
        assert "insecure_non_loopback" in problem
        config = parse_config(f"{text}insecure_non_loopback = true\n{CPU}", base=base)
        assert config.server.listen == listen

    @pytest.mark.parametrize(
        "listen",
        [
            "",
            ":8470",
            "127.0.0.1",
            "127.0.0.1:",
            "127.0.0.1:65536",
            "127.0.0.1:-1",
            "127.0.0.1:٣",
            "127.0.0.1: 1",
            "127.1:1",
            "256.0.0.1:1",
            "::1:8470",
            "[::1:8470",
            "[127.0.0.1]:1",
            "[]:1",
            "unix:/tmp/x",
            "http://127.0.0.1:1",
            "a b:1",
            "-a:1",
        ],
    )
    def test_what_is_no_address_is_refused(self, base: Path, listen: str) -> None:
        line, key, _ = only_problem(f"[server]\nlisten = '{listen}'\n{CPU}", base)
        assert (line, key) == (2, "server.listen")

    @pytest.mark.parametrize(
        ("setting", "text"),
        [
            ("default_deadline_s = 0", "0.001 to 86400"),
            ("default_deadline_s = -1", "0.001 to 86400"),
            ("default_deadline_s = nan", "0.001 to 86400"),
            ("default_deadline_s = inf", "0.001 to 86400"),
            ("default_deadline_s = 301", "must not be above max_deadline_s"),
            ('default_deadline_s = "30"', "a number of seconds"),
            ("default_deadline_s = true", "a number of seconds"),
            (f"max_deadline_s = 0x{'f' * 9000}", "far out of range"),
            ('max_message_bytes = "1KiB"', "64KiB to"),
            ('max_message_bytes = "2GiB"', "64KiB to"),
            ("max_message_bytes = 1.5", "a size"),
            ("max_message_bytes = -1", "0 to"),
            ('max_message_bytes = "16"', "no unit"),
            ('max_message_bytes = "16mb"', "write 'MB'"),
            ("shutdown_grace_s = -0.1", "0 to 3600"),
            ('log_level = "INFO"', "must be one of debug, info"),
            ("log_level = 1", "must be a string, got an integer"),
            ("insecure_non_loopback = 1", "must be true or false"),
        ],
    )
    def test_values_out_of_range_are_refused(self, base: Path, setting: str, text: str) -> None:
        line, key, problem = only_problem(f"[server]\n{setting}\n{CPU}", base)
        assert (line, key) == (2, f"server.{setting.split()[0]}")
        assert text in problem

    def test_an_unknown_policy_is_told_which_there_are(self, base: Path) -> None:
        line, key, problem = only_problem(f'[yard]\npolicy = "lfu"\n{CPU}', base)
        assert (line, key) == (2, "yard.policy")
        assert "must be one of ensemble, learned, " in problem

    @pytest.mark.parametrize("policy", POLICIES)
    def test_every_policy_of_the_core_may_be_chosen(self, base: Path, policy: str) -> None:
        config = parse_config(f'[yard]\npolicy = "{policy}"\n{CPU}', base=base)
        assert config.yard.policy == policy

    @pytest.mark.parametrize(
        "setting",
        [
            "max_waiting = 0",
            "max_waiting = 1.0",
            "max_waiting = true",
            "max_waiting_per_model = 1000001",
            "overdue_after_s = 0",
            "backoff_initial_s = 61",
            "backoff_max_s = 86401",
            "loads_per_device = 0",
            "explain_capacity = 0",
            'policy = ""',
            'order = "lifo"',
        ],
    )
    def test_yard_values_out_of_range_are_refused(self, base: Path, setting: str) -> None:
        line, key, _ = only_problem(f"[yard]\n{setting}\n{CPU}", base)
        assert (line, key) == (2, f"yard.{setting.split()[0]}")

    @pytest.mark.parametrize(
        ("text", "key"),
        [
            ("server = 1\n" + CPU, "server"),
            ("yard = []\n" + CPU, "yard"),
            ("roots = ''\n" + CPU, "roots"),
            ("models = []\n" + CPU, "models"),
            ("models.a = 1\n" + CPU, "models.a"),
            ("runtimes = 1\n" + CPU, "runtimes"),
            ("runtimes.torch = 1\n" + CPU, "runtimes.torch"),
            ("[devices]\ndevice = 'cpu'\n", "devices"),
            ("devices = [1]\n", "devices"),
        ],
    )
    def test_tables_have_to_be_tables(self, base: Path, text: str, key: str) -> None:
        line, found, problem = only_problem(text, base)
        assert (line, found) == (1, key)
        assert "table" in problem


class TestHttp:
    def test_it_is_off_unless_it_is_asked_for(self, base: Path) -> None:
        assert parse_config(CPU, base=base).http == HttpConfig()
        assert HttpConfig().host == ""

    @pytest.mark.parametrize("listen", ["127.0.0.1:8081", "localhost:0", "[::1]:1"])
    def test_loopback_addresses_are_taken(self, base: Path, listen: str) -> None:
        config = parse_config(f'[http]\nlisten = "{listen}"\n{CPU}', base=base)
        assert config.http.listen == listen
        assert config.http.host == listen.rpartition(":")[0].strip("[]")

    @pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "example.com:1"])
    def test_other_addresses_need_a_word_of_consent(self, base: Path, listen: str) -> None:
        text = f'[http]\nlisten = "{listen}"\n'
        line, key, problem = only_problem(text + CPU, base)
        assert (line, key) == (2, "http.listen")
        assert "insecure_non_loopback" in problem
        config = parse_config(f"{text}insecure_non_loopback = true\n{CPU}", base=base)
        assert config.http.listen == listen

    def test_no_address_is_no_exposure(self, base: Path) -> None:
        text = f"[http]\ninsecure_non_loopback = true\n{CPU}"
        assert parse_config(text, base=base).http.listen == ""

    @pytest.mark.parametrize(
        "origin",
        ["*", "example.com", "https://example.com/", "HTTPS://x", "null", "http://a:123456"],
    )
    def test_origins_are_those_of_browsers(self, base: Path, origin: str) -> None:
        good = '"https://example.com", "http://localhost:3000", "http://[::1]:80"'
        text = f"[http]\norigins = [{good}"
        assert len(parse_config(f"{text}]\n{CPU}", base=base).http.origins) == 3
        line, key, problem = only_problem(f'{text}, "{origin}"]\n{CPU}', base)
        assert (line, key) == (2, "http.origins[3]")
        assert "must be an origin as a browser writes it" in problem


class TestHostTier:
    LOGICAL = '[[devices]]\ndevice = "cuda:0"\nlogical = true\nbudget = "1GB"\n'
    REAL = '[[devices]]\ndevice = "cuda:0"\nbudget = "1GB"\n'
    DISK = '[[devices]]\ndevice = "disk"\nbudget = "1GB"\n[roots]\nstore = "models"\n'

    @pytest.mark.parametrize(
        ("written", "budget"),
        [
            ("", None),
            ("[host_tier]\n", None),
            ("[host_tier]\nbudget = 0\n", None),
            ("[host_tier]\nbudget = 7\n", Budget(size_bytes=7)),
            ('[host_tier]\nbudget = "4GiB"\n', Budget(size_bytes=2**32)),
            ('[host_tier]\nbudget = "12.5%"\n', Budget(percent=Decimal("12.5"))),
        ],
    )
    @pytest.mark.parametrize("devices", [LOGICAL, REAL, REAL + CPU])
    def test_its_budget_is_read_like_those_of_devices(
        self, base: Path, devices: str, written: str, budget: Budget | None
    ) -> None:
        config = parse_config(devices + written, base=base)
        assert config.host_tier == HostTierConfig(budget=budget)

    @pytest.mark.parametrize(
        ("setting", "text"),
        [
            ('budget = "0%"', "above 0%"),
            ('budget = "101%"', "at most 100%"),
            ("budget = -1", "at least 1"),
            ('budget = "0B"', "at least 1"),
            ("budget = false", "bytes, a size or a percentage"),
            ("budget = 1.5", "bytes, a size or a percentage"),
            ('budget = "lots"', "no size"),
            ("bugdet = 1", 'did you mean "budget"?'),
        ],
    )
    def test_budgets_that_cannot_be_are_refused(self, base: Path, setting: str, text: str) -> None:
        line, key, problem = only_problem(f"{self.LOGICAL}[host_tier]\n{setting}\n", base)
        assert (line, key) == (6, f"host_tier.{setting.split()[0]}")
        assert text in problem

    @pytest.mark.parametrize("devices", [CPU, CPU + DISK])
    def test_it_needs_a_device_that_it_is_for(self, base: Path, devices: str) -> None:
        text = f'[host_tier]\nbudget = "1GB"\n{devices}'
        line, key, problem = only_problem(text, base)
        assert (line, key) == (2, "host_tier.budget")
        assert "no device whose models it could keep" in problem and "page cache" in problem

    def test_without_devices_that_can_be_read_nobody_knows_whether_it_has_one(
        self, base: Path
    ) -> None:
        tier = "[host_tier]\nbudget = 1\n"
        assert only_problem(tier, base)[1] == "devices"
        broken = '[[devices]]\ndevice = "gpu"\nbudget = 1\n'
        assert only_problem(tier + broken + CPU, base)[1] == "devices[0].device"

    def test_it_takes_the_place_of_a_device(self, base: Path) -> None:
        def text(count: int, budget: int) -> str:
            devices = "".join(
                f'[[devices]]\ndevice = "cuda:{index}"\nbudget = 1\n' for index in range(count)
            )
            return f"[host_tier]\nbudget = {budget}\n{devices}"

        assert len(parse_config(text(15, 1), base=base).devices) == 15
        assert len(parse_config(text(16, 0), base=base).devices) == 16
        _, key, problem = only_problem(text(16, 1), base)
        assert key == "devices"
        assert "at most 15 devices beside a host tier, got 16" in problem
        assert "at most 16" in only_problem(text(17, 1), base)[2]

    def test_values_made_by_hand_are_checked_too(self) -> None:
        device = DeviceConfig(device=Device.cpu(), budget=Budget(size_bytes=1))
        below_zero: Any = -1
        with pytest.raises(ValueError, match=r"host_tier\.budget: there is no device"):
            Config(devices=(device,), host_tier=HostTierConfig(budget=Budget(size_bytes=1)))
        with pytest.raises(ValueError, match="at least 1"):
            HostTierConfig(budget=below_zero)


class TestDevices:
    @pytest.mark.parametrize("text", ["", "devices = []\n", "[server]\n"])
    def test_there_is_at_least_one(self, base: Path, text: str) -> None:
        assert "at least one" in only_problem(text, base)[2]

    def test_there_are_at_most_sixteen(self, base: Path) -> None:
        def text(count: int) -> str:
            return "".join(
                f'[[devices]]\ndevice = "cuda:{index}"\nbudget = 1\n' for index in range(count)
            )

        assert len(parse_config(text(16), base=base).devices) == 16
        assert only_problem(text(17), base)[:2] == (1, "devices")

    @pytest.mark.parametrize(
        ("first", "second"),
        [("cpu", "cpu"), ("cpu", "cpu:0"), ("cuda", "cuda:0"), ("mps:0", "mps")],
    )
    def test_each_is_declared_once(self, base: Path, first: str, second: str) -> None:
        text = "".join(f'[[devices]]\ndevice = "{each}"\nbudget = 1\n' for each in (first, second))
        line, key, problem = only_problem(text, base)
        assert (line, key) == (5, "devices[1].device")
        assert "devices[0]" in problem

    @pytest.mark.parametrize(
        ("setting", "text"),
        [
            ('device = "disk"', "add [roots]"),
            ('device = "disk:1"', "there is one disk"),
            ('device = "gpu"', "use one of"),
            ('device = "cuda:128"', "127"),
            ('device = "cuda: 1"', "integer"),
            ("device = 0", "must be a device"),
            ('device = "cpu:1"', "logical"),
            ("logical = 1", "true or false"),
            ("threads = 0", "1 to 1024"),
            ("reserve = -1", "0 to"),
            ('reserve = "10%"', "no size"),
            ('transfer_bandwidth = "4GiB"', 'must end in "/s"'),
            ('transfer_bandwidth = "4 cats/s"', "unknown unit"),
            ('transfer_bandwidth = "/s"', "no size"),
            ("transfer_bandwidth = -1", "0 to"),
            ("transfer_bandwidth = 1.5", "bytes a second"),
            ('transfer_bandwidth = "1GB/s"', "logical devices"),
            ('budget = "0%"', "above 0%"),
            ('budget = "100.5%"', "at most 100%"),
            ('budget = "half%"', "no percentage"),
            ('budget = "0B"', "at least 1"),
            ("budget = 0", "at least 1"),
            ("budget = -5", "at least 1"),
            (f"budget = 0x{'f' * 9000}", "at most"),
            ("budget = 1.5", "bytes, a size or a percentage"),
            ('budget = "lots"', "no size"),
        ],
    )
    def test_values_that_cannot_be_are_refused(self, base: Path, setting: str, text: str) -> None:
        lines = {"device": 'device = "cpu"', "budget": "budget = 1"}
        lines[setting.split()[0]] = setting
        content = "[[devices]]\n" + "\n".join(lines.values()) + "\n"
        if "disk" in setting:
            content += CPU
        _, key, problem = only_problem(content, base)
        assert key == f"devices[0].{setting.split()[0]}"
        assert text in problem

    def test_pools_of_host_memory_may_be_numbered(self, base: Path) -> None:
        text = '[[devices]]\ndevice = "cpu:1"\nbudget = 1\nlogical = true\n'
        assert parse_config(text, base=base).devices[0].device == Device.from_str("cpu:1")

    def test_logical_devices_may_have_a_bandwidth_and_all_a_reserve(self, base: Path) -> None:
        text = '[[devices]]\ndevice = "cuda:0"\nbudget = 1\nlogical = true\nreserve = "1KiB"\n'
        (device,) = parse_config(f'{text}transfer_bandwidth = "1.5 kB/s"', base=base).devices
        assert (device.reserve, device.transfer_bandwidth) == (1024, 1500)
        (device,) = parse_config(f"{text}transfer_bandwidth = 7", base=base).devices
        assert device.transfer_bandwidth == 7

    def test_the_disk_is_a_device_for_parts_where_there_are_roots(self, base: Path) -> None:
        disk = '[[devices]]\ndevice = "disk:0"\nbudget = 1\n'
        config = parse_config(f'{disk}{CPU}[roots]\na = "models"\n', base=base)
        assert config.devices[0].device == Device.disk()
        assert problems_of(disk, base) == [
            (1, "devices", 'need one that can run models: add for example device = "cpu"'),
            (2, "devices[0].device", "the disk is where the roots are: add [roots]"),
        ]

    @pytest.mark.parametrize(
        ("setting", "text"),
        [
            ("logical = true", "no pool"),
            ("threads = 2", "nothing runs"),
            ('transfer_bandwidth = "1GB/s"', "logical devices"),
        ],
    )
    def test_the_disk_has_no_pool_and_no_lane(self, base: Path, setting: str, text: str) -> None:
        disk = f'[[devices]]\ndevice = "disk"\nbudget = 1\n{setting}\n'
        line, key, problem = only_problem(f'{disk}{CPU}[roots]\na = "models"\n', base)
        assert (line, key) == (4, f"devices[0].{setting.split()[0]}")
        assert text in problem


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
        text = '[weights]\nread = "arena"\narena = "1MiB"\n[engine]\nkind = "thread"\nstrikes = 5\n'
        config = parse_config(text + CPU, base=base)
        assert (config.weights.read, config.weights.arena) == ("arena", 2**20)
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

    def test_routes_are_read_and_a_repeated_key_counts_once(self, base: Path) -> None:
        text = f'{CPU}{ECHO}[[routes]]\nid = "r"\nkeys = ["a", "b", "a"]\nmodel = "echo"\n'
        assert parse_config(text, base=base).routes == (
            RouteConfig(id="r", keys=("a", "b"), model="echo"),
        )

    def test_a_key_is_in_one_route_or_a_models_own(self, base: Path) -> None:
        text = (
            f'{CPU}[models.a]\nruntime = "identity"\nkeys = ["own"]\n'
            '[[routes]]\nid = "r"\nkeys = ["x", "own", "a"]\nmodel = "a"\n'
            '[[routes]]\nid = "r"\nkeys = ["y", "x"]\nmodel = "b"\n'
        )
        problems = problems_of(text, base)
        assert [(line, key) for line, key, _ in problems] == [
            (9, "routes[0].keys[1]"),
            (9, "routes[0].keys[2]"),
            (12, "routes[1].id"),
            (13, "routes[1].keys[1]"),
            (14, "routes[1].model"),
        ]
        texts = [text for _, _, text in problems]
        assert "is a key of models.a already" in texts[0]
        assert "is a key of models.a already" in texts[1]
        assert "is the id of routes[0] already" in texts[2]
        assert "is a key of routes[0] already" in texts[3]
        assert "is not in [models] (there: a)" in texts[4]
        with pytest.raises(ValueError, match=r"routes\[0\].model: .*not in \[models\]"):
            Config(
                devices=parse_config(CPU, base=base).devices,
                routes=(RouteConfig(id="r", keys=("x",), model="a"),),
            )

    @pytest.mark.parametrize(
        ("route", "where"),
        [
            ("keys = []", "routes[0].keys"),
            ('keys = "abc"', "routes[0].keys"),
            ('keys = ["a b"]', "routes[0].keys[0]"),
            ('keys = ["a"]\nid = "B"', "routes[0].id"),
            ('keys = ["a"]\nmodel = 1', "routes[0].model"),
            ('keys = ["a"]\nmodels = ["echo"]', "routes[0].models"),
            ("prefixes = []", "routes[0].keys"),
            ('prefixes = ["/"]', "routes[0].prefixes[0]"),
            ('prefixes = "a"', "routes[0].prefixes"),
        ],
    )
    def test_a_route_that_cannot_be_is_refused(self, base: Path, route: str, where: str) -> None:
        rest = "".join(
            f'{name} = "{value}"\n'
            for name, value in (("id", "r"), ("model", "echo"))
            if f"{name} =" not in route
        )
        assert only_problem(f"{CPU}{ECHO}[[routes]]\n{route}\n{rest}", base)[1] == where

    def test_a_route_of_any_kind_is_read(self, base: Path) -> None:
        kinds: dict[str, tuple[str, Target]] = {
            "model": ('model = "echo"\n', One("echo")),
            "split": (
                'split.branches = [{name = "x", target = "echo", weight = 9},\n'
                '  {name = "y", target = "routes/model", weight = 1}]\n',
                Split(
                    (
                        Branch("x", Link("models", "echo"), 9),
                        Branch("y", Link("routes", "model"), 1),
                    )
                ),
            ),
            "sequence": (
                '[[routes.sequence.steps]]\ntarget = "echo"\n'
                "[[routes.sequence.steps]]\n[routes.sequence.steps.transform]\n"
                'name = "top_k"\nparameters = {k = 3}\n',
                Sequence(
                    (Step("", Link("models", "echo")), Step("", Transform("top_k", {"k": 3})))
                ),
            ),
            "ensemble": (
                '[routes.ensemble]\ncombine = "mean"\nmembers = [{name = "x", target = "echo"},'
                ' {name = "y", target = "routes/model", weight = 2}]\n',
                Ensemble(
                    (
                        Member("x", Link("models", "echo")),
                        Member("y", Link("routes", "model"), 2.0),
                    ),
                    "mean",
                ),
            ),
            "shadow": (
                'shadow = {target = "routes/split", shadow = "echo", sample = 1}\n',
                Shadow(Link("routes", "split"), Link("models", "echo"), 1.0),
            ),
            "fallback": (
                'fallback = {targets = ["echo", "routes/split"], prefer_warm = true}\n',
                Fallback((Link("models", "echo"), Link("routes", "split")), True),
            ),
            "versions": (
                '[routes.versions]\ncurrent = "v1"\nversions = [{name = "v1", target = "echo"}]\n',
                Versions((Version("v1", Link("models", "echo")),), "v1"),
            ),
        }
        text = CPU + ECHO
        for kind, (table, _) in kinds.items():
            text += f'[[routes]]\nid = "{kind}"\nprefixes = ["{kind}/", "{kind}/"]\n{table}'
        routes = parse_config(text, base=base).routes
        assert [route.target for route in routes] == [target for _, target in kinds.values()]
        assert routes[1].prefixes == ("split/",)
        assert routes[1].keys == ()
        # Made of values, it is checked in the same way.
        split = kinds["split"][1]
        assert isinstance(split, Split)
        assert RouteConfig(id="r", prefixes=("",), split=split).target == split
        with pytest.raises(ValueError, match=r"split\.branches: must be 2 to 64"):
            RouteConfig(id="r", prefixes=("",), split=Split(()))
        with pytest.raises(ValueError, match="means nothing"):
            RouteConfig(id="r", keys=("k",))

    @pytest.mark.parametrize(
        ("table", "problems"),
        [
            ("", [(6, "routes[0]", "means nothing: give it one of model, split, sequence")]),
            (
                'model = "echo"\nfallback = {targets = ["echo", "echo"]}\n',
                [(10, "routes[0].fallback", "is a second meaning beside model")],
            ),
            (
                "split = {branches = [], salt = 1, x = 2}\n",
                [
                    (9, "routes[0].split.x", "unknown field"),
                    (9, "routes[0].split.salt", "must be text"),
                ],
            ),
            (
                "split.branches = [\n"
                '  {name = "x", target = "echo", weight = -1},\n'
                '  {name = "x", target = "gone", weight = 1},\n'
                '  {name = "y", target = "routes/gone", weight = 1},\n]\n',
                [
                    (10, "routes[0].split.branches[0].weight", "must be 0 to 1000000"),
                    (11, "routes[0].split.branches[1].name", "is the name of"),
                    (11, "routes[0].split.branches[1].target", "is not in [models] (there: echo)"),
                    (12, "routes[0].split.branches[2].target", "is not in [routes] (there: r, s)"),
                ],
            ),
            (
                '[routes.versions]\ncurrent = "v2"\n'
                'canary = {version = "v3", percent = 200}\n'
                '[[routes.versions.versions]]\nname = "v1"\ntarget = "echo"\n',
                [
                    (10, "routes[0].versions.current", "there is no version or alias 'v2'"),
                    (11, "routes[0].versions.canary.version", "there is no version or alias 'v3'"),
                    (11, "routes[0].versions.canary.percent", "must be 0 to 100"),
                ],
            ),
            (
                'fallback.targets = ["routes/s", "routes/r"]\n',
                [
                    (9, "routes[0].fallback.targets[0]", "routes/r -> routes/s -> routes/r"),
                    (9, "routes[0].fallback.targets[1]", "in a circle: routes/r -> routes/r"),
                    (13, "routes[1].fallback.targets[1]", "routes/s -> routes/r -> routes/s"),
                ],
            ),
            (
                'ensemble = {combine = "all", members = [{name = "x", target = "echo"},'
                ' {name = "y", target = "routes/s"}]}\n',
                [(9, "routes[0].ensemble.members[1].target", "routes/s leads to a fallback")],
            ),
            (
                'shadow = {target = "echo", shadow = "routes/s", sample = 2}\n',
                [
                    (9, "routes[0].shadow.shadow", "must be a model"),
                    (9, "routes[0].shadow.sample", "must be above 0"),
                ],
            ),
        ],
    )
    def test_what_a_target_cannot_be_is_told_with_its_lines(
        self, base: Path, table: str, problems: list[tuple[int, str, str]]
    ) -> None:
        second = "routes/r" if "routes/s" in table and "fallback" in table else "echo"
        text = f'{CPU}{ECHO}[[routes]]\nid = "r"\nkeys = ["k"]\n{table}'
        text += f'[[routes]]\nid = "s"\nkeys = ["l"]\nfallback.targets = ["echo", "{second}"]\n'
        found = problems_of(text, base)
        assert [(line, key) for line, key, _ in found] == [(line, key) for line, key, _ in problems]
        for (_, _, told), (_, _, wanted) in zip(found, problems, strict=True):
            assert wanted in told

    @pytest.mark.parametrize(
        "table",
        [
            'sequence.steps = [{target = "routes/b"}]',
            'ensemble = {combine = "all", members = [{name = "x", target = "echo"},'
            ' {name = "y", target = "routes/b"}]}',
            'fallback.targets = ["routes/b", "routes/c"]',
        ],
    )
    def test_a_way_into_a_circle_of_others_comes_to_an_end(self, base: Path, table: str) -> None:
        text = f'{CPU}{ECHO}[[routes]]\nid = "a"\nkeys = ["a"]\n{table}\n'
        for route_id, other in ("bc", "cb"):
            text += f'[[routes]]\nid = "{route_id}"\nkeys = ["{route_id}"]\n'
            text += f'sequence.steps = [{{target = "routes/{other}"}}]\n'
        told = [(key, text) for _, key, text in problems_of(text, base) if "circle" in text]
        assert [key for key, _ in told] == [f"routes[{i}].sequence.steps[0].target" for i in (1, 2)]

    def test_steps_that_do_not_meet_and_prefixes_of_two_are_told(self, base: Path) -> None:
        text = (
            f"{CPU}{ECHO}"
            + "".join(
                f'[models.{name}]\nruntime = "transformers"\ntask = "{task}"\nroot = "r"\n'
                f'folder = "{name}"\n'
                for name, task in (("emb", "feature-extraction"), ("gen", "text-generation"))
            )
            + '[roots]\nr = "."\n'
            '[[routes]]\nid = "r"\nprefixes = ["", "x"]\n'
            'sequence.steps = [{target = "emb"}, {target = "gen"}]\n'
            '[[routes]]\nid = "s"\nprefixes = ["y", ""]\nmodel = "echo"\n'
        )
        problems = problems_of(text, base)
        assert [key for _, key, _ in problems] == [
            "routes[0].sequence.steps[1]",
            "routes[1].prefixes[1]",
        ]
        assert "takes one input, TEXT of 1 dimension" in problems[0][2]
        assert "is a prefix of routes[0] already" in problems[1][2]

    def test_routes_are_an_array_of_tables(self, base: Path) -> None:
        _, key, text = only_problem(f"{CPU}[routes]\nid = 'r'\n", base)
        assert key == "routes"
        assert "[[routes]]" in text

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


class TestValuesMadeByHand:
    """The same rules hold for code that makes a configuration without a file."""

    def test_rules_apply(self) -> None:
        with pytest.raises(ValueError, match=r"listen.*no TLS"):
            ServerConfig(listen="0.0.0.0:1")
        with pytest.raises(ValueError, match="max_waiting"):
            YardConfig(max_waiting=0)
        with pytest.raises(ValueError, match="device"):
            DeviceConfig(device=Device.from_str("disk:1"), budget=Budget(size_bytes=1))
        with pytest.raises(ValueError, match="on the disk"):
            ModelConfig(
                id="a",
                runtime="identity",
                device=ComponentDevice.from_multiple(DeviceMap({"": Device.disk()})),
            )
        with pytest.raises(ValueError, match="absolute"):
            CatalogConfig(path=Path("x.db"))
        with pytest.raises(ValueError, match="folder"):
            ModelConfig(id="a", runtime="torch", root="store", folder="../a")
        with pytest.raises(ValueError, match="threads"):
            DeviceConfig(device=Device.cpu(), budget=Budget(size_bytes=1), threads=WRONG)

    def test_parts_have_to_fit(self, base: Path) -> None:
        cpu = DeviceConfig(device=Device.cpu(), budget=Budget(size_bytes=1))
        echo = ModelConfig(id="echo", runtime="identity")
        net = ModelConfig(id="t", runtime="torch", root="store", folder="a")
        assert Config(devices=(cpu,), models=(echo, net), roots={"store": base}).devices == (cpu,)
        with pytest.raises(ValueError, match="at least one"):
            Config(devices=())
        with pytest.raises(ValueError, match="declared already"):
            Config(devices=(cpu, cpu))
        with pytest.raises(ValueError, match="same id"):
            Config(devices=(cpu,), models=(echo, echo))
        with pytest.raises(ValueError, match="not in"):
            Config(devices=(cpu,), models=(net,))


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "size_bytes"),
        [
            ("0B", 0),
            ("1B", 1),
            ("300MB", 300_000_000),
            ("1kB", 1000),
            ("1KB", 1000),
            ("16MiB", 16 * 2**20),
            ("1.5GiB", 3 * 2**29),
            ("1.5 GiB", 3 * 2**29),
            ("0.1KiB", 102),
            ("0.999999999B", 0),
            ("8191PiB", 8191 * 2**50),
            (f"{MAX_SIZE_BYTES}B", MAX_SIZE_BYTES),
        ],
    )
    def test_sizes_are_read(self, text: str, size_bytes: int) -> None:
        assert parse_size(text) == size_bytes

    @pytest.mark.parametrize(
        ("text", "advice"),
        [
            ("300", "no unit"),
            ("300mb", "write 'MB'"),
            ("1gib", "write 'GiB'"),
            ("1G", "write 'GB'"),
            ("1Gi", "write 'GiB'"),
            ("1EB", "use one of"),
            ("", "no size"),
            ("MB", "no size"),
            ("-1MB", "no size"),
            ("+1MB", "no size"),
            ("1e3MB", "no size"),
            ("1_000MB", "no size"),
            ("1.MB", "no size"),
            (".5MB", "no size"),
            ("1,5MB", "no size"),
            (" 1MB", "no size"),
            ("1  MB", "no size"),
            ("1MB\n", "no size"),
            ("١MB", "no size"),
            ("8192PiB", "more than the largest"),
            (f"{MAX_SIZE_BYTES + 1}B", "more than the largest"),
            ("9" * 10_000 + "B", "no size"),
        ],
    )
    def test_what_is_no_size_is_refused_with_advice(self, text: str, advice: str) -> None:
        with pytest.raises(ValueError, match=advice) as caught:
            parse_size(text)
        assert len(str(caught.value)) < 200

    def test_only_text_is_read(self) -> None:
        with pytest.raises(TypeError):
            parse_size(WRONG)
        with pytest.raises(TypeError):
            Budget.from_str(WRONG)

    @pytest.mark.parametrize(
        ("size_bytes", "rounded", "exact"),
        [
            (0, "0B", "0B"),
            (1023, "1023B", "1023B"),
            (1024, "1KiB", "1KiB"),
            (300_000_000, "286.1MiB", "300MB"),
            (3 * 2**29, "1.5GiB", "1.5GiB"),
            (2**20 - 1, "1023KiB", "1048575B"),
            (MAX_SIZE_BYTES, "8191PiB", "9223372036854775807B"),
        ],
    )
    def test_sizes_are_written(self, size_bytes: int, rounded: str, exact: str) -> None:
        assert format_size(size_bytes) == rounded
        assert format_size(size_bytes, exact=True) == exact

    @pytest.mark.parametrize("size_bytes", [-1, MAX_SIZE_BYTES + 1])
    def test_sizes_out_of_range_are_not_written(self, size_bytes: int) -> None:
        with pytest.raises(ValueError, match="a size is 0 to"):
            format_size(size_bytes)


class TestBudget:
    def test_bytes_are_what_they_are(self) -> None:
        assert Budget.from_str("300MB").resolve(1) == 300_000_000
        assert str(Budget.from_str("300MB")) == "300MB"

    @pytest.mark.parametrize(
        ("text", "total_bytes", "size_bytes"),
        [
            ("50%", 1001, 500),
            ("100%", MAX_SIZE_BYTES, MAX_SIZE_BYTES),
            ("12.5 %", 8, 1),
            ("0.000001%", 10**8, 1),
            ("33%", 0, 0),
        ],
    )
    def test_percentages_are_exact_and_rounded_down(
        self, text: str, total_bytes: int, size_bytes: int
    ) -> None:
        budget = Budget.from_str(text)
        assert budget.resolve(total_bytes) == size_bytes
        assert Budget.from_str(str(budget)) == budget

    def test_a_device_has_no_negative_memory(self) -> None:
        with pytest.raises(ValueError, match="at least 0"):
            Budget.from_str("50%").resolve(-1)

    def test_it_is_bytes_or_a_percentage(self) -> None:
        with pytest.raises(ValueError, match="exactly one"):
            Budget()
        with pytest.raises(ValueError, match="exactly one"):
            Budget(size_bytes=1, percent=Decimal(1))


class TestExampleAndDocument:
    def test_the_example_parses_anywhere(self, tmp_path: Path) -> None:
        config = parse_config(default_config_text(), base=tmp_path)
        assert [model.id for model in config.models] == ["sentiment", "echo"]

    def test_the_example_shows_every_setting_at_its_default(self) -> None:
        document = tomllib.loads(default_config_text())
        shown = {
            ServerConfig: document["server"],
            HttpConfig: {**document["http"], "origins": tuple(document["http"]["origins"])},
            YardConfig: document["yard"],
            HostTierConfig: document["host_tier"],
            DeviceConfig: document["devices"][0],
            ModelConfig: {"id": "sentiment", **document["models"]["sentiment"]},
        }
        for section, table in shown.items():
            for setting in settings(section):
                assert setting.name in table, (section, setting.name)
                if section in (ServerConfig, HttpConfig, YardConfig):
                    value = table[setting.name]
                    if setting.name.endswith("_bytes"):
                        value = parse_size(value)
                    assert value == setting.default, setting.name
        assert HostTierConfig(budget=document["host_tier"]["budget"]) == HostTierConfig()
        assert document["runtimes"]["torch"]["allowed_factories"] == []
        assert set(document) == {setting.name for setting in dataclasses.fields(Config)} - {
            "allowed_factories"
        } | {"runtimes"}

    def test_the_document_holds_the_example(self) -> None:
        text = DOCUMENT.read_text(encoding="utf-8")
        assert f"```toml\n{default_config_text()}```\n" in text

    @pytest.mark.parametrize(
        ("heading", "section"),
        [
            ("[server]", ServerConfig),
            ("[yard]", YardConfig),
            ("[engine]", EngineConfig),
            ("[http]", HttpConfig),
            ("[host_tier]", HostTierConfig),
            ("[[devices]]", DeviceConfig),
            ("[models.ID]", ModelConfig),
        ],
    )
    def test_every_field_is_in_the_document_with_its_default(
        self,
        heading: str,
        section: type[
            ServerConfig | YardConfig | EngineConfig | HostTierConfig | DeviceConfig | ModelConfig
        ],
    ) -> None:
        rows = documented(heading)
        expected = {each.name: each.default for each in dataclasses.fields(section)}
        expected.pop("id", None)
        assert set(rows) == set(expected)
        for name, default in expected.items():
            shown = rows[name].strip("`")
            match default:
                case dataclasses.MISSING:
                    assert shown in {"required", "{}"}, name
                case bool():
                    assert shown == str(default).lower(), name
                case int() if name.endswith("_bytes") or name == "headroom":
                    assert shown == format_size(default, exact=True), name
                case int() | float():
                    assert float(shown) == default, name
                case str() if default:
                    assert shown == default, name
                case None if section is HostTierConfig:
                    assert rule_of(settings(section)[0])(int(shown)) is None
                case _:
                    assert shown in {"[]", "empty", "none", "the server chooses at each load"}, name

    def test_what_is_no_field_of_a_section_is_documented_too(self) -> None:
        assert list(documented("[runtimes.torch]")) == ["allowed_factories"]
        assert documented("[weights]") == {
            "store": "`modelyard-store`",
            "in_place": "`false`",
            "read": "`map`",
            "arena": "`0`",
        }
        assert documented("[catalog]") == {"file": "`modelyard.db`", "durable": "`true`"}
        assert "## `[roots]`" in DOCUMENT.read_text(encoding="utf-8")

    def test_ranges_in_the_document_are_the_ones_that_are_checked(self) -> None:
        rules = {
            setting.name: rule_of(setting)
            for section in (ServerConfig, YardConfig, EngineConfig, DeviceConfig)
            for setting in settings(section)
        }
        ranges = re.findall(
            r"^\| `(\w+)` \| \w+, ([\d.]+) to (\d+) ", DOCUMENT.read_text(encoding="utf-8"), re.M
        )
        assert len(ranges) == 12
        for name, low_text, high_text in ranges:
            low = float(low_text) if "." in low_text else int(low_text)
            high = int(high_text)
            for good in (low, high):
                assert rules[name](good) == good, name
            for bad in (low - 1, high + 1):
                with pytest.raises(RuleError):
                    rules[name](bad)


def documented(heading: str) -> dict[str, str]:
    """Return the fields and defaults that the document's table under a heading has."""
    text = DOCUMENT.read_text(encoding="utf-8")
    section = text.split(f"## `{heading}`", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| [^|]+ \|$", section, re.M)
    return {name: default.strip() for name, default in rows}


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
