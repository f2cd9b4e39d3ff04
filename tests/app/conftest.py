"""The workspace that the app's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_workspace import make_workspace

from saelab.sae import VARIANTS


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace; read-only for tests."""
    return make_workspace(tmp_path_factory.mktemp("workspace"), list(VARIANTS))
