"""Compiles the library: a program of its own, so that what it needs stays out of the tests.

    python build.py FOLDER

FOLDER must exist; `fakegpu.so` and the intermediate files are left there. Needs a C++20 compiler
(the environment's CXX, else c++) and ninja, which is also looked for beside this interpreter.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["main"]


def main(folder: str) -> None:
    """Compiles into `folder`; errors of the compiler are shown as they are."""
    from torch.utils import cpp_extension

    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", "")])
    cpp_extension.load(
        name="fakegpu",
        sources=[str(source) for source in sorted(Path(__file__).parent.glob("*.cpp"))],
        # Compiling is what takes time here, not running.
        extra_cflags=["-O1", "-g0"],
        build_directory=folder,
        is_python_module=False,
        verbose=False,
    )


if __name__ == "__main__":
    main(sys.argv[1])
