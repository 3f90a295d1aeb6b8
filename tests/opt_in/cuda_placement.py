"""The tests of placement on real CUDA devices. Nothing collects them by itself:

    MODELYARD_CUDA_TESTS=1 python -m pytest tests/opt_in/cuda_placement.py

They are those of test_parts_fakegpu.py and test_placement_fakegpu.py, but for the few that need
devices that count every byte. With one device only, a pool of host memory stands for the second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from tests.support.part_devices import CudaDevices
from tests.support.part_runs import PartsOnAccelerators
from tests.support.part_servers import ServersOnAccelerators

_VARIABLE = "MODELYARD_CUDA_TESTS"

pytestmark = [
    pytest.mark.skipif(os.environ.get(_VARIABLE) != "1", reason=f"{_VARIABLE} is not 1"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    # The first use of a device loads its kernels.
    pytest.mark.timeout(600),
]


@pytest.fixture
def accelerators() -> Iterator[CudaDevices]:
    # By default convolutions are rounded more than these tests allow.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield CudaDevices()


class TestPartsOnCuda(PartsOnAccelerators):
    """A runtime alone."""


class TestServersOnCuda(ServersOnAccelerators):
    """A whole server."""
