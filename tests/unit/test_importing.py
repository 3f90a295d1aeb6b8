"""Checkpoints in, safetensors folders out; everything that is not numbers is turned away."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modelyard_server.weights.importing import (
    ImportRefused,
    RefusalReason,
    SourceFormat,
    import_checkpoint,
)


class _WritesCanary:
    """Unpickling an instance writes a file: the crime every pickle can commit."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


@pytest.fixture
def yard(tmp_path: Path) -> Path:
    folder = tmp_path / "yard"
    folder.mkdir()
    return folder


def _state_dict() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([1, 2], dtype=torch.int64)}


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _refused(source: Path, yard: Path) -> ImportRefused:
    """The refusal of `source`, which must leave nothing behind and name no foreign path."""
    with pytest.raises(ImportRefused) as caught:
        import_checkpoint(source, yard / "model")
    assert _names(yard) == set()
    assert "site-packages" not in caught.value.text
    assert __file__ not in caught.value.text
    return caught.value


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_becomes_the_same_tensors(inbox: Path, yard: Path, legacy: bool) -> None:
    source = inbox / "weights.pth"
    torch.save(_state_dict(), source, _use_new_zipfile_serialization=not legacy)

    report = import_checkpoint(source, yard / "model")

    loaded = load_file(yard / "model" / "model.safetensors")
    assert {name: value.tolist() for name, value in loaded.items()} == {
        name: value.tolist() for name, value in _state_dict().items()
    }
    assert report.source_format is (SourceFormat.TORCH_LEGACY if legacy else SourceFormat.TORCH_ZIP)
    assert report.tensor_count == 2
    assert report.size_bytes >= 12 * 4 + 2 * 8
    assert report.source_bytes == source.stat().st_size
    assert _names(yard) == {"model"}


@pytest.mark.parametrize("name", ["state_dict", "model_state", "model"])
def test_a_nested_state_dict_is_found_and_the_optimizer_left_out(
    inbox: Path, yard: Path, name: str
) -> None:
    source = inbox / "checkpoint.pt"
    optimizer = {"state": {0: {"exp_avg": torch.ones(1000)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, name: OrderedDict(_state_dict()), "optimizer": optimizer}, source)

    report = import_checkpoint(source, yard / "model")

    assert report.found_under == name
    assert set(report.left_out) == {"epoch", "optimizer"}
    assert set(load_file(yard / "model" / "model.safetensors")) == {"w", "b"}
    assert report.size_bytes < report.source_bytes


def test_a_state_dict_two_levels_down_is_found(inbox: Path, yard: Path) -> None:
    source = inbox / "checkpoint.pt"
    torch.save({"model": {"state_dict": _state_dict(), "step": 1}}, source)

    assert import_checkpoint(source, yard / "model").found_under == "model.state_dict"


def test_tied_tensors_of_a_bare_checkpoint_are_written_under_every_name(
    inbox: Path, yard: Path
) -> None:
    table = torch.arange(8.0).reshape(4, 2)
    both = torch.arange(6.0)
    source = inbox / "tied.pt"
    torch.save(
        {"embed": table, "head": table, "left": both[:3], "right": both[3:], "t": table.T}, source
    )

    report = import_checkpoint(source, yard / "model")

    loaded = load_file(yard / "model" / "model.safetensors")
    assert report.aliases == {"head": "embed"}
    assert not report.aliases_dropped
    assert loaded["head"].equal(table)
    assert loaded["right"].tolist() == [3.0, 4.0, 5.0]
    assert loaded["t"].equal(table.T)


def test_a_tied_transformers_folder_loses_its_aliases_and_still_loads(
    inbox: Path, yard: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    folder = inbox / "gpt2"
    folder.mkdir()
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(b"not for us")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "vocab.json").write_text("{}")

    report = import_checkpoint(folder, yard / "model")

    assert report.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert report.aliases_dropped
    assert _names(yard / "model") == {"config.json", "model.safetensors", "vocab.json"}
    assert report.copied_files == ("config.json", "vocab.json")
    with safe_open(yard / "model" / "model.safetensors", framework="pt") as opened:
        assert opened.metadata()["lm_head.weight"] == "transformer.wte.weight"
    loaded = transformers.GPT2LMHeadModel.from_pretrained(yard / "model").eval()
    tokens = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        assert loaded(tokens).logits.equal(model(tokens).logits)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(
    inbox: Path, yard: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    source = inbox / "weights.bin"
    # The control: the same pickle, read the careless way, does sing.
    source.write_bytes(pickle.dumps(_WritesCanary(canary)))
    pickle.loads(source.read_bytes())
    assert canary.is_dir()
    canary.rmdir()

    for payload in (_WritesCanary(canary), {"state_dict": {"w": _WritesCanary(canary)}}):
        source.write_bytes(pickle.dumps(payload))
        assert _refused(source, yard).reason in (RefusalReason.NEEDS_CODE, RefusalReason.CORRUPT)
        torch.save(payload, source)
        refusal = _refused(source, yard)
        assert refusal.reason is RefusalReason.NEEDS_CODE
        assert "mkdir" in refusal.text
    assert not canary.exists()


def test_a_variable_of_our_environment_cannot_unlock_the_pickle(
    inbox: Path, yard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    source = inbox / "weights.pt"
    torch.save(_WritesCanary(tmp_path / "canary"), source)

    assert _refused(source, yard).reason is RefusalReason.NEEDS_CODE
    assert not (tmp_path / "canary").exists()


def test_a_whole_pickled_module_is_refused_by_name(inbox: Path, yard: Path) -> None:
    source = inbox / "module.pt"
    torch.save(torch.nn.Linear(2, 2), source)

    refusal = _refused(source, yard)

    assert refusal.reason is RefusalReason.NEEDS_CODE
    assert "torch.nn.modules.linear.Linear" in refusal.text


def _write_torchscript(path: Path) -> None:
    # Written by hand, since torch.jit is deprecated: the two marks of a program in an archive.
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/constants.pkl", b"\x80\x02).")
        archive.writestr("m/code/__torch__.py", b"class Module(Module): ...")


def _write_compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\0" * 10_000_000)


def _write_other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday.txt", b"sun")


def _write_truncated(path: Path) -> None:
    torch.save({"w": torch.zeros(10_000)}, path)
    path.write_bytes(path.read_bytes()[:-5_000])


def _write_truncated_legacy(path: Path) -> None:
    torch.save({"w": torch.zeros(10_000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-5_000])


def _write_stride_bomb(path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, path)


def _write_overlapping_views(path: Path) -> None:
    base = torch.zeros(100_000)
    torch.save({f"w{i}": base[i:] for i in range(50)}, path)


def _write_truncated_safetensors(path: Path) -> None:
    save_file({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (_write_torchscript, RefusalReason.TORCHSCRIPT),
        (_write_compressed, RefusalReason.SUSPICIOUS_ARCHIVE),
        (_write_other_zip, RefusalReason.UNKNOWN_FORMAT),
        (_write_truncated, RefusalReason.CORRUPT),
        (_write_truncated_legacy, RefusalReason.CORRUPT),
        (_write_stride_bomb, RefusalReason.SUSPICIOUS_ARCHIVE),
        (_write_overlapping_views, RefusalReason.SUSPICIOUS_ARCHIVE),
        (_write_truncated_safetensors, RefusalReason.CORRUPT),
        (lambda path: path.write_bytes(b""), RefusalReason.UNKNOWN_FORMAT),
        (lambda path: path.write_text("GIF89a, of course"), RefusalReason.UNKNOWN_FORMAT),
        (lambda path: path.write_bytes(b"\x80\x02}"), RefusalReason.CORRUPT),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_its_reason(
    inbox: Path, yard: Path, write: Callable[[Path], object], reason: RefusalReason
) -> None:
    source = inbox / "weights.pt"
    write(source)

    assert _refused(source, yard).reason is reason


@pytest.mark.parametrize(
    "payload",
    [
        torch.zeros(3),
        [torch.zeros(3)],
        {},
        {"state_dict": {}},
        {"w": torch.zeros(3), "epoch": 4},
        {"generator": {"w": torch.zeros(3)}},
        {1: torch.zeros(3)},
    ],
    ids=["tensor", "list", "empty", "nested-empty", "mixed", "unknown-name", "number-as-name"],
)
def test_a_payload_without_one_state_dict_is_refused(
    inbox: Path, yard: Path, payload: object
) -> None:
    source = inbox / "weights.pt"
    torch.save(payload, source)

    assert _refused(source, yard).reason is RefusalReason.NO_STATE_DICT


def test_sparse_and_nameless_tensors_are_refused(inbox: Path, yard: Path) -> None:
    source = inbox / "weights.pt"
    for payload in ({"w": torch.eye(3).to_sparse()}, {"": torch.zeros(1)}):
        torch.save(payload, source)
        assert _refused(source, yard).reason is RefusalReason.UNSUPPORTED_TENSOR


def test_a_reader_past_its_time_is_ended(inbox: Path, yard: Path) -> None:
    source = inbox / "weights.pt"
    torch.save(_state_dict(), source)

    with pytest.raises(ImportRefused) as caught:
        import_checkpoint(source, yard / "model", time_limit_s=0.01)

    assert caught.value.reason is RefusalReason.TIME_LIMIT
    assert _names(yard) == set()


def test_a_reader_that_wants_too_much_memory_is_refused(inbox: Path, yard: Path) -> None:
    source = inbox / "weights.pt"
    torch.save({"w": torch.zeros(64 << 20, dtype=torch.uint8)}, source)

    with pytest.raises(ImportRefused) as caught:
        import_checkpoint(source, yard / "model", memory_limit_bytes=8 << 20)

    assert caught.value.reason is RefusalReason.MEMORY_LIMIT
    assert _names(yard) == set()


def test_a_destination_in_use_is_left_alone(inbox: Path, yard: Path) -> None:
    source = inbox / "weights.pt"
    torch.save(_state_dict(), source)
    taken = yard / "model"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep")

    with pytest.raises(ImportRefused) as caught:
        import_checkpoint(source, taken)

    assert caught.value.reason is RefusalReason.DESTINATION_IN_USE
    assert _names(yard) == {"model"}
    assert (taken / "mine.txt").read_text() == "keep"


def test_an_empty_destination_is_filled(inbox: Path, yard: Path) -> None:
    source = inbox / "weights.pt"
    torch.save(_state_dict(), source)
    (yard / "model").mkdir()

    import_checkpoint(source, yard / "model")

    assert _names(yard / "model") == {"model.safetensors"}


def test_safetensors_are_verified_and_copied_byte_for_byte(inbox: Path, yard: Path) -> None:
    source = inbox / "model.safetensors"
    save_file(_state_dict(), source, metadata={"origin": "here"})

    report = import_checkpoint(source, yard / "model")

    assert report.source_format is SourceFormat.SAFETENSORS
    assert (yard / "model" / "model.safetensors").read_bytes() == source.read_bytes()


def test_symlinks_are_refused(inbox: Path, yard: Path) -> None:
    real = inbox / "real.pt"
    torch.save(_state_dict(), real)
    link = inbox / "link.pt"
    link.symlink_to(real)
    assert _refused(link, yard).reason is RefusalReason.SYMLINK

    folder = inbox / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").symlink_to(real)
    assert _refused(folder, yard).reason is RefusalReason.SYMLINK


def test_a_folder_without_its_parts_is_refused(inbox: Path, yard: Path) -> None:
    assert _refused(inbox / "absent.pt", yard).reason is RefusalReason.SOURCE_NOT_FOUND
    assert _refused(inbox, yard).reason is RefusalReason.SOURCE_NOT_FOUND

    torch.save(_state_dict(), inbox / "pytorch_model.bin")
    assert "config.json" in _refused(inbox, yard).text

    (inbox / "config.json").write_text("not json")
    assert _refused(inbox, yard).reason is RefusalReason.CORRUPT

    (inbox / "pytorch_model.bin").unlink()
    (inbox / "pytorch_model.bin.index.json").write_text(json.dumps({}))
    assert _refused(inbox, yard).reason is RefusalReason.SHARDED


def test_a_missing_parent_of_the_destination_is_named(inbox: Path, yard: Path) -> None:
    source = inbox / "weights.pt"
    torch.save(_state_dict(), source)

    with pytest.raises(ImportRefused) as caught:
        import_checkpoint(source, yard / "nowhere" / "model")

    assert caught.value.reason is RefusalReason.CANNOT_WRITE
