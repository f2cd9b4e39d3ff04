"""A :class:`~saelab.runs.Run` from whatever a function of the library was given for one."""

from __future__ import annotations

from pathlib import Path

from saelab.errors import UserError
from saelab.runs.run import Run
from saelab.sae import SAE


def as_run(run: Run | SAE | Path | str, hook_name: str = "") -> Run:
    """A :class:`Run` with a known hook point, from a path, a hub id, an SAE and its ``hook_name``, or another Run.

    Raises UserError if neither the files nor ``hook_name`` give the hook point.
    """
    if isinstance(run, SAE):
        if not hook_name:
            raise UserError(
                "an SAE that was not loaded from a run folder needs hook_name, e.g. blocks.9.hook_resid_post"
            )
        if run.transcodes:
            raise UserError("a transcoder has two places: wrap it with Run(sae, hook_name, hook_name_out=...)")
        return Run(run, hook_name)
    opened = run if isinstance(run, Run) else Run.open(run, hook_name)
    assert opened.hook_name
    return opened
