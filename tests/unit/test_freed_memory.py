"""What models have freed is given back by the allocators that keep it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from modelyard_server.execution.freed_memory import give_back_freed
from modelyard_server.runtimes.targets import DISK


class FakeTorch:
    """A torch with these accelerators, the first of which is the current one.

    Attributes:
        emptied: whose function was called, in order.
    """

    def __init__(self, *types: str, accelerator_fails: bool = False, own: bool = True) -> None:
        self.emptied: list[str] = []
        current = SimpleNamespace(type=types[0]) if types else None
        self.accelerator = SimpleNamespace(
            current_accelerator=lambda: current,
            empty_cache=self._empty("accelerator", fails=accelerator_fails),
        )
        for name in types:
            module = SimpleNamespace(empty_cache=self._empty(name)) if own else SimpleNamespace()
            setattr(self, name, module)

    def _empty(self, name: str, *, fails: bool = False) -> Callable[[], None]:
        def empty() -> None:
            self.emptied.append(name)
            if fails:
                raise RuntimeError("its allocator is not a DeviceAllocator")

        return empty


def give_back(monkeypatch: pytest.MonkeyPatch, torch: FakeTorch, *names: str) -> list[str]:
    monkeypatch.setitem(sys.modules, "torch", torch)
    give_back_freed(names)
    return torch.emptied


def test_the_current_accelerators_cache_is_emptied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = FakeTorch("cuda")
    assert give_back(monkeypatch, torch, "cuda:0", "cpu", "cuda:1", DISK) == ["accelerator"]


@pytest.mark.parametrize("names", [(), ("cpu",), (DISK,), ("cpu", DISK)])
def test_no_accelerator_is_disturbed_for_what_was_freed_elsewhere(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    assert give_back(monkeypatch, FakeTorch("cuda"), *names) == []


def test_another_type_than_the_current_one_is_emptied_by_its_own_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert give_back(monkeypatch, FakeTorch("cuda", "mps"), "mps") == ["mps"]


def test_a_backend_whose_allocator_takes_no_part_is_emptied_by_its_own_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = FakeTorch("npu", accelerator_fails=True)
    assert give_back(monkeypatch, torch, "npu:0") == ["accelerator", "npu"]


@pytest.mark.parametrize(
    "torch", [FakeTorch("npu", accelerator_fails=True, own=False), FakeTorch()]
)
def test_a_backend_without_any_way_to_empty_it_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, torch: FakeTorch
) -> None:
    assert "npu" not in give_back(monkeypatch, torch, "npu:0")


def test_a_server_that_does_without_torch_does_not_import_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    give_back_freed(["cuda:0"])
    assert "torch" not in sys.modules
