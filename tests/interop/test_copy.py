"""A run folder in 16 bits: the same SAE but for rounding, loadable by saelab and by SAELens, with its card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from saelab import build
from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.interop import load
from saelab.interop.conversion import CURVE_LINES, resave, rounded, thinned
from saelab.layout import WEIGHTS
from saelab.runs import Run
from saelab.runs.card import model_card
from saelab.runs.inspection import inspect
from saelab.sae import VARIANTS
from saelab.sae.weights import save


def made(variant: str, folder: Path) -> Path:
    torch.manual_seed(0)
    sae = build(variant, d_in=12, d_sae=40)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save(sae, folder, {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"})
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_matrices_take_half_the_bytes_and_lose_only_their_rounding(variant: str, tmp_path: Path) -> None:
    source = made(variant, tmp_path / "run")
    main(["convert", str(source), str(tmp_path / "half"), "--to", "saelab", "--dtype", "float16"])
    saved = load_file(tmp_path / "half" / WEIGHTS)
    assert {value.dtype for value in saved.values() if value.ndim == 2} == {torch.float16}
    assert {value.dtype for value in saved.values() if value.ndim == 1} == {torch.float32}

    before, after = load(source), load(tmp_path / "half")
    for name, value in before.state_dict().items():
        expected = value.half().to(value.dtype) if value.ndim == 2 else value
        assert torch.equal(after.state_dict()[name], expected), name
    assert after.W_dec.dtype == torch.float32
    assert (tmp_path / "half" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_copy_that_is_not_the_sae_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made("topk", tmp_path / "run")
    sae, other = load(source), load(source)
    with torch.no_grad():
        other.W_dec.mul_(2)
    monkeypatch.setattr("saelab.interop.conversion.rounded", lambda sae, dtype: other)
    with pytest.raises(UserError, match="nothing was written"):
        resave(sae, source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert not list(tmp_path.glob(".copy*"))


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    long = [str(i) for i in range(1000)]
    kept = thinned(long)
    assert len(kept) == len(set(kept)) == CURVE_LINES
    assert (kept[0], kept[-1]) == (long[0], long[-1])
    assert thinned(long[:7]) == long[:7]
    assert thinned(long[:1]) == long[:1]
    assert thinned([]) == []


def test_rounding_touches_matrices_alone() -> None:
    torch.manual_seed(0)
    sae = build("topk", d_in=6, d_sae=9, k=2)
    with torch.no_grad():
        sae.b_enc += torch.randn(9)
    twin = rounded(sae, torch.bfloat16)
    assert torch.equal(twin.b_enc, sae.b_enc)
    assert torch.equal(twin.W_dec, sae.W_dec.bfloat16().float())
    assert not torch.equal(twin.W_dec, sae.W_dec)


def test_sixteen_bits_are_refused_for_other_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made("topk", tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(source), str(tmp_path / "x"), "--to", "sparsify", "--dtype", "float16"])
    assert stop.value.code == 2
    assert "--to saelab" in capsys.readouterr().err


def test_saelens_computes_in_float32_from_a_folder_in_16_bits(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens lives in the environment of `make test-interop`")
    source = made("topk", tmp_path / "run")
    resave(load(source), source, tmp_path / "half", dtype=torch.float16)
    ours, theirs = load(tmp_path / "half"), sae_lens.SAE.load_from_disk(str(tmp_path / "half"))
    x = torch.randn(32, 12)
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(theirs.encode(x), ours.encode(x).dense(), atol=1e-5, rtol=1e-5)


def test_a_card_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made("topk", tmp_path / "run")
    (run / "README.md").write_text("the old card")
    write = Path.write_text

    def full_disk(self: Path, text: str, **options: Any) -> int:
        write(self, text[:10], **options)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises((OSError, SystemExit)):
            main(["card", str(run)])
    assert (run / "README.md").read_text() == "the old card"


def test_card_says_what_the_run_is_and_how_to_load_it(tmp_path: Path) -> None:
    run = made("abs_topk", tmp_path / "run")
    main(["card", str(run)])
    card = (run / "README.md").read_text()
    assert "abs_topk" in card
    assert "blocks.1.hook_resid_post" in card
    assert 'saelab.load("run")' in card
    assert "Not evaluated yet" in card
    cache = ActivationCache.from_tensors(tmp_path / "cache", torch.randn(1000, 12))
    evaluate(load(run), cache, config=EvaluateConfig(density_tokens=150)).save(run)
    main(["card", str(run)])
    fvu, dead = (re.findall(rf"\| {name} \|.*", (run / "README.md").read_text()) for name in ("fvu", "dead_fraction"))
    said = "Shares of latents are counted over a window of 200 tokens."
    assert said in (run / "README.md").read_text()
    assert fvu[0].endswith(" | 50 tokens |") and " to " in fvu[0]
    assert dead[0].endswith(" | 40 latents |")
    main(["card", str(run), "--repo", "org/name"])
    assert 'from_pretrained("org/name", "blocks.1.hook_resid_post")' in (run / "README.md").read_text()


def test_inspection_agrees_with_the_evaluation(tmp_path: Path) -> None:
    run = made("topk", tmp_path / "run")
    acts = torch.randn(1000, 12) + torch.arange(1000)[:, None] / 300  # the first rows have another mean than all
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts, held_out=0.0)
    config = EvaluateConfig(split="train", max_tokens=200)
    found = evaluate(load(run), cache, config=config)
    found.save(run)
    facts = inspect(run)
    assert facts["dead_estimate"] == round(found["dead_fraction"] * 40)
    assert facts["dead_estimate_from"] == f"its evaluation on {found.histogram['tokens']:,} tokens"
    measured = inspect(run, cache, max_rows=200)
    assert measured["fvu"] == pytest.approx(found["fvu"], rel=1e-6)
    assert measured["dead_estimate_from"].startswith("200 rows of")
    (run / "evaluation.json").write_text('{"saelab_version": "0", "metrics": []}')
    for read in (lambda: inspect(run), lambda: model_card(Run.open(run))):
        with pytest.raises(UserError, match=r"evaluation.json is damaged .*evaluate"):
            read()
    counted = '"metrics": {"dead_fraction": {"value": 0.5, "n": 38}}, "density_histogram": {"tokens": 9}'
    (run / "evaluation.json").write_text(f'{{"saelab_version": "0", {counted}}}')
    assert inspect(run)["dead_estimate"] == 19  # of the latents that were counted: bookkeeping ones are not
    (run / "evaluation.json").write_text('{"another": "tool"}')
    assert "dead_estimate_from" in inspect(run)
