"""Finding runs below a folder, and nothing outside it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from small_workspace import make_cache, make_model, make_run

from saelab import workspace
from saelab.errors import UserError
from saelab.runs import Run
from saelab.sae import build
from saelab.workspace import Workspace, recipes
from saelab.workspace.relatives import chance_cosine, relatives, same_start


def test_finds_runs_and_caches_at_any_depth(folder: Path) -> None:
    found = Workspace.scan(folder)
    assert "runs/topk" in found.runs and "cache" in found.caches
    run = found.run("runs/topk")
    assert (run.variant, run.d_sae, run.has_weights, run.has_index) == ("topk", 48, True, run.has_index)
    assert found.cache_of(run).fingerprint == run.metadata["cache_fingerprint"]
    assert found.model_of(run) == str(folder / "model")
    assert run.sae.d_sae == 48


def test_nothing_outside_the_folder_is_opened(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "link").symlink_to(folder / "runs", target_is_directory=True)
    found = Workspace.scan(tmp_path / "inner")
    assert not found.runs
    for path in ("../secret", "/etc/passwd", "link/topk"):
        with pytest.raises(UserError, match="outside"):
            found.inside(path)
    with pytest.raises(UserError, match="no run"):
        found.run("../runs/topk")


def test_a_model_outside_the_folder_is_not_trusted(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "elsewhere", make_model(tmp_path / "elsewhere" / "model"))
    make_run(tmp_path / "here" / "run", "topk", cache, k=2)
    found = Workspace.scan(tmp_path / "here")
    assert found.model_of(found.run("run")) is None
    assert found.cache_of(found.run("run")) is None


def test_a_growing_log_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1000)) + '{"step": 10')
    assert len(workspace.read_metrics(path)) == 1000
    assert workspace.read_metrics(path, tail=100)[-1] == {"step": 999}
    assert len(workspace.read_metrics(path, tail=100)) < 10
    thin = workspace.thin(workspace.read_metrics(path), most=7)
    assert len(thin) <= 7 and thin[-1]["step"] == 999
    path.write_text("{broken}\n")
    with pytest.raises(UserError, match="not JSON"):
        workspace.read_metrics(path)


def test_numbers_come_from_the_evaluation_where_there_is_one(folder: Path, tmp_path: Path) -> None:
    run = Run(path=tmp_path, name="x")
    for name in ("cfg.json", "metrics.jsonl"):
        (tmp_path / name).write_text((folder / "runs" / "topk" / name).read_text())
    before = workspace.numbers(run)
    assert before["l0"].source == "last training batch" and "ce_recovered" not in before
    row = {"value": 0.93, "low": 0.9, "high": 0.95, "n": 4000, "unit": "token", "formula": "(a - b) / (a - c)"}
    content = {"metrics": {"ce_loss_recovered_zero": row}, "settings": {"split": "held_out", "seed": 3}}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    after = workspace.numbers(Run(path=tmp_path, name="x"))
    assert after["ce_recovered"].value == 0.93
    for part in ("(a - b) / (a - c)", "4,000 tokens", "seed 3", "0.9 to 0.95", "saelab evaluate"):
        assert part in after["ce_recovered"].provenance()
    assert after["fvu"] == before["fvu"]
    # Its L0 is one of training rows, so it is no held-out point.
    points = workspace.pareto_points([Run(path=tmp_path, name="<b>")], "ce_recovered")
    assert not points, "without weights there is nothing that could be used"
    (tmp_path / "sae_weights.safetensors").write_bytes(
        (folder / "runs" / "topk" / "sae_weights.safetensors").read_bytes()
    )
    assert not workspace.pareto_points([Run(path=tmp_path, name="<b>")], "ce_recovered")
    ((point,),) = workspace.pareto_points([Run(path=tmp_path, name="<b>")], "ce_recovered", training=True).values()
    assert "&lt;b&gt;" in point.text and not point.held_out and (point.low, point.high) == (0.9, 0.95)
    content["metrics"]["l0"] = {"value": 4.0, "n": 4000, "unit": "token"}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    ((point,),) = workspace.pareto_points([Run(path=tmp_path, name="<b>")], "ce_recovered").values()
    assert point.held_out
    content["settings"]["split"] = "train"
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    assert not workspace.pareto_points([Run(path=tmp_path, name="<b>")], "ce_recovered")
    # Two widths of a variant are two series: a line between them would be no trade-off.
    shutil.copytree(tmp_path, tmp_path / "wide")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "wide" / "cfg.json").write_text(json.dumps({**config, "d_sae": 96}))
    both = [Run(path=tmp_path, name="narrow"), Run(path=tmp_path / "wide", name="wide")]
    assert set(workspace.pareto_points(both, "ce_recovered", training=True)) == {"topk 48", "topk 96"}
    # Neither would a line between two places of a model, or two models.
    config["metadata"]["hook_name"] = "blocks.7.hook_resid_post"
    (tmp_path / "wide" / "cfg.json").write_text(json.dumps(config))
    both[1] = Run(path=tmp_path / "wide", name="other")
    here, there = workspace.place(both[0]), workspace.place(both[1])
    assert there == "blocks.7.hook_resid_post" != here
    assert set(workspace.pareto_points(both, "ce_recovered", training=True)) == {f"topk {here}", f"topk {there}"}
    config["metadata"] |= {"hook_name": here, "model_name": "another"}
    (tmp_path / "wide" / "cfg.json").write_text(json.dumps(config))
    both[1] = Run(path=tmp_path / "wide", name="other")
    found = workspace.pareto_points(both, "ce_recovered", training=True)
    assert len(found) == 2 and f"topk another {here}" in found
    # By depth neither, though the layers differ; of one model they are a line.
    config["metadata"]["hook_name"] = "blocks.7.hook_resid_post"
    for model, lines in (("another", 0), (both[0].model_name, 1)):
        config["metadata"]["model_name"] = model
        (tmp_path / "wide" / "cfg.json").write_text(json.dumps(config))
        both[1] = Run(path=tmp_path / "wide", name="other")
        assert len(workspace.depth_points(both, "ce_recovered", training=True)) == lines
    (tmp_path / "wide" / "cfg.json").write_text("{")
    assert workspace.model_and_place(Run(path=tmp_path / "wide", name="damaged")) == ("", "")


def test_a_formula_says_which_rows_are_counted_and_what_x_is(folder: Path, tmp_path: Path) -> None:
    row = {"value": 0.2, "n": 4000, "unit": "token", "formula": "sum_t |x_t|^2"}
    dead = {"value": 0.0, "formula": "share in a window of 9,000 tokens"}
    settings = {"split": "held_out", "seed": 3, "density_tokens": 5000}
    config = json.loads((folder / "runs" / "topk" / "cfg.json").read_text())
    found = []
    for name in ("sae", "transcoder"):
        (tmp_path / name).mkdir()
        config["metadata"] |= {"hook_name_out": "blocks.0.hook_mlp_out"} if name == "transcoder" else {}
        (tmp_path / name / "cfg.json").write_text(json.dumps(config))
        content = {"metrics": {"fvu": row, "dead_fraction": dead}, "settings": settings}
        (tmp_path / name / "evaluation.json").write_text(json.dumps(content))
        found.append(workspace.numbers(Run(path=tmp_path / name, name=name)))
    assert found[0]["dead"].formula == "share in a window of 9,000 tokens, up to 5,000 of them training rows"
    assert [numbers["fvu"].formula for numbers in found] == [
        "sum_t |x_t|^2",
        "sum_t |x_t|^2, x: blocks.0.hook_mlp_out, which the transcoder reconstructs",
    ]


def test_a_run_is_running_interrupted_or_finished(folder: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"step": i, "tokens": i, "fvu": 0.5}) for i in range(1, 480)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "run.json").write_text('{"steps": 920}')
    run = Run(path=tmp_path, name="x")
    assert workspace.progress(run).text() == "running, step 479 of 920"
    os.utime(tmp_path / "metrics.jsonl", (1, 1))
    assert workspace.progress(run).text() == "interrupted, step 479 of 920"
    assert workspace.summary(run)["state"] == "interrupted, step 479 of 920"
    # Weights on disk do not make it complete.
    for name in ("cfg.json", "sae_weights.safetensors"):
        shutil.copy(folder / "runs" / "topk" / name, tmp_path / name)
    assert workspace.progress(Run(path=tmp_path, name="x")).state == "interrupted"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 920}) + "\n")
    assert workspace.progress(run).text() == "finished"
    assert workspace.progress(Run(path=folder / "runs" / "topk", name="x")).state == "finished"


def test_saes_of_one_seed_have_the_same_start(folder: Path, tmp_path: Path) -> None:
    runs = {}
    for name, seed, d_in in (("a", 0, 32), ("same", 0, 32), ("other", 1, 32), ("unknown", None, 32), ("wide", 1, 64)):
        shutil.copytree(folder / "runs" / ("abs_topk" if name == "other" else "topk"), tmp_path / name)
        config = json.loads((tmp_path / name / "cfg.json").read_text())
        config["metadata"]["train"]["seed"], config["d_in"] = seed, d_in
        (tmp_path / name / "cfg.json").write_text(json.dumps(config))
        runs[name] = Run(path=tmp_path / name, name=name)
    assert list(relatives(runs["a"], runs)) == ["other", "unknown", "same"]
    assert [same_start(runs["a"], runs[name]) for name in ("same", "other", "unknown")] == [True, False, None]


def test_the_same_sae_of_another_seed_comes_first(folder: Path, tmp_path: Path) -> None:
    runs = {}
    for name, seed, k, lr in (("a", 0, 4, 1e-3), ("b", 1, 8, 1e-3), ("c", 1, 4, 3e-3), ("twin", 1, 4, 1e-3)):
        shutil.copytree(folder / "runs" / "topk", tmp_path / name)
        config = json.loads((tmp_path / name / "cfg.json").read_text())
        config["metadata"]["train"] |= {"seed": seed, "lr": lr}
        config["metadata"]["saelab"]["config"]["k"] = k
        (tmp_path / name / "cfg.json").write_text(json.dumps(config))
        runs[name] = Run(path=tmp_path / name, name=name)
    assert list(relatives(runs["a"], runs)) == ["twin", "b", "c"]


def test_initial_rows_of_one_seed_are_the_same_whatever_variant_and_width() -> None:
    made = []
    for variant, d_sae, seed in (("topk", 40, 3), ("jump_relu", 96, 3), ("topk", 40, 4)):
        torch.manual_seed(seed)
        made.append(build(variant, 24, d_sae, **({"k": 3} if variant == "topk" else {})).W_dec.detach())
    torch.testing.assert_close(made[0], made[1][:40])
    assert (made[0] * made[2]).sum(1).abs().max() < 0.9


def test_the_chance_cosine_is_that_of_random_directions() -> None:
    torch.manual_seed(0)
    sae, other = (build("topk", 48, n, k=3) for n in (256, 512))
    # Isotropic rows: the largest of 512 cosines of standard deviation 1/sqrt(48), about 3.04 of them.
    assert chance_cosine(sae, other) == pytest.approx(3.04 / 48**0.5, rel=0.1)
    with torch.no_grad():  # all rows of both in one plane: there a random direction finds a close one
        for one in (sae, other):
            one.W_dec[:, 2:] = 0
    assert chance_cosine(sae, other) > 0.99


def test_a_damaged_configuration_is_one_row_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "cfg.json is damaged" in workspace.summary(Run(path=tmp_path, name="x"))["state"]
    (tmp_path / "cfg.json").write_text("[]")
    assert "holds no JSON object" in workspace.summary(Run(path=tmp_path, name="x"))["state"]


@pytest.mark.parametrize("content", ["{", "[]", '{"interventions": [3]}', '{"interventions": [], "provenance": [1]}'])
def test_a_damaged_recipe_is_one_row_not_a_crash(content: str, tmp_path: Path) -> None:
    (tmp_path / "recipes" / "torn").mkdir(parents=True)
    (tmp_path / "recipes" / "torn" / "recipe.json").write_text(content)
    (row,) = recipes.saved_recipes(tmp_path)
    assert row["name"] == "torn" and row["does"].startswith("damaged: ")
