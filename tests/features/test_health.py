"""Causes of death, the audit of dense latents, search by example, and the two poles of a latent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from saelab import SAE, ActivationCache, SparseCode, UserError, build
from saelab.features import FeatureIndex, IndexConfig, build_index
from saelab.features.by_example import find_by_example
from saelab.features.health import CAUSES, audit_dense, causes_of_death
from saelab.features.poles import axis_score
from saelab.sae.normalised import Normalised

CONTEXT = 16


class Recall(SAE):
    """Returns planted codes: the first coordinate of ``x`` is the row."""

    variant = "recall"

    def __init__(self, code: torch.Tensor) -> None:
        super().__init__(4, code.shape[1])
        self.code = code
        self.signed = bool((code < 0).any())

    def encode(self, x: torch.Tensor, grads: torch.Tensor | None = None) -> SparseCode:
        return SparseCode.from_dense(self.code[x[:, 0].long()])


def make(
    folder: Path,
    code: torch.Tensor,
    tokens: torch.Tensor,
    acts: torch.Tensor | None = None,
    config: IndexConfig | None = None,
) -> FeatureIndex:
    acts = torch.randn(len(code), 4) if acts is None else acts
    acts[:, 0] = torch.arange(len(code))
    cache = ActivationCache.from_tensors(folder / "cache", acts, tokens, context_length=CONTEXT)
    words = [f" w{i}" for i in range(int(tokens.max()) + 1)]
    return build_index(Recall(code), cache, folder / "run", token_strings=words, config=config or IndexConfig())


def clinic(tmp_path: Path) -> tuple[SAE, ActivationCache, list[str]]:
    """Latents 0-2 live; each of the others is dead for one reason."""
    sae = build("topk", 6, 8, k=2).eval()
    eye = torch.eye(6)
    weak = 0.5 * eye[0]
    with torch.no_grad():
        sae.W_dec.copy_(torch.stack([eye[0], eye[1], eye[2], eye[0], eye[4], eye[4], eye[3], eye[5]]))
        enc = torch.stack([eye[0], eye[1], eye[2], weak, 0.01 * eye[4], eye[4], eye[3], eye[5]])
        dict(sae.named_parameters())["W_enc"].copy_(enc.T)
        dict(sae.named_parameters())["b_enc"][5] = -100.0
    x = torch.rand(256, 6) + 1
    x[:, 3] *= 0.1
    x[:, 5] *= -1
    cache = ActivationCache.from_tensors(tmp_path / "cache", x)
    return sae, cache, ["duplicate", "encoder collapsed", "bias too low", "out-competed", "never fired"]


def test_each_cause_of_death_is_told(tmp_path: Path) -> None:
    sae, cache, causes = clinic(tmp_path)
    acts = cache.read(range(256)).acts
    dense = sae.encode(acts).dense().detach()
    counts = (dense != 0).sum(0).numpy()
    assert (counts > 0).tolist() == [True] * 3 + [False] * 5
    table = causes_of_death(sae, counts, cache)
    assert table["latent"].tolist() == [3, 4, 5, 6, 7]
    assert table["cause"].tolist() == causes
    assert set(causes) < set(CAUSES)
    assert table["neighbour"][0] == 0 and table["cosine"][0] == pytest.approx(1.0)
    pre = acts @ dict(sae.named_parameters())["W_enc"].detach()
    assert table["best_without_bias"].to_numpy() == pytest.approx(pre[:, 3:].amax(0).numpy())
    smallest = dense.masked_fill(dense == 0, torch.inf).amin(1)
    expected = (smallest[:, None] - pre[:, 3:] + torch.tensor([0, 0, 100.0, 0, 0])).amin(0)
    assert table["shortfall"].to_numpy() == pytest.approx(expected.numpy(), rel=1e-5)


def test_where_each_latent_has_a_threshold_that_is_the_cause(tmp_path: Path) -> None:
    sae, acts = build("jump_relu", 6, 8).eval(), torch.randn(200, 6)
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts)
    cuts = torch.tensor([0.0] * 5 + [50.0, 60.0, 0.0])
    parameters = dict(sae.named_parameters())
    with torch.no_grad():
        parameters["threshold"].copy_(cuts)
        parameters["b_enc"][7] = -100.0
    counts = np.array([9] * 5 + [0] * 3)
    table = causes_of_death(sae, counts, cache)
    assert table["cause"].tolist() == [*["threshold too high"] * 2, "bias too low"]
    best = sae.pre_acts(acts, slice(0, 8))[:, 5:].amax(0).detach()
    assert table["shortfall"].to_numpy() == pytest.approx((cuts[5:] - best).numpy(), rel=1e-4)


@pytest.mark.parametrize("variant", ["topk", "abs_topk"])
def test_the_gain_of_reviving_is_that_of_the_best_activation(tmp_path: Path, variant: str) -> None:
    sae, acts = build(variant, 6, 12, k=2).eval(), torch.randn(200, 6)
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts)
    counts = np.array([1] * 8 + [0] * 4)
    error = (acts - sae(acts)).detach().double()
    gains = causes_of_death(sae, counts, cache)["gain"].to_numpy()
    for latent, gain in zip(range(8, 12), gains, strict=True):
        row = sae.W_dec[latent].detach().double()
        # Least squares for one coefficient per token, by definition.
        best = (error @ row) / (row @ row)
        best = best if sae.signed else best.clamp_min(0)
        left = (error - best[:, None] * row).square().sum()
        assert gain == pytest.approx(float(1 - left / error.square().sum()), rel=1e-4)
    assert (gains > 0).all()
    assert causes_of_death(sae, counts)["gain"].isna().all()


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale", "center", None])
def test_pre_activations_are_those_that_the_encoder_computes(tmp_path: Path, normalize: str | None) -> None:
    """Of SAEs that read normalised activations, and of those that do not subtract the decoder's bias."""
    torch.manual_seed(0)
    inner, acts = build("batch_topk", 6, 12, k=2, apply_b_dec_to_input=False).eval(), 3 * torch.randn(200, 6) + 5
    parameters = dict(inner.named_parameters())
    with torch.no_grad():
        parameters["b_dec"].copy_(4 * torch.randn(6))
        parameters["b_enc"].copy_(torch.randn(12))
        parameters["b_enc"][8:] -= 100
    buffers = dict(inner.named_buffers())  # a threshold of 1
    buffers["threshold.total"].fill_(1.0), buffers["threshold.weight"].fill_(1.0)
    sae = inner if normalize is None else Normalised(inner, normalize).eval()
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts)
    wide = acts.double()
    mean, norm = wide.mean(1, keepdim=True), wide.norm(dim=1, keepdim=True)
    read = {
        "layer_norm": (wide - mean) / (wide.std(1, keepdim=True) + 1e-5),
        "constant_norm_rescale": wide / norm * 6**0.5,
        "center": wide - mean,
        None: wide,
    }[normalize]
    bare = read @ parameters["W_enc"].detach().double()
    pre_acts = bare + parameters["b_enc"].detach().double()
    counts = (sae.encode(acts).dense() != 0).sum(0).numpy()
    assert (counts[8:12] == 0).all() and (counts[12:] == 200).all()
    table = causes_of_death(sae, counts, cache).set_index("latent")
    assert set(range(8, 12)) <= set(table.index) < set(range(12))  # bookkeeping latents are none
    assert set(table["neighbour"]) < set(range(12))
    dead = torch.tensor(table.index.tolist())
    assert table["best"].to_numpy() == pytest.approx(pre_acts[:, dead].amax(0).numpy(), rel=1e-4, abs=1e-4)
    assert table["best_without_bias"].to_numpy() == pytest.approx(bare[:, dead].amax(0).numpy(), rel=1e-4, abs=1e-4)
    won = pre_acts.masked_fill(pre_acts <= 1.0, torch.inf).amin(1, keepdim=True)
    assert table["shortfall"].to_numpy() == pytest.approx((won - pre_acts[:, dead]).amin(0).numpy(), rel=1e-4, abs=1e-4)
    assert table["encoder_norm"].to_numpy() == pytest.approx(
        parameters["W_enc"].detach().norm(dim=0)[dead].numpy(), rel=1e-5
    )


def test_a_gate_without_magnitude_is_no_competition(tmp_path: Path) -> None:
    sae, acts = build("gated", 6, 8).eval(), torch.randn(200, 6)
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts)
    parameters = dict(sae.named_parameters())
    with torch.no_grad():
        parameters["b_mag"][6] = -100.0
        parameters["b_enc"][7] = -100.0
    counts = (sae.encode(acts).dense() != 0).sum(0).numpy()
    table = causes_of_death(sae, counts, cache).set_index("latent")
    assert table["cause"].to_dict() == {6: "no magnitude", 7: "bias too low"}


def test_a_latent_that_fires_on_other_tokens_is_rare(tmp_path: Path) -> None:
    sae, acts = build("topk", 6, 8, k=2).eval(), torch.randn(200, 6)
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts)
    first = (sae.encode(acts[:1]).dense() != 0).sum(0).numpy()  # an index of the first token
    table = causes_of_death(sae, first, cache)
    assert len(table) == 6 and set(table["cause"]) == {"rare"}


def test_without_activations_only_the_weights_speak(tmp_path: Path) -> None:
    sae, _, _ = clinic(tmp_path)
    table = causes_of_death(sae, np.array([9, 9, 9, 0, 0, 0, 0, 0]))
    assert table["cause"].tolist() == ["duplicate", "encoder collapsed", *["not examined"] * 3]
    assert causes_of_death(sae, np.ones(8, int)).empty
    everything = causes_of_death(sae, np.zeros(8, int))
    assert (everything["neighbour"] == -1).all()


def test_an_sae_without_encoder_is_examined_by_its_dictionary(tmp_path: Path) -> None:
    sae = build("matching_pursuit", 6, 8).eval()
    cache = ActivationCache.from_tensors(tmp_path / "cache", torch.randn(64, 6))
    table = causes_of_death(sae, np.array([1] * 7 + [0]), cache)
    assert table["cause"][0] in CAUSES and np.isfinite(table["best"][0])


def test_dense_latents_are_told_by_what_they_follow(tmp_path: Path) -> None:
    n = 64 * CONTEXT
    acts = torch.randn(n, 4)
    acts[:, 1] *= torch.rand(n) * 20
    norms = torch.cat([torch.arange(n)[:, None], acts[:, 1:]], 1).norm(dim=1)
    position = torch.arange(n) % CONTEXT
    code = torch.zeros(n, 5)
    code[:, 0] = position + 1.0
    code[:, 1] = 1 + 9.0 * (position == 0)
    code[:, 2] = norms + 1
    code[:, 3] = torch.rand(n) + 1
    code[:5, 4] = 1.0
    index = make(tmp_path, code, torch.randint(0, 50, (n,)), acts)
    audit = audit_dense(index, density=0.5, strength=0.5).set_index("latent")
    assert sorted(audit.index) == [0, 1, 2, 3]
    assert audit["follows"][0] == "position" and audit["strength"][0] == pytest.approx(1.0, abs=1e-4)
    assert audit["follows"][1] == "first token of the context"
    assert audit["follows"][2] == "norm of the activation"
    assert audit["follows"][3] == "nothing tested"


def test_search_ranks_what_fires_on_the_span_alone(tmp_path: Path) -> None:
    n = 40 * CONTEXT
    code = torch.zeros(n, 6)
    code[::40, 0] = 2.0  # rare
    code[:, 1] = 2.0  # everywhere
    code[::40, 2] = 2.0
    code[::40, 3] = 1.0
    code[::40, 4] = -2.0
    index = make(tmp_path, code, torch.randint(0, 50, (n,)))
    text = torch.zeros(8, 6)
    text[2:4, 0] = 2.0  # on the span
    text[:, 1] = 2.0
    text[:, 2] = 2.0  # rare in the corpus, but everywhere here
    text[2, 3] = 1.0  # on half the span
    text[2:4, 4] = -1.0  # the negative pole at half strength
    span = torch.tensor([False, False, True, True, *[False] * 4])
    found = find_by_example(index, SparseCode.from_dense(text), span)
    density = 1 / 40
    assert found[["latent", "pole"]].to_numpy()[0].tolist() == [0, 1]
    assert found["specificity"][0] == pytest.approx(-np.log2(density))
    by_latent = found.set_index("latent")
    assert by_latent["specificity"][3] == pytest.approx(-np.log2(density) / 2)
    assert by_latent["specificity"][4] == pytest.approx(-np.log2(density) / 2)
    assert by_latent["pole"][4] == -1
    assert by_latent["specificity"][[1, 2]].tolist() == pytest.approx([0, 0])
    assert by_latent["low"][3] < by_latent["specificity"][3] < by_latent["high"][3]
    assert 5 not in by_latent.index
    # Contrast text on which the winner fires too takes its lead away.
    contrast = torch.zeros(6, 6)
    contrast[:, 0] = 2.0
    again = find_by_example(index, SparseCode.from_dense(text), span, SparseCode.from_dense(contrast), rest=False)
    assert again.set_index("latent")["specificity"][0] == pytest.approx(0.0)
    with pytest.raises(UserError, match="mark at least one"):
        find_by_example(index, SparseCode.from_dense(text), torch.zeros(8, dtype=torch.bool))


def test_poles_in_the_same_contexts_are_one_axis(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    n_contexts = 400
    topic = torch.randint(0, 8, (n_contexts,), generator=generator)
    # Topic t uses tokens 10 t .. 10 t + 9.
    tokens = topic[:, None] * 10 + torch.randint(0, 10, (n_contexts, CONTEXT), generator=generator)
    sign = torch.randint(0, 2, (n_contexts, CONTEXT), generator=generator) * 2.0 - 1
    code = torch.zeros(n_contexts, CONTEXT, 3)
    code[..., 0] = torch.where(topic[:, None] == 0, sign, 0.0)  # both signs within topic 0
    code[..., 1] = (topic == 1)[:, None] * 1.0 - (topic == 2)[:, None] * 1.0  # a topic for each sign
    code[..., 2] = (topic == 3)[:, None] * 1.0
    index = make(tmp_path, code.view(-1, 3), tokens.view(-1))
    one, two, half = (axis_score(index, latent) for latent in range(3))
    assert one.verdict == "one axis" and one.score > 0.8
    assert two.verdict == "two features" and two.score < 0.2
    assert half.verdict == "one-sided" and np.isnan(half.score)
    # Both poles fire often: it is the index that keeps too little of them.
    few = make(tmp_path / "few", code.view(-1, 3), tokens.view(-1), config=IndexConfig(top=3, band=0, random=0))
    assert [axis_score(few, latent).verdict for latent in range(3)] == [*["too few examples"] * 2, "one-sided"]
    alone = make(tmp_path / "alone", code.view(-1, 3), tokens.view(-1), config=IndexConfig(silent=0))
    assert axis_score(alone, 0).verdict == "too few examples"
