"""docs/routes.md: what it says to write can be written."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.config_text import CPU, model_table

from modelyard_server.config import parse_config
from modelyard_server.routing.targets import KINDS, kind_of
from modelyard_server.routing.transforms import registered

DOCUMENT = (Path(__file__).parents[2] / "docs" / "routes.md").read_text(encoding="utf-8")
MODELS = ("sentiment", "sentiment-v2", "writer")


def test_its_examples_of_the_file_are_a_file_with_every_kind(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    models = "".join(model_table(name, "identity") for name in MODELS)
    routes = parse_config(CPU + models + "\n" + "".join(blocks), base=tmp_path).routes
    assert [kind_of(route.target) for route in routes] == list(KINDS)


def test_it_has_a_row_for_every_transformation() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*$", DOCUMENT, re.MULTILINE)
    assert sorted(rows) == sorted(registered())
    for name, transformation in registered().items():
        (row,) = re.findall(rf"^\| `{name}` \| (.*?) \|", DOCUMENT, re.MULTILINE)
        told = set(re.findall(r"`(\w+)`", row))
        assert set(transformation.parameters.model_fields) <= told, name
