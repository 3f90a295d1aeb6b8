"""RepositoryIndex, RepositoryModelLoad and RepositoryModelUnload: residency in other words.

There is one repository, the catalog, and its models are registered elsewhere: here they only come
into memory and leave it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Final

from modelyard_server.catalog.model import Model
from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import ModelHandle, ModelUse, State
from modelyard_server.services.handler import invalid
from modelyard_server.services.models import deadline_ns_of
from modelyard_server.services.oip.meanings import Meaning, Meanings
from modelyard_server.services.oip.messages import message
from modelyard_server.transport.api import Call

__all__ = ["RepositoryService"]

_BREATH: Final = 64
_UNLOAD_MARGIN: Final = 0.95

_STATES: Final = {
    State.RESIDENT: "READY",
    State.QUEUED: "LOADING",
    State.LOADING: "LOADING",
    State.DRAINING: "UNLOADING",
    State.UNLOADING: "UNLOADING",
    State.FAILED: "UNAVAILABLE",
}


class RepositoryService:
    """Loads and unloads models, and tells which are in memory.

    Args:
        meanings: what names stand for.
        names: every name there is.
        residency: which models are in memory.
        max_deadline_s: longest that a call waits.
        forgive: lets a model be loaded at once that was barred or whose last load has failed.
    """

    def __init__(
        self,
        *,
        meanings: Meanings,
        names: Callable[[], Iterable[str]],
        residency: Residency,
        max_deadline_s: float,
        forgive: Callable[[ModelHandle], None],
    ) -> None:
        self._meanings = meanings
        self._names = names
        self._residency = residency
        self._max_deadline_s = max_deadline_s
        self._forgive = forgive

    async def repository_index(self, request: Any, call: Call) -> Any:
        """See GRPCInferenceService.RepositoryIndex."""
        _check_repository(request)
        response = message("RepositoryIndexResponse")()
        for i, name in enumerate(sorted(self._names())):
            if i % _BREATH == _BREATH - 1:
                await asyncio.sleep(0)
            try:
                meaning = self._meanings.of(name)
            except Refusal:
                continue  # It means nothing any more, or nothing without its model.
            state, reason = self._state_of(meaning)
            if request.ready and state != "READY":
                continue
            response.models.add(
                name=name, version=meaning.versions[0] if state else "", state=state, reason=reason
            )
        return response

    async def repository_model_load(self, request: Any, call: Call) -> Any:
        """See GRPCInferenceService.RepositoryModelLoad."""
        _check_repository(request)
        _check_parameters(request, ())
        meaning = self._meanings.of(request.model_name)
        deadline_ns = deadline_ns_of(call, self._max_deadline_s)
        first: Refusal | None = None
        for model in meaning.models:
            self._forgive(model.handle)
            try:
                await self._load(model, deadline_ns)
            except Refusal as refusal:
                first = first or refusal
        # Of a route that can do without one of its models the others are enough.
        if first is not None and not self._meanings.is_in_memory(meaning):
            raise first
        return message("RepositoryModelLoadResponse")()

    async def repository_model_unload(self, request: Any, call: Call) -> Any:
        """See GRPCInferenceService.RepositoryModelUnload."""
        _check_repository(request)
        dependents = _check_parameters(request, ("unload_dependents",))
        meaning = self._meanings.of(request.model_name)
        if len(meaning.models) > 1 and not dependents:
            ids = ", ".join(model.id for model in meaning.models)
            text = f"{meaning.name!r} means several models ({ids}): set it to unload all of them"
            raise invalid(Violation("parameters.unload_dependents", text))
        limit = self._max_deadline_s
        if call.remaining_s is not None:
            limit = min(limit, call.remaining_s * _UNLOAD_MARGIN)
        try:
            async with asyncio.timeout(limit):
                for model in meaning.models:
                    await self._residency.unload(model.handle)
        except TimeoutError:
            raise Refusal(
                Reason.DEADLINE_IN_QUEUE,
                "the deadline passed before the model's memory was back; the unload goes on",
            ) from None
        return message("RepositoryModelUnloadResponse")()

    async def _load(self, model: Model, deadline_ns: int) -> None:
        """Returns when a model is in memory."""
        try:
            lease = await self._residency.lease(model.handle, deadline_ns, asked=True)
        except Refusal as refusal:
            failure = self._meanings.use(model).failure_text
            if refusal.reason is Reason.LOAD_FAILED and failure:
                refusal.text = f"{refusal.text}: {failure}"
            raise
        lease.release()

    def _state_of(self, meaning: Meaning) -> tuple[str, str]:
        """State and reason of a name: READY if requests need no load, else those of a model."""
        if self._meanings.is_in_memory(meaning):
            return "READY", ""
        for model in meaning.models:
            use = self._meanings.use(model)
            if use.state is not State.RESIDENT:
                return _state_of(use)
        return "UNAVAILABLE", "it leads to what is not there"


def _state_of(use: ModelUse) -> tuple[str, str]:
    if use.state is State.COLD:
        if not use.load_count:
            return "", ""
        return "UNAVAILABLE", "not in memory; a request loads it"
    return _STATES[use.state], use.failure_text


def _check_repository(request: Any) -> None:
    if request.repository_name:
        raise Refusal(
            Reason.UNSUPPORTED,
            "repository_name: there is one repository, which has no name; leave it empty",
            violations=(Violation("repository_name", "must be empty"),),
        )


def _check_parameters(request: Any, known: tuple[str, ...]) -> bool:
    """Checks the parameters of a load or unload. Returns whether the known one is set.

    Raises:
        Refusal: INVALID_FIELD for others.
    """
    violations = []
    is_set = False
    for name, parameter in request.parameters.items():
        field = f"parameters.{name[:64]}"
        if name in known:
            if parameter.WhichOneof("parameter_choice") == "bool_param":
                is_set = parameter.bool_param
            else:
                violations.append(Violation(field, "must be true or false"))
        elif name == "config" or name.startswith("file:"):
            text = "models are registered with modelyard.v1.ModelService; a load takes no content"
            violations.append(Violation(field, text))
        else:
            violations.append(Violation(field, "is not known here"))
    if violations:
        raise invalid(*violations)
    return is_set
