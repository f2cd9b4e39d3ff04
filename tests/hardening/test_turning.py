"""Storage that changes under a running program: disks that fill or turn read-only, shares that go away, clocks."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saelab import ActivationCache
from saelab.cli import REMEDIES
from saelab.data.cache import CacheWriter, Manifest
from saelab.data.cache.storage import Folder
from saelab.errors import UserError
from saelab.layout import METRICS, RUN
from saelab.runs import Run
from saelab.workspace import condition


def rows(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(10, 4, generator=generator), torch.arange(10), torch.arange(10), torch.arange(10)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_a_harvest_goes_on_when_the_storage_is_back(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the files of a shard is the first that cannot be written."""
    whole = CacheWriter(Folder(tmp_path / "whole"), Manifest(d_in=4))
    for number in range(3):
        whole.write_shard(*rows(number))
    whole.finish()
    for works in (0, 1):
        out = Folder(tmp_path / f"cache{works}")
        writer = CacheWriter(out, Manifest(d_in=4))
        writer.write_shard(*rows(0))
        left = [works]

        def refuse(path: Path, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(code, os.strerror(code), str(path))

        with monkeypatch.context() as patched:
            patched.setattr("saelab.files.sync", refuse)
            with pytest.raises(OSError, match=os.strerror(code)):
                writer.write_shard(*rows(1))
        writer.close()
        assert code in REMEDIES  # the command says what to do
        with pytest.raises(UserError, match="is unfinished; run the same `saelab harvest` with --resume"):
            ActivationCache(out.url)
        writer = CacheWriter(out, Manifest(d_in=4), resume=True)
        assert writer.done == {0}
        for number in (1, 2):
            writer.write_shard(*rows(number))
        writer.finish()
        assert out.sizes() == whole.folder.sizes()
        assert all(out.read(name) == whole.folder.read(name) for name in out.sizes())


@pytest.mark.parametrize("hours", [-5.0, 0.0, 5.0])
def test_a_run_on_a_machine_with_another_clock(hours: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is being trained is seen from its log, whatever the clocks say."""
    now, log = [1000.0], tmp_path / METRICS
    monkeypatch.setattr(condition, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    log.write_text('{"step": 1}\n')
    (tmp_path / RUN).write_text('{"steps": 100}')
    start = time.time() + hours * 3600

    def look(after: float, written: bool) -> str:
        now[0] += after
        if written:
            os.utime(log, (start + now[0], start + now[0]))
        found = condition.progress(Run(path=tmp_path, name="run"))
        assert found is not None
        return found.state

    look(0, True)
    assert look(60, True) == "running"
    assert look(60, False) == "running"
    assert look(condition.SILENCE, False) == "interrupted"
    assert look(10, True) == "running"
