"""Which jobs run next: models in turn, clients in turn, together what fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from modelyard_server.execution.batcher import MOST_GONE, PATIENCE, BatchLimits, Ended, Line
from modelyard_server.runtimes.api import Prepared


@dataclass(eq=False)
class Job:
    """A job, and what a look at it says."""

    name: str
    model: str = "m"
    client: str = ""
    since: float = 0.0
    fit: Prepared | Ended | None = None
    looks: int = field(default=0)


def fit(rows: int = 1, width: int = 1, **more: Any) -> Prepared:
    settings: dict[str, Any] = {"key": (), "most_rows": 1000, "content": None} | more
    return Prepared(rows=rows, width=width, **settings)


def look(job: Job) -> Prepared | Ended | None:
    job.looks += 1
    return job.fit


def line_of(jobs: list[Job], *, most_rows: int = 64, most_bytes: int = 2**40) -> Line[Job]:
    line: Line[Job] = Line(BatchLimits(most_rows=most_rows, most_bytes=most_bytes))
    for job in jobs:
        line.add(job, job.model, job.client, job.since)
    return line


def names_of(line: Line[Job]) -> list[str]:
    """All batches, a word each."""
    batches = []
    while line:
        taken = line.take(look)
        batches.append("".join(job.name for job in taken.batch))
    return batches


def jobs_of(text: str, **common: Any) -> list[Job]:
    return [Job(name, **({"fit": fit()} | common)) for name in text]


def test_what_waits_for_the_same_model_runs_together_in_order() -> None:
    assert names_of(line_of(jobs_of("abcde"))) == ["abcde"]


def test_an_empty_line_gives_nothing() -> None:
    taken = line_of([]).take(look)
    assert (taken.batch, taken.ended, taken.prepared) == ([], [], [])


def test_a_batch_is_closed_when_it_is_full() -> None:
    assert names_of(line_of(jobs_of("abcde"), most_rows=2)) == ["ab", "cd", "e"]


def test_a_model_may_have_less_rows_than_the_lane() -> None:
    assert names_of(line_of(jobs_of("abcde", fit=fit(most_rows=3)))) == ["abc", "de"]


def test_one_row_means_no_batches_and_only_the_next_job_is_looked_at() -> None:
    jobs = jobs_of("abc")
    line = line_of(jobs, most_rows=1)
    assert line.take(look).batch == jobs[:1]
    assert [job.looks for job in jobs] == [1, 0, 0]


def test_rows_count_and_not_requests() -> None:
    jobs = [Job("a", fit=fit(3)), Job("b", fit=fit(2)), Job("c", fit=fit(1)), Job("d", fit=fit(2))]
    assert names_of(line_of(jobs, most_rows=4)) == ["ac", "bd"]


def test_a_request_larger_than_every_limit_runs_alone() -> None:
    jobs = [Job("a", fit=fit(100, row_bytes=100)), Job("b", fit=fit()), Job("c", fit=fit())]
    assert names_of(line_of(jobs, most_rows=8, most_bytes=10)) == ["a", "bc"]


def test_bytes_are_counted_with_padding() -> None:
    # Two rows of 10 bytes, padded to the 40 of the third, are 120.
    small, large = fit(row_bytes=10), fit(row_bytes=40)
    jobs = [Job("a", fit=small), Job("b", fit=small), Job("c", fit=large), Job("d", fit=small)]
    assert names_of(line_of(jobs, most_bytes=119)) == ["abd", "c"]
    assert names_of(line_of(jobs, most_bytes=160)) == ["abcd"]


def test_other_keys_wait_for_the_next_batch() -> None:
    jobs = [Job(name, fit=fit(key=key)) for name, key in zip("abcd", "xyxy", strict=True)]
    assert names_of(line_of(jobs)) == ["ac", "bd"]


def test_what_cannot_share_a_run_runs_alone_in_order() -> None:
    jobs = jobs_of("abcd")
    jobs[0].fit = jobs[2].fit = None
    assert names_of(line_of(jobs)) == ["a", "bd", "c"]


@pytest.mark.parametrize(
    ("pass_cost", "batches"), [(0, ["ac", "b"]), (6, ["ac", "b"]), (7, ["abc"])]
)
def test_a_longer_row_joins_if_its_padding_costs_no_more_than_a_pass(
    pass_cost: int, batches: list[str]
) -> None:
    # After the first of 3 tokens, one of 10 brings 7 of padding; one of 3 brings none.
    jobs = [Job("a", fit=fit(width=3, pass_cost=pass_cost))]
    jobs += [Job("b", fit=fit(width=10, pass_cost=pass_cost))]
    jobs += [Job("c", fit=fit(width=3, pass_cost=pass_cost + 7))]
    assert names_of(line_of(jobs)) == batches


def test_each_model_has_the_places_its_jobs_came_with() -> None:
    jobs = [
        Job(name, model=model, fit=fit()) for name, model in zip("abcdef", "mnmnom", strict=True)
    ]
    assert names_of(line_of(jobs, most_rows=2)) == ["ac", "bd", "e", "f"]
    assert names_of(line_of(jobs)) == ["acf", "bd", "e"]


def test_a_model_that_never_stops_holds_up_no_other() -> None:
    line = line_of([*jobs_of("aaaa"), Job("x", model="other", fit=fit())], most_rows=2)
    batches = []
    for _ in range(3):
        batches.append("".join(job.name for job in line.take(look).batch))
        for job in jobs_of("aaaa"):
            line.add(job, job.model, job.client)
    assert batches == ["aa", "aa", "x"]


def test_a_batch_is_closed_when_it_would_compute_for_too_long() -> None:
    line = line_of(jobs_of("abcdefgh", fit=fit(width=10)))
    taken = line.take(look)
    assert len(taken.batch) == 8, "nothing is known of the time yet"
    assert taken.cells == 80
    line.note_run(taken, 0.8)
    for job in jobs_of("abcdefgh", fit=fit(width=10)):
        line.add(job, job.model, job.client)
    # 0.1 s each, and a quarter of a second.
    assert names_of(line) == ["ab", "cd", "ef", "gh"]


def test_one_that_takes_longer_than_a_batch_may_runs_alone() -> None:
    line = line_of(jobs_of("a", fit=fit(width=10)))
    line.note_run(line.take(look), 5.0)
    for job in [*jobs_of("bc", fit=fit(width=10)), *jobs_of("d", fit=fit(rows=40, width=10))]:
        line.add(job, job.model, job.client)
    assert names_of(line) == ["b", "c", "d"]


def test_what_runs_take_is_learnt_anew_and_of_each_model() -> None:
    line = line_of(jobs_of("a", model="slow"))
    line.note_run(line.take(look), 0.2)
    for _ in range(12):  # It was slow once.
        for job in jobs_of("b", model="slow"):
            line.add(job, job.model, job.client)
        line.note_run(line.take(look), 0.001)
    for job in [*jobs_of("cdefgh", model="slow"), *jobs_of("ijklmn", model="other")]:
        line.add(job, job.model, job.client)
    assert names_of(line) == ["cdefgh", "ijklmn"]


def test_who_has_waited_longest_is_served_first() -> None:
    here = [Job(name, since=10.0 + i, fit=fit()) for i, name in enumerate("abcd")]
    # They have waited for their model since before b came.
    loaded = [Job(name, model="loaded", since=10.5, fit=fit()) for name in "xyz"]
    assert names_of(line_of([*here, *loaded], most_rows=1)) == [*"axyzbcd"]
    assert names_of(line_of([*here, *loaded], most_rows=2)) == ["ab", "xy", "z", "cd"]
    assert names_of(line_of([*here, *loaded])) == ["abcd", "xyz"]


def test_clients_take_turns_when_not_all_fit() -> None:
    jobs = [*jobs_of("aaaaaa", client="a"), *jobs_of("bb", client="b"), *jobs_of("c", client="c")]
    assert names_of(line_of(jobs, most_rows=4)) == ["abca", "baaa", "a"]


def test_turns_go_by_rows() -> None:
    jobs = [*jobs_of("AA", client="a", fit=fit(4)), *jobs_of("bbbbb", client="b")]
    assert names_of(line_of(jobs, most_rows=8)) == ["Abbbb", "Ab"]


def test_turns_go_by_rows_while_there_is_room() -> None:
    jobs = [*jobs_of("AAA", client="a", fit=fit(4)), *jobs_of("bbbbbbbb", client="b")]
    assert names_of(line_of(jobs, most_rows=16)) == ["AbbbbAbbbb", "A"]


def test_the_least_of_the_limits_of_those_in_a_batch_holds() -> None:
    limits = (10, 3, 10, 10)
    jobs = [Job(name, fit=fit(most_rows=most)) for name, most in zip("abcd", limits, strict=True)]
    assert names_of(line_of(jobs)) == ["abc", "d"]
    assert names_of(line_of([jobs[0], jobs[2], jobs[3], jobs[1]])) == ["acd", "b"]


def test_turns_hold_for_what_runs_alone() -> None:
    jobs = [*jobs_of("aaa", client="a", fit=None), *jobs_of("bb", client="b", fit=None)]
    assert names_of(line_of(jobs)) == list("ababa")


def test_a_client_that_comes_new_has_no_turns_saved_up() -> None:
    line = line_of(jobs_of("aaaaaa", client="a", fit=None))
    assert [line.take(look).batch[0].name for _ in range(3)] == ["a"] * 3
    for job in jobs_of("bbbb", client="b", fit=None):
        line.add(job, job.model, job.client)
    assert names_of(line) == list("abababb")


def ran_with_callers(line: Line[Job], runs: int) -> list[str]:
    """What runs, one in each, where all but client "line" ask again while the next one runs."""
    ran: list[str] = []
    away: list[Job] = []
    for _ in range(runs):
        (job,) = line.take(look).batch
        ran.append(job.name)
        for caller in away:
            line.add(caller, caller.model, caller.client)
        away = [] if job.client == "line" else [Job(job.name, client=job.client, fit=job.fit)]
    return ran


def test_who_asks_one_at_a_time_is_not_new_each_time() -> None:
    jobs = jobs_of("a" * 30, client="line", fit=None)
    jobs += [Job(name, client=name) for name in "wxyz"]
    assert "".join(ran_with_callers(line_of(jobs, most_rows=1), 50)) == "awxyz" * 10


def test_turns_go_by_rows_for_who_comes_back_too() -> None:
    jobs = [*jobs_of("a" * 50, client="line"), Job("B", client="b", fit=fit(rows=4))]
    ran = "".join(ran_with_callers(line_of(jobs, most_rows=1), 50))
    assert ran == "aB" + "aaaaB" * 9 + "aaa"


@pytest.mark.parametrize(("names", "is_forgotten"), [(MOST_GONE, False), (2 * MOST_GONE, True)])
def test_so_many_are_remembered_and_no_more(names: int, is_forgotten: bool) -> None:
    jobs = [Job("B", client="b", fit=fit(rows=10**6)), *jobs_of("aa", client="line")]
    line = line_of(jobs, most_rows=1)
    assert line.take(look).batch == jobs[:1]
    for number in range(names):
        # With so many rows that each would be behind if it came back.
        line.add(Job("n", fit=fit(rows=10**5)), "m", f"new {number}")
        assert [line.take(look).batch[0].name for _ in range(2)] == ["a", "n"]
        line.add(Job("a", fit=fit()), "m", "line")
    line.add(jobs[0], "m", "b")
    line.add(Job("a", fit=fit()), "m", "line")
    assert [line.take(look).batch[0].name for _ in range(2)] == ["a", "B" if is_forgotten else "a"]


def test_new_names_hold_up_nobody_for_ever() -> None:
    line = line_of(jobs_of("12", client="old", fit=None))
    ran = []
    for number in range(3 * PATIENCE):
        # Always a client that nobody has seen before.
        line.add(Job("n"), "m", f"new{number}")
        ran += [job.name for job in line.take(look).batch]
    assert ran.index("1") == 0
    assert ran.index("2") <= PATIENCE + 1


def test_jobs_that_have_ended_are_left_out_and_given_back() -> None:
    jobs = jobs_of("abcd")
    jobs[0].fit = jobs[2].fit = Ended.ENDED
    line = line_of(jobs)
    taken = line.take(look)
    assert taken.batch == [jobs[1], jobs[3]]
    assert taken.ended == [jobs[0], jobs[2]]
    assert len(line) == 0
    assert line.take(look).batch == []


def test_a_model_all_of_whose_jobs_have_ended_takes_no_turn_from_the_next() -> None:
    jobs = [*jobs_of("ab", fit=Ended.ENDED), Job("c", model="n", fit=fit())]
    line = line_of(jobs)
    assert line.take(look).ended == jobs[:2]
    assert line.take(look).batch == [jobs[2]]


def test_a_group_that_comes_back_has_new_places() -> None:
    line = line_of(jobs_of("abc"))
    assert len(line.take(look).batch) == 3
    for job in (Job("x", model="n", fit=fit()), *jobs_of("de")):
        line.add(job, job.model, job.client)
    assert names_of(line) == ["x", "de"]


@pytest.mark.parametrize("wrong", [{"most_rows": 0}, {"most_bytes": 0}])
def test_limits_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BatchLimits(**wrong)
