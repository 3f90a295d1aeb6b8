"""The composition root: a configuration becomes a wired application. Nothing else wires."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelyard.devices import DeviceType
from modelyard.v1 import (
    admin_service_pb2,
    device_service_pb2,
    model_service_pb2,
    residency_service_pb2,
    route_service_pb2,
)
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import ModelDraft
from modelyard_server.catalog.plans import DevicePlans
from modelyard_server.catalog.registry import Registry
from modelyard_server.catalog.restoring import ConfiguredModel, Restorer
from modelyard_server.catalog.route import RouteDraft
from modelyard_server.catalog.route_registry import RouteRegistry
from modelyard_server.catalog.store import CatalogStore
from modelyard_server.catalog.writes import Writes
from modelyard_server.config import Config, ModelConfig
from modelyard_server.devices.host_tier import HostTier, take_host_tier
from modelyard_server.devices.inventory import ManagedDevice, take_inventory
from modelyard_server.devices.probes import Probe
from modelyard_server.execution.batcher import BatchLimits
from modelyard_server.execution.engine import Engine
from modelyard_server.execution.thread_engine import ThreadEngine
from modelyard_server.execution.workers.process_engine import ProcessEngine
from modelyard_server.execution.workers.settings import RuntimeSource, WorkerSettings
from modelyard_server.residency.journal import Journal
from modelyard_server.residency.recovery import Recovery
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import YardSettings
from modelyard_server.runtimes.registry import make_runtimes
from modelyard_server.runtimes.serving import make_serving_runtimes
from modelyard_server.services.admin import AdminService
from modelyard_server.services.batches import BatchService
from modelyard_server.services.devices import DeviceService
from modelyard_server.services.generation import GenerationService
from modelyard_server.services.handler import draining, server_stream, unary
from modelyard_server.services.inference import InferenceService
from modelyard_server.services.models import ModelService
from modelyard_server.services.oip import infer as oip_infer
from modelyard_server.services.oip import models as oip_models
from modelyard_server.services.oip.meanings import Meanings
from modelyard_server.services.oip.repository import RepositoryService
from modelyard_server.services.oip.service import oip_handlers
from modelyard_server.services.oip.statistics import StatisticsService
from modelyard_server.services.prediction_streams import PredictionStreamService
from modelyard_server.services.recording import RecordingService
from modelyard_server.services.residencies import ResidencyService
from modelyard_server.services.routes import RouteService
from modelyard_server.services.status import defect_reply, reply_of
from modelyard_server.services.watch import WatchService
from modelyard_server.transport.aio import AioTransport, most_sent_bytes
from modelyard_server.transport.api import Duplex, Handlers, Streaming
from modelyard_server.transport.none import NoTransport
from modelyard_server.weights.store import WeightStore
from modelyard_server.weights.store_keeper import StoreKeeper

if TYPE_CHECKING:
    from modelyard_server.transport.http import HttpTransport

__all__ = ["Application", "ExtraMissing", "build"]


class ExtraMissing(Exception):
    """The configuration asks for something that needs packages which are not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """A wired server.

    Attributes:
        config: what it was built from.
        devices: what it manages.
        host_tier: where copies of evicted models are kept; None if there is none.
        engine: where models live.
        residency: which of them are in memory.
        inference: answers requests.
        catalog: which there are.
        registry: how they get there.
        plans: budgets, drains and placements together.
        restorer: brings back what was stored.
        store: keeps the catalog and the plan.
        journal: what happened.
        transport: how calls come in.
        handlers: what answers them.
        http: how they come in without gRPC; None if they do not.
        keeper: gives back what the store of weights holds for nobody; None if there is no store.
    """

    config: Config
    devices: tuple[ManagedDevice, ...]
    host_tier: HostTier | None
    engine: Engine
    residency: Residency
    inference: InferenceService
    catalog: Catalog
    registry: Registry
    plans: DevicePlans
    restorer: Restorer
    store: CatalogStore
    journal: Journal
    transport: AioTransport | NoTransport
    handlers: Handlers
    http: HttpTransport | None = None
    keeper: StoreKeeper | None = None

    async def start(self) -> int:
        """Begins, and serves on the configured address.

        Returns:
            The port.

        Raises:
            PortInUse: the address is taken.
            Refusal, StoreError: as `begin`.
        """
        await self.begin()
        if self.http is not None:
            await self.http.start(self.config.http.listen)
        return await self.transport.start(self.config.server.listen)

    async def begin(self) -> None:
        """Starts the engine, and registers the configured and the stored models. Opens no port.

        Raises:
            Refusal: a model of the configuration cannot be registered; its text names the model.
            StoreError: what was stored cannot be read.
            weights.store.StoreError: the store of weights cannot be used.
        """
        if self.keeper is not None:
            await self.keeper.open()
        stored = self.store.read()
        runtimes = {model.runtime for model in self.config.models}
        runtimes |= {model.runtime for model in stored.models}
        await self.engine.start(sorted(runtimes))
        await self.restorer.restore(
            [_configured(model) for model in self.config.models],
            stored,
            [
                RouteDraft(
                    id=route.id, keys=route.keys, prefixes=route.prefixes, target=route.target
                )
                for route in self.config.routes
            ],
        )
        if self.keeper is not None:
            self.keeper.start()

    async def stop_being_healthy(self) -> None:
        """Tells everybody who asks that requests should go elsewhere."""
        if self.http is not None:
            self.http.stop_being_healthy()
        await self.transport.stop_being_healthy()

    async def stop(self, grace_s: float) -> bool:
        """Takes no new calls, answers those that run, and gives everything back.

        Args:
            grace_s: how long running calls have, and after them what runs without a caller.

        Returns:
            False if something still runs: a model or a loader that hangs.
        """
        self.journal.close()
        async with asyncio.TaskGroup() as tasks:
            if self.http is not None:
                tasks.create_task(self.http.stop(grace_s), name="stop HTTP")
            await self.transport.stop(grace_s)
        await self.inference.stop()
        if self.keeper is not None:
            await self.keeper.stop()
        settled = await self.residency.close(grace_s)
        await self.store.close()
        return await self.engine.stop(grace_s if settled else 0) and settled


def build(
    config: Config,
    *,
    probes: Mapping[DeviceType, Probe] | None = None,
    connected: bool = True,
) -> Application:
    """Wires an application. Opens the catalog's file, and starts nothing.

    Args:
        config: what is to be wired.
        probes: other probes of devices, by kind; those of this machine if None.
        connected: False for one that only its own process calls.

    Raises:
        DeviceMissing: the configuration names a device that this machine has not.
        BudgetImpossible: its budgets promise more than there is.
        StoreError: the catalog's file cannot be used.
        weights.store.StoreError: the store of weights cannot be used.
        ExtraMissing: it asks for HTTP, and what that needs is not installed.
    """
    if config.http.listen:
        # Before anything is made that would have to be given back.
        _check_http()
    devices = take_inventory(config.devices, roots=config.roots.values(), using=probes)
    tier = take_host_tier(config.host_tier, devices, using=probes)
    names = tuple(device.name for device in devices)
    engine = _make_engine(config, devices)
    if tier is not None:
        engine.set_copies_budget(tier.budget_bytes)
    store = CatalogStore.open(config.catalog.path)
    writes = Writes(store)
    journal = Journal(capacity=config.yard.explain_capacity)
    residency = Residency(
        settings=YardSettings(
            budgets=tuple(device.budget_bytes for device in devices),
            policy=config.yard.policy,
            order=config.yard.order,
            max_waiting_per_model=config.yard.max_waiting_per_model,
            max_waiting=config.yard.max_waiting,
            loads_per_device=config.yard.loads_per_device,
            overdue_after_s=config.yard.overdue_after_s,
            backoff_initial_s=config.yard.backoff_initial_s,
            backoff_max_s=config.yard.backoff_max_s,
            explain_capacity=config.yard.explain_capacity,
            tier_budget=0 if tier is None else tier.budget_bytes,
            above_tier=() if tier is None else tier.above,
        ),
        device_names=names,
        engine=engine,
        journal=journal,
    )
    recovery = Recovery(residency, strikes=config.engine.strikes)
    if isinstance(engine, ProcessEngine):
        engine.on_lost = recovery.on_death
    catalog = Catalog()
    registry = Registry(
        catalog=catalog,
        engine=engine,
        residency=residency,
        devices=devices,
        roots=config.roots,
        writes=writes,
        journal=journal,
    )
    engine.on_measured = registry.note_runs
    keeper = None
    if config.weights.store is not None:
        keeper = StoreKeeper(
            config.weights.store,
            keep_s=config.weights.keep_unused_s,
            folders=registry.folders,
        )
        catalog.on_models = keeper.note_change
    routes = RouteRegistry(catalog=catalog, residency=residency, writes=writes, journal=journal)
    plans = DevicePlans(
        devices=devices,
        catalog=catalog,
        registry=registry,
        residency=residency,
        writes=writes,
        journal=journal,
        tier=tier,
    )
    restorer = Restorer(
        devices=devices,
        registry=registry,
        routes=routes,
        plans=plans,
        residency=residency,
        writes=writes,
        tier=tier,
    )
    max_deadline_s = config.server.max_deadline_s
    inference = InferenceService(
        table=catalog.keys,
        routes=catalog,
        residency=residency,
        engine=engine,
        device_names=names,
        default_deadline_s=config.server.default_deadline_s,
        max_deadline_s=max_deadline_s,
    )
    handlers = _handlers(
        inference,
        BatchService(inference, most_answer_bytes=most_sent_bytes(config.server.max_message_bytes)),
        PredictionStreamService(
            inference,
            most_answer_bytes=most_sent_bytes(config.server.max_message_bytes),
            most_bytes_in_flight=most_sent_bytes(config.server.max_message_bytes),
        ),
        GenerationService(
            inference,
            engine=engine,
            device_names=names,
        ),
        ModelService(
            catalog=catalog,
            registry=registry,
            residency=residency,
            writes=writes,
            device_names=names,
            max_deadline_s=max_deadline_s,
        ),
        RouteService(
            catalog=catalog,
            registry=routes,
            residency=residency,
            writes=writes,
            device_names=names,
            max_deadline_s=max_deadline_s,
        ),
        DeviceService(
            devices=devices,
            residency=residency,
            engine=engine,
            plans=plans,
            writes=writes,
            max_deadline_s=max_deadline_s,
        ),
        ResidencyService(
            catalog=catalog,
            registry=registry,
            residency=residency,
            writes=writes,
            device_names=names,
            max_deadline_s=max_deadline_s,
            forgive=recovery.forgive,
        ),
        AdminService(
            store=keeper,
            residency=residency,
            engine=engine,
            figures=inference.figures,
            shadows=inference.shadow_figures,
            runtimes=tuple(make_runtimes(config.allowed_factories)),
        ),
        WatchService(journal=journal, residency=residency, catalog=catalog, device_names=names),
        RecordingService(log=inference.log, catalog=catalog, residency=residency),
        acting=journal.acting,
    )
    most_answer_bytes = most_sent_bytes(config.server.max_message_bytes)
    meanings = Meanings(
        meaning_of=inference.meaning_of,
        routes=catalog,
        residency=residency,
        runtimes=make_runtimes(config.allowed_factories),
    )
    foreign = oip_handlers(
        infer=oip_infer.InferService(
            inference=inference,
            meanings=meanings,
            most_answer_bytes=most_answer_bytes,
            most_bytes_in_flight=most_answer_bytes,
        ),
        models=oip_models.ModelService(meanings),
        statistics=StatisticsService(
            meanings=meanings,
            catalog=catalog,
            tallies=inference.tallies,
            devices=[device.device for device in devices],
        ),
        repository=RepositoryService(
            meanings=meanings,
            names=catalog.names,
            residency=residency,
            max_deadline_s=max_deadline_s,
            forgive=recovery.forgive,
        ),
        is_ready=lambda: transport.is_healthy,
        acting=journal.acting,
    )
    transport: AioTransport | NoTransport = NoTransport()
    if connected:
        transport = AioTransport(
            {**handlers, **foreign},
            max_message_bytes=config.server.max_message_bytes,
            defect=defect_reply,
            draining=reply_of(draining()),
        )
    return Application(
        config=config,
        devices=devices,
        host_tier=tier,
        engine=engine,
        residency=residency,
        inference=inference,
        catalog=catalog,
        registry=registry,
        plans=plans,
        restorer=restorer,
        store=store,
        journal=journal,
        transport=transport,
        handlers=handlers,
        http=_make_http(config, handlers) if config.http.listen else None,
        keeper=keeper,
    )


def _check_http() -> None:
    """Raises ExtraMissing if what HTTP needs is not installed."""
    try:
        import modelyard_server.services.http_methods
        import modelyard_server.transport.http  # noqa: F401  # for their imports
    except ModuleNotFoundError as error:
        raise ExtraMissing(
            f"[http] needs packages that are not installed ({error.name} is missing): "
            "pip install 'modelyard[http]', or leave [http] listen out"
        ) from error


def _make_http(config: Config, handlers: Handlers) -> HttpTransport:
    from modelyard_server.services import http_methods
    from modelyard_server.transport.connect import ConnectFront
    from modelyard_server.transport.http import HttpTransport

    return HttpTransport(
        ConnectFront(
            http_methods.http_methods(handlers),
            max_message_bytes=config.server.max_message_bytes,
            origins=config.http.origins,
            details=http_methods.details_of,
            unreadable=http_methods.unreadable,
            defect=defect_reply,
            draining=reply_of(draining()),
        )
    )


def _make_engine(config: Config, devices: Sequence[ManagedDevice]) -> ThreadEngine | ProcessEngine:
    """The engine that the configuration asks for.

    Raises:
        weights.store.StoreError: the store of weights cannot be used.
    """
    weights = config.weights
    settings: dict[str, Any] = {
        "store_folder": None if weights.store is None else str(weights.store),
        "read": weights.read,
        "arena_bytes": weights.arena,
    }
    engine_devices = [device.engine_device() for device in devices]
    batches = BatchLimits(
        most_rows=config.engine.max_batch_rows, most_bytes=config.engine.max_batch_bytes
    )
    if config.engine.kind == "thread":
        return ThreadEngine(
            devices=engine_devices,
            runtimes=make_serving_runtimes(config.allowed_factories, **settings),
            batches=batches,
        )
    if weights.store is not None:
        # The workers open it, each for itself. What is wrong with it is told here, at once.
        WeightStore.open(weights.store, leasing=True).close()
    return ProcessEngine(
        devices=engine_devices,
        source=RuntimeSource(
            maker="modelyard_server.runtimes.serving:make_serving_runtimes",
            allowed_factories=config.allowed_factories,
            worker_arguments={**settings, "write_protected": True},
        ),
        settings=WorkerSettings(
            run_limit_s=config.engine.run_limit_s,
            load_limit_s=config.engine.load_limit_s,
            headroom_bytes=config.engine.headroom,
            batches=batches,
        ),
        budgets=[device.budget_bytes for device in devices],
    )


def _handlers(
    inference: InferenceService,
    batches: BatchService,
    streams: PredictionStreamService,
    generations: GenerationService,
    models: ModelService,
    routes: RouteService,
    devices: DeviceService,
    residencies: ResidencyService,
    admin: AdminService,
    watch: WatchService,
    recording: RecordingService,
    *,
    acting: Callable[[str], AbstractContextManager[None]],
) -> Handlers:
    m, k, d, r, a = (
        model_service_pb2,
        route_service_pb2,
        device_service_pb2,
        residency_service_pb2,
        admin_service_pb2,
    )
    return {
        "modelyard.v1.InferenceService": {
            "Predict": inference.predict,
            "PredictBatch": batches.predict_batch,
            "PredictStream": Duplex(streams.predict_stream),
            "Generate": Streaming(generations.generate, is_finite=True),
        },
        "modelyard.v1.ModelService": {
            "CreateModel": unary(m.CreateModelRequest, models.create_model, acting=acting),
            "GetModel": unary(m.GetModelRequest, models.get_model),
            "ListModels": unary(m.ListModelsRequest, models.list_models),
            "UpdateModel": unary(m.UpdateModelRequest, models.update_model, acting=acting),
            "DeleteModel": unary(m.DeleteModelRequest, models.delete_model, acting=acting),
        },
        "modelyard.v1.RouteService": {
            "CreateRoute": unary(k.CreateRouteRequest, routes.create_route, acting=acting),
            "GetRoute": unary(k.GetRouteRequest, routes.get_route),
            "ListRoutes": unary(k.ListRoutesRequest, routes.list_routes),
            "UpdateRoute": unary(k.UpdateRouteRequest, routes.update_route, acting=acting),
            "DeleteRoute": unary(k.DeleteRouteRequest, routes.delete_route, acting=acting),
            "PromoteCanary": unary(k.PromoteCanaryRequest, routes.promote_canary, acting=acting),
            "AbortCanary": unary(k.AbortCanaryRequest, routes.abort_canary, acting=acting),
            "ResolveRoute": unary(k.ResolveRouteRequest, routes.resolve_route),
        },
        "modelyard.v1.DeviceService": {
            "ListDevices": unary(d.ListDevicesRequest, devices.list_devices),
            "GetDevice": unary(d.GetDeviceRequest, devices.get_device),
            "UpdateBudget": unary(d.UpdateBudgetRequest, devices.update_budget, acting=acting),
            "GetPlan": unary(d.GetPlanRequest, devices.get_plan),
            "PlanDevices": unary(d.PlanDevicesRequest, devices.plan_devices),
            "ApplyPlan": unary(d.ApplyPlanRequest, devices.apply_plan, acting=acting),
            "DrainDevice": unary(d.DrainDeviceRequest, devices.drain_device, acting=acting),
            "UndrainDevice": unary(d.UndrainDeviceRequest, devices.undrain_device, acting=acting),
            "RebalanceDevices": unary(
                d.RebalanceDevicesRequest, devices.rebalance_devices, acting=acting
            ),
        },
        "modelyard.v1.ResidencyService": {
            "LoadModel": unary(r.LoadModelRequest, residencies.load_model, acting=acting),
            "UnloadModel": unary(r.UnloadModelRequest, residencies.unload_model, acting=acting),
            "PinModel": unary(r.PinModelRequest, residencies.pin_model, acting=acting),
            "UnpinModel": unary(r.UnpinModelRequest, residencies.unpin_model, acting=acting),
            "ListResidencies": unary(r.ListResidenciesRequest, residencies.list_residencies),
            "WatchResidencies": Streaming(
                server_stream(r.WatchResidenciesRequest, watch.watch_residencies)
            ),
            "ExplainModel": unary(r.ExplainModelRequest, watch.explain_model),
        },
        "modelyard.v1.AdminService": {
            "GetServerInfo": unary(a.GetServerInfoRequest, admin.get_server_info),
            "GetStats": unary(a.GetStatsRequest, admin.get_stats),
            "CollectStore": unary(a.CollectStoreRequest, admin.collect_store, acting=acting),
            "WatchEvents": Streaming(server_stream(a.WatchEventsRequest, watch.watch_events)),
            "WatchRequests": Streaming(
                server_stream(a.WatchRequestsRequest, recording.watch_requests)
            ),
        },
    }


def _configured(model: ModelConfig) -> ConfiguredModel:
    return ConfiguredModel(
        draft=ModelDraft(
            id=model.id,
            keys=model.keys,
            root=model.root or "",
            folder=model.folder or "",
            runtime=model.runtime,
            task=model.task,
            options=model.plain_options(),
            placement=model.device,
        ),
        pinned=model.pinned,
    )
