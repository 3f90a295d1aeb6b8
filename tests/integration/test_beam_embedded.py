"""Beam handlers with a yard inside the worker: budgets in bytes, sharing, updates, what is left."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import faulty_models
from tests.support.server import ROOT, child_environment

from modelyard import InvalidRequest, KeyNotFound, LoadFailed, ManagedDevice, Residency

pytest.importorskip("apache_beam")

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference
from tests.support.beam_pipelines import (
    COLLECTED,
    collect,
    metrics_of,
    own_temporary_folder,
    run_pipeline,
)

from modelyard.integrations.beam import (
    EmbeddedYard,
    KeyedModelHandler,
    KeyModelMapping,
    KeyModelPathMapping,
    KeyModelUpdate,
    YardModel,
    YardModelHandler,
    is_error,
)
from modelyard.integrations.beam._yard import YardAccess

ADDING = faulty_models.factory("Adding")


def adder(base: Path, name: str, value: float) -> YardModel:
    """A model that adds a value, under its own name."""
    return YardModel.torch(faulty_models.make_weights(base / name, value=value), ADDING, name=name)


def one(value: float) -> Any:
    return np.array([value], np.float32)


class Yard:
    """A yard of this process, for looking inside."""

    def __init__(self, yard: EmbeddedYard) -> None:
        self.yard = yard

    @property
    def access(self) -> YardAccess:
        return YardAccess.to(self.yard)

    def loads(self) -> dict[str, int]:
        found: Sequence[Residency] = self.access.admin.list_residencies()
        return {one.model.removeprefix("models/"): one.load_count for one in found}

    def device(self) -> ManagedDevice:
        return self.access.admin.get_device("cpu")


@pytest.fixture
def make_yard(tmp_path: Path) -> Iterator[Callable[..., Yard]]:
    """Makes yards that run from then on, and stops them at the end: nothing of them is left."""
    made: list[Yard] = []
    running = []

    def make(budget: object = "64MB", **settings: Any) -> Yard:
        yard = Yard(
            EmbeddedYard(budgets={"cpu": budget}, name=f"{tmp_path}-{len(made)}", **settings)
        )
        made.append(yard)
        # Kept: by itself it would end between two pipelines.
        running.append(yard.yard.running())
        return yard

    before = set(threading.enumerate())
    yield make
    for yard in made:
        assert yard.yard.stop()
    prefixes = ("embedded", "lane-", "load-", "price")
    left = [
        thread.name
        for thread in threading.enumerate()
        if thread not in before and thread.name.startswith(prefixes)
    ]
    assert not left


def size_of_one(base: Path, make_yard: Callable[..., Yard]) -> int:
    """What a model of `adder` is charged."""
    yard = make_yard()
    model = yard.access.register(adder(base, "measured", 0))
    return yard.access.admin.get_model(model).estimated_bytes


def test_five_models_in_room_for_four_need_few_loads(
    tmp_path: Path, make_yard: Callable[..., Yard]
) -> None:
    """Beam's own handler loads 200 times for these 200 requests: facts of its release 2.77."""
    yard = make_yard(4 * size_of_one(tmp_path, make_yard))
    mappings = [KeyModelMapping([f"k{n}"], adder(tmp_path, f"m{n}", 100.0 * n)) for n in range(5)]
    handler = KeyedModelHandler(mappings, yard=yard.yard, min_batch_size=50, max_batch_size=50)
    elements = [(f"k{n % 5}", one(n)) for n in range(200)]
    results, run = run_pipeline(elements, handler)
    assert [key for key, _ in results] == [key for key, _ in elements]
    for n, (_, result) in enumerate(results):
        assert result.inference == n + 100 * (n % 5)
    loads = yard.loads()
    assert len(loads) == 5
    # Four batches, in each of them every model once at the most.
    assert sum(loads.values()) <= 20
    device = yard.device()
    assert device.peak_accounted_bytes <= device.budget_bytes
    metrics = metrics_of(run)
    assert metrics["BeamML_KeyedModels/num_inferences"] == 200
    assert metrics["BeamML_KeyedModels/yard_calls"] == 4


def test_threads_steps_and_copies_of_a_handler_share_one_budget(
    tmp_path: Path, make_yard: Callable[..., Yard]
) -> None:
    """Beam adds its hint up for each copy of a handler, and breaks on loads that overlap."""
    size = size_of_one(tmp_path, make_yard)
    yard = make_yard(2 * size)
    handler = KeyedModelHandler(
        [KeyModelMapping([n], adder(tmp_path, f"m{n}", 100.0 * n)) for n in range(5)],
        yard=yard.yard,
    )
    begin = threading.Barrier(4)

    def work(number: int) -> list[float]:
        mine: KeyedModelHandler = pickle.loads(pickle.dumps(handler))
        model = mine.load_model()
        begin.wait(60)
        told = []
        for turn in range(10):
            batch = [((number + turn + n) % 5, one(n)) for n in range(6)]
            for (key, result), (asked, array) in zip(
                mine.run_inference(batch, model), batch, strict=True
            ):
                assert key == asked
                told.append(float(result.inference[0]) - 100.0 * asked - float(array[0]))
        return told

    with ThreadPoolExecutor(4) as threads:
        assert [list(told) for told in threads.map(work, range(4))] == [[0.0] * 60] * 4
    device = yard.device()
    assert device.budget_bytes == 2 * size
    assert device.peak_accounted_bytes <= device.budget_bytes
    assert len(yard.loads()) == 5


def test_a_hint_is_room_for_the_largest_models(
    tmp_path: Path, make_yard: Callable[..., Yard]
) -> None:
    sizes = {"small": 1024, "middle": 4096, "large": 16384}
    mappings = []
    for number, (name, rows) in enumerate(sizes.items()):
        folder = faulty_models.make_weights(tmp_path / name, value=number, rows=rows)
        made = YardModel.torch(folder, ADDING, {"rows": rows}, name=name)
        mappings.append(KeyModelMapping([name], made))
    handler = KeyedModelHandler(
        mappings, max_models_per_worker_hint=2, yard=EmbeddedYard(name=str(tmp_path))
    )
    model = handler.load_model()
    try:
        results = handler.run_inference([(name, one(0)) for name in sizes], model)
        assert [float(result.inference[0]) for _, result in results] == [0, 1, 2]
        access = YardAccess.to(handler._yard)
        device = access.admin.get_device("cpu")
        estimates = {name: access.admin.get_model(name).estimated_bytes for name in sizes}
        assert device.budget_bytes == estimates["large"] + estimates["middle"]
        assert device.peak_accounted_bytes <= device.budget_bytes
    finally:
        assert handler._yard.stop()


def test_two_steps_of_a_pipeline_hold_their_common_model_once(
    tmp_path: Path, make_yard: Callable[..., Yard]
) -> None:
    """In Beam each step loads its own."""
    yard = make_yard()
    model = adder(tmp_path, "m", 10)
    first, second = (YardModelHandler(model, yard.yard) for _ in range(2))
    results, _ = run_pipeline(
        [one(1), one(2)],
        first,
        then=lambda out: out | beam.Map(_inference) | "again" >> RunInference(second),
    )
    assert sorted(float(result.inference[0]) for result in results) == [21, 22]
    assert yard.loads() == {"m": 1}


def _inference(result: Any) -> Any:
    return result.inference


def test_a_broken_model_breaks_only_itself_and_can_be_mended(
    tmp_path: Path, make_yard: Callable[..., Yard]
) -> None:
    yard = make_yard()
    handler = KeyedModelHandler(
        [
            KeyModelMapping(["good"], adder(tmp_path, "good", 1)),
            KeyModelMapping(["bad"], adder(tmp_path, "bad", 2)),
        ],
        yard=yard.yard,
        on_error="return",
        max_retries=0,
    )
    model = handler.load_model()
    file = tmp_path / "bad" / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    batch = [("bad", one(0)), ("good", one(0)), ("unheard-of", one(0)), ("good", one(1))]
    results = handler.run_inference(batch, model)
    assert [is_error(result) for result in results] == [True, False, True, False]
    assert isinstance(results[0][1].inference, LoadFailed)
    assert isinstance(results[2][1].inference, KeyNotFound)
    file.write_bytes(content)
    # It rests after its failure, unless somebody says that it has been mended.
    yard.access.admin.load("bad")
    results = handler.run_inference(batch[:2], model)
    assert [float(result.inference[0]) for _, result in results] == [2, 1]


def test_what_cannot_be_a_model_is_refused_when_the_worker_starts(
    tmp_path: Path, make_yard: Callable[..., Yard]
) -> None:
    yard = make_yard()
    missing = YardModel.torch(tmp_path / "nowhere", ADDING)
    with pytest.raises(InvalidRequest, match="the model's folder is missing"):
        YardModelHandler(missing, yard.yard).load_model()
    unknown = YardModel(runtime="identity", options={"colour": "red"})
    with pytest.raises(InvalidRequest, match="colour"):
        YardModelHandler(unknown, yard.yard).load_model()
    faulty_models.make_weights(tmp_path / "x")
    twice = [
        YardModel.torch(tmp_path / "x", ADDING, name="x"),
        YardModel.torch(tmp_path / "x", ADDING, {"rows": 8}, name="x"),
    ]
    YardModelHandler(twice[0], yard.yard).load_model()
    with pytest.raises(ValueError, match="another model of the name 'x'"):
        YardModelHandler(twice[1], yard.yard).load_model()
    with pytest.raises(ValueError, match="two different models have the name 'x'"):
        KeyedModelHandler([KeyModelMapping([n], model) for n, model in enumerate(twice)])


class TestUpdates:
    """What keys mean changes while they are asked for."""

    @staticmethod
    def handler(base: Path, yard: Yard) -> KeyedModelHandler:
        return KeyedModelHandler(
            [
                KeyModelMapping(["k1", "k2"], adder(base, "a", 10)),
                KeyModelMapping(["k3"], adder(base, "b", 20)),
            ],
            yard=yard.yard,
            on_error="return",
        )

    @staticmethod
    def answers(handler: KeyedModelHandler, model: Any, *keys: str) -> list[Any]:
        results = handler.run_inference([(key, one(0)) for key in keys], model)
        return [
            type(result.inference) if is_error(result) else float(result.inference[0])
            for _, result in results
        ]

    def test_a_cohort_is_split_and_the_new_model_is_loaded_first(
        self, tmp_path: Path, make_yard: Callable[..., Yard]
    ) -> None:
        yard = make_yard()
        handler = self.handler(tmp_path, yard)
        model = handler.load_model()
        assert self.answers(handler, model, "k1", "k2", "k3") == [10, 10, 20]
        new = faulty_models.make_weights(tmp_path / "new", value=30)
        update = [KeyModelPathMapping(keys=["k2"], update_path=str(new))]
        handler.update_model_paths(model, update)
        target = model.meanings()["k2"]
        # It is there, and nobody has asked for it yet.
        assert yard.loads()[target] == 1
        results = handler.run_inference([("k2", one(0))], model)
        assert results[0][1].model_id == target
        assert yard.access.admin.list_routes() == ()
        assert self.answers(handler, model, "k1", "k2", "k3") == [10, 30, 20]
        # Beam tells the same update with every batch.
        handler.update_model_paths(model, update)
        assert yard.loads()[target] == 1

    def test_an_update_that_cannot_be_done_changes_nothing(
        self, tmp_path: Path, make_yard: Callable[..., Yard], caplog: pytest.LogCaptureFixture
    ) -> None:
        yard = make_yard()
        handler = self.handler(tmp_path, yard)
        model = handler.load_model()
        assert self.answers(handler, model, "k1", "k3") == [10, 20]
        before = model.meanings()
        new = faulty_models.make_weights(tmp_path / "new", value=30)
        # Of another shape than its factory's.
        wrong = faulty_models.make_weights(tmp_path / "wrong", rows=7)
        for path, error in ((wrong, LoadFailed), (tmp_path / "nowhere", InvalidRequest)):
            update = [
                KeyModelPathMapping(keys=["k1"], update_path=str(new)),
                KeyModelPathMapping(keys=["k3"], update_path=str(path)),
            ]
            with pytest.raises(error):
                model.update(update)
            assert model.meanings() == before
            # Beam's workers go on, and try it again neither at once nor with every batch.
            handler.update_model_paths(model, update)
            assert "the update cannot be done now" not in caplog.text
        handler.update_model_paths(model, [KeyModelPathMapping(["k1"], str(wrong))])
        assert "the update cannot be done now" in caplog.text
        for key, place, text in (
            ("k9", "p", "k9 appears in update, but not in the original"),
            ("k1", "", "is empty"),
        ):
            with pytest.raises(ValueError, match=text):
                handler.update_model_paths(model, [KeyModelPathMapping([key], place)])
        assert model.meanings() == before
        assert self.answers(handler, model, "k1", "k2", "k3") == [10, 10, 20]

    def test_keys_are_added_pointed_elsewhere_and_taken_away(
        self, tmp_path: Path, make_yard: Callable[..., Yard]
    ) -> None:
        yard = make_yard()
        handler = self.handler(tmp_path, yard)
        model = handler.load_model()
        other = adder(tmp_path, "c", 40)
        handler.update_model_paths(
            model,
            [KeyModelUpdate(["k2", "k4"], other), KeyModelUpdate(["k3"], None)],
        )
        assert self.answers(handler, model, "k1", "k2", "k3", "k4") == [10, 40, KeyNotFound, 40]
        with pytest.raises(KeyError, match="k3"):
            handler.update_model_paths(model, [KeyModelUpdate(["k3"], None)])

    def test_a_side_input_of_a_pipeline_changes_what_keys_mean(
        self, tmp_path: Path, make_yard: Callable[..., Yard]
    ) -> None:
        yard = make_yard()
        new = faulty_models.make_weights(tmp_path / "new", value=30)
        handler = KeyedModelHandler(
            [KeyModelMapping(["k1"], adder(tmp_path, "a", 10))],
            yard=yard.yard,
            min_batch_size=1,
            max_batch_size=1,
        )
        COLLECTED.clear()
        with own_temporary_folder(), beam.Pipeline(runner="FnApiRunner") as pipeline:
            updates = pipeline | "updates" >> beam.Create(
                [[KeyModelPathMapping(keys=["k1"], update_path=str(new))]]
            )
            _ = (
                pipeline
                | beam.Create([("k1", one(0))] * 3, reshuffle=False)
                | RunInference(handler, model_metadata_pcoll=updates)
                | beam.Map(collect)
            )
        # Beam itself gives the first batch to the handler before it tells it of the update.
        assert [float(result.inference[0]) for _, result in COLLECTED][1:] == [30, 30]

    def test_one_model_is_updated_by_its_path_and_goes_on_if_that_fails(
        self, tmp_path: Path, make_yard: Callable[..., Yard], caplog: pytest.LogCaptureFixture
    ) -> None:
        yard = make_yard()
        handler = YardModelHandler(adder(tmp_path, "a", 10), yard.yard)
        old = handler.load_model()
        assert handler.run_inference([one(0)], old)[0].inference == 10
        handler.update_model_path(str(faulty_models.make_weights(tmp_path / "new", value=30)))
        new = handler.load_model()
        assert handler.run_inference([one(0)], new)[0].inference == 30
        # Whoever still has the old one is answered by it.
        assert handler.run_inference([one(0)], old)[0].inference == 10
        handler.update_model_path(str(tmp_path / "nowhere"))
        after = handler.load_model()
        assert "cannot take the place" in caplog.text
        assert handler.run_inference([one(0)], after)[0].inference == 30
        handler.update_model_path(None)
        handler.update_model_path("")

    def test_each_kind_of_update_is_for_its_kind_of_handler(
        self, tmp_path: Path, make_yard: Callable[..., Yard]
    ) -> None:
        yard = make_yard()
        several = self.handler(tmp_path, yard)
        with pytest.raises(RuntimeError, match="by one path alone"):
            several.update_model_path("p")
        several.update_model_path(None)
        single = KeyedModelHandler(YardModelHandler(adder(tmp_path, "a", 10)), yard=yard.yard)
        model = single.load_model()
        with pytest.raises(RuntimeError, match="take one path"):
            single.update_model_paths(model, [KeyModelPathMapping(["k"], "p")])
        single.update_model_paths(model, None)
        assert self.answers(single, model, "anything", "else") == [10, 10]
        single.update_model_path(str(faulty_models.make_weights(tmp_path / "new", value=30)))
        assert self.answers(single, single.load_model(), "anything") == [30]


class TestArguments:
    """What is refused when a pipeline is built, and with which words."""

    IDENTITY = YardModel(runtime="identity")

    @pytest.mark.parametrize(
        ("mappings", "settings", "error", "text"),
        [
            ([], {}, ValueError, "there are no mappings"),
            ([KeyModelMapping([], IDENTITY)], {}, ValueError, "Empty list maps to"),
            ([KeyModelMapping("abc", IDENTITY)], {}, TypeError, "bare string"),
            ([KeyModelMapping(["a"], None)], {}, TypeError, "need a YardModelHandler"),
            ([("a", IDENTITY)], {}, TypeError, "must be mappings of keys"),
            (
                [KeyModelMapping(["a"], IDENTITY), KeyModelMapping(["a"], IDENTITY)],
                {},
                ValueError,
                "key a maps to multiple model handlers",
            ),
            (
                [KeyModelMapping(["a"], IDENTITY)],
                {"max_models_per_worker_hint": 0},
                ValueError,
                "0",
            ),
            (
                [KeyModelMapping(["a"], IDENTITY)],
                {"max_models_per_worker_hint": "2"},
                ValueError,
                "give a number above 0",
            ),
            (
                [
                    KeyModelMapping(["a"], YardModelHandler(IDENTITY, EmbeddedYard(name="x"))),
                    KeyModelMapping(["b"], YardModelHandler(IDENTITY, EmbeddedYard(name="y"))),
                ],
                {},
                ValueError,
                "of different yards",
            ),
            (
                [
                    KeyModelMapping(["a"], YardModelHandler(IDENTITY, env_vars={"X": 1})),
                    KeyModelMapping(["b"], YardModelHandler(IDENTITY, env_vars={"X": 2})),
                ],
                {},
                ValueError,
                "set X to different values",
            ),
        ],
    )
    def test_wrong_arguments_are_refused(
        self, mappings: Any, settings: Any, error: type[Exception], text: str
    ) -> None:
        with pytest.raises(error, match=text):
            KeyedModelHandler(mappings, **settings)

    def test_settings_of_mappings_become_those_of_their_batches(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MODELYARD_TEST_BEAM", raising=False)
        handler = KeyedModelHandler(
            [
                KeyModelMapping(["a"], YardModelHandler(self.IDENTITY, max_batch_size=8)),
                KeyModelMapping(
                    ["b"],
                    YardModelHandler(
                        self.IDENTITY,
                        min_batch_size=4,
                        max_batch_size=16,
                        env_vars={"MODELYARD_TEST_BEAM": 7},
                    ),
                ),
            ],
            min_batch_size=2,
        )
        assert handler.batch_elements_kwargs() == {"min_batch_size": 2, "max_batch_size": 16}
        handler.set_environment_vars()
        assert os.environ["MODELYARD_TEST_BEAM"] == "7"

    def test_models_and_yards_are_values(self, tmp_path: Path) -> None:
        model = YardModel.torch(tmp_path, faulty_models.Adding, {"rows": 8}, task="")
        assert model.options == {"factory": ADDING, "factory_options": {"rows": 8}}
        assert pickle.loads(pickle.dumps(model)) == model
        assert model.at("/elsewhere").folder == "/elsewhere"
        assert model.at("/elsewhere").id != model.id
        named = YardModel(folder="/a", name="n")
        assert named.at("/b").at("/c").id == named.at("/c").id
        yard = EmbeddedYard(budgets={"cuda:0": {"budget": "1GB", "logical": True}})
        assert pickle.loads(pickle.dumps(yard)).id == yard.id
        assert EmbeddedYard(name="x").id != EmbeddedYard().id
        with pytest.raises(ValueError, match="reads weights: give a folder"):
            YardModel()
        with pytest.raises(ValueError, match="has no name to import it by"):
            YardModel.torch(tmp_path, lambda: None)
        with pytest.raises(ValueError, match="budgets is empty"):
            EmbeddedYard(budgets={})
        with pytest.raises(ValueError, match="'thread' or 'process'"):
            EmbeddedYard(engine="fibre")

    def test_a_yard_that_cannot_be_says_so_and_leaves_nothing(self) -> None:
        before = set(threading.enumerate())
        with pytest.raises(ValueError, match="budget"):
            EmbeddedYard(budgets={"cpu": "many"}).running()
        with pytest.raises(Exception, match="cuda:7"):
            EmbeddedYard(budgets={"cuda:7": "1GB"}).running()
        assert set(threading.enumerate()) <= before

    def test_without_the_server_s_package_the_error_says_what_to_do(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in [name for name in sys.modules if name.startswith("modelyard_server")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "modelyard_server", None)
        with pytest.raises(ImportError, match="or use ServerModelHandler, which needs the client"):
            KeyedModelHandler([KeyModelMapping(["a"], self.IDENTITY)])


def test_several_devices_have_budgets_of_their_own(tmp_path: Path) -> None:
    yard = EmbeddedYard(
        name=str(tmp_path),
        budgets={f"cuda:{n}": {"budget": f"{n + 1}MB", "logical": True} for n in range(2)},
    )
    models = [
        YardModel.torch(
            faulty_models.make_weights(tmp_path / str(n), value=n), ADDING, device=f"cuda:{n}"
        )
        for n in range(2)
    ]
    handler = KeyedModelHandler(
        [KeyModelMapping([n], model) for n, model in enumerate(models)], yard=yard
    )
    model = handler.load_model()
    try:
        results = handler.run_inference([(0, one(5)), (1, one(5))], model)
        assert [float(result.inference[0]) for _, result in results] == [5, 6]
        devices = YardAccess.to(yard).admin.list_devices()
        assert [device.load_count for device in devices] == [1, 1]
        assert devices[0].budget_bytes < devices[1].budget_bytes
    finally:
        assert yard.stop()


_CHILD = """
import sys
import modelyard.integrations.beam as ours
assert not [name for name in sys.modules if name.startswith("modelyard_server")], "imported"

import numpy as np, threading
from apache_beam.utils.multi_process_shared import MultiProcessShared
from pathlib import Path

model = ours.YardModel.torch(sys.argv[1], "tests.support.faulty_models:Adding", name="m")
yard = ours.EmbeddedYard(budgets={"cpu": "64MB"})
handlers = [
    ours.KeyedModelHandler(
        [ours.KeyModelMapping(["k"], model)], yard=yard, large_model=True, on_error="return"
    )
    for _ in range(2)
]
batch = [("k", np.array([n], np.float32)) for n in range(3)] + [("zz", np.zeros(1))]
# As Beam shares what a step loads between its processes: always by a proxy, for each step one.
for number, handler in enumerate(handlers):
    assert handler.share_model_across_processes()
    shared = MultiProcessShared(handler.load_model, tag=f"step-{number}", always_proxy=True)
    proxy = shared.acquire()
    results = handler.run_inference(batch, proxy)
    assert [float(r.inference[0]) for _, r in results[:3]] == [1, 2, 3], results
    assert results[3][1].inference.reason == "KEY_NOT_FOUND", results
    handler.update_model_paths(proxy, [ours.KeyModelUpdate(["zz"], model)])
    assert len(handler.run_inference(batch[3:], proxy)) == 1
from modelyard.integrations.beam._yard import YardAccess
(residency,) = YardAccess.to(yard, shared_by_machine=True).admin.list_residencies()
assert residency.load_count == 1, residency
yards = [t for t in threading.enumerate() if t.name == "embedded yard"]
assert len(yards) == 1, yards
print("shared")
"""


def test_one_yard_serves_all_processes_of_a_machine_that_ask_for_it(tmp_path: Path) -> None:
    """With the proxies that Beam uses; and importing the handlers imports no server."""
    folder = faulty_models.make_weights(tmp_path / "m", value=1)
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, folder],
        cwd=ROOT,
        env=child_environment() | {"TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "shared\n"), done.stderr
    # The yard ends with its process, in good order.
    assert "Traceback" not in done.stderr, done.stderr
