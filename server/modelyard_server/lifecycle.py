"""Starting and stopping a server process."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sys

from modelyard_server.app import Application, ExtraMissing, build
from modelyard_server.catalog.store import StoreError
from modelyard_server.config import Config
from modelyard_server.devices.inventory import BudgetImpossible, DeviceMissing
from modelyard_server.devices.process_limit import headroom, process_limit_bytes
from modelyard_server.errors import Refusal
from modelyard_server.execution.discipline import (
    SWITCH_INTERVAL_S,
    ProcessMemory,
    settle_process,
)
from modelyard_server.execution.workers.keeper import NoWorker
from modelyard_server.observability.log import start_logging
from modelyard_server.transport.aio import PortInUse
from modelyard_server.transport.api import CannotListen
from modelyard_server.weights import store as weights_store

__all__ = ["EXIT_CANNOT_START", "run_server"]

logger = logging.getLogger(__name__)

EXIT_CANNOT_START = 2
"""Exit code of a server that could not start: its configuration or its port is not usable."""

_LAME_DUCK_S = 0.5
_GC_THRESHOLD = 20_000

# glibc's mallopt parameters.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_KEEP_BYTES = 64 * 1024 * 1024


def run_server(config: Config) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code.

    Prints one line with the address when it is ready, and one on standard error if it cannot start.
    """
    start_logging(config.server.log_level)
    prepare_process()
    try:
        return asyncio.run(_serve(config))
    except (
        *(PortInUse, CannotListen, DeviceMissing, BudgetImpossible, NoWorker),
        *(StoreError, weights_store.StoreError, Refusal, ExtraMissing),
    ) as error:
        print(f"modelyard: {error}", file=sys.stderr)
        return EXIT_CANNOT_START


def prepare_process() -> None:
    """Settings of the whole process that a server wants and a library must not make.

    The interpreter's switch interval: a thread that has computed waits for the lock for one
    interval for each thread that holds it; at the default of 5 ms that is the latency.

    The garbage collector: a request makes dozens of objects and no cycles, so looking for some
    every 700 objects is work for nothing.

    The allocator: messages of a megabyte are otherwise mapped and unmapped for each call, and the
    page faults of that cost more than everything else about them (measured: 3.8 ms a call against
    0.95).
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(_GC_THRESHOLD)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
    mallopt(_M_TRIM_THRESHOLD, 4 * _KEEP_BYTES)
    mallopt(_M_TOP_PAD, _KEEP_BYTES)


async def _serve(config: Config) -> int:
    app = build(config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        port = await app.start()
    except BaseException:
        await app.stop(_LAME_DUCK_S)
        raise
    baseline = settle_process()
    _warn_of_promises(app, baseline)
    if app.http is not None:
        print(f"modelyard serves HTTP on {_shown(config.http.host)}:{app.http.port}")
    print(f"modelyard is serving on {_shown(config.server.host)}:{port}", flush=True)
    await stop.wait()
    await _shut_down(app)
    return 0


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _warn_of_promises(app: Application, baseline: ProcessMemory) -> None:
    """Says it now if the budgets promise more host memory than there is for this server."""
    hosts = [device for device in app.devices if device.torch_device == "cpu"]
    runs = max((model.activation_bytes for model in app.catalog.models()), default=0)
    found = headroom(
        process_limit_bytes(),
        [device.budget_bytes for device in hosts],
        baseline.anonymous_bytes,
        runs,
        0 if app.host_tier is None else app.host_tier.budget_bytes,
    )
    if found.warning:
        logger.warning("%s", found.warning)


async def _shut_down(app: Application) -> None:
    """Tells everybody first, so that clients go elsewhere before calls are turned away."""
    logger.info("shutting down")
    await app.stop_being_healthy()
    await asyncio.sleep(_LAME_DUCK_S)
    if not await app.stop(app.config.server.shutdown_grace_s):
        # A thread that hangs in somebody's code cannot be ended, and would keep the process.
        logger.error("a model or a loader still runs; leaving it behind")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
    logger.info("stopped")
