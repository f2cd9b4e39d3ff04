"""The command says where a few tokens hold most of the energy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from saelab.cli import main
from tests import tiny_lm


@pytest.mark.parametrize("factor", [1.0, 300.0])
def test_a_few_tokens_of_huge_norm_are_told(factor: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_lm.save_llama(tmp_path / "lm")
    text = tiny_lm.sentences(200)
    weights = load_file(folder / "model.safetensors")
    ids = tiny_lm.tokenizer()(text, add_special_tokens=False)["input_ids"]
    rare = Counter(ids[:100]).most_common()[-1][0]
    weights["model.embed_tokens.weight"][rare] *= factor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    arguments = ["--model", str(folder), "--text", str(tmp_path / "text.txt"), "--hook", "blocks.0.hook_resid_pre"]
    main(["harvest", *arguments, "--device", "cpu", "--out", str(tmp_path / "cache"), "--context-length", "32"])
    printed = " ".join(capsys.readouterr().err.split())
    assert ("note: uneven norms" in printed and "--max-norm" in printed) == (factor > 1)
