"""The server's configuration: one TOML file, read once, checked completely, then immutable.

``rules``, ``addresses`` and ``placement`` say what a single setting may be, ``sections`` what a
section of settings is. Each section has the module of its name, except ``[http]``, which is in
``server``, and ``[catalog]`` and ``[weights]``, which are in ``storage``. ``whole`` says how they
fit together, ``lines`` on which line of the file each setting is, and ``reading`` does the work.
All problems of a file are reported at once, each with its key and line.
"""

from __future__ import annotations

from modelyard_server.config.budget import Budget
from modelyard_server.config.devices import MAX_DEVICES, DeviceConfig
from modelyard_server.config.engine import EngineConfig
from modelyard_server.config.example import default_config_text
from modelyard_server.config.host_tier import HostTierConfig
from modelyard_server.config.models import TASKS, ModelConfig
from modelyard_server.config.problems import ConfigError, Problem
from modelyard_server.config.reading import load_config, parse_config
from modelyard_server.config.routes import RouteConfig
from modelyard_server.config.server import HttpConfig, ServerConfig
from modelyard_server.config.storage import CatalogConfig, WeightsConfig
from modelyard_server.config.whole import Config
from modelyard_server.config.yard import YardConfig

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
