"""The example pipelines: those of Beam's page with other handlers, on real model folders."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.config_text import CPU, model_table
from tests.support.server import ROOT, running_app
from tests.support.tiny_models import make_tiny_bert, make_tiny_gpt2

pytest.importorskip("apache_beam")

from tests.support.beam_pipelines import own_temporary_folder

from modelyard.integrations.beam import _yard

Run = Callable[..., list[str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs an example and returns what it prints, sorted: Beam promises no order."""

    def run(name: str, *arguments: object) -> list[str]:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with own_temporary_folder():
            module.main([str(argument) for argument in arguments] + ["--runner=FnApiRunner"])
        return sorted(capfd.readouterr().out.splitlines())

    yield run
    for yard in list(_yard._running.values()):
        assert yard.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small models with the names of the demo's."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_bert(folder / "sentiment", seed=1, labels=["negative", "positive"])
    make_tiny_bert(folder / "language", seed=2, labels=["de", "en", "fr"])
    make_tiny_gpt2(folder / "storyteller", seed=3)
    return folder


def test_both_branches_see_all_of_the_data(run: Run, models: Path, tmp_path: Path) -> None:
    texts = ["i like it very", "a bad big house", "the cat sat on the mat"]
    (tmp_path / "texts").write_text("".join(f"{text}\n" for text in texts))
    lines = run("beam_ab_branch", models, "--texts", tmp_path / "texts")
    assert len(lines) == 6
    for text in texts:
        (first,) = [line for line in lines if line.startswith("A sentiment:") and text in line]
        assert first.rpartition(" ")[2] in {"negative", "positive"}
        (second,) = [line for line in lines if line.startswith("B language:") and text in line]
        assert second.rpartition(" ")[2] in {"de", "en", "fr"}


def test_the_second_model_of_a_sequence_gets_what_the_first_one_made(
    run: Run, models: Path
) -> None:
    lines = run("beam_sequence", models)
    assert len(lines) == 3
    assert all(line.startswith("sentiment: ") for line in lines)
    assert {line.rpartition(" ")[2] for line in lines} <= {"negative", "positive"}
    # The texts that were judged are no longer those that the pipeline began with.
    assert not any(f"{begin!r} is" in line for begin in ("The waiter", "the dog") for line in lines)


async def test_branches_and_sequences_are_keys_of_a_server(run: Run, models: Path) -> None:
    config = CPU + f'\n[roots]\nstore = "{models}"\n'
    for name, task in (
        ("sentiment", "text-classification"),
        ("language", "text-classification"),
        ("storyteller", "text-generation"),
    ):
        config += model_table(name, "transformers", task=task)
    async with running_app(config, models) as yard:
        lines = await asyncio.to_thread(run, "beam_routes", yard.target)
        # Who asks again is answered by the same branch.
        again = await asyncio.to_thread(run, "beam_routes", yard.target)
    branches = {"control": set[str](), "treatment": set[str]()}
    for line in [*lines, *again]:
        if line.startswith("opinion of"):
            _, _, user, _, model, branch, _ = line.split()
            assert model == {"control": "sentiment", "treatment": "language"}[branch[1:-2]]
            branches[branch[1:-2]].add(user)
    assert not branches["control"] & branches["treatment"]
    assert len(branches["control"] | branches["treatment"]) == 4
    judged = [line for line in lines if line.startswith("judged-story of")]
    assert len(judged) == 8
    assert {line.rpartition(" ")[2] for line in judged} <= {"negative", "positive"}


def test_keys_lead_to_their_models_and_two_of_four_fit(run: Run, tmp_path: Path) -> None:
    lines = run("beam_keyed", tmp_path / "models")
    expected = [
        "KEY_1 by config-1: [6.0, 15.0]",
        "KEY_2 by config-2: [12.0, 30.0]",
        "KEY_3 by config-2: [12.0, 30.0]",
    ]
    models = {1: 1, 2: 2, 3: 2, 4: 3, 5: 4, 6: 4}
    expected += [f"KEY_{key} by config-{n}: [{3.0 * n}]" for key, n in models.items()] * 2
    assert lines == sorted(expected)
