"""Lanes while another one imports torch for the first time in their process."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from modelyard_server.execution import model_runs


def test_a_lane_waits_for_torch_while_another_one_imports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go_on = threading.Event(), threading.Event()
    gate = SimpleNamespace(begun=begun, may_go_on=may_go_on, threads=[])
    monkeypatch.setitem(sys.modules, "slow_import_gate", gate)
    (tmp_path / "torch.py").write_text(
        "import slow_import_gate as gate\n"
        "gate.begun.set()\n"
        "assert gate.may_go_on.wait(60)\n"
        "def get_num_threads(): return 4\n"
        "set_num_threads = gate.threads.append\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    # Put back at the end, whatever stands there by then.
    monkeypatch.setitem(sys.modules, "torch", None)
    del sys.modules["torch"]
    errors: list[Exception] = []

    def set_threads() -> None:
        try:
            model_runs.set_threads(1)
        except Exception as error:
            errors.append(error)

    importer = threading.Thread(target=importlib.import_module, args=("torch",))
    lane = threading.Thread(target=set_threads)
    importer.start()
    assert begun.wait(60)
    lane.start()
    # One that does not wait has ended by then, with an error.
    lane.join(0.2)
    assert not errors
    may_go_on.set()
    lane.join(60)
    importer.join(60)
    assert not errors
    assert gate.threads == [1]
