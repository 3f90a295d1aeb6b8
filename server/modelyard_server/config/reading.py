"""From the text of a configuration file to its values, or to everything that is wrong with it."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Final

from modelyard_server.config.devices import DeviceConfig
from modelyard_server.config.engine import EngineConfig
from modelyard_server.config.host_tier import HostTierConfig, tier_conflicts
from modelyard_server.config.lines import LineIndex
from modelyard_server.config.models import ModelConfig
from modelyard_server.config.placement import is_haystack_shape
from modelyard_server.config.problems import ConfigError, KeyPath, Problem, key_text, quoted
from modelyard_server.config.routes import RouteConfig, route_conflicts
from modelyard_server.config.rules import (
    Finding,
    Rule,
    RuleError,
    boolean,
    factories,
    identifier,
    kind,
    one_of,
    seconds,
    size,
)
from modelyard_server.config.sections import Section, rule_of, settings
from modelyard_server.config.server import HttpConfig, ServerConfig
from modelyard_server.config.storage import MAX_KEEP_S, READ_MODES, CatalogConfig, WeightsConfig
from modelyard_server.config.whole import Config, plan_conflicts
from modelyard_server.config.yard import YardConfig
from modelyard_server.devices.sizes import MAX_SIZE_BYTES

__all__ = ["MAX_CONFIG_BYTES", "load_config", "parse_config"]

MAX_CONFIG_BYTES: Final = 16 * 1024**2
"""Largest configuration file; room for tens of thousands of models."""

_SECTIONS: Final = (
    *("server", "http", "yard", "catalog", "weights", "engine", "host_tier", "devices"),
    *("roots", "runtimes", "models", "routes"),
)
_AT_LINE: Final = re.compile(r" \(at (?:line ([0-9]+), column [0-9]+|end of document)\)$")
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LONGEST_TYPO: Final = 64
_CATALOG_FILE: Final = "modelyard.db"
_STORE_FOLDER: Final = "modelyard-store"
_LONG_NUMBER: Final = re.compile(r"[0-9][0-9_]{4000,}")


def load_config(path: Path, *, check_paths: bool = True) -> Config:
    """Read a configuration file.

    Args:
        path: a TOML file in UTF-8. Relative roots are relative to its folder, in which the catalog
            is unless it says otherwise.
        check_paths: False for a file that may be of another machine: see ``parse_config``.

    Raises:
        ConfigError: it cannot be read, is no TOML, or says something that cannot be. The error
            holds all problems at once and the file's name.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        # ValueError for a name that holds a NUL. strerror alone: the file is named by the problem.
        reason = error.strerror if isinstance(error, OSError) else None
        raise _file_error(f"cannot be read: {reason or error}", source=path) from error
    if len(content) > MAX_CONFIG_BYTES:
        raise _file_error(f"is larger than {MAX_CONFIG_BYTES} bytes: split it", source=path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _file_error("is not UTF-8 text: save it as such", line, source=path) from error
    folder = path.absolute().parent
    try:
        return parse_config(
            text,
            base=folder,
            default_catalog=folder / _CATALOG_FILE,
            default_store=folder / _STORE_FOLDER,
            check_paths=check_paths,
        )
    except ConfigError as error:
        raise ConfigError(error.problems, source=path) from error


def parse_config(
    text: str,
    *,
    base: Path,
    default_catalog: Path | None = None,
    default_store: Path | None = None,
    check_paths: bool = True,
) -> Config:
    """Read the text of a configuration file.

    Args:
        text: TOML.
        base: folder that relative roots, and the catalog's file, are relative to.
        default_catalog: where the catalog is if the text does not say; None keeps it in memory.
        default_store: where weights are kept if the text does not say; None reads them where they
            lie.
        check_paths: whether folders and files that the text names are looked for. If not, no file
            system is looked at, and they are kept as written, made absolute; all else is checked.

    Raises:
        ConfigError: the text is no TOML, or says something that cannot be. The error holds all
            problems at once; of a text that is no TOML, the first.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(error, text) from error
    except RecursionError as error:
        raise _file_error("is no usable TOML: values are nested too deeply") from error
    except ValueError as error:
        # The parser lets int() speak for itself, which refuses thousands of digits.
        found = _LONG_NUMBER.search(text)
        line = text.count("\n", 0, found.start()) + 1 if found else 1
        raise _file_error(f"is no usable TOML: {error}", line) from error
    paths = _Paths(base.absolute(), check=check_paths)
    return _Reader(document, LineIndex.of(text), paths, default_catalog, default_store).config()


def _file_error(text: str, line: int = 1, *, source: Path | None = None) -> ConfigError:
    return ConfigError([Problem(key="", line=line, text=text)], source=source)


def _syntax_error(error: tomllib.TOMLDecodeError, text: str) -> ConfigError:
    message = str(error)
    place = _AT_LINE.search(message)
    if place is None:
        return _file_error(f"is no valid TOML: {message}")
    # "End of document" is the last line that has something on it.
    line = int(place[1]) if place[1] else text.rstrip().count("\n") + 1
    return _file_error(f"is no valid TOML: {message[: place.start()]}", line)


class _Reader:
    """Reads one document, collecting problems."""

    def __init__(
        self,
        document: Mapping[str, Any],
        lines: LineIndex,
        paths: _Paths,
        default_catalog: Path | None,
        default_store: Path | None,
    ) -> None:
        self._document = document
        self._lines = lines
        self._paths = paths
        self._default_catalog = default_catalog
        self._default_store = default_store
        self._problems: list[Problem] = []

    def config(self) -> Config:
        """Return the configuration, or raise ``ConfigError`` with all problems."""
        self._refuse_unknown((), self._document, _SECTIONS)
        server = self._section(ServerConfig, ("server",), self._table(("server",)))
        http = self._section(HttpConfig, ("http",), self._table(("http",)))
        yard = self._section(YardConfig, ("yard",), self._table(("yard",)))
        catalog = self._catalog()
        weights = self._weights()
        engine = self._section(EngineConfig, ("engine",), self._table(("engine",)))
        tier = self._section(HostTierConfig, ("host_tier",), self._table(("host_tier",)))
        devices = self._array("devices", DeviceConfig)
        root_tables = self._table(("roots",))
        roots = self._roots(root_tables)
        allowed = self._allowed_factories()
        models = self._models()
        routes = self._array("routes", RouteConfig)
        self._report_all((), route_conflicts(routes or (), models))
        # Roots count by name: one whose folder is wrong has been reported, and is declared.
        for path, text in plan_conflicts(devices or (), frozenset(root_tables), models):
            # Where [[devices]] is no array of tables, that alone is worth a report.
            if devices is not None or path != ("devices",):
                self._report(self._as_written(path), text)
        self._report_all((), tier_conflicts(tier.get("budget"), devices or ()))
        if self._problems:
            raise ConfigError(self._problems)
        return Config(
            server=ServerConfig(**server),
            http=HttpConfig(**http),
            yard=YardConfig(**yard),
            catalog=catalog,
            weights=weights,
            engine=EngineConfig(**engine),
            host_tier=HostTierConfig(**tier),
            devices=tuple(DeviceConfig(**given) for given in devices or ()),
            roots=roots,
            models=tuple(ModelConfig(**given) for given in models.values()),
            routes=tuple(RouteConfig(**given) for given in routes or ()),
            allowed_factories=allowed,
        )

    def _catalog(self) -> CatalogConfig:
        path = ("catalog",)
        table = self._table(path)
        self._refuse_unknown(path, table, ("file", "durable"))
        file, durable = self._default_catalog, True
        try:
            durable = boolean(table.get("durable", True))
        except RuleError as error:
            self._report_all((*path, "durable"), error.findings)
        if "file" in table:
            try:
                file = self._paths.file_to_write(table["file"])
            except RuleError as error:
                self._report_all((*path, "file"), error.findings)
        return CatalogConfig(path=file if durable else None)

    def _weights(self) -> WeightsConfig:
        path = ("weights",)
        table = self._table(path)
        self._refuse_unknown(path, table, ("store", "in_place", "read", "arena", "keep_unused_s"))
        store: Path | None = self._default_store
        found: dict[str, Any] = {"in_place": False, "read": "map", "arena": 0}
        found["keep_unused_s"] = WeightsConfig().keep_unused_s
        checks: dict[str, Rule] = {
            "store": self._paths.folder_to_write,
            "in_place": boolean,
            "read": one_of(*READ_MODES),
            "arena": size(0, MAX_SIZE_BYTES),
            "keep_unused_s": seconds(0, MAX_KEEP_S),
        }
        for name, check in checks.items():
            if name in table:
                try:
                    found[name] = check(table[name])
                except RuleError as error:
                    self._report_all((*path, name), error.findings)
        store = None if found["in_place"] else found.get("store", store)
        return WeightsConfig(
            store=store,
            read=found["read"],
            arena=found["arena"],
            keep_unused_s=found["keep_unused_s"],
        )

    def _array(self, name: str, section: type[Section]) -> list[dict[str, Any]] | None:
        """Read an array of tables; None if it is none."""
        value = self._document.get(name, [])
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            self._report((name,), f"must be an array of tables: write [[{name}]] above each")
            return None
        return [self._section(section, (name, index), table) for index, table in enumerate(value)]

    def _models(self) -> dict[str, dict[str, Any]]:
        models: dict[str, dict[str, Any]] = {}
        for model_id, value in self._table(("models",)).items():
            path = ("models", model_id)
            if isinstance(value, dict):
                models[model_id] = self._section(ModelConfig, path, value, id=model_id)
            else:
                self._report(path, _no_table(path, value))
        return models

    def _roots(self, table: Mapping[str, Any]) -> dict[str, Path]:
        roots: dict[str, Path] = {}
        for name, value in table.items():
            try:
                roots[identifier(name)] = self._paths.existing_folder(value)
            except RuleError as error:
                self._report_all(("roots", name), error.findings)
        return roots

    def _allowed_factories(self) -> frozenset[str]:
        runtimes = self._table(("runtimes",))
        self._refuse_unknown(("runtimes",), runtimes, ("torch",))
        path = ("runtimes", "torch")
        torch = self._table(path)
        self._refuse_unknown(path, torch, ("allowed_factories",))
        try:
            return frozenset(factories(torch.get("allowed_factories", [])))
        except RuleError as error:
            self._report_all((*path, "allowed_factories"), error.findings)
            return frozenset()

    def _section(
        self, section: type[Section], path: KeyPath, table: Mapping[str, Any], **named: str
    ) -> dict[str, Any]:
        """Read the fields of a section.

        Args:
            section: what is read.
            path: where.
            table: its settings.
            named: fields that the name of the table gives, not a setting.

        Returns:
            For each field that is right its value, the default where it is not set.
        """
        self._refuse_unknown(
            path, table, [each.name for each in settings(section) if each.name not in named]
        )
        given: dict[str, Any] = {}
        for setting in settings(section):
            name = setting.name
            where = path if name in named else (*path, name)
            if name in named or name in table:
                try:
                    given[name] = rule_of(setting)(named.get(name, table.get(name)))
                except RuleError as error:
                    self._report_all(where, error.findings)
                    if error.usable is not None:
                        given[name] = error.usable
            elif setting.default is not MISSING:
                given[name] = setting.default
            elif setting.default_factory is not MISSING:
                given[name] = setting.default_factory()
            else:
                self._report(where, "is missing, and has no default")
        self._report_all(path, section.conflicts(given))
        return given

    def _table(self, path: tuple[str, ...]) -> Mapping[str, Any]:
        """Return a table of the document, an empty one where there is none."""
        table: Any = self._document
        for part in path:
            table = table.get(part, {}) if isinstance(table, dict) else {}
        if isinstance(table, dict):
            return table
        self._report(path, _no_table(path, table))
        return {}

    def _as_written(self, path: KeyPath) -> KeyPath:
        """Return where the file has a part of a device map: Haystack's table is one deeper."""
        match path:
            case ("models", str() as model_id, "device", part):
                written = self._document["models"][model_id]["device"]
                if is_haystack_shape(written):
                    return ("models", model_id, "device", "device_map", part)
        return path

    def _refuse_unknown(
        self, path: KeyPath, table: Mapping[str, Any], known: Iterable[str]
    ) -> None:
        names = list(known)
        for key in table:
            if key in names:
                continue
            near = difflib.get_close_matches(key[:_LONGEST_TYPO], names, n=1)
            advice = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(names)}"
            self._report((*path, key), f"unknown field; {advice}")

    def _report_all(self, path: KeyPath, findings: Iterable[Finding]) -> None:
        for inner, text in findings:
            self._report((*path, *inner), text)

    def _report(self, path: KeyPath, text: str) -> None:
        line = self._lines.line_of(path)
        self._problems.append(Problem(key=key_text(path), line=line, text=text))


def _no_table(path: KeyPath, value: object) -> str:
    return f"must be a table, got {kind(value)}: write [{key_text(path)}]"


class _Paths:
    """The folders and files that a document names.

    Args:
        base: absolute folder that relative ones are relative to.
        check: whether they are looked for; else nobody looks at a file system.
    """

    def __init__(self, base: Path, *, check: bool) -> None:
        self._base = base
        self._check = check

    def existing_folder(self, value: object) -> Path:
        """Return the absolute, resolved folder that a root names. Raises ``RuleError``."""
        text = _local_path(value, "a folder")
        if not self._check:
            return self._base / text
        try:
            folder = (self._base / text).resolve(strict=True)
            is_folder = folder.is_dir()
        except FileNotFoundError as error:
            raise RuleError(f"{quoted(text)} does not exist: create the folder") from error
        except (OSError, RuntimeError) as error:
            # RuntimeError for symbolic links that lead to each other.
            reason = error.strerror if isinstance(error, OSError) else "symbolic links form a loop"
            raise RuleError(f"{quoted(text)} cannot be opened: {reason}") from error
        if not is_folder:
            raise RuleError(f"{quoted(text)} is not a folder")
        return folder

    def file_to_write(self, value: object) -> Path:
        """Return the absolute path of a file that may be made. Raises ``RuleError``."""
        text = _local_path(value, "a file")
        return self._to_write(text, Path.is_file, above="of", kind="file")

    def folder_to_write(self, value: object) -> Path:
        """Return the absolute path of a folder that may be made. Raises ``RuleError``."""
        text = _local_path(value, "a folder")
        return self._to_write(text, Path.is_dir, above="above", kind="folder")

    def _to_write(
        self, text: str, is_kind: Callable[[Path], bool], *, above: str, kind: str
    ) -> Path:
        path = self._base / text
        if not self._check:
            return path
        try:
            if not path.parent.is_dir():
                raise RuleError(f"the folder {above} {quoted(text)} does not exist: create it")
            if path.exists() and not is_kind(path):
                raise RuleError(f"{quoted(text)} is not a {kind}")
        except OSError as error:
            raise RuleError(f"{quoted(text)} cannot be opened: {error.strerror}") from error
        return path


def _local_path(value: object, what: str) -> str:
    """Return text that may be a path of this machine. Raises ``RuleError``."""
    if not isinstance(value, str):
        raise RuleError(f"must be the path of {what}, got {kind(value)}")
    if _URL.match(value):
        raise RuleError(f"must be a local {what.split()[-1]}, not a URL: {quoted(value)}")
    if not value or not value.isprintable():
        raise RuleError(f"must be the path of {what}, without control characters")
    if value.startswith("~"):
        raise RuleError('"~" is not expanded: write the whole path')
    return value
