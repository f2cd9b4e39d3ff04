"""Which number of active latents: on dictionaries with known overlap, and on planted worlds whose L0 is known."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from saelab.bench.overlap import world
from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.metrics import decoder_projections, match_dictionary, mean_cosine
from saelab.sae import build
from saelab.sae.weights import save
from saelab.sweep.guidance import Point, guidance, points_of
from saelab.training import TrainConfig, train


def test_overlap_and_projections_by_their_definitions() -> None:
    W, b = 3 * torch.randn(30, 8), torch.randn(8)
    W[4] = 0
    x = torch.randn(50, 8)
    unit = np.delete(W.numpy().astype(np.float64), 4, axis=0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = np.abs(unit @ unit.T)[~np.eye(29, dtype=bool)]
    assert mean_cosine(W) == pytest.approx(cosines.mean(), rel=1e-5)
    assert mean_cosine(torch.eye(8)) == pytest.approx(0, abs=1e-7)
    full = W.double() / W.double().norm(dim=1, keepdim=True).clamp_min(1e-30)
    for signed in (False, True):
        z = (x.double() - b) @ full.T
        values = np.sort((z.abs() if signed else z).numpy().ravel())[::-1]
        got = decoder_projections(x, W, b, [1, 7, 29], signed)
        assert got == pytest.approx([values[50 * n] for n in (1, 7, 29)], rel=1e-5, abs=1e-6)
    with pytest.raises(UserError, match="1 <= n < d_sae=30"):
        decoder_projections(x, W, b, [30])


def test_a_minimum_inside_is_named_and_one_at_the_edge_is_not() -> None:
    inside = [Point("topk 64", l0, abs(l0 - 12) / 100, seed) for l0 in (8, 12, 16) for seed in (0, 1)]
    (found,) = guidance(inside)
    assert found.l0 == 12 and found.between == (8, 16) and "2 seeds" in found.sentence
    for values, word in (((1, 2, 3), "smallest"), ((3, 2, 1), "largest")):
        (found,) = guidance([Point("a", l0, v) for l0, v in zip((8, 12, 16), values)])
        assert found.l0 is None and "cannot say" in found.sentence and word in found.sentence
    (found,) = guidance([Point("a", 8, 1.0), Point("a", 12, 0.5)])
    assert found.l0 is None and "at least 3" in found.sentence
    (found,) = guidance([*inside[:5]])  # a seed that lacks one of the numbers
    assert found.l0 is None and "cannot say" in found.sentence
    differ = [Point("a", l0, abs(l0 - right), s) for s, right in ((0, 8.4), (1, 13)) for l0 in (4, 8, 12, 16)]
    (found,) = guidance(differ)
    assert "which differ: 8, 12" in found.sentence
    assert guidance([Point("alone", 8, 1.0)]) == []
    row = {"variant": "topk", "d_sae": 64, "l0": 8.0, "seed": 1, "mean_cosine": 0.1, "options": '{"k": 8}'}
    assert points_of([row, {**row, "mean_cosine": None}]) == [Point("topk 64", 8.0, 0.1, 1)]


@pytest.mark.minutes
def test_the_minimum_is_within_15_percent_of_the_planted_l0(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    x, directions, truth = world(150_000, seed=1)
    assert truth == pytest.approx(11.1, abs=0.3)
    cache = ActivationCache.from_tensors(tmp_path / "cache", x, held_out=0.05)
    names, recovered = [], {}
    for k in (6, 8, 10, 11, 12, 14, 17):
        torch.manual_seed(0)
        sae = build("batch_topk", 100, 50, k=k)
        train(sae, cache, TrainConfig(epochs=6, batch_size=512, lr=3e-3))
        save(sae, tmp_path / f"k{k}")
        names.append(str(tmp_path / f"k{k}"))
        recovered[k] = match_dictionary(sae.W_dec, directions).mean_cosine
    main(["l0", *names, "--cache", str(tmp_path / "cache"), "--places", "18", "22", "--json"])
    found = json.loads(capsys.readouterr().out)
    by_cosine, *by_projection = found["guidance"]
    assert by_cosine["l0"] == pytest.approx(truth, rel=0.15)
    assert all(one["l0"] == pytest.approx(truth, rel=0.15) for one in by_projection)
    assert max(recovered, key=lambda k: recovered[k]) in (10, 11, 12, 14)  # which is what the number is good for


def test_a_sweep_over_k_and_width_says_what_it_can(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    x, _, _ = world(3000, seed=2)
    ActivationCache.from_tensors(tmp_path / "cache", x, held_out=0.2)
    grid = '[train]\nepochs = 2\nbatch_size = 100\n[[grid]]\nvariant = "topk"\nd_sae = [20, 40]\nk = [2, 4, 8]\n'
    (tmp_path / "grid.toml").write_text(grid)
    main(["sweep", str(tmp_path / "cache"), str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "Which number of active latents?" in shown and "topk at 4 active latents, 20 latents beside 40" in shown
    report = (tmp_path / "out" / "report.html").read_text()
    assert "L0 and c_dec" in report and "Hedging" in report
    main(["l0", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--json"])
    assert {row["group"] for row in json.loads(capsys.readouterr().out)["saes"]} == {"topk 20", "topk 40"}


def test_the_command_tells_rates_and_other_training_apart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cache = ActivationCache.from_tensors(tmp_path / "cache", torch.randn(400, 12), held_out=0.5)
    names = []
    for k, lr, epochs in itertools.product((2, 4), (1e-3, 2e-3), (1, 2)):
        names.append(str(tmp_path / f"{k}-{lr}-{epochs}"))
        own = {"seed": 0, "lr": lr, "epochs": epochs, "batch_size": 100}
        save(build("topk", 12, 12, k=k), Path(names[-1]), {"hook_name": "h", "train": own})
    main(["l0", *names, "--cache", str(cache.path), "--json"])
    found = Counter(row["group"] for row in json.loads(capsys.readouterr().out)["saes"])
    assert found == {f"topk 12 epochs={epochs} lr={lr}": 2 for epochs in (1, 2) for lr in (0.001, 0.002)}


def test_the_command_compares_runs_and_refuses_what_it_cannot_compare(tmp_path: Path, capsys) -> None:
    cache = ActivationCache.from_tensors(tmp_path / "cache", torch.randn(400, 12), held_out=0.5)
    names = []
    for k, overlap in ((2, 0.5), (4, 0.1), (8, 0.4)):
        sae = build("topk", 12, 12, k=k)
        with torch.no_grad():
            sae.W_dec.copy_(torch.nn.functional.normalize(torch.eye(12) + overlap, dim=1))
        save(sae, tmp_path / f"k{k}", {"hook_name": "h"})
        names.append(str(tmp_path / f"k{k}"))
    main(["l0", *names, "--cache", str(cache.path)])
    shown = capsys.readouterr().out
    assert "overlap least at L0 3.8" in " ".join(shown.split())
    for given, message in ((names[:1], "no comparison"), ([*names, "--places", "99"], "1 <= n")):
        with pytest.raises(SystemExit):
            main(["l0", *given, "--cache", str(cache.path)])
        assert message in " ".join(capsys.readouterr().err.split())
