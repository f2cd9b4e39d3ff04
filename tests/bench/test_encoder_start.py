"""The comparison of encoders at the start runs, on the cache of an earlier version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saelab.bench import encoder_start
from saelab.errors import UserError

CACHE = Path(__file__).parents[1] / "data/v0.1.0/caches/post"


def test_each_start_trains_the_same_saes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "starts.json"
    arguments = ["--variants", "jump_relu", "topk", "--starts", "1", "0.1", "--d-sae", "64", "--l0", "4", "--out", out]
    rows = encoder_start.main([str(CACHE), "--batch-size", "32", "--epochs", "4", *map(str, arguments)])
    assert json.loads(out.read_text()) == rows and len(rows) == 4
    assert [(row["variant"], row["start"]) for row in rows] == [
        (variant, start) for variant in ("jump_relu", "topk") for start in (1.0, 0.1)
    ]
    assert len({row["fvu"] for row in rows}) == 4, "the start made no difference"
    assert "jump_relu" in capsys.readouterr().out


def test_options_and_the_rate_change_what_is_trained() -> None:
    def fvu(*more: str) -> float:
        arguments = ["--variants", "jump_relu", "--starts", "0.3", "--d-sae", "64", "--l0", "4", "--batch-size", "32"]
        return encoder_start.main([str(CACHE), *arguments, "--epochs", "4", *more])[0]["fvu"]

    usual = fvu()
    assert usual == fvu("--options", "penalty_warmup=0.3", "apply_b_dec_to_input=true", "--factor", "1")
    changed = (["--options", "apply_b_dec_to_input=false"], ["--factor", "0.5"], ["--b-dec-at-zero"])
    assert len({usual, *(fvu(*more) for more in changed)}) == 4
    with pytest.raises(UserError, match=r"--options bandwidth is not name=value"):
        fvu("--options", "bandwidth")
