"""What the app's tests share: the workspace with every variant, and a small one that a browser sees."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_workspace import make_cache, make_index, make_model, make_run, make_workspace
from streamlit.components.v2 import manifest_scanner

from saelab.sae import VARIANTS
from saelab.sae.weights import load_metadata, load_sae, save


@pytest.fixture(scope="session", autouse=True)
def _installed_components() -> Iterator[None]:
    """Looked for once: AppTest reads the metadata of every installed package each time a page runs."""
    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(manifest_scanner.scan_component_manifests)
        patch.setattr(manifest_scanner, "scan_component_manifests", once)
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace; read-only for tests."""
    return make_workspace(tmp_path_factory.mktemp("workspace"), list(VARIANTS))


@pytest.fixture(scope="session")
def sick_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small SAEs; one of them with three latents killed in three ways."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("browser")
    cache = make_cache(root, make_model(root / "model"))
    make_run(root / "signed", "abs_topk", cache)
    run = make_run(root / "sick", "topk", cache, k=4)
    sae = load_sae(run)
    with torch.no_grad():
        sae.W_enc[:, 0] *= 1e-3
        sae.b_enc[0] = 0.0
        sae.W_dec[1] = sae.W_dec[2]
        sae.b_enc[1] = sae.b_enc[3] = -100.0
    save(sae, run, load_metadata(run))
    for path in (root / "signed", run):
        make_index(path, cache)
    return root
