"""The table of docs/models.md says what saelab does."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

from tests.zoo import table
from tests.zoo.families import FAMILIES


@pytest.mark.filterwarnings("ignore")
def test_the_table_is_current() -> None:
    assert table.written() == table.render(), "run: python -m tests.zoo.table"


@pytest.mark.skipif(version("transformer-lens").startswith("3."), reason="the page is about the current release")
def test_the_families_that_transformer_lens_does_not_know() -> None:
    unknown = {name for name, family in FAMILIES.items() if family.model not in SUPPORTED_ARCHITECTURES}
    assert unknown == table.UNKNOWN_TO_TRANSFORMER_LENS
