"""Raw calls of the admin services, and clients beside them that must not notice.

serving_attacked   a server with two small devices, a disk, an encoder and an identity model
traffic            clients whose every answer is compared while something happens
audited            that the ledger is right
loud               what a log holds that no client may cause
outcome, first_of  how a call or a stream ended, as the contract's reason
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from modelyard.v1 import (
    admin_service_pb2_grpc,
    device_pb2,
    device_service_pb2,
    device_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    plan_pb2,
    residency_service_pb2,
    residency_service_pb2_grpc,
)
from tests.support import faulty_models, tiny_models
from tests.support.config_text import ALLOWED, DISK, ROOTS, device_table, model_table
from tests.support.server import RunningApp, eventually, running_app

ds, ms, rs = device_service_pb2, model_service_pb2, residency_service_pb2

BUDGET = 500_000
"""Of each of the two devices cuda:0 and cuda:1."""

CLIENTS = 3
"""That ask all the time."""

EVENTS = 256
"""That the server remembers."""

WATCHES = 64
"""That it allows."""

TEXTS = ["the cat sat on the mat", "a big red fish"]

GPU = device_pb2.DEVICE_TYPE_GPU
ON_DISK = device_pb2.DEVICE_TYPE_DISK


@asynccontextmanager
async def serving_attacked(base: Path) -> AsyncIterator[RunningApp]:
    """Runs a server with the models "text" (placed by itself) and "echo".

    Folder "stuck" of its root "store" is there for models of faulty_models.
    """
    tiny_models.make_tiny_bert(base / "store" / "text", seed=3)
    faulty_models.make_weights(base / "store" / "stuck")
    config = f"[yard]\nexplain_capacity = {EVENTS}\n" + ROOTS + ALLOWED + DISK
    config += "".join(device_table(f"cuda:{i}", BUDGET, logical=True) for i in range(2))
    config += model_table("text", "transformers", task="feature-extraction", keys=["acme/text"])
    config += model_table("echo", "identity")
    async with running_app(config, base) as yard:
        yield yard


class Traffic:
    """Answers that clients get meanwhile."""

    def __init__(self) -> None:
        self.count = 0
        self.wrong: list[str] = []


@asynccontextmanager
async def traffic(yard: RunningApp) -> AsyncIterator[Traffic]:
    """Clients that ask all the time; none of them may fail or get another answer."""
    wanted = np.asarray((await yard.client.predict("text", TEXTS)).only)
    seen, over = Traffic(), asyncio.Event()

    async def ask() -> None:
        while not over.is_set():
            try:
                answer = np.asarray((await yard.client.predict("acme/text", TEXTS)).only)
                if not np.allclose(answer, wanted, atol=1e-5):
                    seen.wrong.append("another answer")
            except Exception as error:
                seen.wrong.append(repr(error))
            seen.count += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(ask())
        try:
            yield seen
            count = seen.count
            await eventually("it goes on", lambda: seen.count >= count + CLIENTS)
        finally:
            over.set()
    assert not seen.wrong, seen.wrong[:3]


def audited(yard: RunningApp) -> None:
    """The ledger is right, and no device is over its budget."""
    yard.app.residency.audit()
    for i in range(len(yard.app.devices)):
        use = yard.app.residency.device_use(i)
        held = use.reserved + use.resident + use.draining + use.quarantined
        assert held <= use.budget + use.deficit


def loud(records: Iterable[logging.LogRecord]) -> list[str]:
    """What is in a log that no client may cause: errors, and tracebacks of whatever level."""
    return [r.getMessage() for r in records if r.levelno >= logging.ERROR or r.exc_info]


def devices(yard: RunningApp) -> Any:
    """The stub of DeviceService."""
    return device_service_pb2_grpc.DeviceServiceStub(yard.channel)


def models(yard: RunningApp) -> Any:
    """The stub of ModelService."""
    return model_service_pb2_grpc.ModelServiceStub(yard.channel)


def residencies(yard: RunningApp) -> Any:
    """The stub of ResidencyService."""
    return residency_service_pb2_grpc.ResidencyServiceStub(yard.channel)


def admin(yard: RunningApp) -> Any:
    """The stub of AdminService."""
    return admin_service_pb2_grpc.AdminServiceStub(yard.channel)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The reason in a refusal's ErrorInfo; fails if there is none."""
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status()
    status.ParseFromString(metadata["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "modelyard"
    assert "Traceback" not in (error.details() or "")
    return str(info.reason)


async def outcome(call: Any) -> str:
    """The reason a call was refused for, or "OK"."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return reason_of(error)
    return "OK"


async def first_of(stream: Any) -> Any:
    """The first message of a stream, or the reason it was refused for."""
    try:
        message = await stream.read()
    except grpc.aio.AioRpcError as error:
        return reason_of(error)
    stream.cancel()
    return message


async def state(yard: RunningApp) -> tuple[str, list[str]]:
    """What no refused call may change: the plan and the models."""
    plan = (await devices(yard).GetPlan(ds.GetPlanRequest())).plan
    found = (await models(yard).ListModels(ms.ListModelsRequest(page_size=1000))).models
    return plan.etag, [f"{model.name} {model.etag}" for model in found]


def gpu(index: int | None = None, kind: Any = GPU) -> device_pb2.Device:
    """A device as a message, valid or not."""
    return device_pb2.Device(type=kind, index=index)


def single(device: device_pb2.Device, model: str = "models/text") -> plan_pb2.DevicePlan:
    """A plan that puts a model on one device."""
    where = device_pb2.ComponentDevice(single=device)
    return plan_pb2.DevicePlan(models=[plan_pb2.ModelPlacement(model=model, placement=where)])


def create(yard: RunningApp, model_id: str, size_bytes: int = 0, **values: Any) -> Any:
    """A call that creates a model, an identity model unless it is given."""
    model = values.pop("model", None) or model_pb2.Model(runtime="identity")
    if size_bytes:
        model.options.update({"size_bytes": size_bytes})
    return models(yard).CreateModel(ms.CreateModelRequest(model_id=model_id, model=model, **values))


def delete(yard: RunningApp, model_id: str) -> Any:
    """A call that deletes a model."""
    return models(yard).DeleteModel(ms.DeleteModelRequest(name=f"models/{model_id}"))


def identity(**options: Any) -> model_pb2.Model:
    """An identity model with options, valid or not."""
    model = model_pb2.Model(runtime="identity")
    model.options.update(options)
    return model


async def all_seats_are_free(yard: RunningApp) -> bool:
    """True if as many watches can be opened as there may be."""
    streams = [
        residencies(yard).WatchResidencies(rs.WatchResidenciesRequest()) for _ in range(WATCHES)
    ]
    try:
        for stream in streams:
            await stream.read()
    except grpc.aio.AioRpcError as error:
        assert reason_of(error) == "QUEUE_FULL"
        return False
    finally:
        for stream in streams:
            stream.cancel()
    return True
