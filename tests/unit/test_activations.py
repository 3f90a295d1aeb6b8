"""What runs take beside weights: predicted without them, and measured."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from tests.support.tiny_models import TinyMlp

from modelyard_server.weights.activations import InputShapes, predict_peak_bytes
from modelyard_server.weights.first_runs import FirstRuns
from modelyard_server.weights.measured_peaks import MeasuredPeak, measured_peak
from modelyard_server.weights.storage_tracker import StorageTracker

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
TINY = transformers.BertConfig(**SIZES, vocab_size=100)
SMALL = transformers.BertConfig(
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=1024,
    vocab_size=500,
)
WRITTEN_OUT = transformers.BertConfig(**SIZES, vocab_size=100)
WRITTEN_OUT._attn_implementation = "eager"
GPT2 = transformers.GPT2Config(
    n_embd=64, n_layer=2, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=0
)
VIT = transformers.ViTConfig(**SIZES, image_size=64, patch_size=8)


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 16, 3)
        self.norm = torch.nn.BatchNorm2d(16)
        self.last = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.norm(self.first(x)).relu()
        result: torch.Tensor = self.last(states.mean((2, 3)))
        return result


class Decides(torch.nn.Module):
    """Does this or that by the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x) if x.sum() > 0 else x
        return result


class Tied(torch.nn.Module):
    """One weight under two names, a constant that is no buffer, and a view for an outcome."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(64, 64)
        self.two = torch.nn.Linear(64, 64, bias=False)
        self.two.weight = self.one.weight
        self.constant = torch.ones(64, device="cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.two(self.one(x) * self.constant)
        return result[:1].t()


def bert() -> torch.nn.Module:
    model: torch.nn.Module = transformers.BertModel(TINY)
    return model.eval()


def texts(batch: int, length: int) -> InputShapes:
    tokens = ((batch, length), torch.int64)
    return {"input_ids": tokens, "attention_mask": tokens}


def made(inputs: InputShapes) -> dict[str, torch.Tensor]:
    """Real inputs; the first text is shorter than the others, as in any batch of texts."""
    tensors = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in inputs.items()}
    if "attention_mask" in tensors:
        tensors["attention_mask"][0, inputs["input_ids"][0][1] // 2 :] = 0
    return tensors


def allocator_peak(run: Callable[[], object]) -> int:
    """The most that was held at once, by what torch's allocator reports of every block."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiled:
        result = run()
    del result
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def real_peak(module: torch.nn.Module, inputs: InputShapes) -> int:
    tensors = made(inputs)
    with torch.inference_mode():
        # What libraries keep from their first run on is nobody's activation.
        module(**tensors)
        return allocator_peak(lambda: module(**tensors))


CASES: list[tuple[str, Callable[[], torch.nn.Module], InputShapes]] = [
    ("bert-tiny-1x32", lambda: transformers.BertModel(TINY), texts(1, 32)),
    ("bert-tiny-8x64", lambda: transformers.BertModel(TINY), texts(8, 64)),
    ("bert-small-2x256", lambda: transformers.BertModel(SMALL), texts(2, 256)),
    ("bert-head", lambda: transformers.BertForMaskedLM(TINY), texts(4, 64)),
    ("bert-attention-written-out", lambda: transformers.BertModel(WRITTEN_OUT), texts(2, 256)),
    ("gpt2-1x32", lambda: transformers.GPT2LMHeadModel(GPT2), texts(1, 32)),
    ("gpt2-4x128", lambda: transformers.GPT2LMHeadModel(GPT2), texts(4, 128)),
    (
        "vit",
        lambda: transformers.ViTForImageClassification(VIT),
        {"pixel_values": ((4, 3, 64, 64), torch.float32)},
    ),
    ("mlp", lambda: TinyMlp(64, 256, 16), {"x": ((100, 64), torch.float32)}),
    ("convolutions", Convolutions, {"x": ((2, 3, 64, 64), torch.float32)}),
    ("tied", Tied, {"x": ((8, 64), torch.float32)}),
]
EACH = pytest.mark.parametrize(
    ("build", "inputs"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)


class TestPrediction:
    @EACH
    def test_it_is_the_allocator_s_peak(
        self, build: Callable[[], torch.nn.Module], inputs: InputShapes
    ) -> None:
        with torch.device("meta"):
            skeleton = build().eval()
        predicted = predict_peak_bytes(skeleton, inputs)
        assert predicted.reason == ""
        assert predicted.peak_bytes == pytest.approx(real_peak(build().eval(), inputs), rel=0.05)

    def test_of_16_bit_numbers_kernels_take_some_for_themselves(self) -> None:
        # They rearrange weights. Within the factor of two that is to be reserved.
        module = TinyMlp(64, 256, 16).bfloat16()
        inputs: InputShapes = {"x": ((100, 64), torch.bfloat16)}
        predicted = predict_peak_bytes(module, inputs).peak_bytes
        assert predicted == 100 * 256 * 2 * 2
        assert predicted <= real_peak(module, inputs) <= 2 * predicted

    def test_other_sizes_take_other_bytes(self) -> None:
        small, large = (predict_peak_bytes(bert, texts(1, length)) for length in (32, 320))
        assert small.peak_bytes is not None
        assert large.peak_bytes == pytest.approx(10 * small.peak_bytes, rel=0.2)

    def test_what_builds_the_model_is_called_on_the_meta_device(self) -> None:
        built: list[torch.nn.Module] = []

        def build() -> torch.nn.Module:
            built.append(TinyMlp())
            return built[0]

        assert predict_peak_bytes(build, {"x": ((1, 8), torch.float32)}).peak_bytes
        assert all(parameter.is_meta for parameter in built[0].parameters())

    def test_an_error_of_what_builds_it_comes_out(self) -> None:
        def build() -> torch.nn.Module:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            predict_peak_bytes(build, {})

    @pytest.mark.parametrize("fails", [False, True])
    def test_the_module_is_as_it_was(self, fails: bool) -> None:
        module = TinyMlp(fails=fails)
        before = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        values = {name: tensor.clone() for name, tensor in before.items()}
        found = predict_peak_bytes(module, {"x": ((1, 8), torch.float32)})
        assert (found.peak_bytes is None) == fails
        after = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            assert after[name] is tensor
            assert torch.equal(tensor, values[name])
            assert tensor.requires_grad == (name != "scale")

    def test_modules_that_keep_lists_of_their_weights_are_as_they_were(self) -> None:
        module = torch.nn.LSTM(8, 8, batch_first=True)
        inputs = {"input": ((2, 5, 8), torch.float32)}
        expected = module(torch.ones(2, 5, 8))[0]
        found = predict_peak_bytes(module, inputs)
        assert found.peak_bytes is not None
        assert found.peak_bytes > 2 * 5 * 8 * 4
        assert torch.equal(module(torch.ones(2, 5, 8))[0], expected)

    def test_other_runs_than_one_call_can_be_asked_for(self) -> None:
        def twice(module: Any, inputs: Mapping[str, torch.Tensor]) -> object:
            return module(**inputs), module(**inputs)

        inputs: InputShapes = {"x": ((16, 8), torch.float32)}
        once = predict_peak_bytes(TinyMlp(hidden=4), inputs).peak_bytes
        # The first outcome, 16 x 4 numbers, is kept while the second is computed.
        assert once is not None
        assert predict_peak_bytes(TinyMlp(hidden=4), inputs, forward=twice).peak_bytes == once + 256

    @pytest.mark.parametrize(
        ("module", "inputs", "reason"),
        [
            (Decides(), {"x": ((2, 8), torch.float32)}, "DataDependentOutput"),
            (TinyMlp(), {"x": ((2, 9), torch.float32)}, "RuntimeError: "),
            (TinyMlp(), {"y": ((2, 8), torch.float32)}, "unexpected keyword argument 'y'"),
            (TinyMlp(fails=True), {"x": ((2, 8), torch.float32)}, "ArithmeticError: asked"),
        ],
        ids=["depends-on-values", "wrong-shape", "wrong-name", "fails"],
    )
    def test_what_cannot_be_known_has_a_reason(
        self,
        module: torch.nn.Module,
        inputs: InputShapes,
        reason: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        found = predict_peak_bytes(module, inputs)
        assert found.peak_bytes is None
        assert reason in found.reason
        assert "\n" not in found.reason
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_a_pass_that_is_too_long_is_given_up(self) -> None:
        class Loop(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for _ in range(10**9):
                    x = x + 1
                return x

        found = predict_peak_bytes(Loop(), {"x": ((1,), torch.float32)})
        assert found.peak_bytes is None
        assert found.reason == "its forward takes more than 10000 operations"
        found = predict_peak_bytes(Loop(), {"x": ((1,), torch.float32)}, max_operations=5)
        assert found.reason == "its forward takes more than 5 operations"

    def test_the_size_of_the_batch_costs_no_operations(self) -> None:
        # What a prediction takes is a matter of operations: BERT-base has 1,000.
        config = transformers.BertConfig(vocab_size=100)
        inputs = {name: ((4096, 512), dtype) for name, (_, dtype) in texts(1, 1).items()}
        found = predict_peak_bytes(
            lambda: transformers.BertModel(config), inputs, max_operations=3000
        )
        assert found.peak_bytes is not None
        assert found.peak_bytes > 2**35

    def test_other_threads_compute_meanwhile(self) -> None:
        module = TinyMlp(64, 256, 16)
        x = torch.rand(8, 64)
        expected = module(x)
        done = threading.Event()

        def compute() -> int:
            rounds = 0
            while not done.is_set() or not rounds:
                result = module(x)
                fresh = torch.tensor([1.5, 2.5])
                assert type(result) is torch.Tensor
                assert torch.equal(result, expected)
                assert type(fresh) is torch.Tensor
                assert fresh.sum().item() == 4.0
                rounds += 1
            return rounds

        def predict() -> set[int | None]:
            return {predict_peak_bytes(bert, texts(2, 32)).peak_bytes for _ in range(5)}

        with ThreadPoolExecutor(4) as pool:
            computing = [pool.submit(compute) for _ in range(2)]
            predicting = [pool.submit(predict) for _ in range(2)]
            try:
                found = [future.result(timeout=100) for future in predicting]
            finally:
                done.set()
            assert all(future.result(timeout=30) for future in computing)
        assert len(found[0]) == 1
        assert found[0] == found[1]
        assert type(torch.ones(1) + torch.tensor(1)) is torch.Tensor
        assert not torch._C._only_lift_cpu_tensors()


class TestMeasuring:
    @EACH
    def test_on_host_memory_it_is_the_allocator_s_peak(
        self, build: Callable[[], torch.nn.Module], inputs: InputShapes
    ) -> None:
        module = build().eval()
        tensors = made(inputs)
        with torch.inference_mode(), measured_peak("cpu") as peak:
            module(**tensors)
        assert peak.size_bytes == pytest.approx(real_peak(module, inputs), rel=0.05)

    @EACH
    def test_results_are_the_same_to_the_bit(
        self, build: Callable[[], torch.nn.Module], inputs: InputShapes
    ) -> None:
        module = build().eval()
        tensors = made(inputs)
        with torch.inference_mode():
            expected = module(**tensors)
            with measured_peak("cpu"):
                measured = module(**tensors)
        outcomes = [
            result if isinstance(result, torch.Tensor) else result[0]
            for result in (expected, measured)
        ]
        assert torch.equal(*outcomes)

    def test_with_gradients_too(self) -> None:
        x = torch.ones(10, 8)
        with measured_peak("cpu") as peak:
            TinyMlp()(x).sum().backward()
        assert peak.size_bytes is not None
        assert peak.size_bytes > 10 * 16 * 4

    def test_a_run_that_fails_has_no_peak(self) -> None:
        seen: list[MeasuredPeak] = []
        with pytest.raises(ArithmeticError), measured_peak("cpu") as peak:
            seen.append(peak)
            TinyMlp(fails=True)(torch.ones(1, 8))
        assert seen == [MeasuredPeak(size_bytes=None)]

    def test_nothing_is_followed_afterwards(self) -> None:
        with measured_peak("cpu") as peak:
            kept = torch.ones(1000)
        torch.ones(100_000)
        del kept
        assert peak.size_bytes == 4032

    def test_threads_are_measured_alone(self) -> None:
        inside, allocated = threading.Event(), threading.Event()

        def other() -> torch.Tensor:
            assert inside.wait(30)
            result = torch.ones(10**6)
            allocated.set()
            return result

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(other)
            with measured_peak("cpu") as peak:
                inside.set()
                assert allocated.wait(30)
                kept = torch.ones(16)
            assert peak.size_bytes == kept.nbytes
            assert future.result(30).numel() == 10**6

    def test_a_device_that_keeps_no_statistics_has_no_peak(self) -> None:
        with measured_peak("meta") as peak:
            torch.ones(1000, device="meta")
        assert peak.size_bytes is None

    @pytest.mark.timeout(900)
    def test_on_an_accelerator_its_allocator_is_asked(self) -> None:
        from tests.support.fakegpu import load

        gpu = load()
        gpu.reset()
        module = TinyMlp(64, 256, 16).to("fakegpu:1")
        x = torch.ones(100, 64, device="fakegpu:1")
        with torch.inference_mode(), measured_peak("fakegpu:1") as peak:
            module(x)
        expected = predict_peak_bytes(module.to("cpu"), {"x": ((100, 64), torch.float32)})
        assert peak.size_bytes is not None
        assert peak.size_bytes == pytest.approx(expected.peak_bytes, rel=0.05)
        with measured_peak("fakegpu:0") as elsewhere:
            torch.ones(10, device="fakegpu:1")
        assert elsewhere.size_bytes == 0

    def test_the_first_run_of_each_bucket_is_picked(self) -> None:
        first = FirstRuns()
        batches = [(1, 1), (1, 1), (4, 100), (3, 65), (4, 128), (5, 128), (4, 129), (4, 64)]
        assert [first.take(*batch) for batch in batches] == [
            True, False, True, False, False, True, True, True,
        ]  # fmt: skip


class TestTracking:
    def test_views_and_arguments_do_not_count(self) -> None:
        x = torch.ones(1000)
        with StorageTracker() as tracker:
            kept = [x[:10], x.view(10, 100).t(), x.reshape(20, 50), x.add_(1)]
        assert tracker.peak_bytes == 0
        del kept

    def test_storages_count_once_and_until_the_last_view_goes(self) -> None:
        with StorageTracker() as tracker:
            one = torch.zeros(16)
            part = one[:4]
            del one
            assert tracker.now_bytes == 64
            two = torch.zeros(17)
            assert tracker.now_bytes == 64 + 128
            del part
            assert tracker.now_bytes == 128
            del two
            assert tracker.now_bytes == 0
        assert tracker.peak_bytes == 192

    def test_what_grows_counts_as_it_grows(self) -> None:
        with StorageTracker() as tracker:
            grown = torch.zeros(16)
            grown.resize_(160)
            assert tracker.now_bytes == 640

    def test_all_parts_of_an_outcome_count(self) -> None:
        x = torch.rand(2, 16)
        with StorageTracker() as tracker:
            kept = x.sort()
            assert tracker.now_bytes == 2 * 16 * 4 + 2 * 16 * 8
        del kept

    def test_it_lets_go_of_everything(self) -> None:
        tracker = StorageTracker()
        with tracker:
            for _ in range(100):
                torch.ones(8) + torch.ones(8)
        assert tracker.now_bytes == 0
        assert not tracker._sizes
        assert not tracker._references
