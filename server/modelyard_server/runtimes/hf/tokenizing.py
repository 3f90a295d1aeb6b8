"""Texts to batches of token ids, by the tokenizer.json of the model's folder.

The tokenizers library reads that file and runs nothing from it. Classes that wrap it are not used:
they are chosen by names in further files and bring nothing that inference needs.

Reading it takes longer than everything else of a load. So what was read is kept for a while, by its
content, and models with the same tokenizer use one. It is never changed: how much of a text is kept
would be a state of it, so texts are cut here.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tokenizers
import torch

from modelyard_server.runtimes.api import JsonValue, ModelFilesError
from modelyard_server.runtimes.tensors import TensorError
from modelyard_server.weights.model_files import FolderLike, parse_json, read_model_file
from modelyard_server.weights.store.recent import Recent

__all__ = ["TextTokenizer", "TokenBatch", "TokenizerCache", "TokenizerFiles"]

_TOKENIZER_FILE = "tokenizer.json"
_MAX_TOKENIZER_BYTES = 128 << 20
_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_MAX_CONFIG_BYTES = 8 << 20
_FILES = {
    _TOKENIZER_FILE: _MAX_TOKENIZER_BYTES,
    _TOKENIZER_CONFIG_FILE: _MAX_CONFIG_BYTES,
    _SPECIAL_TOKENS_FILE: _MAX_CONFIG_BYTES,
}
_MAX_KEPT_BYTES = 64 << 20
"""Of files whose tokenizers are kept. What was read from them takes some times as much."""

_MAX_REMEMBERED = 4_096
_CHARS_A_TOKEN = 8
"""A text with more characters for each token that is kept is taken for too long."""

_USUAL_MASKS = ("[MASK]", "<mask>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Token ids of some texts, padded to the longest.

    Attributes:
        ids: INT64 [n, tokens].
        mask: INT64 [n, tokens], 1 for tokens and 0 for padding.
        types: INT64 [n, tokens], which of the two parts of an input a token is from.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    types: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """What a folder's files say of its tokenizer. Thread-safe: nobody changes it.

    Attributes:
        tokenizer: neither pads nor truncates.
        token_count: number of its tokens.
        max_length: most tokens of a text, if the files say so.
        pad_id: the padding token, if they name one.
        mask_token: the token that stands for a gap, if it has one.
        mask_id: its id.
        added_count: special tokens that a text gets.
        size_bytes: of the files.
    """

    tokenizer: tokenizers.Tokenizer
    token_count: int
    max_length: int | None
    pad_id: int | None
    mask_token: str | None
    mask_id: int | None
    added_count: int
    size_bytes: int


class TextTokenizer:
    """The tokenizer of one model. Not thread-safe: `limit` is a state of its own.

    Args:
        files: what the folder says; may be those of several models.
        pad_id: the padding token of the model's configuration, if it names one.
        id_limit: number of the model's embeddings.

    Attributes:
        max_length: most tokens of a text, if its files say so.
        pad_id: what short texts are filled up with; masked, so any id will do.
        mask_token: the token that stands for a gap, if it has one.
        mask_id: its id.

    Raises:
        ModelFilesError: it has more tokens than the model.
    """

    def __init__(self, files: TokenizerFiles, *, pad_id: int | None, id_limit: int) -> None:
        if files.token_count > id_limit:
            raise ModelFilesError(
                f"{_TOKENIZER_FILE} has {files.token_count} tokens, the model only {id_limit} "
                "embeddings"
            )
        self._tokenizer = files.tokenizer
        self._added_count = files.added_count
        self._id_limit = id_limit
        self._limit: int | None = None
        self._keep_end = False
        self.max_length = files.max_length
        pad_id = files.pad_id if pad_id is None else pad_id
        self.pad_id = pad_id if pad_id is not None and pad_id >= 0 else 0
        self.mask_id = files.mask_id
        self.mask_token = files.mask_token

    def limit(self, max_length: int, *, keep_end: bool = False) -> None:
        """Sets how many tokens of a text are kept, special ones included, and from which end."""
        self._limit = max_length
        self._keep_end = keep_end

    def encode(self, name: str, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Returns the tokens of each text.

        Args:
            name: name of the tensor that held the texts.
            texts: any texts.

        Raises:
            TensorError: a text has no tokens.
        """
        encodings = self._encode(texts)
        for index, encoding in enumerate(encodings):
            if not len(encoding):
                raise TensorError(name, f"text {index} has no tokens for this model")
        return encodings

    def encode_whole(self, name: str, text: str, *, most: int) -> tuple[tokenizers.Encoding, bool]:
        """Returns all tokens of a text, whatever `limit` says, special ones included.

        Args:
            name: name of the tensor that held the text.
            text: any text.
            most: tokens that are of interest: of a text that surely has more only a part is looked
                at.

        Returns:
            The tokens; and whether they are all of them. If not, they are more than `most`.

        Raises:
            TensorError: the text has no tokens.
        """
        # Looked at in steps: nobody knows how many characters a token of this text may have, and
        # what takes longest is a text that is far too long.
        length = _CHARS_A_TOKEN * (most + 1)
        while len(text) > length:
            encoding = self._tokenizer.encode(text[:length])
            if len(encoding) > 2 * most:
                return encoding, False
            length *= 8
        encoding = self._tokenizer.encode(text)
        if not len(encoding):
            raise TensorError(name, "has no tokens for this model")
        return encoding, True

    def _encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        limit = self._limit
        if limit is None:
            return self._tokenizer.encode_batch(list(texts))
        # Of a text that is surely too long the work is done once; of others it nearly always is.
        likely = [text for text in texts if len(text) <= _CHARS_A_TOKEN * limit]
        fitting = iter(self._tokenizer.encode_batch(likely) if likely else ())
        encodings: list[tokenizers.Encoding | None] = []
        for text in texts:
            encoding = next(fitting) if len(text) <= _CHARS_A_TOKEN * limit else None
            fits = encoding is not None and len(encoding) <= limit
            encodings.append(encoding if fits else None)
        long = [text for text, found in zip(texts, encodings, strict=True) if found is None]
        cut = iter(self._cut(long, max(0, limit - self._added_count)) if long else ())
        return [next(cut) if encoding is None else encoding for encoding in encodings]

    def _cut(self, texts: list[str], room: int) -> list[tokenizers.Encoding]:
        """Tokens of texts, at most so many of each without the special ones."""
        encodings = []
        for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False):
            if len(encoding) > room:
                encoding.truncate(room, direction="left" if self._keep_end else "right")
            encodings.append(self._tokenizer.post_process(encoding))
        return encodings

    def batch(
        self, encodings: Sequence[tokenizers.Encoding], *, device: str, pad_left: bool = False
    ) -> TokenBatch:
        """Pads encoded texts to the longest of them.

        Raises:
            ValueError: a token id is beyond the model's embeddings.
        """
        width = max(len(encoding) for encoding in encodings)
        ids, mask, types = [], [], []
        for encoding in encodings:
            fill = width - len(encoding)
            left, right = (fill, 0) if pad_left else (0, fill)
            ids.append([self.pad_id] * left + encoding.ids + [self.pad_id] * right)
            mask.append([0] * left + encoding.attention_mask + [0] * right)
            types.append([0] * left + encoding.type_ids + [0] * right)
        id_tensor = torch.tensor(ids, dtype=torch.int64)
        if int(id_tensor.max()) >= self._id_limit:
            # On a GPU it would take the whole process's context down.
            raise ValueError(f"the tokenizer made an id beyond the model's {self._id_limit}")
        return TokenBatch(
            ids=id_tensor.to(device),
            mask=torch.tensor(mask, dtype=torch.int64, device=device),
            types=torch.tensor(types, dtype=torch.int64, device=device),
        )

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of some tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)


class TokenizerCache:
    """Reads tokenizers, and keeps those that were read lately. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: OrderedDict[bytes, TokenizerFiles] = OrderedDict()
        self._contents: Recent[str, bytes] = Recent(_MAX_REMEMBERED)

    def get(self, folder: FolderLike, *, digest: str) -> TokenizerFiles:
        """Returns what a folder's files say of its tokenizer.

        Args:
            folder: the model's folder.
            digest: stands for the content of the folder for ever; "" if nothing does.

        Raises:
            ModelFilesError: there is none, or it cannot be used.
        """
        content = self._contents.get(digest) if digest else None
        found = None if content is None else self._find(content)
        if found is not None:
            return found
        files = {
            name: read_model_file(folder, name, max_bytes=max_bytes)
            for name, max_bytes in _FILES.items()
        }
        content = hashlib.sha256(
            b"".join(hashlib.sha256(value or b"").digest() for value in files.values())
        ).digest()
        if digest:
            self._contents.put(digest, content)
        found = self._find(content)
        if found is None:
            found = _read_files(files)
            self._keep(content, found)
        return found

    def _find(self, content: bytes) -> TokenizerFiles | None:
        with self._lock:
            found = self._read.get(content)
            if found is not None:
                self._read.move_to_end(content)
            return found

    def _keep(self, content: bytes, files: TokenizerFiles) -> None:
        with self._lock:
            self._read[content] = files
            while sum(kept.size_bytes for kept in self._read.values()) > _MAX_KEPT_BYTES:
                self._read.popitem(last=False)


def _read_files(files: Mapping[str, bytes | None]) -> TokenizerFiles:
    content = files[_TOKENIZER_FILE]
    if content is None:
        raise ModelFilesError(
            f"{_TOKENIZER_FILE} is missing; save the tokenizer with save_pretrained"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # The library is native; a panic of its parser derives from BaseException.
        raise ModelFilesError(
            f"{_TOKENIZER_FILE} is no tokenizer ({type(error).__name__})"
        ) from None
    # The file may come with habits of the program that saved it, such as padding to 128.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    settings = _read_object(files, _TOKENIZER_CONFIG_FILE)
    specials = _read_object(files, _SPECIAL_TOKENS_FILE)
    pad_token = _token(settings, "pad_token") or _token(specials, "pad_token")
    mask_token = _token(settings, "mask_token") or _token(specials, "mask_token")
    if mask_token is None:
        mask_token = next(
            (token for token in _USUAL_MASKS if tokenizer.token_to_id(token) is not None), None
        )
    mask_id = None if mask_token is None else tokenizer.token_to_id(mask_token)
    max_length = settings.get("model_max_length")
    return TokenizerFiles(
        tokenizer=tokenizer,
        token_count=tokenizer.get_vocab_size(with_added_tokens=True),
        # An absurdly large number is the library's way of saying "unlimited".
        max_length=max_length if isinstance(max_length, int) and 0 < max_length < 2**31 else None,
        pad_id=None if pad_token is None else tokenizer.token_to_id(pad_token),
        mask_token=mask_token if mask_id is not None else None,
        mask_id=mask_id,
        added_count=tokenizer.num_special_tokens_to_add(False),
        size_bytes=sum(len(value or b"") for value in files.values()),
    )


def _read_object(files: Mapping[str, bytes | None], name: str) -> dict[str, JsonValue]:
    content = files[name]
    if content is None:
        return {}
    value = parse_json(name, content)
    if not isinstance(value, dict):
        raise ModelFilesError(f"{name} is not a JSON object")
    return value


def _token(settings: dict[str, JsonValue], name: str) -> str | None:
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None
