"""A map of all latents: decoder directions laid out in the plane so that similar ones lie together (t-SNE)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from saelab.errors import UserError, damaged
from saelab.files import replace
from saelab.layout import MAP
from saelab.sae import SAE
from saelab.sae.base import unit_rows

WIDTH = 50  # principal components that are laid out, as the authors of t-SNE advise
MOST = 10_000  # latents; the time grows a little faster than their number
META = b"saelab"


@torch.no_grad()
def lay_out(sae: SAE, keep: np.ndarray | None = None, most: int = MOST, seed: int = 0) -> pd.DataFrame:
    """``latent``, ``x`` and ``y`` of the latents of ``keep`` (all by default), of at most ``most``, drawn at random.

    t-SNE (van der Maaten & Hinton, 2008) of the unit decoder rows; only closeness means anything on it, neither the
    axes nor the distance of groups do. Raises UserError with fewer than four latents.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    chosen = np.arange(sae.n_features) if keep is None else np.asarray(keep)
    if len(chosen) > most:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, most, replace=False))
    if len(chosen) < 4:
        raise UserError(f"{len(chosen)} latents fire; a map needs four or more")
    rows = unit_rows(sae.W_dec.detach().float()[torch.from_numpy(chosen)]).cpu().numpy()
    rows = PCA(min(WIDTH, *rows.shape), random_state=seed).fit_transform(rows)
    perplexity = min(30.0, (len(chosen) - 1) / 3)
    places = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
    return pd.DataFrame({"latent": chosen, "x": places[:, 0], "y": places[:, 1]})


def save_map(run_folder: Path | str, places: pd.DataFrame, fingerprint: str) -> None:
    """Write ``map.parquet`` of the run folder; ``fingerprint`` says of which weights it is."""
    table = pa.Table.from_pandas(places, preserve_index=False)
    table = table.replace_schema_metadata({META: fingerprint.encode()})
    replace(Path(run_folder) / MAP, lambda partial: pq.write_table(table, partial))


def load_map(run_folder: Path | str, fingerprint: str) -> pd.DataFrame | None:
    """The map of a run; None where there is none, or one of other weights."""
    path = Path(run_folder) / MAP
    if not path.is_file():
        return None
    with damaged(path, "delete it and run `saelab map`", pa.ArrowException):
        table = pq.read_table(path)
        if (table.schema.metadata or {}).get(META, b"").decode() != fingerprint:
            return None
        return table.to_pandas()
