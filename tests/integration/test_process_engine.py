"""The engine of processes keeps the same contract as the engine of threads, and how it does so.

Tests with a parameter `engine` run against both. What happens when workers die is in tests/fault.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support import tiny_models
from tests.support.faulty_models import closed_gate
from tests.support.worker_engine import (
    INPUT,
    PATIENCE_S,
    SOURCE,
    Outcome,
    is_running,
    odd,
    odd_devices,
    running_processes,
    running_threads,
    until,
)

from modelyard_server.execution.engine import Engine, ModelFailed
from modelyard_server.execution.thread_engine import ThreadEngine
from modelyard_server.execution.workers.keeper import NoWorker
from modelyard_server.execution.workers.process_engine import ProcessEngine
from modelyard_server.execution.workers.settings import RuntimeSource, WorkerSettings
from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, ModelSpec, OptionError
from modelyard_server.runtimes.targets import Structure, Target, TensorPart
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

SPLIT = Target(home=0, parts=(("a", 0), ("b", 1)))


@pytest.fixture(params=["threads", "processes"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    devices = odd_devices("", "", disk=True)
    running = running_threads if request.param == "threads" else running_processes
    async with running(devices) as made:
        yield made


@pytest.fixture
async def processes() -> AsyncIterator[ProcessEngine]:
    async with running_processes(odd_devices("", "other", disk=True)) as made:
        yield made


def measured(engine: Engine) -> list[int]:
    return [engine.memory(device).measured_bytes for device in range(3)]


# --- The contract ---------------------------------------------------------------------------------


async def test_a_price_comes_as_the_runtime_says_it(engine: Engine) -> None:
    price = await engine.price(odd(size=70))
    assert (price.resting_bytes, price.peak_bytes, price.activation_bytes) == (70, 71, 3)
    assert price.shared == {"ab": 1}
    part = TensorPart(names=("a", "b"), size_bytes=70, as_filed=False)
    assert price.structure == Structure(tensors=(part,), blocks=("a",), units=("b",))


async def test_what_is_loaded_is_measured_and_what_is_unloaded_is_back(engine: Engine) -> None:
    assert (await engine.load(1, odd(size=100), Target.whole(0))).own_bytes == {0: 100}
    assert (await engine.load(2, odd(size=30), Target.whole(0))).own_bytes == {0: 30}
    assert (await engine.load(3, odd(size=5), Target.whole(1))).own_bytes == {1: 5}
    assert measured(engine) == [130, 5, 0]
    assert (await engine.unload(1)).freed == {0: 100}
    assert measured(engine) == [30, 5, 0]
    assert engine.memory(0).peak_measured_bytes == 130
    assert (await engine.load(1, odd(size=20), Target.whole(1))).own_bytes == {1: 20}
    assert engine.memory(1).peak_measured_bytes == 25


async def test_a_model_in_parts_is_measured_on_each_of_its_devices(engine: Engine) -> None:
    sizes = [[0, 60], [1, 40], [2, 500]]
    target = Target(home=0, parts=(("a", 0), ("b", 1), ("c", 2)))
    assert (await engine.load(1, odd(size=sizes), target)).own_bytes == {0: 60, 1: 40, 2: 500}
    assert measured(engine) == [60, 40, 500]
    assert await Outcome(engine, 1).get() == (INPUT,)
    assert (await engine.unload(1)).freed == {0: 60, 1: 40, 2: 500}
    assert measured(engine) == [0, 0, 0]


async def test_bytes_on_devices_that_were_not_given_fail_the_load(engine: Engine) -> None:
    with pytest.raises(Exception, match=r"not given") as caught:
        await engine.load(1, odd(size=[[0, 60], [1, 40]]), Target.whole(0))
    assert type(caught.value).__name__ == "RuntimeError"
    assert measured(engine) == [0, 0, 0]


async def test_the_disk_is_nobodys_home(engine: Engine) -> None:
    for home in (2, 3):
        with pytest.raises(ValueError, match=f"device {home}"):
            await engine.load(1, odd(), Target.whole(home))


async def test_a_cycle_through_the_model_is_collected(engine: Engine) -> None:
    await engine.load(1, odd(cycle=True), Target.whole(0))
    assert (await engine.unload(1)).freed == {0: 100}


async def test_memory_that_is_kept_is_back_when_it_is_let_go(engine: Engine) -> None:
    await engine.load(9, odd(release=True, size=0), Target.whole(0))
    for size in (100, 30):
        await engine.load(1, odd(keep=True, size=size), Target.whole(0))
        assert (await engine.unload(1)).freed == {0: 0}
    assert measured(engine) == [130, 0, 0]
    assert await engine.recheck(1) == {}
    await Outcome(engine, 9).get()
    assert await engine.recheck(1) == {0: 130}
    assert await engine.recheck(1) == {}
    assert await engine.recheck(77) == {}
    assert measured(engine) == [0, 0, 0]


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("files", "ModelFilesError"),
        ("io", "ModelFilesError"),
        ("cancelled", "LoadCancelled"),
        ("memory", "MemoryError"),
        ("option", "OptionError"),
        ("value", "ValueError"),
        ("exit", "RuntimeError"),
        ("stop", "RuntimeError"),
    ],
)
async def test_a_load_that_fails_says_how_and_holds_nothing(
    engine: Engine, what: str, name: str
) -> None:
    with pytest.raises(Exception) as caught:
        await engine.load(1, odd(at={"load": f"raise {what}"}), Target.whole(0))
    assert type(caught.value).__name__ == name
    if isinstance(caught.value, ModelFilesError):
        assert caught.value.transient is (what == "io")
        assert caught.value.text == ("cannot be read" if what == "io" else "cut short")
    assert measured(engine) == [0, 0, 0]
    assert (await engine.load(1, odd(), Target.whole(0))).own_bytes == {0: 100}


async def test_what_is_wrong_with_files_and_options_comes_through(engine: Engine) -> None:
    with pytest.raises(OptionError, match="there is none"):
        engine.check(ModelSpec(name="m", runtime="odd", task="x"))
    with pytest.raises(OptionError, match="'onnx' is unknown; there are: identity, odd"):
        engine.check(ModelSpec(name="m", runtime="onnx"))
    with pytest.raises(OptionError, match="'onnx' is unknown"):
        await engine.price(ModelSpec(name="m", runtime="onnx"))
    with pytest.raises(ModelFilesError, match="cut short"):
        await engine.price(odd(at={"price": "raise files"}))
    with pytest.raises(ModelFilesError, match="its runtime raised ValueError when it was priced"):
        await engine.price(odd(at={"price": "raise value"}))
    with pytest.raises(OptionError):
        engine.check_request(ModelSpec(name="m", runtime="identity"), (INPUT,), {"x": 1})


async def test_cancel_load_reaches_loads_that_run_and_loads_that_wait(
    engine: Engine, tmp_path: Path
) -> None:
    with closed_gate(tmp_path / "gate") as gate:
        first = asyncio.create_task(
            engine.load(1, odd(gate=str(tmp_path / "gate")), Target.whole(0))
        )
        second = asyncio.create_task(engine.load(2, odd(), Target.whole(0)))
        third = asyncio.create_task(engine.load(3, odd(), Target.whole(0)))
        await until(gate.is_waited_at)
        engine.cancel_load(99)
        engine.cancel_load(1)
        engine.cancel_load(2)
        # What is said to the engine afterwards comes after it.
        await engine.recheck(1)
        await engine.price(odd())
        await engine.load(4, odd(), Target.whole(1))
        gate.open()
        for load in (first, second):
            with pytest.raises(LoadCancelled):
                await load
        assert (await third).own_bytes == {0: 100}
    engine.cancel_load(1)
    assert (await engine.load(1, odd(), Target.whole(0))).own_bytes == {0: 100}


async def test_cancel_load_reaches_a_load_that_was_asked_for_in_the_same_turn(
    engine: Engine, tmp_path: Path
) -> None:
    gated = odd(gate=str(tmp_path / "gate"))
    with closed_gate(tmp_path / "gate") as gate:
        # What a channel is given first in a turn of the loop leaves at once, and the rest in one
        # piece: a worker reads the second load, its cancel and the third load at one time.
        first = asyncio.create_task(engine.load(1, gated, Target.whole(0)))
        second = asyncio.create_task(engine.load(2, gated, Target.whole(0)))
        asyncio.get_running_loop().call_soon(engine.cancel_load, 2)
        third = asyncio.create_task(engine.load(3, gated, Target.whole(0)))
        # What is said to the engine afterwards comes after it.
        await engine.load(4, odd(), Target.whole(1))
        gate.open()
        assert (await first).own_bytes == {0: 100}
        with pytest.raises(LoadCancelled):
            await second
        assert (await third).own_bytes == {0: 100}
    # It was for that load of the model, and for no later one.
    assert (await engine.load(2, odd(), Target.whole(0))).own_bytes == {0: 100}


async def test_hits_run_while_a_load_is_stuck_on_the_same_device(
    engine: Engine, tmp_path: Path
) -> None:
    await engine.load(1, odd(), Target.whole(0))
    with closed_gate(tmp_path / "gate") as gate:
        stuck = asyncio.create_task(
            engine.load(2, odd(gate=str(tmp_path / "gate")), Target.whole(0))
        )
        await until(gate.is_waited_at)
        for _ in range(3):
            assert await Outcome(engine, 1).get() == (INPUT,)
        assert (await engine.price(odd())).resting_bytes == 100
        assert (await engine.load(3, odd(), Target.whole(1))).own_bytes == {1: 100}
        assert not stuck.done()
    assert (await stuck).own_bytes == {0: 100}


async def test_files_that_hang_hold_up_nobody_elses_price(engine: Engine, tmp_path: Path) -> None:
    with closed_gate(tmp_path / "gate") as gate:
        spec = odd(gate=str(tmp_path / "gate"), gate_at="price")
        stuck = asyncio.create_task(engine.price(spec))
        await until(gate.is_waited_at)
        for size in range(10):
            assert (await engine.price(odd(size=size))).resting_bytes == size
        assert not stuck.done()
    assert (await stuck).resting_bytes == 100


async def test_an_unload_whose_close_raises_ends(engine: Engine) -> None:
    await engine.load(1, odd(at={"close": "raise value"}), Target.whole(0))
    assert (await engine.unload(1)).freed == {0: 100}


@pytest.mark.parametrize("brief", [False, True])
async def test_runs_answer_with_their_outputs_or_with_what_is_wrong(
    engine: Engine, brief: bool
) -> None:
    await engine.load(1, odd(brief=brief), Target.whole(0))
    await engine.load(2, odd(brief=brief, at={"run": "raise tensor"}), Target.whole(0))
    await engine.load(3, odd(brief=brief, at={"run": "raise option"}), Target.whole(0))
    await engine.load(4, odd(brief=brief, at={"run": "raise value"}), Target.whole(0))
    await engine.load(5, odd(brief=brief, at={"run": "raise exit"}), Target.whole(0))
    outcomes = [Outcome(engine, model) for model in (1, 2, 3, 4, 5, 1)]
    first, tensor, option, value, gone, last = [await outcome.get() for outcome in outcomes]
    assert first == last == (INPUT,)
    assert isinstance(tensor, TensorError)
    assert (tensor.tensor, tensor.text) == ("x", "too long")
    assert isinstance(option, OptionError)
    assert (option.option, option.text) == ("top_k", "unknown")
    assert isinstance(value, ModelFailed)
    assert str(value) == value.exception_type == "ValueError"
    assert "Traceback" in value.log_text
    assert "secret" in value.log_text
    assert isinstance(gone, ModelFailed)
    assert gone.exception_type == "SystemExit"


async def test_abandoned_work_that_has_not_begun_is_answered_with_none(
    engine: Engine, tmp_path: Path
) -> None:
    await engine.load(1, odd(gate=str(tmp_path / "gate"), gate_at="run"), Target.whole(0))
    await engine.load(2, odd(), Target.whole(1))
    with closed_gate(tmp_path / "gate") as gate:
        first, second = Outcome(engine, 1), Outcome(engine, 1)
        await until(gate.is_waited_at)
        first.work.abandon()
        second.work.abandon()
        # Whatever was said before this has arrived.
        assert await Outcome(engine, 2).get() == (INPUT,)
    assert await first.get() == (INPUT,)
    assert await second.get() is None
    first.work.abandon()


async def test_stop_ends_loads_that_ask_and_says_so(engine: Engine, tmp_path: Path) -> None:
    await engine.load(1, odd(), Target.whole(0))
    with closed_gate(tmp_path / "gate") as gate:
        spec = odd(gate=str(tmp_path / "gate"), until_stopped=True)
        load = asyncio.create_task(engine.load(2, spec, Target.whole(0)))
        await until(gate.is_waited_at)
    assert await engine.stop(PATIENCE_S / 3) is True
    with pytest.raises(LoadCancelled):
        await load


async def test_an_unknown_model_is_a_mistake_of_the_caller(engine: Engine) -> None:
    with pytest.raises(KeyError):
        Outcome(engine, 5)
    with pytest.raises(KeyError):
        await engine.unload(5)


# --- Tensors --------------------------------------------------------------------------------------


def tensors() -> list[TensorValue]:
    noise = random.Random(5)
    megabytes = noise.randbytes(8 * 2**20)
    return [
        TensorValue(name="x", dtype=DType.UINT8, shape=(len(megabytes),), data=megabytes),
        TensorValue(name="", dtype=DType.FLOAT32, shape=(), data=b"\0\0\x80\x7f"),
        TensorValue(name="ж\ud800", dtype=DType.BOOL, shape=(2, 0, 3), data=b""),
        TensorValue(name="t", dtype=DType.TEXT, shape=(2, 2), data=("", "ä\0\n", "\ud800", "x")),
        TensorValue(name="b", dtype=DType.BYTES, shape=(3,), data=(b"", b"\xff" * 9, b"\0")),
        TensorValue(name="l", dtype=DType.BYTES, shape=(1,), data=(noise.randbytes(2**17),)),
        TensorValue(name="e", dtype=DType.UINT8, shape=(2**16,), data=megabytes[: 2**16]),
        TensorValue(name="f", dtype=DType.UINT8, shape=(2**16 + 1,), data=megabytes[: 2**16 + 1]),
    ]


async def test_tensors_of_all_kinds_and_sizes_come_back_as_they_were(
    processes: ProcessEngine,
) -> None:
    await processes.load(1, odd(), Target.whole(0))
    for tensor in tensors():
        assert await Outcome(processes, 1, tensor).get() == (tensor,)
    together = tensors()
    assert await Outcome(processes, 1, *together).get() == tuple(together)


async def test_more_large_tensors_than_there_are_segments_all_come_back(
    processes: ProcessEngine,
) -> None:
    await processes.load(1, odd(), Target.whole(0))
    noise = random.Random(6)
    inputs = []
    for size in [noise.randrange(2**16, 2**19) for _ in range(150)]:
        data = noise.randbytes(size)
        inputs.append(TensorValue(name="x", dtype=DType.UINT8, shape=(size,), data=data))
    outcomes = [Outcome(processes, 1, tensor) for tensor in inputs]
    assert [await outcome.get() for outcome in outcomes] == [(tensor,) for tensor in inputs]


# --- Workers --------------------------------------------------------------------------------------


async def test_the_groups_have_workers_of_their_own_and_share_the_disk(
    processes: ProcessEngine,
) -> None:
    assert set(processes.pids) == {"files", "models", "models-other", "zygote"}
    assert len(set(processes.pids.values())) == 4
    for model, home in ((1, 0), (2, 1)):
        target = Target(home=home, parts=(("a", home), ("b", 2)))
        sizes = [[home, 10], [2, 5 * model]]
        assert (await processes.load(model, odd(size=sizes), target)).own_bytes == {
            home: 10,
            2: 5 * model,
        }
    assert measured(processes) == [10, 10, 15]
    await processes.unload(1)
    assert measured(processes) == [0, 10, 10]
    assert processes.memory(2).peak_measured_bytes == 15


async def test_a_model_in_parts_must_be_in_one_group(processes: ProcessEngine) -> None:
    with pytest.raises(OptionError, match="odd0 and odd1 are of different groups"):
        await processes.load(1, odd(), SPLIT)


async def test_an_option_that_is_no_json_is_refused(processes: ProcessEngine) -> None:
    with pytest.raises(OptionError, match="bytes is no value of JSON"):
        await processes.price(odd(x=b"1"))


async def test_a_worker_has_no_network_and_no_grpc(processes: ProcessEngine) -> None:
    await processes.load(1, odd(at={"run": "network"}), Target.whole(0))
    outcome = await Outcome(processes, 1).get()
    assert isinstance(outcome, ModelFailed)
    assert outcome.exception_type == "PermissionError"
    assert "a worker has no network" in outcome.log_text
    await processes.load(2, odd(modules=True), Target.whole(0))
    answer = await Outcome(processes, 2).get()
    assert isinstance(answer, tuple)
    modules = str(answer[0].data[0]).split("\n")
    assert "modelyard_server.execution.workers.worker" in modules
    assert not [name for name in modules if name.partition(".")[0] in ("grpc", "torch")]


async def test_a_worker_is_limited(processes: ProcessEngine) -> None:
    for name in ("files", "models"):
        folder = Path("/proc") / str(processes.pids[name])
        limits = (folder / "limits").read_text(encoding="ascii")
        assert "Max core file size        0                    0" in limits
        assert (folder / "oom_score_adj").read_text(encoding="ascii").strip() == "500"
        assert "NoNewPrivs:\t1" in (folder / "status").read_text(encoding="ascii")
        files = {link.name: link.readlink().name for link in (folder / "fd").iterdir()}
        assert files["0"] == "null"
        others = [file for name, file in files.items() if int(name) > 2]
        kinds = {file.partition(":")[0] for file in others}
        assert kinds <= {"socket", "anon_inode", "memfd"}, others


async def test_a_worker_that_does_not_start_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    source = RuntimeSource(maker=SOURCE.maker, worker_arguments={"broken": str(broken)})
    settings = WorkerSettings(start_tries=2)
    with pytest.raises(NoWorker, match="exited with code 7"):
        async with running_processes(odd_devices(""), source=source, settings=settings):
            pytest.fail("it started")


async def test_a_zygote_that_cannot_make_its_runtimes_is_an_error() -> None:
    source = RuntimeSource(maker=SOURCE.maker)
    engine = ProcessEngine(
        devices=odd_devices(""), source=source, settings=WorkerSettings(start_tries=1)
    )
    object.__setattr__(source, "maker", "tests.support.worker_models:absent")
    with pytest.raises(NoWorker, match="AttributeError"):
        await engine.start(["odd"])
    assert not engine.pids


async def test_loads_after_the_stop_are_refused() -> None:
    async with running_processes(odd_devices("")) as engine:
        await engine.load(1, odd(), Target.whole(0))
        worker = engine.pids["models"]
        assert await engine.stop(PATIENCE_S) is True
        assert not is_running(worker)
        with pytest.raises(ModelFilesError, match="the server stops") as caught:
            await engine.load(2, odd(), Target.whole(0))
        assert caught.value.transient


# --- With the libraries ---------------------------------------------------------------------------


async def test_real_models_answer_in_a_worker_bit_by_bit_as_they_do_in_a_thread(
    tmp_path: Path,
) -> None:
    folders = {
        "text-classification": tiny_models.make_tiny_bert(tmp_path / "bert", seed=1, num_labels=3),
        "fill-mask": tiny_models.make_tiny_masked_lm(tmp_path / "mlm", seed=2),
        "text-generation": tiny_models.make_tiny_gpt2(tmp_path / "gpt2", seed=3),
    }
    texts = {
        "text-classification": ("the cat sat", "a dog ran in the house"),
        "fill-mask": ("the cat [MASK]",),
        "text-generation": ("the big red",),
    }
    specs = [
        ModelSpec(name=task, runtime="transformers", task=task, folder=folder)
        for task, folder in folders.items()
    ]
    source = RuntimeSource()
    answers: dict[str, list[object]] = {task: [] for task in folders}
    threads = ThreadEngine(devices=odd_devices(""), runtimes=source.make())
    await threads.start(["transformers"])
    async with running_processes(
        odd_devices(""), source=source, runtimes=["transformers"], budgets=[2**30]
    ) as processes:
        both: list[Engine] = [threads, processes]
        for engine in both:
            for model, spec in enumerate(specs):
                price = await engine.price(spec)
                held = await engine.load(model, spec, Target.whole(0))
                text = texts[spec.task]
                given = TensorValue(name="text", dtype=DType.TEXT, shape=(len(text),), data=text)
                outcome = await Outcome(engine, model, given).get()
                assert isinstance(outcome, tuple), outcome
                answers[spec.task] += [(price, held, outcome)]
        for model in range(len(specs)):
            assert await processes.unload(model) == await threads.unload(model)
    await threads.stop(PATIENCE_S)
    for task, (in_thread, in_worker) in answers.items():
        assert in_thread == in_worker, task
