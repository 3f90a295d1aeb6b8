"""A process that works with a weight store and is killed at a chosen call to the system.

Run as a module. Reads one order a line, forks a child for it, and answers with one line: "done" if
the child came to its end, "killed" if it was killed before, else how it ended.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelyard_server.weights.store import Collector, WeightStore

__all__ = ["CALLS", "Killer", "Order", "killer"]

CALLS = (
    *("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "preadv"),
    *("ftruncate", "pwrite"),
)
"""What changes a store, and reading the source, which happens between writes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a child does.

    Attributes:
        store: the store's folder.
        take: folders to take, in that order.
        kill_at: number of the call before which it dies, from 1.
        collect: whether it removes all but the last model afterwards.
        give_back: it takes nothing; a server that uses the last model gives back the rest.
        fault: a mistake to make: "copied_packs" (packs are copied to their names, not renamed),
            "late_packs" (they get their names after the models that need them), "moved_files"
            (models get their names before their files) or none.
    """

    store: str
    take: list[str]
    kill_at: int
    collect: bool = False
    give_back: bool = False
    fault: str = ""


class Killer:
    """The process, seen from the test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.store_killer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, order: Order) -> bool:
        """Runs a child; True if it was killed, False if it came to its end first."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(order)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        assert answer in ("killed", "done"), answer
        return answer == "killed"

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        assert self._process.returncode == 0


@contextmanager
def killer() -> Iterator[Killer]:
    """A killer for a test."""
    made = Killer()
    try:
        yield made
    finally:
        made.close()


def _work(order: Order) -> None:
    _make_mistake(order.fault)
    _die_at(order.kill_at)
    if order.give_back:
        server = Collector.open(Path(order.store))
        server.publish([Path(order.take[-1])])
        server.collect(keep_s=0, stop=lambda: False)
        server.close()
        return
    store = WeightStore.open(Path(order.store))
    taken = [store.take(Path(folder)) for folder in order.take]
    if order.collect:
        store.collect([taken[-1].digest])
    store.close()


def _make_mistake(fault: str) -> None:
    replace, rename = os.replace, os.rename
    packs: list[Path] = []

    def copy_pack(source: Any, target: Any) -> None:
        if Path(target).parent.name != "packs":
            replace(source, target)
            return
        content = Path(source).read_bytes()
        half = len(content) // 2
        Path(target).write_bytes(content[:half])
        _moment()
        Path(target).write_bytes(content)

    def note_pack(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).parent.name == "packs":
            packs.append(Path(target))

    def rename_before_packs(source: Any, target: Any) -> None:
        for pack in packs:
            replace(pack, f"{source}.aside")
        rename(source, target)
        _moment()
        for pack in packs:
            replace(f"{source}.aside", pack)
        packs.clear()

    def move_files(source: Any, target: Any) -> None:
        if Path(target).parent.name != "models":
            rename(source, target)
            return
        Path(target).mkdir()
        for path in sorted(Path(source).iterdir()):
            replace(path, Path(target) / path.name)
            _moment()

    mistakes: dict[str, dict[str, Callable[[Any, Any], None]]] = {
        "": {},
        "copied_packs": {"replace": copy_pack},
        "late_packs": {"replace": note_pack, "rename": rename_before_packs},
        "moved_files": {"rename": move_files},
    }
    for name, wrong in mistakes[fault].items():
        setattr(os, name, wrong)


def _moment() -> None:
    """A call before which the process can be killed."""
    os.close(os.open("/", os.O_RDONLY))


def _die_at(number: int) -> None:
    count = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))


def main() -> None:
    """Runs a child an order."""
    for line in sys.stdin:
        order = Order(**json.loads(line))
        child = os.fork()
        if child == 0:
            try:
                _work(order)
            except BaseException as error:
                sys.stderr.write(f"{error!r}\n")
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            answer = "killed"
        else:
            answer = "done" if status == 0 else f"status {status}"
        print(answer, flush=True)


if __name__ == "__main__":
    main()
