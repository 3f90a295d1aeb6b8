"""Fills modules with the weights of a file, and puts them onto their devices.

A whole model hangs over tensors that it shares with others; by a template if there is one. What the
library has loaded in its own way is moved onto the shared tensors afterwards, so that what a model
is charged for does not depend on the way it came. A model in parts shares nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelyard_server.runtimes.api import StopCheck
from modelyard_server.runtimes.model_weights import HeldWeights, ModelWeights
from modelyard_server.runtimes.targets import Place, Structure
from modelyard_server.weights.dispatch import check_disk, dispatch
from modelyard_server.weights.mapping import MappedCheckpoint, map_checkpoint
from modelyard_server.weights.origin import NOWHERE, Origin
from modelyard_server.weights.storages import Spread
from modelyard_server.weights.stored import StoredModel
from modelyard_server.weights.templates import ModuleTemplate

__all__ = ["Filling", "clone", "map_filling", "settle", "shared_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """What a module is filled with.

    Attributes:
        stored: the model's files.
        structure: of the module.
        filed: for each tensor of the structure its name in the file, if it is used as it lies
            there; else None.
        shared: what the model's price says that others may hold as well.
    """

    stored: StoredModel
    structure: Structure
    filed: tuple[str | None, ...]
    shared: Mapping[str, int]

    @property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """The parameters that are used as they lie in the file: their names there and here."""
        return {
            name: part.names
            for part, name in zip(self.structure.tensors, self.filed, strict=True)
            if name is not None and part.as_filed and not part.is_buffer
        }

    def suits(self, template: ModuleTemplate) -> bool:
        """True if clones of a template hold what the price says they share."""
        return self.parameters.keys() <= template.held


def clone(
    template: ModuleTemplate,
    filling: Filling,
    weights: ModelWeights,
    *,
    place: Place,
    stop: StopCheck,
    origin: Origin = NOWHERE,
) -> tuple[Any, Spread, HeldWeights]:
    """Makes a whole model of a template.

    Args:
        template: of its architecture.
        filling: of the model.
        weights: where they come from.
        place: a whole target.
        stop: asked between steps.
        origin: where that came from which was loaded for it before.

    Returns:
        The module, where its tensors are, and what it holds; the caller releases that.

    Raises:
        ModelFilesError: the files are not those whose headers were read.
        LoadCancelled: stop said so.
    """
    stored, home = filling.stored, place.target.home
    holding = weights.take(stored, template.held, place=place, stop=stop)
    try:
        if template.copied:
            read = weights.take(stored, template.copied, place=place, stop=stop)
            origin += read.origin
            try:
                module = template.make(holding.bases(), read.bases(), device=place.home)
            finally:
                read.release()
        else:
            module = template.make(holding.bases(), {}, device=place.home)
        if place.home != "cpu":
            # All is there already. Some modules keep more than tensors, and move that here.
            module.to(place.home)
        held = HeldWeights(holding, home=home, shared=filling.shared, origin=origin)
    except BaseException:
        holding.release()
        raise
    spread = Spread(home=home, home_name=place.home, devices=(home,), positions={})
    return module, spread, held


def map_filling(filling: Filling, place: Place, stop: StopCheck) -> MappedCheckpoint:
    """Maps the weights; what is not to stay on the disk is read.

    Raises:
        ModelFilesError: the files are not those whose headers were read, or a tensor cannot stay
            on the disk.
        LoadCancelled: stop said so.
    """
    filed = filling.filed
    on_disk = frozenset(
        name for index in check_disk(filling.structure, place) if (name := filed[index]) is not None
    )
    stored = filling.stored
    return map_checkpoint(stored.packs, stored.checkpoint, stop=stop, on_disk=on_disk)


def settle(
    module: torch.nn.Module,
    mapped: MappedCheckpoint,
    filling: Filling,
    weights: ModelWeights,
    *,
    place: Place,
    lists_are_chains: bool,
    stop: StopCheck,
) -> tuple[Spread, HeldWeights]:
    """Puts a module that lies over its mapped file onto its devices.

    Args:
        module: on host memory, without gradients.
        mapped: what it lies over; its tensors are dropped.
        filling: of the model.
        weights: where shared tensors come from.
        place: which part goes where.
        lists_are_chains: see dispatch.
        stop: asked between steps.

    Returns:
        Where its tensors are; and what it holds together with others, be it nothing, which the
        caller releases.

    Raises:
        ModelFilesError: the files are not those whose headers were read.
        LoadCancelled: stop said so.
    """
    held = _adopt(module, mapped, filling, weights, place=place, stop=stop)
    mapped.tensors.clear()
    try:
        spread = dispatch(
            module,
            filling.structure,
            place,
            extents={
                index: mapped.extents[name]
                for index, name in enumerate(filling.filed)
                if name in mapped.extents
            },
            lists_are_chains=lists_are_chains,
            stop=stop,
        )
    except BaseException:
        held.release()
        raise
    return spread, held


def shared_of(
    structure: Structure, filed: Sequence[str | None], stored: StoredModel
) -> dict[str, int]:
    """What models hold together, for a price: bytes by identity.

    Parameters that the file has as they are used. Not buffers: a model may write to its own.

    Args:
        structure: of the model.
        filed: see Filling.
        stored: the file.
    """
    headers = stored.checkpoint.tensors
    shared = {}
    for part, name in zip(structure.tensors, filed, strict=True):
        if name is not None and not part.is_buffer and part.as_filed and headers[name].identity:
            shared[headers[name].identity] = part.size_bytes
    return shared


def _adopt(
    module: torch.nn.Module,
    mapped: MappedCheckpoint,
    filling: Filling,
    weights: ModelWeights,
    *,
    place: Place,
    stop: StopCheck,
) -> HeldWeights:
    """Moves a whole module onto the tensors that its price calls shared; one in parts has none."""
    headers = filling.stored.checkpoint.tensors
    names = {
        name: paths
        for name, paths in filling.parameters.items()
        if place.target.is_whole and headers[name].identity in filling.shared
    }
    holding = weights.take(filling.stored, names, place=place, stop=stop)
    try:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name, paths in names.items():
            for path in paths:
                parameter = parameters.get(path)
                if parameter is not None and _is_same(parameter, mapped.tensors[name]):
                    _replace(module, path, parameter, holding.tensors[name])
        shared = filling.shared if place.target.is_whole else {}
        return HeldWeights(holding, home=place.target.home, shared=shared, origin=mapped.origin)
    except BaseException:
        holding.release()
        raise


def _is_same(parameter: torch.Tensor, filed: torch.Tensor) -> bool:
    """True if a parameter is what the file holds, used there or copied."""
    if parameter.dtype != filed.dtype or parameter.shape != filed.shape:
        return False
    if parameter.device != filed.device:
        # Moved already, by another of its names.
        return False
    if parameter.data_ptr() == filed.data_ptr():
        return True
    raw, expected = (
        tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (parameter, filed)
    )
    return torch.equal(raw, expected)


def _replace(
    module: torch.nn.Module, path: str, parameter: torch.nn.Parameter, tensor: torch.Tensor
) -> None:
    if torch._has_compatible_shallow_copy_type(parameter, tensor):
        # In place: ties, and whatever else refers to the parameter, keep it.
        parameter.data = tensor
        return
    owner, _, name = path.rpartition(".")
    moved = torch.nn.Parameter(tensor, requires_grad=False)
    setattr(module.get_submodule(owner), name, moved)
