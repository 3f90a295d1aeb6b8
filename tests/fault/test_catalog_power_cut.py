"""The power fails at every step of what the catalog's store does to its disk.

MODELYARD_POWER_CUTS says how many images of the disk are looked at for each step (1);
MODELYARD_SEED repeats a run. A killed process cannot show any of this: its page cache stays.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import catalog_writer
from tests.support.catalog_writer import check_file
from tests.support.disk import build_shim, power_cuts, shim_environment

from modelyard_server.catalog.store import StoreError

IMAGES = int(os.environ.get("MODELYARD_POWER_CUTS", "1"))
SEED = int(os.environ.get("MODELYARD_SEED", str(random.randrange(2**32))))
CHANGES = 8


@pytest.mark.timeout(120 + 60 * IMAGES)
def test_a_power_cut_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    bad, images = _bad_images(tmp_path, "FULL", IMAGES)
    print(f"{images} images, {len(bad)} bad")
    assert images > 100
    assert bad == []


@pytest.mark.parametrize("synchronous", ["NORMAL", "OFF"])
def test_the_simulated_power_cut_finds_the_settings_that_lose_changes(
    synchronous: str, tmp_path: Path
) -> None:
    bad, images = _bad_images(tmp_path, synchronous, 1)
    print(f"{images} images, {len(bad)} bad")
    assert bad


def _bad_images(folder: Path, synchronous: str, images_a_step: int) -> tuple[list[str], int]:
    """Writes with a setting, and returns what is wrong with the disk after which cut."""
    print(f"MODELYARD_SEED={SEED}")
    shim = build_shim(folder)
    if shim is None:
        pytest.skip("needs Linux and a C compiler, to record what is done to the disk")
    disk, image_folder, log = folder / "disk", folder / "image", folder / "log"
    disk.mkdir()
    command = [sys.executable, catalog_writer.__file__, str(disk / "catalog.db")]
    command += [f"--changes={CHANGES}", f"--synchronous={synchronous}", "--checkpoint-pages=30"]
    # Twice, so that an existing file is opened too; and with checkpoints among the changes.
    for _ in range(2):
        subprocess.run(
            command,
            env=shim_environment(shim, disk, log),
            stdout=subprocess.DEVNULL,
            check=True,
        )
    bad: list[str] = []
    images = 0
    for image in power_cuts(log, random.Random(SEED), images_a_step):
        images += 1
        shutil.rmtree(image_folder, ignore_errors=True)
        image_folder.mkdir()
        for name, data in image.files.items():
            (image_folder / Path(name).name).write_bytes(data)
        try:
            check_file(image_folder / "catalog.db", image.noted)
        except (AssertionError, StoreError) as error:
            bad.append(f"step {image.step}: {error}")
    return bad, images
