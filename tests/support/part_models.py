"""Modules that are hard to cut, and placements in parts for tests of that.

make_factory_model        a folder with random weights for one of FACTORIES (runtime "torch")
cut                       a target that deals a model's blocks, units or tensors out to devices
charges                   what the devices of a target must hold then
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from modelyard_server.runtimes.targets import (
    DISK,
    Place,
    Structure,
    Target,
    resident_device,
    staging_bytes,
)

__all__ = [
    "FACTORIES",
    "MIXES",
    "WIDE",
    "WIDTH",
    "Attends",
    "Encodes",
    "FailsInside",
    "Lists",
    "Mixes",
    "OwnTensors",
    "Recurrent",
    "Residual",
    "Ties",
    "Wide",
    "chain",
    "charges",
    "cut",
    "make_factory_model",
    "normed",
    "place_of",
]

WIDTH = 8
"""Width of the input of every module here; the first dimension is free."""


def chain() -> torch.nn.Module:
    """A Sequential in a Sequential, with elements that have no tensors."""
    inner = torch.nn.Sequential(torch.nn.Linear(WIDTH, 16), torch.nn.GELU())
    return torch.nn.Sequential(
        inner, torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, WIDTH)
    )


class Residual(torch.nn.Module):
    """Adds what its children make to what they got."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.last = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.LayerNorm(WIDTH))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Args: x: [n, WIDTH]. Returns: "y" and "sum" [n, WIDTH]."""
        x = x + self.first(x)
        # Not a chain: each gets the same.
        total = x * 0
        for layer in self.layers:
            total = total + layer(x)
        return {"y": x + self.last(total), "sum": total}


class Attends(torch.nn.Module):
    """torch's attention, which uses the tensors of its output layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [n, WIDTH]. Returns: [n, WIDTH]."""
        row = x.unsqueeze(0)
        mixed, _ = self.attention(row, row, row, need_weights=False)
        result: torch.Tensor = self.norm(x + mixed.squeeze(0))
        return result


class Encodes(torch.nn.Module):
    """torch's encoder, whose layers use the tensors of all that is in them."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [n, WIDTH]. Returns: [n, WIDTH]."""
        result: torch.Tensor = self.encoder(x.unsqueeze(0)).squeeze(0)
        return result


class Ties(torch.nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.into = torch.nn.Linear(WIDTH, WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH)
        self.out.weight = self.into.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [n, WIDTH]. Returns: [n, WIDTH]."""
        result: torch.Tensor = self.out(self.into(x).relu())
        return result


class OwnTensors(torch.nn.Module):
    """Has a parameter and a computed buffer beside its children, and uses one child twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(WIDTH))
        self.child = torch.nn.Linear(WIDTH, WIDTH)
        self.again = self.child
        self.register_buffer("steps", torch.arange(float(WIDTH)), persistent=False)
        self.steps: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [n, WIDTH]. Returns: [n, WIDTH]."""
        result: torch.Tensor = self.again(self.child(x * self.scale) + self.steps)
        return result


class Lists(torch.nn.Module):
    """Its tensors are in a list and a dict, and so are its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = torch.nn.ParameterList([torch.ones(WIDTH) for _ in range(2)])
        self.shifts = torch.nn.ParameterDict({"a": torch.ones(WIDTH)})
        self.layers = torch.nn.ModuleDict(
            {"a": torch.nn.Linear(WIDTH, WIDTH), "b": torch.nn.Linear(WIDTH, WIDTH)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [n, WIDTH]. Returns: [n, WIDTH]."""
        x = x * self.scales[0] + self.shifts["a"]
        result: torch.Tensor = self.layers["a"](x) + self.layers["b"](x) * self.scales[1]
        return result


class Recurrent(torch.nn.Module):
    """torch's recurrent modules keep a list of their weights beside the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = torch.nn.RNN(WIDTH, 6, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(6, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [n, WIDTH]. Returns: [n, WIDTH]."""
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            x.unsqueeze(0), torch.tensor([len(x)]), batch_first=True
        )
        made, _ = self.recurrent(packed)
        padded, _ = torch.nn.utils.rnn.pad_packed_sequence(made, batch_first=True)
        result: torch.Tensor = self.head(padded.squeeze(0))
        return result


def normed() -> torch.nn.Module:
    """Its first weight is computed from two parameters whenever it is used.

    torch makes a cycle of such a module: only the collector frees it.
    """
    linear = torch.nn.Linear(WIDTH, WIDTH)
    torch.nn.utils.parametrizations.weight_norm(linear)
    return torch.nn.Sequential(linear, torch.nn.Tanh(), torch.nn.Linear(WIDTH, WIDTH))


class FailsInside(torch.nn.Module):
    """Fails in a child, after that has got its tensors, if the first number is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.second = _Fails()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [n, WIDTH]. Returns: [n, WIDTH]."""
        result: torch.Tensor = self.second(self.first(x), x)
        return result


class _Fails(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, original: torch.Tensor | None = None) -> torch.Tensor:
        made = super().forward(x)
        if original is not None and original.flatten()[0] < 0:
            raise ArithmeticError("asked to fail")
        return made


class Wide(torch.nn.Module):
    """Two layers of any size.

    Args:
        size_bytes: of the weight of each; a multiple of 4 * WIDTH.
    """

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        rows = size_bytes // (4 * WIDTH)
        self.into = torch.nn.Linear(WIDTH, rows, bias=False)
        self.out = torch.nn.Linear(rows, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [n, WIDTH]. Returns: [n, WIDTH]."""
        result: torch.Tensor = self.out(self.into(x).tanh())
        return result


class Mixes(torch.nn.Module):
    """Uses the weight of a layer itself, where no hook sees it: it cannot be cut there."""

    def __init__(self) -> None:
        super().__init__()
        self.called = torch.nn.Linear(WIDTH, WIDTH)
        self.used = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [n, WIDTH]. Returns: [n, WIDTH]."""
        return torch.nn.functional.linear(self.called(x), self.used.weight)


MIXES = f"{__name__}:Mixes"
WIDE = f"{__name__}:Wide"
FACTORIES = tuple(
    f"{__name__}:{name}"
    for name in (
        "chain",
        "Residual",
        "Attends",
        "Encodes",
        "Ties",
        "OwnTensors",
        "Lists",
        "Recurrent",
        "normed",
        "FailsInside",
    )
)
"""Those that answer wherever they are cut. To be put among the allowed factories."""


def make_factory_model(folder: Path, factory: str, *, seed: int, **options: int) -> Path:
    """Makes the weights of what a factory here makes, of tied ones one."""
    folder.mkdir(parents=True, exist_ok=True)
    module_name, _, name = factory.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = getattr(importlib.import_module(module_name), name)(**options)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    kept: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        kept.setdefault(id(tensor), (name, tensor.detach()))
    save_file(dict(kept.values()), folder / "model.safetensors")
    return folder


def cut(
    structure: Structure,
    *,
    home: int,
    over: Sequence[int],
    by: Literal["blocks", "units", "tensors"] = "blocks",
) -> Target:
    """A target that deals a model out to devices in turn, and what is left to the home device.

    Args:
        structure: of the model.
        home: position of the home device.
        over: positions of the devices, in turn.
        by: what is dealt out. "units" and "tensors" cut modules that should better stay whole.
    """
    groups: Sequence[tuple[str, ...]]
    if by == "tensors":
        groups = [part.names for part in structure.tensors]
    else:
        groups = [(path,) for path in (structure.blocks if by == "blocks" else structure.units)]
    parts = {"": home}
    for index, prefixes in enumerate(groups):
        for prefix in prefixes:
            parts[prefix] = over[index % len(over)]
    return Target(home=home, parts=tuple(parts.items()))


def place_of(target: Target, names: Mapping[int, str]) -> Place:
    """The target on devices that torch knows by some names."""
    return Place(target=target, torch_devices={device: names[device] for device in target.devices})


def charges(structure: Structure, place: Place) -> dict[int, int]:
    """Bytes that each device of a place must be charged for a model."""
    target = place.target
    disk = frozenset(device for device, name in place.torch_devices.items() if name == DISK)
    sizes = dict.fromkeys(target.devices, 0)
    for part in structure.tensors:
        sizes[resident_device(target, part, disk)] += part.size_bytes
    sizes[target.home] += staging_bytes(structure, target, disk)
    return sizes
