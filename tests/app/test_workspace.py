"""Finding runs below a folder, and nothing outside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_workspace import make_cache, make_model, make_run

from saelab import workspace
from saelab.errors import UserError
from saelab.runs import Run
from saelab.workspace import Workspace, recipes


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
    points = workspace.pareto_points([Run(path=tmp_path, name="<b>")], "ce_recovered")
    assert "&lt;b&gt;" in points["topk"][0][2]
    # Two widths of a variant are two series: a line between them would be no trade-off.
    shutil.copytree(tmp_path, tmp_path / "wide")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "wide" / "cfg.json").write_text(json.dumps({**config, "d_sae": 96}))
    both = [Run(path=tmp_path, name="narrow"), Run(path=tmp_path / "wide", name="wide")]
    assert set(workspace.pareto_points(both, "ce_recovered")) == {"topk 48", "topk 96"}


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
