"""The example and docs/configuration.md say what the server reads."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from modelyard_server.config import (
    Config,
    DeviceConfig,
    EngineConfig,
    HostTierConfig,
    HttpConfig,
    ModelConfig,
    ServerConfig,
    YardConfig,
    default_config_text,
    parse_config,
)
from modelyard_server.config.rules import RuleError
from modelyard_server.config.sections import rule_of, settings
from modelyard_server.devices.sizes import format_size, parse_size

DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"


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
            "keep_unused_s": "`86400`",
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
