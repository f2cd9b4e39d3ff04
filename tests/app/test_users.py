"""Many users at once: no error, no session that disturbs another, no memory that grows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from users import User, crowd, serve

D_SAE = 48


@pytest.mark.minutes
def test_a_few_users_at_once_see_no_error_and_one_that_is_there_is_noticed(folder: Path, tmp_path: Path) -> None:
    for run in ("topk", "abs_topk"):
        shutil.copytree(folder / "runs" / run, tmp_path / run)
    with serve(tmp_path, str(folder / "model")) as (port, pid):
        found = crowd(port, pid, 4, 0.04, ["topk", "abs_topk"], D_SAE, model=True)
        assert not found.errors, found.errors[:5]
        assert len(found.seconds) >= 8
        table = tmp_path / "topk" / "features" / "features.parquet"
        table.write_bytes(b"torn")
        os.utime(table, (1, 1))
        user = User(port, 0, ["topk"], D_SAE, model=False)
        user.open()
        seen = user.draw("") + user.draw("features", "run=topk")
        user.close()
    assert seen and "damaged" in seen[0]


@pytest.mark.minutes
def test_twenty_users_for_five_minutes(folder: Path) -> None:
    with serve(folder, str(folder / "model")) as (port, pid):
        found = crowd(port, pid, 20, 5.0, ["runs/topk", "runs/abs_topk", "runs/matching_pursuit"], D_SAE, model=True)
    assert not found.errors, found.errors[:5]
    # Sessions that were left are kept two minutes for a reconnection; after that nothing may add up.
    assert found.growth() < 50, found.summary()
