"""How a lane runs a model: one request alone, or several together that share what a pass costs.

Whatever goes wrong with a batch is the matter of one of its requests, and nobody can tell of which.
So they are run again, each alone, and the one that fails then fails alone. Memory is the exception:
it is the batch that was too large, so that is cut in two until it fits.

What a model raises becomes an outcome right here. Its traceback holds the frames that led to it,
and these hold the frames that called them: those of the lane, in which the whole batch lies.
"""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
from collections.abc import Mapping, Sequence

from modelyard_server.execution.engine import ModelFailed
from modelyard_server.runtimes.api import JsonValue, LoadedModel, OptionError, Prepared
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.tensors import TensorError, TensorValue

__all__ = ["ModelRun", "is_out_of_memory", "outcome_of", "set_threads"]

logger = logging.getLogger(__name__)

_Outcome = tuple[TensorValue, ...] | BaseException


class ModelRun:
    """One request to a model. In the lane's thread only.

    Args:
        loaded: the model.
        threads: of torch, for this lane's runs.
        inputs: of the request.
        parameters: of the request.

    Attributes:
        split_count: see Together.
    """

    __slots__ = ("_inputs", "_loaded", "_parameters", "_threads", "split_count")

    def __init__(
        self,
        loaded: LoadedModel,
        threads: int,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
    ) -> None:
        self._loaded = loaded
        self._threads = threads
        self._inputs = inputs
        self._parameters = parameters
        self.split_count = 0

    def run(self) -> tuple[TensorValue, ...]:
        """Runs it alone."""
        set_threads(self._threads)
        return self._loaded.run(self._inputs, self._parameters)

    def prepare(self) -> Prepared | BaseException | None:
        """See Together."""
        try:
            return self._loaded.prepare(self._inputs, self._parameters)
        except BaseException as error:  # it becomes the outcome
            return outcome_of(error)

    def run_batch(self, requests: Sequence[Prepared]) -> list[_Outcome]:
        """See Together."""
        set_threads(self._threads)
        self.split_count = 0
        return self._outcomes(requests)

    def _outcomes(self, requests: Sequence[Prepared]) -> list[_Outcome]:
        failure: BaseException
        try:
            answers = self._loaded.run_batch(requests)
            if len(answers) != len(requests):
                raise RuntimeError(f"{len(answers)} answers to {len(requests)} requests")
            return list(answers)
        except BaseException as error:  # it becomes the outcome of some of them
            failure = error
        if len(requests) == 1:
            outcome = outcome_of(failure)
            del failure  # It remembers this frame.
            return [outcome]
        # The frames hold what the batch was computed with; whoever runs next needs the room.
        forget_frames(failure)
        logger.info("a batch of %d failed (%s)", len(requests), type(failure).__name__)
        self.split_count += 1
        size = -(-len(requests) // 2) if is_out_of_memory(failure) else 1
        del failure
        outcomes: list[_Outcome] = []
        for begin in range(0, len(requests), size):
            outcomes += self._outcomes(requests[begin : begin + size])
        return outcomes


def outcome_of(error: BaseException) -> BaseException:
    """What the loop gets for what a model raised, without the frames that hold its tensors."""
    if isinstance(error, TensorError | OptionError):
        forget_frames(error)
        return error.with_traceback(None)
    if isinstance(error, ModelFailed) and error.__traceback__ is None:
        return error  # It is an outcome already.
    text = "".join(traceback.format_exception(error))
    forget_frames(error)
    return ModelFailed(type(error).__name__, text)


def set_threads(threads: int) -> None:
    """Sets torch's intra-op threads for work of this thread, where torch is used at all.

    A server of models without torch does not import it: its process stays a tenth of the size.
    """
    if "torch" not in sys.modules:
        return
    # Another lane's load may be importing it right now: this waits until it is whole.
    torch = importlib.import_module("torch")
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def is_out_of_memory(error: BaseException) -> bool:
    """True for all ways of saying so: torch's class for most accelerators, its text for others."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "can't allocate memory" in text or "backend out of memory" in text
