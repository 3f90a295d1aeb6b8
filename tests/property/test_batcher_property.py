"""Lines of random jobs: nobody is lost, limits hold, models and clients get their turns."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.execution.batcher import PATIENCE, BatchLimits, Ended, Line
from modelyard_server.runtimes.api import Prepared


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    model: int
    client: str
    seen: Prepared | Ended | None


prepared = st.builds(
    Prepared,
    key=st.sampled_from("xxxy"),
    rows=st.sampled_from([1, 1, 2, 3, 9]),
    width=st.integers(1, 40),
    row_bytes=st.integers(0, 100),
    most_rows=st.sampled_from([4, 16, 16]),
    pass_cost=st.sampled_from([0, 8, 64]),
    content=st.none(),
)
jobs = st.builds(
    Job,
    model=st.integers(0, 3),
    client=st.sampled_from("abc"),
    seen=st.one_of(prepared, prepared, prepared, st.none(), st.just(Ended.ENDED)),
)
# What comes: a job, or the lane becomes free.
events = st.lists(st.one_of(jobs, jobs, st.none()), max_size=120)
limits = st.builds(BatchLimits, most_rows=st.integers(1, 20), most_bytes=st.integers(1, 2000))


def look(job: Job) -> Prepared | Ended | None:
    return job.seen


@given(events, limits)
def test_every_job_leaves_once_and_every_batch_keeps_the_limits(
    events: list[Job | None], limits: BatchLimits
) -> None:
    line: Line[Job] = Line(limits)
    inside: Counter[Job] = Counter()
    events = [*events, *[None] * len(events)]
    for event in events:
        if event is not None:
            line.add(event, event.model, event.client)
            inside[event] += 1
            continue
        taken = line.take(look)
        assert bool(taken.batch or taken.ended) == bool(+inside)
        inside.subtract([*taken.batch, *taken.ended])
        assert min(inside.values(), default=0) >= 0
        assert len(line) == sum(inside.values())
        assert all(job.seen is Ended.ENDED for job in taken.ended)
        assert [job.seen for job in taken.batch if job.seen is not None] == taken.prepared
        assert len({job.model for job in taken.batch}) <= 1
        if len(taken.batch) > 1:
            check_batch(taken.prepared, limits)
            assert len(taken.prepared) == len(taken.batch)
    assert not +inside


def check_batch(batch: list[Prepared], limits: BatchLimits) -> None:
    rows = sum(each.rows for each in batch)
    assert len({each.key for each in batch}) == 1
    assert rows <= min(limits.most_rows, *(each.most_rows for each in batch))
    assert rows * max(each.row_bytes for each in batch) <= limits.most_bytes
    # Together it costs no more than alone, a pass for each.
    padded = rows * max(each.width for each in batch)
    assert padded <= sum(each.rows * each.width + each.pass_cost for each in batch)


@given(events)
def test_no_model_waits_for_more_batches_than_jobs_were_before_it(
    events: list[Job | None],
) -> None:
    line: Line[Job] = Line(BatchLimits(most_rows=8))
    # By model: jobs of others that were in line before its oldest.
    ahead: dict[int, int] = {}
    waiting: Counter[int] = Counter()
    for event in [*events, *[None] * len(events)]:
        if event is not None:
            if not waiting[event.model]:
                ahead[event.model] = sum(waiting.values())
            waiting[event.model] += 1
            line.add(event, event.model, event.client)
            continue
        taken = line.take(look)
        if not (gone := [*taken.batch, *taken.ended]):
            continue
        (model,) = {job.model for job in gone}
        waiting[model] -= len(gone)
        # The rest of it has the places that it came with: behind those of all others, at worst.
        ahead[model] = sum(waiting.values())
        for other in waiting:
            if other != model and waiting[other]:
                ahead[other] -= 1
                assert ahead[other] >= 0
    assert not +waiting


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60), st.integers(1, 8))
def test_a_job_is_passed_over_by_a_bounded_number_of_batches(
    clients: list[str], most_rows: int
) -> None:
    line: Line[tuple[int, str]] = Line(BatchLimits(most_rows=most_rows))
    seen = Prepared(key=(), rows=1, most_rows=100, content=None)
    for number, client in enumerate(clients):
        line.add((number, client), "m", client)
    passes = 0
    oldest = 0
    left = set(range(len(clients)))
    while line:
        numbers = [number for number, _ in line.take(lambda job: seen).batch]
        left -= set(numbers)
        if not left:
            break
        passes = passes + 1 if min(left) == oldest and max(numbers) > oldest else 0
        oldest = min(left)
        assert passes <= PATIENCE


@given(st.lists(st.sampled_from("ab"), min_size=2, max_size=80), st.integers(1, 12))
def test_two_clients_who_both_wait_have_the_same_rows(clients: list[str], most_rows: int) -> None:
    line: Line[str] = Line(BatchLimits(most_rows=most_rows))
    seen = Prepared(key=(), rows=1, most_rows=100, content=None)
    waiting = Counter(clients)
    had: Counter[str] = Counter()
    for client in clients:
        line.add(client, "m", client)
    while waiting["a"] and waiting["b"]:
        batch = line.take(lambda job: seen).batch
        waiting.subtract(batch)
        had.update(batch)
        if waiting["a"] and waiting["b"]:
            assert abs(had["a"] - had["b"]) <= 1


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 5), min_size=2),
    st.integers(1, 4),
    st.lists(st.integers(0, 3), min_size=20, max_size=60),
)
def test_nobody_has_more_than_who_always_waits(
    demands: dict[str, int], most_rows: int, delays: list[int]
) -> None:
    line: Line[str] = Line(BatchLimits(most_rows=most_rows))
    seen = Prepared(key=(), rows=1, most_rows=100, content=None)
    waiting = Counter(demands)
    had: Counter[str] = Counter(dict.fromkeys(demands, 0))
    always = set(demands)
    away: list[tuple[int, str]] = []
    for client, demand in demands.items():
        for _ in range(demand):
            line.add(client, "m", client)
    for number, delay in enumerate(delays):
        batch = line.take(lambda job: seen).batch
        waiting.subtract(batch)
        had.update(batch)
        always -= {client for client in demands if not waiting[client]}
        away += [(number + delay, client) for client in batch]
        for due, client in away:
            if due <= number:
                line.add(client, "m", client)
                waiting[client] += 1
        away = [one for one in away if one[0] > number]
    for client in always:
        assert had[client] >= max(had.values()) - 1
