"""The text the demo ships: enough of it, labelled, and nothing twice."""

from __future__ import annotations

import re
from collections import Counter
from importlib import resources
from itertools import combinations

import pytest

from modelyard_server.demo.finetune import split_held_out
from modelyard_server.demo.text import (
    TASKS,
    data_digest,
    read_labelled,
    read_requests,
)

_LABELS = {
    "sentiment": {"negative": 160, "positive": 160},
    "language": {"de": 80, "en": 80, "es": 80, "fr": 80, "it": 80, "nl": 80},
    "topic": {"cooking": 70, "finance": 70, "health": 70, "sports": 70, "technology": 70},
}
_NEAR = 0.8
"""Share of common words from which two texts would count as the same one rephrased."""


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("task", TASKS)
def test_every_label_has_enough_text(task: str) -> None:
    counts = Counter(row.label for row in read_labelled(task))

    assert counts.keys() == _LABELS[task].keys()
    assert all(counts[label] >= least for label, least in _LABELS[task].items())


@pytest.mark.parametrize("task", TASKS)
def test_no_text_is_there_twice_or_nearly_so(task: str) -> None:
    texts = [(row.text, _words(row.text)) for row in read_labelled(task)]

    near = [
        (first, second)
        for (first, mine), (second, others) in combinations(texts, 2)
        if len(mine & others) >= _NEAR * len(mine | others)
    ]

    assert near == []


@pytest.mark.parametrize("task", TASKS)
def test_texts_are_trimmed_sentences(task: str) -> None:
    for row in read_labelled(task):
        assert row.text == row.text.strip()
        assert "\t" not in row.text
        assert len(row.text) >= 10


def test_files_say_where_their_text_is_from() -> None:
    for name in (*TASKS, "requests"):
        file = resources.files("modelyard_server.demo") / "data" / f"{name}.tsv"
        assert file.read_text(encoding="utf-8").startswith("# Written for modelyard")


def test_requests_are_new_to_every_model() -> None:
    requests = read_requests()
    training = {row.text for task in TASKS for row in read_labelled(task)}

    assert len(requests) >= 40
    assert len({row.text for row in requests}) == len(requests)
    assert not training & {row.text for row in requests}
    assert {row.label for row in requests} == {
        *TASKS,
        "embedding",
        "antibody",
        "reaction",
        "story",
    }


def test_the_split_keeps_a_share_of_every_label_out() -> None:
    rows = read_labelled("topic")

    train, held_out = split_held_out(rows, share=0.2, seed=0)

    assert sorted(row.text for row in train + held_out) == sorted(row.text for row in rows)
    counts = Counter(row.label for row in rows)
    for label, kept_out in Counter(row.label for row in held_out).items():
        assert kept_out == round(counts[label] * 0.2)
    assert split_held_out(rows, share=0.2, seed=0) == (train, held_out)
    assert split_held_out(rows, share=0.2, seed=1) != (train, held_out)


def test_the_digest_is_stable() -> None:
    assert data_digest() == data_digest()
    assert re.fullmatch(r"[0-9a-f]{64}", data_digest())
