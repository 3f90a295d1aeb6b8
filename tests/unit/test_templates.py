"""Clones of modules: what they share, what is their own, and which modules have none."""

from __future__ import annotations

import functools
import gc
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch

from modelyard_server.weights.templates import (
    MAX_CONSTANT_BYTES,
    ModuleTemplate,
    Refusal,
    make_template,
)

Tensors = dict[str, torch.Tensor]


def loaded(module: torch.nn.Module) -> tuple[Any, Tensors]:
    """The module over tensors of "a file", as a runtime loads it."""
    module.eval()
    module.requires_grad_(False)
    weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
    # Of tied names the file has the first.
    seen: dict[int, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) in seen:
            del weights[name]
        seen.setdefault(id(value), name)
    filled = {
        name: weights[seen[id(value)]] for name, value in module.state_dict(keep_vars=True).items()
    }
    module.load_state_dict(filled, strict=True, assign=True)
    module.requires_grad_(False)
    return module, weights


def template_of(module: torch.nn.Module) -> tuple[ModuleTemplate, Any, Tensors]:
    module, weights = loaded(module)
    return make_template(module, weights, sources={}), module, weights


def others(weights: Tensors) -> Tensors:
    """Weights of another model of the same architecture."""
    return {
        name: torch.rand_like(value) if value.is_floating_point() else value + 1
        for name, value in weights.items()
    }


class Net(torch.nn.Module):
    """Convolution, norm with buffers, a computed buffer and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(3, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm1d(4)
        self.twice = torch.nn.Linear(8, 8)
        self.again = self.twice
        self.act: Any = torch.nn.functional.gelu
        self.nothing = None
        self.register_buffer("scale", torch.full((8,), 2.0), persistent=False)
        self.register_parameter("absent", None)
        self.scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (
            self.again(self.act(self.twice(self.norm(self.conv(x))))) * self.scale
        )
        return result


def test_a_clone_computes_what_the_original_computes_with_its_weights() -> None:
    template, module, weights = template_of(Net())
    x = torch.rand(2, 3, 8)
    assert torch.equal(template.make(weights, weights)(x), module(x))
    changed = others(weights)
    module.load_state_dict(
        changed | {"again.weight": changed["twice.weight"], "again.bias": changed["twice.bias"]}
    )
    assert torch.equal(template.make(changed, changed)(x), module(x))


def test_a_clone_is_the_same_tree() -> None:
    template, module, weights = template_of(Net())
    clone = template.make(weights, weights)
    assert [(n, type(m)) for n, m in clone.named_modules()] == [
        (n, type(m)) for n, m in module.named_modules()
    ]
    assert clone.again is clone.twice
    assert not clone.training
    assert list(clone.state_dict()) == list(module.state_dict())
    assert vars(clone).keys() == vars(module).keys()
    assert repr(clone) == repr(module)


def test_parameters_hang_over_the_tensors_and_buffers_are_copies() -> None:
    template, _, weights = template_of(Net())
    assert template.held == {
        "conv.weight",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "twice.weight",
        "twice.bias",
    }
    assert template.copied == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    clone = template.make(weights, weights)
    assert clone.conv.weight.data_ptr() == weights["conv.weight"].data_ptr()
    assert type(clone.conv.weight) is torch.nn.Parameter
    assert not clone.conv.weight.requires_grad
    before = weights["norm.running_mean"].clone()
    clone.norm.running_mean.add_(1)
    clone.scale.add_(1)
    assert torch.equal(weights["norm.running_mean"], before)
    other = template.make(weights, weights)
    assert torch.equal(other.norm.running_mean, before)
    assert torch.equal(other.scale, torch.full((8,), 2.0))


def test_a_template_keeps_only_constants() -> None:
    template, module, weights = template_of(Net())
    assert template.constant_bytes == 32
    alive = [ref(module), *(ref(value) for value in weights.values())]
    del module, weights
    gc.collect()
    assert [reference() for reference in alive if reference() is not None] == []
    assert isinstance(template, ModuleTemplate)


def test_clones_go_by_reference_counts_alone() -> None:
    template, _, weights = template_of(Net())
    gc.disable()
    try:
        clone = template.make(weights, weights)
        clone(torch.rand(1, 3, 8))
        alive = [ref(part) for part in clone.modules()]
        alive += [ref(value) for value in clone.parameters()]
        del clone
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()


def test_tied_parameters_are_one_in_the_clone() -> None:
    module: Any = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False))
    module[1].weight = module[0].weight
    module, weights = loaded(module)
    template = make_template(module, weights, sources={})
    assert template.held == {"0.weight"}
    clone = template.make(weights, {})
    # torch has bound the two names one by one.
    assert clone[0].weight is not clone[1].weight
    assert clone[0].weight.data_ptr() == clone[1].weight.data_ptr()
    module[1].weight = module[0].weight
    clone = make_template(module, weights, sources={}).make(weights, {})
    assert clone[0].weight is clone[1].weight


def test_recurrent_modules_find_their_new_weights() -> None:
    template, module, weights = template_of(torch.nn.LSTM(4, 3, num_layers=2, batch_first=True))
    x = torch.rand(2, 5, 4)
    changed = others(weights)
    clone = template.make(changed, {})
    module.load_state_dict(changed)
    assert torch.equal(clone(x)[0], module(x)[0])
    assert all(
        left is right()
        for left, right in zip(clone._flat_weights, clone._flat_weight_refs, strict=True)
    )


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        torch.nn.MultiheadAttention(8, 2),
        torch.nn.GRU(4, 3),
    ],
)
def test_modules_of_torch_can_be_cloned(module: torch.nn.Module) -> None:
    template, original, weights = template_of(module)
    clone = template.make(weights, weights)
    assert all(
        torch.equal(clone.state_dict()[name], value)
        for name, value in original.state_dict().items()
    )


class Lists(torch.nn.Module):
    """Tensors in containers, and containers that two parts have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.items = torch.nn.ParameterList([torch.ones(2), torch.zeros(3)])
        self.table = torch.nn.ParameterDict({"a": torch.ones(1)})
        self.layers = torch.nn.ModuleList([torch.nn.Identity()])
        self.named = torch.nn.ModuleDict({"x": torch.nn.Linear(2, 2)})
        self.common: dict[str, Any] = {"seen": [], "kept": OrderedDict(a=(1, [2]))}
        vars(self.layers[0])["common"] = self.common
        self.names = {"a", "b"}
        self.hanging = torch.arange(3)
        self.shape = torch.Size([1, 2])
        self.partial = functools.partial(torch.nn.functional.gelu, approximate="tanh")


def test_containers_are_copied_and_stay_common() -> None:
    template, module, weights = template_of(Lists())
    one, two = template.make(weights, weights), template.make(weights, weights)
    one.common["seen"].append(1)
    one.common["kept"]["a"][1].append(3)
    one.names.add("c")
    one.hanging.add_(1)
    assert one.layers[0].common is one.common
    for other in (module, two):
        assert other.common == {"seen": [], "kept": OrderedDict(a=(1, [2]))}
        assert other.names == {"a", "b"}
        assert torch.equal(other.hanging, torch.arange(3))
    assert [value.tolist() for value in one.items] == [[1, 1], [0, 0, 0]]
    assert one.table["a"].tolist() == [1]


def hooks_do_not_leak(module: torch.nn.Module) -> None:
    template, original, weights = template_of(module)
    one, two = template.make(weights, weights), template.make(weights, weights)
    one.register_forward_hook(lambda *args: None)
    assert not two._forward_hooks
    assert not original._forward_hooks


def test_hooks_that_are_added_to_a_clone_are_its_own() -> None:
    hooks_do_not_leak(torch.nn.Linear(1, 1))


def test_views_keep_their_strides() -> None:
    class Expanded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.arange(4).expand(1000, 4), persistent=False)

    template, module, _ = template_of(Expanded())
    clone = template.make({}, {})
    assert clone.rows.stride() == module.rows.stride()
    assert clone.rows.untyped_storage().nbytes() == 32
    assert torch.equal(clone.rows, module.rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_is_only_converted_is_converted_again(dtype: torch.dtype) -> None:
    module = torch.nn.BatchNorm1d(8).eval().requires_grad_(False)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    weights["weight"] = torch.rand(8)
    module.load_state_dict(weights)
    module.to(dtype)
    sources = {name: name for name in weights}
    template = make_template(module, weights, sources=sources)
    assert template.held == frozenset()
    changed = others(weights)
    clone = template.make({}, changed)
    for name, value in changed.items():
        found = clone.state_dict()[name]
        expected = value.to(dtype) if value.is_floating_point() else value
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_an_unchanged_copy_is_used_where_it_lies() -> None:
    module = torch.nn.Linear(2, 2).requires_grad_(False).eval()
    weights = {"W": module.weight.detach().clone(), "bias": module.bias.detach().clone()}
    sources = {"weight": "W", "bias": "bias"}
    template = make_template(module, weights, sources=sources)
    clone = template.make(weights, {})
    assert clone.weight.data_ptr() == weights["W"].data_ptr()


class Plain:
    """Of a class that the caller knows."""

    def __init__(self) -> None:
        self.inner: Any = None
        self.values = [1]


def test_objects_of_known_classes_are_copied_and_stay_common() -> None:
    module: Any = torch.nn.Sequential(torch.nn.Identity())
    module.config = Plain()
    module.config.inner = Plain()
    module[0].config = module.config
    template = make_template(module.eval(), {}, sources={}, copyable=(Plain,))
    one, two = template.make({}, {}), template.make({}, {})
    assert one.config is one[0].config
    one.config.inner.values.append(2)
    one.config.name = "one"
    for other in (module, two):
        assert other.config.inner.values == [1]
        assert not hasattr(other.config, "name")


def test_attributes_can_be_left_out() -> None:
    module = torch.nn.Identity()
    vars(module)["strange"] = object()
    with pytest.raises(Refusal):
        make_template(module.eval(), {}, sources={})
    template = make_template(module, {}, sources={}, left_out=frozenset({"strange"}))
    assert not hasattr(template.make({}, {}), "strange")


def with_attribute(make: Callable[[Any], Any]) -> Callable[[], torch.nn.Module]:
    def built() -> torch.nn.Module:
        module = torch.nn.Sequential(torch.nn.Linear(2, 2))
        vars(module)["extra"] = make(module)
        return module

    return built


def in_itself(_: torch.nn.Module) -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


def with_hook() -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda module, args: None)
    return module


def parametrized() -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    torch.nn.utils.parametrizations.weight_norm(module)
    return module


def with_large_constant() -> torch.nn.Module:
    module = torch.nn.Identity()
    table = torch.zeros(MAX_CONSTANT_BYTES + 1, dtype=torch.uint8)
    module.register_buffer("table", table, persistent=False)
    return module


def with_common_memory() -> torch.nn.Module:
    module = torch.nn.Identity()
    table = torch.zeros(4)
    module.register_buffer("left", table, persistent=False)
    module.register_buffer("right", table[2:], persistent=False)
    return module


class Special(torch.nn.Parameter):
    """Does something of its own."""


def traced() -> torch.nn.Module:
    trace: Any = torch.jit.trace
    module: torch.nn.Module = trace(torch.nn.Linear(2, 2), torch.rand(1, 2))
    return module


def special() -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    module.weight = Special(torch.zeros(2, 2))
    return module


class Slotted(torch.nn.Module):
    """Keeps a value that its __dict__ does not have."""

    __slots__ = ("value",)


REFUSED: dict[str, Callable[[], torch.nn.Module]] = {
    "itself": with_attribute(lambda module: (module,)),
    "part": with_attribute(lambda module: [module[0]]),
    "method": with_attribute(lambda module: module.forward),
    "method of a list": with_attribute(lambda module: [].append),
    "closure": with_attribute(lambda module: lambda x: module(x)),
    "partial": with_attribute(lambda module: functools.partial(torch.nn.Module.forward, module)),
    "weak reference": with_attribute(ref),
    "function with an attribute": with_attribute(
        lambda module: functools.wraps(module.forward)(lambda x: x)
    ),
    "generator": with_attribute(lambda module: torch.Generator()),
    "lock": with_attribute(lambda module: threading.Lock()),
    "object": with_attribute(lambda module: Plain()),
    "endless list": with_attribute(in_itself),
    "view of a weight": with_attribute(lambda module: module[0].weight[:1]),
    "parameter that is not registered": with_attribute(
        lambda module: torch.nn.Parameter(torch.ones(1))
    ),
    "hook": with_hook,
    "parametrization": parametrized,
    "large constant": with_large_constant,
    "common memory": with_common_memory,
    "slots": Slotted,
    "script": traced,
    "special parameter": special,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_clone_would_get_wrong_has_no_template(name: str) -> None:
    module = REFUSED[name]().eval().requires_grad_(False)
    weights = {
        key: value
        for key, value in module.state_dict().items()
        if isinstance(value, torch.Tensor) and type(value) is torch.Tensor
    }
    with pytest.raises(Refusal):
        make_template(module, weights, sources={name: name for name in weights})


def test_computed_parameters_have_no_template() -> None:
    module = torch.nn.Linear(4, 4).requires_grad_(False).eval()
    weights = {"weight": module.weight.detach() * 2, "bias": module.bias.detach()}
    with pytest.raises(Refusal, match="computed"):
        make_template(module, weights, sources={"weight": "weight", "bias": "bias"})


def test_parts_of_a_tensor_have_no_template() -> None:
    fused = torch.rand(8, 4)
    module = torch.nn.Linear(4, 4, bias=False)
    module.weight = torch.nn.Parameter(fused[:4], requires_grad=False)
    with pytest.raises(Refusal, match="part"):
        make_template(module.eval(), {"fused": fused}, sources={})


def test_clones_are_made_in_several_threads_at_once() -> None:
    template, _, weights = template_of(Net())
    x = torch.rand(2, 3, 8)
    expected = template.make(weights, weights)(x)
    wrong: list[int] = []

    def work() -> None:
        for turn in range(50):
            clone = template.make(weights, weights)
            if not torch.equal(clone(x), expected):
                wrong.append(turn)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
