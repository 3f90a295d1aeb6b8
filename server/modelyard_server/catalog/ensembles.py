"""Whether the members of an ensemble can be in memory together at all."""

from __future__ import annotations

from collections.abc import Sequence

from modelyard_server.devices.placed import PlacedAs
from modelyard_server.residency.shell import Residency

__all__ = ["fit_together"]


def fit_together(residency: Residency, members: Sequence[Sequence[PlacedAs]]) -> bool:
    """True if models fit into the budgets of today at once, were nothing else there.

    As for a single model, pins and drains do not count: they can be undone, and who waits for that
    is told so. Tensors that members have in common are counted once on each device.

    The members are placed one after the other, as they would be for a request; those with fewest
    ways first, and once the other way round. Where each of several members may go to several
    devices that are nearly full, a way to place them all may be missed.

    Args:
        residency: has the budgets.
        members: the ways to load each.
    """
    hardest_first = sorted(members, key=lambda ways: (len(ways), -_size_of(ways)))
    for order in (hardest_first, hardest_first[::-1]):
        rehearsal = residency.rehearse()
        rehearsal.clear()
        if all(rehearsal.want(rehearsal.add(ways), hold=True) for ways in order):
            return True
    return False


def _size_of(ways: Sequence[PlacedAs]) -> int:
    return max((sum(way.charges.values()) for way in ways), default=0)
