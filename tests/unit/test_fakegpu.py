"""The devices that other tests trust to fail like real ones."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.support.fakegpu import UNLIMITED_BYTES, FakeGpu, load
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

# Whoever comes first builds the library.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    gpu = load()
    gpu.reset()
    yield gpu
    gpu.reset()
    gc.collect()
    assert used(gpu) == [0, 0, 0, 0]


def used(gpu: FakeGpu) -> list[int]:
    return [gpu.used_bytes(device) for device in range(gpu.device_count)]


def storage_bytes(model: torch.nn.Module) -> int:
    """Bytes of the distinct storages of parameters and buffers."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*model.parameters(), *model.buffers()]
    }
    return sum(storages.values())


def tiny_bert() -> torch.nn.Module:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    model: torch.nn.Module = BertModel(config)
    return model.eval()


def test_every_byte_asked_for_is_counted_and_none_more(gpu: FakeGpu) -> None:
    odd = torch.empty(13, dtype=torch.uint8, device="fakegpu:2")
    assert used(gpu) == [0, 0, 13, 0]
    more = odd.repeat(3)
    assert used(gpu) == [0, 0, 52, 0]
    view = more[2:30:3].view(2, 5)
    assert used(gpu) == [0, 0, 52, 0]
    assert view.shape == (2, 5)


def test_freed_memory_is_back_and_the_peak_remembers_it(gpu: FakeGpu) -> None:
    first = torch.zeros(100, device="fakegpu:0")
    second = first + 1
    del first
    assert (gpu.used_bytes(0), gpu.peak_bytes(0)) == (400, 800)
    gpu.reset_peak(0)
    assert gpu.peak_bytes(0) == 400
    del second
    assert (gpu.used_bytes(0), gpu.peak_bytes(0)) == (0, 400)


def test_a_view_keeps_its_memory_charged(gpu: FakeGpu) -> None:
    tensor = torch.zeros(100, device="fakegpu:0")
    view = tensor[:1]
    del tensor
    assert gpu.used_bytes(0) == 400
    del view
    assert gpu.used_bytes(0) == 0


def test_the_last_byte_fits_and_one_more_does_not(gpu: FakeGpu) -> None:
    gpu.set_budget(1, 1000)
    whole = torch.empty(1000, dtype=torch.uint8, device="fakegpu:1")
    assert gpu.used_bytes(1) == gpu.budget_bytes(1) == 1000
    del whole
    with pytest.raises(torch.OutOfMemoryError, match=r"allocate 1001 bytes; 0 of 1000"):
        torch.empty(1001, dtype=torch.uint8, device="fakegpu:1")
    assert (gpu.used_bytes(1), gpu.peak_bytes(1)) == (0, 1000)


def test_an_operator_that_runs_out_of_memory_leaks_nothing(gpu: FakeGpu) -> None:
    tensor = torch.ones(10, 10, device="fakegpu:0")
    gpu.set_budget(0, 799)
    for operator in (
        lambda: tensor + tensor,
        lambda: tensor @ tensor,
        lambda: torch.nn.functional.gelu(tensor),
        lambda: torch.nn.functional.softmax(tensor, dim=-1),
        lambda: tensor.sort(),
        lambda: tensor.to("fakegpu:0", copy=True),
        lambda: tensor.clone().resize_(200),
        lambda: torch.ones(10, 10).to("fakegpu:0"),
    ):
        with pytest.raises(torch.OutOfMemoryError):
            operator()
        assert gpu.used_bytes(0) == 400
    gpu.set_budget(0, 800)
    doubled = tensor + tensor
    assert doubled.cpu().tolist() == [[2.0] * 10] * 10


def test_a_model_that_does_not_fit_leaves_nothing_behind(gpu: FakeGpu) -> None:
    model = tiny_bert()
    gpu.set_budget(3, storage_bytes(model) - 1)
    with pytest.raises(torch.OutOfMemoryError):
        model.to("fakegpu:3")
    # The part that was moved is the model's own.
    del model
    assert used(gpu) == [0, 0, 0, 0]

    model = tiny_bert()
    gpu.set_budget(3, storage_bytes(model))
    model.to("fakegpu:3")
    assert gpu.used_bytes(3) == storage_bytes(model)


def test_a_budget_below_what_is_used_lets_nothing_new_in(gpu: FakeGpu) -> None:
    tensor = torch.ones(10, device="fakegpu:0")
    gpu.set_budget(0, 20)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1, device="fakegpu:0")
    assert tensor.cpu().tolist() == [1.0] * 10


def test_devices_do_not_share_memory(gpu: FakeGpu) -> None:
    gpu.set_budget(0, 0)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1, device="fakegpu:0")
    others = [torch.empty(7, dtype=torch.int8, device=f"fakegpu:{n}") for n in (1, 2, 3)]
    assert used(gpu) == [0, 7, 7, 7]
    assert [str(tensor.device) for tensor in others] == ["fakegpu:1", "fakegpu:2", "fakegpu:3"]


@pytest.mark.parametrize("other", ["fakegpu:2", "cpu"])
def test_operands_on_different_devices_are_refused(gpu: FakeGpu, other: str) -> None:
    here = torch.ones(4, 4, device="fakegpu:1")
    there = torch.ones(4, 4, device=other)
    tokens = torch.zeros(3, dtype=torch.int64, device=other)
    functional: Any = torch.nn.functional
    for operator in (
        lambda: here + there,
        lambda: there.add_(here),
        lambda: torch.cat([here, there]),
        lambda: torch.where(here > 0, here, there),
        lambda: functional.linear(here, there),
        lambda: functional.layer_norm(here, (4,), there[0]),
        lambda: functional.embedding(tokens, here),
        lambda: functional.scaled_dot_product_attention(here[None], here[None], there[None]),
    ):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            operator()


def test_numbers_and_indices_may_stay_on_the_cpu(gpu: FakeGpu) -> None:
    tensor = torch.arange(6.0, device="fakegpu:1").view(2, 3)
    assert (tensor + torch.tensor(1.0)).cpu().tolist() == [[1, 2, 3], [4, 5, 6]]
    assert tensor[torch.tensor([1])].cpu().tolist() == [[3, 4, 5]]


def test_an_input_on_the_cpu_is_refused_by_a_model_on_a_device(gpu: FakeGpu) -> None:
    model = tiny_bert().to("fakegpu:1")
    with torch.inference_mode(), pytest.raises(RuntimeError, match="on the same device"):
        model(torch.tensor([[1, 2, 3]]))


def test_copies_go_between_all_devices_with_their_types_and_strides(gpu: FakeGpu) -> None:
    original = torch.arange(12, dtype=torch.int32).view(3, 4).t()
    there = original.to("fakegpu:1").to("fakegpu:3", dtype=torch.float64)
    assert there.device == torch.device("fakegpu", 3)
    assert torch.equal(there.cpu(), original.double())
    target = torch.zeros(4, 3, device="fakegpu:0")
    target.copy_(there)
    assert torch.equal(target.cpu(), original.float())


def test_results_are_views_and_arguments_where_they_are_on_the_cpu(gpu: FakeGpu) -> None:
    tensor = torch.zeros(2, 3, device="fakegpu:1")
    tensor.view(-1)[1:3].fill_(7)
    tensor.as_strided((2,), (3,)).add_(1)
    tensor.t()[2].mul_(2)
    assert tensor.cpu().tolist() == [[1, 7, 14], [1, 0, 0]]
    out = torch.empty(0, device="fakegpu:1")
    assert torch.add(tensor, 1, out=out) is out
    assert out.cpu().tolist() == [[2, 8, 15], [2, 1, 1]]
    assert gpu.used_bytes(1) == 48


def test_unknown_devices_are_refused(gpu: FakeGpu) -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal: fakegpu:4"):
        torch.empty(1, device="fakegpu:4")
    with pytest.raises(IndexError, match="no device fakegpu:4"):
        gpu.used_bytes(4)
    with pytest.raises(ValueError, match="no budget"):
        gpu.set_budget(0, -1)


def test_torch_sees_an_accelerator(gpu: FakeGpu) -> None:
    gpu.set_budget(2, 4096)
    tensor = torch.ones(8, device="fakegpu:2")
    assert torch.accelerator.current_accelerator() == torch.device("fakegpu")
    assert torch.accelerator.device_count() == 4
    assert torch.accelerator.memory_allocated(2) == tensor.nbytes
    assert torch.accelerator.get_memory_info(2) == (4096 - tensor.nbytes, 4096)
    with torch.accelerator.device_index(2):
        assert torch.empty(0, device="fakegpu").device.index == 2
    assert torch.empty(0, device="fakegpu").device.index == 0
    torch.accelerator.synchronize(2)


def test_seeded_random_numbers_are_those_of_the_cpu(gpu: FakeGpu) -> None:
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(4, device="fakegpu:1").cpu(), expected)


def test_threads_of_one_device_lose_no_byte(gpu: FakeGpu) -> None:
    weights = torch.ones(16, 16, device="fakegpu:1")
    together = threading.Barrier(4)

    def work() -> float:
        together.wait()
        total = torch.zeros((), device="fakegpu:1")
        for _ in range(200):
            total += (weights @ weights).mean()
        return float(total)

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work) for _ in range(4)]
        assert [future.result() for future in futures] == [3200.0] * 4
    assert gpu.used_bytes(1) == weights.nbytes


def test_a_second_load_returns_the_same_devices(gpu: FakeGpu) -> None:
    assert load() is gpu
    assert gpu.budget_bytes(0) == UNLIMITED_BYTES


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: torch.nn.Conv2d(3, 5, 3, padding=1), (2, 3, 8, 8)),
        (lambda: torch.nn.GroupNorm(2, 4), (2, 4, 8)),
        (lambda: torch.nn.LSTM(8, 6, num_layers=2), (4, 2, 8)),
        (lambda: torch.nn.TransformerEncoderLayer(16, 2, batch_first=True), (2, 5, 16)),
    ],
    ids=["convolution", "group norm", "recurrent", "encoder layer"],
)
def test_layers_give_what_they_give_on_the_cpu(
    gpu: FakeGpu, make: Callable[[], torch.nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(3)
    module = make().eval()
    given = torch.randn(shape)

    def run(device: str) -> torch.Tensor:
        output = module.to(device)(given.to(device))
        first: torch.Tensor = output[0] if isinstance(output, tuple) else output
        assert first.device == torch.device(device)
        return first.cpu()

    with torch.inference_mode():
        assert (run("cpu") - run("fakegpu:3")).abs().max() <= 1e-6


def test_bert_on_a_device_gives_what_it_gives_on_the_cpu(gpu: FakeGpu) -> None:
    model = tiny_bert()
    tokens = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.inference_mode():
        expected = model(tokens, attention_mask=mask).last_hidden_state
        model.to("fakegpu:1")
        assert used(gpu) == [0, storage_bytes(model), 0, 0]
        output = model(tokens.to("fakegpu:1"), attention_mask=mask.to("fakegpu:1"))
        actual = output.last_hidden_state
    assert actual.device == torch.device("fakegpu", 1)
    assert (actual.cpu() - expected).abs().max() <= 1e-6
    assert expected.std() > 0.1
    assert gpu.peak_bytes(1) > storage_bytes(model) + actual.nbytes
    assert used(gpu)[2:] == [0, 0]


def test_gpt2_on_a_device_generates_what_it_generates_on_the_cpu(gpu: FakeGpu) -> None:
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=50,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.5,
    )
    model: Any = GPT2LMHeadModel(config)
    model.eval()
    tokens = torch.tensor([[3, 9, 27], [5, 25, 1]])

    def generate(device: str) -> list[list[int]]:
        model.to(device)
        ids = tokens.to(device)
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        generated: list[list[int]] = made.cpu().tolist()
        return generated

    on_cpu = generate("cpu")
    assert generate("fakegpu:2") == on_cpu
    assert len(set(on_cpu[0])) > 3
    assert used(gpu) == [0, 0, storage_bytes(model), 0]


def test_a_tied_weight_is_counted_once(gpu: FakeGpu) -> None:
    config = GPT2Config(
        vocab_size=50, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model: Any = GPT2LMHeadModel(config)
    model.to("fakegpu:0")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert gpu.used_bytes(0) == storage_bytes(model)
    assert gpu.used_bytes(0) < sum(tensor.nbytes for tensor in model.state_dict().values())
