"""The values of a configuration: what every part of the server is told by its operator.

A field is a setting of the same name, its default is the setting's default, and its ``rule`` says
what it may be, so that this file, the reader and the documentation cannot drift apart. Values are
immutable, checked when made, and may be shared between threads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol, cast

from modelyard.devices import Device, DeviceType
from modelyard.placements import AutomaticPlacement, Placement
from modelyard_server.config import addresses, placement, rules
from modelyard_server.config.budget import Budget
from modelyard_server.config.problems import KeyPath, key_text, quoted
from modelyard_server.config.rules import Finding, Rule, RuleError
from modelyard_server.devices.sizes import MAX_SIZE_BYTES
from modelyard_server.routing.checks import beside, only_model
from modelyard_server.routing.step_types import known_signature, steps_that_do_not_meet
from modelyard_server.routing.target_json import path_parts
from modelyard_server.routing.targets import (
    KINDS,
    Ensemble,
    Fallback,
    Link,
    One,
    Shadow,
    Split,
    Target,
    Versions,
    links_of,
)
from modelyard_server.routing.targets import Sequence as SequenceTarget
from modelyard_server.runtimes.signature import Signature

__all__ = [
    "MAX_DEVICES",
    "ORDERS",
    "POLICIES",
    "READ_MODES",
    "TASKS",
    "CatalogConfig",
    "Config",
    "DeviceConfig",
    "EngineConfig",
    "HostTierConfig",
    "HttpConfig",
    "ModelConfig",
    "RouteConfig",
    "Section",
    "ServerConfig",
    "WeightsConfig",
    "YardConfig",
    "plan_conflicts",
    "route_conflicts",
    "rule_of",
    "settings",
    "tier_conflicts",
]

MAX_DEVICES: Final = 16
"""Most devices of a yard; the core's own limit."""

POLICIES: Final = (
    "ensemble",
    "learned",
    "next-use",
    "due",
    "gap",
    "mix",
    "decay",
    "gdsf",
    "lru",
)
"""The core's eviction policies, the default first: a configuration is checked without the core."""

ORDERS: Final = ("urgency", "fifo")
"""The orders in which requests are served, the default first."""

READ_MODES: Final = ("map", "owned", "arena")
"""How weights come into host memory."""

TASKS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "transformers": (
            "feature-extraction",
            "text-classification",
            "fill-mask",
            "text-generation",
            "image-classification",
        ),
        "torch": (),
        "identity": (),
    }
)
"""The runtimes and the tasks of each. A runtime without tasks does one thing."""

_WEIGHTLESS: Final = frozenset({"identity"})
_RULE: Final = "rule"
_DAY_S: Final = 86400


def _ruled(rule: Rule) -> Mapping[str, Rule]:
    return {_RULE: rule}


class Section(Protocol):
    """A part of the configuration that is read field by field."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield what is wrong between settings that are each right.

        Args:
            given: the fields that passed their rules, by name; others are absent.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the server is reached and how long it waits: ``[server]``.

    Raises:
        ValueError: a field breaks its rule, or two contradict each other.
    """

    listen: str = field(default="127.0.0.1:8470", metadata=_ruled(addresses.listen_address))
    """``host:port`` of the listener; port 0 lets the system choose one."""
    insecure_non_loopback: bool = field(default=False, metadata=_ruled(rules.boolean))
    """Whether ``listen`` may be reachable from other machines, without encryption or identity."""
    default_deadline_s: float = field(default=30.0, metadata=_ruled(rules.seconds(0.001, _DAY_S)))
    """Deadline of a request that brings none, in seconds."""
    max_deadline_s: float = field(default=300.0, metadata=_ruled(rules.seconds(0.001, _DAY_S)))
    """Longest deadline a request can have, in seconds; longer ones are shortened to it."""
    max_message_bytes: int = field(
        default=16 * 1024**2, metadata=_ruled(rules.size(64 * 1024, 2**31 - 1))
    )
    """Largest request message, in bytes."""
    shutdown_grace_s: float = field(default=10.0, metadata=_ruled(rules.seconds(0, 3600)))
    """How long running requests may go on after SIGTERM, in seconds."""
    log_level: str = field(
        default="info", metadata=_ruled(rules.one_of("debug", "info", "warning", "error"))
    )
    """The least level that is logged."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def host(self) -> str:
        """Host of ``listen``, an IPv6 address without its brackets."""
        return addresses.split_listen_address(self.listen)[0]

    @property
    def port(self) -> int:
        """Port of ``listen``."""
        return addresses.split_listen_address(self.listen)[1]

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        yield from _exposed(given)
        yield from _ascending(given, "default_deadline_s", "max_deadline_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """The same services over HTTP, for clients without gRPC: ``[http]``.

    Raises:
        ValueError: a field breaks its rule, or two contradict each other.
    """

    listen: str = field(default="", metadata=_ruled(addresses.optional_listen_address))
    """``host:port`` of the listener; port 0 lets the system choose one. Empty: none."""
    insecure_non_loopback: bool = field(default=False, metadata=_ruled(rules.boolean))
    """Whether ``listen`` may be reachable from other machines, without encryption or identity."""
    origins: tuple[str, ...] = field(default=(), metadata=_ruled(rules.origins))
    """Web pages, by their origin, whose scripts may call. Requests of all others are refused."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def host(self) -> str:
        """Host of ``listen``, an IPv6 address without its brackets; empty if there is none."""
        return addresses.split_listen_address(self.listen)[0] if self.listen else ""

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        if given.get("listen"):
            yield from _exposed(given)


@dataclass(frozen=True, slots=True, kw_only=True)
class YardConfig:
    """How the yard decides what stays resident and who waits: ``[yard]``.

    Raises:
        ValueError: a field breaks its rule, or two contradict each other.
    """

    policy: str = field(default=POLICIES[0], metadata=_ruled(rules.one_of(*POLICIES)))
    """How victims are chosen."""
    order: str = field(default=ORDERS[0], metadata=_ruled(rules.one_of(*ORDERS)))
    """Who is served next: whom the yard chooses, or strictly who came first."""
    max_waiting_per_model: int = field(default=1024, metadata=_ruled(rules.integer(1, 1_000_000)))
    """Most requests that wait for one model."""
    max_waiting: int = field(default=65536, metadata=_ruled(rules.integer(1, 10_000_000)))
    """Most requests that wait altogether."""
    overdue_after_s: float = field(default=30.0, metadata=_ruled(rules.seconds(0.001, _DAY_S)))
    """A request that has waited this long may make models in use give way, in seconds."""
    backoff_initial_s: float = field(default=1.0, metadata=_ruled(rules.seconds(0.001, _DAY_S)))
    """How long a model rests after its first failed load, in seconds; doubles with each failure."""
    backoff_max_s: float = field(default=60.0, metadata=_ruled(rules.seconds(0.001, _DAY_S)))
    """Longest such rest, in seconds."""
    loads_per_device: int = field(default=1, metadata=_ruled(rules.integer(1, 64)))
    """Loads that may run on one device at once."""
    explain_capacity: int = field(default=4096, metadata=_ruled(rules.integer(1, 1_048_576)))
    """Decisions that are remembered for explanations."""

    def __post_init__(self) -> None:
        _check(self)

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        yield from _ascending(given, "backoff_initial_s", "backoff_max_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """A device that models may live on: one element of ``[[devices]]``.

    Raises:
        ValueError: a field breaks its rule, or two contradict each other.
    """

    device: Device = field(metadata=_ruled(placement.device))
    """The device, in the form that names a place (``cuda:0``, not ``cuda``; ``cpu``)."""
    budget: Budget = field(metadata=_ruled(rules.budget))
    """Most that models may hold on it."""
    logical: bool = field(default=False, metadata=_ruled(rules.boolean))
    """Whether this is a pool of host memory that stands for the device."""
    threads: int = field(default=1, metadata=_ruled(rules.integer(1, 1024)))
    """Intra-op threads of its lane."""
    reserve: int = field(default=0, metadata=_ruled(rules.size(0, MAX_SIZE_BYTES)))
    """What budgets leave alone of what it has, in bytes."""
    transfer_bandwidth: int = field(default=0, metadata=_ruled(rules.bandwidth))
    """Most that loads bring onto it, in bytes a second; 0 is as fast as it goes."""
    worker: str = field(default="models", metadata=_ruled(rules.identifier))
    """The worker process that its models are in; devices that name the same one share it."""

    def __post_init__(self) -> None:
        _check(self)

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        device = given.get("device")
        if given.get("transfer_bandwidth") and not given.get("logical", True):
            yield (
                ("transfer_bandwidth",),
                "is for logical devices: a real one has the bandwidth that it has",
            )
        if device is not None and device.type is DeviceType.DISK:
            if given.get("logical"):
                yield ("logical",), "must be false: the disk is no pool of host memory"
            if given.get("threads", 1) != 1:
                yield ("threads",), "must be left out: nothing runs on the disk"
            return
        if device is None or given.get("logical", True):
            return
        if device.type is DeviceType.CPU and device.id is not None:
            yield (
                ("device",),
                f"{device} is no device of its own, because host memory is one: "
                'write "cpu", or set logical = true to make it a pool',
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A model and the keys that mean it: ``[models.ID]``.

    Raises:
        ValueError: a field breaks its rule, or two contradict each other.
    """

    id: str = field(metadata=_ruled(rules.identifier))
    """Its id, which is the name of its table."""
    runtime: str = field(metadata=_ruled(rules.one_of(*TASKS)))
    """What executes it."""
    keys: tuple[str, ...] = field(default=(), metadata=_ruled(rules.keys))
    """Keys that mean it, besides its id, which always does."""
    task: str = field(default="", metadata=_ruled(rules.word))
    """What the runtime does with it; empty for runtimes that do one thing."""
    root: str | None = field(default=None, metadata=_ruled(rules.identifier))
    """Name of the root below which its weights are; None for runtimes without weights."""
    folder: str | None = field(default=None, metadata=_ruled(rules.folder))
    """Folder below the root, ``/``-separated; None for runtimes without weights."""
    device: Placement | None = field(default=None, metadata=_ruled(placement.placement))
    """Where it lives; None lets the server choose at each load."""
    pinned: bool = field(default=False, metadata=_ruled(rules.boolean))
    """Whether it is loaded at the start and never evicted."""
    options: Mapping[str, object] = field(
        default_factory=lambda: MappingProxyType({}), hash=False, metadata=_ruled(rules.options)
    )
    """What the runtime is told; it judges them. Read-only throughout: arrays are tuples."""

    def __post_init__(self) -> None:
        _check(self)

    def plain_options(self) -> dict[str, Any]:
        """Return a copy of the options in dicts and lists, as a runtime's own checks want it."""
        return cast("dict[str, Any]", _plain(self.options))

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        runtime = given.get("runtime")
        if runtime is None:
            return
        if "task" in given:
            yield from _task_conflicts(runtime, given["task"])
        for name, what in (("root", "one of [roots]"), ("folder", "a folder below the root")):
            if name not in given:
                continue
            if runtime in _WEIGHTLESS and given[name] is not None:
                yield (name,), f"must be left out: the {runtime} runtime has no weights"
            elif runtime not in _WEIGHTLESS and given[name] is None:
                yield (name,), f"is missing: the {runtime} runtime reads weights, name {what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteConfig:
    """What keys mean: ``[[routes]]``. Exactly one of the kinds is set.

    Raises:
        ValueError: a field breaks its rule, or there is no key, or not one kind.
    """

    id: str = field(metadata=_ruled(rules.identifier))
    """Its id, which is no key."""
    keys: tuple[str, ...] = field(default=(), metadata=_ruled(rules.route_keys))
    """The keys, at least one unless there are prefixes. One that is listed twice counts once."""
    prefixes: tuple[str, ...] = field(default=(), metadata=_ruled(rules.route_prefixes))
    """Beginnings of keys; "" is one of every key. One that is listed twice counts once."""
    model: str | None = field(default=None, metadata=_ruled(rules.identifier))
    """Id of the model that they mean; one of ``[models]``, as what the other kinds lead to is."""
    split: Split | None = field(default=None, metadata=_ruled(rules.target("split")))
    """They mean one of several, by weight."""
    sequence: SequenceTarget | None = field(default=None, metadata=_ruled(rules.target("sequence")))
    """They mean several, one after the other."""
    ensemble: Ensemble | None = field(default=None, metadata=_ruled(rules.target("ensemble")))
    """They mean all of several, combined."""
    shadow: Shadow | None = field(default=None, metadata=_ruled(rules.target("shadow")))
    """They mean one, and another is tried."""
    fallback: Fallback | None = field(default=None, metadata=_ruled(rules.target("fallback")))
    """They mean the first of several that can answer in time."""
    versions: Versions | None = field(default=None, metadata=_ruled(rules.target("versions")))
    """They mean one of several versions."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def target(self) -> Target:
        """What its keys mean."""
        target = _target_of(_fields_of(self))
        assert target is not None  # It has been checked that there is one.
        return target

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        if not given.get("keys", True) and not given.get("prefixes", True):
            yield ("keys",), "must hold at least one key, or there must be prefixes"
        kinds = [kind for kind in KINDS if given.get(kind) is not None]
        broken = any(kind not in given for kind in KINDS)
        if len(kinds) > 1:
            yield (kinds[1],), f"is a second meaning beside {kinds[0]}: make it a route of its own"
        elif not kinds and not broken:
            yield (), f"means nothing: give it one of {', '.join(KINDS)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogConfig:
    """Where models, keys and plans are kept that come over the wire: ``[catalog]``.

    Raises:
        ValueError: the path is not absolute.
    """

    path: Path | None = None
    """Absolute path of the database; None keeps them in memory, until the server stops."""

    def __post_init__(self) -> None:
        if self.path is not None and not self.path.is_absolute():
            raise ValueError(f"catalog: the path must be absolute, got {quoted(str(self.path))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """Where weights are kept and how they are read: ``[weights]``.

    Raises:
        ValueError: a field breaks its rule, or the store's path is not absolute.
    """

    store: Path | None = None
    """Absolute path of the folder of the server's own copies; None reads models where they lie."""
    read: str = "map"
    """How they come into host memory: ``map``, ``owned`` or ``arena``."""
    arena: int = 0
    """Most bytes that an arena keeps for the next model while nobody uses them."""

    def __post_init__(self) -> None:
        if self.store is not None and not self.store.is_absolute():
            raise ValueError(f"weights: the path must be absolute, got {quoted(str(self.store))}")
        if self.read not in READ_MODES:
            raise ValueError(f"weights: read must be one of {', '.join(READ_MODES)}")
        if self.arena < 0:
            raise ValueError("weights: arena must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Where models run: ``[engine]``.

    Raises:
        ValueError: a field breaks its rule.
    """

    kind: str = field(default="process", metadata=_ruled(rules.one_of("process", "thread")))
    """``process``: in worker processes, so that a model can break only itself; ``thread``: in the
    server's own."""
    run_limit_s: float = field(default=60.0, metadata=_ruled(rules.seconds(0.01, _DAY_S)))
    """A run that takes longer hangs: its worker is ended. In seconds."""
    load_limit_s: float = field(default=900.0, metadata=_ruled(rules.seconds(0.1, _DAY_S)))
    """The same for a load."""
    headroom: int = field(default=2 * 1024**3, metadata=_ruled(rules.size(0, MAX_SIZE_BYTES)))
    """What a worker may allocate beside what its devices' budgets allow, in bytes."""
    strikes: int = field(default=3, metadata=_ruled(rules.integer(1, 1000)))
    """Workers a model may bring down within ten minutes before it is not loaded any more."""
    max_batch_rows: int = field(default=64, metadata=_ruled(rules.integer(1, 1024)))
    """Most rows that requests share a run with; 1: every request has its own."""
    max_batch_bytes: int = field(
        default=64 * 1024**2, metadata=_ruled(rules.size(1, MAX_SIZE_BYTES))
    )
    """Most bytes of such a run's inputs, padding included."""

    def __post_init__(self) -> None:
        _check(self)

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        yield from ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTierConfig:
    """Where copies of evicted models' weights are kept: ``[host_tier]``.

    Raises:
        ValueError: a field breaks its rule.
    """

    budget: Budget | None = field(default=None, metadata=_ruled(rules.optional_budget))
    """Most host memory that copies may hold together; None for no host tier."""

    def __post_init__(self) -> None:
        _check(self)

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        yield from ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole configuration.

    Raises:
        ValueError: its parts contradict each other, as ``plan_conflicts``, ``route_conflicts`` and
            ``tier_conflicts`` say.
    """

    server: ServerConfig = field(default_factory=ServerConfig)
    """How the server is reached."""
    http: HttpConfig = field(default_factory=HttpConfig)
    """How it is reached without gRPC."""
    yard: YardConfig = field(default_factory=YardConfig)
    """How it decides."""
    catalog: CatalogConfig = field(default_factory=CatalogConfig)
    """Where it keeps what must survive it."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """Where it keeps weights."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Where models run."""
    host_tier: HostTierConfig = field(default_factory=HostTierConfig)
    """Where copies of evicted models are kept."""
    devices: tuple[DeviceConfig, ...]
    """1 to ``MAX_DEVICES`` devices, all different, in the order of the file."""
    roots: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    """Absolute folders, by name, below which model folders may be."""
    models: tuple[ModelConfig, ...] = ()
    """The models, in the order of the file."""
    routes: tuple[RouteConfig, ...] = ()
    """The routes, in the order of the file."""
    allowed_factories: frozenset[str] = frozenset()
    """``module:function`` names that the torch runtime may call."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "roots", MappingProxyType(dict(self.roots)))
        devices = [_fields_of(device) for device in self.devices]
        models = {model.id: _fields_of(model) for model in self.models}
        if len(models) != len(self.models):
            raise ValueError("two models have the same id")
        _raise_if_any(
            [
                *plan_conflicts(devices, frozenset(self.roots), models),
                *route_conflicts([_fields_of(route) for route in self.routes], models),
                *tier_conflicts(self.host_tier.budget, devices),
            ]
        )


def _exposed(given: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with a listener that other machines reach without anybody wanting it."""
    if not {"listen", "insecure_non_loopback"} <= given.keys():
        return
    host, _ = addresses.split_listen_address(given["listen"])
    if not given["insecure_non_loopback"] and not addresses.is_loopback(host):
        yield (
            ("listen",),
            f"{quoted(host)} may be reached from other machines, and there is no TLS yet: "
            "listen on 127.0.0.1 behind a proxy that does TLS, or set "
            "insecure_non_loopback = true if the network is closed",
        )


def plan_conflicts(
    devices: Sequence[Mapping[str, Any]],
    roots: frozenset[str],
    models: Mapping[str, Mapping[str, Any]],
) -> Iterator[Finding]:
    """Yield what is wrong between devices, roots and models that are each right.

    Args:
        devices: for each device the fields that passed their rules, by name.
        roots: names of the roots.
        models: for each model id the fields that passed their rules, by name. None stands in
            ``keys`` for one that did not.
    """
    if not devices:
        yield ("devices",), 'is missing: declare at least one, for example device = "cpu"'
    if len(devices) > MAX_DEVICES:
        yield ("devices",), f"at most {MAX_DEVICES} devices, got {len(devices)}"
    declared: dict[Device, int] = {}
    for index, given in enumerate(devices):
        if "device" not in given:
            continue
        first = declared.setdefault(given["device"], index)
        if first != index:
            yield (
                ("devices", index, "device"),
                f"{given['device']} is declared already, by {key_text(('devices', first))}",
            )
    # With a device that cannot be read, nobody knows what is undeclared.
    readable = all("device" in given for given in devices) and bool(devices)
    disk = declared.get(Device.disk())
    if readable and set(declared) == {Device.disk()}:
        yield ("devices",), 'need one that can run models: add for example device = "cpu"'
    if disk is not None and not roots:
        yield ("devices", disk, "device"), "the disk is where the roots are: add [roots]"
    for model_id, given in models.items():
        root = given.get("root")
        if root is not None and root not in roots:
            # A name that is none has been reported; here it may be anything.
            known = (name if name.isprintable() else quoted(name) for name in sorted(roots))
            names = ", ".join(known) or "none"
            yield ("models", model_id, "root"), f"{quoted(root)} is not in [roots] (there: {names})"
        component = given.get("device")
        if readable and component is not None:
            for path, device in _placed(component):
                if device not in declared:
                    yield (
                        ("models", model_id, "device", *path),
                        f"{device} is not declared: use one of "
                        f"{', '.join(map(str, declared))} or add it to [[devices]]",
                    )
    yield from _key_conflicts(models)


def route_conflicts(
    routes: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]
) -> Iterator[Finding]:
    """Yield what is wrong between routes, and between them and models, that are each right.

    Args:
        routes: for each route the fields that passed their rules, by name.
        models: as ``plan_conflicts`` takes them.
    """
    ids: dict[str, int] = {}
    owners: dict[str, KeyPath] = {key: ("models", key) for key in models}
    for model_id, given in models.items():
        for key in given.get("keys", ()):
            owners.setdefault(key, ("models", model_id))
    prefixes: dict[str, KeyPath] = {}
    for index, given in enumerate(routes):
        here: KeyPath = ("routes", index)
        if "id" in given and (first := ids.setdefault(given["id"], index)) != index:
            yield (
                (*here, "id"),
                f"{quoted(given['id'])} is the id of {key_text(('routes', first))} already",
            )
        for name, taken in (("keys", owners), ("prefixes", prefixes)):
            for position, key in enumerate(given.get(name, ())):
                if key is not None and (other := taken.setdefault(key, here)) != here:
                    what = "key" if name == "keys" else "prefix"
                    yield (
                        (*here, name, position),
                        f"{quoted(key)} is a {what} of {key_text(other)} already",
                    )
    yield from _link_conflicts(routes, models, ids)


def _link_conflicts(
    routes: Sequence[Mapping[str, Any]],
    models: Mapping[str, Mapping[str, Any]],
    ids: Mapping[str, int],
) -> Iterator[Finding]:
    """Yield what is wrong between what routes lead to."""
    declared = _Declared(models, {name: _target_of(routes[index]) for name, index in ids.items()})
    for index, given in enumerate(routes):
        here: KeyPath = ("routes", index)
        target = _target_of(given)
        if target is None:
            continue
        for path, link in links_of(target):
            there: Collection[str] = models if link.kind == "models" else ids
            if link.id not in there:
                known = ", ".join(sorted(there)) or "none"
                yield (
                    # That of a model is its value itself.
                    (*here, *path_parts(path.removeprefix("model."))),
                    f"{quoted(link.id)} is not in [{link.kind}] (there: {known})",
                )
        if ids.get(given.get("id", "")) != index:
            continue  # Nobody knows which of two routes of one name another one means.
        findings = beside(given["id"], target, declared)
        if isinstance(target, SequenceTarget):
            findings += steps_that_do_not_meet(target, declared.signature_of)
        for path, text in findings:
            if path != "target":  # That is told of the other route, too.
                yield (*here, *path_parts(path)), text


class _Declared:
    """The models and routes of a file, for what is checked between them."""

    def __init__(
        self, models: Mapping[str, Mapping[str, Any]], targets: Mapping[str, Target | None]
    ) -> None:
        self._models = models
        self._targets = targets
        self._leading: dict[Link, list[str]] = {}
        for name, target in targets.items():
            for _, link in () if target is None else links_of(target):
                self._leading.setdefault(link, []).append(name)

    def has_model(self, model_id: str) -> bool:
        return model_id in self._models

    def target_of(self, route_id: str) -> Target | None:
        return self._targets.get(route_id)

    def leading_to(self, link: Link) -> Collection[str]:
        return self._leading.get(link, ())

    def signature_of(self, link: Link) -> Signature | None:
        given = self._models.get(only_model(link, self) or "", {})
        runtime, task = given.get("runtime", ""), given.get("task") or ""
        if task not in TASKS.get(runtime, ()):
            return None
        return known_signature(runtime, task, given.get("options", {}))


def _target_of(given: Mapping[str, Any]) -> Target | None:
    """What the fields of a route say that it leads to; None if that is not known."""
    kind = next((kind for kind in KINDS if given.get(kind) is not None), None)
    if kind is None:
        return None
    return One(given[kind]) if kind == "model" else cast("Target", given[kind])


def tier_conflicts(
    budget: Budget | None, devices: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    """Yield what is wrong between the host tier and devices that are each right.

    Args:
        budget: of the tier; None for none.
        devices: as ``plan_conflicts`` takes them.
    """
    if budget is None:
        return
    if len(devices) == MAX_DEVICES:
        yield (
            ("devices",),
            f"at most {MAX_DEVICES - 1} devices beside a host tier, got {len(devices)}",
        )
    readable = all({"device", "logical"} <= given.keys() for given in devices)
    if devices and readable and not any(map(_is_above_tier, devices)):
        yield (
            ("host_tier", "budget"),
            "there is no device whose models it could keep: it is for accelerators and logical "
            "devices, because what leaves the cpu stays in the page cache as it is; remove "
            "[host_tier], or raise the budget of the cpu",
        )


def _is_above_tier(given: Mapping[str, Any]) -> bool:
    """True for a device whose memory is dearer than host memory, or stands for such."""
    return given["logical"] or given["device"].type not in {DeviceType.CPU, DeviceType.DISK}


def rule_of(setting: Field[Any]) -> Rule:
    """Return the rule of a field of a section."""
    return cast("Rule", setting.metadata[_RULE])


def settings(section: type[Section]) -> tuple[Field[Any], ...]:
    """Return the fields of a section, in the order in which they are documented."""
    return tuple(section.__dataclass_fields__.values())


def _task_conflicts(runtime: str, task: str) -> Iterator[Finding]:
    tasks = TASKS[runtime]
    if task and not tasks:
        yield ("task",), f"must be left out: the {runtime} runtime does one thing"
    elif tasks and not task:
        yield ("task",), f"is missing: the {runtime} runtime does {', '.join(tasks)}"
    elif task and task not in tasks:
        yield (
            ("task",),
            f"the {runtime} runtime does not do {quoted(task)}: use one of {', '.join(tasks)}",
        )


def _key_conflicts(models: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    owners: dict[str, str] = {}
    for model_id, given in models.items():
        for index, key in enumerate(given.get("keys", ())):
            path: KeyPath = ("models", model_id, "keys", index)
            if key is None:
                continue
            if key != model_id and key in models:
                yield path, f"{quoted(key)} is the id of another model, which it always means"
            elif owners.setdefault(key, model_id) != model_id:
                yield path, f"{quoted(key)} means {key_text(('models', owners[key]))} already"


def _placed(component: Placement) -> Iterator[tuple[KeyPath, Device]]:
    """Yield the devices that a placement names, and where in it."""
    if isinstance(component, AutomaticPlacement):
        for index, device in enumerate(component.devices):
            yield ("devices", index), device
    elif component.single is not None:
        yield (), component.single
    elif component.multiple is not None:
        for part, device in component.multiple:
            yield (part,), device


def _ascending(given: Mapping[str, Any], low: str, high: str) -> Iterator[Finding]:
    if low in given and high in given and given[low] > given[high]:
        yield (
            (low,),
            f"must not be above {high}: {given[low]:g} is more than {given[high]:g}",
        )


def _check(section: Section) -> None:
    """Apply the rules to a value that is being made, and refuse it if it breaks one."""
    findings: list[Finding] = []
    for setting in fields(section):
        value = getattr(section, setting.name)
        # None is what a field without a value has, where that is its default.
        if value is None and setting.default is None:
            continue
        try:
            object.__setattr__(section, setting.name, rule_of(setting)(value))
        except RuleError as error:
            findings += [((setting.name, *path), text) for path, text in error.findings]
    if not findings:
        findings += section.conflicts(_fields_of(section))
    _raise_if_any(findings)


def _raise_if_any(findings: Iterator[Finding] | Sequence[Finding]) -> None:
    text = "; ".join(f"{key_text(path)}: {text}" for path, text in findings)
    if text:
        raise ValueError(text)


def _fields_of(section: Section) -> dict[str, Any]:
    return {setting.name: getattr(section, setting.name) for setting in fields(section)}


def _plain(value: object) -> object:
    match value:
        case Mapping():
            return {key: _plain(element) for key, element in value.items()}
        case tuple():
            return [_plain(element) for element in value]
        case _:
            return value
