"""Turn a checkpoint of any common torch form into a safetensors model folder.

modelyard serves safetensors only. A checkpoint in the pickle format is a program, not a file of
numbers, so it is never opened in the process that asked for it. The work is split in two:

- The **reader** is a child process (this file run as a script in Python's isolated mode). It
  limits its own memory, processor time and output size, looks at the archive before it believes
  it, reads the pickle with ``torch.load(weights_only=True)``, keeps the tensors of one state dict
  and writes them as safetensors. It answers with one line of JSON.
- The **importer**, `import_checkpoint`, starts the reader with an empty environment and a time
  limit, checks what it wrote, copies the configuration and tokenizer files beside it, and renames
  the finished folder into place. On any failure nothing is left behind.

What is refused is refused by name (`RefusalReason`): pickles that need code, TorchScript
archives, archives that would unpack to more than they are, symlinks, payloads that are no state
dict, truncated files.

Sources: the torch serialization notes (zip archives of stored records since torch 1.6, a run of
pickles before) and the safetensors format description (8-byte header length, JSON header, data).
"""

from __future__ import annotations

import enum
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn, cast

if TYPE_CHECKING:
    import torch

__all__ = ["ImportRefused", "ImportReport", "RefusalReason", "SourceFormat", "import_checkpoint"]

WEIGHTS_FILE = "model.safetensors"
_PICKLED_WEIGHTS_FILE = "pytorch_model.bin"
_CONFIG_FILE = "config.json"

_COMPANION_FILES = frozenset(
    {
        _CONFIG_FILE,
        "added_tokens.json",
        "chat_template.jinja",
        "config_sentence_transformers.json",
        "generation_config.json",
        "merges.txt",
        "modules.json",
        "preprocessor_config.json",
        "processor_config.json",
        "sentence_bert_config.json",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "spm.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
"""Files of a transformers folder that are data. Everything else (code, optimizer state, training
arguments, other formats of the same weights) stays where it is."""

_STATE_DICT_NAMES = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
)
"""Where training programs put the model's state dict in a checkpoint, most specific first."""

_MAX_COMPANION_BYTES = 256 << 20
_MAX_NESTING = 4
_MAX_RECORDS = 1_000_000
_HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 << 20
_SLACK_BYTES = 64 << 20
_READER_MEMORY_FLOOR_BYTES = 1 << 30
_MAX_DETAIL_CHARS = 200


class RefusalReason(enum.StrEnum):
    """Why a checkpoint was not imported. Part of the interface: programs branch on it."""

    SOURCE_NOT_FOUND = "SOURCE_NOT_FOUND"
    SYMLINK = "SYMLINK"
    DESTINATION_IN_USE = "DESTINATION_IN_USE"
    UNKNOWN_FORMAT = "UNKNOWN_FORMAT"
    TORCHSCRIPT = "TORCHSCRIPT"
    NEEDS_CODE = "NEEDS_CODE"
    SUSPICIOUS_ARCHIVE = "SUSPICIOUS_ARCHIVE"
    CORRUPT = "CORRUPT"
    NO_STATE_DICT = "NO_STATE_DICT"
    UNSUPPORTED_TENSOR = "UNSUPPORTED_TENSOR"
    SHARDED = "SHARDED"
    TIME_LIMIT = "TIME_LIMIT"
    MEMORY_LIMIT = "MEMORY_LIMIT"
    READER_DIED = "READER_DIED"
    CANNOT_WRITE = "CANNOT_WRITE"


class SourceFormat(enum.StrEnum):
    """What the checkpoint was before it was imported."""

    TORCH_ZIP = "torch-zip"
    TORCH_LEGACY = "torch-legacy"
    SAFETENSORS = "safetensors"


class ImportRefused(Exception):
    """A checkpoint that is not imported, and why.

    The text names the source and the destination as the caller gave them and no other path.
    """

    def __init__(self, reason: RefusalReason, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What an import did.

    `size_bytes` counts the tensors' own bytes (what a device will be charged), `source_bytes` the
    file they came from: a checkpoint with optimizer state is larger than its model.
    `found_under` is the path of the state dict inside the checkpoint ("" for the top).
    `left_out` names what was beside it. `aliases` maps a tensor's further names to the name it
    is kept under; `aliases_dropped` says whether those names are absent from the file (a
    transformers folder, whose model ties them again) or written as copies (a bare checkpoint,
    whose loader may insist on every name).
    """

    source_format: SourceFormat
    tensor_count: int
    size_bytes: int
    source_bytes: int
    found_under: str
    left_out: tuple[str, ...]
    aliases: Mapping[str, str]
    aliases_dropped: bool
    copied_files: tuple[str, ...]


def import_checkpoint(
    source: Path,
    folder: Path,
    *,
    time_limit_s: float = 600.0,
    memory_limit_bytes: int | None = None,
) -> ImportReport:
    """Write the checkpoint `source` as the safetensors model folder `folder`.

    Args:
        source: a checkpoint file (torch's zip or legacy pickle format, or safetensors), or a
            transformers folder with config.json and model.safetensors or pytorch_model.bin.
        folder: where the model folder goes; absent or an empty directory, in an existing parent.
        time_limit_s: seconds the reading child may take, wall and processor time alike.
        memory_limit_bytes: private memory the child may use beyond what importing torch took;
            by default four times the source plus 1 GiB.

    Raises:
        ImportRefused: with the reason; `folder` is then as it was.
    """
    weights, companions = _look_at_source(source)
    _check_destination(folder)
    source_bytes = weights.stat().st_size
    config = next((path for path in companions if path.name == _CONFIG_FILE), None)
    drop_aliases = config is not None and _ties_embeddings(config)
    try:
        workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}.importing-", dir=folder.parent))
    except OSError as error:
        _refuse_write(folder, error)
    try:
        # The inner folder, unlike one from mkdtemp, has the permissions the user's umask asks for.
        unfinished = workshop / "folder"
        unfinished.mkdir()
        answer = _run_reader(
            _ReaderOrder(
                source=str(weights.absolute()),
                target=str((unfinished / WEIGHTS_FILE).absolute()),
                drop_aliases=drop_aliases,
                time_limit_s=max(1, math.ceil(time_limit_s)),
                memory_limit_bytes=memory_limit_bytes
                or 4 * source_bytes + _READER_MEMORY_FLOOR_BYTES,
                output_limit_bytes=2 * source_bytes + _SLACK_BYTES,
            ),
            time_limit_s,
        )
        size_bytes = _check_written(unfinished / WEIGHTS_FILE)
        for path in companions:
            shutil.copyfile(path, unfinished / path.name, follow_symlinks=False)
        for path in unfinished.iterdir():
            _fsync(path)
        _fsync(unfinished)
        # rename(2) replaces an empty directory and fails on one that has been filled meanwhile.
        unfinished.rename(folder)
        _fsync(folder.parent)
    except OSError as error:
        _refuse_write(folder, error)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return ImportReport(
        source_format=SourceFormat(answer.source_format),
        tensor_count=answer.tensor_count,
        size_bytes=size_bytes,
        source_bytes=source_bytes,
        found_under=answer.found_under,
        left_out=answer.left_out,
        aliases=answer.aliases,
        aliases_dropped=drop_aliases and bool(answer.aliases),
        copied_files=tuple(sorted(path.name for path in companions)),
    )


def _refuse_write(folder: Path, error: OSError) -> NoReturn:
    raise ImportRefused(
        RefusalReason.CANNOT_WRITE,
        f"cannot write {folder}: {error.strerror or type(error).__name__}",
    ) from error


def _look_at_source(source: Path) -> tuple[Path, list[Path]]:
    """The weights file and the files to copy beside it; refuses what is not there or linked."""
    try:
        mode = source.lstat().st_mode
    except OSError as error:
        raise ImportRefused(
            RefusalReason.SOURCE_NOT_FOUND, f"{source}: {error.strerror or 'cannot be read'}"
        ) from error
    _refuse_symlink(source, mode)
    if stat.S_ISREG(mode):
        return source, []
    if not stat.S_ISDIR(mode):
        raise ImportRefused(
            RefusalReason.UNKNOWN_FORMAT, f"{source} is neither a file nor a folder"
        )
    names = {path.name for path in source.iterdir()}
    weights = next((n for n in (WEIGHTS_FILE, _PICKLED_WEIGHTS_FILE) if n in names), None)
    if weights is None:
        if any(name.endswith(".index.json") for name in names):
            raise ImportRefused(
                RefusalReason.SHARDED,
                f"{source} holds a checkpoint in several files; load and save it as one first, "
                "with save_pretrained(max_shard_size=...)",
            )
        raise ImportRefused(
            RefusalReason.SOURCE_NOT_FOUND,
            f"{source} holds neither {WEIGHTS_FILE} nor {_PICKLED_WEIGHTS_FILE}; "
            "give the checkpoint file itself",
        )
    if _CONFIG_FILE not in names:
        raise ImportRefused(
            RefusalReason.SOURCE_NOT_FOUND,
            f"{source} has no {_CONFIG_FILE}; to import the bare weights give {source / weights}",
        )
    companions = sorted(source / name for name in names & _COMPANION_FILES)
    for path in (source / weights, *companions):
        status = path.lstat()
        _refuse_symlink(path, status.st_mode)
        if not stat.S_ISREG(status.st_mode):
            raise ImportRefused(RefusalReason.UNKNOWN_FORMAT, f"{path} is not a regular file")
        if path in companions and status.st_size > _MAX_COMPANION_BYTES:
            raise ImportRefused(
                RefusalReason.UNKNOWN_FORMAT,
                f"{path} has {status.st_size} bytes; such a file has at most "
                f"{_MAX_COMPANION_BYTES}",
            )
    return source / weights, companions


def _refuse_symlink(path: Path, mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise ImportRefused(
            RefusalReason.SYMLINK, f"{path} is a symbolic link; give the file it points to"
        )


def _check_destination(folder: Path) -> None:
    if not folder.name or not folder.parent.is_dir():
        raise ImportRefused(
            RefusalReason.CANNOT_WRITE,
            f"cannot write {folder}: create the folder it is to lie in first",
        )
    try:
        mode = folder.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        _refuse_write(folder, error)
    _refuse_symlink(folder, mode)
    if not stat.S_ISDIR(mode) or any(folder.iterdir()):
        raise ImportRefused(
            RefusalReason.DESTINATION_IN_USE,
            f"{folder} exists and is not an empty folder; choose another or empty it",
        )


def _ties_embeddings(config: Path) -> bool:
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ImportRefused(RefusalReason.CORRUPT, f"{config} is not JSON") from error
    if not isinstance(content, dict):
        raise ImportRefused(RefusalReason.CORRUPT, f"{config} is not a JSON object")
    return content.get("tie_word_embeddings", True) is not False


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_written(weights: Path) -> int:
    """Bytes of all tensors in `weights`, which the reader wrote and is not simply believed."""
    from safetensors import SafetensorError, safe_open

    try:
        if not stat.S_ISREG(weights.lstat().st_mode):
            raise ImportRefused(RefusalReason.READER_DIED, "the reader left no regular file")
        with safe_open(weights, framework="numpy") as opened:
            if not opened.keys():
                raise ImportRefused(RefusalReason.NO_STATE_DICT, "the checkpoint has no tensors")
        with weights.open("rb") as file:
            header_bytes = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
    except (SafetensorError, OSError) as error:
        raise ImportRefused(
            RefusalReason.READER_DIED, "the reader did not leave a complete safetensors file"
        ) from error
    return weights.stat().st_size - _HEADER_LENGTH_BYTES - header_bytes


# --- the two sides of the pipe ---------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReaderOrder:
    source: str
    target: str
    drop_aliases: bool
    time_limit_s: int
    memory_limit_bytes: int
    output_limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReaderAnswer:
    source_format: str
    tensor_count: int
    found_under: str
    left_out: tuple[str, ...]
    aliases: dict[str, str]


def _run_reader(order: _ReaderOrder, time_limit_s: float) -> _ReaderAnswer:
    # Nothing of our environment reaches the reader (it could switch weights_only off), except
    # what the dynamic loader needs to find torch's libraries.
    environment = {
        name: os.environ[name]
        for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        if name in os.environ
    }
    # One thread: stacks and allocator arenas of idle ones would count against the memory limit.
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    fields = {name: getattr(order, name) for name in order.__slots__}
    try:
        finished = subprocess.run(
            [sys.executable, "-I", "-B", "-W", "ignore", str(Path(__file__).absolute())],
            input=json.dumps(fields).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=Path(order.target).parent,
            timeout=time_limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ImportRefused(
            RefusalReason.TIME_LIMIT, f"reading the checkpoint took over {time_limit_s:g} s"
        ) from error
    last_line = finished.stdout.rpartition(b"\n{")[2]
    try:
        answer = json.loads(b"{" + last_line.removeprefix(b"{"))
    except ValueError:
        _refuse_dead_reader(finished.returncode)
    if "reason" in answer:
        raise ImportRefused(RefusalReason(answer["reason"]), str(answer["text"]))
    return _ReaderAnswer(
        source_format=str(answer["source_format"]),
        tensor_count=int(answer["tensor_count"]),
        found_under=str(answer["found_under"]),
        left_out=tuple(str(name) for name in answer["left_out"]),
        aliases={str(name): str(kept) for name, kept in answer["aliases"].items()},
    )


def _refuse_dead_reader(return_code: int) -> NoReturn:
    import signal

    if return_code == -signal.SIGXCPU:
        raise ImportRefused(
            RefusalReason.TIME_LIMIT, "reading the checkpoint used up its processor time"
        )
    raise ImportRefused(
        RefusalReason.READER_DIED,
        f"the process reading the checkpoint ended with code {return_code} and no answer; "
        "the file is damaged, or made to do harm",
    )


# --- the reader: everything below runs in the child only --------------------------------------


def _reader_main() -> None:
    order = _ReaderOrder(**json.load(sys.stdin))
    answer: dict[str, object]
    try:
        result = _read_and_write(order)
        answer = {name: getattr(result, name) for name in result.__slots__}
    except ImportRefused as refusal:
        answer = {"reason": refusal.reason, "text": refusal.text}
    except MemoryError:
        answer = {
            "reason": RefusalReason.MEMORY_LIMIT,
            "text": "reading the checkpoint needs more memory than the import allows",
        }
    except OSError as error:
        answer = {
            "reason": RefusalReason.CANNOT_WRITE,
            "text": f"copying the weights failed: {error.strerror or type(error).__name__}",
        }
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def _read_and_write(order: _ReaderOrder) -> _ReaderAnswer:
    _limit_process(order)
    # O_NOFOLLOW: the check for symlinks was made by path and the file may have changed since.
    with os.fdopen(os.open(order.source, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        source_format = _detect_format(file)
        file.seek(0)
        if source_format is SourceFormat.SAFETENSORS:
            return _copy_safetensors(file, order.target)
        # Only now: what is refused by its look alone is refused without the cost of this import.
        import torch

        torch.set_num_threads(1)
        _limit_memory(order.memory_limit_bytes)
        file_bytes = os.fstat(file.fileno()).st_size
        tensors, found_under, left_out = _find_state_dict(_unpickle(file))
        aliases = _check_tensors(tensors, file_bytes)
        if order.drop_aliases:
            tensors = {name: value for name, value in tensors.items() if name not in aliases}
        _write_safetensors(tensors, order.target, aliases if order.drop_aliases else {})
    return _ReaderAnswer(
        source_format=source_format.value,
        tensor_count=len(tensors),
        found_under=found_under,
        left_out=left_out,
        aliases=aliases,
    )


def _limit_process(order: _ReaderOrder) -> None:
    import resource

    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_CPU, order.time_limit_s)
    _set_limit(resource.RLIMIT_FSIZE, order.output_limit_bytes)


def _limit_memory(limit_bytes: int) -> None:
    """Bound private memory, counted from now: torch's own import is paid."""
    import resource

    # Not RLIMIT_AS: torch's libraries alone map gigabytes, mostly untouched.
    _set_limit(resource.RLIMIT_DATA, _private_memory_bytes() + limit_bytes)


def _set_limit(kind: int, wanted: int) -> None:
    import resource

    hard = resource.getrlimit(kind)[1]
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (limit, limit))


def _private_memory_bytes() -> int:
    """Bytes of private writable memory mapped so far (VmData; 0 where there is no /proc)."""
    try:
        with Path("/proc/self/status").open(encoding="ascii") as status:
            lines = dict(line.split(":", 1) for line in status)
        return int(lines["VmData"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0


def _detect_format(file: BinaryIO) -> SourceFormat:
    start = file.read(_HEADER_LENGTH_BYTES + 1)
    if start.startswith(b"PK\x03\x04"):
        file.seek(0)
        _check_archive(file)
        return SourceFormat.TORCH_ZIP
    if len(start) > _HEADER_LENGTH_BYTES and start[_HEADER_LENGTH_BYTES:] == b"{":
        return SourceFormat.SAFETENSORS
    # A pickle of protocol 2 or later begins with PROTO and its number; torch has never written
    # an older one.
    if len(start) >= 2 and start[0] == 0x80 and 2 <= start[1] <= 5:
        return SourceFormat.TORCH_LEGACY
    raise ImportRefused(
        RefusalReason.UNKNOWN_FORMAT,
        "the file is neither a torch checkpoint nor safetensors",
    )


def _check_archive(file: BinaryIO) -> None:
    """Refuse a zip that torch.save did not write, before torch's reader sees it."""
    file_bytes = os.fstat(file.fileno()).st_size
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise ImportRefused(
            RefusalReason.CORRUPT, "the archive is truncated or damaged; copy it again"
        ) from error
    if len(records) > _MAX_RECORDS:
        raise ImportRefused(
            RefusalReason.SUSPICIOUS_ARCHIVE, f"the archive has {len(records)} records"
        )
    inner_names = {record.filename.partition("/")[2] for record in records}
    if "constants.pkl" in inner_names or any(name.startswith("code/") for name in inner_names):
        raise ImportRefused(
            RefusalReason.TORCHSCRIPT,
            "the file is a TorchScript archive, which holds a program; save the module's "
            "state_dict() instead",
        )
    stored_bytes = 0
    for record in records:
        # torch.save stores its records as they are; a compressed one is how a small file
        # becomes a large one, and so are records that overlap.
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise ImportRefused(
                RefusalReason.SUSPICIOUS_ARCHIVE,
                "the archive has compressed records, which torch.save never writes",
            )
        stored_bytes += record.file_size
    if stored_bytes > file_bytes:
        raise ImportRefused(
            RefusalReason.SUSPICIOUS_ARCHIVE,
            "the records of the archive overlap: they hold more bytes than the file",
        )
    if "data.pkl" not in inner_names:
        raise ImportRefused(
            RefusalReason.UNKNOWN_FORMAT, "the file is a zip archive, but not a torch checkpoint"
        )


def _unpickle(file: BinaryIO) -> object:
    import pickle

    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is not None:
            raise ImportRefused(
                RefusalReason.NEEDS_CODE,
                f"the pickle asks for {wanted[1][:_MAX_DETAIL_CHARS]}, which is code and not a "
                "tensor; save the module's state_dict() instead",
            ) from error
        if "Unsupported" in str(error) or "Can only" in str(error):
            raise ImportRefused(
                RefusalReason.NEEDS_CODE,
                "the pickle does something other than build tensors and plain containers; save "
                "the module's state_dict() instead",
            ) from error
        raise ImportRefused(
            RefusalReason.CORRUPT, "the pickle is truncated or damaged; copy it again"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # Damaged input reaches every corner of the unpickler, and each raises its own kind.
        if "can't allocate memory" in str(error):
            raise MemoryError from error
        raise ImportRefused(
            RefusalReason.CORRUPT,
            f"the checkpoint is truncated or damaged ({type(error).__name__}); copy it again",
        ) from error


def _find_state_dict(
    payload: object,
) -> tuple[dict[str, torch.Tensor], str, tuple[str, ...]]:
    """The state dict inside `payload`, the path to it and the names of what is beside it."""
    path: list[str] = []
    left_out: list[str] = []
    while True:
        if not isinstance(payload, dict) or not payload:
            kind = "an empty dict" if isinstance(payload, dict) else type(payload).__name__
            raise ImportRefused(
                RefusalReason.NO_STATE_DICT,
                f"expected a dict of tensors{_under(path)}, found {kind}",
            )
        content = cast(dict[object, object], payload)
        if _is_state_dict(content):
            return cast("dict[str, torch.Tensor]", dict(content)), ".".join(path), tuple(left_out)
        inner = next((n for n in _STATE_DICT_NAMES if isinstance(content.get(n), dict)), None)
        if inner is None or len(path) == _MAX_NESTING:
            culprit = next(
                name
                for name, value in content.items()
                if not (isinstance(name, str) and _is_tensor(value))
            )
            raise ImportRefused(
                RefusalReason.NO_STATE_DICT,
                f"expected a dict of names and tensors{_under(path)}, but {_shown(culprit)} "
                f"({type(culprit).__name__}) is {type(content[culprit]).__name__}; put the "
                f"state dict under one of "
                f"{', '.join(_STATE_DICT_NAMES)} or save it alone",
            )
        left_out += [".".join([*path, _shown(name)]) for name in content if name != inner]
        path.append(inner)
        payload = content[inner]


def _under(path: list[str]) -> str:
    return f" under {'.'.join(path)}" if path else ""


def _shown(name: object) -> str:
    return str(name)[:_MAX_DETAIL_CHARS] if isinstance(name, str | int) else type(name).__name__


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _is_state_dict(content: dict[object, object]) -> bool:
    return all(isinstance(name, str) and _is_tensor(value) for name, value in content.items())


def _check_tensors(tensors: dict[str, torch.Tensor], file_bytes: int) -> dict[str, str]:
    """Aliases among `tensors` (further name -> first name), once each of them is plain data."""
    import torch

    aliases: dict[str, str] = {}
    first_names: dict[tuple[object, ...], str] = {}
    total_bytes = 0
    for name, value in tensors.items():
        shown = _shown(name)
        if name == "__metadata__" or not name:
            raise ImportRefused(
                RefusalReason.UNSUPPORTED_TENSOR, f"{shown!r} cannot be the name of a tensor"
            )
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise ImportRefused(
                RefusalReason.UNSUPPORTED_TENSOR,
                f"{shown} is a {type(value).__name__}, not a plain tensor",
            )
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise ImportRefused(
                RefusalReason.UNSUPPORTED_TENSOR,
                f"{shown} is sparse, quantized or without data; store it dense",
            )
        value_bytes = value.numel() * value.element_size()
        if value_bytes > value.untyped_storage().nbytes():
            # A stride of zero makes a gigabyte out of four bytes.
            raise ImportRefused(
                RefusalReason.SUSPICIOUS_ARCHIVE,
                f"{shown} claims {value_bytes} bytes and stores {value.untyped_storage().nbytes()}",
            )
        if value_bytes:
            first = first_names.setdefault(
                (
                    value.untyped_storage().data_ptr(),
                    value.storage_offset(),
                    value.dtype,
                    value.shape,
                    value.stride(),
                ),
                name,
            )
            if first != name:
                aliases[name] = first
        total_bytes += value_bytes
    # One tied pair doubles a small model at most; views that overlap again and again do more.
    if total_bytes > 2 * file_bytes:
        raise ImportRefused(
            RefusalReason.SUSPICIOUS_ARCHIVE,
            f"the tensors are views of one another and claim {total_bytes} bytes in a file of "
            f"{file_bytes}",
        )
    return aliases


def _write_safetensors(
    tensors: dict[str, torch.Tensor], target: str, dropped: dict[str, str]
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, value in tensors.items():
        tensor = value.detach().resolve_conj().resolve_neg().contiguous()
        storage = tensor.untyped_storage()
        # safetensors wants every tensor to own its bytes: copy those that share or only view.
        if storage.data_ptr() in taken or storage.nbytes() != tensor.numel() * tensor.itemsize:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    try:
        save_file(plain, target, metadata={"format": "pt", **dropped})
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ImportRefused(
            RefusalReason.UNSUPPORTED_TENSOR,
            f"safetensors cannot hold these tensors: {str(error)[:_MAX_DETAIL_CHARS]}",
        ) from error


def _copy_safetensors(file: BinaryIO, target: str) -> _ReaderAnswer:
    from safetensors import SafetensorError, safe_open

    header_bytes = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
    if header_bytes > min(_MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size):
        raise ImportRefused(RefusalReason.CORRUPT, "the safetensors header is longer than the file")
    file.seek(0)
    with Path(target).open("xb") as copy:
        shutil.copyfileobj(file, copy, 16 << 20)
    try:
        with safe_open(target, framework="numpy") as opened:
            tensor_count = len(opened.keys())
    except SafetensorError as error:
        raise ImportRefused(
            RefusalReason.CORRUPT,
            f"the safetensors file is damaged: {str(error)[:_MAX_DETAIL_CHARS]}",
        ) from error
    return _ReaderAnswer(
        source_format=SourceFormat.SAFETENSORS.value,
        tensor_count=tensor_count,
        found_under="",
        left_out=(),
        aliases={},
    )


if __name__ == "__main__":
    _reader_main()
