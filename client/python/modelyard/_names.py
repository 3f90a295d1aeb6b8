"""Names of resources, from whatever callers write."""

from __future__ import annotations

from modelyard.devices import Device

__all__ = [
    "device_name",
    "device_text",
    "link_name",
    "model_id",
    "model_name",
    "route_id",
    "route_name",
]


def device_name(device: Device | str) -> str:
    """Return the resource name of a device.

    Args:
        device: a ``Device``, its text (``cuda:1``), its id (``cuda-1``) or its resource name.

    Raises:
        TypeError: anything else.
        ValueError: the text is empty.
    """
    if not isinstance(device, Device | str):
        raise TypeError(f"device must be a Device or a str, got {type(device).__name__}")
    text = str(device)
    if not text:
        raise ValueError("device is empty: give for instance 'cpu' or 'cuda:1'")
    return text if text.startswith("devices/") else f"devices/{text.replace(':', '-')}"


def device_text(name: str) -> str:
    """Return how people write the device of a resource name: ``devices/cuda-1`` is ``cuda:1``."""
    return name.rpartition("/")[2].replace("-", ":")


def model_id(model: str) -> str:
    """Return the id of a model that is given by its id or resource name.

    Raises:
        TypeError: no str.
    """
    if not isinstance(model, str):
        raise TypeError(f"model must be a str, got {type(model).__name__}")
    return model.removeprefix("models/")


def model_name(model: str) -> str:
    """Return the resource name of a model. Raises as ``model_id``."""
    return f"models/{model_id(model)}"


def route_id(route: str) -> str:
    """Return the id of a route that is given by its id or resource name.

    Raises:
        TypeError: no str.
    """
    if not isinstance(route, str):
        raise TypeError(f"route must be a str, got {type(route).__name__}")
    return route.removeprefix("routes/")


def route_name(route: str) -> str:
    """Return the resource name of a route. Raises as ``route_id``."""
    return f"routes/{route_id(route)}"


def link_name(target: str) -> str:
    """Return the resource name of a model or route; a bare id is a model's.

    Raises:
        TypeError: no str.
    """
    if not isinstance(target, str):
        raise TypeError(f"what a route leads to must be a str, got {type(target).__name__}")
    return target if "/" in target else model_name(target)
