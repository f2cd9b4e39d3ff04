"""The ledger's arithmetic, the benchmark's pieces, and every paper's rows at toy size."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import nn

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.data.synthetic import Planted, Tree
from saelab.errors import UserError
from saelab.lm import Site
from saelab.reproduce import (
    PAPERS,
    Lab,
    Ledger,
    Row,
    Scale,
    about,
    abs_topk,
    absorption,
    changed,
    choice,
    g_sae,
    mp_sae,
    reproduce,
)
from saelab.reproduce.curves import by_budget, verdict, verdicts
from saelab.reproduce.lab import FACTORS, Record, Spec, table
from saelab.reproduce.ledger import Verdict, above, all_of, attributed, below, fewer, paired, summary, within
from saelab.reproduce.planted_worlds import Readout
from saelab.reproduce.results import claims, curves, details, headline, markdown, read_ledgers
from saelab.reproduce.toys import PURSUIT_STEPS, RESIDUAL_STOP, STEPS, Toys, clip_each, schedule, train_toys
from saelab.reproduce.tree import TreeScore, run_toys, score
from saelab.sae import build
from saelab.sae.weights import load_metadata

D, VOCAB, T = 16, 30, 24


def test_verdicts_follow_the_interval():
    assert below(summary([-1.0, -1.1, -0.9])) == "supported"
    assert below(summary([-1.0, 0.5, -0.9])) == "inconclusive"
    assert below(summary([1.0, 1.1, 0.9])) == "contradicted"
    assert above(summary([1.0, 1.1, 0.9])) == "supported"
    assert above(summary([0.1, -0.1, 0.1])) == "inconclusive"
    assert above(summary([-1.0, -1.1, -0.9])) == "contradicted"
    assert within(summary([0.01, 0.011, 0.009]), 0.02) == "supported"
    assert within(summary([0.03, 0.031, 0.029]), 0.02) == "contradicted"
    assert paired([3.0, 5.0, 7.0], [1.0, 2.0, 3.0])["values"] == [2, 3, 4]


def test_a_floor_and_a_control_forbid_a_verdict():
    gap = summary([-0.001, -0.0011, -0.0009])
    assert fewer(gap, [0.02, 0.03, 0.02]) == "supported"
    assert fewer(gap, [0.0, 0.0009, 0.0]) == "floor"  # one dead latent in one of three runs
    assert attributed("supported", "inconclusive") == "not attributable"
    assert attributed("supported", "supported") == "supported"
    assert attributed("contradicted", "inconclusive") == "contradicted"
    assert all_of(["supported", "contradicted"]) == "inconclusive"
    assert all_of(["contradicted", "contradicted"]) == "contradicted"
    assert all_of(["supported", "floor"]) == "floor"


def _record(label, seed, k, fvu, l0=None, documents=()):
    l0 = k if l0 is None else l0
    parts = {"squared_error": list(documents), "squared_deviation": [10.0] * len(documents)} if documents else {}
    return Record(Spec(label, "topk", 8, {"k": k}, seed), {"l0": l0, "fvu": fvu}, parts)


def test_curves_are_compared_budget_by_budget():
    """Curve b is worse at a small budget and better at a large one: a mean over both would hide it."""
    records = []
    for seed in range(3):
        for k, gap in ((8, 0.1), (64, -0.1)):
            records.append(_record("a", seed, k, 0.5))
            records.append(_record("b", seed, k, 0.5 + gap + 0.001 * seed))
    found = by_budget(records, "a", "b", "fvu")
    assert verdicts(found, "below") == {"8": "supported", "64": "contradicted"}
    assert verdict(found, "below") == "inconclusive"
    assert verdict(found, "below", at=58) == "contradicted"
    apart = [_record(x, s, 8, f, l0) for s in range(3) for x, f, l0 in (("a", 0.4 + 0.01 * s, 8), ("b", 0.5, 9))]
    assert verdicts(by_budget(apart, "a", "b", "fvu"), "below") == {"8": "inconclusive"}  # not at equal L0
    # Nor where the means are equal and single seeds are not.
    both = [_record(x, s, 8, f, 8 - (x == "a") * (s - 1)) for s in range(3) for x, f in (("a", 0.4), ("b", 0.5))]
    found = by_budget(both, "a", "b", "fvu")
    assert verdicts(found, "below") == {"8": "inconclusive"}
    assert found["8"]["l0"] == [8.0, 8.0] and found["8"]["l0_apart"] in ([9.0, 8.0], [7.0, 8.0])


def test_intervals_cover_seeds_and_documents():
    """All seeds agree, and the documents do not: a text on which one document decides supports nothing."""
    records = []
    for seed in range(3):
        records.append(_record("a", seed, 8, 0.25, documents=[1.0, 1.0, 1.0, 7.0]))
        records.append(_record("b", seed, 8, 0.30, documents=[1.0, 1.0, 1.0, 9.0]))
    found = by_budget(records, "a", "b", "fvu")["8"]
    assert (found["mean"], found["documents"]) == (pytest.approx(-0.05), 4)
    assert found["low"] < -0.05 < 0 <= found["high"]
    assert below(found) == "inconclusive"


def test_schedule_is_the_published_one():
    assert schedule(0, STEPS) == pytest.approx(0.01)
    assert schedule(99, STEPS) == schedule(11_999, STEPS) == 1
    assert schedule(13_500, STEPS) == pytest.approx(0.55)
    assert schedule(STEPS, STEPS) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["vanilla", "matryoshka"])
def test_toy_replicas_are_independent(kind):
    """A replica trains alike alone and beside another, gradient clipping included."""
    trees = [Tree(0.0, seed=s) for s in (0, 1)]

    def sampler(which):
        generators = [torch.Generator().manual_seed(i) for i in which]
        return lambda n: torch.stack([trees[i].sample(n, g)[0] for i, g in zip(which, generators)])

    together, alone = Toys(kind, [0, 1]), Toys(kind, [1])
    train_toys(together, sampler([0, 1]), 60)
    train_toys(alone, sampler([1]), 60)
    # Adam divides by small roots: float32 rounding of another batch shape grows over 60 steps
    torch.testing.assert_close(alone.W_dec[0], together.W_dec[1], atol=1e-3, rtol=1e-3)


def test_nested_toys_draw_their_prefixes_by_the_published_law():
    """P(length) ~ sqrt(length) - sqrt(length - 1), and each prefix pays the penalty of all its latents."""
    toys = Toys("matryoshka", [0], n_prefixes=2)
    lengths = torch.stack([toys._prefixes()[0, 0].sum() for _ in range(4000)])
    law = torch.arange(20.0).sqrt().diff() / 19**0.5
    seen = torch.bincount(lengths, minlength=20)[1:] / 4000
    assert (seen - law).abs().max() < 4 * float((law * (1 - law) / 4000).sqrt().max())
    x = torch.randn(1, 50, 20)
    with torch.no_grad():
        drawn, before = toys._prefixes(), toys.generators[0].get_state()
        toys._prefixes = lambda: drawn
        loss, z = toys.loss(x, STEPS, STEPS)
        masks = drawn[0].double()
        latent = (z * toys.W_dec.norm(dim=2)[:, None])[0].double().mean(0)
        errors = [((x[0] - (z[0] * m) @ toys.W_dec[0]) ** 2).sum(1).mean() for m in drawn[0]]
    expected = sum(errors) / 2 + 0.1 * float((masks @ latent).mean())
    torch.testing.assert_close(loss[0], torch.as_tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-5)
    assert torch.equal(before, toys.generators[0].get_state())


def test_gradients_are_clipped_per_replica():
    p = nn.Parameter(torch.zeros(2, 3))
    p.grad = torch.tensor([[3.0, 4.0, 0.0], [0.1, 0.0, 0.0]])
    clip_each([p])
    torch.testing.assert_close(p.grad.norm(dim=1), torch.tensor([1.0, 0.1]), atol=1e-5, rtol=1e-5)


def test_batch_topk_toy_keeps_the_published_number():
    toys = Toys("batch_topk", [0, 1])
    x = torch.randn(2, 200, 20)
    for step, k in ((0, 3), (14_000, 1.36)):
        _, z = toys.loss(x, step, STEPS)
        assert (z != 0).sum((1, 2)).tolist() == [int(k * 200) + 1] * 2


def test_pursuit_toy_is_the_matching_pursuit_of_the_library():
    """Same dictionaries, same samples: the same codes, and the same gradient through the chain of residuals."""
    toys = Toys("pursuit", [0, 1])
    with torch.no_grad():
        toys.W_dec.mul_(torch.rand(2, 20, 1) + 0.5)  # free norms
    x = torch.stack([Tree(0.6, seed=s).sample(300, torch.Generator().manual_seed(s))[0] for s in (0, 1)])
    loss, z = toys.loss(x, 0, 1)
    loss.sum().backward()
    assert toys.W_dec.grad is not None
    for i in (0, 1):
        sae = build("matching_pursuit", d_in=20, d_sae=20, n_steps=PURSUIT_STEPS, residual_stop=RESIDUAL_STOP,
                    stop_on_repeat=True, norm="free", revive_weight=0.0, use_b_dec=False)  # fmt: skip
        with torch.no_grad():
            sae.W_dec.copy_(toys.W_dec[i])
        code = sae.encode(x[i])
        ((x[i] - sae.decode(code)).square().sum() / 300).backward()
        # float32, up to eight steps of a chain; an atom chosen twice ends a sample in both
        torch.testing.assert_close(z[i], code.dense(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(toys.W_dec.grad[i], sae.W_dec.grad, atol=1e-5, rtol=1e-4)
    assert (z != 0).sum(2).max() > 2


def test_the_true_dictionary_scores_perfectly_and_pursuit_codes_it():
    tree = Tree(0.3)
    toys = Toys("pursuit", [0])
    with torch.no_grad():
        toys.W_dec.copy_(tree.directions[None])
    x, acts = tree.sample(2000, torch.Generator().manual_seed(1))
    z = toys.codes(x[None])
    got = score(toys.W_dec[0], (z @ toys.W_dec)[0].detach(), float((z != 0).sum(2).double().mean()), x, tree)
    assert got.mean_cosine == pytest.approx(1, abs=1e-6)
    assert got.fvu < 1e-3
    assert got.l0 == pytest.approx(float((acts != 0).sum(1).double().mean()), abs=0.05)


@pytest.mark.slow
def test_pursuit_recovers_the_tree_and_vanilla_absorbs():
    """The two synthetic claims of the paper that a short run already shows."""
    found = run_toys("pursuit", [Tree(0.0, seed=0)], [0], 1200)[0]
    assert found.mean_cosine > 0.95
    assert abs(found.absorption) < 0.05
    vanilla = run_toys("vanilla", [Tree(0.0, seed=0)], [0], 1500)[0]
    assert vanilla.absorption > 0.3


def test_readout_gradients_match_autograd():
    readout = Readout(Planted(12, 8, l0=2, zipf=0.0), torch.arange(4))
    x = torch.randn(5, 12, requires_grad=True)
    labels = readout.labels(x.detach(), 0)
    nn.functional.cross_entropy(x @ readout.W_U, labels, reduction="sum").backward()
    torch.testing.assert_close(readout.grads(x.detach(), labels), x.grad)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(D, D)

    def forward(self, h):
        return h + torch.tanh(self.mlp(h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None]))


class ToyLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCAB, D), nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(D, VOCAB, bias=False)

    def forward(self, input_ids, use_cache=False):
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        return SimpleNamespace(logits=3 * self.head(h))


@pytest.fixture
def lab(tmp_path):
    model = ToyLM().eval()
    tokens = torch.zeros(160, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(T - 1):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1].softmax(-1).multinomial(1)], 1)
    seen = []

    def keep(h):
        seen.append(h.detach().requires_grad_())
        return seen[0]

    with Site("blocks.0.hook_resid_post", "layers.0", "out").register(model, keep):
        logits = model(tokens).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    documents = (torch.arange(160) // 16)[:, None].expand(160, T).contiguous()
    cache = ActivationCache.from_tensors(
        tmp_path / "cache", seen[0].detach(), tokens, grads=seen[0].grad, documents=documents, held_out=0.2,
        model="toy", hook_name="blocks.0.hook_resid_post", hf_hook_name="layers.0",
    )  # fmt: skip
    scale = Scale(d_sae=32, ks=(2, 4), epochs=1, batch_size=128, lm_tokens=200, density_tokens=500, passage_tokens=8)
    return Lab(cache, model, scale, tmp_path / "runs", decode=lambda ids: "in 1984" if ids[0] % 2 else "no")


@pytest.mark.parametrize("module", [abs_topk, g_sae, choice, mp_sae])
def test_rows_on_a_language_model(lab, module, monkeypatch):
    """Every claim gets a row with finite numbers, and a second run trains nothing."""
    rows = module.real(lab, (0, 1, 2))
    assert {row.verdict for row in rows} <= {*get_args(Verdict)}
    content = [row.content() for row in rows]
    json.dumps(content, allow_nan=False)
    assert all(row.measured for row in rows if row.verdict != "not testable here")
    monkeypatch.setattr("saelab.reproduce.lab.train_spec", lambda *a: pytest.fail("trained again"))
    again = [row.content() for row in module.real(lab, (0, 1, 2))]
    assert [r["verdict"] for r in again] == [r["verdict"] for r in content]


def test_the_rate_of_a_curve_is_tuned_on_rows_that_no_sae_sees(lab, tmp_path):
    middle = Spec("topk", "topk", 32, {"k": lab.papers_k}, 1)
    rate = lab.rate(middle)
    record = json.loads((lab.folder / "rates" / f"{middle.group}.json").read_text())
    tried = {float(factor): fvu for factor, fvu in record["fvu"].items()}
    assert set(FACTORS) <= set(tried) and tried[record["factor"]] == min(tried.values())
    assert rate == record["factor"] * record["default"]
    assert lab.rate(Spec("topk", "topk", 32, {"k": lab.papers_k}, 2)) == rate  # the same for all seeds
    # The factor holds for the other budgets, whose default rate is their own (proportional to k^0.4).
    eight, sixteen = (lab.rate(Spec("topk", "topk", 32, {"k": k}, 1)) for k in (8, 16))
    assert eight == rate and sixteen == pytest.approx(eight * 2**0.4)  # below 8 it is that of 8
    assert len([*(lab.folder / "rates").glob("topk-k*.json")]) == 1
    assert lab.cache.n_split("validation") > 0
    given = Lab(lab.cache, None, Scale(lr=1e-3), tmp_path / "given")
    assert given.rate(middle) == 1e-3 and not (tmp_path / "given").exists()


def test_the_sae_that_the_rate_was_chosen_with_is_not_trained_again(lab, monkeypatch):
    lead = Spec("topk", "topk", 32, {"k": lab.papers_k}, 0)
    rate = lab.rate(lead)
    monkeypatch.setattr("saelab.reproduce.lab.train_spec", lambda *a: pytest.fail("trained again"))
    (record,) = lab.measure([lead])
    assert record.metrics["fvu"] > 0 and "ce_loss_with_sae" in record.metrics
    chosen = json.loads((lab.folder / "rates" / f"{lead.group}.json").read_text())["factor"]
    assert load_metadata(lab.folder / "rates" / lead.name / f"{chosen:g}")["train"] == {"seed": 0, "lr": rate}


def test_gradient_rows_need_gradients(lab, tmp_path):
    cache = ActivationCache.from_tensors(tmp_path / "plain", torch.randn(300, D))
    rows = g_sae.real(Lab(cache, lab.model, lab.scale, tmp_path), (0, 1, 2))
    assert {row.verdict for row in rows} == {"not testable here"}
    assert all("--gradients" in row.reason for row in rows)


def test_ledger_file_says_where_its_numbers_come_from(tmp_path, monkeypatch):
    fake = SimpleNamespace(synthetic=lambda folder, seeds, quick: [Row("choice", "c", "s", {}, "supported", "r", True)])
    monkeypatch.setattr("saelab.reproduce.importlib.import_module", lambda name: fake)
    ledger = reproduce("choice", quick=True)
    ledger.save(tmp_path / "x" / "choice.json")
    content = json.loads((tmp_path / "x" / "choice.json").read_text())
    assert content["command"] == "saelab reproduce choice --quick"
    assert content["seeds"] == [0, 1, 2]
    assert content["hardware"]["cores"] >= 1
    assert content["rows"][0]["verdict"] == "supported"
    with pytest.raises(UserError, match="three"):
        reproduce("choice", (0,))
    with pytest.raises(UserError, match="did you mean"):
        reproduce("choise")


def test_quick_fails_when_a_verdict_changes(monkeypatch, capsys):
    def ledger(verdict):
        return lambda name, seeds, **kwargs: Ledger(name, True, [0], [Row(name, "c", "s", {}, verdict, "r", True)])

    monkeypatch.setattr("saelab.cli.commands.reproduce.reproduce", ledger("supported"))
    main(["reproduce", "all", "--quick", "--json"])
    assert [doc["paper"] for doc in json.loads(capsys.readouterr().out)] == list(PAPERS)
    monkeypatch.setattr("saelab.cli.commands.reproduce.reproduce", ledger("contradicted"))
    with pytest.raises(SystemExit) as error:
        main(["reproduce", "choice", "--quick"])
    assert error.value.code == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["choise"], "did you mean choice"),
        (["choice", "--seeds", "2"], "2 seeds give no interval"),
        (["choice", "--ks", "0"], "ks=0 must be at least 1"),
    ],
)
def test_a_mistake_is_named_before_the_cache_is_opened(wrong, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["reproduce", *wrong, "--cache", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert error.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_saved_ledgers_become_a_table_and_curves(tmp_path):
    records = [_record("a", seed, l0, 1 / l0 + 0.01 * seed) for seed in range(3) for l0 in (8, 16)]
    measured = {"fvu_difference": {"topk": summary([-0.1, -0.2, -0.3])}, "table": table(records, ("l0", "fvu"))}
    apart = [_record(label, seed, 8, fvu, l0) for seed in range(3) for label, fvu, l0 in (("a", 0.1, 9), ("b", 0.2, 8))]
    rows = [
        Row("choice", "lower FVU", "s", measured, "supported", "r"),
        Row("choice", "exact", "s", {"median_cosine": 0.995, "fvu": summary([0.1, 0.2])}, "supported", "r", True,
            shows="median_cosine"),
        Row("choice", "steering", "s", {}, "not testable here", "needs a judge"),
        Row("choice", "lower FVU", "s", {"fvu_difference": by_budget(apart, "a", "b", "fvu")}, "inconclusive", "r"),
    ]  # fmt: skip
    Ledger("choice", False, [0, 1, 2], rows).save(tmp_path / "choice.json")
    ledgers = read_ledgers(tmp_path)
    found = claims(ledgers)
    assert [row["activations"] for row in found] == ["real", "planted", "real", "real"]
    assert found[0]["measured"] == "fvu difference topk -0.2 (-0.448 to +0.0484)"
    # No interval where the L0 of the two differs.
    assert [row["measured"] for row in found[1:]] == ["median cosine 0.995", "", "fvu difference 8 -0.1 at L0 9 and 8"]
    assert headline({"difference": {"mean": -0.1, "low": None, "high": None, "l0": [8, 8], "documents": 1}}) == (
        "difference -0.1 on one document"
    )
    assert markdown(ledgers).count("\n") == 6
    assert details(ledgers).count("\n") >= 4
    curve = curves(ledgers[0], "fvu")["a"]
    assert [(l0, round(value, 4)) for l0, value, _ in curve] == [(8, 0.135), (16, 0.0725)]
    assert "sd over seeds 0.0100" in curve[0][2]
    with pytest.raises(UserError, match="holds no ledger"):
        read_ledgers(tmp_path / "none")


def test_a_second_model_has_lines_and_curves_of_its_own():
    """Claims are repeated there in the same words, with SAEs of the same names."""
    of = {name: {"model": name, "hook_name": "blocks.9.hook_resid_post"} for name in ("one", "other")}
    rows = []
    for model, fvu in (("one", 0.1), ("other", 0.3)):
        measured = {"table": [{"label": "topk", "l0": 8.0, "fvu": fvu, "fvu_sd": 0.0}]}
        setting = f"{model} blocks.9.hook_resid_post, d_sae=8"
        rows.append(asdict(Row("abs-topk", "lower FVU", setting, measured, "supported", "r")))
    ledger = {"paper": "abs-topk", "rows": rows, "data": of["one"] | {"second": of["other"]}}
    assert [line["activations"] for line in claims([ledger])] == ["real", "real, other"]
    found = curves(ledger, "fvu")
    assert {name: [point[:2] for point in curve] for name, curve in found.items()} == {
        "topk": [(8.0, 0.1)],
        "topk, other": [(8.0, 0.3)],
    }


def test_a_ledger_names_the_options_that_repeat_it(lab):
    assert changed(Scale(ks=(3, 6), epochs=2)) == " --ks 3 6 --epochs 2"
    assert changed(Scale()) == ""
    assert about(lab.cache)["fingerprint"] == lab.cache.fingerprint
    assert about(lab.cache)["held_out_rows"] == lab.cache.n_split("held_out")


def test_the_absorption_table_puts_every_score_in_its_place(monkeypatch):
    """Scores that say which tree they come from: 100 mean + sd, and the seed as the share of children found."""

    def scores(kind, trees, seeds, steps):
        sizes = [100 * t.magnitudes.child_mean + t.magnitudes.child_sd for t in trees]
        return [TreeScore(1.0, a, float(s), 0.0, 0.0, 0.0, 1.0) for a, s in zip(sizes, seeds)]

    monkeypatch.setattr(absorption, "run_toys", scores)
    rows = absorption.absorption([3, 5], 10, quick=False)
    sd = sum(absorption.SDS) / 3
    assert [row.measured["absorption"]["pursuit"]["values"] for row in rows] == [
        pytest.approx([100 * mean + sd] * 2) for mean in (1.0, 1.0, 0.5, 0.1)
    ]
    assert rows[3].measured["children_recovered"]["vanilla"]["values"] == [3, 5]
    assert [len(by_sd) for by_sd in rows[0].measured["by_sd"]["matryoshka"]] == [2, 2, 2]
    assert [row.verdict for row in rows] == ["contradicted"] * 2 + ["inconclusive"] * 2
    quick = absorption.absorption([3, 5], 10, quick=True)
    found = [row.measured["absorption"]["pursuit"]["values"] for row in quick]
    assert found == [pytest.approx([100 + absorption.SDS[-1]] * 2)]
