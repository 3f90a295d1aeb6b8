"""Where to cut a model that is to lie in parts on several devices.

A model is a row of pieces: its blocks, and outside of them its modules, in the order of the model.
Pieces are given to the devices in the devices' order, each device a run of neighbours, so that what
flows through the model crosses from one device to the next once. Tensors that are tied join their
pieces into one, at the place of the first.

Both strategies are exact for rows: with the order fixed, filling each device as far as it goes is
never worse than stopping earlier, so one pass says whether given capacities suffice, and the
smallest largest share is found by asking that question often enough.

Everything here is a pure function of its arguments.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import ceil

from modelyard.placements import PlacementStrategy
from modelyard_server.devices.placed import charges_of, enumerated
from modelyard_server.runtimes.api import Price
from modelyard_server.runtimes.targets import Structure, Target, TensorPart

__all__ = ["CannotCut", "Piece", "cut", "pieces_of"]


class CannotCut(Exception):
    """The budgets are too small for the model.

    Attributes:
        needed: bytes by position, of the best that could be found.
        fixed: a parameter that would have to lie on the disk and cannot; None if there is none.
    """

    def __init__(self, needed: Mapping[int, int], fixed: str | None = None) -> None:
        super().__init__(f"does not fit: {dict(needed)}")
        self.needed = needed
        self.fixed = fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What lies on one device as a whole.

    Attributes:
        names: every path of its tensors.
        size_bytes: of its tensors.
        fixed: a parameter that cannot lie on the disk; None if all can.
    """

    names: tuple[str, ...]
    size_bytes: int
    fixed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """The pieces of a model and the devices that they are for, both in order.

    Attributes:
        price: of the model; has a structure.
        pieces: at least one.
        sums: bytes of the first i pieces, for i from 0.
        devices: positions of devices that run models; at least one.
        budgets: bytes by position.
        disk: position of the disk; None where nothing may lie on it.
    """

    price: Price
    pieces: tuple[Piece, ...]
    sums: tuple[int, ...]
    devices: tuple[int, ...]
    budgets: Sequence[int]
    disk: int | None

    def fill(self, capacities: Sequence[int], start: int = 0) -> list[int]:
        """Give pieces to the devices in turn, to each as many as it holds.

        Returns:
            For each device the number of pieces that it and those before it have.
        """
        ends = []
        for capacity in capacities:
            # From the right: pieces without bytes go where their predecessor goes.
            start = max(start, bisect_right(self.sums, self.sums[start] + capacity) - 1)
            ends.append(start)
        return ends

    def used(self, ends: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield the first piece and the bytes of each device's pieces."""
        start = 0
        for end in ends:
            yield start, self.sums[end] - self.sums[start]
            start = end

    def target(self, home: int, ends: Sequence[int]) -> Target:
        """The target that gives each device its pieces, and the disk the rest."""
        by_name: dict[str, int] = {}
        start = 0
        for device, end in zip(self.devices, ends, strict=True):
            for piece in self.pieces[start:end]:
                by_name |= dict.fromkeys(piece.names, device)
            start = end
        for piece in self.pieces[start:]:
            assert self.disk is not None, "who has no disk gives all pieces away"
            by_name |= dict.fromkeys(piece.names, self.disk)
        structure = self.price.structure
        assert structure is not None
        ordered = {name: by_name[name] for tensor in structure.tensors for name in tensor.names}
        return Target(home=self.devices[home], parts=enumerated(ordered))

    def charges(self, target: Target) -> Mapping[int, int]:
        """What the target charges."""
        disk = frozenset() if self.disk is None else frozenset({self.disk})
        return charges_of(target, self.price, disk)

    def beside(self, home: int, ends: Sequence[int], charges: Mapping[int, int]) -> int:
        """Bytes that the home device holds beside its own pieces."""
        own = list(self.used(ends))[home][1]
        return charges[self.devices[home]] - own


def cut(
    strategy: PlacementStrategy,
    *,
    price: Price,
    devices: Sequence[int],
    budgets: Sequence[int],
    disk: int | None = None,
) -> Target:
    """Place a model in parts.

    BALANCED: such that the largest share of a budget is as small as it can be. SEQUENTIAL: the
    first device filled to its budget, then the next. Either way what no device has room for lies
    on the disk, if that may be used. The home device is the first that has a part.

    Args:
        strategy: one of the two.
        price: of the model; has a structure.
        devices: positions of the devices to use, in this order; at least one, none the disk.
        budgets: bytes by position.
        disk: position of the disk, or None if nothing may lie on it.

    Raises:
        CannotCut: the budgets are too small.
    """
    assert price.structure is not None, "a model without a structure cannot be cut"
    pieces = pieces_of(price.structure)
    # A device without a budget takes no part; shares of nothing are without bounds.
    devices = [device for device in devices if budgets[device] > 0] or devices[:1]
    if not pieces:
        return Target.whole(devices[0])
    row = _Row(
        price=price,
        pieces=pieces,
        sums=tuple(accumulate((piece.size_bytes for piece in pieces), initial=0)),
        devices=tuple(devices),
        budgets=budgets,
        disk=disk,
    )
    target = _balanced(row) if strategy is PlacementStrategy.BALANCED else _sequential(row)
    charges = row.charges(target)
    if all(charge <= budgets[position] for position, charge in charges.items()):
        return target
    if disk is None:
        raise CannotCut(charges)
    return _with_disk(row)


def pieces_of(structure: Structure) -> tuple[Piece, ...]:
    """The pieces of a model, in its order.

    A tensor belongs to the outermost block around it; outside of blocks to the closest unit, or
    else to the module that has it.
    """
    blocks, units = frozenset(structure.blocks), frozenset(structure.units)
    # Which paths are joined by a tied tensor: each knows one of its group, at last the first.
    joined: dict[str, str] = {}

    def first(path: str) -> str:
        while joined.setdefault(path, path) != path:
            path = joined[path]
        return path

    order: dict[str, int] = {}
    for tensor in structure.tensors:
        paths = [_piece_path(name, blocks, units) for name in tensor.names]
        for path in paths:
            order.setdefault(path, len(order))
        # The earliest stands for all, so that a group is at the place of its first.
        head, *others = sorted((first(path) for path in paths), key=order.__getitem__)
        for other in others:
            joined[other] = head
    members: dict[str, list[TensorPart]] = {}
    for tensor in structure.tensors:
        members.setdefault(first(_piece_path(tensor.names[0], blocks, units)), []).append(tensor)
    return tuple(_piece(tensors) for tensors in members.values())


def _piece(tensors: Sequence[TensorPart]) -> Piece:
    return Piece(
        names=tuple(name for tensor in tensors for name in tensor.names),
        size_bytes=sum(tensor.size_bytes for tensor in tensors),
        # Buffers that the file has not stay on the home device, wherever the rest is.
        fixed=next((t.names[0] for t in tensors if not t.as_filed and not t.is_buffer), None),
    )


def _piece_path(name: str, blocks: frozenset[str], units: frozenset[str]) -> str:
    module = name.rpartition(".")[0]
    above = [module]
    while above[-1]:
        above.append(above[-1].rpartition(".")[0])
    inner = next((path for path in (name, *above) if path in units), module)
    return next((path for path in reversed(above) if path in blocks), inner)


def _balanced(row: _Row) -> Target:
    """The row with the smallest largest share, above 1 if the budgets are too small."""
    beside = row.price.peak_bytes - row.price.resting_bytes
    while True:
        # The first of the best, so that equal machines get equal plans.
        _, home, ends = min(
            (_best_share(row, home, beside) for home in range(len(row.devices))),
            key=lambda found: found[:2],
        )
        target = row.target(home, ends)
        found = row.beside(home, ends, row.charges(target))
        if found <= beside:
            return target
        # A module is cut through the middle, and its parts visit the home device.
        beside = found


def _best_share(row: _Row, home: int, beside: int) -> tuple[Fraction, int, list[int]]:
    """The smallest largest share with a given home device, which gets the first piece."""
    # Halving finds the neighbourhood, asking for strictly less makes sure of the last bit.
    best = [0] * home + [len(row.pieces)] * (len(row.devices) - home)
    high, low = _share(row, home, beside, best), Fraction(0)
    while True:
        caps = [ceil(high * _budget(row, i)) - 1 for i in range(len(row.devices))]
        better = _filled(row, home, beside, caps)
        if better is None:
            return high, home, best
        best, high = better, _share(row, home, beside, better)
        middle = (low + high) / 2
        halved = _filled(
            row, home, beside, [int(middle * _budget(row, i)) for i in range(len(row.devices))]
        )
        if halved is None:
            low = middle
        else:
            best, high = halved, _share(row, home, beside, halved)


def _filled(row: _Row, home: int, beside: int, capacities: Sequence[int]) -> list[int] | None:
    """Give all pieces to the home device and those behind it; None if they do not hold them."""
    own = capacities[home] - beside
    if own < row.sums[1]:
        return None
    ends = row.fill([own, *capacities[home + 1 :]])
    return [0] * home + ends if ends[-1] == len(row.pieces) else None


def _share(row: _Row, home: int, beside: int, ends: Sequence[int]) -> Fraction:
    shares = [
        Fraction(used + (beside if i == home else 0), _budget(row, i))
        for i, (_, used) in enumerate(row.used(ends))
    ]
    return max(shares)


def _budget(row: _Row, index: int) -> int:
    """A device's budget; where the only one is nothing, any share of it is too large anyway."""
    return max(1, row.budgets[row.devices[index]])


def _sequential(row: _Row) -> Target:
    """The row that fills one device after the other; over the last one's budget if need be."""
    capacities = [row.budgets[device] for device in row.devices]
    for home in range(len(row.devices)):
        beside = row.price.peak_bytes - row.price.resting_bytes
        while (ends := _filled(row, home, beside, capacities)) is not None:
            target = row.target(home, ends)
            found = row.beside(home, ends, row.charges(target))
            if found <= beside:
                return target
            beside = found
    # The numbers of a refusal: everything as it goes, and the rest on the last device.
    extra = row.price.peak_bytes - row.price.resting_bytes
    ends = row.fill([capacities[0] - extra, *capacities[1:]])
    ends[-1] = len(row.pieces)
    return row.target(next(i for i, end in enumerate(ends) if end), ends)


def _with_disk(row: _Row) -> Target:
    """Devices filled in turn, and the rest on the disk.

    The home device is the first that has room for the first piece and for what the disk's part
    needs beside it. Where none has, all of the model is on the disk.
    """
    assert row.disk is not None
    capacities = [row.budgets[device] for device in row.devices]
    refusal: CannotCut | None = None
    count = len(row.devices)
    for home, empty in [(i, False) for i in range(count)] + [(i, True) for i in range(count)]:
        beside = row.price.peak_bytes - row.price.resting_bytes
        while True:
            own = capacities[home] - beside
            if empty:
                ends = [0] * count
            elif own >= row.sums[1]:
                ends = [0] * home + row.fill([own, *capacities[home + 1 :]])
            else:
                break
            target = row.target(home, ends)
            charges = row.charges(target)
            fixed = next((piece.fixed for piece in row.pieces[ends[-1] :] if piece.fixed), None)
            fits = all(charge <= row.budgets[i] for i, charge in charges.items())
            if fits and fixed is None:
                return target
            refusal = refusal or CannotCut(charges, fixed)
            found = row.beside(home, ends, charges)
            if empty or found <= beside:
                break
            beside = found
    assert refusal is not None, "an empty row of devices is always tried"
    raise refusal
