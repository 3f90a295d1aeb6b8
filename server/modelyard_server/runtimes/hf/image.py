"""Task image-classification, with preparation of images in plain torch.

The library's own image processors need torchvision or Pillow, which are not installed with the
server. What they do for the common models is a resize, a crop and an affine map per channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelyard_server.runtimes.api import JsonValue, ModelFilesError, Prepared
from modelyard_server.runtimes.batches import split_rows
from modelyard_server.runtimes.conversion import to_torch
from modelyard_server.runtimes.hf.model import BatchedModel, chunks
from modelyard_server.runtimes.hf.requests import image_of
from modelyard_server.runtimes.hf.text import classify
from modelyard_server.runtimes.options import OptionReader
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue
from modelyard_server.weights.model_config import read_json_object
from modelyard_server.weights.model_files import FolderLike
from modelyard_server.weights.storages import Spread

__all__ = ["ImageClassifier", "Preparation", "read_preparation"]

_PREPROCESSOR_FILE = "preprocessor_config.json"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_SIDE = 4_096
_MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of its filters, as the file holds them, by torch's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """How raw images become a model's input.

    Attributes:
        size: height and width to resize to, or None.
        shortest_edge: length of the shorter side to resize to, keeping the aspect, or None.
        mode: torch's name of the resizing filter.
        crop: height and width of the middle part that is kept, or None.
        scale: factor of each channel.
        shift: what is added to each channel afterwards.
    """

    size: tuple[int, int] | None
    shortest_edge: int | None
    mode: str
    crop: tuple[int, int] | None
    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Prepares raw images.

        Args:
            images: UINT8 [n, height, width, channels], n, height and width >= 1.

        Returns:
            FLOAT32 [n, channels, height', width'].
        """
        pixels = images.permute(0, 3, 1, 2).float()
        target = self._target(pixels.shape[-2], pixels.shape[-1])
        if target != tuple(pixels.shape[-2:]):
            filtered = self.mode != "nearest-exact"
            pixels = torch.nn.functional.interpolate(
                pixels, target, mode=self.mode, antialias=filtered
            )
            # A resized picture is a picture again: whole numbers from 0 to 255.
            pixels = pixels.round().clamp(0.0, 255.0)
        if self.crop is not None:
            pixels = _middle(pixels, *self.crop)
        channels = (1, len(self.scale), 1, 1)
        scale = torch.tensor(self.scale, device=pixels.device).view(channels)
        shift = torch.tensor(self.shift, device=pixels.device).view(channels)
        return pixels * scale + shift

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        if self.shortest_edge is None:
            return height, width
        short, long = min(height, width), max(height, width)
        longer = max(1, self.shortest_edge * long // short)
        if longer > _MAX_SIDE * 4:
            raise TensorError("", f"an image of {height} x {width} is too narrow for the model")
        return (self.shortest_edge, longer) if height <= width else (longer, self.shortest_edge)


def _middle(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    # Pictures smaller than the crop get a black border.
    down = max(0, height - pixels.shape[-2])
    across = max(0, width - pixels.shape[-1])
    if down or across:
        pixels = torch.nn.functional.pad(
            pixels, (across // 2, across - across // 2, down // 2, down - down // 2)
        )
    top = (pixels.shape[-2] - height) // 2
    left = (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def read_preparation(folder: FolderLike, *, channels: int) -> Preparation | None:
    """Reads preprocessor_config.json; None if there is none and only prepared images are taken.

    Args:
        folder: the model's folder.
        channels: of the model's images.

    Raises:
        ModelFilesError: it asks for something that is not done here, or makes no sense.
    """
    settings = read_json_object(folder, _PREPROCESSOR_FILE, max_bytes=_MAX_CONFIG_BYTES)
    if not settings:
        return None
    if settings.get("rescale_offset"):
        raise ModelFilesError(f"{_PREPROCESSOR_FILE}: rescale_offset is not supported")
    crop = None
    if settings.get("do_center_crop"):
        crop_height, crop_width, crop_edge = _size(settings, "crop_size", square=True)
        crop = (crop_height, crop_width) if crop_edge is None else (crop_edge, crop_edge)
    size, edge = None, None
    if settings.get("do_resize", True):
        # A bare number means the shorter side where a crop follows, and a square where none does.
        height, width, edge = _size(settings, "size", square=crop is None)
        if edge is None:
            size = (height, width)
        elif isinstance(settings.get("crop_pct"), float) and edge < 384:
            # ConvNeXt: resized a little larger, then cropped to the size itself.
            if not 0.1 <= settings["crop_pct"] <= 1.0:
                raise ModelFilesError(f"{_PREPROCESSOR_FILE}: crop_pct is not from 0.1 to 1")
            crop = (edge, edge)
            edge = int(edge / settings["crop_pct"])
    mode = _MODES.get(settings.get("resample", 2))
    if mode is None:
        raise ModelFilesError(f"{_PREPROCESSOR_FILE}: its resample filter is not supported")
    factor = _number(settings, "rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1
    means, deviations = [0.0] * channels, [1.0] * channels
    if settings.get("do_normalize", True):
        means = _per_channel(settings, "image_mean", channels)
        deviations = _per_channel(settings, "image_std", channels)
    if not all(deviations):
        raise ModelFilesError(f"{_PREPROCESSOR_FILE}: image_std holds a zero")
    return Preparation(
        size=size,
        shortest_edge=edge,
        mode=mode,
        crop=crop,
        scale=tuple(factor / deviation for deviation in deviations),
        shift=tuple(-mean / deviation for mean, deviation in zip(means, deviations, strict=True)),
    )


def _size(
    settings: Mapping[str, JsonValue], key: str, *, square: bool
) -> tuple[int, int, int | None]:
    """Height and width, or (0, 0, length of the shorter side)."""
    value = settings.get(key)
    height: JsonValue = 0
    width: JsonValue = 0
    edge: JsonValue = None
    if isinstance(value, dict) and {"height", "width"} <= value.keys():
        height, width = value["height"], value["width"]
    elif isinstance(value, dict) and value.keys() == {"shortest_edge"}:
        edge = value["shortest_edge"]
    elif isinstance(value, list) and len(value) == 2:
        height, width = value
    elif square:
        height = width = value
    else:
        edge = value
    for side in (height, width) if edge is None else (edge,):
        if type(side) is not int or not 1 <= side <= _MAX_SIDE:
            raise ModelFilesError(
                f"{_PREPROCESSOR_FILE}: {key} is not a size from 1 to {_MAX_SIDE}"
            )
    return height, width, edge


def _number(settings: Mapping[str, JsonValue], key: str, default: float) -> float:
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelFilesError(f"{_PREPROCESSOR_FILE}: {key} is not a number")
    return float(value)


def _per_channel(settings: Mapping[str, JsonValue], key: str, channels: int) -> list[float]:
    values = settings.get(key, 0.5)
    items = values if isinstance(values, list) else [values] * channels
    if len(items) != channels:
        raise ModelFilesError(f"{_PREPROCESSOR_FILE}: {key} does not have {channels} numbers")
    return [_number({key: item}, key, 0.0) for item in items]


class ImageClassifier(BatchedModel):
    """Classes of images.

    Input: UINT8 [n, height, width, channels], prepared as preprocessor_config.json says, or FLOAT32
    [n, channels, height, width], taken as it is. Outputs: those of text-classification.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        spread: Spread,
        preparation: Preparation | None,
        *,
        batch_size: int,
    ) -> None:
        super().__init__(module, spread)
        self._preparation = preparation
        self._batch_size = batch_size
        config: Any = module.config
        self._channels = int(getattr(config, "num_channels", 3))
        side = getattr(config, "image_size", None)
        self._side: tuple[int, ...] | None = None
        if isinstance(side, int):
            self._side = (side, side)
        elif isinstance(side, list | tuple) and len(side) == 2:
            self._side = tuple(side)
        self._dtype: torch.dtype = next(module.parameters()).dtype

    def _prepare(self, inputs: Sequence[TensorValue], parameters: OptionReader) -> Prepared:
        parameters.finish()
        value = image_of(inputs, self._channels)
        self._check(value)
        # Pictures of one size alone: others would have to be resized before they are put together.
        return Prepared(
            key=(value.dtype, value.shape[1:]),
            rows=value.shape[0],
            row_bytes=math.prod(value.shape[1:]) * value.dtype.item_size,
            most_rows=self._batch_size,
            content=value,
        )

    def _answer_batch(self, requests: Sequence[Prepared]) -> list[tuple[TensorValue, ...]]:
        value: TensorValue = requests[0].content
        images = torch.cat([to_torch(request.content) for request in requests])
        logits = []
        of_one = self._size_in_own(value)
        for part in chunks(len(images), self._batch_size):
            with self._forward_pass(len(images[part]), of_one):
                logits.append(self._logits(images[part], is_raw=value.dtype is DType.UINT8))
        rows = [request.rows for request in requests]
        return split_rows(classify(torch.cat(logits), self._module.config), rows)

    def _logits(self, images: torch.Tensor, *, is_raw: bool) -> torch.Tensor:
        pixels = images.to(self._device)
        if is_raw and self._preparation is not None:
            pixels = self._preparation.apply(pixels)
        logits: torch.Tensor = self._module(pixel_values=pixels.to(self._dtype)).logits
        return logits

    def _size_in_own(self, value: TensorValue) -> int:
        """How many pictures of the model's own size one of these is as large as, rounded up."""
        if self._side is None:
            return 1
        height, width = value.shape[1:3] if value.dtype is DType.UINT8 else value.shape[2:]
        own = max(1, self._side[0] * self._side[1])
        return max(1, -(-height * width // own))

    def _check(self, value: TensorValue) -> None:
        shape = value.shape
        if value.dtype is DType.UINT8:
            if self._preparation is None:
                raise TensorError(
                    value.name,
                    "is a raw image, but the model has no preprocessor_config.json; send FLOAT32",
                )
            if shape[3] != self._channels:
                raise TensorError(
                    value.name, f"has {shape[3]} channels; the model takes {self._channels}"
                )
            return
        if shape[1] != self._channels or (self._side is not None and shape[2:] != self._side):
            side = "height, width" if self._side is None else ", ".join(map(str, self._side))
            raise TensorError(
                value.name,
                f"has shape {list(shape)}; the model takes [n, {self._channels}, {side}]",
            )
