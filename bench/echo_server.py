"""The yardstick: a bare grpc.aio server that echoes, with nothing of modelyard in it but the stubs.

Two methods of one made-up service: `Raw` gives the request's bytes back unparsed, the least
grpc.aio can do; `Parsed` parses a PredictRequest and answers with a PredictResponse of its inputs,
the least a server that knows its messages can do.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from modelyard.v1 import inference_service_pb2 as pb

SERVICE = "bench.Echo"
"""Name of the service."""

_MOST_BYTES = 64 * 1024 * 1024


async def _raw(request: bytes, context: Any) -> bytes:
    return request


async def _parsed(request: pb.PredictRequest, context: Any) -> pb.PredictResponse:
    response = pb.PredictResponse()
    response.outputs.extend(request.inputs)
    return response


async def main() -> None:
    """Serves on a free port of loopback, prints it, and runs until it is killed."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", _MOST_BYTES),
            ("grpc.max_send_message_length", _MOST_BYTES),
        ]
    )
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                SERVICE,
                {
                    "Raw": grpc.unary_unary_rpc_method_handler(_raw),
                    "Parsed": grpc.unary_unary_rpc_method_handler(
                        _parsed,
                        request_deserializer=pb.PredictRequest.FromString,
                        response_serializer=pb.PredictResponse.SerializeToString,
                    ),
                },
            ),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"serving on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
