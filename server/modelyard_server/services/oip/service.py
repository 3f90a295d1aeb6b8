"""The server's own methods, and all methods as handlers of the transport."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from modelyard_server.errors import Reason, Refusal
from modelyard_server.services.handler import unary
from modelyard_server.services.oip.infer import InferService
from modelyard_server.services.oip.messages import SERVICE, message
from modelyard_server.services.oip.models import ModelService
from modelyard_server.services.oip.repository import RepositoryService
from modelyard_server.services.oip.statistics import StatisticsService
from modelyard_server.transport.api import Call, Duplex, Handler, Handlers, Streaming

__all__ = ["EXTENSIONS", "REPOSITORY_SERVICE", "oip_handlers"]

EXTENSIONS: Final = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
)
"""What is true of this server; clients act on it."""

REPOSITORY_SERVICE: Final = "inference.model_repository.ModelRepositoryService"
"""Another server's name for the three methods of the repository. Its messages are the same on the
wire."""


def oip_handlers(
    *,
    infer: InferService,
    models: ModelService,
    statistics: StatisticsService,
    repository: RepositoryService,
    is_ready: Callable[[], bool],
    acting: Callable[[str], AbstractContextManager[None]],
) -> Handlers:
    """The handlers of every method of the protocol.

    Args:
        infer: answers requests.
        models: tells of models.
        statistics: tells what they have done.
        repository: loads and unloads them.
        is_ready: False once the server is shutting down.
        acting: Journal.acting.
    """

    def of(
        name: str, method: Callable[[Any, Call], Awaitable[Any]], *, acts: bool = False
    ) -> Handler:
        request = message(f"{name}Request")
        return unary(request, method, acting=acting if acts else None)

    async def server_live(request: Any, call: Call) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def server_ready(request: Any, call: Call) -> Any:
        return message("ServerReadyResponse")(ready=is_ready())

    async def server_metadata(request: Any, call: Call) -> Any:
        return message("ServerMetadataResponse")(
            name="modelyard", version=_version(), extensions=EXTENSIONS
        )

    loading = {
        "RepositoryIndex": of("RepositoryIndex", repository.repository_index),
        "RepositoryModelLoad": of(
            "RepositoryModelLoad", repository.repository_model_load, acts=True
        ),
        "RepositoryModelUnload": of(
            "RepositoryModelUnload", repository.repository_model_unload, acts=True
        ),
    }
    methods: dict[str, Handler | Streaming | Duplex] = {
        "ServerLive": of("ServerLive", server_live),
        "ServerReady": of("ServerReady", server_ready),
        "ServerMetadata": of("ServerMetadata", server_metadata),
        "ModelReady": of("ModelReady", models.model_ready),
        "ModelMetadata": of("ModelMetadata", models.model_metadata),
        "ModelConfig": of("ModelConfig", models.model_config),
        "ModelStatistics": of("ModelStatistics", statistics.model_statistics),
        "ModelInfer": infer.model_infer,
        "ModelStreamInfer": Duplex(infer.model_stream_infer),
        **loading,
        "TraceSetting": of("TraceSetting", _refusing("traces cannot be set by clients")),
        "LogSettings": of("LogSettings", _refusing("the log cannot be set by clients")),
    }
    for kind in ("System", "Cuda"):
        name = f"{kind}SharedMemory"
        methods[f"{name}Status"] = of(f"{name}Status", _answering(f"{name}StatusResponse"))
        methods[f"{name}Register"] = of(
            f"{name}Register",
            _refusing("shared memory is not served; send elements in the requests"),
        )
        methods[f"{name}Unregister"] = of(
            f"{name}Unregister", _answering(f"{name}UnregisterResponse")
        )
    return {SERVICE: methods, REPOSITORY_SERVICE: loading}


def _answering(name: str) -> Callable[[Any, Call], Awaitable[Any]]:
    """A method that answers that there is nothing."""

    async def answer(request: Any, call: Call) -> Any:
        return message(name)()

    return answer


def _refusing(text: str) -> Callable[[Any, Call], Awaitable[Any]]:
    """A method that is not served."""

    async def refuse(request: Any, call: Call) -> Any:
        raise Refusal(Reason.UNSUPPORTED, text)

    return refuse


def _version() -> str:
    try:
        return version("modelyard")
    except PackageNotFoundError:
        return "unknown"
