"""Bad input and faults over a real channel: the specific error, and nobody else is disturbed."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from safetensors.torch import save_file
from tests.support import faulty_models, tiny_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, device_table, model_table
from tests.support.server import RunningApp, eventually, refusal_of, running_app

from modelyard import (
    Admin,
    DeadlineExceeded,
    InvalidRequest,
    LoadFailed,
    ManagedDevice,
    ModelFailed,
    ModelNeverFits,
    ModelyardError,
    ResidencyState,
)
from modelyard.v1 import inference_service_pb2, model_service_pb2, tensor_pb2

X = np.ones(3, np.float32)
PREDICT = "/modelyard.v1.InferenceService/Predict"
CREATE_MODEL = "/modelyard.v1.ModelService/CreateModel"


def torch_model(name: str, factory: str, **factory_options: object) -> str:
    options: dict[str, object] = {"factory": faulty_models.factory(factory)}
    if factory_options:
        options["factory_options"] = factory_options
    return model_table(name, "torch", options=options)


class Refused(Exception):
    """What a bare call ended with."""

    def __init__(self, code: grpc.StatusCode, text: str, details: bytes) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text
        self.reason = ""
        self.fields: list[str] = []
        self.resources: list[str] = []
        status = status_pb2.Status.FromString(details)
        for packed in status.details:
            info = error_details_pb2.ErrorInfo()
            bad = error_details_pb2.BadRequest()
            resource = error_details_pb2.ResourceInfo()
            if packed.Unpack(info):
                assert info.domain == "modelyard"
                self.reason = info.reason
            elif packed.Unpack(bad):
                self.fields = [violation.field for violation in bad.field_violations]
            elif packed.Unpack(resource):
                self.resources.append(resource.resource_type)


async def send(
    yard: RunningApp, method: str, body: bytes, *, timeout_s: float | None = 10.0
) -> bytes:
    """Sends bytes as they are. Raises Refused."""
    rpc: Any = yard.channel.unary_unary(method)
    try:
        answer: bytes = await rpc(body, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        trailers: Any = error.trailing_metadata()
        details = dict(trailers or ()).get("grpc-status-details-bin", b"")
        raise Refused(error.code(), error.details() or "", details) from None
    return answer


async def send_refused(yard: RunningApp, method: str, body: bytes, **settings: Any) -> Refused:
    try:
        await send(yard, method, body, **settings)
    except Refused as refused:
        return refused
    raise AssertionError("the call was answered")


def request_of(key: str, *inputs: tensor_pb2.Tensor) -> bytes:
    return inference_service_pb2.PredictRequest(key=key, inputs=inputs).SerializeToString()


def check_text(text: str, base: Path) -> None:
    """What a client is told is short and says nothing of the inside."""
    assert len(text.encode()) <= 512
    for inside in (str(base), "Traceback", ".py", "/srv/private", "site-packages", "0x"):
        assert inside not in text


@asynccontextmanager
async def undisturbed(yard: RunningApp) -> AsyncIterator[None]:
    """Checks that nothing was loaded, evicted or is held that was not before."""

    async def state() -> tuple[object, ...]:
        devices = await yard.admin(Admin.list_devices)
        residencies = await yard.admin(Admin.list_residencies)
        return devices, residencies

    before = await state()
    yield
    await yard.at_rest()
    assert await state() == before


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


def text_tensor(*values: str) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(
        data_type=tensor_pb2.DATA_TYPE_TEXT,
        shape=[len(values)],
        text=tensor_pb2.TextElements(values=values),
    )


def raw_tensor(
    shape: list[int], raw: bytes, *, kind: Any = tensor_pb2.DATA_TYPE_FLOAT32, name: str = ""
) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(name=name, data_type=kind, shape=shape, raw=raw)


X_TENSOR = raw_tensor([1], b"\0" * 4)


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


# Files that are not what they seem


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def good_bytes(folder: Path) -> bytes:
    return (faulty_models.make_weights(folder) / "model.safetensors").read_bytes()


def damaged_files(base: Path) -> Iterator[tuple[str, bytes]]:
    """Contents of a model.safetensors that is none."""
    good = good_bytes(base / "good")
    header = int.from_bytes(good[:8], "little")
    yield "empty", b""
    yield "truncated in the data", good[:-1]
    yield "truncated in the header", good[: header // 2]
    yield "truncated in the length", good[:5]
    yield "longer than it says", good + b"\0"
    yield "absurd length", b"\xff" * 8 + good[8:]
    yield "corrupt header", good[:8] + b"\xff" * header + good[8 + header :]
    yield "zeros", bytes(len(good))
    canary = {"weight": torch.ones(4), "canary": Canary(base / "executed")}
    yield "pickle", pickle.dumps(canary)
    torch.save(canary, base / "zip")
    yield "zip of torch", (base / "zip").read_bytes()
    with zipfile.ZipFile(base / "plain", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(canary))
    yield "zip", (base / "plain").read_bytes()
    torch.save(canary, base / "legacy", _use_new_zipfile_serialization=False)
    yield "pickle of torch", (base / "legacy").read_bytes()
    yield "gguf", b"GGUF\x03\0\0\0" + b"\1\0\0\0\0\0\0\0" * 2 + b"\0" * 100
    yield "other names", named_bytes(base, {"wait": torch.ones(faulty_models.ROWS)})
    yield "another shape", named_bytes(base, {"weight": torch.ones(7)})


def named_bytes(base: Path, tensors: dict[str, torch.Tensor]) -> bytes:
    save_file(tensors, base / "named")
    return (base / "named").read_bytes()


@asynccontextmanager
async def yard_with(tmp_path: Path, config: str) -> AsyncIterator[RunningApp]:
    """A yard with the models "good" (torch, 4 KiB) and "echo", both resident."""
    faulty_models.make_weights(tmp_path / "store" / "good", value=2.0)
    config += ROOTS + ALLOWED + torch_model("good", "Adding")
    config += model_table("echo", "identity", options={"size_bytes": 1000})
    async with running_app(config, tmp_path) as yard:
        await yard.client.predict("good", X)
        await yard.client.predict("echo", X)
        yield yard
        # Whatever happened: the others are where they were and answer as they did.
        good, echo = await yard.client.predict("good", X), await yard.client.predict("echo", X)
        assert not good.served.cold
        assert not echo.served.cold
        np.testing.assert_array_equal(good.only, X + 2)


async def test_files_that_are_no_safetensors_fail_fast_and_alone(tmp_path: Path) -> None:
    files = dict(damaged_files(tmp_path))
    config = "[yard]\nbackoff_initial_s = 60\n" + CPU
    for index, content in enumerate(files.values()):
        folder = faulty_models.make_weights(tmp_path / "store" / f"bad-{index}")
        (folder / "model.safetensors").write_bytes(content)
        config += torch_model(f"bad-{index}", "Adding")
    async with yard_with(tmp_path, config) as yard:
        before = await yard.device()
        for index, case in enumerate(files):
            async with asyncio.timeout(1):
                error = await refusal_of(yard.client.predict(f"bad-{index}", X))
            assert isinstance(error, LoadFailed), (case, error)
            assert not error.transient, case
            assert error.retry_after_s is None, case
            check_text(str(error), tmp_path)
            residency = await yard.residency(f"bad-{index}")
            assert residency.state is ResidencyState.FAILED, case
            assert residency.charges == (), case
            assert residency.failure is not None
            assert residency.failure.attempt_count == 1
            check_text(residency.failure.message, tmp_path)
        after = await yard.device()
        assert (after.reserved_bytes, after.resident_bytes) == (0, before.resident_bytes)
        assert (after.load_count, after.eviction_count) == (before.load_count, 0)
        stats = await yard.admin(Admin.stats)
        assert stats.load_failure_count == len(files)
        assert stats.error_counts == {"LOAD_FAILED": len(files)}
    assert not (tmp_path / "executed").exists()


async def test_the_canary_would_have_been_seen(tmp_path: Path) -> None:
    """Negative control: who does unpickle it makes the file."""
    pickle.loads(pickle.dumps(Canary(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


async def test_a_failed_load_is_not_tried_again_before_its_time(tmp_path: Path) -> None:
    folder = faulty_models.make_weights(tmp_path / "store" / "bad", value=5.0)
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-1])
    config = "[yard]\nbackoff_initial_s = 0.5\n" + CPU + torch_model("bad", "Adding")
    async with yard_with(tmp_path, config) as yard:
        errors = [await refusal_of(yard.client.predict("bad", X)) for _ in range(5)]
        assert {type(error) for error in errors} == {LoadFailed}
        assert "next_attempt_in_ms" in errors[1].metadata
        residency = await yard.residency("bad")
        assert residency.failure is not None
        assert residency.failure.attempt_count == 1
        assert residency.failure.retry_at is not None

        # Repaired, and after the pause, it is tried again and works.
        (folder / "model.safetensors").write_bytes(good)

        async def works() -> bool:
            try:
                prediction = await yard.client.predict("bad", X)
            except LoadFailed:
                return False
            np.testing.assert_array_equal(prediction.only, X + 5)
            return True

        await eventually("the repaired model is served", works)
        residency = await yard.residency("bad")
        assert residency.state is ResidencyState.RESIDENT
        assert residency.failure is None
        assert residency.load_count == 1
        stats = await yard.admin(Admin.stats)
        assert stats.load_failure_count == 1


async def test_many_requests_for_a_broken_model_are_one_attempt(tmp_path: Path) -> None:
    folder = faulty_models.make_weights(tmp_path / "store" / "bad")
    (folder / "model.safetensors").write_bytes(b"")
    config = "[yard]\nbackoff_initial_s = 60\n" + CPU + torch_model("bad", "Adding")
    async with yard_with(tmp_path, config) as yard:
        errors = await asyncio.gather(
            *(refusal_of(yard.client.predict("bad", X)) for _ in range(30))
        )
        assert {error.reason for error in errors} == {"LOAD_FAILED"}
        stats = await yard.admin(Admin.stats)
        assert stats.load_failure_count == 1


async def test_a_missing_folder_keeps_no_other_model_from_being_served(tmp_path: Path) -> None:
    """docs/configuration.md: a missing model is no reason for the others not to start."""
    async with yard_with(tmp_path, CPU + torch_model("missing", "Adding")) as yard:
        error = await refusal_of(yard.client.predict("missing", X))
        assert isinstance(error, LoadFailed)
        check_text(str(error), tmp_path)


async def test_a_folder_that_became_a_link_out_of_its_root_is_not_followed(tmp_path: Path) -> None:
    inside = faulty_models.make_weights(tmp_path / "store" / "swapped")
    outside = faulty_models.make_weights(tmp_path / "outside", value=9.0)
    async with yard_with(tmp_path, CPU + torch_model("swapped", "Adding")) as yard:
        inside.rename(tmp_path / "elsewhere")
        (tmp_path / "store" / "swapped").symlink_to(outside)
        error = await refusal_of(yard.client.predict("swapped", X))
        assert isinstance(error, LoadFailed)
        check_text(str(error), tmp_path)


async def test_weights_behind_a_link_a_pipe_or_a_folder_are_refused(tmp_path: Path) -> None:
    outside = faulty_models.make_weights(tmp_path / "outside") / "model.safetensors"
    config = "[yard]\nbackoff_initial_s = 60\n" + CPU
    for kind in ("link", "pipe", "folder", "device"):
        folder = tmp_path / "store" / kind
        folder.mkdir(parents=True)
        weights = folder / "model.safetensors"
        match kind:
            case "link":
                weights.symlink_to(outside)
            case "pipe":
                os.mkfifo(weights)
            case "folder":
                weights.mkdir()
            case _:
                weights.symlink_to("/dev/zero")
        config += torch_model(kind, "Adding")
    async with yard_with(tmp_path, config) as yard:
        for kind in ("link", "pipe", "folder", "device"):
            async with asyncio.timeout(1):
                error = await refusal_of(yard.client.predict(kind, X))
            assert isinstance(error, LoadFailed), kind
            check_text(str(error), tmp_path)


async def test_configurations_that_reach_beyond_the_weights_are_refused(tmp_path: Path) -> None:
    config = "[yard]\nbackoff_initial_s = 60\n" + CPU
    changes: dict[str, dict[str, object]] = {
        "auto-map": {"auto_map": {"AutoModel": "evil.Model"}},
        "attention": {"_attn_implementation_internal": "someone/kernel"},
        "remote-code": {"trust_remote_code": True},
        "quantised": {"quantization_config": {"quant_method": "bitsandbytes"}},
        "nested": {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}},
        "unknown": {"model_type": "no-such-model"},
        "wide": {"hidden_size": 2**31},
        "deep": {"num_hidden_layers": 10**6},
        "negative": {"vocab_size": -1},
        "larger-than-its-weights": {"vocab_size": 2_000_000},
    }
    for name, change in changes.items():
        folder = tiny_models.make_tiny_bert(tmp_path / "store" / name, seed=1, num_labels=2)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        config += model_table(name, "transformers", task="text-classification")
    async with yard_with(tmp_path, config) as yard:
        for name in changes:
            error = await refusal_of(yard.client.predict(name, "the dog"))
            assert isinstance(error, LoadFailed), name
            assert not error.transient, name
            check_text(str(error), tmp_path)


async def test_a_model_larger_than_its_device_is_refused_with_the_numbers(tmp_path: Path) -> None:
    config = device_table("cpu", "1MB")
    config += model_table("huge", "identity", options={"size_bytes": 1_000_001})
    async with yard_with(tmp_path, config) as yard:
        async with undisturbed(yard):
            error = await refusal_of(yard.client.predict("huge", X))
            created = await refusal_of(
                yard.admin(
                    Admin.create_model, "other", runtime="identity", options={"size_bytes": 2**40}
                )
            )
            loaded = await refusal_of(yard.admin(Admin.load, "huge"))
            pinned = await refusal_of(yard.admin(Admin.pin, "huge"))
        for refusal, needed in ((error, 1_000_001), (created, 2**40), (loaded, 1_000_001)):
            assert isinstance(refusal, ModelNeverFits)
            assert refusal.device == "devices/cpu"
            assert refusal.needed_bytes == needed
            assert refusal.budget_bytes == 1_000_000
            assert [violation.field for violation in refusal.violations] == ["devices/cpu"]
        assert isinstance(pinned, ModelNeverFits)
        assert not (await yard.residency("huge")).pinned


# Models that misbehave


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("ValueError", "ValueError"),
        ("SystemExit", "SystemExit"),
        ("KeyboardInterrupt", "KeyboardInterrupt"),
        ("GeneratorExit", "GeneratorExit"),
        ("StopIteration", "StopIteration"),
        ("MemoryError", "MemoryError"),
        ("recursion", "RecursionError"),
    ],
)
async def test_a_model_that_raises_fails_alone_and_opaquely(
    tmp_path: Path, kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    faulty_models.make_weights(tmp_path / "store" / "raising")
    config = CPU + torch_model("raising", "Raising", kind=kind)
    async with yard_with(tmp_path, config) as yard:
        error = await refusal_of(yard.client.predict("raising", X))
        assert isinstance(error, ModelFailed)
        assert error.exception_type == name
        assert error.error_id is not None
        assert re.fullmatch(r"[0-9a-f]{12}", error.error_id)
        assert "secret" not in str(error) + str(error.metadata)
        check_text(str(error), tmp_path)
        again = await refusal_of(yard.client.predict("raising", X))
        assert isinstance(again, ModelFailed)
        assert again.error_id != error.error_id
        residency = await yard.residency("raising")
        # Its weights are all right: it stays, and can be taken out.
        assert residency.state is ResidencyState.RESIDENT
        assert residency.lease_count == 0
        unloaded = await yard.admin(Admin.unload, "raising")
        assert unloaded.state is ResidencyState.COLD
        assert unloaded.quarantined == ()
    (record,) = (record for record in caplog.records if error.error_id in record.getMessage())
    assert "Traceback" in record.getMessage()
    assert kind == "recursion" or "secret text" in record.getMessage()


@pytest.mark.parametrize(
    "kind",
    [
        "complex",
        "sparse",
        "quantised",
        "float8",
        "meta",
        "none",
        "text",
        "nothing",
        "numbered",
        "mixed",
    ],
)
# Quantised tensors are on their way out of torch; they must not take a server with them.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantiz.*")
async def test_answers_that_cannot_be_sent_are_the_models_failure(
    tmp_path: Path, kind: str
) -> None:
    faulty_models.make_weights(tmp_path / "store" / "odd")
    async with yard_with(tmp_path, CPU + torch_model("odd", "OddOutput", kind=kind)) as yard:
        error = await refusal_of(yard.client.predict("odd", X))
        assert isinstance(error, ModelFailed)
        check_text(str(error), tmp_path)
        assert (await yard.residency("odd")).lease_count == 0


async def test_a_constructor_that_hangs_at_registration_keeps_no_other_model_from_loading(
    tmp_path: Path,
) -> None:
    faulty_models.make_weights(tmp_path / "store" / "stuck")
    config = CPU + model_table("cold", "identity", options={"size_bytes": 1000})
    async with yard_with(tmp_path, config) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            options = {
                "factory": faulty_models.factory("StuckInLoad"),
                "factory_options": {"gate": str(tmp_path / "gate")},
            }
            creation = asyncio.create_task(
                yard.admin(
                    Admin.create_model,
                    "stuck",
                    runtime="torch",
                    root="store",
                    folder="stuck",
                    options=options,
                )
            )
            await eventually("the registration is stuck", gate.is_waited_at)
            try:
                assert (await yard.client.predict("cold", X, timeout_s=2)).served.cold
            finally:
                gate.open()
                await creation


# Clients that leave, and deadlines


def stuck_model(base: Path, factory: str) -> str:
    faulty_models.make_weights(base / "store" / "stuck", value=3.0)
    return torch_model("stuck", factory, gate=base / "gate")


async def test_a_client_that_leaves_while_it_waits_gives_its_ticket_back(tmp_path: Path) -> None:
    async with yard_with(tmp_path, CPU + stuck_model(tmp_path, "StuckInLoad")) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            waiters = [asyncio.create_task(yard.client.predict("stuck", X)) for _ in range(20)]
            await eventually("the load is stuck", gate.is_waited_at)

            async def waiting(count: int) -> bool:
                return (await yard.residency("stuck")).waiting_request_count == count

            await eventually("all wait", lambda: waiting(20))
            for waiter in waiters[:19]:
                waiter.cancel()
            await eventually("one waits", lambda: waiting(1))
            waiters[19].cancel()
            await eventually("nobody waits", lambda: waiting(0))
            # The load itself is not given up for it.
            assert (await yard.residency("stuck")).state is ResidencyState.LOADING
        await asyncio.gather(*waiters, return_exceptions=True)
        await yard.becomes("stuck", ResidencyState.RESIDENT)
        stats = await yard.admin(Admin.stats)
        assert stats.active_request_count == 0


async def test_the_last_client_that_leaves_a_queue_stops_the_load_from_beginning(
    tmp_path: Path,
) -> None:
    faulty_models.make_weights(tmp_path / "store" / "behind")
    config = CPU + stuck_model(tmp_path, "StuckInLoad") + torch_model("behind", "Adding")
    async with yard_with(tmp_path, config) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            await yard.admin(Admin.load, "stuck")
            await eventually("the load is stuck", gate.is_waited_at)
            waiter = asyncio.create_task(yard.client.predict("behind", X))
            await yard.becomes("behind", ResidencyState.QUEUED)
            waiter.cancel()
            await yard.becomes("behind", ResidencyState.COLD)
            await asyncio.gather(waiter, return_exceptions=True)
        await yard.becomes("stuck", ResidencyState.RESIDENT)
        assert (await yard.residency("behind")).load_count == 0


async def test_a_client_that_leaves_while_its_model_runs_keeps_it_in_use_until_it_ends(
    tmp_path: Path,
) -> None:
    async with yard_with(tmp_path, CPU + stuck_model(tmp_path, "StuckInRun")) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            call = asyncio.create_task(yard.client.predict("stuck", X))
            await eventually("the model runs", gate.is_waited_at)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

            async def server_knows() -> bool:
                stats = await yard.admin(Admin.stats)
                return stats.active_request_count == 0

            await eventually("the server knows that the client left", server_knows)
            assert (await yard.residency("stuck")).lease_count == 1

            unload = asyncio.create_task(yard.admin(Admin.unload, "stuck"))
            draining = await yard.becomes("stuck", ResidencyState.DRAINING)
            assert draining.lease_count == 1
            device = await yard.device()
            assert device.draining_bytes == 4 * faulty_models.ROWS
            assert not unload.done()
        unloaded = await unload
        assert unloaded.state is ResidencyState.COLD
        assert unloaded.lease_count == 0
        assert unloaded.quarantined == ()


async def test_work_that_nobody_waits_for_any_more_is_not_begun(tmp_path: Path) -> None:
    async with yard_with(tmp_path, CPU + stuck_model(tmp_path, "StuckInRun")) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            running = asyncio.create_task(yard.client.predict("stuck", X))
            await eventually("the model runs", gate.is_waited_at)
            behind = [
                await refusal_of(yard.client.predict("good", X, timeout_s=0.2)) for _ in range(3)
            ]
            assert {error.reason for error in behind} == {"DEADLINE_IN_RUN"}
            # Queued behind the one that runs, and counted until their turn has come.
            assert (await yard.residency("good")).lease_count == 3
        await running

        async def given_back() -> bool:
            return (await yard.residency("good")).lease_count == 0

        await eventually("their leases are back", given_back)


async def test_a_deadline_that_passes_while_the_model_runs_is_told_as_such(tmp_path: Path) -> None:
    async with yard_with(tmp_path, CPU + stuck_model(tmp_path, "StuckInRun")) as yard:
        with faulty_models.closed_gate(tmp_path / "gate"):
            error = await refusal_of(yard.client.predict("stuck", X, timeout_s=0.5))
            assert isinstance(error, DeadlineExceeded)
            assert error.phase == "run"
            assert (await yard.residency("stuck")).lease_count == 1


async def test_deadlines_of_nothing_and_in_the_past_end_the_call_and_leave_nothing(
    tmp_path: Path,
) -> None:
    async with yard_with(tmp_path, CPU + stuck_model(tmp_path, "StuckInLoad")) as yard:
        with faulty_models.closed_gate(tmp_path / "gate"):
            for timeout_s in (0.0, -1.0, -1e9, 1e-9, 1e-6, 1e-3):
                body = request_of("stuck", X_TENSOR)
                refused = await send_refused(yard, PREDICT, body, timeout_s=timeout_s)
                assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
                # gRPC rounds up to its smallest unit: a hit may make it.
                try:
                    await send(yard, PREDICT, request_of("echo", X_TENSOR), timeout_s=timeout_s)
                except Refused as late:
                    assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED

            async def nobody_waits() -> bool:
                return (await yard.admin(Admin.stats)).waiting_request_count == 0

            await eventually("nobody waits", nobody_waits)


async def test_calls_without_a_deadline_get_the_servers(tmp_path: Path) -> None:
    config = "[server]\ndefault_deadline_s = 0.3\n" + CPU + stuck_model(tmp_path, "StuckInLoad")
    async with yard_with(tmp_path, config) as yard:
        with faulty_models.closed_gate(tmp_path / "gate"):
            body = request_of("stuck", X_TENSOR)
            async with asyncio.timeout(5):
                refused = await send_refused(yard, PREDICT, body, timeout_s=None)
            assert refused.reason == "DEADLINE_IN_LOAD"


async def test_deadlines_of_years_are_cut_to_the_servers_longest(tmp_path: Path) -> None:
    config = "[server]\ndefault_deadline_s = 0.2\nmax_deadline_s = 0.3\n"
    config += CPU + stuck_model(tmp_path, "StuckInLoad")
    async with yard_with(tmp_path, config) as yard:
        with faulty_models.closed_gate(tmp_path / "gate"):
            body = request_of("stuck", X_TENSOR)
            async with asyncio.timeout(5):
                refused = await send_refused(yard, PREDICT, body, timeout_s=10 * 365 * 86400.0)
            assert refused.reason == "DEADLINE_IN_LOAD"


async def test_clients_that_leave_at_any_moment_leave_nothing_behind(tmp_path: Path) -> None:
    """Six models, room for two, and nobody waits for longer than chance lets them."""
    config = device_table("cpu", 2_500_000)
    for index in range(6):
        config += model_table(f"m-{index}", "identity", options={"size_bytes": 1_000_000})
    chance = np.random.default_rng(17)
    async with running_app(config, tmp_path) as yard:

        async def come_and_go(index: int, patience_s: float) -> str:
            try:
                async with asyncio.timeout(patience_s):
                    await yard.client.predict(f"m-{index % 6}", X)
            except TimeoutError:
                return "left"
            except ModelyardError as error:
                return str(error.reason)
            return "answered"

        patience = chance.exponential(0.01, 300)
        ends = await asyncio.gather(
            *(come_and_go(index, float(patience_s)) for index, patience_s in enumerate(patience))
        )
        assert set(ends) <= {"left", "answered"}
        assert "left" in ends
        await yard.at_rest()
        stats = await yard.admin(Admin.stats)
        assert (stats.active_request_count, stats.waiting_request_count) == (0, 0)
        device: ManagedDevice = await yard.device()
        assert device.peak_accounted_bytes <= device.budget_bytes
        assert device.peak_measured_bytes <= device.budget_bytes
        for index in range(6):
            await yard.client.predict(f"m-{index}", X)


async def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    config = "[yard]\nmax_waiting_per_model = 3\n" + CPU + stuck_model(tmp_path, "StuckInLoad")
    async with yard_with(tmp_path, config) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            waiters = [asyncio.create_task(yard.client.predict("stuck", X)) for _ in range(3)]
            await eventually("the load is stuck", gate.is_waited_at)

            async def all_wait() -> bool:
                return (await yard.residency("stuck")).waiting_request_count == 3

            await eventually("all wait", all_wait)
            error = await refusal_of(yard.admin(Admin.load, "stuck"))
            assert error.reason == "QUEUE_FULL"
            assert error.retry_after_s is not None
            assert error.retry_after_s > 0
            assert "retry_after_ms=" in str(error)
        await asyncio.gather(*waiters)


# Paths


FORBIDDEN_FOLDERS = [
    "",
    ".",
    "..",
    "../outside",
    "good/../../outside",
    "good/..",
    "/etc",
    "//host/share",
    "good//nested",
    "good/",
    "/good",
    "good\\..\\..\\outside",
    "good\0",
    "link",
    "link/nested",
    "good/link",
    "http://127.0.0.1/x",
    "file:///etc",
    "s3://bucket/x",
    "~",
    "$HOME",
    "nobody",
    "file",
    "good/model.safetensors",
    "a" * 5000,
    "/".join(["a"] * 2000),
]


async def test_no_folder_leads_out_of_its_root(tmp_path: Path) -> None:
    outside = faulty_models.make_weights(tmp_path / "outside")
    faulty_models.make_weights(outside / "nested")
    good = faulty_models.make_weights(tmp_path / "store" / "good")
    (tmp_path / "store" / "link").symlink_to(outside)
    (good / "link").symlink_to(outside)
    (tmp_path / "store" / "file").touch()
    async with yard_with(tmp_path, CPU) as yard:
        async with undisturbed(yard):
            for folder in FORBIDDEN_FOLDERS:
                request = model_service_pb2.CreateModelRequest(model_id="sneaky")
                request.model.runtime = "torch"
                request.model.source.root = "store"
                request.model.source.folder = folder
                request.model.options.update({"factory": faulty_models.factory("Adding")})
                refused = await send_refused(yard, CREATE_MODEL, request.SerializeToString())
                assert refused.code is grpc.StatusCode.INVALID_ARGUMENT, folder[:80]
                assert refused.reason == "INVALID_FIELD", folder[:80]
                assert "model.source" in refused.fields, folder[:80]
                check_text(refused.text, tmp_path)
        request = model_service_pb2.CreateModelRequest(model_id="sneaky")
        request.model.runtime = "torch"
        request.model.source.folder = "good"
        request.model.options.update({"factory": faulty_models.factory("Adding")})
        for root in ("", "nobody", "..", "/", str(tmp_path), "store/.."):
            request.model.source.root = root
            refused = await send_refused(yard, CREATE_MODEL, request.SerializeToString())
            assert "model.source" in refused.fields, root
            check_text(refused.text.replace(repr(root[:64]), ""), tmp_path)


async def test_only_allowed_factories_are_called(tmp_path: Path) -> None:
    faulty_models.make_weights(tmp_path / "store" / "good")
    async with yard_with(tmp_path, CPU) as yard:
        for name in ("os:system", "builtins:eval", "tests.support.faulty_models:Gate", "", "x"):
            error = await refusal_of(
                yard.admin(
                    Admin.create_model,
                    "sneaky",
                    runtime="torch",
                    root="store",
                    folder="good",
                    options={"factory": name},
                )
            )
            assert isinstance(error, InvalidRequest)
            assert [violation.field for violation in error.violations] == ["model.options.factory"]
