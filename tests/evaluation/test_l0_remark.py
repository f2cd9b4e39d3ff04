"""A measured L0 is compared with the one that was asked for, whatever the variant calls it."""

from __future__ import annotations

import pytest

from saelab.evaluation import Evaluation, l0_remark
from saelab.metrics import Estimate
from saelab.sae import build


def measured(l0: float) -> Evaluation:
    return Evaluation({"l0": Estimate(l0, None, None, 100, "token", "mean number of active latents", "none")}, {}, {})


@pytest.mark.parametrize(
    ("variant", "options", "name"),
    [("topk", {"k": 20}, "k"), ("jump_relu", {"l0": 20}, "l0"), ("matching_pursuit", {"n_steps": 20}, "n_steps")],
)
def test_an_l0_beyond_five_per_cent_is_named_with_what_was_asked(variant: str, options: dict[str, int], name: str):
    sae = build(variant, 8, 64, **options)
    assert l0_remark(sae, measured(19.1)) is None
    assert l0_remark(sae, measured(20.9)) is None
    remark = l0_remark(sae, measured(23.0))
    assert remark is not None and f"L0 is 23 on these tokens where {name}=20 was asked for (+15.0%)" in remark
    assert "-10.0%" in str(l0_remark(sae, measured(18.0)))


def test_without_a_request_there_is_nothing_to_say():
    assert l0_remark(build("relu", 8, 64), measured(23.0)) is None
