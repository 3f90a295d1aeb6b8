"""The two sides of a comparison: modelyard's devices and Haystack's, called the same way.

The classes have the same names and methods on both sides, so one operation runs on either. What is
spelled differently stands here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Protocol
from unittest import mock

import torch

from modelyard import devices as ours
from modelyard.hf_kwargs import hf_model_kwargs, hf_pipeline_kwargs

Available = Mapping[str, object]


class Library(Protocol):
    """What operations call. Classes are Any: the two sides share names, not types."""

    Device: Any
    DeviceMap: Any
    ComponentDevice: Any

    def union(self, *, single: bool, multiple: bool) -> Any:
        """A component device that holds these two of cpu and ``{"a": cpu}``."""

    def resolve(self, value: Any) -> Any:
        """The component device that stands for a caller's value."""

    def resolve_none(self, available: Available, switches: Mapping[str, str]) -> Any:
        """The automatic choice, given what is there and variables called HAYSTACK_*."""

    def pipeline_kwargs(self, device: Any, kwargs: dict[str, Any] | None) -> dict[str, Any]:
        """Arguments for ``transformers.pipeline`` on a machine that has only a cpu."""

    def model_kwargs(self, device: Any, kwargs: dict[str, Any] | None) -> dict[str, Any]:
        """Arguments for ``from_pretrained`` on a machine that has only a cpu."""


def _cpu_only(device_type: ours.DeviceType) -> bool:
    return False


class Modelyard:
    """Our side."""

    Device: Any = ours.Device
    DeviceMap: Any = ours.DeviceMap
    ComponentDevice: Any = ours.ComponentDevice

    def union(self, *, single: bool, multiple: bool) -> Any:
        return ours.ComponentDevice(
            single=ours.Device.cpu() if single else None,
            multiple=ours.DeviceMap({"a": ours.Device.cpu()}) if multiple else None,
        )

    def resolve(self, value: Any) -> Any:
        return ours.resolve_device(value)

    def resolve_none(self, available: Available, switches: Mapping[str, str]) -> Any:
        # The same switches under our name: Haystack's own variables mean nothing to us.
        return ours.resolve_device(
            None,
            probe=lambda device_type: bool(available.get(str(device_type), 0)),
            environ={
                name.replace("HAYSTACK_", "MODELYARD_", 1): text for name, text in switches.items()
            },
        )

    def pipeline_kwargs(self, device: Any, kwargs: dict[str, Any] | None) -> dict[str, Any]:
        return hf_pipeline_kwargs(kwargs, device=device, probe=_cpu_only, environ={})

    def model_kwargs(self, device: Any, kwargs: dict[str, Any] | None) -> dict[str, Any]:
        return hf_model_kwargs(kwargs, device=device, probe=_cpu_only, environ={})


class Haystack:
    """The installed haystack-ai."""

    def __init__(self) -> None:
        # Here and not above: only the differential tests need it.
        from haystack.utils import device as theirs

        self.Device: Any = theirs.Device
        self.DeviceMap: Any = theirs.DeviceMap
        self.ComponentDevice: Any = theirs.ComponentDevice

    def union(self, *, single: bool, multiple: bool) -> Any:
        return self.ComponentDevice(
            self.Device.cpu() if single else None,
            self.DeviceMap({"a": self.Device.cpu()}) if multiple else None,
        )

    def resolve(self, value: Any) -> Any:
        return self.ComponentDevice.resolve_device(value)

    def resolve_none(self, available: Available, switches: Mapping[str, str]) -> Any:
        modules = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
        others = {
            k: v for k, v in os.environ.items() if not k.endswith(("_MPS_ENABLED", "_XPU_ENABLED"))
        }
        with ExitStack() as patches:
            patches.enter_context(mock.patch.dict(os.environ, {**others, **switches}, clear=True))
            for name, module in modules.items():
                there = bool(available.get(name, 0))
                patches.enter_context(mock.patch.object(module, "is_available", return_value=there))
            return self.ComponentDevice.resolve_device(None)

    def pipeline_kwargs(self, device: Any, kwargs: dict[str, Any] | None) -> dict[str, Any]:
        # The components that did this have left haystack-ai; these are the two calls they made.
        resolved = self.resolve_none({}, {}) if device is None else self.resolve(device)
        updated: dict[str, Any] = resolved.update_hf_kwargs(kwargs or {}, overwrite=False)
        return updated

    def model_kwargs(self, device: Any, kwargs: dict[str, Any] | None) -> dict[str, Any]:
        raise NotImplementedError("left haystack-ai with 3.0: recorded in more_cases.json")
