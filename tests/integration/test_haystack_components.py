"""Haystack components in real pipelines, against a server with tiny models."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support import tiny_models
from tests.support.config_text import CPU, DISK, ROOTS, device_table, model_table
from tests.support.served import served_app
from tests.support.server import RunningApp

from modelyard import (
    Admin,
    AlreadyExists,
    Client,
    ComponentDevice,
    Device,
    DeviceMap,
    DevicePlan,
    FallbackTarget,
    InvalidRequest,
    KeyNotFound,
    LoadFailed,
    ModelPlacement,
    PlacementInvalid,
    ServerUnavailable,
)

# Read when haystack is imported: it would write a file to the home directory and send events.
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

from haystack import Document, Pipeline
from haystack.components.generators.utils import print_streaming_chunk
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.core.errors import DeserializationError, PipelineRuntimeError
from haystack.dataclasses import StreamingChunk
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import device as theirs

from modelyard.integrations.haystack import (
    ModelyardDocumentClassifier,
    ModelyardDocumentEmbedder,
    ModelyardGenerator,
    ModelyardRanker,
    ModelyardTextEmbedder,
    UnsuitableModel,
)

TEXTS = [
    "the big dog ran",
    "a bird flew over the river house",
    "i hate this",
    "fish swam in the blue river",
    "you like that cat",
]
MODULES = ["modelyard"]
"""What Haystack has to be told before it loads components of ours."""

# Values that a type checker would refuse.
LAX: Any = {
    component.__name__: component
    for component in (ModelyardTextEmbedder, ModelyardRanker, ModelyardGenerator)
}


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    base = tmp_path_factory.mktemp("haystack")
    store = base / "store"
    tiny_models.make_tiny_bert(store / "words", seed=1)
    tiny_models.make_tiny_bert(store / "team" / "Other", seed=2)
    tiny_models.make_tiny_bert(store / "classes", seed=3, labels=["bad", "good", "neither"])
    tiny_models.make_tiny_decoder(store / "llama2", "llama", seed=4)
    shutil.copytree(store / "words", store / "mute")
    (store / "mute" / "tokenizer.json").write_text("{}")
    config = "".join(device_table(f"cuda:{i}", "64MB", logical=True) for i in range(2))
    config += CPU + DISK + ROOTS
    config += model_table(
        "words", "transformers", task="feature-extraction", keys=["acme/search"], device="cpu"
    )
    with served_app(config, base) as running:
        yield running


@pytest.fixture(autouse=True)
def server(yard: RunningApp, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Components of these tests find the server by the environment; no model outlives a test."""
    monkeypatch.setenv("MODELYARD_SERVER", yard.target)
    yield
    with Admin(yard.target) as admin:
        for model in admin.list_models():
            if model.id != "words":
                admin.delete_model(model.id)


@pytest.fixture
def admin(yard: RunningApp) -> Iterator[Admin]:
    with Admin(yard.target) as connected:
        yield connected


@pytest.fixture
def client(yard: RunningApp) -> Iterator[Client]:
    with Client(yard.target) as connected:
        yield connected


def documents() -> list[Document]:
    return [Document(content=text, meta={"number": i}) for i, text in enumerate(TEXTS)]


def model_ids(admin: Admin) -> list[str]:
    return [model.id for model in admin.list_models()]


def cosine(left: Any, right: Any) -> float:
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))


class TestEmbedders:
    def test_a_text_is_embedded_as_the_server_does(self, client: Client) -> None:
        embedder = ModelyardTextEmbedder("acme/search")
        answer = embedder.run(TEXTS[0])
        embedder.close()
        vector = client.predict("words", [TEXTS[0]])["embedding"]
        assert answer["embedding"] == np.asarray(vector)[0].tolist()
        assert all(type(number) is float for number in answer["embedding"])
        assert answer["meta"] | {"cold": None} == {
            "key": "acme/search",
            "model": "words",
            "device": "cpu",
            "cold": None,
        }
        # It was warmed up before.
        assert answer["meta"]["cold"] is False

    def test_prefix_and_suffix_are_embedded(self, client: Client) -> None:
        embedder = ModelyardTextEmbedder("words", prefix="the ", suffix=" ran")
        vector = np.asarray(client.predict("words", ["the big dog ran"]).only)[0]
        assert embedder.run("big dog")["embedding"] == vector.tolist()
        embedder.close()

    def test_documents_are_embedded_in_order_and_in_batches(self, client: Client) -> None:
        given = documents()
        before = copy.deepcopy(given)
        embedder = ModelyardDocumentEmbedder(
            "words", batch_size=2, meta_fields_to_embed=["title", "number"], prefix="the "
        )
        answer = embedder.run(given)
        embedder.close()
        assert given == before
        assert [document.id for document in answer["documents"]] == [d.id for d in before]
        for document in answer["documents"]:
            text = f"the {document.meta['number']}\n{document.content}"
            vector = np.asarray(client.predict("words", [text]).only)[0]
            np.testing.assert_allclose(document.embedding, vector, rtol=1e-4, atol=1e-5)

    def test_no_documents_are_no_call(self) -> None:
        nowhere = "127.0.0.1:1"
        assert ModelyardDocumentEmbedder("words", server=nowhere).run([])["documents"] == []
        assert ModelyardDocumentClassifier("words", server=nowhere).run([])["documents"] == []
        assert ModelyardRanker("words", server=nowhere).run("dog", [])["documents"] == []

    def test_wrong_arguments_are_refused_before_any_call(self) -> None:
        nowhere: Any = ModelyardTextEmbedder("words", server="127.0.0.1:1")
        with pytest.raises(TypeError, match="takes a str, got list"):
            nowhere.run(documents())
        for component in (ModelyardDocumentEmbedder, ModelyardDocumentClassifier):
            lax: Any = component("words", server="127.0.0.1:1")
            with pytest.raises(TypeError, match="must be a list of documents, got str"):
                lax.run("text")
            with pytest.raises(TypeError, match="must hold documents, got str"):
                lax.run(["text"])


class TestRanker:
    def test_documents_are_ordered_by_cosine(self, client: Client) -> None:
        ranker = ModelyardRanker("words", batch_size=2, top_k=None)
        ranked = ranker.run("the dog sat", documents())["documents"]
        top = ranker.run("the dog sat", documents(), top_k=2)["documents"]
        ranker.close()
        query, *vectors = np.asarray(client.predict("words", ["the dog sat", *TEXTS]).only)
        cosines = {text: cosine(query, vector) for text, vector in zip(TEXTS, vectors, strict=True)}
        assert [document.content for document in ranked] == sorted(TEXTS, key=cosines.__getitem__)[
            ::-1
        ]
        for document in ranked:
            assert document.score == pytest.approx(cosines[document.content or ""], abs=1e-5)
        assert top == ranked[:2]

    def test_a_threshold_leaves_the_rest_out(self) -> None:
        ranker = ModelyardRanker("words", top_k=None)
        ranked = ranker.run("the dog sat", documents())["documents"]
        lowest = ranked[2].score
        kept = ranker.run("the dog sat", documents(), score_threshold=lowest)["documents"]
        ranker.close()
        assert kept == ranked[:3]

    def test_equal_scores_keep_their_order_and_ids_come_once(self) -> None:
        same = [Document(content="the dog", meta={"n": n}) for n in range(4)]
        twice = [*same, replace(same[2], score=0.5), replace(same[0], score=None)]
        ranker = ModelyardRanker("words")
        ranked = ranker.run("the dog", twice)["documents"]
        ranker.close()
        assert [document.meta["n"] for document in ranked] == [0, 1, 2, 3]
        assert all(document.score == pytest.approx(1.0, abs=1e-5) for document in ranked)

    def test_counts_below_one_are_refused(self) -> None:
        with pytest.raises(ValueError, match="top_k is 0: give at least 1"):
            ModelyardRanker("words", top_k=0)
        with pytest.raises(ValueError, match="top_k is -1"):
            ModelyardRanker("words").run("dog", documents(), top_k=-1)
        with pytest.raises(TypeError, match="batch_size must be an int, got str"):
            LAX["ModelyardRanker"]("words", batch_size="3")


class TestGeneratorAndClassifier:
    def test_text_is_written_behind_a_prompt(self, client: Client) -> None:
        generator = ModelyardGenerator(model="llama2", generation_kwargs={"max_new_tokens": 6})
        answer = generator.run("the big dog")
        shorter = generator.run("the big dog", generation_kwargs={"max_new_tokens": 2})
        plain = client.predict("llama2", ["the big dog"], parameters={"max_new_tokens": 6})
        generator.close()
        assert answer["replies"] == np.asarray(plain["text"]).tolist()
        count = np.asarray(plain["token_count"]).item()
        (meta,) = answer["meta"]
        assert meta["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": count,
            "total_tokens": count + 3,
        }
        assert (meta["key"], meta["model"], meta["cold"]) == ("llama2", "llama2", False)
        assert shorter["meta"][0]["finish_reason"] == "length"
        assert shorter["meta"][0]["usage"]["completion_tokens"] == 2
        assert answer["replies"][0].startswith(shorter["replies"][0])

    def test_stop_words_end_the_writing(self) -> None:
        free = ModelyardGenerator(model="llama2", generation_kwargs={"max_new_tokens": 8})
        words = free.run("the big dog")["replies"][0].split()
        free.close()
        stopped = ModelyardGenerator(
            model="llama2", generation_kwargs={"max_new_tokens": 8}, stop_words=[words[3]]
        )
        answer = stopped.run("the big dog")
        stopped.close()
        assert answer["replies"][0].split() == words[: words.index(words[3])]
        assert answer["meta"][0]["finish_reason"] == "stop"

    async def test_pieces_are_told_as_they_come(self) -> None:
        told: list[StreamingChunk] = []

        async def tell(chunk: StreamingChunk) -> None:
            told.append(chunk)

        generator = ModelyardGenerator(
            model="llama2",
            generation_kwargs={"max_new_tokens": 5},
            streaming_callback=print_streaming_chunk,
        )
        blocking = await asyncio.to_thread(generator.run, "the dog", told.append)
        pieces = [chunk.content for chunk in told]
        assert len(pieces) > 1
        assert "".join(pieces) == blocking["replies"][0]
        assert [chunk.start for chunk in told] == [True] + [False] * (len(told) - 1)
        assert told[-1].finish_reason == blocking["meta"][0]["finish_reason"]
        assert told[0].component_info is not None
        assert told[0].component_info.type.endswith("ModelyardGenerator")
        told.clear()
        assert await generator.run_async("the dog", tell) == blocking
        assert [chunk.content for chunk in told] == pieces
        with pytest.raises(ValueError, match="cannot be a coroutine"):
            generator.run("the dog", tell)
        await generator.close_async()

    def test_a_callback_that_fails_ends_the_writing(self) -> None:
        def fail(chunk: StreamingChunk) -> None:
            raise LookupError("no room")

        generator = ModelyardGenerator(model="llama2")
        with pytest.raises(LookupError, match="no room"):
            generator.run("the dog", fail)
        generator.close()

    def test_settings_that_do_not_exist_are_told(self) -> None:
        with pytest.raises(ValueError, match="unknown among generation_kwargs: creativity"):
            ModelyardGenerator("x", generation_kwargs={"creativity": 11})
        with pytest.raises(ValueError, match="unknown among generation_kwargs: creativity"):
            ModelyardGenerator("x").run("a", generation_kwargs={"creativity": 11})
        with pytest.raises(TypeError, match="generation_kwargs must be a dict or None, got str"):
            LAX["ModelyardGenerator"]("x", generation_kwargs="creative")

    def test_two_names_of_one_thing_are_refused(self) -> None:
        with pytest.raises(ValueError, match="are the same: give one"):
            ModelyardGenerator(
                model="llama2", options={}, huggingface_pipeline_kwargs={"device_map": "balanced"}
            )
        with pytest.raises(ValueError, match="are the same: give one"):
            ModelyardGenerator("x", stop_words=["a"], generation_kwargs={"stop": ["b"]})

    def test_keyword_arguments_beat_the_device(self, admin: Admin) -> None:
        generator = ModelyardGenerator(
            model="llama2", device="cpu", huggingface_pipeline_kwargs={"device_map": "cuda:1"}
        )
        answer = generator.run("the big dog")
        generator.close()
        assert answer["meta"][0]["device"] == "cuda:1"
        assert admin.get_model("llama2").warnings

    def test_documents_get_their_class(self, client: Client) -> None:
        classifier = ModelyardDocumentClassifier(model="classes", batch_size=2)
        given = documents()
        answer = classifier.run(given)
        classifier.close()
        plain = client.predict("classes", TEXTS)
        for row, document in enumerate(answer["documents"]):
            found = document.meta["classification"]
            assert found["label"] == np.asarray(plain["label"])[row]
            assert found["score"] == pytest.approx(np.asarray(plain["score"])[row], abs=1e-5)
            assert document.meta["number"] == row
        assert all("classification" not in document.meta for document in given)

    def test_a_field_of_the_meta_is_classified(self, client: Client) -> None:
        classifier = ModelyardDocumentClassifier(model="classes", classification_field="title")
        answer = classifier.run([Document(content="x", meta={"title": TEXTS[2]})])
        label = np.asarray(client.predict("classes", [TEXTS[2]])["label"])[0]
        assert answer["documents"][0].meta["classification"]["label"] == label
        with pytest.raises(TypeError, match=r"meta field 'title' of document .* no text but None"):
            classifier.run(documents())
        classifier.close()


class TestRegistration:
    def test_components_that_name_one_model_share_it(self, admin: Admin) -> None:
        device = theirs.ComponentDevice.from_str("cuda:0")
        embedder = ModelyardTextEmbedder(model="team/Other", device=device)
        components = [
            embedder,
            ModelyardDocumentEmbedder(model="team/Other", device=device),
            ModelyardRanker(model="team/Other"),
        ]
        with ThreadPoolExecutor(len(components) * 3) as pool:
            # Whoever names no device takes the model where it is, and would place it elsewhere.
            list(pool.map(lambda component: component.warm_up(), components[:2] * 3))
            for _ in range(2):
                list(pool.map(lambda component: component.warm_up(), components * 3))
        made = [model for model in admin.list_models() if model.folder == "team/Other"]
        assert len(made) == 1
        assert made[0].keys == ("team/Other",)
        assert made[0].placement == ComponentDevice.from_str("cuda:0")
        (residency,) = [r for r in admin.list_residencies() if r.model == made[0].name]
        assert residency.load_count == 1
        assert [charge.device for charge in residency.charges] == ["devices/cuda-0"]
        answer = embedder.run("the dog")
        assert answer["meta"]["key"] == "team/Other"
        assert answer["meta"]["device"] == "cuda:0"
        for component in components:
            component.close()

    @pytest.mark.parametrize(
        "device",
        [
            "cuda:1",
            Device.gpu(1),
            ComponentDevice.from_str("cuda:1"),
            theirs.Device.gpu(1),
            theirs.ComponentDevice.from_single(theirs.Device.gpu(1)),
        ],
        ids=lambda device: f"{type(device).__module__}.{type(device).__name__}",
    )
    def test_a_device_in_any_form_is_where_the_model_lives(self, device: Any, admin: Admin) -> None:
        embedder = ModelyardTextEmbedder("there", model="team/Other", device=device)
        assert embedder.run("the dog")["meta"]["device"] == "cuda:1"
        embedder.close()
        assert isinstance(embedder.device, theirs.ComponentDevice)
        assert admin.get_model("there").placement == ComponentDevice.from_str("cuda:1")

    def test_a_device_map_places_parts(self, admin: Admin, client: Client) -> None:
        device_map = DeviceMap(
            {"embeddings": Device.cpu(), "encoder": Device.gpu(1), "encoder.layer.1": Device.disk()}
        )
        whole = ModelyardTextEmbedder("words")
        parts = ModelyardTextEmbedder("parts", model="words", device=device_map)
        np.testing.assert_allclose(
            parts.run(TEXTS[0])["embedding"], whole.run(TEXTS[0])["embedding"], atol=1e-6
        )
        whole.close()
        parts.close()
        (residency,) = [r for r in admin.list_residencies() if r.model == "models/parts"]
        assert {charge.device for charge in residency.charges} == {
            "devices/cpu",
            "devices/cuda-1",
            "devices/disk",
        }

    def test_without_a_device_the_server_chooses(self, admin: Admin) -> None:
        embedder = ModelyardTextEmbedder(model="team/Other")
        embedder.warm_up()
        embedder.close()
        (made,) = [model for model in admin.list_models() if model.folder == "team/Other"]
        assert made.placement is None

    @pytest.mark.parametrize(
        ("difference", "words"),
        [
            ({"device": "cuda:1"}, "placement 'cuda:0' and not 'cuda:1'"),
            ({"model": "words"}, "folder 'team/Other' and not 'words'"),
            ({"root": "elsewhere"}, "root 'store' and not 'elsewhere'"),
            ({"options": {"pooling": "cls"}}, "options {'pooling': 'mean'} and not"),
        ],
    )
    def test_a_key_that_means_another_model_is_told(
        self, difference: dict[str, Any], words: str
    ) -> None:
        given: dict[str, Any] = {
            "model": "team/Other",
            "device": "cuda:0",
            "options": {"pooling": "mean"},
        }
        first = ModelyardTextEmbedder("mine", **given)
        second = ModelyardTextEmbedder("mine", **given | difference)
        first.warm_up()
        with pytest.raises(AlreadyExists) as refusal:
            second.warm_up()
        first.close()
        second.close()
        assert str(refusal.value).startswith("ModelyardTextEmbedder of key 'mine': ")
        assert words in str(refusal.value)

    def test_a_model_for_another_task_is_told(self) -> None:
        generator = ModelyardGenerator("acme/search", model="words")
        with pytest.raises(AlreadyExists, match="task 'feature-extraction' and not 'text-gen"):
            generator.warm_up()
        generator.close()

    def test_a_model_of_the_configuration_is_used(self, admin: Admin) -> None:
        embedder = ModelyardTextEmbedder("acme/search", model="words", device="cpu")
        embedder.warm_up()
        embedder.close()
        assert model_ids(admin) == ["words"]

    def test_an_operators_plan_counts_more_than_the_device(self, admin: Admin) -> None:
        embedder = ModelyardTextEmbedder("moved", model="team/Other", device="cuda:0")
        embedder.warm_up()
        there = ComponentDevice.from_str("cuda:1")
        admin.apply_plan(DevicePlan(models=(ModelPlacement(model="moved", placement=there),)))
        again = ModelyardTextEmbedder("moved", model="team/Other", device="cuda:0")
        assert again.run("the dog")["meta"]["device"] == "cuda:1"
        embedder.close()
        again.close()

    def test_a_model_that_the_server_forgot_is_registered_again(self, admin: Admin) -> None:
        embedder = ModelyardTextEmbedder("gone", model="team/Other")
        before = embedder.run("the dog")["embedding"]
        admin.delete_model("gone")
        assert embedder.run("the dog")["embedding"] == before
        admin.delete_model("gone")
        assert asyncio.run(embedder.run_async("the dog"))["embedding"] == before
        embedder.close()

    def test_keys_that_cannot_be_ids_do_not_meet(self, admin: Admin) -> None:
        for key in ("acme/Search", "acme-Search", "ACME/search"):
            embedder = ModelyardTextEmbedder(key, model="team/Other")
            embedder.warm_up()
            embedder.close()
        assert len(model_ids(admin)) == 4

    def test_text_that_is_no_key_is_told(self) -> None:
        embedder = ModelyardTextEmbedder(".1", model="team/Other")
        with pytest.raises(InvalidRequest, match=r"of key '\.1'"):
            embedder.warm_up()
        embedder.close()

    def test_warming_up_a_route_loads_what_every_request_runs(self, admin: Admin) -> None:
        for model, folder in (("first", "words"), ("second", "team/Other")):
            admin.create_model(
                model,
                runtime="transformers",
                task="feature-extraction",
                root="store",
                folder=folder,
            )
        admin.create_route(
            "search", ["routed"], target=FallbackTarget(targets=["models/first", "models/second"])
        )
        embedder = ModelyardTextEmbedder("routed")
        embedder.warm_up()
        loads = {r.model: r.load_count for r in admin.list_residencies()}
        assert (loads["models/first"], loads["models/second"]) == (1, 0)
        taken = ModelyardTextEmbedder("routed", model="words")
        with pytest.raises(AlreadyExists, match="key 'routed' is taken"):
            taken.warm_up()
        for component in (embedder, taken):
            component.close()
        admin.delete_route("search")

    def test_warming_up_loads_once_and_then_asks_nothing(
        self, yard: RunningApp, admin: Admin
    ) -> None:
        embedder = ModelyardTextEmbedder("once", model="team/Other")
        embedder.warm_up()
        admin.unload("once")
        embedder.warm_up()
        (residency,) = [r for r in admin.list_residencies() if r.model == "models/once"]
        assert residency.load_count == 1
        # Memory is the server's affair: what left is loaded for whoever asks.
        assert embedder.run("the dog")["meta"]["cold"] is True
        embedder.close()


class TestErrors:
    def test_an_unknown_key_is_named(self) -> None:
        embedder = ModelyardTextEmbedder("nobody/knows")
        with pytest.raises(KeyNotFound) as refusal:
            embedder.run("the dog")
        embedder.close()
        assert str(refusal.value).startswith(
            "ModelyardTextEmbedder of key 'nobody/knows': no model"
        )
        assert refusal.value.reason == "KEY_NOT_FOUND"
        assert isinstance(refusal.value.__cause__, KeyNotFound)

    def test_a_pipeline_shows_component_and_key(self) -> None:
        pipeline = Pipeline()
        pipeline.add_component("writer", ModelyardGenerator(model="llama2"))
        question = {"prompt": "the dog", "generation_kwargs": {"max_new_tokens": 100_000}}
        with pytest.raises(PipelineRuntimeError) as refusal:
            pipeline.run({"writer": question})
        pipeline.close()
        assert "ModelyardGenerator of key 'llama2'" in str(refusal.value)
        assert isinstance(refusal.value.__cause__, InvalidRequest)
        assert refusal.value.__cause__.violations[0].field == "max_new_tokens"

    def test_a_server_that_is_not_there(self) -> None:
        embedder = ModelyardTextEmbedder("words", server="127.0.0.1:1", timeout_s=1)
        with pytest.raises(
            ServerUnavailable, match=r"of key 'words': the server at 127\.0\.0\.1:1"
        ):
            embedder.run("the dog")
        embedder.close()

    def test_devices_that_the_server_does_not_have(self) -> None:
        embedder = ModelyardTextEmbedder("here", model="team/Other", device="xpu:3")
        with pytest.raises(PlacementInvalid, match=r"of key 'here': .*xpu:3"):
            embedder.warm_up()
        embedder.close()

    def test_a_model_that_cannot_be_loaded(self) -> None:
        embedder = ModelyardTextEmbedder(model="mute")
        with pytest.raises(LoadFailed, match=r"of key 'mute': .*tokenizer") as refusal:
            embedder.warm_up()
        embedder.close()
        assert not refusal.value.transient

    @pytest.mark.parametrize(
        ("component", "needed"),
        [
            (ModelyardTextEmbedder("classes"), "'embedding', one vector for each of 1 texts"),
            (ModelyardRanker("classes"), "'embedding', one vector for each of 2 texts"),
        ],
    )
    def test_a_model_that_answers_something_else(
        self, component: Any, needed: str, admin: Admin
    ) -> None:
        admin.create_model(
            "classes",
            runtime="transformers",
            task="text-classification",
            root="store",
            folder="classes",
        )
        arguments = ["the dog", [Document(content="x")]]
        with pytest.raises(UnsuitableModel, match=needed) as refusal:
            component.run(*arguments[: 2 if isinstance(component, ModelyardRanker) else 1])
        component.close()
        assert refusal.value.key == "classes"
        assert refusal.value.model == "models/classes"
        assert refusal.value.outputs == ("label", "score", "probabilities")
        assert str(pickle.loads(pickle.dumps(refusal.value))) == str(refusal.value)

    def test_embeddings_of_tokens_are_no_vectors_of_texts(self) -> None:
        embedder = ModelyardTextEmbedder("tokens", model="team/Other", options={"pooling": "none"})
        with pytest.raises(UnsuitableModel, match="'embeddings', 'mask'"):
            embedder.run("the dog")
        embedder.close()

    def test_arguments_of_no_use(self) -> None:
        with pytest.raises(ValueError, match="ModelyardTextEmbedder needs a key"):
            ModelyardTextEmbedder()
        with pytest.raises(ValueError, match="ModelyardTextEmbedder needs a key"):
            ModelyardTextEmbedder(model="")
        with pytest.raises(ValueError, match="of key 'words' names no model, so there is nothing"):
            ModelyardTextEmbedder("words", device="cpu")
        with pytest.raises(ValueError, match="names no model"):
            ModelyardGenerator("words", huggingface_pipeline_kwargs={"device_map": "auto"})
        with pytest.raises(ValueError, match="Unknown device type"):
            ModelyardTextEmbedder(model="words", device="gpu:0")
        with pytest.raises(ValueError, match="it holds neither"):
            ModelyardTextEmbedder(model="words", device=theirs.ComponentDevice())
        with pytest.raises(TypeError, match="key must be a str or None, got int"):
            LAX["ModelyardTextEmbedder"](7)
        with pytest.raises(TypeError, match="options must be a dict or None, got str"):
            LAX["ModelyardTextEmbedder"](model="words", options="cls")
        with pytest.raises(ValueError, match="timeout_s is 0"):
            ModelyardTextEmbedder("words", timeout_s=0)


class TestPipelines:
    def index(self, store: InMemoryDocumentStore) -> Pipeline:
        pipeline = Pipeline()
        pipeline.add_component(
            "embedder", ModelyardDocumentEmbedder(model="team/Other", device="cuda:0")
        )
        pipeline.add_component("writer", DocumentWriter(store))
        pipeline.connect("embedder.documents", "writer.documents")
        return pipeline

    def query(self, store: InMemoryDocumentStore) -> Pipeline:
        device = theirs.ComponentDevice.from_str("cuda:0")
        pipeline = Pipeline()
        pipeline.add_component("embedder", ModelyardTextEmbedder(model="team/Other", device=device))
        pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=4))
        pipeline.add_component("ranker", ModelyardRanker("acme/search", top_k=2))
        pipeline.connect("embedder.embedding", "retriever.query_embedding")
        pipeline.connect("retriever.documents", "ranker.documents")
        return pipeline

    def test_two_embedders_and_a_ranker(self, admin: Admin, client: Client) -> None:
        store = InMemoryDocumentStore()
        index, query = self.index(store), self.query(store)
        assert index.run({"embedder": {"documents": documents()}})["writer"] == {
            "documents_written": len(TEXTS)
        }
        question = {"embedder": {"text": "the dog sat"}, "ranker": {"query": "the dog sat"}}
        found = query.run(question)["ranker"]["documents"]
        assert len(found) == 2
        assert found[0].score >= found[1].score

        # What the retriever gave the ranker, ranked by the other model's vectors.
        retrieved = query.run(question, include_outputs_from={"retriever"})["retriever"]
        vectors = np.asarray(
            client.predict("words", ["the dog sat", *(d.content for d in retrieved["documents"])])[
                "embedding"
            ]
        )
        best = int(np.argmax([cosine(vectors[0], vector) for vector in vectors[1:]]))
        assert found[0].content == retrieved["documents"][best].content

        # Two pipelines, two embedders, one model.
        assert len(model_ids(admin)) == 2
        loads = {r.model: r.load_count for r in admin.list_residencies()}
        assert set(loads.values()) == {1}, loads
        index.close()
        query.close()

    def test_a_pipeline_survives_yaml(self) -> None:
        store = InMemoryDocumentStore()
        index, query = self.index(store), self.query(store)
        index.run({"embedder": {"documents": documents()}})
        text = query.dumps()
        data = query.to_dict()["components"]["embedder"]
        assert data["type"] == "modelyard.integrations.haystack.embedders.ModelyardTextEmbedder"
        assert data["init_parameters"] == {
            "key": None,
            "model": "team/Other",
            "root": "store",
            "device": {"type": "single", "device": "cuda:0"},
            "options": None,
            "server": None,
            "timeout_s": 30.0,
            "load_timeout_s": 300.0,
            "prefix": "",
            "suffix": "",
        }
        with pytest.raises(DeserializationError, match="modelyard"):
            Pipeline.loads(text)
        # The store in memory is no part of the text, so this one reads what the other wrote.
        read = Pipeline.loads(text, allowed_modules=MODULES)
        assert read.dumps() == text
        question = {"embedder": {"text": "the dog sat"}, "ranker": {"query": "the dog sat"}}
        assert read.run(question) == query.run(question)
        for pipeline in (index, query, read):
            pipeline.close()

    @pytest.mark.parametrize(
        "component",
        [
            ModelyardTextEmbedder("a/b", prefix="x", suffix="y"),
            ModelyardDocumentEmbedder(
                model="m",
                device=DeviceMap({"a": Device.gpu(1), "": Device.disk()}),
                options={"pooling": "cls"},
                meta_fields_to_embed=["t"],
                embedding_separator=" ",
                batch_size=3,
            ),
            ModelyardRanker(
                "k", top_k=None, score_threshold=0.25, query_prefix="q", document_prefix="d"
            ),
            ModelyardGenerator(
                model="m",
                device="cuda:0",
                huggingface_pipeline_kwargs={"device_map": {"a": 0, "b": "disk"}},
                generation_kwargs={"temperature": 0.5},
                stop_words=["."],
                streaming_callback=print_streaming_chunk,
            ),
            ModelyardDocumentClassifier(
                "k", model="m", root="r", server="h:1", classification_field="f", timeout_s=2
            ),
        ],
        ids=lambda component: type(component).__name__,
    )
    def test_every_argument_survives(self, component: Any) -> None:
        data = component.to_dict()
        assert json.loads(json.dumps(data)) == data
        read = type(component).from_dict(copy.deepcopy(data))
        assert read.to_dict() == data
        assert read.device == component.device
        # What Haystack does with a component that has no to_dict of its own.
        given = data["init_parameters"]
        plain = given.keys() - {"device", "streaming_callback"}
        assert {name: getattr(read, name) for name in plain} == {
            name: given[name] for name in plain
        }
        if callback := given.get("streaming_callback"):
            assert callback.endswith("print_streaming_chunk")
            assert read.streaming_callback is print_streaming_chunk

    def test_a_device_may_be_text_or_null_in_yaml(self) -> None:
        data = ModelyardTextEmbedder(model="m").to_dict()
        assert data["init_parameters"]["device"] is None
        assert ModelyardTextEmbedder.from_dict(data).device is None
        data["init_parameters"]["device"] = "cuda:1"
        assert ModelyardTextEmbedder.from_dict(data).device == theirs.ComponentDevice.from_str(
            "cuda:1"
        )

    def test_copies_connect_for_themselves(self) -> None:
        embedder = ModelyardTextEmbedder("words")
        vector = embedder.run("the dog")["embedding"]
        for twin in (copy.deepcopy(embedder), pickle.loads(pickle.dumps(embedder))):
            embedder.close()
            assert twin.run("the dog")["embedding"] == vector
            twin.close()
        # And one that was closed connects again.
        assert embedder.run("the dog")["embedding"] == vector
        embedder.close()


class TestAsync:
    async def test_a_pipeline_runs_without_blocking(self) -> None:
        given = TestPipelines()
        store = InMemoryDocumentStore()
        index, query = given.index(store), given.query(store)
        await index.run_async({"embedder": {"documents": documents()}})
        question = {"embedder": {"text": "the dog sat"}, "ranker": {"query": "the dog sat"}}
        answer = await query.run_async(question)
        assert answer == await asyncio.to_thread(query.run, question)
        await index.close_async()
        await query.close_async()

    async def test_every_component_answers_as_it_does_blocking(self) -> None:
        cases: list[tuple[Any, dict[str, Any]]] = [
            (ModelyardTextEmbedder("words"), {"text": "the dog"}),
            (ModelyardDocumentEmbedder("words", batch_size=2), {"documents": documents()}),
            (ModelyardRanker("words"), {"query": "dog", "documents": documents(), "top_k": 2}),
            (ModelyardGenerator(model="llama2"), {"prompt": "the dog"}),
            (ModelyardDocumentClassifier(model="classes"), {"documents": documents()}),
        ]
        for component, inputs in cases:
            assert await component.run_async(**inputs) == await asyncio.to_thread(
                component.run, **inputs
            )
            await component.close_async()

    async def test_errors_name_the_key(self) -> None:
        embedder = ModelyardTextEmbedder("nobody")
        for ask in (embedder.warm_up_async(), embedder.run_async("the dog")):
            with pytest.raises(KeyNotFound, match="ModelyardTextEmbedder of key 'nobody'"):
                await ask
        await embedder.close_async()

    def test_one_event_loop_after_the_other(self) -> None:
        embedder = ModelyardTextEmbedder("words")
        first = asyncio.run(embedder.run_async("the dog"))
        assert asyncio.run(embedder.run_async("the dog")) == first
        embedder.close()
