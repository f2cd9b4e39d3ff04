"""A new variant is one class: the registry, the trainer, checkpoints and the command line take it from there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saelab import cli, kernels
from saelab.data.cache import ActivationCache
from saelab.kernels import SelectedPreActs
from saelab.sae import VARIANTS, LinearSAE
from saelab.sae.weights import load_sae


@pytest.fixture
def every_other() -> Iterator[type[LinearSAE]]:
    class EveryOther(LinearSAE, variant="every_other"):
        """TopK among the even latents only."""

        def __init__(self, d_in: int, d_sae: int, k: int = 4) -> None:
            """
            Args:
                k: Even latents per token.
            """
            super().__init__(d_in, d_sae, k=k)
            self.k = k

        def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
            chosen = kernels.select_topk(x, self.W_enc[:, ::2], self.b_enc[::2], self.b_in, self.k)
            return chosen._replace(indices=2 * chosen.indices)

    yield EveryOther
    del VARIANTS["every_other"]


def test_one_class_is_a_variant(
    every_other: type[LinearSAE], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ActivationCache.from_tensors(tmp_path / "cache", torch.randn(2000, 8))
    options = ["--d-sae", "32", "--k", "3", "--epochs", "4", "--batch-size", "128", "--lr", "0.01", "--json"]
    cli.main(["train", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), "--variant", "every_other", *options])
    assert json.loads(capsys.readouterr().out)["fvu"] < 0.6
    sae = load_sae(tmp_path / "run")
    assert type(sae) is every_other and sae.config == {"d_in": 8, "d_sae": 32, "k": 3}
    code = sae.encode(torch.randn(50, 8))
    assert (code.indices % 2 == 0).all() and code.l0().max() == 3


def test_its_options_are_in_the_help(every_other: type[LinearSAE], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--variant", "every_other", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Even latents per token." in shown and "TopK among the even latents only." in shown
