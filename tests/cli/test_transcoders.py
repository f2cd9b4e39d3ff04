"""From the text of a harvest at many hook points to measured transcoders, on the command line."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest

from saelab.cli import main
from saelab.features import FeatureIndex
from saelab.lm import load_hf_model
from saelab.runs import Run
from saelab.runs.card import model_card
from saelab.workspace import evaluate_command, train_command
from tests import tiny_lm

IN, OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
WIDE = "blocks.1.mlp.hook_post"  # 24 neurons, where the stream has width 16


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Caches of two layers' MLPs, from one pass."""
    root = tmp_path_factory.mktemp("harvest")
    (root / "text.txt").write_text(tiny_lm.sentences(1500))
    settings = ["--text", str(root / "text.txt"), "--tokens", "2000", "--context-length", "24", "--held-out", "0.2"]
    hooks = ["blocks.1,2.mlp.hook_in", "blocks.1-2.hook_mlp_out", WIDE]
    model = tiny_lm.save_llama(root / "lm")
    main(["harvest", "--model", str(model), "--hook", *hooks, *settings, "--out", str(root / "caches")])
    return root / "caches"


@pytest.fixture(scope="module")
def run(caches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "transcoder"
    train(caches, folder, "--skip")
    return folder


def train(caches, folder, *options, target=OUT):
    sizes = ["--d-sae", "32", "--k", "3", "--epochs", "2", "--batch-size", "128"]
    main(["train", str(caches / IN), "--target", str(caches / target), "--out", str(folder), *sizes, *options])


def test_one_harvest_makes_a_cache_for_each_hook_point(caches):
    found = sorted(path.name for path in caches.iterdir())
    layers = [f"blocks.{i}.{point}" for i in (1, 2) for point in ("hook_mlp_out", "mlp.hook_in")]
    assert found == sorted([*layers, WIDE])


def test_a_run_knows_both_places_and_finds_its_target(caches, run, capsys):
    opened = Run.open(run)
    assert (opened.hook_name, opened.hook_name_out, opened.sae.d_out) == (IN, OUT, 16)
    main(["evaluate", str(run), "--cache", str(caches / IN), "--lm-tokens", "500", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["hook_name_out"] == OUT
    assert {"fvu", "ce_loss_with_sae", "kl_div_with_sae"} <= found["metrics"].keys()
    main(["index", str(run), "--cache", str(caches / IN)])
    assert FeatureIndex(run).meta["logit_lens"]
    row = pd.read_parquet(run / "features" / "features.parquet").iloc[0]
    lm = load_hf_model(str(caches.parent / "lm"))
    effect = (opened.sae.W_dec[0] * lm.model.norm.weight) @ lm.lm_head.weight.T
    effect = (effect - effect.mean()).detach()
    assert row["promoted_logits"] == pytest.approx(effect[row["promoted_ids"].tolist()].numpy(), rel=1e-4)
    assert row["promoted_logits"][0] == pytest.approx(float(effect.max()), rel=1e-4)
    capsys.readouterr()
    main(["inspect", str(run), "--cache", str(caches / IN), "--json"])
    assert json.loads(capsys.readouterr().out)["fvu"] is not None
    main(["find", "the [[cat sat]] on", str(run), "--json"])
    assert {"latent", "specificity"} <= json.loads(capsys.readouterr().out)[0].keys()


def test_its_command_and_its_card_name_the_target(caches, run):
    command = train_command(Run.open(run))
    assert command is not None and f"--target {caches / OUT}" in command and "--skip" in command
    assert "--d-out" not in command and "--target" in evaluate_command(Run.open(run))
    card = model_card(Run.open(run))
    assert "A transcoder trained" in card and f"| reconstructs | {OUT} |" in card


def test_resumed_and_fine_tuned(caches, run, tmp_path, capsys):
    main(["train", str(caches / IN), "--out", str(run), "--resume"])
    assert "finished; nothing to resume" in " ".join(capsys.readouterr().err.split())
    for other in (["--k", "5"], ["--epochs", "7"], ["--lr", "0.1"], ["--variant", "abs_topk"]):
        with pytest.raises(SystemExit):
            main(["train", str(caches / IN), "--out", str(run), "--resume", *other])
        said = " ".join(capsys.readouterr().err.split())
        assert f"{other[0][2:]}={other[1]} differs from" in said and "of the finished run" in said
    main(["train", str(caches / IN), "--out", str(run), "--resume", "--lr", "auto"])
    options = ["--epochs", "1", "--batch-size", "128", "--out", str(tmp_path / "more")]
    main(["train", str(caches / IN), "--target", str(caches / OUT), "--from", str(run), *options])
    assert Run.open(tmp_path / "more").sae.W_skip is not None


@pytest.mark.parametrize(
    ("options", "target", "why"),
    [
        ([], WIDE, "has width 24, not 16 as the input; give d_out=24 if that is meant"),
        (["--d-out", "20"], WIDE, "has width 24, not d_out=20"),
        ([], IN, "is both the input and the target"),
        (["--variant", "matching_pursuit", "--n-steps", "3"], OUT, "one dictionary"),
    ],
)
def test_refusals(caches, tmp_path, capsys, options, target, why):
    sizes = ["--d-sae", "32", "--epochs", "1", "--batch-size", "128"]
    with pytest.raises(SystemExit):
        main(
            [
                "train",
                str(caches / IN),
                "--target",
                str(caches / target),
                "--out",
                str(tmp_path / "x"),
                *sizes,
                *options,
            ]
        )
    err = capsys.readouterr().err
    assert why in " ".join(err.split()) and "Traceback" not in err


def test_another_width_is_trained_where_it_is_said(caches, tmp_path):
    train(caches, tmp_path / "wide", "--d-out", "24", target=WIDE)
    assert Run.open(tmp_path / "wide").sae.d_out == 24


def test_a_target_that_is_not_beside_the_cache_is_asked_for(caches, run, tmp_path, capsys):
    shutil.copytree(caches / IN, tmp_path / "alone")
    shutil.copytree(run, tmp_path / "run")
    cfg = json.loads((tmp_path / "run" / "cfg.json").read_text())
    cfg["metadata"]["target_cache"] = "gone"
    (tmp_path / "run" / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "run"), "--cache", str(tmp_path / "alone"), "--lm-tokens", "0"])
    assert f"no cache of its target {OUT} lies beside" in " ".join(capsys.readouterr().err.split())
