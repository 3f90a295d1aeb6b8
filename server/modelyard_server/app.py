"""The composition root: a configuration becomes a wired application. Nothing else wires."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from modelyard.v1 import (
    admin_service_pb2,
    device_service_pb2,
    model_service_pb2,
    residency_service_pb2,
)
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import ModelDraft
from modelyard_server.catalog.registry import Registry
from modelyard_server.config import Config
from modelyard_server.devices.inventory import ManagedDevice, take_inventory
from modelyard_server.errors import Refusal
from modelyard_server.execution.engine import Engine
from modelyard_server.execution.thread_engine import ThreadEngine
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import YardSettings
from modelyard_server.runtimes.registry import make_runtimes
from modelyard_server.services.admin import AdminService
from modelyard_server.services.devices import DeviceService
from modelyard_server.services.handler import unary
from modelyard_server.services.inference import InferenceService
from modelyard_server.services.models import ModelService
from modelyard_server.services.residencies import ResidencyService
from modelyard_server.services.status import defect_reply
from modelyard_server.transport.aio import AioTransport
from modelyard_server.transport.api import Handlers

__all__ = ["Application", "build"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """A wired server.

    Attributes:
        config: what it was built from.
        devices: what it manages.
        engine: where models live.
        residency: which of them are in memory.
        catalog: which there are.
        registry: how they get there.
        transport: how calls come in.
    """

    config: Config
    devices: tuple[ManagedDevice, ...]
    engine: Engine
    residency: Residency
    catalog: Catalog
    registry: Registry
    transport: AioTransport

    async def start(self) -> int:
        """Starts the engine, registers the configured models and begins to serve.

        Returns:
            The port.

        Raises:
            PortInUse: the address is taken.
            Refusal: a model of the configuration cannot be registered; its text names the model.
        """
        server = self.config.server
        await self.engine.start(sorted({model.runtime for model in self.config.models}))
        for model in self.config.models:
            draft = ModelDraft(
                id=model.id,
                keys=model.keys,
                root=model.root or "",
                folder=model.folder or "",
                runtime=model.runtime,
                task=model.task,
                options=model.plain_options(),
                placement=model.device,
            )
            try:
                registered = await self.registry.adopt(draft)
            except Refusal as refusal:
                refusal.text = f"models.{model.id}: {refusal.text}"
                raise
            if model.pinned:
                try:
                    self.residency.want(registered.handle)
                except Refusal as refusal:
                    logger.error("%s is to be pinned and cannot be: %s", model.id, refusal)
                self.residency.set_pinned(registered.handle, True)
        return await self.transport.start(server.listen)

    async def stop(self, grace_s: float) -> bool:
        """Takes no new calls, answers those that run, and gives everything back.

        Args:
            grace_s: how long running calls have, and after them what runs without a caller.

        Returns:
            False if something still runs: a model or a loader that hangs.
        """
        await self.transport.stop(grace_s)
        settled = await self.residency.close(grace_s)
        return await self.engine.stop(grace_s if settled else 0) and settled


def build(config: Config) -> Application:
    """Wires an application. Opens nothing and starts nothing.

    Raises:
        DeviceMissing: the configuration names a device that this machine has not.
    """
    devices = take_inventory(config.devices)
    names = tuple(device.name for device in devices)
    runtimes = make_runtimes(config.allowed_factories)
    engine = ThreadEngine(devices=[device.engine_device() for device in devices], runtimes=runtimes)
    residency = Residency(
        settings=YardSettings(
            budgets=tuple(device.budget_bytes for device in devices),
            policy=config.yard.policy,
            max_waiting_per_model=config.yard.max_waiting_per_model,
            max_waiting=config.yard.max_waiting,
            loads_per_device=config.yard.loads_per_device,
            overdue_after_s=config.yard.overdue_after_s,
            backoff_initial_s=config.yard.backoff_initial_s,
            backoff_max_s=config.yard.backoff_max_s,
            explain_capacity=config.yard.explain_capacity,
        ),
        device_names=names,
        engine=engine,
    )
    catalog = Catalog()
    registry = Registry(
        catalog=catalog,
        engine=engine,
        residency=residency,
        devices=devices,
        roots=config.roots,
    )
    inference = InferenceService(
        table=catalog.keys,
        residency=residency,
        engine=engine,
        device_names=names,
        default_deadline_s=config.server.default_deadline_s,
        max_deadline_s=config.server.max_deadline_s,
    )
    handlers = _handlers(
        inference,
        ModelService(catalog=catalog, registry=registry),
        DeviceService(devices=devices, residency=residency, engine=engine),
        ResidencyService(
            catalog=catalog,
            residency=residency,
            device_names=names,
            max_deadline_s=config.server.max_deadline_s,
        ),
        AdminService(residency=residency, figures=inference.figures, runtimes=tuple(runtimes)),
    )
    return Application(
        config=config,
        devices=devices,
        engine=engine,
        residency=residency,
        catalog=catalog,
        registry=registry,
        transport=AioTransport(
            handlers, max_message_bytes=config.server.max_message_bytes, defect=defect_reply
        ),
    )


def _handlers(
    inference: InferenceService,
    models: ModelService,
    devices: DeviceService,
    residencies: ResidencyService,
    admin: AdminService,
) -> Handlers:
    m, d, r, a = (
        model_service_pb2,
        device_service_pb2,
        residency_service_pb2,
        admin_service_pb2,
    )
    return {
        "modelyard.v1.InferenceService": {"Predict": inference.predict},
        "modelyard.v1.ModelService": {
            "CreateModel": unary(m.CreateModelRequest, models.create_model),
            "GetModel": unary(m.GetModelRequest, models.get_model),
            "ListModels": unary(m.ListModelsRequest, models.list_models),
            "DeleteModel": unary(m.DeleteModelRequest, models.delete_model),
        },
        "modelyard.v1.DeviceService": {
            "ListDevices": unary(d.ListDevicesRequest, devices.list_devices),
            "GetDevice": unary(d.GetDeviceRequest, devices.get_device),
            "UpdateBudget": unary(d.UpdateBudgetRequest, devices.update_budget),
        },
        "modelyard.v1.ResidencyService": {
            "LoadModel": unary(r.LoadModelRequest, residencies.load_model),
            "UnloadModel": unary(r.UnloadModelRequest, residencies.unload_model),
            "PinModel": unary(r.PinModelRequest, residencies.pin_model),
            "UnpinModel": unary(r.UnpinModelRequest, residencies.unpin_model),
            "ListResidencies": unary(r.ListResidenciesRequest, residencies.list_residencies),
        },
        "modelyard.v1.AdminService": {
            "GetServerInfo": unary(a.GetServerInfoRequest, admin.get_server_info),
            "GetStats": unary(a.GetStatsRequest, admin.get_stats),
        },
    }
