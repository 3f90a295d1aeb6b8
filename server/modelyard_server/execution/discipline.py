"""What a process that runs models does once, after its imports and before it serves.

Each of these is for the first request's sake, or for the neighbours of a load:

    warm_threads    The first operations of a thread make the state of torch's libraries for it.
                    Part of that is memory that never goes, so a baseline is taken afterwards.
    settle_process  Whoever computes gives the interpreter's lock up sooner; what the imports left
                    is looked at by the garbage collector for the last time (the first collection
                    after importing torch otherwise stops every thread for 0.2 s, in the middle of
                    somebody's load); and what they freed goes back to the system.

A server and each of its worker processes do both.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import sys
from collections.abc import Iterable
from functools import partial
from typing import Final

from modelyard_server.execution.freed_memory import give_back_freed
from modelyard_server.execution.lane import Lane
from modelyard_server.observability.process import ProcessMemory, read_process_memory

__all__ = [
    "SWITCH_INTERVAL_S",
    "ProcessMemory",
    "read_process_memory",
    "settle_process",
    "warm_thread",
    "warm_threads",
]

SWITCH_INTERVAL_S: Final = 0.0005
"""How long a thread keeps the interpreter's lock when others want it. Every operation of a model
asks for the lock again, so beside a thread of plain Python this is its latency (measured: 555 ms a
run at the default of 5 ms, 52 at this)."""


def settle_process() -> ProcessMemory:
    """Ends the start of this process, and returns what it holds now: the baseline.

    Can be called again after further imports. What is alive now is never looked at by the garbage
    collector again, so cycles of it stay for ever: models must not be loaded yet.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
    give_back_freed(())
    return read_process_memory()


async def warm_threads(lanes: Iterable[tuple[Lane, int]]) -> None:
    """Warms the threads of lanes, all at once, and waits until they have.

    Args:
        lanes: each with the number of intra-op threads that torch is to have in it.

    Raises:
        ValueError: a number of threads below 1; no thread has been touched then.
    """
    pairs = list(lanes)
    for _, threads in pairs:
        _check(threads)
    await asyncio.gather(*(lane.call(partial(warm_thread, threads)) for lane, threads in pairs))


def warm_thread(threads: int) -> None:
    """Makes the state that torch's libraries keep for the calling thread.

    Does nothing in a process that has not imported torch: it will not need it either.

    Args:
        threads: intra-op threads of torch in this thread, at least 1.

    Raises:
        ValueError: fewer.
    """
    _check(threads)
    if "torch" not in sys.modules:
        return
    # Somebody may be importing it right now: this waits until it is whole.
    torch = importlib.import_module("torch")
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    functional = torch.nn.functional
    with torch.inference_mode():
        # As in a small encoder: big enough that the libraries share it out among their threads.
        states = torch.ones(4, 64, 256)
        weights = torch.ones(256, 256)
        heads = functional.linear(states, weights).view(4, 64, 4, 64).transpose(1, 2)
        heads = functional.scaled_dot_product_attention(heads, heads, heads)
        states = functional.layer_norm(heads.transpose(1, 2).reshape(4, 64, 256), (256,))
        functional.gelu(states @ weights).softmax(dim=-1)


def _check(threads: int) -> None:
    if threads < 1:
        raise ValueError(f"a lane has at least 1 intra-op thread, got {threads}")
