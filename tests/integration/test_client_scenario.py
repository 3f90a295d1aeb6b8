"""The clients' scenario in Python against a real server; `make clients` has the others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
import pytest_asyncio
from tools.client_yard import ClientYard, yard
from tools.clients import LANGUAGES, STEPS, run

# Three models are loaded in workers of their own, which other processes may be in the way of.
pytestmark = pytest.mark.timeout(300)

PYTHON = next(language for language in LANGUAGES if language.id == "python")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ClientYard]:
    async with yard(tmp_path_factory.mktemp("clients")) as running:
        yield running


def with_branches(words: Mapping[str, str], folder: Path, *, last_is_wrong: bool) -> dict[str, str]:
    """Words with the last hundred affinities alone, the last of them as it is or not."""
    lines = Path(words["branches"]).read_text(encoding="utf-8").splitlines()[-100:]
    if last_is_wrong:
        affinity, branch = lines[-1].split("\t")
        lines[-1] = f"{affinity}\t{'green' if branch == 'blue' else 'blue'}"
    file = folder / "branches.tsv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {**words, "branches": str(file)}


def test_every_step_is_ok_and_nothing_is_left_behind(server: ClientYard, tmp_path: Path) -> None:
    words = with_branches(server.words, tmp_path, last_is_wrong=False)
    outcome = run(PYTHON, words, STEPS)
    assert outcome.problems == ()
    assert outcome.passed == outcome.asked == len(STEPS)


def test_what_is_expected_is_compared_with_what_is_answered(
    server: ClientYard, tmp_path: Path
) -> None:
    steps = ("create-models", "create-route", "load", "watch", "predict", "route", "delete")
    words = with_branches(server.words, tmp_path, last_is_wrong=True)
    words["labels"] = "LABEL_1,LABEL_1"
    outcome = run(PYTHON, words, steps)
    assert [problem.partition(":")[0] for problem in outcome.problems] == [
        "not ok predict",
        "not ok route",
    ]
    assert "branch of " in outcome.problems[1]
