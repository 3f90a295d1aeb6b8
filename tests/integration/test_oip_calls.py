"""The Open Inference Protocol as stock clients speak it, against a server in the same process.

One server for the whole module: what a test loads or unloads it says.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from google.rpc import error_details_pb2, status_pb2
from tests.support.faulty_models import closed_gate
from tests.support.oip import LABELS, ServedApp, byte_strings, make_zoo, served_app
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from modelyard import Admin, Client
from modelyard_server.services.oip.service import EXTENSIONS, REPOSITORY_SERVICE

TEXTS: Final = ["the big dog ran", "i hate this"]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApp]:
    base = tmp_path_factory.mktemp("oip")
    with served_app(make_zoo(base), base) as served:
        yield served


@pytest.fixture(scope="module")
def client(app: ServedApp) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(app.target) as made:
        yield made


@pytest.fixture(scope="module")
def stub(app: ServedApp) -> Iterator[Any]:
    """The bare stub, for messages that no client would send."""
    with grpc.insecure_channel(app.target, options=[("grpc.enable_retries", 0)]) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(name: str, values: np.ndarray[Any, Any], datatype: str) -> Any:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def texts(*values: str) -> Any:
    return tensor("text", byte_strings(*values), "BYTES")


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, str]:
    """Code, reason and text of a call by the stub that must be refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    details = dict(error.trailing_metadata()).get("grpc-status-details-bin", b"")
    status = status_pb2.Status.FromString(details)
    info = error_details_pb2.ErrorInfo()
    for packed in status.details:
        if packed.Unpack(info):
            break
    assert info.domain == "modelyard"
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    return error.code(), info.reason, error.details()


# --- The server -----------------------------------------------------------------------------------


def test_the_server_lives_and_is_ready(client: Any) -> None:
    assert client.is_server_live() is True
    assert client.is_server_ready() is True


def test_only_what_is_true_is_announced(client: Any) -> None:
    metadata = client.get_server_metadata()
    assert metadata.name == "modelyard"
    assert metadata.version
    assert tuple(metadata.extensions) == EXTENSIONS
    unserved = ("classification", "sequence", "system_shared_memory", "cuda_shared_memory")
    assert not {*unserved, "trace", "logging"} & set(metadata.extensions)


def test_every_method_of_the_protocol_is_there(app: ServedApp, stub: Any) -> None:
    methods = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    for method in methods:
        call = getattr(stub, method.name)
        request = getattr(pb, method.input_type.name)()
        try:
            list(call(iter([]))) if method.client_streaming else call(request)
        except grpc.RpcError as error:
            assert "Method not found" not in str(error), method.name


@pytest.mark.parametrize("kind", ["system", "cuda"])
def test_no_shared_memory_is_registered(client: Any, kind: str) -> None:
    assert not getattr(client, f"get_{kind}_shared_memory_status")().regions
    getattr(client, f"unregister_{kind}_shared_memory")()
    getattr(client, f"unregister_{kind}_shared_memory")("some")


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("SystemSharedMemoryRegister", "SystemSharedMemoryRegisterRequest"),
        ("CudaSharedMemoryRegister", "CudaSharedMemoryRegisterRequest"),
        ("TraceSetting", "TraceSettingRequest"),
        ("LogSettings", "LogSettingsRequest"),
    ],
)
def test_what_is_not_served_says_so(stub: Any, method: str, request_type: str) -> None:
    request = getattr(pb, request_type)()
    code, reason, text = refusal(lambda: getattr(stub, method)(request))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert reason == "UNSUPPORTED"
    assert text


# --- Models ---------------------------------------------------------------------------------------


def test_a_cold_model_is_ready_and_asking_does_not_load_it(app: ServedApp, client: Any) -> None:
    client.unload_model("filler")
    assert client.is_model_ready("filler") is True
    client.get_model_metadata("filler")
    client.get_model_config("filler")
    client.get_inference_statistics("filler")
    assert client.get_model_repository_index(as_json=False) is not None
    assert state_of(client, "filler") != "READY"


def test_a_model_that_can_never_fit_is_not_ready(client: Any) -> None:
    assert client.is_model_ready("huge") is False


@pytest.mark.parametrize("version", ["", "1"])
def test_both_portable_versions_mean_the_model(client: Any, version: str) -> None:
    assert client.is_model_ready("echo", version) is True
    values = np.arange(3, dtype=np.float32)
    answer = client.infer("echo", [tensor("input", values, "FP32")], model_version=version)
    assert answer.get_response().model_version == "1"


def test_another_version_is_not_found(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="no version '2'") as caught:
        client.is_model_ready("echo", "2")
    assert caught.value.status() == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize(
    "method", ["is_model_ready", "get_model_metadata", "get_model_config", "load_model"]
)
def test_an_unregistered_name_is_not_found(client: Any, method: str) -> None:
    with pytest.raises(InferenceServerException, match="nobody") as caught:
        getattr(client, method)("nobody")
    assert caught.value.status() == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize("name", ["", "no name", "../echo", "x" * 300])
def test_what_can_be_no_key_is_invalid(stub: Any, name: str) -> None:
    request = pb.ModelReadyRequest(name=name)
    code, reason, _ = refusal(lambda: stub.ModelReady(request))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


ALL_MODELS: Final = [
    *("echo", "mlp", "sums", "sentiment", "embedder", "filler", "writer", "pictures"),
    *("raising", "huge", "echoes", "team/echo"),
]


@pytest.mark.parametrize("name", ALL_MODELS)
def test_configuration_and_metadata_agree(client: Any, name: str) -> None:
    metadata = client.get_model_metadata(name)
    config = client.get_model_config(name).config
    assert metadata.name == config.name == name
    assert metadata.platform == config.platform
    assert list(metadata.versions) == ["1"]
    assert config.max_batch_size == 0
    assert config.model_transaction_policy.decoupled is False
    for described, configured in (
        (metadata.inputs, config.input),
        (metadata.outputs, config.output),
    ):
        assert described
        assert [each.name for each in described] == [each.name for each in configured]
        assert [list(each.shape) for each in described] == [list(each.dims) for each in configured]
        types = pb.model__config__pb2.DataType
        kinds = [types.Name(each.data_type).removeprefix("TYPE_") for each in configured]
        assert [each.datatype.replace("BYTES", "STRING") for each in described] == kinds


def test_a_torch_models_inputs_are_those_of_its_forward_or_of_its_options(client: Any) -> None:
    assert [each.name for each in client.get_model_metadata("mlp").inputs] == ["x"]
    sums = client.get_model_metadata("sums")
    assert [each.name for each in sums.outputs] == ["y"]
    assert client.get_model_config("sums").config.WhichOneof("scheduling_choice")
    assert not client.get_model_config("mlp").config.WhichOneof("scheduling_choice")


# --- Answers --------------------------------------------------------------------------------------

NUMBERS: Final = {
    "BOOL": [0, 1, 1, 0, 1, 0],
    "INT8": [-128, -1, 0, 1, 2, 127],
    "INT16": [-32768, -1, 0, 1, 2, 32767],
    "INT32": [-(2**31), -1, 0, 1, 2, 2**31 - 1],
    "INT64": [-(2**63), -1, 0, 1, 2, 2**63 - 1],
    "UINT8": [0, 1, 2, 3, 4, 255],
    "UINT16": [0, 1, 2, 3, 4, 65535],
    "UINT32": [0, 1, 2, 3, 4, 2**32 - 1],
    "UINT64": [0, 1, 2, 3, 4, 2**64 - 1],
    "FP16": [0.0, -0.0, 1.5, -2.25, 65504.0, 6e-8],
    "FP32": [0.0, -0.0, 1.5, np.inf, -np.inf, np.nan],
    "FP64": [0.0, -0.0, 1.5, np.inf, -np.inf, np.nan],
}


def values_of(datatype: str) -> np.ndarray[Any, Any]:
    if datatype == "BYTES":
        return byte_strings(b"", b"\x00", b"\xff\xfe", "я", b"x" * 300, b"\x00\x00\x00\x00")
    return np.array(NUMBERS[datatype], dtype=triton_to_np_dtype(datatype))


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 6, 1), (0,), (3, 0)])
@pytest.mark.parametrize("datatype", [*NUMBERS, "BYTES"])
def test_every_type_comes_back_as_it_went(
    client: Any, datatype: str, shape: tuple[int, ...]
) -> None:
    values = values_of(datatype)
    values = values[:0].reshape(shape) if 0 in shape else values.reshape(shape)
    answer = client.infer("echo", [tensor("values", values, datatype)], request_id="r-1")
    response = answer.get_response()
    assert (response.model_name, response.id) == ("echo", "r-1")
    assert len(response.raw_output_contents) == len(response.outputs) == 1
    (output,) = response.outputs
    assert (output.name, output.datatype, tuple(output.shape)) == ("values", datatype, shape)
    got = answer.as_numpy("values")
    assert got.dtype == values.dtype
    np.testing.assert_array_equal(got, values)


def test_bfloat16_comes_back_bit_by_bit(stub: Any) -> None:
    # Of the client's versions some want float32 for it and some another package's type.
    raw = np.array([0x0000, 0x8000, 0x3FC0, 0x7F80, 0x7FC1, 0x0001], dtype="<u2").tobytes()
    response = stub.ModelInfer(raw_request(("BF16", [3, 2], raw)))
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("BF16", [3, 2])
    assert list(response.raw_output_contents) == [raw]


def test_many_inputs_come_back_in_order(client: Any) -> None:
    inputs = [tensor(f"v{i}", values_of(name), name) for i, name in enumerate([*NUMBERS, "BYTES"])]
    answer = client.infer("echo", inputs)
    assert [each.name for each in answer.get_response().outputs] == [f"v{i}" for i in range(13)]
    for i, name in enumerate([*NUMBERS, "BYTES"]):
        np.testing.assert_array_equal(answer.as_numpy(f"v{i}"), values_of(name))


def test_wanted_outputs_come_in_the_wanted_order_and_once(client: Any) -> None:
    inputs = [tensor(name, np.full(2, i, np.int32), "INT32") for i, name in enumerate("abc")]
    wanted = [triton.InferRequestedOutput(name) for name in ("c", "a", "c")]
    answer = client.infer("echo", inputs, outputs=wanted)
    assert [each.name for each in answer.get_response().outputs] == ["c", "a"]
    assert answer.as_numpy("c").tolist() == [2, 2]
    assert answer.as_numpy("a").tolist() == [0, 0]
    assert answer.as_numpy("b") is None


def test_a_large_tensor_goes_both_ways(client: Any) -> None:
    values = np.random.default_rng(1).random(1 << 20)
    answer = client.infer("echo", [tensor("x", values, "FP64")])
    assert values.nbytes == 8 << 20
    np.testing.assert_array_equal(answer.as_numpy("x"), values)


def test_very_many_byte_strings_are_read_and_written_beside_the_loop(
    client: Any, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_thread, aside = asyncio.to_thread, []

    async def noted(work: Callable[[], Any]) -> Any:
        aside.append(work)
        return await to_thread(work)

    monkeypatch.setattr(asyncio, "to_thread", noted)
    values = byte_strings(*(str(i) * (i % 3) for i in range(100_000)))
    answer = client.infer("echo", [tensor("x", values, "BYTES")])
    np.testing.assert_array_equal(answer.as_numpy("x"), values)
    assert len(aside) == 2
    # A length that lies is found out there as well.
    raw = answer.get_response().raw_output_contents[0]
    request = raw_request(("BYTES", [100_000], raw[:-1]))
    code, reason, text = refusal(lambda: stub.ModelInfer(request))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TENSOR")
    assert "element 99999 has no room" in text
    # Numbers are taken as they lie, however many there are.
    client.infer("echo", [tensor("x", np.zeros(100_000), "FP64")])
    assert len(aside) == 3


def test_texts_are_classified_as_by_our_own_client(app: ServedApp, client: Any) -> None:
    answer = client.infer("sentiment", [texts(*TEXTS)])
    with Client(app.target) as own:
        wanted: Any = own.predict("sentiment", TEXTS)
    labels = [label.decode() for label in answer.as_numpy("label")]
    assert labels == list(wanted["label"])
    assert set(labels) <= set(LABELS)
    np.testing.assert_allclose(answer.as_numpy("probabilities"), wanted["probabilities"], 1e-5)


def test_texts_are_embedded_filled_and_continued(client: Any) -> None:
    assert client.infer("embedder", [texts(*TEXTS)]).as_numpy("embedding").shape == (2, 32)
    filled = client.infer("filler", [texts("the [MASK] ran")], parameters={"top_k": 3})
    assert filled.as_numpy("token").shape == (1, 3)
    written = client.infer("writer", [texts(*TEXTS)], parameters={"max_new_tokens": 4})
    assert written.as_numpy("text").shape == (2,)
    assert (written.as_numpy("token_count") <= 4).all()


def test_pictures_are_classified_raw_and_prepared(client: Any) -> None:
    raw = np.random.default_rng(2).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    assert client.infer("pictures", [tensor("image", raw, "UINT8")]).as_numpy("score").shape == (2,)
    prepared = np.zeros((1, 3, 16, 16), np.float32)
    answer = client.infer("pictures", [tensor("image", prepared, "FP32")])
    np.testing.assert_allclose(answer.as_numpy("probabilities").sum(), 1.0, rtol=1e-5)


def test_torch_models_take_the_names_of_their_metadata(client: Any) -> None:
    for name, shape in (("mlp", (2, 8)), ("sums", (4,))):
        metadata = client.get_model_metadata(name)
        values = np.ones(shape, np.float32)
        answer = client.infer(name, [tensor(metadata.inputs[0].name, values, "FP32")])
        assert answer.as_numpy(metadata.outputs[0].name) is not None


def test_an_answer_says_how_it_came_about(client: Any) -> None:
    client.unload_model("sums")
    values = np.ones(2, np.float32)
    inputs = [tensor("x", values, "FP32")]
    first = client.infer("sums", inputs).get_response().parameters
    again = client.infer("sums", inputs).get_response().parameters
    assert first["modelyard_cold"].bool_param is True
    assert again["modelyard_cold"].bool_param is False
    assert again["modelyard_model"].string_param == "sums"
    assert again["modelyard_device"].string_param == "devices/cpu"
    assert first["modelyard_wait_us"].int64_param >= again["modelyard_wait_us"].int64_param


def test_requests_at_the_same_time_are_all_answered(client: Any) -> None:
    done, results = threading.Event(), {}

    def note(i: int) -> Callable[[Any, Any], None]:
        def callback(result: Any, error: Any) -> None:
            results[i] = error or result.as_numpy("y")
            if len(results) == 40:
                done.set()

        return callback

    for i in range(40):
        values = np.full((1, 3), i, np.float32)
        client.async_infer("sums", [tensor("x", values, "FP32")], callback=note(i))
    assert done.wait(30)
    for i in range(40):
        np.testing.assert_array_equal(results[i], np.full((1, 3), i + 1, np.float32))


def test_a_client_that_pings_is_served(app: ServedApp) -> None:
    options = triton.KeepAliveOptions(
        keepalive_time_ms=30_000,
        keepalive_timeout_ms=5_000,
        keepalive_permit_without_calls=True,
        http2_max_pings_without_data=0,
    )
    with triton.InferenceServerClient(app.target, keepalive_options=options) as client:
        assert client.is_server_live()
        answer = client.infer("echo", [tensor("x", np.ones(2, np.float32), "FP32")])
        assert answer.as_numpy("x").tolist() == [1, 1]


# --- Typed contents -------------------------------------------------------------------------------

FIELDS: Final = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def typed_request(datatype: str, *, name: str = "echo", **parameters: object) -> Any:
    values = values_of(datatype)
    request = pb.ModelInferRequest(model_name=name)
    made = request.inputs.add(name="v", datatype=datatype, shape=[2, 3])
    getattr(made.contents, FIELDS[datatype]).extend(values.tolist())
    for key, value in parameters.items():
        request.parameters[key].bool_param = bool(value)
    return request


@pytest.mark.parametrize("datatype", FIELDS)
def test_typed_elements_are_taken_and_answered_raw(stub: Any, datatype: str) -> None:
    response = stub.ModelInfer(typed_request(datatype))
    assert not response.outputs[0].HasField("contents")
    got = triton.InferResult(response).as_numpy("v")
    np.testing.assert_array_equal(got, values_of(datatype).reshape(2, 3))


@pytest.mark.parametrize("datatype", FIELDS)
def test_typed_answers_are_there_for_those_who_ask(stub: Any, datatype: str) -> None:
    response = stub.ModelInfer(typed_request(datatype, modelyard_typed_contents=True))
    assert not response.raw_output_contents
    got = getattr(response.outputs[0].contents, FIELDS[datatype])
    np.testing.assert_array_equal(list(got), values_of(datatype).tolist())


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_is_answered_raw_also_to_those_who_ask_for_typed(
    stub: Any, datatype: str
) -> None:
    request = pb.ModelInferRequest(model_name="echo", raw_input_contents=[b"\x00\x3c", b"\x01"])
    request.inputs.add(name="half", datatype=datatype, shape=[1])
    request.inputs.add(name="flag", datatype="BOOL", shape=[1])
    request.parameters["modelyard_typed_contents"].bool_param = True
    response = stub.ModelInfer(request)
    assert list(response.raw_output_contents) == [b"\x00\x3c", b"\x01"]


def test_a_model_of_texts_takes_typed_ones(stub: Any) -> None:
    request = pb.ModelInferRequest(model_name="sentiment")
    made = request.inputs.add(name="text", datatype="BYTES", shape=[1])
    made.contents.bytes_contents.append(b"i like this")
    request.parameters["modelyard_typed_contents"].bool_param = True
    response = stub.ModelInfer(request)
    (label,) = response.outputs[0].contents.bytes_contents
    assert label.decode() in LABELS


# --- Refusals -------------------------------------------------------------------------------------


def raw_request(
    *tensors: tuple[str, list[int], bytes], name: str = "echo", version: str = ""
) -> Any:
    request = pb.ModelInferRequest(model_name=name, model_version=version)
    for i, (datatype, shape, raw) in enumerate(tensors):
        request.inputs.add(name=f"v{i}", datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    return request


def mixed() -> Any:
    request = raw_request(("INT8", [1], b"\x01"), ("INT8", [1], b"\x01"))
    request.inputs[1].contents.int_contents.append(1)
    return request


def with_(change: Callable[[Any], object]) -> Any:
    request = raw_request(("INT8", [1], b"\x01"))
    change(request)
    return request


def typed(datatype: str, field: str, *values: object) -> Any:
    request = pb.ModelInferRequest(model_name="echo")
    made = request.inputs.add(name="v", datatype=datatype, shape=[len(values)])
    getattr(made.contents, field).extend(values)
    return request


def length(value: int) -> bytes:
    return value.to_bytes(4, "little")


INVALID: Final[dict[str, Callable[[], Any]]] = {
    "no inputs": lambda: pb.ModelInferRequest(model_name="echo"),
    "raw and typed": mixed,
    "a raw content missing": lambda: with_(lambda r: r.inputs.add(name="b", datatype="INT8")),
    "a raw content too many": lambda: with_(lambda r: r.raw_input_contents.append(b"")),
    "two inputs of one name": lambda: with_(
        lambda r: (r.inputs.append(r.inputs[0]), r.raw_input_contents.append(b"\x01"))
    ),
    "no content": lambda: with_(lambda r: r.ClearField("raw_input_contents")),
    "too few bytes": lambda: raw_request(("FP32", [2], b"\x00" * 7)),
    "too many bytes": lambda: raw_request(("FP32", [2], b"\x00" * 9)),
    "a negative dimension": lambda: raw_request(("FP32", [-1], b"")),
    "a huge dimension": lambda: raw_request(("BYTES", [2**31], b"")),
    "a product beyond 63 bits": lambda: raw_request(("BYTES", [2**31 - 1] * 3, b"")),
    "an overflow behind a zero": lambda: raw_request(("BYTES", [2**31 - 1] * 3 + [0], b"")),
    "nine dimensions": lambda: raw_request(("FP32", [1] * 9, b"\x00" * 4)),
    "an unknown type": lambda: raw_request(("FP8", [1], b"\x00")),
    "no type": lambda: raw_request(("", [1], b"\x00")),
    "a type in lower case": lambda: raw_request(("fp32", [1], b"\x00" * 4)),
    "a boolean of 2": lambda: raw_request(("BOOL", [1], b"\x02")),
    "a string beyond the end": lambda: raw_request(("BYTES", [1], length(5) + b"abcd")),
    "a string of 4 GiB": lambda: raw_request(("BYTES", [1], length(2**32 - 1) + b"abcd")),
    "half a length": lambda: raw_request(("BYTES", [1], b"\x01\x00")),
    "a string too few": lambda: raw_request(("BYTES", [2], length(1) + b"a" + b"\x00\x00")),
    "a string too many": lambda: raw_request(("BYTES", [1], length(0) + length(0))),
    "a million strings in nothing": lambda: raw_request(("BYTES", [10**6], b"")),
    "typed half precision": lambda: typed("FP16", "fp32_contents", 1.0),
    "floats in the field of ints": lambda: typed("FP32", "int_contents", 1),
    "a byte of 128": lambda: typed("INT8", "int_contents", 128),
    "a short of 65536": lambda: typed("UINT16", "uint_contents", 65536),
    "too few typed elements": lambda: with_(
        lambda r: (
            r.ClearField("raw_input_contents"),
            r.inputs[0].contents.int_contents.append(1),
            r.inputs[0].shape.append(2),
        )
    ),
    "bad UTF-8 for a model of texts": lambda: raw_request(
        ("BYTES", [1], length(2) + b"\xff\xfe"), name="sentiment"
    ),
    "numbers for a model of texts": lambda: raw_request(("INT8", [1], b"\x01"), name="sentiment"),
    "shared memory in": lambda: with_(
        lambda r: setattr(r.inputs[0].parameters["shared_memory_region"], "string_param", "x")
    ),
    "shared memory out": lambda: with_(
        lambda r: setattr(
            r.outputs.add(name="v0").parameters["shared_memory_region"], "string_param", "x"
        )
    ),
    "classification": lambda: with_(
        lambda r: setattr(r.outputs.add(name="v0").parameters["classification"], "int64_param", 3)
    ),
    "an unknown output": lambda: with_(lambda r: r.outputs.add(name="other")),
    "too many outputs": lambda: with_(lambda r: [r.outputs.add(name="v0") for _ in range(1025)]),
}


@pytest.mark.parametrize("case", INVALID)
def test_what_is_wrong_in_itself_is_an_invalid_argument(stub: Any, case: str) -> None:
    code, reason, text = refusal(lambda: stub.ModelInfer(INVALID[case]()))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert reason in ("INVALID_TENSOR", "INVALID_FIELD")
    assert text and "Traceback" not in text


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("sequence_id", "int64_param", 7),
        ("sequence_id", "string_param", "s"),
        ("sequence_start", "bool_param", True),
        ("sequence_end", "bool_param", True),
        ("timeout", "int64_param", -1),
        ("timeout", "string_param", "1s"),
        ("priority", "string_param", "high"),
        ("triton_made_up", "bool_param", True),
        ("modelyard_made_up", "bool_param", True),
        ("modelyard_affinity", "int64_param", 1),
        ("modelyard_affinity", "string_param", "x" * 257),
        ("modelyard_typed_contents", "string_param", "yes"),
        ("triton_enable_empty_final_response", "int64_param", 1),
        ("not_of_this_model", "bool_param", True),
        ("not_finite", "double_param", float("inf")),
        ("x" * 5000, "bool_param", True),
        ("empty", None, None),
    ],
)
def test_parameters_that_are_not_known_or_no_values_are_refused(
    stub: Any, name: str, field: str | None, value: object
) -> None:
    request = raw_request(("INT8", [1], b"\x01"))
    if field is None:
        request.parameters[name].SetInParent()
    else:
        setattr(request.parameters[name], field, value)
    code, reason, text = refusal(lambda: stub.ModelInfer(request))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert f"parameters.{name[:16]}" in text or name == "modelyard_affinity"


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("sequence_id", "int64_param", 0),
        ("sequence_id", "string_param", ""),
        ("sequence_start", "bool_param", False),
        ("sequence_end", "bool_param", False),
        ("priority", "uint64_param", 2**63),
        ("priority", "int64_param", 1),
        ("timeout", "int64_param", 0),
        ("timeout", "uint64_param", 30_000_000),
        ("triton_enable_empty_final_response", "bool_param", True),
        ("modelyard_affinity", "string_param", "user-1"),
    ],
)
def test_parameters_of_the_protocol_are_no_matter_of_the_model(
    stub: Any, name: str, field: str, value: object
) -> None:
    request = raw_request(("INT8", [1], b"\x01"))
    setattr(request.parameters[name], field, value)
    assert list(stub.ModelInfer(request).raw_output_contents) == [b"\x01"]


def test_an_unknown_output_of_a_known_task_is_refused_before_anything_is_loaded(
    client: Any,
) -> None:
    client.unload_model("embedder")
    with pytest.raises(InferenceServerException, match="is no output"):
        client.infer("embedder", [texts("a")], outputs=[triton.InferRequestedOutput("label")])
    assert state_of(client, "embedder") != "READY"


@pytest.mark.parametrize(
    ("name", "code", "part"),
    [
        ("nobody", "NOT_FOUND", "no model goes by the key"),
        ("huge", "FAILED_PRECONDITION", "needs 1099511627776 bytes"),
        ("raising", "INTERNAL", "the model raised ValueError; error_id="),
    ],
)
def test_refusals_of_models_have_their_codes(client: Any, name: str, code: str, part: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(name, [tensor("x", np.ones(2, np.float32), "FP32")])
    assert caught.value.status() == f"StatusCode.{code}"
    assert part in caught.value.message()
    assert "secret" not in caught.value.message()


def test_a_model_whose_load_failed_is_not_ready_and_tells_why(app: ServedApp, client: Any) -> None:
    assert client.is_model_ready("broken") is True
    app.break_weights("broken")
    with pytest.raises(InferenceServerException, match="no safetensors file") as caught:
        client.infer("broken", [tensor("x", np.ones(2, np.float32), "FP32")])
    assert caught.value.status() == "StatusCode.FAILED_PRECONDITION"
    index = {each.name: each for each in client.get_model_repository_index().models}
    assert index["broken"].state == "UNAVAILABLE"
    assert "model.safetensors" in index["broken"].reason
    # Loading by hand tries again at once, and fails again.
    with pytest.raises(InferenceServerException, match="no safetensors file"):
        client.load_model("broken")
    assert client.is_model_ready("broken") is False


def test_the_clients_deadline_and_the_timeout_each_bound_a_request(
    app: ServedApp, client: Any
) -> None:
    inputs = [tensor("x", np.ones(2, np.float32), "FP32")]
    client.infer("stuck", inputs)
    with closed_gate(app.base / "gate"):
        for limits in ({"timeout": 200_000}, {"client_timeout": 0.5}):
            with pytest.raises(InferenceServerException) as caught:
                client.infer("stuck", inputs, **limits)
            assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    client.infer("stuck", inputs)


def test_a_message_that_is_none_is_invalid(app: ServedApp) -> None:
    with grpc.insecure_channel(app.target) as channel:
        call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        code, reason, _ = refusal(lambda: call(b"\x0a\xff"))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


# --- The repository -------------------------------------------------------------------------------


def state_of(client: Any, name: str) -> str:
    index = client.get_model_repository_index().models
    return str(next(each.state for each in index if each.name == name))


def test_the_index_has_every_name_in_order(client: Any) -> None:
    names = [each.name for each in client.get_model_repository_index().models]
    assert names == sorted(names)
    assert {*ALL_MODELS, "broken", "stuck"} == set(names)


def test_models_come_and_leave_by_hand(client: Any) -> None:
    client.unload_model("mlp")
    assert state_of(client, "mlp") in ("", "UNAVAILABLE")
    client.load_model("mlp")
    assert state_of(client, "mlp") == "READY"
    client.load_model("mlp")  # Once more changes nothing.
    client.unload_model("mlp", unload_dependents=True)
    assert state_of(client, "mlp") == "UNAVAILABLE"
    assert client.is_model_ready("mlp") is True
    client.infer("mlp", [tensor("x", np.ones((1, 8), np.float32), "FP32")])
    assert state_of(client, "mlp") == "READY"


def test_the_index_of_what_is_in_memory_is_that_alone(client: Any, stub: Any) -> None:
    client.load_model("sums")
    client.unload_model("filler")
    ready = {
        each.name for each in stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True)).models
    }
    assert "sums" in ready and "filler" not in ready


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"config": '{"max_batch_size": 4}'}, "parameters.config"),
        ({"config": "{}", "files": {"file:1/model.onnx": b"x"}}, "parameters.file:1/model.onnx"),
    ],
)
def test_a_load_takes_no_content(client: Any, settings: dict[str, Any], part: str) -> None:
    with pytest.raises(InferenceServerException, match=part) as caught:
        client.load_model("mlp", **settings)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize("method", ["Index", "ModelLoad", "ModelUnload"])
def test_there_is_one_repository(stub: Any, method: str) -> None:
    request = getattr(pb, f"Repository{method}Request")(repository_name="other")
    code, reason, _ = refusal(lambda: getattr(stub, f"Repository{method}")(request))
    assert (code, reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED")


def test_unknown_parameters_of_loads_and_unloads_are_refused(stub: Any) -> None:
    load = pb.RepositoryModelLoadRequest(model_name="mlp")
    load.parameters["unload_dependents"].bool_param = True
    unload = pb.RepositoryModelUnloadRequest(model_name="mlp")
    unload.parameters["unload_dependents"].string_param = "yes"
    told = [
        refusal(lambda: stub.RepositoryModelLoad(load)),
        refusal(lambda: stub.RepositoryModelUnload(unload)),
    ]
    assert {code for code, _, _ in told} == {grpc.StatusCode.INVALID_ARGUMENT}


def test_a_pinned_model_does_not_leave(app: ServedApp, client: Any) -> None:
    with Admin(app.target) as admin:
        admin.pin("echo")
        with pytest.raises(InferenceServerException, match="pinned") as caught:
            client.unload_model("echo")
        admin.unpin("echo")
    assert caught.value.status() == "StatusCode.FAILED_PRECONDITION"


def test_what_can_never_fit_cannot_be_loaded(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="budget") as caught:
        client.load_model("huge")
    assert caught.value.status() == "StatusCode.FAILED_PRECONDITION"


def test_the_repository_has_a_second_name(app: ServedApp) -> None:
    with grpc.insecure_channel(app.target) as channel:

        def call(method: str, request: Any) -> bytes:
            answer: bytes = channel.unary_unary(f"/{REPOSITORY_SERVICE}/{method}")(
                request.SerializeToString()
            )
            return answer

        call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="sums"))
        index = pb.RepositoryIndexResponse.FromString(
            call("RepositoryIndex", pb.RepositoryIndexRequest(ready=True))
        )
        assert "sums" in {each.name for each in index.models}
        call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="sums"))


# --- Statistics -----------------------------------------------------------------------------------


def statistics_of(client: Any, name: str) -> Any:
    (entry,) = client.get_inference_statistics(name).model_stats
    assert entry.name == name
    return entry


def test_statistics_grow_by_what_was_asked(client: Any) -> None:
    inputs = [tensor("x", np.ones((3, 2), np.float32), "FP32")]
    client.infer("sums", inputs)
    before = statistics_of(client, "sums")
    for _ in range(5):
        client.infer("sums", inputs)
    with pytest.raises(InferenceServerException):
        client.infer("sums", [tensor("z", np.ones(2, np.float32), "FP32")])
    after = statistics_of(client, "sums")
    assert after.execution_count - before.execution_count == 5
    assert after.inference_count - before.inference_count == 15
    assert after.inference_stats.success.count - before.inference_stats.success.count == 5
    assert after.inference_stats.fail.count - before.inference_stats.fail.count == 1
    assert after.last_inference >= before.last_inference > 0
    for figures in (before.inference_stats, after.inference_stats):
        parts = figures.queue.ns + figures.compute_input.ns + figures.compute_infer.ns
        assert 0 < parts + figures.compute_output.ns <= figures.success.ns


def test_what_our_own_client_asks_counts_as_well(app: ServedApp, client: Any) -> None:
    before = statistics_of(client, "echo").execution_count
    with Client(app.target) as own:
        own.predict("echo", np.ones(2, np.float32))
        own.predict_batch([("echoes", np.ones(2, np.float32))] * 3)
    assert statistics_of(client, "echo").execution_count == before + 4


def test_statistics_of_all_models_say_what_each_holds(app: ServedApp, client: Any) -> None:
    client.load_model("sentiment")
    client.unload_model("filler")
    entries = {each.name: each for each in client.get_inference_statistics().model_stats}
    assert set(entries) == {*ALL_MODELS, "broken", "stuck"} - {"echoes", "team/echo"}
    assert not entries["filler"].memory_usage

    async def charges(yard: Any) -> Any:
        model = yard.app.catalog.get("sentiment")
        return yard.app.residency.use(model.handle).charges

    (held,) = app.on_loop(charges).values()
    (usage,) = entries["sentiment"].memory_usage
    assert (usage.type, usage.id, usage.byte_size) == ("CPU", 0, held)
    assert held > 0


def test_a_model_is_told_by_the_name_it_was_asked_by(client: Any) -> None:
    assert statistics_of(client, "echoes").execution_count == (
        statistics_of(client, "team/echo").execution_count
    )
