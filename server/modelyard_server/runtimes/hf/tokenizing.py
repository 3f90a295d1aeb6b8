"""Texts to batches of token ids, by the tokenizer.json of the model's folder.

The tokenizers library reads that file and runs nothing from it. Classes that wrap it are not used:
they are chosen by names in further files and bring nothing that inference needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers
import torch

from modelyard_server.runtimes.api import JsonValue, ModelFilesError
from modelyard_server.runtimes.tensors import TensorError
from modelyard_server.weights.model_config import read_json_object
from modelyard_server.weights.model_files import FolderLike, read_model_file

__all__ = ["TextTokenizer", "TokenBatch", "read_tokenizer"]

_TOKENIZER_FILE = "tokenizer.json"
_MAX_TOKENIZER_BYTES = 128 << 20
_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_MAX_CONFIG_BYTES = 8 << 20
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


class TextTokenizer:
    """The tokenizer of one model. Not thread-safe: `limit` is a state of its own.

    Attributes:
        max_length: most tokens of a text, if its files say so.
        pad_id: what short texts are filled up with; masked, so any id will do.
        mask_token: the token that stands for a gap, if it has one.
        mask_id: its id.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        max_length: int | None,
        pad_id: int,
        mask_token: str | None,
        id_limit: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._id_limit = id_limit
        self.max_length = max_length
        self.pad_id = pad_id
        self.mask_id = None if mask_token is None else tokenizer.token_to_id(mask_token)
        self.mask_token = mask_token if self.mask_id is not None else None

    def limit(self, max_length: int, *, keep_end: bool = False) -> None:
        """Sets how many tokens of a text are kept, special ones included, and from which end."""
        self._tokenizer.enable_truncation(max_length, direction="left" if keep_end else "right")

    def encode(self, name: str, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Returns the tokens of each text.

        Args:
            name: name of the tensor that held the texts.
            texts: any texts.

        Raises:
            TensorError: a text has no tokens.
        """
        encodings = self._tokenizer.encode_batch(list(texts))
        for index, encoding in enumerate(encodings):
            if not len(encoding):
                raise TensorError(name, f"text {index} has no tokens for this model")
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


def read_tokenizer(folder: FolderLike, *, pad_id: int | None, id_limit: int) -> TextTokenizer:
    """Reads a folder's tokenizer.json, and what its neighbours say of lengths and special tokens.

    Args:
        folder: the model's folder.
        pad_id: the padding token of the model's configuration, if it names one.
        id_limit: number of the model's embeddings.

    Raises:
        ModelFilesError: there is none, it cannot be used, or it has more tokens than the model.
    """
    content = read_model_file(folder, _TOKENIZER_FILE, max_bytes=_MAX_TOKENIZER_BYTES)
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
    count = tokenizer.get_vocab_size(with_added_tokens=True)
    if count > id_limit:
        raise ModelFilesError(
            f"{_TOKENIZER_FILE} has {count} tokens, the model only {id_limit} embeddings"
        )
    settings = read_json_object(folder, _TOKENIZER_CONFIG_FILE, max_bytes=_MAX_CONFIG_BYTES)
    specials = read_json_object(folder, _SPECIAL_TOKENS_FILE, max_bytes=_MAX_CONFIG_BYTES)
    pad_token = _token(settings, "pad_token") or _token(specials, "pad_token")
    if pad_token is not None:
        pad_id = tokenizer.token_to_id(pad_token) if pad_id is None else pad_id
    mask_token = _token(settings, "mask_token") or _token(specials, "mask_token")
    if mask_token is None:
        mask_token = next(
            (token for token in _USUAL_MASKS if tokenizer.token_to_id(token) is not None), None
        )
    max_length = settings.get("model_max_length")
    return TextTokenizer(
        tokenizer,
        # An absurdly large number is the library's way of saying "unlimited".
        max_length=max_length if isinstance(max_length, int) and 0 < max_length < 2**31 else None,
        pad_id=pad_id if pad_id is not None and pad_id >= 0 else 0,
        mask_token=mask_token,
        id_limit=id_limit,
    )


def _token(settings: dict[str, JsonValue], name: str) -> str | None:
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None
