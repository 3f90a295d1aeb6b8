"""[[routes]]: keys, prefixes and every kind of target."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.config_problems import CPU, ECHO, only_problem, problems_of

from modelyard_server.config import Config, RouteConfig, parse_config
from modelyard_server.routing.targets import (
    Branch,
    Ensemble,
    Fallback,
    Link,
    Member,
    One,
    Sequence,
    Shadow,
    Split,
    Step,
    Target,
    Transform,
    Version,
    Versions,
)


class TestRoutes:
    def test_routes_are_read_and_a_repeated_key_counts_once(self, base: Path) -> None:
        text = f'{CPU}{ECHO}[[routes]]\nid = "r"\nkeys = ["a", "b", "a"]\nmodel = "echo"\n'
        assert parse_config(text, base=base).routes == (
            RouteConfig(id="r", keys=("a", "b"), model="echo"),
        )

    def test_a_key_is_in_one_route_or_a_models_own(self, base: Path) -> None:
        text = (
            f'{CPU}[models.a]\nruntime = "identity"\nkeys = ["own"]\n'
            '[[routes]]\nid = "r"\nkeys = ["x", "own", "a"]\nmodel = "a"\n'
            '[[routes]]\nid = "r"\nkeys = ["y", "x"]\nmodel = "b"\n'
        )
        problems = problems_of(text, base)
        assert [(line, key) for line, key, _ in problems] == [
            (9, "routes[0].keys[1]"),
            (9, "routes[0].keys[2]"),
            (12, "routes[1].id"),
            (13, "routes[1].keys[1]"),
            (14, "routes[1].model"),
        ]
        texts = [text for _, _, text in problems]
        assert "is a key of models.a already" in texts[0]
        assert "is a key of models.a already" in texts[1]
        assert "is the id of routes[0] already" in texts[2]
        assert "is a key of routes[0] already" in texts[3]
        assert "is not in [models] (there: a)" in texts[4]
        with pytest.raises(ValueError, match=r"routes\[0\].model: .*not in \[models\]"):
            Config(
                devices=parse_config(CPU, base=base).devices,
                routes=(RouteConfig(id="r", keys=("x",), model="a"),),
            )

    @pytest.mark.parametrize(
        ("route", "where"),
        [
            ("keys = []", "routes[0].keys"),
            ('keys = "abc"', "routes[0].keys"),
            ('keys = ["a b"]', "routes[0].keys[0]"),
            ('keys = ["a"]\nid = "B"', "routes[0].id"),
            ('keys = ["a"]\nmodel = 1', "routes[0].model"),
            ('keys = ["a"]\nmodels = ["echo"]', "routes[0].models"),
            ("prefixes = []", "routes[0].keys"),
            ('prefixes = ["/"]', "routes[0].prefixes[0]"),
            ('prefixes = "a"', "routes[0].prefixes"),
        ],
    )
    def test_a_route_that_cannot_be_is_refused(self, base: Path, route: str, where: str) -> None:
        rest = "".join(
            f'{name} = "{value}"\n'
            for name, value in (("id", "r"), ("model", "echo"))
            if f"{name} =" not in route
        )
        assert only_problem(f"{CPU}{ECHO}[[routes]]\n{route}\n{rest}", base)[1] == where

    def test_a_route_of_any_kind_is_read(self, base: Path) -> None:
        kinds: dict[str, tuple[str, Target]] = {
            "model": ('model = "echo"\n', One("echo")),
            "split": (
                'split.branches = [{name = "x", target = "echo", weight = 9},\n'
                '  {name = "y", target = "routes/model", weight = 1}]\n',
                Split(
                    (
                        Branch("x", Link("models", "echo"), 9),
                        Branch("y", Link("routes", "model"), 1),
                    )
                ),
            ),
            "sequence": (
                '[[routes.sequence.steps]]\ntarget = "echo"\n'
                "[[routes.sequence.steps]]\n[routes.sequence.steps.transform]\n"
                'name = "top_k"\nparameters = {k = 3}\n',
                Sequence(
                    (Step("", Link("models", "echo")), Step("", Transform("top_k", {"k": 3})))
                ),
            ),
            "ensemble": (
                '[routes.ensemble]\ncombine = "mean"\nmembers = [{name = "x", target = "echo"},'
                ' {name = "y", target = "routes/model", weight = 2}]\n',
                Ensemble(
                    (
                        Member("x", Link("models", "echo")),
                        Member("y", Link("routes", "model"), 2.0),
                    ),
                    "mean",
                ),
            ),
            "shadow": (
                'shadow = {target = "routes/split", shadow = "echo", sample = 1}\n',
                Shadow(Link("routes", "split"), Link("models", "echo"), 1.0),
            ),
            "fallback": (
                'fallback = {targets = ["echo", "routes/split"], prefer_warm = true}\n',
                Fallback((Link("models", "echo"), Link("routes", "split")), True),
            ),
            "versions": (
                '[routes.versions]\ncurrent = "v1"\nversions = [{name = "v1", target = "echo"}]\n',
                Versions((Version("v1", Link("models", "echo")),), "v1"),
            ),
        }
        text = CPU + ECHO
        for kind, (table, _) in kinds.items():
            text += f'[[routes]]\nid = "{kind}"\nprefixes = ["{kind}/", "{kind}/"]\n{table}'
        routes = parse_config(text, base=base).routes
        assert [route.target for route in routes] == [target for _, target in kinds.values()]
        assert routes[1].prefixes == ("split/",)
        assert routes[1].keys == ()
        # Made of values, it is checked in the same way.
        split = kinds["split"][1]
        assert isinstance(split, Split)
        assert RouteConfig(id="r", prefixes=("",), split=split).target == split
        with pytest.raises(ValueError, match=r"split\.branches: must be 2 to 64"):
            RouteConfig(id="r", prefixes=("",), split=Split(()))
        with pytest.raises(ValueError, match="means nothing"):
            RouteConfig(id="r", keys=("k",))

    @pytest.mark.parametrize(
        ("table", "problems"),
        [
            ("", [(6, "routes[0]", "means nothing: give it one of model, split, sequence")]),
            (
                'model = "echo"\nfallback = {targets = ["echo", "echo"]}\n',
                [(10, "routes[0].fallback", "is a second meaning beside model")],
            ),
            (
                "split = {branches = [], salt = 1, x = 2}\n",
                [
                    (9, "routes[0].split.x", "unknown field"),
                    (9, "routes[0].split.salt", "must be text"),
                ],
            ),
            (
                "split.branches = [\n"
                '  {name = "x", target = "echo", weight = -1},\n'
                '  {name = "x", target = "gone", weight = 1},\n'
                '  {name = "y", target = "routes/gone", weight = 1},\n]\n',
                [
                    (10, "routes[0].split.branches[0].weight", "must be 0 to 1000000"),
                    (11, "routes[0].split.branches[1].name", "is the name of"),
                    (11, "routes[0].split.branches[1].target", "is not in [models] (there: echo)"),
                    (12, "routes[0].split.branches[2].target", "is not in [routes] (there: r, s)"),
                ],
            ),
            (
                '[routes.versions]\ncurrent = "v2"\n'
                'canary = {version = "v3", percent = 200}\n'
                '[[routes.versions.versions]]\nname = "v1"\ntarget = "echo"\n',
                [
                    (10, "routes[0].versions.current", "there is no version or alias 'v2'"),
                    (11, "routes[0].versions.canary.version", "there is no version or alias 'v3'"),
                    (11, "routes[0].versions.canary.percent", "must be 0 to 100"),
                ],
            ),
            (
                'fallback.targets = ["routes/s", "routes/r"]\n',
                [
                    (9, "routes[0].fallback.targets[0]", "routes/r -> routes/s -> routes/r"),
                    (9, "routes[0].fallback.targets[1]", "in a circle: routes/r -> routes/r"),
                    (13, "routes[1].fallback.targets[1]", "routes/s -> routes/r -> routes/s"),
                ],
            ),
            (
                'ensemble = {combine = "all", members = [{name = "x", target = "echo"},'
                ' {name = "y", target = "routes/s"}]}\n',
                [(9, "routes[0].ensemble.members[1].target", "routes/s leads to a fallback")],
            ),
            (
                'shadow = {target = "echo", shadow = "routes/s", sample = 2}\n',
                [
                    (9, "routes[0].shadow.shadow", "must be a model"),
                    (9, "routes[0].shadow.sample", "must be above 0"),
                ],
            ),
        ],
    )
    def test_what_a_target_cannot_be_is_told_with_its_lines(
        self, base: Path, table: str, problems: list[tuple[int, str, str]]
    ) -> None:
        second = "routes/r" if "routes/s" in table and "fallback" in table else "echo"
        text = f'{CPU}{ECHO}[[routes]]\nid = "r"\nkeys = ["k"]\n{table}'
        text += f'[[routes]]\nid = "s"\nkeys = ["l"]\nfallback.targets = ["echo", "{second}"]\n'
        found = problems_of(text, base)
        assert [(line, key) for line, key, _ in found] == [(line, key) for line, key, _ in problems]
        for (_, _, told), (_, _, wanted) in zip(found, problems, strict=True):
            assert wanted in told

    @pytest.mark.parametrize(
        "table",
        [
            'sequence.steps = [{target = "routes/b"}]',
            'ensemble = {combine = "all", members = [{name = "x", target = "echo"},'
            ' {name = "y", target = "routes/b"}]}',
            'fallback.targets = ["routes/b", "routes/c"]',
        ],
    )
    def test_a_way_into_a_circle_of_others_comes_to_an_end(self, base: Path, table: str) -> None:
        text = f'{CPU}{ECHO}[[routes]]\nid = "a"\nkeys = ["a"]\n{table}\n'
        for route_id, other in ("bc", "cb"):
            text += f'[[routes]]\nid = "{route_id}"\nkeys = ["{route_id}"]\n'
            text += f'sequence.steps = [{{target = "routes/{other}"}}]\n'
        told = [(key, text) for _, key, text in problems_of(text, base) if "circle" in text]
        assert [key for key, _ in told] == [f"routes[{i}].sequence.steps[0].target" for i in (1, 2)]

    def test_steps_that_do_not_meet_and_prefixes_of_two_are_told(self, base: Path) -> None:
        text = (
            f"{CPU}{ECHO}"
            + "".join(
                f'[models.{name}]\nruntime = "transformers"\ntask = "{task}"\nroot = "r"\n'
                f'folder = "{name}"\n'
                for name, task in (("emb", "feature-extraction"), ("gen", "text-generation"))
            )
            + '[roots]\nr = "."\n'
            '[[routes]]\nid = "r"\nprefixes = ["", "x"]\n'
            'sequence.steps = [{target = "emb"}, {target = "gen"}]\n'
            '[[routes]]\nid = "s"\nprefixes = ["y", ""]\nmodel = "echo"\n'
        )
        problems = problems_of(text, base)
        assert [key for _, key, _ in problems] == [
            "routes[0].sequence.steps[1]",
            "routes[1].prefixes[1]",
        ]
        assert "takes one input, TEXT of 1 dimension" in problems[0][2]
        assert "is a prefix of routes[0] already" in problems[1][2]

    def test_routes_are_an_array_of_tables(self, base: Path) -> None:
        _, key, text = only_problem(f"{CPU}[routes]\nid = 'r'\n", base)
        assert key == "routes"
        assert "[[routes]]" in text
