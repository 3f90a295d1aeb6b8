"""From tokens to text that can be told: whole characters, stop texts, and why a text ends."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from modelyard_server.runtimes.detokenizing import Detokenizer
from modelyard_server.runtimes.sessions import Finish
from modelyard_server.runtimes.stop_texts import StopTexts
from modelyard_server.runtimes.written_text import WrittenText

UNKNOWN = "\ufffd"


def bytes_tokenizer() -> Tokenizer:
    """A token for each byte, as byte-level models have them for what they have no other for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def fallback_tokenizer() -> Tokenizer:
    """Words that begin with their space, and tokens of bytes for all else."""
    words = ["\u2581the", "\u2581cat", "s", "\u2581"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {word: 256 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode)
    return [*(detokenizer.push(token) for token in ids), detokenizer.end()]


class TestDetokenizer:
    def test_characters_of_several_tokens_are_told_when_they_are_whole(self) -> None:
        tokenizer = bytes_tokenizer()
        text = "h\u00e9llo \U0001f389, w\u00f6rld\u2026"
        ids = tokenizer.encode(text).ids
        assert len(ids) == len(text.encode())
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == text
        assert not any(UNKNOWN in piece for piece in pieces)
        # Nothing is kept longer than its character needs.
        assert pieces[:3] == ["h", "", "\u00e9"]

    def test_bytes_that_are_no_character_are_told_as_the_decoder_has_them(self) -> None:
        tokenizer = bytes_tokenizer()
        ids = tokenizer.encode("\u00e9").ids
        broken = [ids[0], *tokenizer.encode("ab").ids, ids[0]]
        assert pieces_of(tokenizer, broken) == ["", f"{UNKNOWN}a", "b", "", UNKNOWN]

    def test_bytes_that_never_become_a_character_are_not_kept_for_ever(self) -> None:
        tokenizer = bytes_tokenizer()
        (half, _) = tokenizer.encode("\u00e9").ids
        pieces = pieces_of(tokenizer, [half] * 10)
        assert pieces[:4] == ["", "", "", UNKNOWN]
        assert "".join(pieces) == UNKNOWN * 10

    def test_spaces_between_words_are_kept(self) -> None:
        tokenizer = fallback_tokenizer()
        the, cat, s, space = range(256, 260)
        ids = [the, cat, s, space, *"\u00e9".encode(), the]
        assert tokenizer.decode(ids) == "the cats \u00e9 the"
        assert "".join(pieces_of(tokenizer, ids)) == "the cats \u00e9 the"

    def test_all_that_was_told_is_the_text_of_all_tokens(self) -> None:
        tokenizer = bytes_tokenizer()
        generator = random.Random(5)
        for _ in range(200):
            count = generator.randrange(1, 30)
            ids = [generator.randrange(tokenizer.get_vocab_size()) for _ in range(count)]
            assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids), ids

    def test_words_and_characters_of_bytes_follow_each_other_in_any_way(self) -> None:
        tokenizer = fallback_tokenizer()
        generator = random.Random(6)
        # What is no character is left out: of one such byte this decoder makes unknown characters
        # of all bytes beside it, also of those that were told.
        tokens = [
            [256],
            [257],
            [258],
            [259],
            *(list(c.encode()) for c in "x\u00e9\u2026\U0001f389"),
        ]
        for _ in range(200):
            chosen = generator.choices(tokens, k=generator.randrange(1, 20))
            ids = [token for group in chosen for token in group]
            assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids), ids


def first_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The definition: the text before the stop that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


class TestStopTexts:
    def test_what_may_be_the_beginning_of_one_is_kept(self) -> None:
        stops = StopTexts(["END"])
        assert [stops.push(piece) for piece in ("abc", "E", "N", "x", "EN")] == [
            *("abc", "", "", "ENx", "")
        ]
        assert not stops.found
        assert stops.end() == "EN"

    def test_nothing_of_it_and_behind_it_is_told(self) -> None:
        stops = StopTexts(["END"])
        assert stops.push("abcENDx") == "abc"
        assert stops.found
        assert stops.push("y") == stops.end() == ""

    def test_the_one_that_is_complete_first_counts(self) -> None:
        stops = StopTexts(["abcd", "bc"])
        assert stops.push("abcd") == "a"

    def test_without_any_all_passes_at_once(self) -> None:
        stops = StopTexts([])
        assert stops.push("abc") == "abc"
        assert stops.end() == ""

    def test_an_empty_one_is_refused(self) -> None:
        with pytest.raises(ValueError, match="empty"):
            StopTexts(["a", ""])

    def test_it_does_not_matter_what_pieces_the_text_comes_in(self) -> None:
        generator = random.Random(7)

        def some(most: int) -> str:
            return "".join(generator.choice("ab") for _ in range(generator.randrange(1, most)))

        found = 0
        for _ in range(2_000):
            stops = [some(5) for _ in range(generator.randrange(1, 4))]
            pieces = [some(4) for _ in range(generator.randrange(1, 6))]
            expected, is_found = first_stop("".join(pieces), stops)
            matcher = StopTexts(stops)
            told = ""
            for piece in pieces:
                told += matcher.push(piece)
                assert expected.startswith(told), (stops, pieces)
            assert told + matcher.end() == expected, (stops, pieces)
            assert matcher.found == is_found
            found += is_found
        assert 200 < found < 2_000


def written(
    most: int = 10, stops: Sequence[str] = (), end_ids: Sequence[int] = (0,)
) -> WrittenText:
    """Tokens are letters: 1 is "a"; 0 says that the text is at its end."""
    return WrittenText(
        lambda ids: "".join(chr(96 + token) for token in ids if token),
        prompt_token_count=3,
        most=most,
        end_ids=end_ids,
        stops=stops,
    )


def push(text: WrittenText, *tokens: int) -> None:
    for token in tokens:
        text.push(token)


class TestWrittenText:
    def test_an_end_token_ends_it_and_is_no_text(self) -> None:
        text = written()
        push(text, 1, 2, 0)
        answer = text.take()
        assert (answer.text, answer.token_ids, answer.finish) == ("ab", (1, 2, 0), Finish.END)
        assert (answer.token_count, answer.prompt_token_count) == (3, 3)

    def test_so_many_tokens_end_it(self) -> None:
        text = written(most=2)
        push(text, 1)
        assert not text.finish
        push(text, 2)
        assert (text.take().text, text.finish) == ("ab", Finish.LENGTH)

    def test_a_stop_text_ends_it_and_is_not_told(self) -> None:
        text = written(stops=["cd"])
        push(text, 1, 2, 3)
        assert text.take().text == "ab"
        push(text, 4)
        answer = text.take()
        assert (answer.text, answer.token_ids, answer.finish) == ("", (4,), Finish.STOP)

    @pytest.mark.parametrize(("last", "finish"), [(0, Finish.END), (1, Finish.LENGTH)])
    def test_what_was_kept_for_a_stop_text_is_told_at_the_end(
        self, last: int, finish: Finish
    ) -> None:
        text = written(most=3, stops=["bcd", "aax"])
        push(text, 2, 3, last)
        assert text.take().text == ("bc" if last == 0 else "bca")
        assert text.finish is finish

    def test_a_stop_text_that_the_last_token_completes_counts_as_one(self) -> None:
        text = written(most=2, stops=["ab"])
        push(text, 1, 2)
        assert text.finish is Finish.STOP

    def test_each_answer_has_what_is_new(self) -> None:
        text = written()
        push(text, 1, 2)
        assert text.untold_count == 2
        assert text.take().token_ids == (1, 2)
        assert text.untold_count == 0
        push(text, 3)
        answer = text.take()
        assert (answer.text, answer.token_ids, answer.token_count) == ("c", (3,), 3)
