"""Runs that are measured while they are served: what is told of them, and that nothing changes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.support.tiny_models import TinyMlp
from torch.nn.attention.flex_attention import flex_attention
from torch.utils import _python_dispatch

from modelyard_server.weights import run_meter
from modelyard_server.weights.activation_model import ActivationPoint
from modelyard_server.weights.first_runs import FirstRuns
from modelyard_server.weights.run_meter import RunMeter

ROW_BYTES = 4096


def spend(rows: int) -> torch.Tensor:
    return torch.ones(rows, ROW_BYTES // 4)


def test_the_first_run_of_a_bucket_is_measured_and_told_once() -> None:
    meter = RunMeter(FirstRuns(), "cpu")
    for rows in (3, 4, 4):
        with meter.run_of_one_pass(rows, 10):
            spend(rows)
    assert meter.take() == (ActivationPoint(3, 10, 3 * ROW_BYTES),)
    assert meter.take() == ()
    with meter.run_of_one_pass(5, 10):
        spend(5)
    assert meter.take() == (ActivationPoint(5, 10, 5 * ROW_BYTES),)


def test_models_that_share_their_first_runs_are_measured_once() -> None:
    first_runs = FirstRuns()
    meters = [RunMeter(first_runs, "cpu") for _ in range(2)]
    for meter in meters:
        with meter.run_of_one_pass(1, 1):
            spend(1)
    assert [len(meter.take()) for meter in meters] == [1, 0]


def test_each_pass_of_a_run_is_measured_alone() -> None:
    meter = RunMeter(FirstRuns(), "cpu")
    kept = []
    with meter.run():
        for rows in (4, 1):
            with meter.forward_pass(rows, 1):
                kept.append(spend(rows))
    assert meter.take() == (
        ActivationPoint(4, 1, 4 * ROW_BYTES),
        ActivationPoint(1, 1, ROW_BYTES),
    )


def test_a_pass_that_fails_is_not_told_and_the_next_one_is_measured() -> None:
    meter = RunMeter(FirstRuns(), "cpu")
    with pytest.raises(ArithmeticError), meter.run_of_one_pass(1, 1):
        spend(100)
        raise ArithmeticError
    assert meter.take() == ()
    with meter.run_of_one_pass(1, 1):
        spend(1)
    assert meter.take() == (ActivationPoint(1, 1, ROW_BYTES),)


def test_of_a_run_that_fails_in_the_end_no_pass_is_told() -> None:
    meter = RunMeter(FirstRuns(), "cpu")
    with pytest.raises(ArithmeticError), meter.run():
        with meter.forward_pass(1, 1):
            spend(100)
        raise ArithmeticError
    with meter.run_of_one_pass(1, 1):
        spend(1)
    assert meter.take() == (ActivationPoint(1, 1, ROW_BYTES),)


def test_one_that_picks_no_runs_follows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_meter, "_Follower", None)
    meter = RunMeter(FirstRuns.none(), "cpu")
    with meter.run_of_one_pass(1, 1):
        spend(1)
    assert meter.take() == ()


def test_a_pass_that_is_too_long_goes_on_unfollowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_meter, "MAX_FOLLOWED", 10)
    meter = RunMeter(FirstRuns(), "cpu")
    x = torch.zeros(1)
    with meter.run_of_one_pass(1, 1):
        for _ in range(100):
            x = x + 1
    assert x.item() == 100
    assert meter.take() == ()


def test_only_memory_of_the_home_device_counts() -> None:
    meter = RunMeter(FirstRuns(), "cpu")
    with meter.run_of_one_pass(1, 1):
        spend(1)
        torch.ones(1 << 20, device="meta")
    assert meter.take() == (ActivationPoint(1, 1, ROW_BYTES),)


@pytest.mark.timeout(900)
def test_on_an_accelerator_what_others_allocate_there_does_not_count() -> None:
    from tests.support.fakegpu import load

    load().reset()
    inside, loaded = threading.Event(), threading.Event()

    def other() -> torch.Tensor:
        assert inside.wait(30)
        weights = torch.ones(1 << 20, device="fakegpu:1")
        loaded.set()
        return weights

    meter = RunMeter(FirstRuns(), "fakegpu:1")
    x = torch.ones(16, device="fakegpu:1")
    with ThreadPoolExecutor(1) as pool:
        weights = pool.submit(other)
        with meter.run_of_one_pass(1, 1):
            inside.set()
            assert loaded.wait(30)
            y = x + 1
            torch.ones(1 << 10, device="fakegpu:0")
        assert weights.result(30).nbytes == 1 << 22
    assert meter.take() == (ActivationPoint(1, 1, y.nbytes),)


# --- What it is not to change ---------------------------------------------------------------------


def dropout(x: torch.Tensor) -> torch.Tensor:
    return torch.dropout(x, 0.5, True) + torch.rand_like(x) + torch.bernoulli(x.sigmoid())


def bent(x: torch.Tensor) -> Any:
    return flex_attention(x[None], x[None], x[None], score_mod=lambda s, b, h, i, j: s + i - j)


def branching(x: torch.Tensor) -> Any:
    return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


def sparse(x: torch.Tensor) -> Any:
    return torch.sparse.mm(x[0].to_sparse(), x[0].T.contiguous())


def nested(x: torch.Tensor) -> torch.Tensor:
    made = torch.nested.nested_tensor([x[0], x[1][:3]], layout=torch.jagged)
    return made.sin().to_padded_tensor(0.0)


def mapped(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.func.vmap(lambda row: (row @ row.T).sum(-1))(x)
    return result


def deciding(x: torch.Tensor) -> torch.Tensor:
    return torch.full((int(x.abs().sum().item()) % 7 + 1,), x.max().item())


def scripted() -> Callable[[torch.Tensor], Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.jit.script(TinyMlp(32, 64, 8).eval())


def compiled() -> Callable[[torch.Tensor], Any]:
    """Cannot be run uncompiled: torch raises then."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.compile(TinyMlp(32, 64, 8).eval(), backend="aot_eager", fullgraph=True)


def layer() -> Callable[[torch.Tensor], Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()


CALLS: dict[str, Callable[[], Callable[[torch.Tensor], Any]]] = {
    "dropout": lambda: dropout,
    "flex": lambda: bent,
    "cond": lambda: branching,
    "sparse": lambda: sparse,
    "nested": lambda: nested,
    "vmap": lambda: mapped,
    "values": lambda: deciding,
    "scripted": scripted,
    "compiled": compiled,
    "transformer": layer,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_results_are_the_same_to_the_bit(name: str) -> None:
    call = CALLS[name]()
    meter = RunMeter(FirstRuns(), "cpu")
    outcomes = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        x = torch.randn(4, 16, 32)
        for measures in (True, False, True):
            torch.manual_seed(7)
            with torch.inference_mode():
                if measures:
                    # The first is measured, the last is of the same bucket and is not.
                    with meter.run_of_one_pass(4, 16):
                        outcomes.append(call(x))
                else:
                    outcomes.append(call(x))
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[1], outcomes[2])


def test_what_cannot_be_followed_is_not_measured() -> None:
    meter = RunMeter(FirstRuns(), "cpu")
    with torch.inference_mode(), meter.run_of_one_pass(1, 1):
        branching(torch.ones(8))
    assert meter.take() == ()


def test_a_tensor_that_has_no_storage_ends_the_measurement_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Odd(torch.Tensor):
        def untyped_storage(self) -> torch.UntypedStorage:
            raise NotImplementedError

    meter = RunMeter(FirstRuns(), "cpu")
    x = torch.ones(4).as_subclass(Odd)
    with torch.inference_mode(), meter.run_of_one_pass(1, 1):
        y = x + 1
    assert y.sum().item() == 8
    assert meter.take() == ()


_FIRST_RUN = """
import sys
import torch
from modelyard_server.weights.first_runs import FirstRuns
from modelyard_server.weights.run_meter import RunMeter
meter = RunMeter(FirstRuns(), "cpu")
before = set(sys.modules)
with torch.inference_mode(), meter.run_of_one_pass(1, 1):
    torch.nn.functional.linear(torch.ones(3, 3), torch.ones(3, 3))
assert len(meter.take()) == 1
print(sorted(set(sys.modules) - before))
"""


def test_the_first_of_all_runs_imports_nothing() -> None:
    """Torch's compiler would come along, which takes seconds of the request that waits."""
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_RUN], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_threads_that_are_measured_at_once_leave_no_trace_in_torch() -> None:
    """Torch's own way of following notes it for the process, and overlapping notes stay."""
    inside = threading.Barrier(2)
    left = threading.Event()

    def overlapping(goes_first: bool) -> None:
        meter = RunMeter(FirstRuns(), "cpu")
        with meter.run_of_one_pass(1, 1):
            inside.wait(30)
            if not goes_first:
                assert left.wait(30)
            spend(1)
        left.set()
        assert meter.take() == (ActivationPoint(1, 1, ROW_BYTES),)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(overlapping, first) for first in (True, False)]:
            future.result(60)
    assert not _python_dispatch.is_in_torch_dispatch_mode()
    assert not _python_dispatch.is_in_any_mode_without_ignore_compile_internals()
