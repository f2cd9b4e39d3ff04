"""``Run``: every tool's SAE is found, opened and described the same way, and nothing is fetched by mistake."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saelab import ActivationCache, Run, load
from saelab.cli import main
from saelab.errors import UserError
from saelab.interop import FORMATS
from saelab.interop.fetch import resolve
from saelab.sae import build
from saelab.sae.weights import load_sae, save
from saelab.workspace import Workspace, summary
from tests.hardening.vendors import D_IN, D_SAE, VENDORS

HOOK = "blocks.1.hook_mlp_out"


def run_folder(folder: Path, **metadata: str) -> Path:
    save(build("topk", D_IN, D_SAE, k=2), folder, metadata)
    return folder


@pytest.mark.parametrize("vendor", VENDORS)
def test_every_format_is_found_below_a_folder(vendor: str, tmp_path: Path) -> None:
    path = VENDORS[vendor](tmp_path / "deep" / vendor)
    assert [name for name, form in FORMATS.items() if form.sniff(path)] == [vendor.split("_flat")[0].removesuffix("_2")]
    run = Workspace.scan(tmp_path).run(path.relative_to(tmp_path).as_posix())
    assert Run.scan(tmp_path).keys() == {run.name}
    assert run.is_foreign and run.has_weights and (run.d_sae, run.config["d_in"]) == (D_SAE, D_IN)
    assert summary(run)["state"] == f"from {run.format}"
    x = torch.randn(5, D_IN)
    assert torch.equal(run.sae(x), load(path)(x)) and torch.equal(Run.open(path).sae(x), load(path)(x))


def test_files_of_other_kinds_are_not_listed(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "aeroplanes.pt")
    (tmp_path / "noise.pt").write_bytes(os.urandom(50))
    (tmp_path / "config.json").write_text("{}")
    assert Run.scan(tmp_path) == {}
    with pytest.raises(UserError, match="no SAE format known here"):
        Run.open(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        Run.scan(tmp_path / "missing")


@pytest.mark.parametrize("vendor", ["llama_scope", "openai", "saelens"])
def test_an_sae_that_is_partly_a_link_is_not_listed(vendor: str, tmp_path: Path) -> None:
    path = VENDORS[vendor](tmp_path / "outside")
    (tmp_path / "work").mkdir()
    for part in path.iterdir() if path.is_dir() else [path]:
        if part.name.endswith(".json"):
            (tmp_path / "work" / part.name).write_bytes(part.read_bytes())
        else:
            (tmp_path / "work" / part.name).symlink_to(part)
    assert Run.scan(tmp_path / "work") == {}


def test_checkpoints_of_a_run_are_not_runs(tmp_path: Path) -> None:
    run_folder(tmp_path / "run")
    run_folder(tmp_path / "run" / "checkpoints" / "step_1")
    run_folder(tmp_path / "checkpoints" / "other")
    assert list(Run.scan(tmp_path)) == ["checkpoints/other", "run"]


def test_what_the_files_say_what_the_index_adds_and_what_the_user_says(tmp_path: Path) -> None:
    path = VENDORS["sparsify"](tmp_path / "plain")
    with pytest.raises(UserError, match=r"plain does not record its hook point; give hook_name"):
        _ = Run.open(path).hook_name
    assert Run.open(VENDORS["sparsify"](tmp_path / "layers.1")).hook_name == "layers.1"
    tokens = torch.randint(4, 90, (300,))
    acts = torch.randn(300, D_IN)
    ActivationCache.from_tensors(tmp_path / "cache", acts, tokens, context_length=20, hook_name=HOOK, model="tiny")
    main(["index", str(path), "--cache", str(tmp_path / "cache"), "--model", "none"])
    run = Run.open(path)
    assert (run.hook_name, run.model_name) == (HOOK, "tiny")
    assert "hook_name" not in run.recorded
    assert Run.open(path, "blocks.0.hook_mlp_out").hook_name == "blocks.0.hook_mlp_out"


def test_an_sae_in_memory(tmp_path: Path) -> None:
    sae = build("topk", D_IN, D_SAE, k=2)
    run = Run(sae, HOOK, rms_norm=3.0)
    assert (run.hook_name, run.rms_norm, run.index, run.evaluation) == (HOOK, 3.0, None, {})
    assert (run.variant, run.d_sae, run.has_weights) == ("topk", D_SAE, True)
    with pytest.raises(UserError, match="either an SAE in memory or the path"):
        Run()


def test_a_run_in_training_is_listed_and_says_that_it_has_no_weights(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    run = Run.open(tmp_path)
    assert (run.has_weights, run.last_step) == (False, {"step": 3})
    with pytest.raises(UserError, match="no weights yet"):
        _ = run.sae


@pytest.mark.parametrize("command", ["inspect", "evaluate", "index", "convert", "train", "steer"])
def test_every_command_prints_the_readers_notes_once(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = VENDORS["sparsify"](tmp_path / "layers.1")
    ActivationCache.from_tensors(tmp_path / "cache", torch.randn(300, D_IN), torch.randint(4, 90, (300,)))
    sae, cache, new = str(path), ["--cache", str(tmp_path / "cache")], str(tmp_path / "new")
    args = {
        "inspect": [sae],
        "evaluate": [sae, *cache, "--lm-tokens", "0"],
        "index": [sae, *cache, "--model", "none"],
        "convert": [sae, new, "--to", "sparsify"],
        "train": [cache[1], "--from", sae, "--out", new, "--epochs", "1", "--batch-size", "100"],
        "steer": [sae, "--latent", "1", "--strength", "2", "--prompt", "x", "--model", str(tmp_path / "none")],
    }[command]
    # Steering would go on with the language model, which is not there.
    with contextlib.suppress(SystemExit) if command == "steer" else contextlib.nullcontext():
        main([command, *args])
    printed = capsys.readouterr()
    assert (printed.out + printed.err).replace("\n", " ").count("num_latents is 0 in its configuration") == 1


class TestHubIds:
    """``hf://`` is the hub; a bare ``org/repo`` only where nothing here could have been meant."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
        """Hub ids that were fetched; all of them are one run folder."""
        fetched: list[str] = []
        folder = run_folder(tmp_path / "hub" / "snapshot", model_name="tiny", hook_name=HOOK)

        def download(hub_id: str, revision: str | None = None) -> Path:
            fetched.append(hub_id)
            if "gone" in hub_id:
                raise UserError(f"{hub_id} could not be fetched from the hub (404); check its name")
            return folder

        monkeypatch.setattr("saelab.interop.fetch.download", download)
        (tmp_path / "here" / "runs").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "here")
        yield fetched

    def test_which_names_are_asked(self, asked: list[str]) -> None:
        for name in ("hf://org/repo", "hf://org/repo/a/b", Path("hf://org/repo"), "org/repo", "hf://runs/x"):
            resolve(name)
        assert asked == ["org/repo", "org/repo/a/b", "org/repo", "org/repo", "runs/x"]
        for name in ("runs/topkk", "runs/a/b", "./org/repo", "/org/repo", "topk", "../org/repo", "~/org/repo"):
            with pytest.raises(UserError, match=r"does not exist"):
                resolve(name)
        assert len(asked) == 5
        with pytest.raises(UserError, match=r"does not exist in runs here; .* write hf://runs/topkk"):
            resolve("runs/topkk")
        with pytest.raises(UserError, match=r"does not exist here, and neither does a folder org; .*404"):
            resolve("org/gone")

    @pytest.mark.parametrize("command", ["inspect", "evaluate", "index", "convert", "train", "steer"])
    def test_a_mistyped_path_is_asked_by_no_command(
        self, command: str, asked: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        ActivationCache.from_tensors(Path("cache"), torch.randn(30, D_IN))
        args = {
            "inspect": ["runs/topkk"],
            "evaluate": ["runs/topkk", "--cache", "cache"],
            "index": ["runs/topkk", "--cache", "cache"],
            "convert": ["runs/topkk", "new"],
            "train": ["cache", "--from", "runs/topkk", "--out", "new"],
            "steer": ["runs/topkk", "--latent", "1", "--prompt", "x"],
        }[command]
        with pytest.raises(SystemExit) as stop:
            main([command, *args])
        assert stop.value.code == 2 and "does not exist in runs here" in capsys.readouterr().err.replace("\n", " ")
        assert asked == []

    @pytest.mark.parametrize("name", ["hf://org/repo/layers.1", "org/repo/layers.1"])
    @pytest.mark.parametrize("out", [None, "mine"])
    def test_results_go_into_a_copy_and_not_into_the_hubs_cache(
        self, name: str, out: str | None, asked: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        ActivationCache.from_tensors(Path("cache"), torch.randn(300, D_IN), torch.randint(4, 90, (300,)))
        before = sorted(file.name for file in (tmp_path / "hub" / "snapshot").iterdir())
        more = ["--cache", "cache", *(["--out", out] if out else [])]
        folder = Path(out or "repo/layers.1")
        main(["evaluate", name, *more, "--lm-tokens", "0", "--json"])
        printed = capsys.readouterr()
        assert str(folder / "evaluation.json") in printed.err.replace("\n", "")
        assert json.loads((folder / "evaluation.json").read_text()) == json.loads(printed.out)
        main(["index", name, *more, "--model", "none"])  # the copy that is there is used
        assert sorted(file.name for file in (tmp_path / "hub" / "snapshot").iterdir()) == before
        run = Run.open(folder)
        assert run.index is not None and run.evaluation
        assert torch.equal(run.sae.W_dec, load_sae(tmp_path / "hub" / "snapshot").W_dec)

    def test_another_folder_of_that_name_is_left_alone(
        self, asked: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        ActivationCache.from_tensors(Path("cache"), torch.randn(300, D_IN))
        Path("repo").mkdir()
        with pytest.raises(SystemExit):
            main(["evaluate", "hf://org/repo", "--cache", "cache", "--lm-tokens", "0"])
        assert "name a new folder with --out" in capsys.readouterr().err.replace("\n", " ")
        assert list(Path("repo").iterdir()) == []
