"""Pages: every item once, whatever comes and goes in between."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.errors import Reason, Refusal
from modelyard_server.services.paging import page

NAMES = st.text(st.characters(codec="utf-8"), max_size=6)


def pages_of(names: list[str], size: int) -> list[list[str]]:
    found: list[list[str]] = []
    token = ""
    while True:
        items, token = page(names, size=size, token=token, name=lambda name: name)
        found.append(list(items))
        if not token:
            return found


@given(names=st.sets(NAMES, max_size=12).map(sorted), size=st.integers(1, 5))
def test_the_pages_together_are_the_list(names: list[str], size: int) -> None:
    pages = pages_of(names, size)
    assert [name for found in pages for name in found] == names
    assert all(len(found) == size for found in pages[:-1])
    assert len(pages[-1]) <= size
    assert len(pages) == max(1, -(-len(names) // size))


@given(
    names=st.sets(NAMES, min_size=2, max_size=12),
    size=st.integers(1, 4),
    gone=st.sets(NAMES, max_size=4),
    come=st.sets(NAMES, max_size=4),
    data=st.data(),
)
def test_items_that_come_and_go_neither_repeat_nor_hide_others(
    names: set[str], size: int, gone: set[str], come: set[str], data: st.DataObject
) -> None:
    gone |= set(data.draw(st.lists(st.sampled_from(sorted(names)), max_size=3)))
    first, token = page(sorted(names), size=size, token="", name=lambda name: name)
    after = sorted((names - gone) | come)
    rest: list[str] = []
    while token:
        items, token = page(after, size=size, token=token, name=lambda name: name)
        rest += items
    assert rest == sorted(set(rest))
    assert not set(rest) & set(first)
    if len(names) > size:
        assert set(rest) == {name for name in after if name > first[-1]}


@pytest.mark.parametrize(("size", "length"), [(0, 50), (1, 1), (1000, 1000), (2**31 - 1, 1000)])
def test_sizes(size: int, length: int) -> None:
    names = [f"{i:05}" for i in range(1500)]
    items, token = page(names, size=size, token="", name=lambda name: name)
    assert len(items) == length
    assert token


def test_the_last_full_page_has_no_token() -> None:
    items, token = page(["a", "b"], size=2, token="", name=lambda name: name)
    assert (list(items), token) == (["a", "b"], "")


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(Refusal) as caught:
        page(["a"], size=-1, token="", name=lambda name: name)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert [v.field for v in caught.value.violations] == ["page_size"]


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "!!!",
        "é",
        "after:a",
        base64.urlsafe_b64encode(b"before:a").decode(),
        base64.urlsafe_b64encode(b"\xff\xfe").decode(),
        "A" * 10_000,
        "\0",
        "====",
    ],
)
def test_a_token_that_is_none_is_refused(token: str) -> None:
    with pytest.raises(Refusal) as caught:
        page(["a"], size=1, token=token, name=lambda name: name)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert [v.field for v in caught.value.violations] == ["page_token"]


@given(token=st.text())
def test_no_token_is_a_defect(token: str) -> None:
    try:
        items, _ = page(["a", "b"], size=1, token=token, name=lambda name: name)
    except Refusal as refusal:
        assert refusal.reason is Reason.INVALID_FIELD
    else:
        assert list(items) in (["a"], ["b"], [])
