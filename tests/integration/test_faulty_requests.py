"""Bad requests over a real channel: the specific error, and no model is touched."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support import tiny_models
from tests.support.bare_calls import (
    CREATE_MODEL,
    PREDICT,
    check_text,
    raw_tensor,
    request_of,
    send,
    send_refused,
    text_tensor,
)
from tests.support.config_text import CPU, ROOTS, device_table, model_table
from tests.support.faulty_yards import X, undisturbed
from tests.support.server import refusal_of, running_app

from modelyard import Admin, ResidencyState
from modelyard.v1 import inference_service_pb2, model_service_pb2, tensor_pb2

# Keys


@pytest.mark.parametrize("key", ["nobody", "Echo", "echo/", "a" * 256, "ECHO:1"])
async def test_an_unknown_key_is_not_found_and_evicts_nothing(tmp_path: Path, key: str) -> None:
    config = device_table("cpu", 1000) + model_table(
        "echo", "identity", options={"size_bytes": 1000}
    )
    async with running_app(config, tmp_path) as yard:
        await yard.client.predict("echo", "a")
        async with undisturbed(yard):
            refused = await send_refused(yard, PREDICT, request_of(key, text_tensor("a")))
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND")
        assert refused.resources == ["key"]
        assert len(refused.text) < 120
        assert not (await yard.client.predict("echo", "a")).served.cold
        stats = await yard.admin(Admin.stats)
        assert stats.error_counts == {"KEY_NOT_FOUND": 1}


@pytest.mark.parametrize(
    "key",
    ["", "../etc/passwd", "a..b", "-x", "/x", "a\0b", "a b", "ä", "\u202eb", "a\n", "a" * 65536],
)
async def test_what_can_be_no_key_is_an_invalid_field(tmp_path: Path, key: str) -> None:
    async with running_app(CPU + model_table("echo", "identity"), tmp_path) as yard:
        async with undisturbed(yard):
            refused = await send_refused(yard, PREDICT, request_of(key, text_tensor("a")))
        assert (refused.reason, refused.fields) == ("INVALID_FIELD", ["key"])
        check_text(refused.text, tmp_path)


# Tensors


def unknown_type() -> tensor_pb2.Tensor:
    kind: Any = 999
    return raw_tensor([1], b"\0", kind=kind)


CONTRADICTIONS: dict[str, tensor_pb2.Tensor] = {
    "too few bytes": raw_tensor([2], b"\0" * 7),
    "too many bytes": raw_tensor([2], b"\0" * 9),
    "no bytes": raw_tensor([2], b""),
    "a byte for none": raw_tensor([0], b"\0"),
    "negative": raw_tensor([-1], b"\0" * 4),
    "negative twice": raw_tensor([-2, -2], b"\0" * 16),
    "smallest": raw_tensor([-(2**63)], b""),
    "too large a dimension": raw_tensor([2**31], b"\0" * 4),
    "product overflows to 0": raw_tensor([2**30, 2**30, 2**30], b""),
    "product wraps to the right number": raw_tensor(
        [4194305, 211106198978564], b"\0" * 4, kind=tensor_pb2.DATA_TYPE_INT8
    ),
    "product wraps within the limits": raw_tensor(
        [65536, 65536, 65536, 65536, 3], b"", kind=tensor_pb2.DATA_TYPE_INT8
    ),
    "huge beside a zero": raw_tensor([0, 2**62], b""),
    "overflow beside a zero": raw_tensor([0, 2**31 - 1, 2**31 - 1, 2**31 - 1], b""),
    "nine dimensions": raw_tensor([1] * 9, b"\0" * 4),
    "thousands of dimensions": raw_tensor([1] * 5000, b"\0" * 4),
    "no type": raw_tensor([1], b"\0", kind=tensor_pb2.DATA_TYPE_UNSPECIFIED),
    "an unknown type": unknown_type(),
    "a bool that is neither": raw_tensor([2], b"\1\2", kind=tensor_pb2.DATA_TYPE_BOOL),
    "text in raw": raw_tensor([1], b"a", kind=tensor_pb2.DATA_TYPE_TEXT),
    "bytes in text": tensor_pb2.Tensor(
        data_type=tensor_pb2.DATA_TYPE_BYTES,
        shape=[1],
        text=tensor_pb2.TextElements(values=["a"]),
    ),
    "numbers in text": tensor_pb2.Tensor(
        data_type=tensor_pb2.DATA_TYPE_FLOAT32,
        shape=[1],
        text=tensor_pb2.TextElements(values=["1"]),
    ),
    "numbers in binary": tensor_pb2.Tensor(
        data_type=tensor_pb2.DATA_TYPE_FLOAT32,
        shape=[1],
        binary=tensor_pb2.BinaryElements(values=[b"\0\0\0\0"]),
    ),
    "one text for two": tensor_pb2.Tensor(
        data_type=tensor_pb2.DATA_TYPE_TEXT,
        shape=[2],
        text=tensor_pb2.TextElements(values=["a"]),
    ),
    "no text for one": tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_TEXT, shape=[1]),
}


async def test_tensors_that_contradict_themselves_touch_no_model(tmp_path: Path) -> None:
    config = CPU + model_table("echo", "identity", options={"size_bytes": 1000})
    async with running_app(config, tmp_path) as yard:
        async with undisturbed(yard):
            for case, tensor in CONTRADICTIONS.items():
                body = request_of("echo", text_tensor("good"), tensor)
                refused = await send_refused(yard, PREDICT, body)
                assert refused.code is grpc.StatusCode.INVALID_ARGUMENT, case
                assert refused.reason == "INVALID_TENSOR", case
                assert "inputs[1]" in refused.fields, case
                check_text(refused.text, tmp_path)
        assert (await yard.residency("echo")).state is ResidencyState.COLD
        stats = await yard.admin(Admin.stats)
        assert stats.error_counts == {"INVALID_TENSOR": len(CONTRADICTIONS)}


async def test_every_contradiction_of_a_request_is_told_at_once(tmp_path: Path) -> None:
    async with running_app(CPU + model_table("echo", "identity"), tmp_path) as yard:
        body = request_of(
            "echo", raw_tensor([1], b"", name="a"), raw_tensor([-1], b"", name="b"), unknown_type()
        )
        refused = await send_refused(yard, PREDICT, body)
        assert refused.fields == ["inputs[0]", "inputs[1]", "inputs[2]"]


async def test_inputs_must_be_there_and_have_distinct_names(tmp_path: Path) -> None:
    config = CPU + model_table("echo", "identity", options={"size_bytes": 1000})
    async with running_app(config, tmp_path) as yard, undisturbed(yard):
        for body in (
            request_of("echo"),
            request_of("echo", text_tensor("a"), text_tensor("b")),
            request_of("echo", *[raw_tensor([0], b"", name="x")] * 2),
        ):
            refused = await send_refused(yard, PREDICT, body)
            assert refused.reason == "INVALID_TENSOR"
            assert refused.fields == ["inputs"]


async def test_a_request_that_is_refused_as_invalid_loads_and_evicts_nobody(tmp_path: Path) -> None:
    """inference_service.proto: no INVALID_FIELD and no INVALID_TENSOR touches any model."""
    tiny_models.make_tiny_bert(tmp_path / "store" / "reader", seed=1, num_labels=2)
    config = device_table("cpu", "10MB") + ROOTS
    config += model_table("reader", "transformers", task="text-classification")
    config += model_table("echo", "identity", options={"size_bytes": 10_000_000})
    async with running_app(config, tmp_path) as yard:
        await yard.client.predict("echo", "a")
        async with undisturbed(yard):
            parameters = await refusal_of(
                yard.client.predict("reader", "the dog", parameters={"temprature": 1})
            )
            numbers = await refusal_of(yard.client.predict("reader", X))
        assert parameters.reason == "INVALID_FIELD"
        assert numbers.reason == "INVALID_TENSOR"


async def test_parameters_that_json_cannot_say_are_an_invalid_field(tmp_path: Path) -> None:
    async with running_app(CPU + model_table("echo", "identity"), tmp_path) as yard:
        for number in (float("inf"), float("-inf"), float("nan")):
            request = inference_service_pb2.PredictRequest(key="echo", inputs=[text_tensor("a")])
            request.parameters.fields["x"].number_value = number
            refused = await send_refused(yard, PREDICT, request.SerializeToString())
            assert refused.reason == "INVALID_FIELD"

            create = model_service_pb2.CreateModelRequest(model_id="other")
            create.model.runtime = "identity"
            create.model.options.fields["size_bytes"].number_value = number
            refused = await send_refused(yard, CREATE_MODEL, create.SerializeToString())
            assert refused.reason == "INVALID_FIELD"


async def test_parameters_of_any_depth_are_answered(tmp_path: Path) -> None:
    async with running_app(CPU + model_table("echo", "identity"), tmp_path) as yard:
        for depth in (10, 30, 33, 1000):
            inner = b""
            for _ in range(depth):
                # Struct{fields{key "a" value Value{struct_value ...}}}: a parser would stop at 100.
                value = b"\x2a" + varint(len(inner)) + inner
                entry = b"\x0a\x01a\x12" + varint(len(value)) + value
                inner = b"\x0a" + varint(len(entry)) + entry
            body = request_of("echo", text_tensor("a")) + b"\x1a" + varint(len(inner)) + inner
            refused = await send_refused(yard, PREDICT, body)
            assert refused.reason == "INVALID_FIELD", depth
        await yard.client.predict("echo", "a")


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


# Messages


async def test_what_is_no_message_is_an_invalid_field(tmp_path: Path) -> None:
    async with running_app(CPU + model_table("echo", "identity"), tmp_path) as yard:
        methods = [
            PREDICT,
            CREATE_MODEL,
            "/modelyard.v1.ModelService/ListModels",
            "/modelyard.v1.DeviceService/UpdateBudget",
            "/modelyard.v1.ResidencyService/LoadModel",
            "/modelyard.v1.AdminService/GetStats",
        ]
        async with undisturbed(yard):
            for method in methods:
                for garbage in (
                    b"\xff" * 40,
                    os.urandom(64) + b"\xff",
                    b"\x0a\xff\xff\xff\xff\x0f",
                ):
                    refused = await send_refused(yard, method, garbage)
                    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT, method
                    assert refused.reason == "INVALID_FIELD"
            # A key that is no UTF-8.
            refused = await send_refused(yard, PREDICT, b"\x0a\x02\xc0\xaf")
            assert refused.reason == "INVALID_FIELD"
        await yard.client.predict("echo", "a")


async def test_a_message_above_the_limit_is_refused_and_one_at_the_limit_is_not(
    tmp_path: Path,
) -> None:
    config = '[server]\nmax_message_bytes = "64KiB"\n' + CPU + model_table("echo", "identity")
    async with running_app(config, tmp_path) as yard:

        def of_size(size: int) -> bytes:
            kind = tensor_pb2.DATA_TYPE_UINT8
            length = size - 100
            body = b""
            while len(body) != size:
                length += size - len(body) if body else 0
                body = request_of("echo", raw_tensor([length], bytes(length), kind=kind))
            return body

        limit = 64 * 1024
        for size in (limit + 1, 10 * limit, 1000 * limit):
            refused = await send_refused(yard, PREDICT, of_size(size))
            assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        for size in (limit - 1, limit):
            await send(yard, PREDICT, of_size(size))
        assert (await yard.client.predict("echo", "a")).only == ["a"]


async def test_unknown_methods_and_services_are_unimplemented(tmp_path: Path) -> None:
    async with running_app(CPU + model_table("echo", "identity"), tmp_path) as yard:
        for method in (
            "/modelyard.v1.InferenceService/Predictt",
            "/modelyard.v1.Nobody/Predict",
            "/x",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        ):
            refused = await send_refused(yard, method, b"")
            assert refused.code is grpc.StatusCode.UNIMPLEMENTED
            assert "/" not in refused.text.replace(method, "")


async def test_what_is_no_http2_disturbs_nobody(tmp_path: Path) -> None:
    async with running_app(CPU + model_table("echo", "identity"), tmp_path) as yard:
        host, _, port = yard.target.partition(":")
        for opening in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 1000, os.urandom(1000)):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(opening)
            async with asyncio.timeout(10):
                while await reader.read(1000):
                    pass
            writer.close()
            assert (await yard.client.predict("echo", "a")).only == ["a"]
