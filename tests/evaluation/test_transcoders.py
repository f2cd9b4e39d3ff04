"""Transcoders in a running model: read at one place, written at another; checked with plain hooks on plain models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saelab.data.text import open_text
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.evaluation.same_model import plain_site
from saelab.features import IndexConfig, build_index
from saelab.harvesting import HarvestConfig, harvest_many
from saelab.lm import load_hf_model, load_model, locate
from saelab.lm.route import route
from saelab.lm.tokens import token_ids
from saelab.prompt.reading import read_prompt
from saelab.runs import Run
from saelab.sae import build
from saelab.steering import Recipe, SteeringVector, attach
from saelab.steering.operations import Clamp
from saelab.training import TrainConfig, train
from tests import tiny_lm

IN, OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
MODELS = {"llama": tiny_lm.save_llama, "gpt2": tiny_lm.save_gpt2, "qwen2": tiny_lm.save_qwen2}


@pytest.fixture(scope="module", params=list(MODELS))
def world(request, tmp_path_factory):
    """A model, the caches of what its second MLP reads and gives, and a transcoder between them."""
    folder = tmp_path_factory.mktemp(request.param)
    model = load_model(str(MODELS[request.param](folder / "lm")))
    (folder / "text.txt").write_text(tiny_lm.sentences(900))
    config = HarvestConfig(tokens=1200, context_length=24, dtype="float32", held_out=0.2)
    caches = harvest_many(model, (IN, OUT), open_text(str(folder / "text.txt")), folder / "cache", config)
    cache = caches[IN].with_target(caches[OUT])
    torch.manual_seed(0)
    sae = build("topk", cache.d_in, 40, d_out=cache.goal.d_in, k=4, skip=True)
    train(sae, cache, TrainConfig(epochs=4, batch_size=64, lr=2e-3))
    return load_hf_model(str(folder / "lm")).eval(), model, cache, sae, folder


def mlp(plain):
    blocks = plain.transformer.h if hasattr(plain, "transformer") else plain.model.layers
    return blocks[1].mlp


def test_what_is_harvested_is_the_input_and_the_output_of_the_mlp(world):
    plain, _, cache, *_ = world
    tokens, rows = next(iter(cache.contexts("all")))
    seen = {}
    handle = mlp(plain).register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        plain(tokens[None])
    handle.remove()
    batch = cache.read(rows[rows >= 0])
    for stored, live in ((batch.acts, seen["x"]), (batch.target, seen["y"])):
        assert (stored - live[0][rows >= 0]).norm() <= 1e-4 * stored.norm()


def test_losses_with_the_mlp_replaced_equal_a_plain_hook(world):
    plain, model, cache, sae, _ = world
    found = evaluate(sae, cache, model, EvaluateConfig(lm_tokens=10_000, split="all"))
    ce, kl, n = 0.0, 0.0, 0
    for tokens, rows in cache.contexts("all"):
        stored = rows >= 0

        def replace(_, args, out, stored=stored):
            new = out.clone()
            new[0, stored] = sae(args[0][0, stored])
            return new

        with torch.no_grad():
            clean = plain(tokens[None]).logits[0, :-1].double().log_softmax(-1)
            handle = mlp(plain).register_forward_hook(replace)
            logits = plain(tokens[None]).logits[0, :-1].double()
            handle.remove()
        at = stored[:-1]
        ce += F.cross_entropy(logits[at], tokens[1:][at], reduction="sum").item()
        kl += (clean.exp() * (clean - logits.log_softmax(-1)))[at].sum().item()
        n += int(at.sum())
    assert found["ce_loss_with_sae"] == pytest.approx(ce / n, rel=1e-4)
    assert found["kl_div_with_sae"] == pytest.approx(kl / n, rel=1e-3, abs=1e-6)
    x = cache.read(torch.arange(cache.n_rows))
    error = (x.target - sae(x.acts)).double().square().sum()
    assert found["fvu"] == pytest.approx(
        (error / (x.target - x.target.double().mean(0)).square().sum()).item(), rel=1e-4
    )


def test_the_error_term_keeps_the_model_as_it_is(world):
    plain, _, cache, sae, _ = world
    tokens = next(iter(cache.contexts("all")))[0][None]

    def edit(x, y):
        recon = sae(x[0])
        return (recon + (y[0] - recon).detach())[None]

    with torch.no_grad():
        clean = plain(tokens).logits
        with route(plain, IN, OUT).register(plain, edit):
            spliced = plain(tokens).logits
    assert (spliced - clean).abs().max() <= 1e-4 * clean.abs().max()


def test_latents_are_steered_where_they_write(world):
    plain, model, cache, sae, folder = world
    run = Run(sae, IN, hook_name_out=OUT)
    tokens = next(iter(cache.contexts("all")))[0][None]
    latent = int(sae.encode(cache.read([5]).acts).indices[0])
    clamp = Clamp(run, latent, 3.0, skip_first=False)
    assert clamp.hook_name == OUT and SteeringVector.from_latent(run, latent).hook_name == OUT

    def replace(_, args, out):
        z = sae.encode(args[0][0]).dense()[:, latent]
        return out + (3.0 - z)[None, :, None] * sae.W_dec[latent]

    with torch.no_grad():
        handle = mlp(plain).register_forward_hook(replace)
        expected = plain(tokens).logits
        handle.remove()
        for lm in (plain, model):
            with attach(lm, clamp):
                got = lm(tokens)
            got = got if isinstance(got, torch.Tensor) else got.logits
            assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        Recipe.of(plain, [clamp]).save(folder / f"recipe{latent}")
        with attach(plain, Recipe.load(folder / f"recipe{latent}").interventions):
            got = plain(tokens).logits
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_prompt_is_read_at_both_places(world):
    _, model, _, sae, _ = world
    reading = read_prompt(model, sae, "the cat sat on the mat", IN, hook_name_out=OUT)
    assert reading.target is not None and reading.goal is reading.target
    lost = (reading.goal - sae(reading.acts)).square().sum(1) / reading.goal.square().sum(1)
    assert reading.unexplained() == pytest.approx(lost.tolist(), rel=1e-4)
    with pytest.raises(UserError, match="is a transcoder; give hook_name_out"):
        read_prompt(model, sae, "the cat", IN)


def test_the_loss_without_a_latent_is_its_slope(world):
    """Against the loss of the plain model with a little more, and a little less, of the latent."""
    plain, model, _, sae, _ = world
    text = "the cat sat on the mat"
    reading = read_prompt(model, sae, text, IN, hook_name_out=OUT, gradients=True)
    ids = torch.tensor([token_ids(model.tokenizer, text, True)])
    latent = reading.strongest(1)[0][0]
    part = torch.tensor(reading.trace(latent))[:, None] * sae.W_dec[latent].detach()

    def loss(share):
        with torch.no_grad(), locate(plain, OUT).register(plain, lambda y: y - share * part):
            logits = plain(ids).logits[0, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))

    # Central differences of float32 logits: step 0.05 keeps curvature and rounding near 1e-3 of the slope.
    slope = (loss(0.05) - loss(-0.05)) / 0.1
    assert sum(reading.loss_without(latent, sae)) == pytest.approx(slope, rel=0.02, abs=1e-3)
    with pytest.raises(UserError, match="without gradients"):
        read_prompt(model, sae, text, IN, hook_name_out=OUT).loss_without(latent, sae)


def test_an_index_holds_what_latents_read_and_write(world):
    _, _, cache, sae, folder = world
    index = build_index(sae, cache, folder, config=IndexConfig(), overwrite=True)
    assert index.meta["hook_name_out"] == OUT
    z = sae.encode(cache.read(torch.arange(cache.n_rows)).acts).dense()
    assert index.table()["count"].tolist() == (z > 0).sum(0).tolist()


def test_a_place_that_comes_too_early_is_named(world):
    plain, _, cache, _, _ = world
    tokens = next(iter(cache.contexts("all")))[0][None]
    back = route(plain, "blocks.1.mlp.hook_in", "blocks.0.hook_mlp_out")
    with back.register(plain, lambda x, y: y), pytest.raises(UserError, match=r"comes before blocks\.1\.mlp\.hook_in"):
        plain(tokens)
    with pytest.raises(UserError, match="does not reach the later layers"):
        route(plain, "blocks.0.mlp.hook_in", "blocks.1.mlp.hook_in")
    assert plain_site(plain, cache.goal)[1].place == locate(plain, OUT).place
