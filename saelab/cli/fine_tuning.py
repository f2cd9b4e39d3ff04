"""``saelab train --from``: open the SAE to fine-tune, and check the options against it."""

from __future__ import annotations

from typing import Any

from saelab.cli.console import console
from saelab.cli.opening import open_run, print_notes
from saelab.cli.variants import option_fields
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.runs import Run
from saelab.sae import VARIANTS, Normalised


def open_start(name: str, variant: str | None) -> Run:
    """The SAE at a path or hub id; ``variant`` is the value of ``--variant``, if given."""
    run = open_run(name)
    if isinstance(run.sae, Normalised) and (folded := run.sae.folded()) is not None:
        run.sae = folded
        print_notes(["it starts on raw activations, with the same codes; each token's mean is now its own to explain"])
    if run.sae.variant not in VARIANTS:
        raise UserError(
            f"{name} reads activations normalised token by token ({run.sae.config.get('normalize')}), "
            "and such an SAE cannot be trained here; train a new one"
        )
    if variant is not None and variant != run.sae.variant:
        raise UserError(contradiction(run.origin, "variant", variant, run.sae.variant))
    return run


def fixed_options(run: Run) -> dict[str, Any]:
    """The options that the SAE fixes: the variant, its size and the variant's own options."""
    names = {name for name, *_ in option_fields(run.sae.variant)} | {"d_sae", "d_out"}
    known = {name: value for name, value in run.sae.config.items() if name in names}
    return {"variant": run.sae.variant, **known}


def check_options(run: Run, options: Any, defaults: Any) -> None:
    """UserError where the options ask for another SAE than ``run``, or for a folder that would replace it.

    ``defaults`` are the options as they are when none is given.
    """
    free = VARIANTS[run.sae.variant].tunable
    for name in ("d_sae", *(name for name, *_ in option_fields(run.sae.variant))):
        given, fixed = getattr(options, name), getattr(defaults, name)
        if given != fixed and name not in free:
            raise UserError(contradiction(run.origin, name, given, fixed))
    assert run.path is not None
    out, path = options.out.resolve(), run.path.resolve()
    if out == path or out in path.parents:
        raise UserError(f"{options.out} holds the SAE to start from; write the new run into another folder")


def remarks(run: Run, cache: ActivationCache) -> list[str]:
    """Warnings about training ``run`` on ``cache``, one sentence each."""
    found = []
    hook_name = run.recorded.get("hook_name")
    if hook_name and cache.hook_name and hook_name != cache.hook_name:
        found.append(f"it was trained on {hook_name}, the cache holds {cache.hook_name}")
    out, target = run.recorded.get("hook_name_out"), cache.target
    if out and target is not None and target.hook_name and out != target.hook_name:
        found.append(f"it was trained to write {out}, the target holds {target.hook_name}")
    norms = run.sae.W_dec.detach().norm(dim=1)
    if "k" in run.sae.config and float((norms - 1).abs().max()) > 1e-2:
        low, high = float(norms.min()), float(norms.max())
        found.append(f"its dictionary has norms from {low:.2g} to {high:.2g}; training makes them 1, which changes it")
    return found


def contradiction(source: str, name: str, given: object, fixed: object) -> str:
    return f"{name}={given} differs from {name}={fixed} of the SAE in {source}; leave it out, or train a new SAE"


def announce(run: Run, cache: ActivationCache) -> None:
    """Print which SAE is being fine-tuned, and the warnings."""
    console.print(f"starting from {run.origin}", markup=False, soft_wrap=True)
    for remark in remarks(run, cache):
        console.print(f"note: {remark}", markup=False, soft_wrap=True)
