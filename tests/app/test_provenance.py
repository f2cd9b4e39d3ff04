"""The commands beside the numbers: read by the command line itself, they give back what was recorded."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from small_workspace import make_cache, make_model
from test_pages import launch

from saelab import workspace
from saelab.cli.commands import evaluate as evaluate_cli
from saelab.cli.commands import index as index_cli
from saelab.cli.commands import train as train_cli
from saelab.cli.commands.index import LensOptions
from saelab.cli.models import ModelOptions
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.features import FeatureIndex, IndexConfig
from saelab.runs import Run
from saelab.sae import VARIANTS, build
from saelab.training import TrainConfig, fit_steps
from saelab.training.fitting import SOURCE

OTHER = {"k": 7, "signed": True, "beta": 0.25, "n_steps": 5, "stop_on_repeat": True, "groups": (0.25, 0.75)}


def words(command: str | None, name: str) -> list[str]:
    program, subcommand, *rest = shlex.split(command or "")
    assert (program, subcommand) == ("saelab", name)
    return rest


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("small")
    return make_cache(root, make_model(root / "model"), contexts=20)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_training_command_gives_the_recorded_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_cache: Any, variant: str
) -> None:
    cache = small_cache
    options = {name: value for name, value in OTHER.items() if name in build(variant, 32, 48).config}
    sae = build(variant, 32, 48, **options)
    config = TrainConfig(epochs=1, batch_size=64, decay="cosine", grad_clip=None, seed=5)
    list(fit_steps(sae, cache, config, tmp_path / "a run"))
    parsed: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(train_cli, "run", lambda options, config, source: parsed.append((options, config)))
    run = workspace.Workspace.scan(tmp_path).run("a run")
    train_cli.main(words(workspace.train_command(run), "train"))
    ((given, own),) = parsed
    recorded = json.loads((tmp_path / "a run" / "run.json").read_text())
    built = build(variant, 32, given.d_sae, **own)
    assert json.loads(json.dumps(built.config)) == recorded["config"]
    train = {f.name: getattr(given, f.name) for f in dataclasses.fields(TrainConfig)}
    assert train == recorded["train"] and (given.variant, str(given.out)) == (variant, "a run")
    assert str(given.cache) == recorded["cache"]


def test_the_training_command_of_a_fine_tuned_run_names_what_it_began_with(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "runs" / "topk" / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert "--from" not in words(workspace.train_command(Run(path=tmp_path, name="run")), "train")
    config["metadata"][SOURCE] = "some where/else"
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    command = words(workspace.train_command(Run(path=tmp_path, name="run")), "train")
    assert command[command.index("--from") + 1] == "some where/else"


def test_the_commands_of_metrics_and_index_give_the_recorded_settings(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    run = workspace.Workspace.scan(folder).run("runs/topk")
    assert words(workspace.evaluate_command(run), "evaluate")[:2] == ["runs/topk", "--cache"]
    cache = workspace.Workspace.scan(folder).cache_of(run)
    assert cache is not None
    config = EvaluateConfig(split="all", max_tokens=64, lm_tokens=0, density_tokens=10, seed=4)
    evaluate(run.sae, cache, config=config).save(tmp_path)
    for name in ("cfg.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run.path / name).read_bytes())
    parsed: list[Any] = []
    monkeypatch.setattr(evaluate_cli, "run", lambda *given, **_: parsed.append(given))
    monkeypatch.setattr(evaluate_cli, "show", lambda _: None)
    measured = Run(path=tmp_path, name="some where")
    number = workspace.numbers(measured)["fvu"]
    assert number.command == workspace.evaluate_command(measured)
    evaluate_cli.main(words(number.command, "evaluate"))
    assert tuple(map(str, parsed[0][:2])) == ("some where", str(cache.path))
    assert parsed[0][2] == ModelOptions() and parsed[0][3] == config

    index = FeatureIndex(run.path)
    monkeypatch.setattr(index_cli, "run", lambda *given: parsed.append(given))
    monkeypatch.setattr(index_cli, "show", lambda _: None)
    index_cli.main(words(workspace.index_command("runs/topk", index.meta), "index"))
    assert tuple(map(str, parsed[1][:2])) == ("runs/topk", str(cache.path)) and parsed[1][2] == LensOptions()
    assert parsed[1][3] == IndexConfig(bins=20)


def test_the_pages_show_the_commands_beside_their_numbers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = launch(monkeypatch, folder, model="none")
    app.selectbox(key="run").select("runs/topk").run()
    run = workspace.Workspace.scan(folder).run("runs/topk")
    train, index = workspace.train_command(run), workspace.index_command(run.name, FeatureIndex(run.path).meta)
    for view, commands in {
        "overview": {train},
        "training": {train},
        "features": {index},
        "latent": {index},
        "health": {index},
    }.items():
        app.switch_page(f"views/{view}.py").run()
        assert not app.exception, (view, app.exception)
        assert {item.value for item in app.code} == commands, view
