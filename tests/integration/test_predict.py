"""Predictions over a real channel: right answers, within the budget, while models come and go."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.support import faulty_models, tiny_models
from tests.support.bare_calls import PREDICT, X_TENSOR, request_of, send_refused
from tests.support.config_text import ALLOWED, CPU, ROOTS, device_table, model_table
from tests.support.server import RunningApp, eventually, refusal_of, running_app

from modelyard import Admin, Client, Prediction, ResidencyState

TEXTS = ["the big dog ran", "a bird flew over the river house", "i hate this"]


def assert_close(answer: object, wanted: Any, *, tolerance: float = 1e-6) -> None:
    """Same shape, and the same numbers as far as another order of summation allows."""
    assert isinstance(answer, np.ndarray)
    expected = np.asarray(wanted)
    assert answer.shape == expected.shape
    np.testing.assert_allclose(answer, expected, rtol=10 * tolerance, atol=tolerance)


def encode(folder: Path, texts: Sequence[str], **settings: Any) -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer(list(texts), padding=True, return_tensors="pt", **settings)


# Every runtime and every task


async def test_embeddings_equal_those_of_the_library(tmp_path: Path) -> None:
    folder = tiny_models.make_tiny_bert(tmp_path / "store" / "embedder", seed=1)
    config = CPU + ROOTS
    for pooling in ("mean", "cls", "none"):
        (tmp_path / "store" / pooling).mkdir()
        for file in folder.iterdir():
            (tmp_path / "store" / pooling / file.name).write_bytes(file.read_bytes())
        config += model_table(
            pooling,
            "transformers",
            task="feature-extraction",
            options={"pooling": pooling, "normalize": pooling == "cls"},
        )
    async with running_app(config, tmp_path) as yard:
        mean = await yard.client.predict("mean", TEXTS)
        cls = await yard.client.predict("cls", TEXTS)
        none = await yard.client.predict("none", TEXTS)

    batch = encode(folder, TEXTS)
    with torch.inference_mode():
        states = transformers.BertModel.from_pretrained(folder)(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    assert_close(mean.only, (states * mask).sum(1) / mask.sum(1))
    first = torch.nn.functional.normalize(states[:, 0], dim=-1)
    assert_close(cls.only, first)
    assert_close(none["embeddings"], states * mask)
    np.testing.assert_array_equal(none["mask"], mask.squeeze(-1).bool())


async def test_classes_equal_those_of_the_library(tmp_path: Path) -> None:
    labels = ["bad", "good", "neither"]
    folder = tiny_models.make_tiny_bert(tmp_path / "store" / "sentiment", seed=2, labels=labels)
    config = CPU + ROOTS
    config += model_table("sentiment", "transformers", task="text-classification")
    async with running_app(config, tmp_path) as yard:
        prediction = await yard.client.predict("sentiment", TEXTS)

    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        wanted = model(**encode(folder, TEXTS)).logits.softmax(-1)
    assert_close(prediction["probabilities"], wanted)
    assert_close(prediction["score"], wanted.max(-1).values)
    assert prediction["label"] == [labels[index] for index in wanted.argmax(-1)]
    assert list(prediction) == ["label", "score", "probabilities"]


async def test_fillings_equal_those_of_the_library(tmp_path: Path) -> None:
    folder = tiny_models.make_tiny_masked_lm(tmp_path / "store" / "filler", seed=3)
    config = CPU + ROOTS + model_table("filler", "transformers", task="fill-mask")
    texts = ["the [MASK] ran", "i like the big [MASK] on the mat"]
    async with running_app(config, tmp_path) as yard:
        prediction = await yard.client.predict("filler", texts, parameters={"top_k": 3})

    batch = encode(folder, texts)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.inference_mode():
        logits = transformers.BertForMaskedLM.from_pretrained(folder)(**batch).logits
    gaps = (batch["input_ids"] == tokenizer.mask_token_id).nonzero()[:, 1]
    best = logits[torch.arange(2), gaps].softmax(-1).topk(3)
    assert_close(prediction["score"], best.values)
    wanted = [tokenizer.convert_ids_to_tokens(row) for row in best.indices.tolist()]
    assert np.asarray(prediction["token"]).tolist() == wanted


async def test_continuations_equal_those_of_the_library(tmp_path: Path) -> None:
    folder = tiny_models.make_tiny_gpt2(tmp_path / "store" / "writer", seed=4)
    config = CPU + ROOTS + model_table("writer", "transformers", task="text-generation")
    async with running_app(config, tmp_path) as yard:
        prediction = await yard.client.predict("writer", TEXTS, parameters={"max_new_tokens": 7})

    model: Any = transformers.GPT2LMHeadModel.from_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    wanted, counts = [], []
    # One by one: without padding there is nothing to get wrong.
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=7,
            do_sample=False,
            pad_token_id=0,
        )
        written = made[0, ids.shape[1] :]
        wanted.append(tokenizer.decode(written, skip_special_tokens=True))
        counts.append(len(written))
    assert prediction["text"] == wanted
    assert np.asarray(prediction["token_count"]).tolist() == counts


async def test_image_classes_equal_those_of_the_library(tmp_path: Path) -> None:
    folder = tiny_models.make_tiny_vit(tmp_path / "store" / "looker", seed=5)
    config = CPU + ROOTS + model_table("looker", "transformers", task="image-classification")
    random_numbers = np.random.default_rng(7)
    images = random_numbers.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    prepared = (images.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.5
    async with running_app(config, tmp_path) as yard:
        raw = await yard.client.predict("looker", images)
        ready = await yard.client.predict("looker", prepared)

    model = transformers.ViTForImageClassification.from_pretrained(folder)
    with torch.inference_mode():
        wanted = model(pixel_values=torch.from_numpy(prepared)).logits.softmax(-1)
    for prediction in (raw, ready):
        assert_close(prediction["probabilities"], wanted, tolerance=1e-5)


async def test_torch_modules_answer_as_they_do_here(tmp_path: Path) -> None:
    folder = tiny_models.make_tiny_mlp(tmp_path / "store" / "net", seed=6)
    config = CPU + ROOTS + ALLOWED
    config += model_table(
        "net",
        "torch",
        options={
            "factory": tiny_models.MLP_FACTORY,
            "factory_options": {"scale": 2.5},
            "outputs": ["y"],
        },
    )
    x = np.random.default_rng(8).standard_normal((5, 8)).astype(np.float32)
    async with running_app(config, tmp_path) as yard:
        unnamed = await yard.client.predict("net", x)
        named = await yard.client.predict("net", {"x": x})

    module = tiny_models.TinyMlp(scale=2.5)
    module.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.inference_mode():
        wanted = module(torch.from_numpy(x))
    for prediction in (unnamed, named):
        assert list(prediction) == ["y"]
        assert_close(prediction.only, wanted)


async def test_an_identity_model_answers_bit_by_bit(tmp_path: Path) -> None:
    config = CPU + model_table("echo", "identity")
    inputs: dict[str, Any] = {
        "numbers": np.array([np.nan, -np.inf, 5e-324, -0.0]),
        "texts": ["", "ä\0\N{GRINNING FACE}"],
        "bytes": [b"", b"\x00\xff"],
        "flags": np.array([[True], [False]]),
        "nothing": np.zeros((0, 3), np.int16),
        "one": np.array(7, np.uint64),
    }
    async with running_app(config, tmp_path) as yard:
        prediction = await yard.client.predict("echo", inputs)
    assert list(prediction) == list(inputs)
    for name, value in inputs.items():
        answer = prediction[name]
        if isinstance(value, np.ndarray):
            assert isinstance(answer, np.ndarray)
            assert (answer.dtype, answer.shape) == (value.dtype, value.shape)
            assert answer.tobytes() == value.tobytes()
        else:
            assert answer == value


# Keys and what is told about the way of a request


async def test_all_keys_of_a_model_lead_to_it(tmp_path: Path) -> None:
    config = CPU + model_table("echo", "identity", keys=["acme/Echo:v1", "E"])
    async with running_app(config, tmp_path) as yard:
        for key in ("echo", "acme/Echo:v1", "E"):
            prediction = await yard.client.predict(key, "hello")
            assert prediction.served.model == "models/echo"
        refusal = await refusal_of(yard.client.predict("e", "hello"))
        assert refusal.reason == "KEY_NOT_FOUND"
        assert (await yard.residency("echo")).load_count == 1


async def test_the_first_request_is_cold_and_the_next_a_hit(tmp_path: Path) -> None:
    config = CPU + model_table("echo", "identity", options={"size_bytes": 1_000_000})
    async with running_app(config, tmp_path) as yard:
        first = (await yard.client.predict("echo", "a")).served
        began = asyncio.get_running_loop().time()
        second = (await yard.client.predict("echo", "a")).served
        took_s = asyncio.get_running_loop().time() - began
        assert first.model == second.model == "models/echo"
        assert first.device == second.device == "devices/cpu"
        assert first.cold
        assert first.load_s is not None
        assert 0 < first.load_s <= first.wait_s + 0.001
        assert not second.cold
        assert second.load_s is None
        assert second.run_s > 0
        assert second.wait_s + second.run_s <= took_s
        stats = await yard.admin(Admin.stats)
        assert (stats.answered_count, stats.cold_count, stats.hit_count) == (2, 1, 1)


async def test_models_are_placed_on_the_device_they_name(tmp_path: Path) -> None:
    config = device_table("cpu", "1MB")
    for index in range(2):
        config += device_table(f"cuda:{index}", "1MB", logical=True)
    size = {"size_bytes": 600_000}
    config += model_table("on-one", "identity", device="cuda:1", options=size)
    config += model_table("on-any", "identity", device="cuda", options=size)
    config += model_table("anywhere", "identity", options=size)
    async with running_app(config, tmp_path) as yard:
        for model, allowed in (
            ("on-one", {"devices/cuda-1"}),
            ("on-any", {"devices/cuda-0"}),
            ("anywhere", {"devices/cpu"}),
        ):
            served = (await yard.client.predict(model, "a")).served
            assert served.device in allowed
        devices = await yard.admin(Admin.list_devices)
        assert [device.resident_bytes for device in devices] == [600_000] * 3
        assert sum(device.eviction_count for device in devices) == 0


# More models than there is room for


@dataclass(frozen=True)
class Zoo:
    """Six models of one size, and what they answer to TEXTS."""

    config: str
    answers: dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def zoo(zoo_folder: Path) -> Zoo:
    config = CPU + ROOTS
    answers = {}
    for index in range(6):
        name = f"animal-{index}"
        folder = tiny_models.make_tiny_bert(
            zoo_folder / "store" / name, seed=100 + index, num_labels=4
        )
        config += model_table(name, "transformers", task="text-classification")
        model = transformers.BertForSequenceClassification.from_pretrained(folder)
        with torch.inference_mode():
            answers[name] = model(**encode(folder, TEXTS)).logits.softmax(-1).numpy()
    return Zoo(config=config, answers=answers)


def adversarial_order(names: Sequence[str], seed: int) -> list[str]:
    """60 requests: round and round, there and back, the just evicted one again, and by chance."""
    there_and_back = [*names, *reversed(names)]
    again = [name for pair in pairwise(names) for name in (*pair, pair[0])]
    chance = random.Random(seed)
    order = [*names, *names, *there_and_back, *again]
    return order + chance.choices(names, k=60 - len(order))


@pytest.mark.parametrize("policy", ["ensemble", "learned", "gap", "lru"])
@pytest.mark.parametrize("at_once", [1, 8])
async def test_more_models_than_room_are_served_right_and_within_the_budget(
    zoo: Zoo, zoo_folder: Path, policy: str, at_once: int
) -> None:
    order = adversarial_order(list(zoo.answers), seed=11)
    assert len(order) == 60
    async with running_app(f'[yard]\npolicy = "{policy}"\n{zoo.config}', zoo_folder) as yard:
        models = await yard.admin(Admin.list_models)
        size_bytes = max(model.estimated_bytes for model in models)
        # Room for two and almost for a third.
        budget = 3 * size_bytes - 1
        await yard.admin(Admin.update_budget, "cpu", budget)

        turns = asyncio.Semaphore(at_once)
        with Client(yard.target) as blocking:

            async def ask(index: int, name: str) -> Prediction:
                async with turns:
                    if index % 2:
                        return await asyncio.to_thread(blocking.predict, name, TEXTS)
                    return await yard.client.predict(name, TEXTS)

            predictions = await asyncio.gather(
                *(ask(index, name) for index, name in enumerate(order))
            )
        for name, prediction in zip(order, predictions, strict=True):
            assert prediction.served.model == f"models/{name}"
            assert_close(prediction["probabilities"], zoo.answers[name])

        await yard.at_rest()
        device = await yard.device()
        assert 0 < device.peak_accounted_bytes <= budget
        assert 0 < device.peak_measured_bytes <= budget
        assert device.measured_bytes == device.resident_bytes <= budget
        assert device.deficit_bytes == device.quarantined_bytes == 0
        assert device.eviction_count >= 4
        assert device.load_count - device.eviction_count <= 2
        stats = await yard.admin(Admin.stats)
        assert stats.answered_count == 60
        assert stats.load_count == device.load_count
        assert stats.cold_count + stats.hit_count == 60
        assert stats.load_failure_count == 0


# Many at once


async def test_many_requests_for_one_cold_model_are_one_load(tmp_path: Path) -> None:
    config = CPU + model_table("echo", "identity", options={"size_bytes": 20_000_000})
    async with running_app(config, tmp_path) as yard:
        predictions = await asyncio.gather(
            *(yard.client.predict("echo", np.array([i])) for i in range(50))
        )
        for index, prediction in enumerate(predictions):
            assert np.asarray(prediction.only).tolist() == [index]
        assert (await yard.residency("echo")).load_count == 1
        stats = await yard.admin(Admin.stats)
        assert stats.load_count == 1
        assert stats.cold_count >= 1
        assert stats.cold_count + stats.hit_count == 50


HASTY = "[server]\ndefault_deadline_s = 0.5\n"
"""For calls without a deadline: who has one may hear of its end from the own clock first."""


def stuck_config(folder: Path, extra: str = "") -> str:
    """A model that is resident soon, and one whose load waits at a gate."""
    faulty_models.make_weights(folder / "store" / "quick", value=2.0)
    faulty_models.make_weights(folder / "store" / "stuck", value=3.0)
    config = CPU + ROOTS + ALLOWED
    config += model_table("quick", "torch", options={"factory": faulty_models.factory("Adding")})
    config += model_table(
        "stuck",
        "torch",
        options={
            "factory": faulty_models.factory("StuckInLoad"),
            "factory_options": {"gate": folder / "gate"},
        },
    )
    return config + model_table("echo", "identity") + extra


async def loading(yard: RunningApp, gate: faulty_models.Gate) -> None:
    """Has the stuck model be loaded, up to its gate."""
    await yard.admin(Admin.load, "stuck")
    await eventually("the load is stuck", gate.is_waited_at)
    assert (await yard.residency("stuck")).state is ResidencyState.LOADING


X = np.ones(3, np.float32)


async def test_hits_are_answered_while_a_load_is_stuck(tmp_path: Path) -> None:
    async with running_app(stuck_config(tmp_path), tmp_path) as yard:
        for model in ("quick", "echo"):
            await yard.client.predict(model, X)
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            await loading(yard, gate)
            for _ in range(20):
                quick = await yard.client.predict("quick", X)
                echo = await yard.client.predict("echo", X)
                assert not quick.served.cold
                assert not echo.served.cold
                np.testing.assert_array_equal(quick.only, X + 2)
            assert gate.is_waited_at()
            await yard.admin(Admin.stats)
        prediction = await yard.client.predict("stuck", X)
        np.testing.assert_array_equal(prediction.only, X + 3)


async def test_a_load_outlives_the_deadline_of_its_request_and_is_used(tmp_path: Path) -> None:
    async with running_app(HASTY + stuck_config(tmp_path), tmp_path) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            refused = await send_refused(
                yard, PREDICT, request_of("stuck", X_TENSOR), timeout_s=None
            )
            assert refused.reason == "DEADLINE_IN_LOAD"
            await eventually("the load is stuck", gate.is_waited_at)
            residency = await yard.residency("stuck")
            assert residency.state is ResidencyState.LOADING
            assert residency.waiting_request_count == 0
        await yard.becomes("stuck", ResidencyState.RESIDENT)
        prediction = await yard.client.predict("stuck", X)
        assert not prediction.served.cold
        np.testing.assert_array_equal(prediction.only, X + 3)
        assert (await yard.residency("stuck")).load_count == 1


async def test_a_request_behind_a_stuck_load_runs_out_of_time_in_the_queue(tmp_path: Path) -> None:
    async with running_app(HASTY + stuck_config(tmp_path), tmp_path) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            await loading(yard, gate)
            refused = await send_refused(
                yard, PREDICT, request_of("quick", X_TENSOR), timeout_s=None
            )
            assert refused.reason == "DEADLINE_IN_QUEUE"
        prediction = await yard.client.predict("quick", X)
        np.testing.assert_array_equal(prediction.only, X + 2)


async def test_loads_of_other_devices_do_not_wait_for_a_stuck_one(tmp_path: Path) -> None:
    other = device_table("cpu:1", "1MB", logical=True)
    other += model_table("away", "identity", device="cpu:1", options={"size_bytes": 1000})
    async with running_app(stuck_config(tmp_path, other), tmp_path) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            await loading(yard, gate)
            prediction = await yard.client.predict("away", X)
            assert prediction.served.cold
            assert gate.is_waited_at()
