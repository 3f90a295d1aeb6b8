"""What a name stands for: the models behind a key, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from modelyard_server.catalog.model import Model
from modelyard_server.catalog.route import Route
from modelyard_server.catalog.route_view import RouteView
from modelyard_server.errors import Reason, Refusal, Resource
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import ModelUse, State
from modelyard_server.routing.balance import Balance
from modelyard_server.routing.resolve import Plan, Run, plan_of
from modelyard_server.routing.signatures import can_answer, models_of_plan, signature_of_plan
from modelyard_server.routing.targets import Versions
from modelyard_server.runtimes.api import Runtime
from modelyard_server.runtimes.signature import Signature
from modelyard_server.weights.store.recent import Recent

__all__ = ["ONLY_VERSION", "Meaning", "Meanings"]

ONLY_VERSION = "1"
"""What the one version of a name is called that has no versions."""

_MOST_SIGNATURES = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What a name stands for.

    Attributes:
        name: a key.
        meant: what InferenceService takes it for.
        plan: what a request for it does; of choices all that there are.
        models: all that a request for it may run, in their order.
        signature: what it takes and gives.
        version: as InferenceService takes it: empty for the current one.
        versions: what can be asked for as a version.
    """

    name: str
    meant: Model | Route
    plan: Plan
    models: tuple[Model, ...]
    signature: Signature
    version: str
    versions: tuple[str, ...]


class Meanings:
    """Looks names up.

    Args:
        meaning_of: what a key means; see InferenceService.meaning_of.
        routes: the models and routes there are.
        residency: where models stand.
        runtimes: by name; asked for signatures alone.
    """

    def __init__(
        self,
        *,
        meaning_of: Callable[[str], Model | Route],
        routes: RouteView,
        residency: Residency,
        runtimes: Mapping[str, Runtime],
    ) -> None:
        self._meaning_of = meaning_of
        self._routes = routes
        self._residency = residency
        self._runtimes = runtimes
        self._signatures: Recent[str, tuple[Model, Signature]] = Recent(_MOST_SIGNATURES)

    def of(self, name: str, version: str = "") -> Meaning:
        """What a name and version stand for.

        Raises:
            Refusal: KEY_NOT_FOUND, or INVALID_FIELD for what can be no key.
        """
        meant = self._meaning_of(name)
        versions = (ONLY_VERSION,)
        if isinstance(meant, Route):
            return self._of_route(name, meant, version)
        if version not in ("", *versions):
            raise _no_version(name, version, versions)
        return Meaning(
            name=name,
            meant=meant,
            plan=Run(meant, "", ""),
            models=(meant,),
            signature=self.signature_of(meant),
            version="",
            versions=versions,
        )

    def _of_route(self, name: str, route: Route, version: str) -> Meaning:
        target = route.target
        versions: tuple[str, ...] = (ONLY_VERSION,)
        if isinstance(target, Versions):
            versions = tuple(each.name for each in target.versions)
            if version == ONLY_VERSION and target.find(version) is None:
                version = ""  # What clients say that do not care.
            if version and target.find(version) is None:
                raise _no_version(name, version, versions)
        elif version in ("", ONLY_VERSION):
            version = ""
        else:
            raise _no_version(name, version, versions)
        plan = plan_of(
            self._routes,
            route,
            version=version,
            is_resident=self._is_resident,
            balance_of=lambda _, split: Balance([each.weight for each in split.branches], 0.0),
            draw=None,
        )
        return Meaning(
            name=name,
            meant=route,
            plan=plan,
            models=models_of_plan(plan),
            signature=signature_of_plan(plan, self.signature_of),
            version=version,
            versions=versions,
        )

    def signature_of(self, model: Model) -> Signature:
        """What a model takes and gives."""
        known = self._signatures.get(model.id)
        if known is None or known[0] is not model:
            runtime = self._runtimes[model.draft.runtime]
            known = model, runtime.signature(model.handle.spec, model.input_names)
            self._signatures.put(model.id, known)
        return known[1]

    def use(self, model: Model) -> ModelUse:
        """Where a model stands."""
        return self._residency.use(model.handle)

    def is_in_memory(self, meaning: Meaning) -> bool:
        """True if a request would be served without a load."""
        return can_answer(meaning.plan, self._is_resident)

    def is_ready(self, meaning: Meaning) -> bool:
        """True if a request would be served, if need be after loads."""
        return can_answer(meaning.plan, self._is_able)

    def _is_resident(self, model: Model) -> bool:
        return self._residency.is_resident(model.handle)

    def _is_able(self, model: Model) -> bool:
        use = self.use(model)
        if use.state is State.RESIDENT:
            return True
        if model.handle.barred_text or (use.state is State.FAILED and use.retry_in_s > 0):
            return False
        return any(
            all(self._has_room(device, size) for device, size in way.charges.items())
            for way in model.handle.ways
        )

    def _has_room(self, device: int, size_bytes: int) -> bool:
        """True if a device is open, and large enough for so much by itself."""
        residency = self._residency
        return not residency.is_closed(device) and size_bytes <= residency.device_use(device).budget


def _no_version(name: str, version: str, versions: Sequence[str]) -> Refusal:
    shown = version if len(version) <= 64 else f"{version[:61]}..."
    return Refusal(
        Reason.KEY_NOT_FOUND,
        f"model {name!r} has no version {shown!r}; there is {', '.join(versions)}",
        resource=Resource("key", name),
    )
