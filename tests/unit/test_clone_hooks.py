"""Hooks of the modules of a clone: calls have them, each for itself; the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from modelyard_server.weights.templates import Refusal, make_template


class Net(nn.Module):
    """Two layers, and a buffer that no file has."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.register_buffer("scale", torch.tensor([2.0, 3.0]), persistent=False)

    def forward(self, values: torch.Tensor) -> Any:
        """Both layers."""
        return self.second(self.first(values)) * self.scale


def two_clones() -> tuple[Net, Any, Any]:
    net = Net().eval().requires_grad_(False)
    weights = {name: tensor.data for name, tensor in net.named_parameters()}
    template = make_template(net, weights, sources={})
    return net, template.make(weights, {}), template.make(weights, {})


def test_a_hook_is_called_for_its_module_alone() -> None:
    net, one, other = two_clones()
    called: list[str] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        called.append(f"before {kwargs}")

    def after(module: nn.Module, args: Any, made: Any) -> None:
        called.append("after")

    handle = one.first.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    one.second.register_forward_hook(after, always_call=True)
    values = torch.ones(1, 3)
    assert torch.equal(other(values), net(values))
    assert called == []
    assert torch.equal(one(values), net(values))
    assert called == ["before {}", "after"]
    handle.remove()
    one(values)
    assert called[2:] == ["after"]


def test_a_hook_that_is_always_called_is_called_after_an_error_of_its_module_alone() -> None:
    _, one, _ = two_clones()
    called: list[str] = []
    one.first.register_forward_hook(lambda *_: called.append("first"), always_call=True)
    one.second.register_forward_hook(lambda *_: called.append("second"))
    with pytest.raises(RuntimeError):
        one(torch.ones(1, 5))
    assert called == ["first"]


def test_a_clone_has_a_state_dict_but_takes_no_hooks_for_it() -> None:
    net, one, _ = two_clones()
    state = one.state_dict()
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    with pytest.raises(TypeError, match="no hooks"):
        one.register_state_dict_pre_hook(lambda *_: None)
    with pytest.raises(TypeError, match="no hooks"):
        one.first.register_full_backward_hook(lambda *_: None)


def test_a_buffer_that_a_clone_adds_is_its_own() -> None:
    _, one, other = two_clones()
    one.first.register_buffer("seen", torch.zeros(1), persistent=False)
    assert "seen" not in one.state_dict()
    assert not hasattr(other.first, "seen")
    assert other.first._non_persistent_buffers_set == set()
    assert one._non_persistent_buffers_set == other._non_persistent_buffers_set == {"scale"}


@pytest.mark.parametrize("always_call", [False, True])
def test_a_module_with_hooks_has_no_template(always_call: bool) -> None:
    net = Net().eval().requires_grad_(False)
    net.first.register_forward_hook(lambda *_: None, always_call=always_call)
    with pytest.raises(Refusal, match="a Linear has hooks"):
        make_template(net, {n: t.data for n, t in net.named_parameters()}, sources={})
