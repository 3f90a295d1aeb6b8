"""What a request for a key would do, step by step: for ResolveRoute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import assert_never

from modelyard.v1 import route_pb2
from modelyard_server.catalog.model import Model
from modelyard_server.catalog.route import Route
from modelyard_server.catalog.route_view import RouteView
from modelyard_server.residency.shell import Residency
from modelyard_server.routing.balance import Balance
from modelyard_server.routing.resolve import Absent, Beside, Chain, Group, Plan, Run, Try, plan_of
from modelyard_server.routing.targets import Transform, kind_of

__all__ = ["Explained", "RouteSteps"]


@dataclass(frozen=True, slots=True)
class Explained:
    """What a request would do.

    Attributes:
        steps: what would be run, in this order.
        text: the same for people, to follow the name of the route.
    """

    steps: tuple[route_pb2.ResolvedStep, ...]
    text: str


class RouteSteps:
    """Tells what requests would do, without doing any of it.

    Args:
        routes: the models and routes.
        residency: tells which models are resident.
        device_names: resource names of the devices, by position.
    """

    def __init__(
        self, *, routes: RouteView, residency: Residency, device_names: Sequence[str]
    ) -> None:
        self._routes = routes
        self._residency = residency
        self._device_names = tuple(device_names)

    def explain(self, route: Route, affinity: str, version: str) -> Explained:
        """What a request for a key of a route that means no one model would do.

        Without an affinity what would be drawn is left open: every branch is a step, conditional.

        Args:
            route: the route.
            affinity: as PredictRequest.affinity.
            version: as PredictRequest.version.

        Raises:
            Refusal: INVALID_FIELD: there is no such version, or nothing has versions.
        """
        plan = plan_of(
            self._routes,
            route,
            affinity=affinity,
            version=version,
            is_resident=lambda model: self._residency.is_resident(model.handle),
            balance_of=lambda _, split: Balance([each.weight for each in split.branches], 0.0),
            draw=None,
        )
        steps = tuple(self.of_plan(plan))
        return Explained(steps, f"is {_article(kind_of(route.target))}: {_told(steps)}")

    def of_plan(self, plan: Plan, *, conditional: bool = False) -> Iterator[route_pb2.ResolvedStep]:
        """Every step of a plan, in the order in which a request would come to it.

        Args:
            plan: what a request is to do.
            conditional: it may come to none of it.
        """
        match plan:
            case Run():
                yield self.of_model(plan.model, plan.branch, plan.version, conditional)
            case Absent():
                yield route_pb2.ResolvedStep(branch=plan.branch, conditional=conditional)
            case Chain():
                for step in plan.steps:
                    if isinstance(step.does, Transform):
                        yield route_pb2.ResolvedStep(
                            branch=step.name, transform=step.does.name, conditional=conditional
                        )
                    else:
                        yield from self.of_plan(step.does, conditional=conditional)
            case Group():
                for member in plan.members:
                    if not isinstance(member.does, Transform):
                        yield from self.of_plan(member.does, conditional=conditional)
            case Try():
                for i, option in enumerate(plan.options):
                    certain = i == 0 and not plan.drawn and not plan.prefer_warm
                    yield from self.of_plan(option, conditional=conditional or not certain)
            case Beside():
                yield from self.of_plan(plan.answer, conditional=conditional)
                if plan.shadow is not None:
                    yield from self.of_plan(plan.shadow, conditional=True)
            case _:
                assert_never(plan)

    def of_model(
        self, model: Model, branch: str = "", version: str = "", conditional: bool = False
    ) -> route_pb2.ResolvedStep:
        """The step that runs a model."""
        resident = self._residency.is_resident(model.handle)
        device = self._device_names[self._residency.device_of(model.handle)] if resident else ""
        return route_pb2.ResolvedStep(
            model=f"models/{model.id}",
            resident=resident,
            device=device,
            branch=branch,
            version=version,
            conditional=conditional,
        )


def _told(steps: Sequence[route_pb2.ResolvedStep]) -> str:
    """Steps as a sentence has them."""
    if not steps:
        return "nothing would be run"
    return ", then ".join(_told_step(step) for step in steps)


def _told_step(step: route_pb2.ResolvedStep) -> str:
    what = step.model or step.transform or "what is not there"
    if step.branch:
        what = f"{what} as {step.branch}"
    if step.version:
        what += f", version {step.version}"
    if step.model:
        what += f" ({f'resident on {step.device}' if step.resident else 'not resident'})"
    return f"perhaps {what}" if step.conditional else what


def _article(kind: str) -> str:
    match kind:
        case "ensemble":
            return "an ensemble"
        case "versions":
            return "a route of versions"
        case _:
            return f"a {kind}"
