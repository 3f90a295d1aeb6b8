"""Files and folders that are not what they seem: the specific error, and nobody is disturbed."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from safetensors.torch import save_file
from tests.support import faulty_models, tiny_models
from tests.support.bare_calls import CREATE_MODEL, check_text, send_refused
from tests.support.config_text import CPU, model_table
from tests.support.faulty_yards import X, torch_model, undisturbed, yard_with
from tests.support.server import eventually, refusal_of

from modelyard import Admin, InvalidRequest, LoadFailed, ResidencyState
from modelyard.v1 import model_service_pb2

PATIENCE_S = 30
"""For what is over at once, or never: a pipe that is read gives nothing and does not end."""

# Files that are not what they seem


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def good_bytes(folder: Path) -> bytes:
    return (faulty_models.make_weights(folder) / "model.safetensors").read_bytes()


def damaged_files(base: Path) -> Iterator[tuple[str, bytes]]:
    """Contents of a model.safetensors that is none."""
    good = good_bytes(base / "good")
    header = int.from_bytes(good[:8], "little")
    yield "empty", b""
    yield "truncated in the data", good[:-1]
    yield "truncated in the header", good[: header // 2]
    yield "truncated in the length", good[:5]
    yield "longer than it says", good + b"\0"
    yield "absurd length", b"\xff" * 8 + good[8:]
    yield "corrupt header", good[:8] + b"\xff" * header + good[8 + header :]
    yield "zeros", bytes(len(good))
    canary = {"weight": torch.ones(4), "canary": Canary(base / "executed")}
    yield "pickle", pickle.dumps(canary)
    torch.save(canary, base / "zip")
    yield "zip of torch", (base / "zip").read_bytes()
    with zipfile.ZipFile(base / "plain", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(canary))
    yield "zip", (base / "plain").read_bytes()
    torch.save(canary, base / "legacy", _use_new_zipfile_serialization=False)
    yield "pickle of torch", (base / "legacy").read_bytes()
    yield "gguf", b"GGUF\x03\0\0\0" + b"\1\0\0\0\0\0\0\0" * 2 + b"\0" * 100
    yield "other names", named_bytes(base, {"wait": torch.ones(faulty_models.ROWS)})
    yield "another shape", named_bytes(base, {"weight": torch.ones(7)})


def named_bytes(base: Path, tensors: dict[str, torch.Tensor]) -> bytes:
    save_file(tensors, base / "named")
    return (base / "named").read_bytes()


async def test_files_that_are_no_safetensors_fail_fast_and_alone(tmp_path: Path) -> None:
    files = dict(damaged_files(tmp_path))
    config = "[yard]\nbackoff_initial_s = 60\n" + CPU
    for index, content in enumerate(files.values()):
        folder = faulty_models.make_weights(tmp_path / "store" / f"bad-{index}")
        (folder / "model.safetensors").write_bytes(content)
        config += torch_model(f"bad-{index}", "Adding")
    async with yard_with(tmp_path, config) as yard:
        before = await yard.device()
        for index, case in enumerate(files):
            async with asyncio.timeout(PATIENCE_S):
                error = await refusal_of(yard.client.predict(f"bad-{index}", X))
            assert isinstance(error, LoadFailed), (case, error)
            assert not error.transient, case
            assert error.retry_after_s is None, case
            check_text(str(error), tmp_path)
            residency = await yard.residency(f"bad-{index}")
            assert residency.state is ResidencyState.FAILED, case
            assert residency.charges == (), case
            assert residency.failure is not None
            assert residency.failure.attempt_count == 1
            check_text(residency.failure.message, tmp_path)
        after = await yard.device()
        assert (after.reserved_bytes, after.resident_bytes) == (0, before.resident_bytes)
        assert (after.load_count, after.eviction_count) == (before.load_count, 0)
        stats = await yard.admin(Admin.stats)
        assert stats.load_failure_count == len(files)
        assert stats.error_counts == {"LOAD_FAILED": len(files)}
    assert not (tmp_path / "executed").exists()


async def test_the_canary_would_have_been_seen(tmp_path: Path) -> None:
    """Negative control: who does unpickle it makes the file."""
    pickle.loads(pickle.dumps(Canary(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


async def test_a_failed_load_is_not_tried_again_before_its_time(tmp_path: Path) -> None:
    folder = faulty_models.make_weights(tmp_path / "store" / "bad", value=5.0)
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-1])
    config = "[yard]\nbackoff_initial_s = 0.5\n" + CPU + torch_model("bad", "Adding")
    async with yard_with(tmp_path, config) as yard:
        errors = [await refusal_of(yard.client.predict("bad", X)) for _ in range(5)]
        assert {type(error) for error in errors} == {LoadFailed}
        assert "next_attempt_in_ms" in errors[1].metadata
        residency = await yard.residency("bad")
        assert residency.failure is not None
        assert residency.failure.attempt_count == 1
        assert residency.failure.retry_at is not None

        # Repaired, and after the pause, it is tried again and works.
        (folder / "model.safetensors").write_bytes(good)

        async def works() -> bool:
            try:
                prediction = await yard.client.predict("bad", X)
            except LoadFailed:
                return False
            np.testing.assert_array_equal(prediction.only, X + 5)
            return True

        await eventually("the repaired model is served", works)
        residency = await yard.residency("bad")
        assert residency.state is ResidencyState.RESIDENT
        assert residency.failure is None
        assert residency.load_count == 1
        stats = await yard.admin(Admin.stats)
        assert stats.load_failure_count == 1


async def test_many_requests_for_a_broken_model_are_one_attempt(tmp_path: Path) -> None:
    folder = faulty_models.make_weights(tmp_path / "store" / "bad")
    (folder / "model.safetensors").write_bytes(b"")
    config = "[yard]\nbackoff_initial_s = 60\n" + CPU + torch_model("bad", "Adding")
    async with yard_with(tmp_path, config) as yard:
        errors = await asyncio.gather(
            *(refusal_of(yard.client.predict("bad", X)) for _ in range(30))
        )
        assert {error.reason for error in errors} == {"LOAD_FAILED"}
        stats = await yard.admin(Admin.stats)
        assert stats.load_failure_count == 1


async def test_a_missing_folder_keeps_no_other_model_from_being_served(tmp_path: Path) -> None:
    """docs/configuration.md: a missing model is no reason for the others not to start."""
    async with yard_with(tmp_path, CPU + torch_model("missing", "Adding")) as yard:
        error = await refusal_of(yard.client.predict("missing", X))
        assert isinstance(error, LoadFailed)
        check_text(str(error), tmp_path)


async def test_a_folder_that_became_a_link_out_of_its_root_is_not_followed(tmp_path: Path) -> None:
    inside = faulty_models.make_weights(tmp_path / "store" / "swapped")
    outside = faulty_models.make_weights(tmp_path / "outside", value=9.0)
    async with yard_with(tmp_path, CPU + torch_model("swapped", "Adding")) as yard:
        inside.rename(tmp_path / "elsewhere")
        (tmp_path / "store" / "swapped").symlink_to(outside)
        error = await refusal_of(yard.client.predict("swapped", X))
        assert isinstance(error, LoadFailed)
        check_text(str(error), tmp_path)


async def test_weights_behind_a_link_a_pipe_or_a_folder_are_refused(tmp_path: Path) -> None:
    outside = faulty_models.make_weights(tmp_path / "outside") / "model.safetensors"
    config = "[yard]\nbackoff_initial_s = 60\n" + CPU
    for kind in ("link", "pipe", "folder", "device"):
        folder = tmp_path / "store" / kind
        folder.mkdir(parents=True)
        weights = folder / "model.safetensors"
        match kind:
            case "link":
                weights.symlink_to(outside)
            case "pipe":
                os.mkfifo(weights)
            case "folder":
                weights.mkdir()
            case _:
                weights.symlink_to("/dev/zero")
        config += torch_model(kind, "Adding")
    async with yard_with(tmp_path, config) as yard:
        for kind in ("link", "pipe", "folder", "device"):
            async with asyncio.timeout(PATIENCE_S):
                error = await refusal_of(yard.client.predict(kind, X))
            assert isinstance(error, LoadFailed), kind
            check_text(str(error), tmp_path)


async def test_configurations_that_reach_beyond_the_weights_are_refused(tmp_path: Path) -> None:
    config = "[yard]\nbackoff_initial_s = 60\n" + CPU
    changes: dict[str, dict[str, object]] = {
        "auto-map": {"auto_map": {"AutoModel": "evil.Model"}},
        "attention": {"_attn_implementation_internal": "someone/kernel"},
        "remote-code": {"trust_remote_code": True},
        "quantised": {"quantization_config": {"quant_method": "bitsandbytes"}},
        "nested": {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}},
        "unknown": {"model_type": "no-such-model"},
        "wide": {"hidden_size": 2**31},
        "deep": {"num_hidden_layers": 10**6},
        "negative": {"vocab_size": -1},
        "larger-than-its-weights": {"vocab_size": 2_000_000},
    }
    for name, change in changes.items():
        folder = tiny_models.make_tiny_bert(tmp_path / "store" / name, seed=1, num_labels=2)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        config += model_table(name, "transformers", task="text-classification")
    async with yard_with(tmp_path, config) as yard:
        for name in changes:
            error = await refusal_of(yard.client.predict(name, "the dog"))
            assert isinstance(error, LoadFailed), name
            assert not error.transient, name
            check_text(str(error), tmp_path)


# Paths


FORBIDDEN_FOLDERS = [
    "",
    ".",
    "..",
    "../outside",
    "good/../../outside",
    "good/..",
    "/etc",
    "//host/share",
    "good//nested",
    "good/",
    "/good",
    "good\\..\\..\\outside",
    "good\0",
    "link",
    "link/nested",
    "good/link",
    "http://127.0.0.1/x",
    "file:///etc",
    "s3://bucket/x",
    "~",
    "$HOME",
    "nobody",
    "file",
    "good/model.safetensors",
    "a" * 5000,
    "/".join(["a"] * 2000),
]


async def test_no_folder_leads_out_of_its_root(tmp_path: Path) -> None:
    outside = faulty_models.make_weights(tmp_path / "outside")
    faulty_models.make_weights(outside / "nested")
    good = faulty_models.make_weights(tmp_path / "store" / "good")
    (tmp_path / "store" / "link").symlink_to(outside)
    (good / "link").symlink_to(outside)
    (tmp_path / "store" / "file").touch()
    async with yard_with(tmp_path, CPU) as yard:
        async with undisturbed(yard):
            for folder in FORBIDDEN_FOLDERS:
                request = model_service_pb2.CreateModelRequest(model_id="sneaky")
                request.model.runtime = "torch"
                request.model.source.root = "store"
                request.model.source.folder = folder
                request.model.options.update({"factory": faulty_models.factory("Adding")})
                refused = await send_refused(yard, CREATE_MODEL, request.SerializeToString())
                assert refused.code is grpc.StatusCode.INVALID_ARGUMENT, folder[:80]
                assert refused.reason == "INVALID_FIELD", folder[:80]
                assert "model.source" in refused.fields, folder[:80]
                check_text(refused.text, tmp_path)
        request = model_service_pb2.CreateModelRequest(model_id="sneaky")
        request.model.runtime = "torch"
        request.model.source.folder = "good"
        request.model.options.update({"factory": faulty_models.factory("Adding")})
        for root in ("", "nobody", "..", "/", str(tmp_path), "store/.."):
            request.model.source.root = root
            refused = await send_refused(yard, CREATE_MODEL, request.SerializeToString())
            assert "model.source" in refused.fields, root
            check_text(refused.text.replace(repr(root[:64]), ""), tmp_path)


async def test_only_allowed_factories_are_called(tmp_path: Path) -> None:
    faulty_models.make_weights(tmp_path / "store" / "good")
    async with yard_with(tmp_path, CPU) as yard:
        for name in ("os:system", "builtins:eval", "tests.support.faulty_models:Gate", "", "x"):
            error = await refusal_of(
                yard.admin(
                    Admin.create_model,
                    "sneaky",
                    runtime="torch",
                    root="store",
                    folder="good",
                    options={"factory": name},
                )
            )
            assert isinstance(error, InvalidRequest)
            assert [violation.field for violation in error.violations] == ["model.options.factory"]
