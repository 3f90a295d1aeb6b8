"""Client of modelyard, which serves many keyed models from few devices.

::

    from modelyard import Client

    with Client("127.0.0.1:8470") as client:
        prediction = client.predict("sentiment", "I like it")
        print(prediction.only, prediction.served.cold)

``Client`` and ``AsyncClient`` ask for predictions, ``Admin`` is for operators, every failed call
raises a ``ModelyardError``. What is listed in ``__all__`` is public; so are the modules without a
leading underscore.

Names are imported when they are first used: numpy and gRPC take a noticeable time, and a program
that only needs the device values should not pay for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from modelyard.admin import UNSET, Admin, Unset
    from modelyard.aio import AsyncClient
    from modelyard.client import Client
    from modelyard.devices import (
        ComponentDevice,
        Device,
        DeviceMap,
        DeviceType,
        resolve_device,
    )
    from modelyard.errors import (
        AlreadyExists,
        AnswerTooLarge,
        BudgetExhausted,
        CatalogUnavailable,
        ConfigOwned,
        DeadlineExceeded,
        DeadlineUnreachable,
        DeviceNotFound,
        EtagMismatch,
        InvalidRequest,
        KeyNotFound,
        LoadFailed,
        ModelFailed,
        ModelInUse,
        ModelNeverFits,
        ModelNotFound,
        ModelyardError,
        NotFound,
        PlacementInvalid,
        PreconditionFailed,
        QueueFull,
        ResourceExhausted,
        RouteNotFound,
        ServerDraining,
        ServerError,
        ServerUnavailable,
        StreamBroken,
        Violation,
        WorkerLost,
    )
    from modelyard.events import (
        Event,
        EventType,
        Eviction,
        Explanation,
        ResidencyChange,
        WatchPosition,
    )
    from modelyard.generation import AsyncGeneration, FinishReason, Generation, GenerationPiece
    from modelyard.placements import AutomaticPlacement, PlacementStrategy, read_placement
    from modelyard.plans import (
        DeviceForecast,
        DevicePlan,
        DeviceSetting,
        Displacement,
        DrainedDevice,
        ModelForecast,
        ModelPlacement,
        Move,
        Obstacle,
        PlanApplied,
        PlanReport,
        Rebalanced,
    )
    from modelyard.prediction import BatchItem, Prediction, Served
    from modelyard.recordings import RecordedModel, RecordedRequest, RequestRecords
    from modelyard.resources import (
        BatchFigures,
        CopyState,
        Departures,
        DeviceCharge,
        HostTier,
        LoadFailure,
        ManagedDevice,
        Model,
        ModelOwner,
        PlacedModel,
        PlacedPart,
        Regret,
        Residency,
        ResidencyState,
        ServerInfo,
        ServerStats,
        ShadowFigures,
        StoreCollected,
        StoreFigures,
    )
    from modelyard.route_targets import (
        Branch,
        Canary,
        Combine,
        EnsembleTarget,
        FallbackTarget,
        Member,
        ModelTarget,
        RouteTarget,
        SequenceStep,
        SequenceTarget,
        ShadowTarget,
        SplitTarget,
        Transform,
        Version,
        VersionsTarget,
    )
    from modelyard.routes import KeyChange, Resolution, ResolvedStep, Route, RouteUpdated
    from modelyard.streams import AsyncPredictStream, PredictStream
    from modelyard.tensors import Bfloat16, TensorError, from_tensor, to_tensor
    from modelyard.watch import EventWatch, RequestWatch, ResidencyWatch

    __version__: str

__all__ = [
    "UNSET",
    "Admin",
    "AlreadyExists",
    "AnswerTooLarge",
    "AsyncClient",
    "AsyncGeneration",
    "AsyncPredictStream",
    "AutomaticPlacement",
    "BatchFigures",
    "BatchItem",
    "Bfloat16",
    "Branch",
    "BudgetExhausted",
    "Canary",
    "CatalogUnavailable",
    "Client",
    "Combine",
    "ComponentDevice",
    "ConfigOwned",
    "CopyState",
    "DeadlineExceeded",
    "DeadlineUnreachable",
    "Departures",
    "Device",
    "DeviceCharge",
    "DeviceForecast",
    "DeviceMap",
    "DeviceNotFound",
    "DevicePlan",
    "DeviceSetting",
    "DeviceType",
    "Displacement",
    "DrainedDevice",
    "EnsembleTarget",
    "EtagMismatch",
    "Event",
    "EventType",
    "EventWatch",
    "Eviction",
    "Explanation",
    "FallbackTarget",
    "FinishReason",
    "Generation",
    "GenerationPiece",
    "HostTier",
    "InvalidRequest",
    "KeyChange",
    "KeyNotFound",
    "LoadFailed",
    "LoadFailure",
    "ManagedDevice",
    "Member",
    "Model",
    "ModelFailed",
    "ModelForecast",
    "ModelInUse",
    "ModelNeverFits",
    "ModelNotFound",
    "ModelOwner",
    "ModelPlacement",
    "ModelTarget",
    "ModelyardError",
    "Move",
    "NotFound",
    "Obstacle",
    "PlacedModel",
    "PlacedPart",
    "PlacementInvalid",
    "PlacementStrategy",
    "PlanApplied",
    "PlanReport",
    "PreconditionFailed",
    "PredictStream",
    "Prediction",
    "QueueFull",
    "Rebalanced",
    "RecordedModel",
    "RecordedRequest",
    "Regret",
    "RequestRecords",
    "RequestWatch",
    "Residency",
    "ResidencyChange",
    "ResidencyState",
    "ResidencyWatch",
    "Resolution",
    "ResolvedStep",
    "ResourceExhausted",
    "Route",
    "RouteNotFound",
    "RouteTarget",
    "RouteUpdated",
    "SequenceStep",
    "SequenceTarget",
    "Served",
    "ServerDraining",
    "ServerError",
    "ServerInfo",
    "ServerStats",
    "ServerUnavailable",
    "ShadowFigures",
    "ShadowTarget",
    "SplitTarget",
    "StoreCollected",
    "StoreFigures",
    "StreamBroken",
    "TensorError",
    "Transform",
    "Unset",
    "Version",
    "VersionsTarget",
    "Violation",
    "WatchPosition",
    "WorkerLost",
    "__version__",
    "from_tensor",
    "read_placement",
    "resolve_device",
    "to_tensor",
]

# The same, for the interpreter.
_EXPORTS: Final = (
    ("admin", "UNSET Admin Unset"),
    ("aio", "AsyncClient"),
    ("client", "Client"),
    ("devices", "ComponentDevice Device DeviceMap DeviceType resolve_device"),
    (
        "errors",
        "AlreadyExists AnswerTooLarge BudgetExhausted CatalogUnavailable ConfigOwned "
        "DeadlineExceeded "
        "DeadlineUnreachable DeviceNotFound EtagMismatch InvalidRequest KeyNotFound LoadFailed "
        "ModelFailed ModelInUse ModelNeverFits ModelNotFound ModelyardError NotFound "
        "PlacementInvalid PreconditionFailed QueueFull ResourceExhausted "
        "RouteNotFound ServerDraining ServerError ServerUnavailable StreamBroken Violation "
        "WorkerLost",
    ),
    ("events", "Event EventType Eviction Explanation ResidencyChange WatchPosition"),
    ("generation", "AsyncGeneration FinishReason Generation GenerationPiece"),
    ("placements", "AutomaticPlacement PlacementStrategy read_placement"),
    (
        "plans",
        "DeviceForecast DevicePlan DeviceSetting Displacement DrainedDevice ModelForecast "
        "ModelPlacement Move Obstacle PlanApplied PlanReport Rebalanced",
    ),
    ("prediction", "BatchItem Prediction Served"),
    ("recordings", "RecordedModel RecordedRequest RequestRecords"),
    (
        "resources",
        "BatchFigures CopyState Departures DeviceCharge HostTier LoadFailure ManagedDevice Model "
        "ModelOwner PlacedModel PlacedPart Regret Residency ResidencyState ServerInfo ServerStats "
        "ShadowFigures StoreCollected StoreFigures",
    ),
    (
        "route_targets",
        "Branch Canary Combine EnsembleTarget FallbackTarget Member ModelTarget RouteTarget "
        "SequenceStep SequenceTarget ShadowTarget SplitTarget Transform Version VersionsTarget",
    ),
    ("routes", "KeyChange Resolution ResolvedStep Route RouteUpdated"),
    ("streams", "AsyncPredictStream PredictStream"),
    ("tensors", "Bfloat16 TensorError from_tensor to_tensor"),
    ("watch", "EventWatch RequestWatch ResidencyWatch"),
)

# Hidden from type checkers: they see the imports above, and would take any name for an attribute
# of this module if they saw this.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used (PEP 562)."""
        from importlib import import_module

        if name == "__version__":
            from importlib.metadata import PackageNotFoundError, version

            try:
                value = version("modelyard")
            except PackageNotFoundError:
                # Run from a source tree that is not installed.
                value = "0+unknown"
        else:
            modules = [module for module, names in _EXPORTS if name in names.split()]
            if not modules:
                raise AttributeError(f"module 'modelyard' has no attribute {name!r}")
            value = getattr(import_module(f"modelyard.{modules[0]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
