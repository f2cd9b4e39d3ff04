"""``saelab train --from``: the SAE that a fine-tuning starts from, and what it leaves to choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from saelab.cli.console import console
from saelab.cli.variants import option_fields
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.interop.detection import load_with_metadata
from saelab.sae import SAE, VARIANTS


class Source(NamedTuple):
    """An SAE of any tool, to be trained further."""

    name: str
    sae: SAE
    path: Path
    hook_name: str | None
    notes: list[str]

    def settings(self) -> dict[str, Any]:
        """What the SAE says about the options of the training: the variant, its size and its own options."""
        names = {name for name, *_ in option_fields(self.sae.variant)} | {"d_sae"}
        known = {name: value for name, value in self.sae.config.items() if name in names}
        return {"variant": self.sae.variant, **known}

    def check(self, options: Any, defaults: Any) -> None:
        """UserError where the options ask for another SAE, or for a folder that would replace this one.

        ``defaults`` are the options as they are when none is given.
        """
        free = VARIANTS[self.sae.variant].tunable
        for name in ("d_sae", *(name for name, *_ in option_fields(self.sae.variant))):
            given, fixed = getattr(options, name), getattr(defaults, name)
            if given != fixed and name not in free:
                raise UserError(contradiction(self.name, name, given, fixed))
        out, path = options.out.resolve(), self.path.resolve()
        if out == path or out in path.parents:
            raise UserError(f"{options.out} holds the SAE to start from; write the new run into another folder")

    def remarks(self, cache: ActivationCache) -> list[str]:
        """What should be known before training it on ``cache``, one sentence each."""
        remarks = list(self.notes)
        if self.hook_name and cache.hook_name and self.hook_name != cache.hook_name:
            remarks.append(f"it was trained on {self.hook_name}, the cache holds {cache.hook_name}")
        norms = self.sae.W_dec.detach().norm(dim=1)
        if "k" in self.sae.config and float((norms - 1).abs().max()) > 1e-2:
            low, high = float(norms.min()), float(norms.max())
            remarks.append(
                f"its dictionary has norms from {low:.2g} to {high:.2g}; training makes them 1, which changes it"
            )
        return remarks


def open_source(name: str, variant: str | None) -> Source:
    """The SAE at a path or hub id; ``variant`` is the one asked for, if any."""
    sae, metadata, path, notes = load_with_metadata(name)
    if sae.variant not in VARIANTS:
        raise UserError(
            f"{name} reads layer-normed activations; such an SAE cannot be trained, its input is not linear"
        )
    if variant is not None and variant != sae.variant:
        raise UserError(contradiction(name, "variant", variant, sae.variant))
    return Source(origin(name), sae, path, metadata.get("hook_name"), list(notes))


def origin(name: str) -> str:
    """The name a run keeps of the SAE it starts from: an absolute path, or a hub id as it is."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


def contradiction(source: str, name: str, given: object, fixed: object) -> str:
    return f"{name}={given} differs from {name}={fixed} of the SAE in {source}; leave it out, or train a new SAE"


def announce(source: Source, cache: ActivationCache) -> None:
    """Say what is being fine-tuned, and what is odd about it."""
    console.print(f"starting from {source.name}", markup=False, soft_wrap=True)
    for remark in source.remarks(cache):
        console.print(f"note: {remark}", markup=False, soft_wrap=True)
