"""Evaluation on planted caches and a toy language model, against one plain run per variant."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, evaluate, spliced
from saelab.lm import Site
from saelab.sae import build
from saelab.sae.weights import save

D, VOCAB, T = 12, 40, 16
SITE = Site("blocks.1.hook_resid_post", "layers.1", "out")


class Block(nn.Module):
    """Causal averaging and a nonlinearity: later positions see earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(D, D)

    def forward(self, h):
        mixed = h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None]
        return h + torch.tanh(self.mlp(mixed))


class ToyLM(nn.Module):
    """Embedding, three blocks, unembedding, behind the interface of a Hugging Face causal model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(D, VOCAB, bias=False)
        self.rows_seen = [0, 0, 0]

    def forward(self, input_ids, use_cache=False):
        h = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            self.rows_seen[i] += h.shape[0]
            h = layer(h)
        return SimpleNamespace(logits=3 * self.head(h))


@pytest.fixture
def world(tmp_path):
    model = ToyLM().eval()
    tokens = torch.zeros(40, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(T - 1):  # text that the model itself wrote, so that ablations cost something
            tokens = torch.cat([tokens, model(tokens).logits[:, -1].softmax(-1).multinomial(1)], 1)
    seen = []
    with torch.no_grad(), SITE.register(model, seen.append):
        model(tokens)
    cache = ActivationCache.from_tensors(
        tmp_path / "cache", seen[0], tokens, held_out=0.25, model="toy", hook_name="blocks.1.hook_resid_post",
        hf_hook_name="layers.1",
    )  # fmt: skip
    sae = build("topk", d_in=D, d_sae=24, k=6).eval()
    with torch.no_grad():
        sae.b_dec.copy_(torch.tensor(cache.manifest.mean))
    return SimpleNamespace(model=model, cache=cache, sae=sae, tokens=tokens, acts=seen[0], path=tmp_path)


def _plain_losses(world, edit, contexts):
    """CE and log-probabilities by one full forward pass per context and variant."""
    ce, logps = [], []
    for tokens in contexts:
        with torch.no_grad(), SITE.register(world.model, edit):
            logits = world.model(tokens[None]).logits[0, :-1].double()
        ce.append(F.cross_entropy(logits, tokens[1:], reduction="none"))
        logps.append(logits.log_softmax(-1))
    return torch.cat(ce).mean(), torch.cat(logps)


def test_spliced_losses_equal_plain_runs(world):
    held_out = world.tokens[30:]
    mean = torch.tensor(world.cache.manifest.mean)
    got = evaluate(world.sae, world.cache, world.model)
    clean, logp = _plain_losses(world, lambda h: h, held_out)
    ce, kl = {}, {}
    edits = {
        "sae": lambda h: world.sae(h[0])[None],
        "zero": torch.zeros_like,
        "mean": lambda h: mean.expand_as(h),
    }
    for name, edit in edits.items():
        ce[name], other = _plain_losses(world, edit, held_out)
        kl[name] = (logp.exp() * (logp - other)).sum(-1).mean()
    want = {
        "ce_loss_without_sae": clean,
        "ce_loss_with_sae": ce["sae"],
        "ce_loss_with_zero_ablation": ce["zero"],
        "ce_loss_with_mean_ablation": ce["mean"],
        "ce_loss_increase": ce["sae"] - clean,
        "ce_loss_recovered_zero": (ce["zero"] - ce["sae"]) / (ce["zero"] - clean),
        "ce_loss_recovered_mean": (ce["mean"] - ce["sae"]) / (ce["mean"] - clean),
        "kl_div_with_sae": kl["sae"],
        "kl_div_with_zero_ablation": kl["zero"],
        "kl_div_with_mean_ablation": kl["mean"],
        "kl_recovered_zero": 1 - kl["sae"] / kl["zero"],
        "kl_recovered_mean": 1 - kl["sae"] / kl["mean"],
    }
    for name, value in want.items():
        # float32 logits of size about 10: errors of 1e-5 per token, and shares divide by differences
        assert got[name] == pytest.approx(float(value), rel=1e-3, abs=1e-5), name
        assert got.metrics[name].n == 10 * (T - 1)
    assert got["ce_loss_recovered_zero"] < 1


def test_untouched_positions_stay_untouched_and_ablations_are_reused(world):
    """With a fixed first token left alone, ablated contexts are all the same and run once."""
    slots = torch.arange(1, T)
    acts = world.acts
    cache = ActivationCache.from_tensors(
        world.path / "skip", acts, world.tokens, held_out=0.25, hook_name="blocks.1.hook_resid_post",
        hf_hook_name="layers.1", skip_first=1,
    )  # fmt: skip
    # from_tensors stores every position; present the contexts as a harvest with skip_first would
    contexts = [(t, torch.where(torch.isin(torch.arange(T), slots), r, -1)) for t, r in cache.contexts("held_out")]
    cache.contexts = lambda split: iter(contexts)
    world.model.rows_seen = [0, 0, 0]
    got = evaluate(world.sae, cache, world.model, EvaluateConfig(max_tokens=64, density_tokens=0))
    # one pass checks the model, and two whether the batch may grow, to two rows in the second; then ten contexts: lower
    # layers once, upper ones 4 copies first, 4 to see that the tokens do not matter there, and 2 from then on
    assert world.model.rows_seen == [1 + 2 + 10, 1 + 2 + 10, 1 + 3 + 2 * 4 + 8 * 2]
    assert got.timing["ablation_passes_reused"] == 16
    assert got.metrics["ce_loss_with_sae"].n == 10 * (T - 2)

    def edit(h):
        return torch.cat([h[:, :1], torch.zeros_like(h[:, 1:])], 1)

    held_out = world.tokens[30:]
    ce = [F.cross_entropy(_logits(world, t, edit)[1:-1], t[2:], reduction="none") for t in held_out]
    assert got["ce_loss_with_zero_ablation"] == pytest.approx(float(torch.cat(ce).mean()), rel=1e-5)


class TokensAgain(ToyLM):
    """Later layers see the tokens once more, past the residual stream, as in Gemma 4 and Zamba."""

    def forward(self, input_ids, use_cache=False):
        h = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            h = layer(h + self.embed(input_ids) * (i == 2))
        return SimpleNamespace(logits=3 * self.head(h))


def test_ablations_are_run_again_where_later_layers_see_the_tokens(world):
    model = TokensAgain().eval()
    model.load_state_dict(world.model.state_dict())
    got = evaluate(world.sae, world.cache, model, EvaluateConfig(density_tokens=0))
    assert got.timing["ablation_passes_reused"] == 0
    world.model = model
    mean = torch.tensor(world.cache.manifest.mean)
    for name, edit in (("zero", torch.zeros_like), ("mean", lambda h: mean.expand_as(h))):
        want = float(_plain_losses(world, edit, world.tokens[30:])[0])
        assert got[f"ce_loss_with_{name}_ablation"] == pytest.approx(want, rel=1e-5), name


def _logits(world, tokens, edit):
    with torch.no_grad(), SITE.register(world.model, edit):
        return world.model(tokens[None]).logits[0]


def test_a_perfect_sae_recovers_everything(world):
    sae = build("topk", d_in=D, d_sae=2 * D, k=2 * D).eval()
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.zero_()
    got = evaluate(sae, world.cache, world.model)
    assert got["fvu"] == pytest.approx(0, abs=1e-12)
    assert got["ce_loss_recovered_zero"] == pytest.approx(1, abs=1e-6)
    assert got["kl_div_with_sae"] == pytest.approx(0, abs=1e-6)


def test_only_held_out_rows_count_and_the_window_is_stated(world):
    got = evaluate(world.sae, world.cache, config=EvaluateConfig(density_tokens=100, batch_size=33))
    held_out = world.acts[30:].reshape(-1, D).double()
    with torch.no_grad():
        recon = world.sae(held_out.float()).double()
    want = (held_out - recon).square().sum() / (held_out - held_out.mean(0)).square().sum()
    assert got["fvu"] == pytest.approx(float(want), rel=1e-6)
    assert got.metrics["fvu"].n == 160
    assert "over 10 documents" in got.metrics["fvu"].interval
    assert got.histogram["tokens"] == 260
    assert "260 tokens" in got.metrics["dead_fraction"].formula
    assert next(iter(got.content()["metrics"])) == "fvu"
    assert not any(name.startswith("legacy") for name in got.content()["metrics"])
    assert "ce_loss_with_sae" not in got.metrics


@pytest.mark.parametrize("variant", ["topk", "abs_topk", "relu", "batch_topk"])
@pytest.mark.parametrize(
    ("split", "max_tokens", "density_tokens", "rows"),
    [
        ("train", None, 100, 480),  # all of them are in the window
        ("train", 150, 100, 250),
        ("train", 150, 10_000, 480),
        ("all", 150, 100, 250),
        ("all", 500, 100, 500),
        ("held_out", 100, 10_000, 580),
    ],
)
def test_no_row_is_counted_twice(world, variant, split, max_tokens, density_tokens, rows):
    k = {} if variant == "relu" else {"k": 4}
    sae = build(variant, d_in=D, d_sae=24, **k).eval()
    sae.calibrate([world.acts.reshape(-1, D)])
    got = evaluate(sae, world.cache, config=EvaluateConfig(split, max_tokens, 0, density_tokens, batch_size=64))
    assert got.histogram["tokens"] == rows
    if rows in (480, 500, 580):  # which rows they are is known
        first, stop = {480: (0, 480), 500: (0, 500), 580: (0, 580)}[rows]
        with torch.no_grad():
            active = sae.encode(world.acts.reshape(-1, D)[first:stop]).dense() != 0
        density = active.double().mean(0)
        assert got["dead_fraction"] == pytest.approx(float((density == 0).double().mean()))
        assert got["dense_fraction"] == pytest.approx(float((density > 0.1).double().mean()))
        assert got["ultra_dense_fraction"] == pytest.approx(float((density > 0.5).double().mean()))
        logs = density.clamp_min(1e-10).log10().clamp_min(-6)
        logs[density == 0] = -10
        edges = torch.tensor(got.histogram["log10_density_edges"], dtype=torch.float64)
        assert got.histogram["latents"] == torch.histogram(logs, edges).hist.long().tolist()


def test_bad_pairs_are_refused(world):
    with pytest.raises(UserError, match="width"):
        evaluate(build("topk", d_in=5, d_sae=9, k=2), world.cache)
    with pytest.raises(UserError, match="another model"):
        evaluate(world.sae, world.cache, ToyLM())
    empty = ActivationCache.from_tensors(world.path / "empty", torch.randn(20, D), held_out=0.0)
    with pytest.raises(UserError, match="held-out share"):
        evaluate(world.sae, empty)
    with pytest.raises(UserError, match="no gradients"):
        evaluate(world.sae, world.cache, config=EvaluateConfig(use_gradients=True))
    with pytest.raises(UserError, match="max_tokens"):
        EvaluateConfig(max_tokens=0)


def test_command_writes_evaluation_json(world, capsys):
    save(world.sae, world.path / "run", {"model_name": "toy", "hook_name": world.cache.hook_name})
    main(["evaluate", str(world.path / "run"), "--cache", str(world.path / "cache"), "--lm-tokens", "0", "--json"])
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((world.path / "run" / "evaluation.json").read_text())
    assert printed == saved
    assert saved["metrics"]["l0"]["value"] <= 6
    assert all(math.isfinite(m["value"]) and m["formula"] and m["n"] for m in saved["metrics"].values())
    save(world.sae, world.path / "other", {"model_name": "gpt2"})
    with pytest.raises(SystemExit) as error:
        main(["evaluate", str(world.path / "other"), "--cache", str(world.path / "cache")])
    assert error.value.code == 2
    assert not (world.path / "other" / "evaluation.json").exists()


def test_several_saes_share_one_pass(world):
    other = build("topk", d_in=D, d_sae=24, k=3).eval()
    config = EvaluateConfig(density_tokens=0)
    run = spliced({"a": world.sae, "b": other}, world.cache, world.model, config)
    for name, sae in (("a", world.sae), ("b", other)):
        alone = evaluate(sae, world.cache, world.model, config)
        # one run batches another number of variants: float32 sums in another order
        together = run.sums[name].estimates()
        assert together["ce_loss_with_sae"].value == pytest.approx(alone["ce_loss_with_sae"], rel=1e-5)
        assert together["kl_div_with_sae"].value == pytest.approx(alone["kl_div_with_sae"], rel=1e-4)


def test_the_input_of_a_module_can_be_replaced(world):
    tokens = world.tokens[:2]
    with torch.no_grad(), Site("blocks.2.hook_resid_pre", "layers.2", "in").register(world.model, torch.zeros_like):
        by_input = world.model(tokens).logits
    with torch.no_grad(), SITE.register(world.model, torch.zeros_like):
        torch.testing.assert_close(world.model(tokens).logits, by_input)


def test_benchmark_prints_both_ratios(world, monkeypatch, capsys):
    from saelab.bench import evaluation as bench
    from saelab.bench.timing import Seconds

    save(world.sae, world.path / "run", {"model_name": "toy", "hook_name": world.cache.hook_name})
    monkeypatch.setattr("saelab.lm.record.load_model", lambda name, **_: world.model)
    done = 0  # the clock of this test: calls, so that a busy machine makes no difference

    def counted(name):
        call = getattr(type(world.sae), name)

        def run(*args, **options):
            nonlocal done
            done += 1
            return call(*args, **options)

        monkeypatch.setattr(type(world.sae), name, run)

    counted("encode")
    counted("decode")
    monkeypatch.setattr(Seconds, "now", classmethod(lambda cls: cls(float(done), float(done))))
    options = ["--rows", "200", "--batch-size", "50", "--lm-tokens", "100", "--json"]
    bench.main([str(world.path / "run"), "--cache", str(world.path / "cache"), *options])
    found = json.loads(capsys.readouterr().out)
    assert found["ratio_to_language_model"] > 1
    assert found["metrics_to_encode"] == found["metrics_to_encode_processor"] == 0.5  # one call in two
