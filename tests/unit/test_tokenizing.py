"""Texts are cut as the tokenizers library cuts them, by tokenizers that models have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny_models import WORDS, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from modelyard_server.runtimes.api import ModelFilesError
from modelyard_server.runtimes.hf import tokenizing
from modelyard_server.runtimes.hf.tokenizing import TextTokenizer, TokenizerCache

TEXTS = [
    "the cat",
    "a",
    "the cat sat on the mat " * 3,
    "unknown words éß 漢字 here",
    "the " * 200,
    "dog" * 400,
    "a b c d e f g h",
]


def byte_level(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


KINDS: dict[str, Any] = {
    "encoder": lambda folder: make_tokenizer(folder, for_encoder=True),
    "decoder": lambda folder: make_tokenizer(folder, for_encoder=False),
    "bytes": byte_level,
}


def tokens_of(encodings: Any) -> list[Any]:
    return [(found.ids, found.attention_mask, found.type_ids) for found in encodings]


@pytest.mark.parametrize("keep_end", [False, True])
@pytest.mark.parametrize("limit", [2, 3, 5, 8, 64, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_as_the_library_cuts_them(
    kind: str, limit: int, keep_end: bool, tmp_path: Path
) -> None:
    KINDS[kind](tmp_path)
    files = TokenizerCache().get(tmp_path, digest="")
    tokenizer = TextTokenizer(files, pad_id=None, id_limit=1_000)
    tokenizer.limit(limit, keep_end=keep_end)
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference.enable_truncation(limit, direction="left" if keep_end else "right")
    texts = [text for text in TEXTS if len(reference.encode(text))]
    assert tokens_of(tokenizer.encode("text", texts)) == tokens_of(reference.encode_batch(texts))


def test_of_a_text_that_has_no_room_beside_the_special_tokens_they_are_left(
    tmp_path: Path,
) -> None:
    make_tokenizer(tmp_path, for_encoder=True)
    tokenizer = TextTokenizer(
        TokenizerCache().get(tmp_path, digest=""), pad_id=None, id_limit=1_000
    )
    tokenizer.limit(1)
    assert [found.ids for found in tokenizer.encode("text", ["the cat", "a"])] == [[2, 3], [2, 3]]


def test_one_content_is_read_once_whatever_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
        make_tokenizer(folder, for_encoder=True)
    (folders[2] / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    cache = TokenizerCache()
    first = cache.get(folders[0], digest="a")
    assert cache.get(folders[1], digest="") is first
    other = cache.get(folders[2], digest="c")
    assert (first.max_length, other.max_length) == (64, 7)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(tokenizing, "read_model_file", refuse)
    assert cache.get(folders[0], digest="a") is first
    assert cache.get(folders[2], digest="c") is other


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tokenizer(tmp_path, for_encoder=True)
    monkeypatch.setattr(tokenizing, "_MAX_KEPT_BYTES", 10)
    cache = TokenizerCache()
    first = cache.get(tmp_path, digest="a")
    assert cache.get(tmp_path, digest="a") is not first
    assert not cache._read


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, for_encoder=True)
    cache = TokenizerCache()
    assert cache.get(tmp_path, digest="").token_count == len(WORDS) + 5
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelFilesError, match="missing"):
        cache.get(tmp_path, digest="")
