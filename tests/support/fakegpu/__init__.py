"""Four devices that fail like real ones, on a machine that has none: fakegpu:0 to fakegpu:3.

A torch backend in C++. Its memory is host memory, but it belongs to one device and is counted to
the byte against that device's budget:

    gpu = load()
    gpu.set_budget(1, 4096)
    torch.empty(1025, device="fakegpu:1")  # torch.OutOfMemoryError, and nothing has leaked
    torch.ones(2, device="fakegpu:0") + torch.ones(2, device="fakegpu:1")  # RuntimeError:
    # Expected all tensors to be on the same device

Operators run on the CPU, over the same bytes, so results are the CPU's own. Everything is done when
a call returns: streams and events wait for nothing. This is for inference: gradients stop at
attention and recurrent layers (torch warns). What a real device has and this one has not: memory
that kernels take for their own use, rounding and fragmentation of memory, a cache of freed memory,
autocast, sparse and quantised tensors, pinned memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["NAME", "UNLIMITED_BYTES", "FakeGpu", "load"]

NAME = "fakegpu"
"""The type of the devices, as torch.device() takes it."""

UNLIMITED_BYTES = 2**63 - 1
"""The budget of a device that nobody has set."""

_BUILDS = Path(__file__).parents[3] / "build" / NAME
_loading = threading.Lock()


class FakeGpu:
    """The devices' memory. There is one set of devices a process; threads may share it.

    A device is named by its number, from 0. A number out of range raises IndexError.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name in ("budget_bytes", "used_bytes", "peak_bytes"):
            function = getattr(library, f"fakegpu_{name}")
            function.argtypes = [ctypes.c_int]
            function.restype = ctypes.c_uint64
        library.fakegpu_set_budget.argtypes = [ctypes.c_int, ctypes.c_uint64]
        library.fakegpu_set_budget.restype = None
        library.fakegpu_reset_peak.argtypes = [ctypes.c_int]
        library.fakegpu_reset_peak.restype = None
        self._library = library

    @property
    def device_count(self) -> int:
        """Number of devices."""
        return int(self._library.fakegpu_device_count())

    def set_budget(self, device: int, size_bytes: int) -> None:
        """Sets how many bytes the device has; what it holds beyond that stays until freed.

        Raises:
            ValueError: `size_bytes` is negative or above UNLIMITED_BYTES.
        """
        if not 0 <= size_bytes <= UNLIMITED_BYTES:
            raise ValueError(f"no budget: {size_bytes} bytes")
        self._library.fakegpu_set_budget(self._checked(device), size_bytes)

    def budget_bytes(self, device: int) -> int:
        """How many bytes the device has."""
        return int(self._library.fakegpu_budget_bytes(self._checked(device)))

    def used_bytes(self, device: int) -> int:
        """Bytes asked for and not yet freed."""
        return int(self._library.fakegpu_used_bytes(self._checked(device)))

    def peak_bytes(self, device: int) -> int:
        """The most that was used at once since the last `reset_peak`."""
        return int(self._library.fakegpu_peak_bytes(self._checked(device)))

    def reset_peak(self, device: int) -> None:
        """Makes what is used now the peak."""
        self._library.fakegpu_reset_peak(self._checked(device))

    def reset(self) -> None:
        """No budgets, and peaks that begin at what is used now: for every test its own."""
        for device in range(self.device_count):
            self.set_budget(device, UNLIMITED_BYTES)
            self.reset_peak(device)

    def _checked(self, device: int) -> int:
        if not 0 <= device < self.device_count:
            raise IndexError(f"no device {NAME}:{device}: there are {self.device_count}")
        return device


def load() -> FakeGpu:
    """Makes the devices known to torch and returns them; builds the library if that is needed.

    Built once for each version of torch and of the sources, into build/fakegpu; other processes
    wait meanwhile. That takes a minute or more, so a test that may be the first to call this
    must allow for it. Later calls return the same object at once.

    Raises:
        RuntimeError: the compiler failed (its words are in the message), or another backend
            already has the place in torch that this one needs.
    """
    with _loading:
        return _load_once()


@functools.cache
def _load_once() -> FakeGpu:
    import torch
    from torch.utils.backend_registration import rename_privateuse1_backend

    # Torch has one place for a backend from outside, and its name can be set once.
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in ("privateuseone", NAME):
        raise RuntimeError(f"torch already has the backend {taken}")
    gpu = FakeGpu(ctypes.CDLL(str(_built_library())))
    rename_privateuse1_backend(NAME)
    register: Callable[[str, ModuleType], None] = torch._register_device_module
    register(NAME, _device_module(gpu))
    return gpu


def _built_library() -> Path:
    import torch

    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for source in sorted([*folder.glob("*.?pp"), folder / "build.py"]):
        digest.update(source.read_bytes())
    key = f"torch-{torch.__version__}-{sys.implementation.cache_tag}-{digest.hexdigest()[:16]}"
    library = _BUILDS / f"{key}.so"
    if library.exists():
        return library
    _BUILDS.mkdir(parents=True, exist_ok=True)
    with (_BUILDS / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(library)
    return library


def _build(library: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="partial-", dir=_BUILDS))
    try:
        program = Path(__file__).with_name("build.py")
        done = subprocess.run(
            [sys.executable, "-P", str(program), str(folder)], capture_output=True, text=True
        )
        built = folder / f"{NAME}.so"
        if done.returncode != 0 or not built.exists():
            raise RuntimeError(f"{NAME} could not be built:\n{done.stdout}\n{done.stderr}")
        # At once or not at all: nobody may load half a library.
        built.replace(library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _device_module(gpu: FakeGpu) -> ModuleType:
    """What torch and transformers look for under torch.<backend>: torch.fakegpu."""
    import torch

    def index_of(device: Any) -> int:
        index = device if isinstance(device, int) or device is None else torch.device(device).index
        return torch.accelerator.current_device_index() if index is None else int(index)

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        budget = gpu.budget_bytes(index_of(device))
        return max(budget - gpu.used_bytes(index_of(device)), 0), budget

    module: Any = ModuleType(f"torch.{NAME}", "The devices of tests.support.fakegpu.")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = lambda: gpu.device_count
    module.current_device = lambda: index_of(None)
    module.set_device = lambda device: torch.accelerator.set_device_index(index_of(device))
    module.device = lambda device: torch.accelerator.device_index(index_of(device))
    module.synchronize = lambda device=None: None
    module.empty_cache = lambda: None
    module.mem_get_info = mem_get_info
    module.memory_allocated = lambda device=None: gpu.used_bytes(index_of(device))
    module.max_memory_allocated = lambda device=None: gpu.peak_bytes(index_of(device))
    module.reset_peak_memory_stats = lambda device=None: gpu.reset_peak(index_of(device))
    # Random numbers are the CPU's, which torch.manual_seed has seeded by itself.
    module._is_in_bad_fork = lambda: False
    module.manual_seed = lambda seed: None
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    registered: ModuleType = module
    return registered
