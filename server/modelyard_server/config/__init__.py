"""The server's configuration: one TOML file, read once, checked completely, then immutable.

``rules``, ``addresses`` and ``placement`` say what a single setting may be, ``values`` what the
settings are and how they fit together, ``lines`` on which line of the file each of them is, and
``reading`` puts them together.
All problems of a file are reported at once, each with its key and line.
"""

from __future__ import annotations

from modelyard_server.config.budget import Budget
from modelyard_server.config.example import default_config_text
from modelyard_server.config.problems import ConfigError, Problem
from modelyard_server.config.reading import load_config, parse_config
from modelyard_server.config.values import (
    MAX_DEVICES,
    TASKS,
    CatalogConfig,
    Config,
    DeviceConfig,
    EngineConfig,
    HostTierConfig,
    HttpConfig,
    ModelConfig,
    RouteConfig,
    ServerConfig,
    WeightsConfig,
    YardConfig,
)

__all__ = [
    "MAX_DEVICES",
    "TASKS",
    "Budget",
    "CatalogConfig",
    "Config",
    "ConfigError",
    "DeviceConfig",
    "EngineConfig",
    "HostTierConfig",
    "HttpConfig",
    "ModelConfig",
    "Problem",
    "RouteConfig",
    "ServerConfig",
    "WeightsConfig",
    "YardConfig",
    "default_config_text",
    "load_config",
    "parse_config",
]
