"""The clients' scenario in Python; client/SCENARIO.md says what each step is.

::

    python client/python/scenario.py target=127.0.0.1:8470 prefix=py root=store folder=text ...

It uses the generated stubs alone, as the programs in other languages do, so that all of them say
the same of the contract. Programs are better off with ``modelyard.Client`` and ``modelyard.Admin``.
"""

from __future__ import annotations

import struct
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from modelyard.v1 import (
    admin_service_pb2,
    error_reason_pb2,
    event_pb2,
    inference_service_pb2,
    model_pb2,
    model_service_pb2,
    residency_pb2,
    residency_service_pb2,
    route_pb2,
    route_service_pb2,
    tensor_pb2,
)
from modelyard.v1.admin_service_pb2_grpc import AdminServiceStub
from modelyard.v1.inference_service_pb2_grpc import InferenceServiceStub
from modelyard.v1.model_service_pb2_grpc import ModelServiceStub
from modelyard.v1.residency_service_pb2_grpc import ResidencyServiceStub
from modelyard.v1.route_service_pb2_grpc import RouteServiceStub

__all__ = ["STEPS", "Scenario", "main"]

_DEADLINE_S = 30.0
_STREAM_DEADLINE_S = 60.0
_TEXT = "the big dog ran"
_ECHOED = struct.pack("<6f", 0.5, -1.25, 3.0, 1e-3, 65504.0, -0.0)


class _Failed(Exception):
    """A step found something else than it should have; the text says what."""


def _check(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise _Failed(f"{what} is {found!r}, not {expected!r}")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise _Failed(what)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorDetails:
    """What the details of a status say.

    Attributes:
        code: of the status.
        reason: name of the reason; empty if there is no ErrorInfo.
        domain: of the ErrorInfo.
        fields: of the violations of BadRequest, in their order.
        resource: that ResourceInfo names; empty if there is none.
    """

    code: grpc.StatusCode
    reason: str
    domain: str
    fields: tuple[str, ...]
    resource: str

    @classmethod
    def of(cls, error: grpc.RpcError) -> ErrorDetails:
        """Reads them from a failed call."""
        status = status_pb2.Status()
        # Pairs; the annotations of gRPC know one of them alone.
        trailers = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
        for key, value in trailers:
            if isinstance(value, bytes) and key == "grpc-status-details-bin":
                status.ParseFromString(value)
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        resource = error_details_pb2.ResourceInfo()
        for detail in status.details:
            for message in (info, bad, resource):
                if detail.Is(message.DESCRIPTOR):
                    detail.Unpack(message)
        return cls(
            code=error.code(),
            reason=info.reason,
            domain=info.domain,
            fields=tuple(violation.field for violation in bad.field_violations),
            resource=resource.resource_name,
        )


@dataclass(slots=True)
class Scenario:
    """One run of the scenario.

    Attributes:
        channel: to the server.
        words: what the program was given; see client/SCENARIO.md.
        steps: what is run.
    """

    channel: grpc.Channel
    words: Mapping[str, str]
    steps: Sequence[str]
    _models: list[str] = field(default_factory=list)
    _position: tuple[str, int] = ("", 0)

    def run(self, say: Callable[[str], None]) -> bool:
        """Runs the steps, says a line about each, and returns whether all of them are ok."""
        all_ok = True
        for step in self.steps:
            try:
                STEPS[step](self)
            except _Failed as failure:
                problem = str(failure)
            except grpc.RpcError as error:
                problem = f"{error.code().name}: {error.details()}"
            except (KeyError, OSError) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                say(f"ok {step}")
                continue
            all_ok = False
            say(f"not ok {step}: {' '.join(problem.split())}")
        return all_ok

    def create_models(self) -> None:
        """Registers the two models; the same request twice is done once."""
        request_id = str(uuid.uuid4())
        echo = model_pb2.Model(runtime="identity", keys=[self._key("echo")])
        created = self._create("echo", echo, request_id)
        _check(self._create("echo", echo, request_id).etag, created.etag, "etag of the replay")
        text = model_pb2.Model(
            runtime="transformers",
            task="text-classification",
            source=model_pb2.ModelSource(root=self.words["root"], folder=self.words["folder"]),
            keys=[self._key("text")],
        )
        created = self._create("text", text, str(uuid.uuid4()))
        _require(created.estimated_bytes > 0, "estimated_bytes of the classifier is 0")
        got = self._models_stub().GetModel(
            model_service_pb2.GetModelRequest(name=self._model("text")), timeout=_DEADLINE_S
        )
        _check(got.model.etag, created.etag, "etag of GetModel")

    def create_route(self) -> None:
        """Registers the split."""
        branches = [
            route_pb2.Branch(name="blue", target=self._model("echo"), weight=3),
            route_pb2.Branch(name="green", target=self._model("text"), weight=1),
        ]
        response = RouteServiceStub(self.channel).CreateRoute(
            route_service_pb2.CreateRouteRequest(
                route_id=f"{self.words['prefix']}-split",
                route=route_pb2.Route(
                    keys=[self._key("split")],
                    split=route_pb2.SplitTarget(branches=branches, salt="scenario"),
                ),
                request_id=str(uuid.uuid4()),
            ),
            timeout=_DEADLINE_S,
        )
        _check(response.route.name, self._route(), "name of the route")
        _check(list(response.route.split.branches), branches, "branches of the route")

    def load(self) -> None:
        """Remembers where events are, and asks for the classifier to be loaded."""
        watch = AdminServiceStub(self.channel).WatchEvents(
            admin_service_pb2.WatchEventsRequest(), timeout=_DEADLINE_S
        )
        try:
            first = next(watch)
        finally:
            watch.cancel()
        self._position = (first.epoch, first.revision)
        response = ResidencyServiceStub(self.channel).LoadModel(
            residency_service_pb2.LoadModelRequest(model=self._model("text")), timeout=_DEADLINE_S
        )
        _check(response.residency.model, self._model("text"), "model of the residency")

    def watch(self) -> None:
        """Resumes the watch, sees the load, and then where the model stands."""
        epoch, revision = self._position
        watch = AdminServiceStub(self.channel).WatchEvents(
            admin_service_pb2.WatchEventsRequest(epoch=epoch, revision=revision), timeout=60.0
        )
        try:
            loaded = self._load_done(watch, revision)
        finally:
            watch.cancel()
        _require(loaded.size_bytes + loaded.shared_bytes > 0, "the loaded model holds 0 bytes")

        residencies = ResidencyServiceStub(self.channel).WatchResidencies(
            residency_service_pb2.WatchResidenciesRequest(), timeout=_DEADLINE_S
        )
        state = residency_pb2.RESIDENCY_STATE_UNSPECIFIED
        try:
            for message in residencies:
                for residency in message.residencies:
                    if residency.model == self._model("text"):
                        state = residency.state
                if message.snapshot_complete:
                    break
        finally:
            residencies.cancel()
        _check(state, residency_pb2.RESIDENCY_STATE_RESIDENT, "state of the classifier")

    def predict(self) -> None:
        """Asks for numbers, for text by a model's id, and for labels."""
        tensor = tensor_pb2.Tensor(
            name="x", data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2, 3], raw=_ECHOED
        )
        answer = self._predict(self._key("echo"), tensor)
        output = _only(answer)
        _check(output.data_type, tensor_pb2.DATA_TYPE_FLOAT32, "type of the echo")
        _check(list(output.shape), [2, 3], "shape of the echo")
        _check(output.raw, _ECHOED, "bytes of the echo")
        _check(answer.served.model, self._model("echo"), "served.model")

        words = ["naïve", "日本語"]
        answer = self._predict(f"{self.words['prefix']}-echo", _texts("x", words))
        _check(list(_only(answer).text.values), words, "echoed texts")

        texts = _texts("text", [_TEXT, "you hate this small cat"])
        answer = self._predict(self._key("text"), texts)
        _check(list(_output(answer, "label").text.values), self._labels(), "labels")
        score = _output(answer, "score")
        _check(score.data_type, tensor_pb2.DATA_TYPE_FLOAT32, "type of the scores")
        _check(list(score.shape), [2], "shape of the scores")
        scores = struct.unpack("<2f", score.raw)
        _require(all(0 < value <= 1 for value in scores), f"the scores are {scores}")
        _check(answer.served.model, self._model("text"), "served.model")
        _check(answer.served.cold, False, "served.cold")
        _require(answer.served.HasField("run_duration"), "served.run_duration is not set")

    def route(self) -> None:
        """Asks through the split, with every affinity of the list."""
        models = {"blue": self._model("echo"), "green": self._model("text")}
        met = set()
        for line in Path(self.words["branches"]).read_text(encoding="utf-8").splitlines():
            affinity, _, branch = line.partition("\t")
            answer = self._predict(self._key("split"), _texts("text", [_TEXT]), affinity)
            _check(answer.served.route, self._route(), "served.route")
            _check(answer.served.branch, branch, f"branch of {affinity}")
            _check(answer.served.model, models[branch], f"model of {affinity}")
            if branch == "blue":
                _check(list(_only(answer).text.values), [_TEXT], "echoed text")
            met.add(branch)
        _check(met, set(models), "set of branches")

    def stream(self) -> None:
        """Sends sixteen items over one stream before it reads any answer."""
        ids = range(1000, 1016)
        requests = [self._stream_message(ids[at : at + 4]) for at in range(0, len(ids), 4)]
        call = InferenceServiceStub(self.channel).PredictStream(
            iter(requests), timeout=_STREAM_DEADLINE_S
        )
        results: dict[int, inference_service_pb2.PredictStreamResult] = {}
        for message in call:
            for result in message.results:
                _require(result.id not in results, f"{result.id} is answered twice")
                results[result.id] = result
        _check(sorted(results), list(ids), "ids that were answered")
        for id_, result in results.items():
            if id_ == ids[-1]:
                _check(result.error.code, grpc.StatusCode.NOT_FOUND.value[0], f"code of {id_}")
                _check(
                    result.error.reason,
                    error_reason_pb2.ERROR_REASON_KEY_NOT_FOUND,
                    f"reason of {id_}",
                )
            elif id_ % 2 == 0:
                texts = list(_only(result.response).text.values)
                _check(texts, [f"item {id_}"], f"answer of {id_}")
            else:
                labels = list(_output(result.response, "label").text.values)
                _check(labels, self._labels()[:1], f"answer of {id_}")

    def generate(self) -> None:
        """Generates the same text twice."""
        model = model_pb2.Model(
            runtime="transformers",
            task="text-generation",
            source=model_pb2.ModelSource(
                root=self.words["root"], folder=self.words["generation_folder"]
            ),
            keys=[self._key("generate")],
        )
        self._create("generate", model, str(uuid.uuid4()))
        text = self._generated()
        _check(self._generated(), text, "second text")

    def errors(self) -> None:
        """Reads four errors from the details of their status."""
        found = _error_of(lambda: self._predict(self._key("nobody"), _texts("x", ["x"])))
        _check_error(found, grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND")
        _check(found.resource, self._key("nobody"), "resource_name")

        short = tensor_pb2.Tensor(
            name="x", data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], raw=b"\0" * 4
        )
        found = _error_of(lambda: self._predict(self._key("echo"), short))
        _check_error(found, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TENSOR")
        _check(found.fields[:1], ("inputs[0]",), "field")

        echo = model_pb2.Model(runtime="identity", keys=[self._key("echo")])
        found = _error_of(lambda: self._create("echo", echo, str(uuid.uuid4())))
        _check_error(found, grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS")

        found = _error_of(lambda: self._predict(self._key("/.."), _texts("x", ["x"])))
        _check_error(found, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        _check(found.fields[:1], ("key",), "field")

    def delete(self) -> None:
        """Takes everything away again, and sees that it is gone."""
        if "create-route" in self.steps:
            RouteServiceStub(self.channel).DeleteRoute(
                route_service_pb2.DeleteRouteRequest(
                    name=self._route(), request_id=str(uuid.uuid4())
                ),
                timeout=_DEADLINE_S,
            )
        while self._models:
            self._models_stub().DeleteModel(
                model_service_pb2.DeleteModelRequest(
                    name=self._model(self._models.pop()), request_id=str(uuid.uuid4())
                ),
                timeout=_DEADLINE_S,
            )
        found = _error_of(lambda: self._predict(self._key("echo"), _texts("x", ["x"])))
        _check_error(found, grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND")
        request = model_service_pb2.GetModelRequest(name=self._model("text"))
        found = _error_of(lambda: self._models_stub().GetModel(request, timeout=_DEADLINE_S))
        _check_error(found, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")

    def _key(self, name: str) -> str:
        return f"{self.words['prefix']}/{name}"

    def _model(self, name: str) -> str:
        return f"models/{self.words['prefix']}-{name}"

    def _route(self) -> str:
        return f"routes/{self.words['prefix']}-split"

    def _labels(self) -> list[str]:
        return self.words["labels"].split(",")

    def _models_stub(self) -> ModelServiceStub:
        return ModelServiceStub(self.channel)

    def _create(self, name: str, model: model_pb2.Model, request_id: str) -> model_pb2.Model:
        response = self._models_stub().CreateModel(
            model_service_pb2.CreateModelRequest(
                model_id=f"{self.words['prefix']}-{name}", model=model, request_id=request_id
            ),
            timeout=_DEADLINE_S,
        )
        if name not in self._models:
            self._models.append(name)
        _check(response.model.name, self._model(name), "name of the model")
        _check(list(response.model.keys), list(model.keys), "keys of the model")
        _check(response.model.owner, model_pb2.MODEL_OWNER_API, "owner of the model")
        return response.model

    def _load_done(
        self, watch: Iterator[admin_service_pb2.WatchEventsResponse], revision: int
    ) -> event_pb2.Event:
        for message in watch:
            for event in message.events:
                _require(event.revision > revision, f"{event.revision} comes behind {revision}")
                revision = event.revision
                if (event.type, event.subject) == (
                    event_pb2.EVENT_TYPE_LOAD_DONE,
                    self._model("text"),
                ):
                    return event
        raise _Failed("the watch ended before the load")

    def _predict(
        self, key: str, tensor: tensor_pb2.Tensor, affinity: str = ""
    ) -> inference_service_pb2.PredictResponse:
        return InferenceServiceStub(self.channel).Predict(
            inference_service_pb2.PredictRequest(key=key, inputs=[tensor], affinity=affinity),
            timeout=_DEADLINE_S,
        )

    def _stream_message(self, ids: Sequence[int]) -> inference_service_pb2.PredictStreamRequest:
        message = inference_service_pb2.PredictStreamRequest()
        for id_ in ids:
            if id_ == 1015:
                key, tensor = self._key("nobody"), _texts("text", [_TEXT])
            elif id_ % 2 == 0:
                key, tensor = self._key("echo"), _texts("x", [f"item {id_}"])
            else:
                key, tensor = self._key("text"), _texts("text", [_TEXT])
            message.items.add(
                id=id_,
                request=inference_service_pb2.PredictRequest(key=key, inputs=[tensor]),
            )
        return message

    def _generated(self) -> str:
        call = InferenceServiceStub(self.channel).Generate(
            inference_service_pb2.GenerateRequest(
                key=self._key("generate"), prompt="the cat sat", max_new_tokens=5
            ),
            timeout=_STREAM_DEADLINE_S,
        )
        messages = list(call)
        tokens = [token for message in messages for token in message.token_ids]
        _check(tokens, [int(token) for token in self.words["tokens"].split(",")], "tokens")
        finished = [message.finish for message in messages]
        _check(
            finished,
            [inference_service_pb2.FINISH_REASON_UNSPECIFIED] * (len(messages) - 1)
            + [inference_service_pb2.FINISH_REASON_LENGTH],
            "finish of the messages",
        )
        _check(messages[-1].token_count, 5, "token_count")
        _check(messages[-1].served.model, self._model("generate"), "served.model")
        return "".join(message.text for message in messages)


STEPS: Mapping[str, Callable[[Scenario], None]] = {
    "create-models": Scenario.create_models,
    "create-route": Scenario.create_route,
    "load": Scenario.load,
    "watch": Scenario.watch,
    "predict": Scenario.predict,
    "route": Scenario.route,
    "stream": Scenario.stream,
    "generate": Scenario.generate,
    "errors": Scenario.errors,
    "delete": Scenario.delete,
}
"""The steps by their names, in their order."""


def _texts(name: str, values: Sequence[str]) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(
        name=name,
        data_type=tensor_pb2.DATA_TYPE_TEXT,
        shape=[len(values)],
        text=tensor_pb2.TextElements(values=values),
    )


def _only(answer: inference_service_pb2.PredictResponse) -> tensor_pb2.Tensor:
    _check(len(answer.outputs), 1, "number of outputs")
    return answer.outputs[0]


def _output(answer: inference_service_pb2.PredictResponse, name: str) -> tensor_pb2.Tensor:
    for output in answer.outputs:
        if output.name == name:
            return output
    raise _Failed(f"there is no output {name!r}")


def _error_of(call: Callable[[], Message]) -> ErrorDetails:
    try:
        call()
    except grpc.RpcError as error:
        return ErrorDetails.of(error)
    raise _Failed("a call that must be refused was answered")


def _check_error(found: ErrorDetails, code: grpc.StatusCode, reason: str) -> None:
    _check((found.code, found.reason), (code, reason), "code and reason")
    _check(found.domain, "modelyard", "domain")


def main(arguments: Sequence[str]) -> int:
    """Runs the scenario with the words of a command line, and returns its exit status."""
    words = dict(argument.partition("=")[::2] for argument in arguments)
    steps = words.get("steps", ",".join(STEPS)).split(",")
    unknown = [step for step in steps if step not in STEPS]
    if unknown or not words.get("target") or not words.get("prefix"):
        wrong = f"no such step: {unknown[0]}" if unknown else "target= and prefix= are needed"
        print(wrong, file=sys.stderr)
        return 2
    with grpc.insecure_channel(words["target"], options=[("grpc.enable_http_proxy", 0)]) as channel:
        ok = Scenario(channel, words, steps).run(lambda line: print(line, flush=True))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
