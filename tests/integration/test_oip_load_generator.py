"""What Triton's load generator asks of a server, call by call, against a server of its own process.

The generator itself is a binary that cannot be had everywhere; these are its calls: metadata, then
configuration, of which it wants every input and output among the metadata; the server's extensions;
statistics before and after each window, by name and of all models, which must only grow; and
between them requests, one at a time, many at a time, and over a stream.
"""

from __future__ import annotations

import json
import queue
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import numpy as np
import pytest
import pytest_asyncio
import tritonclient.grpc as triton
from google.protobuf import json_format
from tests.support.config_text import ALLOWED, CPU, ROOTS, model_table
from tests.support.faulty_models import factory, make_weights
from tests.support.server import server_process
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import triton_to_np_dtype

pytestmark = pytest.mark.asyncio(loop_scope="module")

WINDOW: Final = 20
"""Requests of a window."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    base = tmp_path_factory.mktemp("oip-load")
    make_weights(base / "store" / "sums")
    config = "".join(
        [
            CPU,
            ROOTS,
            ALLOWED,
            model_table("echo", "identity"),
            model_table("sums", "torch", options={"factory": factory("Adding"), "batch": True}),
            '[engine]\nkind = "thread"\n',
        ]
    )
    async with server_process(config, base) as server:
        yield server.target


@pytest.fixture
def client(target: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(target) as made:
        yield made


def generated(tensor: Any, shape: list[int]) -> Any:
    """An input as the generator makes one: of the metadata's type, and of the shape it is told."""
    made = triton.InferInput(tensor.name, shape, tensor.datatype)
    made.set_data_from_numpy(np.ones(shape, triton_to_np_dtype(tensor.datatype)))
    return made


class Generator:
    """Its view of a server and a model."""

    def __init__(self, client: Any, name: str, shape: list[int]) -> None:
        self.client = client
        self.name = name
        self.metadata = client.get_model_metadata(name)
        # It reads the configuration as JSON, with what is not set as its default.
        self.config = json.loads(
            json_format.MessageToJson(
                client.get_model_config(name).config,
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
        )
        self.inputs = [generated(tensor, shape) for tensor in self.metadata.inputs]
        self.outputs = [triton.InferRequestedOutput(each.name) for each in self.metadata.outputs]

    def statistics(self, name: str) -> dict[tuple[str, str], Any]:
        """Statistics by name and version, checked as far as the generator trusts in them."""
        found = {}
        for entry in self.client.get_inference_statistics(name).model_stats:
            figures = entry.inference_stats
            parts = figures.queue.ns + figures.compute_input.ns
            parts += figures.compute_infer.ns + figures.compute_output.ns
            assert parts <= figures.success.ns
            found[entry.name, entry.version] = entry
        return found

    def answered(self, name: str) -> int:
        """Requests that the model has answered so far, as it reads them from the statistics."""
        key = (self.name, self.metadata.versions[0])
        return int(self.statistics(name)[key].inference_stats.success.count)

    def check(self, result: Any) -> None:
        """Checks that an answer has every output."""
        for output in self.metadata.outputs:
            assert result.as_numpy(output.name) is not None


MODELS: Final = [("echo", [4]), ("sums", [1, 4])]


@pytest.fixture(params=MODELS, ids=[name for name, _ in MODELS])
def generator(client: Any, request: pytest.FixtureRequest) -> Generator:
    return Generator(client, *request.param)


async def test_its_view_of_the_model_holds_together(generator: Generator) -> None:
    config, metadata = generator.config, generator.metadata
    assert config["max_batch_size"] == 0
    for kind, described in (("input", metadata.inputs), ("output", metadata.outputs)):
        assert config[kind]
        names = {tensor.name for tensor in described}
        assert all(each["name"] in names for each in config[kind])
    assert all(each["is_shape_tensor"] is False for each in config["input"])
    assert all(each["optional"] is False for each in config["input"])
    assert config["response_cache"]["enable"] is False
    assert config["model_transaction_policy"]["decoupled"] is False
    assert "sequence_batching" not in config and "ensemble_scheduling" not in config
    assert "statistics" in generator.client.get_server_metadata().extensions


async def test_shared_memory_is_cleared_before_it_would_be_used(generator: Generator) -> None:
    generator.client.unregister_system_shared_memory()
    generator.client.unregister_cuda_shared_memory()


async def test_windows_of_requests_one_at_a_time(generator: Generator) -> None:
    for name in (generator.name, ""):
        before = generator.answered(name)
        for i in range(WINDOW):
            result = generator.client.infer(
                generator.name,
                generator.inputs,
                model_version="",
                request_id=str(i),
                outputs=generator.outputs,
            )
            assert result.get_response().id == str(i)
            generator.check(result)
        assert generator.answered(name) == before + WINDOW


async def test_windows_of_requests_at_the_same_time(generator: Generator) -> None:
    before = generator.answered(generator.name)
    got: queue.Queue[Any] = queue.Queue()
    for i in range(WINDOW):
        generator.client.async_infer(
            generator.name,
            generator.inputs,
            callback=lambda result, error: got.put(error or result),
            request_id=str(i),
            outputs=generator.outputs,
        )
    results = [got.get(timeout=30) for _ in range(WINDOW)]
    for result in results:
        generator.check(result)
    assert {result.get_response().id for result in results} == set(map(str, range(WINDOW)))
    assert generator.answered(generator.name) == before + WINDOW


async def test_windows_of_requests_over_a_stream(generator: Generator) -> None:
    before = generator.answered("")
    got: queue.Queue[Any] = queue.Queue()
    generator.client.start_stream(lambda result, error: got.put(error or result))
    for i in range(WINDOW):
        generator.client.async_stream_infer(
            generator.name,
            generator.inputs,
            request_id=str(i),
            outputs=generator.outputs,
            enable_empty_final_response=True,
        )
    results = [got.get(timeout=30) for _ in range(WINDOW)]
    generator.client.stop_stream()
    finals = [
        result.get_response().parameters["triton_final_response"].bool_param for result in results
    ]
    assert finals == [True] * WINDOW
    for result in results:
        generator.check(result)
    assert generator.answered("") == before + WINDOW


async def test_statistics_of_a_model_that_was_never_asked_are_there(client: Any) -> None:
    (entry,) = client.get_inference_statistics("echo").model_stats
    # Presence, not only zeros: it tells an absent entry from an empty one.
    assert all(
        entry.inference_stats.HasField(field.name) for field in pb.InferStatistics.DESCRIPTOR.fields
    )
