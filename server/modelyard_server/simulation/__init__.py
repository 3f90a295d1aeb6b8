"""The simulator: traces of requests through the server's own core, under a virtual clock.

``trace`` is what was wanted when; ``trace_files`` and ``families`` are where traces come from.
``machine`` is what they run on. ``serial_replay`` and ``timed_replay`` stand where the server
stands and let the core (``modelyard_server._core.Yard``) decide, so what they find is what the
server would do. ``baselines`` are other servers to compare with, ``bounds`` and ``offline`` what
somebody could do who knew the future. ``study`` runs them side by side, ``report`` and ``plot``
show what came of it.

Nothing here reads the time or draws from chance that was not given to it: a replay comes out the
same every time.
"""

from __future__ import annotations

from modelyard_server.simulation.families import FAMILIES, family_trace
from modelyard_server.simulation.machine import Machine, SimulationError
from modelyard_server.simulation.outcome import Outcome
from modelyard_server.simulation.serial_replay import replay_serially
from modelyard_server.simulation.timed_replay import replay_timed
from modelyard_server.simulation.trace import Trace, TraceError
from modelyard_server.simulation.trace_files import read_trace

__all__ = [
    "FAMILIES",
    "Machine",
    "Outcome",
    "SimulationError",
    "Trace",
    "TraceError",
    "family_trace",
    "read_trace",
    "replay_serially",
    "replay_timed",
]
