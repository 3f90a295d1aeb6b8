"""What `import modelyard` promises: its names, its lightness, its signatures."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import modelyard

# Frozen: what is added here has to be kept, what is removed breaks somebody.
PUBLIC = [
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

MODULES = [
    *("admin", "aio", "client", "devices", "errors", "events", "placements", "plans"),
    *("generation", "prediction", "resources", "sizes", "streams", "tensors", "watch"),
]

ASKED = "key, inputs, *, parameters, affinity, version, timeout_s"
CONNECTION = "target, *, timeout_s, max_message_bytes, channel_credentials, identity"


def loaded_after(statement: str, *names: str) -> list[str]:
    """Which of these modules a fresh interpreter has loaded after a statement."""
    source = f"import sys; {statement}; print(*(n for n in {names!r} if n in sys.modules))"
    roots = [str(Path(modelyard.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots))},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.split()


def spelled(function: Any) -> str:
    """A signature without annotations and defaults."""
    signature = inspect.signature(function)
    names = [
        parameter.replace(annotation=parameter.empty, default=parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    bare = signature.replace(parameters=names, return_annotation=inspect.Signature.empty)
    return str(bare)[1:-1]


class TestNames:
    def test_the_exports_are_frozen(self) -> None:
        assert modelyard.__all__ == PUBLIC

    @pytest.mark.parametrize("name", PUBLIC)
    def test_every_name_is_there_and_listed(self, name: str) -> None:
        assert getattr(modelyard, name) is getattr(modelyard, name)
        assert name in dir(modelyard)

    def test_other_names_are_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="module 'modelyard' has no attribute 'Clinet'"):
            _ = modelyard.Clinet  # type: ignore[attr-defined]  # the point of the test

    @pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
    def test_every_name_is_documented(self, name: str) -> None:
        assert (inspect.getdoc(getattr(modelyard, name)) or "").strip()

    @pytest.mark.parametrize("module", MODULES)
    def test_public_modules_say_what_is_public(self, module: str) -> None:
        loaded = import_module(f"modelyard.{module}")
        assert loaded.__doc__
        assert all(hasattr(loaded, name) for name in loaded.__all__)

    def test_every_error_can_be_reached(self) -> None:
        errors = import_module("modelyard.errors")
        classes = {name for name in errors.__all__ if inspect.isclass(getattr(errors, name))}
        assert classes <= set(modelyard.__all__)

    def test_the_version_is_that_of_the_package(self) -> None:
        assert modelyard.__version__[0].isdigit()


class TestLightness:
    def test_importing_it_imports_nothing_heavy(self) -> None:
        names = ("torch", "transformers", "modelyard_server", "numpy", "grpc", "modelyard.client")
        assert loaded_after("import modelyard", *names) == []

    def test_a_device_needs_neither_grpc_nor_numpy(self) -> None:
        assert loaded_after("from modelyard import Device; Device.gpu(1)", "grpc", "numpy") == []

    def test_a_plan_needs_neither_grpc_nor_numpy(self) -> None:
        names = ("grpc", "numpy")
        statement = "from modelyard import DevicePlan; DevicePlan.from_dict({'models': {}})"
        assert loaded_after(statement, *names) == []

    def test_everything_together_needs_neither_torch_nor_the_server(self) -> None:
        heavy = ("torch", "transformers", "modelyard_server", "pydantic", "typer", "rich")
        assert loaded_after("from modelyard import *; Client; Admin", *heavy, "grpc") == ["grpc"]


class TestSignatures:
    @pytest.mark.parametrize(
        ("function", "expected"),
        [
            (modelyard.Client, CONNECTION),
            (modelyard.AsyncClient, CONNECTION),
            (modelyard.Admin, CONNECTION),
            (modelyard.Client.predict, ASKED),
            (modelyard.AsyncClient.predict, ASKED),
            (modelyard.Client.predict_batch, "items, *, timeout_s"),
            (modelyard.AsyncClient.predict_batch, "items, *, timeout_s"),
            (modelyard.Client.stream, "*, max_in_flight, linger_s"),
            (modelyard.AsyncClient.stream, "*, max_in_flight, linger_s"),
            (modelyard.PredictStream.predict, ASKED),
            (modelyard.PredictStream.map, "items, *, timeout_s"),
            (modelyard.AsyncPredictStream.predict, ASKED),
            (modelyard.AsyncPredictStream.submit, ASKED),
            (modelyard.AsyncPredictStream.map, "items, *, timeout_s"),
            *(
                (
                    cls.generate,
                    "key, prompt, *, max_new_tokens, stop, temperature, top_k, top_p, seed, "
                    "affinity, version, timeout_s",
                )
                for cls in (modelyard.Client, modelyard.AsyncClient)
            ),
            (modelyard.Client.resolve, "key, *, affinity, version, timeout_s"),
            (modelyard.AsyncClient.resolve, "key, *, affinity, version, timeout_s"),
            (
                modelyard.Admin.create_route,
                "route, keys, *, model, target, prefixes, validate_only, request_id, timeout_s",
            ),
            (modelyard.Admin.get_route, "route, *, timeout_s"),
            (modelyard.Admin.list_routes, "*, timeout_s"),
            (
                modelyard.Admin.update_route,
                "route, *, model, target, current, canary, keys, add_keys, remove_keys, prefixes, "
                "etag, validate_only, request_id, timeout_s",
            ),
            (modelyard.Admin.promote_canary, "route, *, etag, request_id, timeout_s"),
            (modelyard.Admin.abort_canary, "route, *, etag, request_id, timeout_s"),
            (modelyard.Admin.delete_route, "route, *, etag, request_id, timeout_s"),
            (modelyard.Admin.resolve, "key, *, affinity, version, timeout_s"),
            (
                modelyard.Admin.create_model,
                "model, *, runtime, root, folder, task, keys, options, placement, validate_only, "
                "request_id, timeout_s",
            ),
            (modelyard.Admin.get_model, "model, *, timeout_s"),
            (modelyard.Admin.list_models, "*, timeout_s"),
            (
                modelyard.Admin.update_model,
                "model, *, runtime, root, folder, task, keys, options, placement, etag, "
                "validate_only, request_id, timeout_s",
            ),
            (modelyard.Admin.delete_model, "model, *, etag, request_id, timeout_s"),
            (modelyard.Admin.get_device, "device, *, timeout_s"),
            (modelyard.Admin.list_devices, "*, timeout_s"),
            (
                modelyard.Admin.update_budget,
                "device, budget_bytes, *, etag, request_id, timeout_s",
            ),
            (modelyard.Admin.drain_device, "device, *, etag, request_id, timeout_s"),
            (modelyard.Admin.undrain_device, "device, *, etag, request_id, timeout_s"),
            (modelyard.Admin.rebalance_devices, "*, validate_only, timeout_s"),
            (modelyard.Admin.get_plan, "*, timeout_s"),
            (modelyard.Admin.plan_devices, "plan, *, timeout_s"),
            (
                modelyard.Admin.apply_plan,
                "plan, *, etag, validate_only, request_id, timeout_s",
            ),
            (modelyard.Admin.watch_residencies, "resume, *, timeout_s"),
            (modelyard.Admin.watch_events, "resume, *, include_past, timeout_s"),
            (modelyard.Admin.watch_requests, "*, timeout_s"),
            (modelyard.Admin.explain, "model, *, timeout_s"),
            (modelyard.Admin.load, "model, *, timeout_s"),
            (modelyard.Admin.unload, "model, *, timeout_s"),
            (modelyard.Admin.pin, "model, *, timeout_s"),
            (modelyard.Admin.unpin, "model, *, timeout_s"),
            (modelyard.Admin.list_residencies, "*, timeout_s"),
            (modelyard.Admin.info, "*, timeout_s"),
            (modelyard.Admin.stats, "*, timeout_s"),
            (modelyard.Admin.collect_store, "*, keep_s, validate_only, timeout_s"),
            (modelyard.to_tensor, "value, name"),
            (modelyard.from_tensor, "tensor"),
        ],
    )
    def test_calls_are_spelled_as_they_were(self, function: Any, expected: str) -> None:
        assert spelled(function) == expected

    def test_the_signature_table_has_every_method(self) -> None:
        methods = {
            name
            for name, _ in inspect.getmembers(modelyard.Admin, inspect.isfunction)
            if not name.startswith("_")
        }
        assert methods == {
            *("create_model", "get_model", "list_models", "update_model", "delete_model"),
            *("create_route", "get_route", "list_routes", "update_route", "delete_route"),
            *("promote_canary", "abort_canary", "resolve"),
            *("get_device", "list_devices", "update_budget", "drain_device", "undrain_device"),
            *("get_plan", "plan_devices", "apply_plan", "rebalance_devices"),
            *("load", "unload", "pin", "unpin", "list_residencies"),
            *("watch_residencies", "watch_events", "watch_requests", "explain"),
            *("info", "stats", "collect_store", "close"),
        }

    def test_both_clients_have_the_same_defaults(self) -> None:
        blocking, asynchronous, admin = (
            {name: p.default for name, p in inspect.signature(cls).parameters.items()}
            for cls in (modelyard.Client, modelyard.AsyncClient, modelyard.Admin)
        )
        assert blocking == asynchronous == admin
        assert blocking["target"] == "127.0.0.1:8470"
        assert blocking["timeout_s"] == 30.0
        assert blocking["max_message_bytes"] == 64 * 1024 * 1024

    @pytest.mark.parametrize(
        "name",
        [
            *("Device", "DeviceCharge", "LoadFailure", "Residency", "ServerInfo", "Served"),
            *("DevicePlan", "PlanReport", "Event", "ResidencyChange", "WatchPosition"),
        ],
    )
    def test_values_cannot_be_changed(self, name: str) -> None:
        cls = getattr(modelyard, name)
        assert cls.__dataclass_params__.frozen
        assert not hasattr(cls, "__dict__") or "__slots__" in vars(cls)

    def test_annotations_of_predict_resolve(self) -> None:
        assert "return" in get_type_hints(modelyard.Client.predict)


class TestWrongTypes:
    """What a caller without a type checker may do."""

    @pytest.mark.parametrize(
        "call",
        [
            lambda: modelyard.Client(8470),  # type: ignore[arg-type]  # refused
            lambda: modelyard.Client("127.0.0.1:1", timeout_s="30"),  # type: ignore[arg-type]  # refused
            lambda: modelyard.Client("127.0.0.1:1", 30),  # type: ignore[call-arg]  # refused
            lambda: modelyard.Client("127.0.0.1:1", timeout=30),  # type: ignore[call-arg]  # refused
            lambda: modelyard.AsyncClient(None),  # type: ignore[arg-type]  # refused
            lambda: modelyard.Admin("127.0.0.1:1", identity=7),  # type: ignore[arg-type]  # refused
            lambda: modelyard.to_tensor(1),  # type: ignore[arg-type]  # refused
            lambda: modelyard.to_tensor([1.0]),  # type: ignore[arg-type]  # refused
            lambda: modelyard.to_tensor("x", b"name"),  # type: ignore[arg-type]  # refused
            lambda: modelyard.Bfloat16(bits=[1]),  # type: ignore[arg-type]  # refused
            lambda: modelyard.Bfloat16(None),  # type: ignore[call-arg, arg-type]  # refused
            lambda: modelyard.ModelyardError("text"),  # type: ignore[call-arg]  # refused
            lambda: modelyard.Violation("field", "text"),  # type: ignore[call-arg]  # refused
        ],
    )
    def test_they_are_type_errors(self, call: Any) -> None:
        with pytest.raises(TypeError):
            call()

    def test_predictions_cannot_be_written_to(self) -> None:
        served = modelyard.Served(
            model="models/m", device="devices/cpu", cold=False, wait_s=0, load_s=None, run_s=0
        )
        prediction: Any = modelyard.Prediction({"x": ["a"]}, served)
        with pytest.raises(TypeError):
            prediction["x"] = ["b"]
        with pytest.raises(AttributeError):
            prediction.only = ["b"]
        with pytest.raises(AttributeError):
            served.cold = True  # type: ignore[misc]  # refused
        assert prediction == prediction and hash(prediction) is not None
        assert repr(prediction) == "<Prediction of 'models/m': 'x'>"
        assert "x" in prediction and len(prediction) == 1
