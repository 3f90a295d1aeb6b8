"""Modules for the torch runtime: functions that build one without weights.

An operator allow-lists them by their full name, for instance
"modelyard_server.demo.factories:crepe_full". The parameters' names are those of the published
checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["crepe_full", "crepe_tiny", "efficientnet_lite0"]


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 as the package efficientnet-lite-pytorch defines it.

    Input: pictures, float32 [n, 3, 224, 224], RGB scaled to [-1, 1]. Output: logits of the 1,000
    ImageNet classes, float32 [n, 1000].
    """
    # By name: the package has no annotations, and only the demo has it installed.
    package = importlib.import_module("efficientnet_lite_pytorch")
    network: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    return network.eval()


def crepe_full() -> nn.Module:
    """The pitch estimator CREPE, full size (22 million parameters); see `_build_crepe`."""
    return _build_crepe(capacity=32)


def crepe_tiny() -> nn.Module:
    """The pitch estimator CREPE, tiny size (half a million parameters); see `_build_crepe`."""
    return _build_crepe(capacity=4)


def _build_crepe(*, capacity: int) -> nn.Module:
    """CREPE: six convolutions over a frame of sound, then one linear layer (Kim et al. 2018).

    Input: frames of 1,024 samples at 16 kHz, each with mean 0 and deviation 1, float32 [n, 1024].
    Output: activations of 360 pitches, 20 cents apart, float32 [n, 360] in [0, 1].
    Every layer of the paper is convolution, ReLU, batch normalization, then halving by max
    pooling; its padding is that of "same" convolutions with an even kernel. `capacity` multiplies
    the channels.
    """
    from torch import Tensor, nn
    from torch.nn import functional as F

    channels = [1, *(capacity * width for width in (32, 4, 4, 4, 8, 16))]

    class Crepe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for number in range(1, 7):
                first = number == 1
                convolution = nn.Conv2d(
                    channels[number - 1],
                    channels[number],
                    kernel_size=(512 if first else 64, 1),
                    stride=(4 if first else 1, 1),
                )
                self.add_module(f"conv{number}", convolution)
                # Keras' default epsilon, with which the weights were trained.
                self.add_module(f"conv{number}_BN", nn.BatchNorm2d(channels[number], eps=1e-3))
            self.classifier = nn.Linear(4 * channels[-1], 360)

        def forward(self, frames: Tensor) -> Tensor:
            sound = frames[:, None, :, None]
            for number in range(1, 7):
                top, bottom = (254, 254) if number == 1 else (31, 32)
                sound = F.pad(sound, (0, 0, top, bottom))
                sound = F.relu(self.get_submodule(f"conv{number}")(sound))
                sound = self.get_submodule(f"conv{number}_BN")(sound)
                sound = F.max_pool2d(sound, (2, 1))
            # Time before channels: the order in which the linear layer was trained.
            flat = sound.squeeze(3).transpose(1, 2).flatten(start_dim=1)
            activations: Tensor = self.classifier(flat).sigmoid()
            return activations

    return Crepe().eval()
