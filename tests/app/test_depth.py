"""Transcoders of two layers in the app: every page works, and the overview shows their quality by depth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_workspace import CONTEXT, D_MODEL, D_SAE, make_model
from streamlit.testing.v1 import AppTest

from saelab.data.cache import ActivationCache
from saelab.evaluation import evaluate
from saelab.features import IndexConfig, build_index
from saelab.sae import build
from saelab.training import TrainConfig, train
from saelab.workspace import collections
from saelab.workspace.collections import Member

ENTRY = Path(__file__).parents[2] / "app" / "streamlit_app.py"
VIEWS = sorted(path.name for path in (ENTRY.parent / "views").glob("*.py"))


@pytest.fixture(scope="module")
def transcoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, what the MLPs of its two layers read and give, and a transcoder for each."""
    from transformers import GPT2LMHeadModel

    root = tmp_path_factory.mktemp("depth")
    model = make_model(root / "model")
    lm = GPT2LMHeadModel.from_pretrained(model).eval()
    tokens = torch.randint(2, lm.config.vocab_size, (60, CONTEXT), generator=torch.Generator().manual_seed(0))
    for layer, block in enumerate(lm.transformer.h):
        seen: list[torch.Tensor] = []
        handle = block.mlp.register_forward_hook(lambda _, args, out, seen=seen: seen.extend((args[0], out)))
        with torch.no_grad():
            lm(tokens)
        handle.remove()
        caches = [
            ActivationCache.from_tensors(root / name, acts, tokens, held_out=0.1, model=str(model), hook_name=name)
            for name, acts in zip((f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"), seen)
        ]
        cache, out = caches[0].with_target(caches[1]), root / "runs" / f"layer{layer}"
        sae = build("topk", D_MODEL, D_SAE, d_out=D_MODEL, k=4, skip=bool(layer))
        train(sae, cache, TrainConfig(epochs=2, batch_size=128, lr=2e-3), out)
        build_index(sae, cache, out, config=IndexConfig(bins=20))
        evaluate(sae, cache).save(out)
        if not layer:  # an SAE of the place that the transcoder reads, and one that was trained with another seed
            for seed in (0, 1):
                beside = build("topk", D_MODEL, D_SAE, k=4)
                train(beside, caches[0], TrainConfig(epochs=1, batch_size=128, lr=2e-3, seed=seed), root / f"sae{seed}")
    return root


def test_every_page_works_with_transcoders(monkeypatch: pytest.MonkeyPatch, transcoders: Path) -> None:
    monkeypatch.setenv("SAELAB_APP_FOLDER", str(transcoders))
    monkeypatch.setenv("SAELAB_APP_MODEL", str(transcoders / "model"))
    app = AppTest.from_file(ENTRY, default_timeout=60).run()
    assert not app.exception, app.exception
    app.selectbox(key="run").select("runs/layer0")
    for view in VIEWS:
        app.switch_page(f"views/{view}").run()
        assert not app.exception and not app.error, (view, app.exception, app.error)
    app.switch_page("views/prompt.py").run()
    app.text_area[0].set_value("the river runs past a mill").run()
    next(button for button in app.button if button.label == "Read").click().run()
    assert not app.exception and not app.error, (app.exception, app.error)
    assert "Latents on this text" in [heading.value for heading in app.subheader]
    lost = "‖y − ŷ‖² / ‖y‖², y being the output that the transcoder reconstructs (blocks.0.hook_mlp_out), per token"
    assert any(caption.value.startswith(lost) for caption in app.caption)
    # A transcoder and an SAE of the place that it reads reconstruct different activations: neither is offered beside
    # the other, on any page.
    assert [box for box in app.multiselect if box.key == "prompt_beside"] == []
    for run, beside in (("runs/layer0", []), ("sae0", ["sae1"])):
        app.selectbox(key="run").select(run)
        app.switch_page("views/prompt.py").run()
        assert not app.exception and not app.error, (app.exception, app.error)
        assert [box.options for box in app.multiselect if box.key == "prompt_beside"] == ([beside] if beside else [])
        app.switch_page("views/compare.py").run()
        offered = [option.split()[0] for box in app.selectbox if box.key == "compare_right" for option in box.options]
        assert offered == beside, (run, offered)
    collections.add(transcoders, "both", [Member("runs/layer0", 3), Member("sae0", 3)])
    app.switch_page("views/collections.py").run()
    app.toggle(key="c_across").set_value(True).run()
    assert not app.exception and not app.error, (app.exception, app.error)
    table = app.dataframe[-1].value
    assert "runs/layer1" not in table and set(table.columns) == {"SAE", "latent", "pole", "sae1"}
    assert table["sae1"].isna().tolist() == [True, False]


def test_the_overview_is_ordered_by_layer(monkeypatch: pytest.MonkeyPatch, transcoders: Path) -> None:
    monkeypatch.setenv("SAELAB_APP_FOLDER", str(transcoders))
    monkeypatch.delenv("SAELAB_APP_MODEL", raising=False)
    app = AppTest.from_file(ENTRY, default_timeout=60)
    app.switch_page("views/overview.py").run()
    assert app.dataframe[0].value["layer"].tolist() == [0, 0, 0, 1]
    assert "Quality by depth" in [heading.value for heading in app.subheader]
