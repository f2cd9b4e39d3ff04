"""Every causal architecture through everything that saelab does with a model, compared with plain transformers."""

from __future__ import annotations

import functools
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.features import LogitLens
from saelab.features.indexing.builder import build_index
from saelab.features.indexing.config import IndexConfig
from saelab.harvesting import HarvestConfig, harvest_many
from saelab.harvesting.activations import Reader
from saelab.lm import load_model, locate, unembedding
from saelab.lm.sites import replaceable
from saelab.lm.structure import underlying
from saelab.runs import Run
from saelab.sae import build
from saelab.steering import Add, ProjectOut, Recipe, Scale, SteeringVector, generate, generate_tokens
from saelab.steering.attachment import attach
from saelab.training import TrainConfig, train
from tests import tiny_lm
from tests.zoo import plain
from tests.zoo.families import FAMILIES, QUICK, save

BLOCK, LENGTH = 1, 12
CONFIG = HarvestConfig(tokens=600, context_length=LENGTH, held_out=0.3, dtype="float32", pass_tokens=LENGTH * 4)
# Sums of a few hundred float32 products in another order, carried through two blocks and a norm: a few hundred times
# the rounding of one.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}

names = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.minutes) for name in FAMILIES]


@pytest.fixture(scope="module", params=names)
def name(request: pytest.FixtureRequest) -> str:
    """A family; all tests of one run together, so that its model is loaded once."""
    return request.param


@functools.cache
def root() -> Path:
    return Path(tempfile.mkdtemp(prefix="saelab-zoo-"))


@functools.cache
def folder(name: str) -> Path:
    """A saved model, once in a session."""
    return save(name, root() / name / "model")


@functools.lru_cache(maxsize=2)
def models(name: str) -> tuple[Any, Any]:
    """The model as transformers loads it, and as saelab does."""
    return AutoModelForCausalLM.from_pretrained(folder(name)).eval(), load_model(folder(name), device="cpu")


@functools.cache
def text() -> Path:
    path = root() / "text.txt"
    path.write_text(tiny_lm.sentences(900))
    return path


def known(name: str) -> list[str]:
    return [point for point, place in FAMILIES[name].places.items() if place is not None]


def hook(point: str) -> str:
    return f"blocks.{BLOCK}.{point}"


@functools.cache
def caches(name: str) -> dict[str, ActivationCache]:
    return harvest_many(models(name)[1], [hook(p) for p in known(name)], text(), root() / name / "caches", CONFIG)


def some_contexts(cache: ActivationCache) -> Tensor:
    return torch.stack([tokens for tokens, _ in cache.contexts("held_out")][:4])


def test_activations_are_those_of_the_plain_model(name: str) -> None:
    theirs, ours = models(name)
    for point in known(name):
        cache = caches(name)[hook(point)]
        for tokens, rows in list(cache.contexts("held_out"))[:3]:
            expected = plain.read(theirs, FAMILIES[name], BLOCK, point, tokens[None])[0]
            found = cache.read(rows[rows >= 0]).acts
            torch.testing.assert_close(found, expected[rows >= 0], **CLOSE, msg=lambda m, p=point: f"{p}: {m}")
    # The bridge shows the same, where TransformerLens can run the model.
    if underlying(ours) is ours:
        return
    ids = some_contexts(caches(name)[hook("hook_resid_post")])
    for point in known(name):
        (found,) = Reader(ours, [locate(ours, hook(point))]).activations(ids)
        expected = plain.read(theirs, FAMILIES[name], BLOCK, point, ids)
        torch.testing.assert_close(found, expected, **CLOSE, msg=lambda m, p=point: f"bridge, {p}: {m}")


def test_a_name_and_a_path_mean_one_place_on_both_kinds_of_model(name: str) -> None:
    theirs, ours = models(name)
    family = FAMILIES[name]
    for point, place in family.places.items():
        if place is None:
            for model in (theirs, ours):
                with pytest.raises(UserError) as error:
                    locate(model, hook(point))
                assert hook(point) in str(error.value) and "\n" not in str(error.value)
            continue
        here, there = locate(theirs, hook(point)), locate(ours, hook(point))
        assert here.place == there.place, point
    path = f"{family.blocks}.{BLOCK}"
    for model in (theirs, ours):
        assert locate(model, path).place == (path, "out", None, 1.0, False)
        assert locate(model, path).hook_name == hook("hook_resid_post")
    inner, _, _ = family.places["hook_mlp_out"] or ("", "", None)
    if inner:  # a path is the output of the module that it names
        assert locate(theirs, f"{path}.{inner}").place == (f"{path}.{inner}", "out", None, 1.0, False)


def test_gradients_are_those_of_autograd(name: str) -> None:
    theirs, ours = models(name)
    ids = some_contexts(caches(name)[hook("hook_resid_post")])
    for point in known(name):
        reader = Reader(ours, [locate(ours, hook(point))])
        reader.use_plain_model(ids)
        if name.startswith("opt") and point == "hook_resid_mid":
            with pytest.raises(UserError, match="no gradient reaches"):
                reader.gradients(ids)
            continue
        acts, grads = reader.gradients(ids)
        expected = plain.gradient(theirs, FAMILIES[name], BLOCK, point, ids)
        torch.testing.assert_close(grads[0], expected, rtol=1e-3, atol=1e-4, msg=lambda m, p=point: f"{p}: {m}")
        torch.testing.assert_close(acts[0], plain.read(theirs, FAMILIES[name], BLOCK, point, ids), **CLOSE)


def test_the_command_stores_the_gradients_of_autograd(name: str, tmp_path: Path) -> None:
    theirs, _ = models(name)
    options = ["--hook", hook("hook_resid_post"), "--text", str(text()), "--context-length", str(LENGTH)]
    options += ["--tokens", str(4 * LENGTH), "--dtype", "float32", "--gradients", "--device", "cpu"]
    main(["harvest", "--model", str(folder(name)), "--out", str(tmp_path / "cache"), *options])
    cache = ActivationCache(tmp_path / "cache")
    assert cache.has_grads
    for tokens, rows in cache.contexts("train"):
        expected = plain.gradient(theirs, FAMILIES[name], BLOCK, "hook_resid_post", tokens[None])[0]
        found = cache.read(rows[rows >= 0], grads=True).grads
        assert found is not None
        torch.testing.assert_close(found, expected[rows >= 0], rtol=1e-3, atol=1e-4)


def trained(name: str, point: str) -> Any:
    cache = caches(name)[hook(point)]
    torch.manual_seed(0)
    sae = build("topk", d_in=cache.d_in, d_sae=48, k=4)
    train(sae, cache, TrainConfig(epochs=1, batch_size=64, lr=3e-3))
    return sae.eval()


def test_cross_entropy_is_that_of_a_plain_splice(name: str) -> None:
    theirs, ours = models(name)
    for point in known(name):
        if point not in ("hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "attn.hook_k"):
            continue
        cache, place = caches(name)[hook(point)], FAMILIES[name].places[point]
        assert place is not None and replaceable(locate(theirs, hook(point)))
        sae = trained(name, point)
        expected = []
        for tokens, rows in cache.contexts("held_out"):  # all of them: evaluate picks from them as it likes
            expected.append(_spliced_loss(theirs, name, place, sae, tokens, rows))
        config = EvaluateConfig(lm_tokens=cache.n_split("held_out"))
        found = evaluate(sae, cache, ours, config).metrics["ce_loss_with_sae"]
        assert float(found.value) == pytest.approx(float(torch.cat(expected).mean()), rel=1e-4), point


@torch.no_grad()
def _spliced_loss(model: Any, name: str, place: Any, sae: Any, tokens: Tensor, rows: Tensor) -> Tensor:
    """Losses at the stored positions with the reconstruction in place of the activations, by one plain hook."""
    stored = (rows >= 0)[:, None]

    def change(x: Tensor) -> Tensor:
        full = x.reshape(len(tokens), -1)
        part = place[2](full[None])[0]
        new = torch.where(stored, sae(part), part)
        # What is linear in the module's output is put back by what it changes.
        return _put_back(place[2], full, new).reshape(x.shape)

    with plain.hooked(model, FAMILIES[name], BLOCK, place, change):
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, tokens[1:], reduction="none")[rows[:-1] >= 0]


def _put_back(read: Any, full: Tensor, new: Tensor) -> Tensor:
    """The tensor of which ``read`` shows ``new``: ``read`` picks entries or multiplies, so its Jacobian tells how."""
    jacobian = torch.autograd.functional.jacobian(lambda row: read(row[None, None])[0, 0], torch.zeros(full.shape[1]))
    changed = new - full @ jacobian.T
    return full + changed @ torch.linalg.pinv(jacobian).T


def test_the_logit_lens_is_linear_in_the_normalised_stream(name: str) -> None:
    theirs, ours = models(name)
    family, last = FAMILIES[name], theirs.config.get_text_config().num_hidden_layers - 1
    found = unembedding(ours)
    x, ids = torch.randn(1, 6, found.weight.shape[0]), torch.arange(3, 9)[None]
    place = family.places["hook_resid_post"]
    assert place is not None
    with torch.no_grad(), plain.hooked(theirs, family, last, place, lambda _: x):
        logits = theirs(input_ids=ids, use_cache=False).logits[0]
    settings = theirs.config.get_text_config()
    cap = getattr(settings, "final_logit_softcapping", None) or getattr(settings, "logits_soft_cap", None)
    logits = logits if not cap else torch.atanh(logits / cap) * cap
    normed = x[0] - x[0].mean(-1, keepdim=True) if found.centred else x[0]
    if name not in ("opt-350m", "openai-gpt"):  # these end without a norm
        normed = normed / normed.square().mean(-1, keepdim=True).sqrt()
    expected = LogitLens(found.weight, found.norm_weight, False).effects(normed)
    # Biases are the same at every position; the lens leaves them out.
    gap = (logits - logits.mean(-1, keepdim=True)) - expected
    torch.testing.assert_close(gap - gap.mean(0), torch.zeros_like(gap), rtol=0, atol=2e-3 * float(logits.abs().max()))


def test_an_index_lists_the_tokens_that_the_model_promotes(name: str, tmp_path: Path) -> None:
    sae, cache = trained(name, "hook_resid_post"), caches(name)[hook("hook_resid_post")]
    found = unembedding(folder(name))
    lens = LogitLens(found.weight, found.norm_weight, found.centred)
    index = build_index(sae, cache, tmp_path, lens=lens, config=IndexConfig(top=2, band=1, random=1, silent=1))
    assert index.meta["logit_lens"] and index.d_sae == 48


def test_steering_is_the_same_by_every_way(name: str) -> None:
    theirs, ours = models(name)
    tokenizer, family = ours.tokenizer, FAMILIES[name]
    vector = SteeringVector.from_tensor(
        torch.randn(theirs.config.get_text_config().hidden_size), hook("hook_resid_post")
    )
    ids = some_contexts(caches(name)[hook("hook_resid_post")])
    strength = 2 * float(plain.read(theirs, family, BLOCK, "hook_resid_post", ids).norm(dim=-1).mean())
    add = Add(vector, strength)
    prompts = ["the cat sat on a mat", "rain fell", "seven ships left the quiet harbour"]
    rows = [[0, *tokenizer(p, add_special_tokens=False)["input_ids"]] for p in prompts]
    shift = vector.direction * strength
    options: dict[str, Any] = {"max_new_tokens": 5, "stop_at_eos": False}
    expected = [plain.continuation(theirs, family, BLOCK, shift, torch.tensor([row]), 5).tolist() for row in rows]
    for model in {id(m): m for m in (theirs, ours)}.values():
        for use_cache in (True, False):
            found = [
                generate_tokens(model, torch.tensor([r]), None, add, use_cache=use_cache, **options)[0] for r in rows
            ]
            assert found == expected, use_cache
        texts = generate(model, prompts, add, tokenizer=tokenizer, **options)  # padded on the left
        decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in expected]
        # A text ends before a character that is not whole.
        assert [text.rstrip("\ufffd") for text in texts] == [text.rstrip("\ufffd") for text in decoded]
    _right_padded(theirs, rows, add, shift, family)
    assert expected != [
        plain.continuation(theirs, family, BLOCK, 0 * shift, torch.tensor([r]), 5).tolist() for r in rows
    ]


@torch.no_grad()
def _right_padded(model: Any, rows: list[list[int]], add: Add, shift: Tensor, family: Any) -> None:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with attach(model, add):
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    place = family.places["hook_resid_post"]
    for row, logits in zip(rows, found):
        with plain.hooked(model, family, BLOCK, place, lambda x: x + shift):
            alone = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        torch.testing.assert_close(logits[: len(row)], alone, rtol=1e-3, atol=1e-3)


def test_the_command_line_and_a_recipe_steer_alike(name: str, tmp_path: Path, capsys: Any) -> None:
    theirs, ours = models(name)
    sae = trained(name, "hook_resid_post")
    from saelab.sae.weights import save as save_sae

    about = {"hook_name": hook("hook_resid_post"), "model_name": str(folder(name)), "rms_norm": 10.0}
    save_sae(sae, tmp_path / "run", about)
    prompt, options = "the cat sat", ["--max-new-tokens", "4", "--json"]
    capsys.readouterr()
    main(["steer", str(tmp_path / "run"), "--latent", "2", "--strength", "0.5norm", "--prompt", prompt, *options])
    written = json.loads(capsys.readouterr().out)["texts"][0]["steered"]
    add = Add(SteeringVector.from_latent(Run.open(tmp_path / "run"), 2), 5.0)
    expected = generate(theirs, prompt, add, tokenizer=ours.tokenizer, max_new_tokens=4)
    assert written == expected
    Recipe.of(ours, add).save(tmp_path / "recipe")
    recipe = Recipe.load(tmp_path / "recipe")
    with recipe.attach(theirs):
        found = generate(theirs, prompt, (), tokenizer=ours.tokenizer, max_new_tokens=4)
    assert found == expected
    _several_operations(name, sae, tmp_path, capsys)
    theirs.get_output_embeddings().weight.data[0, 0] += 1.0
    with pytest.raises(UserError, match="other weights"), recipe.attach(theirs):
        pass
    theirs.get_output_embeddings().weight.data[0, 0] -= 1.0


def _several_operations(name: str, sae: Any, tmp_path: Path, capsys: Any) -> None:
    """A recipe of three operations in three blocks: a vector added, a latent doubled, a direction taken out."""
    theirs, ours = models(name)
    d_in, last = sae.d_in, theirs.config.get_text_config().num_hidden_layers - 1
    first, second = torch.randn(2, d_in, generator=torch.Generator().manual_seed(1))
    acts = caches(name)[hook("hook_resid_post")].read(range(200)).acts
    often = int((sae.encode(acts).dense() != 0).sum(0).argmax())
    operations = [
        Add(SteeringVector.from_tensor(first, "blocks.0.hook_resid_post"), 3.0),
        Scale(Run(sae, hook("hook_resid_post")), often, 2.0),
        ProjectOut(SteeringVector.from_tensor(second, f"blocks.{last}.hook_resid_post")),
    ]
    Recipe.of(ours, operations).save(tmp_path / "several")
    options = ["--max-new-tokens", "4", "--json", "--device", "cpu"]
    capsys.readouterr()
    main(["steer", str(tmp_path / "several"), "--prompt", "the cat sat", *options])
    written = json.loads(capsys.readouterr().out)["texts"][0]["steered"]

    def doubled(x: Tensor) -> Tensor:
        change = sae.encode(x.flatten(0, 1)).dense()[:, often, None] * sae.W_dec[often]
        change = change.reshape(x.shape) * (torch.arange(x.shape[1]) > 0)[None, :, None]
        return x + change

    unit, place = second / second.norm(), FAMILIES[name].places["hook_resid_post"]
    assert place is not None
    changes = [
        (0, lambda x: x + 3 * first / first.norm()),
        (1, doubled),
        (last, lambda x: x - (x @ unit)[..., None] * unit),
    ]
    ids = torch.tensor([[0, *ours.tokenizer("the cat sat", add_special_tokens=False)["input_ids"]]])
    length = ids.shape[1]
    with torch.no_grad(), ExitStack() as stack:
        for block, change in changes:
            stack.enter_context(plain.hooked(theirs, FAMILIES[name], block, place, change))
        for _ in range(4):
            ids = torch.cat([ids, theirs(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    expected = ours.tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    assert written.rstrip("\ufffd") == expected.rstrip("\ufffd")
