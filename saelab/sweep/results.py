"""The table of a sweep: one row per SAE, measured on held-out tokens, as ``sweep.parquet``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from saelab.data.cache import ActivationCache
from saelab.errors import UserError, damaged
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.files import replace
from saelab.layout import SWEEP_TABLE
from saelab.metrics import mean_cosine
from saelab.sae import VARIANTS
from saelab.sae.controller import NEAR
from saelab.sae.weights import load_sae
from saelab.sweep.caches import Caches
from saelab.sweep.grid import Entry
from saelab.sweep.member import Member
from saelab.training import read_run
from saelab.training.divergence import failure
from saelab.training.fitting import VALIDATION

MEASURED = ("fvu", "l0", "dead_fraction", "ce_loss_recovered_zero")
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("variant", pa.string()),
        ("k", pa.float64()),
        ("asked_l0", pa.float64()),  # latents per token asked for, of any variant: k, n_steps or l0
        ("d_sae", pa.int64()),
        ("seed", pa.int64()),
        ("lr", pa.float64()),
        ("options", pa.string()),  # the variant's options, as JSON
        ("training", pa.string()),  # of its own: training options that are not the defaults, as JSON
        ("status", pa.string()),  # finished, halted or diverged
        ("message", pa.string()),
        ("step", pa.int64()),
        *((name, pa.float64()) for name in MEASURED),  # on held-out tokens; null where not measured
        ("cpu_seconds", pa.float64()),  # processor time of the training steps
        ("parameters", pa.float64()),
        ("mean_cosine", pa.float64()),  # between directions; lowest near the right L0 (see guidance)
        ("folder", pa.string()),  # relative to the table
        ("cache", pa.string()),  # name among several caches; null where there is one
        ("hook_name", pa.string()),
        ("hook_name_out", pa.string()),  # of transcoders
        ("tried", pa.string()),  # learning rates, as JSON (see choice.Group), where it was tuned; null elsewhere
    ]
)


def measure(
    members: Sequence[Member],
    caches: Caches | ActivationCache | Mapping[str, ActivationCache],
    model: nn.Module | None = None,
    config: EvaluateConfig | None = None,
    progress: Callable[[Member], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per SAE. Finished ones are evaluated on held-out tokens, which leaves their ``evaluation.json``."""
    config, caches = config or EvaluateConfig(lm_tokens=0), Caches.of(caches)
    rows = []
    for member in members:
        cache = caches.get(member.entry.pair)
        values: dict[str, float | None] = dict.fromkeys((*MEASURED, "parameters", "mean_cosine"))
        message = member.message
        if member.status == "finished":
            sae = load_sae(member.folder)
            evaluation = evaluate(sae, _as_trained(member, cache), model, config)
            evaluation.save(member.folder)
            values["mean_cosine"] = mean_cosine(sae.W_dec) if sae.d_sae > 1 else None
            values["parameters"] = float(sum(part.numel() for part in sae.parameters()))
            values |= {name: evaluation.metrics[name].value for name in MEASURED if name in evaluation.metrics}
            remarks = [*sae.remarks(), _failed(member, values["fvu"])]
            message = "; ".join(filter(None, [message, *remarks])) or _off(member.entry, values["l0"])
        entry = member.entry
        about = _lr(member) | {"seed": entry.train.seed, "options": json.dumps(entry.options)}
        about["training"] = json.dumps(entry.training)
        rows.append(
            {
                "name": entry.name,
                "variant": entry.variant,
                "k": entry.options.get("k"),
                "asked_l0": entry.l0,
                "d_sae": entry.d_sae,
                **about,
                "status": member.status,
                "message": message,
                "step": member.step,
                **values,
                "cpu_seconds": member.cpu_seconds,
                "folder": member.folder.name,
                "cache": entry.pair[0] or None,
                "hook_name": cache.hook_name or None,
                "hook_name_out": None if cache.target is None else cache.target.hook_name,
                "tried": json.dumps(member.tried) if member.tried else None,
            }
        )
        if progress is not None:
            progress(member)
    return rows


def save_results(rows: Sequence[dict[str, Any]], folder: Path | str) -> Path:
    """Write ``sweep.parquet``."""
    path, table = Path(folder) / SWEEP_TABLE, pa.Table.from_pylist(list(rows), schema=SCHEMA)
    replace(path, lambda temporary: pq.write_table(table, temporary))
    return path


def load_results(folder: Path | str) -> list[dict[str, Any]]:
    """The rows of a sweep's table."""
    path = Path(folder) / SWEEP_TABLE
    if not path.is_file():
        raise UserError(f"{folder} has no {SWEEP_TABLE}; finish the sweep with `saelab sweep ... --resume`")
    with damaged(path, "finish the sweep again with `saelab sweep ... --resume`", pa.ArrowException, OSError):
        # Version 0.1.0 wrote fewer columns.
        return [dict.fromkeys(SCHEMA.names) | row for row in pq.read_table(path).to_pylist()]


def _as_trained(member: Member, cache: ActivationCache) -> ActivationCache:
    """The cache without the validation rows that the SAE's learning rate was chosen on."""
    span = (read_run(member.folder) or {}).get(VALIDATION)
    return cache if span is None else cache.with_validation_from(span[0])


def _failed(member: Member, fvu: float | None) -> str:
    return "" if fvu is None else failure(fvu, _lr(member)["lr"])


def _off(entry: Entry, l0: float | None) -> str:
    """Whether a penalty led to another L0 on held-out tokens than on the training tokens it was set on."""
    asked = entry.l0 if VARIANTS[entry.variant].l0_option == "l0" else None
    if asked is None or l0 is None or abs(l0 / asked - 1) <= NEAR:
        return ""
    return f"l0={asked:g} was reached on training tokens; held-out tokens have {l0:.3g}"


def _lr(member: Member) -> dict[str, float | None]:
    # The resolved rate, default rule included, stands in the run's own description.
    run = read_run(member.folder)
    return {"lr": None if run is None else run["train"]["lr"]}
