"""predict() of both clients: what is sent, what comes back, and what is not sent at all."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from tests.support.asking import Asker, echo
from tests.support.fake_api import FakeServer

from modelyard import errors
from modelyard.tensors import Bfloat16, TensorError, to_tensor
from modelyard.v1 import inference_service_pb2, tensor_pb2

PredictRequest = inference_service_pb2.PredictRequest
PredictResponse = inference_service_pb2.PredictResponse


class TestPredict:
    async def test_one_value_is_one_unnamed_input(self, server: FakeServer, asker: Asker) -> None:
        server.answer("Predict", echo)
        prediction = await asker.predict("sentiment", ["good", "bad"])
        assert server.requests == [
            PredictRequest(
                key="sentiment",
                inputs=[
                    tensor_pb2.Tensor(
                        data_type=tensor_pb2.DATA_TYPE_TEXT,
                        shape=[2],
                        text=tensor_pb2.TextElements(values=["good", "bad"]),
                    )
                ],
            )
        ]
        assert prediction.only == ["good", "bad"]

    async def test_a_mapping_is_inputs_by_name_in_its_order(
        self, server: FakeServer, asker: Asker
    ) -> None:
        server.answer("Predict", echo)
        image = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
        half = Bfloat16.from_float32(np.ones(3, dtype=np.float32))
        prediction = await asker.predict("k", {"z": image, "a": b"raw", "h": half})
        assert list(prediction) == ["z", "a", "h"]
        np.testing.assert_array_equal(np.asarray(prediction["z"]), image)
        assert prediction["a"] == [b"raw"]
        assert isinstance(prediction["h"], Bfloat16)
        with pytest.raises(ValueError, match="the model has 3 outputs: 'z', 'a', 'h'"):
            _ = prediction.only
        with pytest.raises(KeyError, match="no output 'scores'; there are: 'z', 'a', 'h'"):
            _ = prediction["scores"]

    async def test_parameters_travel(self, server: FakeServer, asker: Asker) -> None:
        server.answer("Predict", echo)
        parameters = {"n": 20, "t": 0.5, "on": True, "none": None, "l": [1, "a", {}], "d": {"x": 1}}
        await asker.predict("k", "x", parameters=parameters)
        sent = server.requests[0].parameters
        assert dict(sent) == {**parameters, "l": sent["l"], "d": sent["d"]}
        assert list(sent["l"]) == [1, "a", {}] and dict(sent["d"]) == {"x": 1}

    async def test_no_parameters_are_not_empty_parameters(
        self, server: FakeServer, asker: Asker
    ) -> None:
        server.answer("Predict", echo)
        await asker.predict("k", "x")
        await asker.predict("k", "x", parameters={})
        assert [request.HasField("parameters") for request in server.requests] == [False, True]

    async def test_served_tells_how_the_answer_came_about(
        self, server: FakeServer, asker: Asker
    ) -> None:
        served = inference_service_pb2.Served(
            model="models/m",
            device="devices/cpu",
            cold=True,
            wait_duration=Duration(seconds=1, nanos=500_000_000),
            load_duration=Duration(seconds=1),
            run_duration=Duration(nanos=2_000_000),
            route="routes/r",
            branch="a/b",
            version="v2",
            steps=[inference_service_pb2.Served(model="models/n", branch="a")],
        )
        server.answer("Predict", lambda request, context: PredictResponse(served=served))
        prediction = await asker.predict("k", "x")
        steps = prediction.served.steps
        assert [(step.model, step.branch, step.cold) for step in steps] == [
            ("models/n", "a", False)
        ]
        told = dataclasses.asdict(prediction.served)
        del told["steps"]
        assert told == {
            "model": "models/m",
            "device": "devices/cpu",
            "cold": True,
            "wait_s": 1.5,
            "load_s": 1.0,
            "run_s": 0.002,
            "route": "routes/r",
            "branch": "a/b",
            "version": "v2",
        }
        assert len(prediction) == 0
        with pytest.raises(ValueError, match="the model has 0 outputs: none"):
            _ = prediction.only

    async def test_affinity_and_version_are_sent(self, server: FakeServer, asker: Asker) -> None:
        server.answer("Predict", echo)
        await asker.predict("k", "x", affinity="user 7", version="stable")
        await asker.predict("k", "x")
        assert [(each.affinity, each.version) for each in server.requests] == [
            ("user 7", "stable"),
            ("", ""),
        ]
        for wrong in ({"affinity": 7}, {"version": b"v"}):
            with pytest.raises(TypeError, match="must be a str or None"):
                await asker.predict("k", "x", **wrong)

    async def test_a_hit_has_no_load_time(self, server: FakeServer, asker: Asker) -> None:
        served = inference_service_pb2.Served(wait_duration=Duration())
        server.answer("Predict", lambda request, context: PredictResponse(served=served))
        assert (await asker.predict("k", "x")).served.load_s is None

    async def test_the_identity_goes_with_every_call(
        self, server: FakeServer, asker: Asker
    ) -> None:
        server.answer("Predict", echo)
        await asker.ask(asker.client(identity="team a"), "k", "x")
        await asker.predict("k", "x")
        names = [metadata.get("x-modelyard-identity") for metadata in server.metadata]
        assert names == ["team a", None]

    async def test_many_calls_share_one_client(self, server: FakeServer, asker: Asker) -> None:
        server.answer("Predict", echo)
        client = asker.client()
        predictions = await asyncio.gather(
            *(asker.ask(client, "k", f"text {index}") for index in range(50))
        )
        assert [prediction.only for prediction in predictions] == [
            [f"text {index}"] for index in range(50)
        ]

    @pytest.mark.parametrize(
        "outputs",
        [
            [tensor_pb2.Tensor(name="x", data_type=tensor_pb2.DATA_TYPE_INT8, shape=[2], raw=b"1")],
            [to_tensor("a", "x"), to_tensor("b", "x")],
        ],
        ids=["contradicts itself", "same name twice"],
    )
    async def test_an_answer_that_breaks_the_contract_is_the_server_s_error(
        self, server: FakeServer, asker: Asker, outputs: Any
    ) -> None:
        server.answer("Predict", lambda request, context: PredictResponse(outputs=outputs))
        with pytest.raises(errors.ServerError, match=r"127\.0\.0\.1:\d+ cannot be read: .*'x'"):
            await asker.predict("k", "x")


class TestRefusedBeforeSending:
    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"key": 1}, TypeError, "key must be a str, got int"),
            ({"inputs": 1.5}, TypeError, "cannot send float"),
            ({"inputs": None}, TypeError, "cannot send NoneType"),
            ({"inputs": {}}, ValueError, "needs at least one input"),
            ({"inputs": {1: "x"}}, TypeError, "name of a tensor must be a str"),
            ({"inputs": []}, TensorError, "an empty list"),
            ({"parameters": [1]}, TypeError, "parameters must be a mapping"),
            ({"parameters": {1: 1}}, TypeError, "keys of parameters must be str"),
            ({"parameters": {"a": {1: 1}}}, TypeError, r"keys of parameters\['a'\] must be str"),
            ({"parameters": {"a": [b"x"]}}, TypeError, r"parameters\['a'\]\[0\] is a bytes"),
            ({"parameters": {"a": np.int64(3)}}, TypeError, r"parameters\['a'\] is a int64"),
            ({"parameters": {"seed": 2**53 + 1}}, ValueError, "no finite double-precision number"),
            ({"parameters": {"big": 10**400}}, ValueError, "no finite double"),
            ({"parameters": {"t": float("nan")}}, ValueError, "no finite double"),
            ({"timeout_s": "1"}, TypeError, "timeout_s must be a number"),
            ({"timeout_s": True}, TypeError, "timeout_s must be a number"),
            ({"timeout_s": 0}, ValueError, "finite number of seconds above 0"),
            ({"timeout_s": float("inf")}, ValueError, "finite number of seconds"),
        ],
    )
    async def test_wrong_arguments(
        self,
        server: FakeServer,
        asker: Asker,
        arguments: Any,
        error: type[Exception],
        text: str,
    ) -> None:
        with pytest.raises(error, match=text):
            await asker.predict(**{"key": "k", "inputs": "x", **arguments})
        assert server.requests == []

    async def test_parameters_that_hold_themselves(self, asker: Asker) -> None:
        endless: dict[str, Any] = {}
        endless["again"] = endless
        with pytest.raises(ValueError, match="more than 32 levels"):
            await asker.predict("k", "x", parameters=endless)

    async def test_a_request_that_is_too_large(self, server: FakeServer, asker: Asker) -> None:
        with pytest.raises(ValueError, match=r"has 1[0-9]{3} bytes and max_message_bytes is 1000"):
            await asker.ask(asker.client(max_message_bytes=1000), "k", "x" * 1000)
        assert server.requests == []
