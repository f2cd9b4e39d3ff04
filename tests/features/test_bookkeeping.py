"""SAEs that read normalised activations: what their last latents carry is no feature to list, match or count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from saelab import SAE, ActivationCache, build
from saelab.comparison import match_saes
from saelab.evaluation.seeds import shared_with_seeds, stability
from saelab.features import build_index
from saelab.features.by_example import find_by_example
from saelab.features.projection import lay_out
from saelab.features.saedashboard import write_dashboard
from saelab.features.search import count_states, counterparts
from saelab.prompt.contest import effects
from saelab.prompt.ranking import Known, rank
from saelab.prompt.reading import Reading, _encode
from saelab.runs import Run
from saelab.runs.inspection import inspect
from saelab.sae.normalised import KINDS, Normalised
from saelab.sae.weights import save

D_IN, LATENTS, ROWS, CONTEXT = 8, 20, 256, 16


def normalised(normalize: str, seed: int = 0) -> Normalised:
    torch.manual_seed(seed)
    inner = build("topk", D_IN, LATENTS, k=3).eval()
    with torch.no_grad():
        inner.b_dec.copy_(torch.randn(D_IN))
    return Normalised(inner, normalize).eval()


def cache_in(folder: Path) -> ActivationCache:
    acts = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(1)) + 2
    tokens = torch.arange(ROWS) % 7
    return ActivationCache.from_tensors(folder / "cache", acts, tokens, context_length=CONTEXT, held_out=0.25)


@pytest.mark.parametrize("normalize", sorted(KINDS))
def test_an_index_lists_features_alone(tmp_path: Path, normalize: str) -> None:
    sae, cache = normalised(normalize), cache_in(tmp_path)
    assert sae.d_sae > sae.n_features == LATENTS
    index = build_index(sae, cache, tmp_path / "run", token_strings=[f" t{i}" for i in range(7)])
    table = index.table()
    assert index.d_sae == LATENTS and table["latent"].tolist() == list(range(LATENTS)) and index.poles == (1,)
    acts = cache.read(range(ROWS)).acts
    dense = sae.encode(acts).dense()[:, :LATENTS].detach()
    assert table["count"].tolist() == (dense > 0).sum(0).tolist()
    assert table["max"].to_numpy() == pytest.approx(dense.amax(0).detach().numpy())
    expected = dict(sae.inner.named_parameters())["W_enc"].norm(dim=0).detach().numpy()
    assert table["encoder_norm"].to_numpy() == pytest.approx(expected)
    listed = index.columns(["neighbours", "partners"])
    assert max(max(row, default=0) for name in ("neighbours", "partners") for row in listed[name].to_pylist()) < LATENTS
    assert index.histogram_edges[-1] == pytest.approx(float(dense.max()))
    assert count_states(table)["ultra-dense"] == int(((dense > 0).double().mean(0) > 0.5).sum())
    folder = write_dashboard(index, sae, tmp_path / "dashboard")
    assert (folder / "batch-0.json").is_file()
    code, recon = _encode(sae, acts[:5], None)
    found = find_by_example(index, code, torch.tensor([True, True, False, False, False]))
    assert set(found["latent"]) == set(code.indices[:6].tolist()) < set(range(LATENTS))
    assert recon == pytest.approx(sae(acts[:5]).detach())  # which what the bookkeeping carries is part of


@pytest.mark.parametrize("normalize", sorted(KINDS))
def test_a_text_is_read_by_features_alone(tmp_path: Path, normalize: str) -> None:
    sae, acts = normalised(normalize), torch.randn(4, D_IN) + 2
    read = Reading([f" w{i}" for i in range(4)], acts, torch.randn(4, D_IN), *_encode(sae, acts, None))
    assert read.l0() == [3] * 4
    assert {latent for latent, _ in read.strongest(50)} < set(range(LATENTS))
    known = Known(np.ones((2, LATENTS)), np.full((2, LATENTS), 0.01), 100)
    for by in ("telling", "share", "activation", "effect"):
        assert {row.latent for row in rank(read, by, known, sae.W_dec)[0]} < set(range(LATENTS))
    assert {effect.latent for effect in effects(sae, acts[0], torch.randn(D_IN))} < set(range(LATENTS))


@pytest.mark.parametrize("normalize", sorted(KINDS))
def test_dictionaries_are_compared_by_features_alone(tmp_path: Path, normalize: str) -> None:
    sae, other = normalised(normalize), normalised(normalize, seed=1)
    with torch.no_grad():
        # The offsets and the all-ones direction agree, the features do not.
        other.W_dec[LATENTS:] = sae.W_dec[LATENTS:]
    shared = shared_with_seeds(sae, [other])["latents_shared_by_seeds"].value
    own = shared_with_seeds(sae.inner, [other.inner])["latents_shared_by_seeds"].value
    assert shared == own
    assert len(stability(sae, [other], ["b"]).found) == LATENTS
    matching = match_saes(sae, other, cache_in(tmp_path), shared=0.3)
    assert len(matching.left) == len(matching.right) == LATENTS
    assert matching.pairs[["left", "right"]].to_numpy().max() < LATENTS
    assert all(latent < LATENTS for latent, _ in (counterparts(d, {"o": other})["o"] for d in sae.W_dec))
    assert len(lay_out(sae)) == LATENTS


@pytest.mark.parametrize("normalize", sorted(KINDS))
def test_a_file_is_inspected_by_features_alone(tmp_path: Path, normalize: str) -> None:
    sae: SAE = normalised(normalize)
    with torch.no_grad():
        sae.inner.b_enc[3] = -1000.0  # pyright: ignore
    save(sae, tmp_path / "run")
    cache = cache_in(tmp_path)
    facts = inspect(tmp_path / "run", cache)
    dead = (sae.encode(cache.read(range(ROWS)).acts).dense()[:, :LATENTS] == 0).all(0).sum()
    assert Run.open(tmp_path / "run").d_sae == LATENTS
    assert facts["d_sae"] == LATENTS and facts["dead_estimate"] == int(dead) >= 1
    assert facts["decoder_norm"]["max"] == pytest.approx(1.0, abs=1e-5)
