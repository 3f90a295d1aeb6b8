"""Where a Hugging Face model goes when both its keyword arguments and a device say so.

One rule, as in Haystack: what stands in the keyword arguments beats the device given beside them,
because whoever writes backend arguments wants the backend to have them. The two functions differ in
what counts as said, because the two callees do:

* ``transformers.pipeline(device=..., device_map=...)``: either key being present, even as None.
  A caller who writes ``device=None`` leaves the choice to transformers.
* ``from_pretrained(device_map=...)``: a ``device_map`` with content. None and an empty map are how
  these arguments say "no wish", so the device is used. The number 0 is content: it is GPU 0
  (Haystack takes it for nothing).

Both return a new dict and leave the caller's alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from modelyard.devices import AvailabilityProbe, DeviceLike, resolve_device

__all__ = ["hf_model_kwargs", "hf_pipeline_kwargs"]

logger = logging.getLogger(__name__)


def hf_pipeline_kwargs(
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: DeviceLike = None,
    probe: AvailabilityProbe | None = None,
    environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return keyword arguments for ``transformers.pipeline`` that say where to run.

    Args:
        kwargs: the caller's arguments; not changed. ``device`` or ``device_map`` in them wins.
        device: a single device becomes the argument ``device``, a map ``device_map``. None chooses
            as ``resolve_device`` does.
        probe: as for ``resolve_device``.
        environ: as for ``resolve_device``.

    Raises:
        ValueError: ``device`` is no device, or a map with a cuda device without an id is needed.
    """
    resolved = resolve_device(device, probe=probe, environ=environ)
    return resolved.update_hf_kwargs(kwargs or {}, overwrite=False)


def hf_model_kwargs(
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: DeviceLike = None,
    probe: AvailabilityProbe | None = None,
    environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return keyword arguments for ``from_pretrained`` that say where to load.

    The key is always ``device_map``, which takes a single device too. A key ``device`` in the
    arguments is not looked at: ``from_pretrained`` knows no such argument.

    Args:
        kwargs: the caller's arguments; not changed. A ``device_map`` with content wins; if
            ``device`` is given as well, that is logged as a warning.
        device: used otherwise. None chooses as ``resolve_device`` does.
        probe: as for ``resolve_device``.
        environ: as for ``resolve_device``.

    Raises:
        ValueError: ``device`` is no device, or a map with a cuda device without an id is needed.
    """
    resolved = None if device is None else resolve_device(device)
    updated = dict(kwargs or {})
    if _has_content(updated.get("device_map")):
        if resolved is not None:
            logger.warning("device_map in the keyword arguments is used, device %s is not", device)
        return updated
    if resolved is None:
        resolved = resolve_device(None, probe=probe, environ=environ)
    updated["device_map"] = resolved.to_hf()
    return updated


def _has_content(device_map: object) -> bool:
    # Exactly int: False is no GPU.
    return bool(device_map) or (type(device_map) is int and device_map == 0)
