"""Two operators that write to a server and know what it must have when it has been killed.

Everything a call changes carries its number, so that a change that is half there shows: a plan sets
three budgets, a drain and three placements, an update a model's key and its size. The three models
that plans place are pinned, so that every plan has loads to stage.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import Message

from modelyard.v1 import (
    device_pb2,
    device_service_pb2,
    model_pb2,
    model_service_pb2,
)

__all__ = ["ModelOperator", "Operator", "PlanOperator", "Stubs", "config_text"]

_CALL_S: Final = 60.0
_BASE_BYTES: Final = 32_000_000
_PLANNED: Final = ("devices/cuda-0", "devices/cuda-1", "devices/cuda-2")
"""Devices whose budgets every plan sets to one number, and on one of which it places the models."""
_DRAINED: Final = "devices/cuda-3"
_ALONE: Final = "devices/cpu"
"""The device whose budget is changed by UpdateBudget."""
_HELD: Final = ("held-0", "held-1", "held-2")
_MOST_MODELS: Final = 8

StateT = TypeVar("StateT")


def config_text() -> str:
    """The configuration of a server that operators write to: nothing in it needs torch."""
    lines = ["[server]", 'listen = "127.0.0.1:0"', 'log_level = "warning"']
    lines += ["[catalog]", 'file = "catalog.db"']
    for name in (*_PLANNED, _DRAINED, _ALONE):
        device = name.removeprefix("devices/").replace("-", ":")
        lines += ["[[devices]]", f'device = "{device}"', f"budget = {_BASE_BYTES}"]
        lines += ["logical = true"]
    for name in _HELD:
        lines += [f"[models.{name}]", 'runtime = "identity"', "pinned = true"]
    return "\n".join([*lines, ""])


@dataclass(frozen=True, slots=True, kw_only=True)
class Stubs:
    """What operators call."""

    models: Any
    devices: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call(Generic[StateT]):
    """A call, and what there is once it is done."""

    rpc: Callable[[Stubs], Any]
    request: Message
    after: StateT


class Operator(ABC, Generic[StateT]):
    """Writes one call after the other, and knows what must be there.

    Attributes:
        state: what was acknowledged.
        open: the call of which nobody knows whether it was done.
        acknowledged: how many were.
    """

    def __init__(self, name: str, state: StateT, rng: random.Random) -> None:
        self.name = name
        self.state = state
        self.open: _Call[StateT] | None = None
        self.acknowledged = 0
        self.in_flight_kept = 0
        self._rng = rng
        self._number = 0

    async def write(self, stubs: Stubs) -> None:
        """Makes the next call, or the open one again."""
        if self.open is None:
            self._number += 1
            self.open = self._next()
        await self.open.rpc(stubs)(self.open.request, timeout=_CALL_S)
        self.state = self.open.after
        self.open = None
        self.acknowledged += 1

    @abstractmethod
    async def check(self, stubs: Stubs, lost: list[str], half: list[str]) -> None:
        """Compares what the server has with what must be there, and notes what is wrong."""

    @abstractmethod
    def _next(self) -> _Call[StateT]: ...

    def _may_be(self) -> tuple[StateT, ...]:
        return (self.state,) if self.open is None else (self.state, self.open.after)

    def _request_id(self) -> str:
        return f"{self.name}-{self._number}"


_Models = Mapping[str, tuple[str, int]]
"""Key and size by the model's id; both have the number of the call that wrote them last."""


class ModelOperator(Operator[_Models]):
    """Registers, changes and removes models."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__("models", {}, rng)

    def _next(self) -> _Call[_Models]:
        number, known = self._number, dict(self.state)
        # As many are removed as come: the catalog neither empties nor grows.
        kind = self._rng.choice(("create", "update", "delete"))
        if not known or (kind == "create" and len(known) < _MOST_MODELS):
            name, written = f"m-{number}", (f"key-{number}", number)
            create = model_service_pb2.CreateModelRequest(
                model_id=name, model=_model("", written), request_id=self._request_id()
            )
            return _Call(
                rpc=lambda stubs: stubs.models.CreateModel,
                request=create,
                after=known | {name: written},
            )
        name = self._rng.choice(sorted(known))
        if kind == "update":
            written = (f"key-{number}", number)
            update = model_service_pb2.UpdateModelRequest(
                model=_model(f"models/{name}", written), request_id=self._request_id()
            )
            update.update_mask.paths.extend(("keys", "options"))
            return _Call(
                rpc=lambda stubs: stubs.models.UpdateModel,
                request=update,
                after=known | {name: written},
            )
        del known[name]
        return _Call(
            rpc=lambda stubs: stubs.models.DeleteModel,
            request=model_service_pb2.DeleteModelRequest(
                name=f"models/{name}", request_id=self._request_id()
            ),
            after=known,
        )

    async def check(self, stubs: Stubs, lost: list[str], half: list[str]) -> None:
        answer = await stubs.models.ListModels(
            model_service_pb2.ListModelsRequest(page_size=1000), timeout=_CALL_S
        )
        found = {
            model.name.removeprefix("models/"): model
            for model in answer.models
            if model.owner == model_pb2.MODEL_OWNER_API
        }
        # A model by itself: one that is lost must not hide another.
        for name in sorted(found.keys() | {name for state in self._may_be() for name in state}):
            there = _written(found[name]) if name in found else None
            if isinstance(there, str):
                half.append(f"models/{name}: {there}")
            elif there not in [state.get(name) for state in self._may_be()]:
                lost.append(f"models/{name}: acknowledged {self.state.get(name)}, found {there}")
        now = {name: _written(model) for name, model in found.items()}
        if self.open is not None and now == self.open.after != self.state:
            self.in_flight_kept += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Numbers of the calls that wrote the plan and the lone budget last; how many there were."""

    plan: int = 0
    budget: int = 0
    revision: int = 0


class PlanOperator(Operator[_Plan]):
    """Applies device plans, and changes a budget by itself.

    Attributes:
        plans: how many plans.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__("plans", _Plan(), rng)
        self.plans = 0

    def _next(self) -> _Call[_Plan]:
        number = self._number
        after = replace(self.state, revision=self.state.revision + 1)
        if self._rng.random() < 0.3:
            return _Call(
                rpc=lambda stubs: stubs.devices.UpdateBudget,
                request=device_service_pb2.UpdateBudgetRequest(
                    name=_ALONE, budget_bytes=_BASE_BYTES + number, request_id=self._request_id()
                ),
                after=replace(after, budget=number),
            )
        self.plans += 1
        request = device_service_pb2.ApplyPlanRequest(request_id=self._request_id())
        for device in _PLANNED:
            request.plan.devices.add(device=device, budget_bytes=_BASE_BYTES + number)
        request.plan.devices.add(device=_DRAINED, drained=number % 2 == 1)
        for name in _HELD:
            placed = request.plan.models.add(model=f"models/{name}")
            placed.placement.single.type = device_pb2.DEVICE_TYPE_GPU
            placed.placement.single.index = number % len(_PLANNED)
        return _Call(
            rpc=lambda stubs: stubs.devices.ApplyPlan,
            request=request,
            after=replace(after, plan=number),
        )

    async def check(self, stubs: Stubs, lost: list[str], half: list[str]) -> None:
        answer = await stubs.devices.GetPlan(device_service_pb2.GetPlanRequest(), timeout=_CALL_S)
        settings = {setting.device: setting for setting in answer.plan.devices}
        placed = {entry.model: entry for entry in answer.plan.models}
        numbers = [settings[device].budget_bytes - _BASE_BYTES for device in _PLANNED]
        number = numbers[0]
        indices = {_index(placed[f"models/{name}"]) for name in _HELD}
        expected = number % len(_PLANNED) if number else None
        if (
            set(numbers) != {number}
            or indices != {expected}
            or settings[_DRAINED].drained != (number % 2 == 1)
        ):
            half.append(
                f"plan: budgets of calls {numbers}, models on {sorted(map(str, indices))}, "
                f"drained {settings[_DRAINED].drained}"
            )
            return
        found = _Plan(
            plan=number,
            budget=settings[_ALONE].budget_bytes - _BASE_BYTES,
            revision=answer.plan.revision,
        )
        if found not in self._may_be():
            lost.append(f"plan: acknowledged {self.state}, found {found}")
        elif found != self.state:
            self.in_flight_kept += 1


def _model(name: str, written: tuple[str, int]) -> model_pb2.Model:
    key, size_bytes = written
    model = model_pb2.Model(name=name, runtime="identity", keys=[key])
    model.options.update({"size_bytes": size_bytes})
    return model


def _written(model: model_pb2.Model) -> tuple[str, int] | str:
    """Key and size of a model, or what is wrong with it if they are not of one call."""
    size_bytes = int(model.options["size_bytes"])  # type: ignore[arg-type]
    if list(model.keys) != [f"key-{size_bytes}"]:
        return f"keys {list(model.keys)} and {size_bytes} bytes are of different calls"
    return model.keys[0], size_bytes


def _index(entry: Any) -> int | None:
    """Number of the device on which a plan places a model; None if it is of no plan."""
    if entry.WhichOneof("where") != "placement":
        return None
    index: int = entry.placement.single.index
    return index
