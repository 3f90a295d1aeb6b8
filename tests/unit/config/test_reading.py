"""Files and texts that can be read, and those that are no configuration at all."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from tests.support.config_problems import CPU, only_problem, with_model

from modelyard.devices import ComponentDevice, Device, DeviceMap
from modelyard.placements import AutomaticPlacement, Placement, PlacementStrategy
from modelyard_server.config import (
    Budget,
    CatalogConfig,
    Config,
    ConfigError,
    DeviceConfig,
    ModelConfig,
    ServerConfig,
    YardConfig,
    load_config,
    parse_config,
)
from modelyard_server.config.reading import MAX_CONFIG_BYTES


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


ELSEWHERE = (
    CPU
    + '[catalog]\nfile = "/nowhere/modelyard.db"\n[weights]\nstore = "nowhere/store"\n'
    + '[roots]\nstore = "/nowhere/models"\n[models.a]\nruntime = "torch"\nroot = "store"\n'
    + 'folder = "a"\n'
)


class TestOfAnotherMachine:
    @pytest.fixture(autouse=True)
    def no_file_system(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def looked(path: Path, *_: object, **__: object) -> bool:
            raise AssertionError(f"somebody looked at {path}")

        for name in ("exists", "is_dir", "is_file", "resolve", "stat", "lstat"):
            monkeypatch.setattr(Path, name, looked)

    def test_no_file_system_is_looked_at(self) -> None:
        base = Path("/somewhere")
        with pytest.raises(AssertionError, match="somebody looked at /nowhere"):
            parse_config(ELSEWHERE, base=base)
        config = parse_config(ELSEWHERE, base=base, check_paths=False)
        assert config.roots == {"store": Path("/nowhere/models")}
        assert config.catalog.path == Path("/nowhere/modelyard.db")
        assert config.weights.store == Path("/somewhere/nowhere/store")
        assert [model.folder for model in config.models] == ["a"]

    def test_all_else_is_checked(self) -> None:
        text = (
            CPU + "[catalog]\nfile = 1\n[weights]\nstore = '~/store'\n"
            "[roots]\nstore = 's3://bucket'\nother = ''\n"
            '[models.a]\nruntime = "torch"\nroot = "none"\nfolder = "../a"\n'
            "[yard]\npolicy = 'none'\ncolour = 1\n"
        )
        with pytest.raises(ConfigError) as caught:
            parse_config(text, base=Path("/somewhere"), check_paths=False)
        assert {problem.key for problem in caught.value.problems} == {
            "catalog.file",
            "weights.store",
            "roots.store",
            "roots.other",
            "models.a.root",
            "models.a.folder",
            "yard.policy",
            "yard.colour",
        }


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
