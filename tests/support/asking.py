"""One face for both clients, and an answer for what they ask."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from modelyard.aio import AsyncClient
from modelyard.client import Client
from modelyard.prediction import Prediction
from modelyard.v1 import inference_service_pb2

__all__ = ["Asker", "echo"]

PredictRequest = inference_service_pb2.PredictRequest
PredictResponse = inference_service_pb2.PredictResponse


class Asker:
    """One face for both clients, so that every test holds for both."""

    def __init__(self, kind: str, address: str) -> None:
        self.kind = kind
        self.address = address
        self.clients: list[Client | AsyncClient] = []

    def client(self, **settings: Any) -> Client | AsyncClient:
        make: Any = Client if self.kind == "blocking" else AsyncClient
        client: Client | AsyncClient = make(self.address, **settings)
        self.clients.append(client)
        return client

    async def ask(
        self, client: Client | AsyncClient, key: str, inputs: Any, **rest: Any
    ) -> Prediction:
        if isinstance(client, AsyncClient):
            return await client.predict(key, inputs, **rest)
        return await asyncio.to_thread(client.predict, key, inputs, **rest)

    async def predict(self, key: str, inputs: Any, **rest: Any) -> Prediction:
        return await self.ask(self.client(), key, inputs, **rest)

    async def close(self) -> None:
        for client in self.clients:
            if isinstance(client, AsyncClient):
                await client.close()
            else:
                client.close()


def echo(request: PredictRequest, context: grpc.ServicerContext) -> PredictResponse:
    """A handler that answers with its inputs."""
    return PredictResponse(outputs=request.inputs)
