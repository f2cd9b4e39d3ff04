"""Interventions under generation: the same tokens with and without a cache, alone and in a padded batch."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import UserError
from saelab.lm.sites import locate
from saelab.sae import build
from saelab.steering import (
    Ablate,
    Add,
    Cap,
    Clamp,
    LatentFires,
    MinClamp,
    ProbeFires,
    ProjectOut,
    Run,
    Scale,
    Schedule,
    SteeringVector,
    at_layers,
    attach,
    generate_tokens,
)
from tests.steering.models import D_MODEL, HOOK, bridge, llama

NEW = 10
# A short and a longer text; the short one is padded on the left.
IDS = torch.tensor([[0, 0, 5, 6, 7], [33, 4, 50, 6, 81]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
ALONE = [IDS[:1, 2:], IDS[1:]]


def vector(seed: int = 0, hook: str = HOOK, scale: float = 6.0) -> SteeringVector:
    raw = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return SteeringVector.from_tensor(scale * raw / raw.norm(), hook)


def run(signed: bool = False) -> Run:
    torch.manual_seed(3)
    sae = build("topk", d_in=D_MODEL, d_sae=64, k=8).eval()
    with torch.no_grad():
        sae.b_enc.copy_(0.2 * torch.randn(64))
        sae.W_dec.mul_(1 + torch.rand(64, 1))  # rows need not have unit norm in an imported SAE
    return Run(sae, HOOK)


RUN = run()
INTERVENTIONS = {
    "add": [Add(vector(), 9.0)],
    "add_prompt": [Add(vector(), 9.0, where="prompt")],
    "add_generated": [Add(vector(), 9.0, where="generated")],
    "add_positions": [Add(vector(), 15.0, where=[1, 4, -1])],
    "add_predicate": [Add(vector(), 9.0, where=lambda c: c.positions % 2 == 1)],
    "add_two_hooks": [Add(vector(), 5.0), Add(vector(1, "blocks.0.hook_mlp_out"), 5.0)],
    "add_attention": [Add(vector(1, "blocks.2.hook_attn_out"), 9.0)],
    "add_input": [Add(vector(1, "blocks.2.hook_resid_pre"), 9.0, skip_first=True)],
    "project": [ProjectOut([vector(i) for i in range(6)])],
    "scale": [Scale(RUN, 3, 8.0), Scale(RUN, 5, -4.0)],
    "clamp": [Clamp(RUN, 11, 7.0)],
    "min_clamp_generated": [MinClamp(RUN, 11, 7.0, where="generated")],
    "ablate": [Ablate(RUN, latent) for latent in range(0, 64, 2)],
    "clamp_then_add": [Clamp(RUN, 11, 5.0), Add(vector(), 5.0), Clamp(RUN, 20, 5.0)],
    "no_error_term": [Scale(RUN, 3, 2.0, keep_error=False)],
    "cap": [Cap(vector(i), -2.0) for i in range(4)],
    "two_layers": at_layers(llama(), Add(vector(), 5.0), [0, 2]),
    "project_at_all_layers": at_layers(llama(), ProjectOut([vector(i) for i in range(4)]), "all"),
    "when_a_latent_fires": [Add(vector(), 15.0, when=LatentFires(RUN, 3, 0.5))],
    "when_a_probe_fires_earlier": [
        Add(vector(), 15.0, when=ProbeFires(vector(2, "blocks.0.hook_resid_post"))),
        Clamp(RUN, 20, 8.0, when=LatentFires(RUN, 3), where="generated"),
    ],
    "fade_out": [Add(vector(), 15.0, schedule=Schedule([(0, 1), (6, 0)]))],
    "fade_in": [Clamp(RUN, 11, 9.0, schedule=Schedule([(-1, 0), (3, 1), (4, 1.5)])), Scale(RUN, 5, -4.0)],
}


def plain(model, **options) -> list[list[int]]:
    return generate_tokens(model, IDS, MASK, max_new_tokens=NEW, **options)


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_cached_uncached_and_padded_generation_agree(name: str) -> None:
    interventions, model = INTERVENTIONS[name], llama()
    cached = plain(model, interventions=interventions)
    assert cached != plain(model), "the intervention changes nothing: the test would prove nothing"
    assert cached == plain(model, interventions=interventions, use_cache=False)
    alone = [generate_tokens(model, ids, None, interventions, max_new_tokens=NEW)[0] for ids in ALONE]
    assert cached == alone
    assert cached == plain(bridge(), interventions=interventions)


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_the_models_own_generate_is_steered_alike(name: str) -> None:
    interventions, model = INTERVENTIONS[name], llama()
    expected = plain(model, interventions=interventions)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    with attach(model, interventions):
        for use_cache in (True, False):
            out = model.generate(IDS, attention_mask=MASK, use_cache=use_cache, **options)
            assert out[:, IDS.shape[1] :].tolist() == expected
    lens = bridge()
    with attach(lens, interventions):
        for use_cache in (True, False):
            for row, ids in enumerate(ALONE):
                out = lens.generate(
                    ids,
                    max_new_tokens=NEW,
                    do_sample=False,
                    stop_at_eos=False,
                    verbose=False,
                    use_past_kv_cache=use_cache,
                )
                assert out[0, ids.shape[1] :].tolist() == expected[row]


def captured(model, interventions, hook: str = HOOK) -> torch.Tensor:
    """What the rest of the model sees at a hook point while it is steered."""
    seen = []
    with attach(model, interventions), locate(model, hook).register(model, lambda x: seen.append(x.clone())):
        model(input_ids=IDS, attention_mask=MASK)
    return seen[0]


def test_add_is_strength_times_unit_direction_on_real_tokens_only() -> None:
    before, after = captured(llama(), []), captured(llama(), Add(vector(), 9.0))
    assert torch.equal(after[MASK.bool()], before[MASK.bool()] + 9.0 * vector().direction)
    assert torch.equal(after[~MASK.bool()], before[~MASK.bool()])


@pytest.mark.parametrize(
    ("hook", "path", "width"),
    [
        ("blocks.1.attn.hook_z", "model.layers.1.self_attn.o_proj", 32),
        ("blocks.1.mlp.hook_post", "model.layers.1.mlp.down_proj", 64),
    ],
)
def test_the_input_of_a_projection_is_steered(hook: str, path: str, width: int) -> None:
    """Against a forward pre-hook of torch, written here."""
    direction = torch.randn(width, generator=torch.Generator().manual_seed(1))
    direction = direction / direction.norm()
    real = MASK.bool()[..., None]

    def add(module, args):
        return (torch.where(real, args[0] + 9.0 * direction, args[0]),)

    with torch.no_grad(), llama().get_submodule(path).register_forward_pre_hook(add):
        expected = llama()(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
    untouched = llama()(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
    assert not torch.allclose(expected, untouched, atol=1e-2)
    steer = Add(SteeringVector.from_tensor(direction, hook), 9.0)
    clamp = Clamp(Run(build("topk", d_in=width, d_sae=16, k=4).eval(), hook), 3, 5.0)
    for model in (llama(), bridge()):
        with torch.no_grad(), attach(model, steer):
            logits = getattr(model, "original_model", model)(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        with attach(model, clamp):
            before = generate_tokens(model, IDS, MASK, max_new_tokens=2)
        assert before == generate_tokens(model, IDS, MASK, clamp, max_new_tokens=2)
    wrong = Add(SteeringVector.from_tensor(torch.ones(width + 1), hook), 1.0)
    with pytest.raises(UserError, match=f"width {width + 1}, the model's activations {width}"), attach(llama(), wrong):
        pass


def test_project_out_leaves_nothing_along_the_directions() -> None:
    vectors = [vector(0), vector(1), vector(0) * 2.0]  # a repeated direction must not break the basis
    after = captured(llama(), ProjectOut(vectors))[MASK.bool()].double()
    basis = torch.stack([v.direction for v in vectors]).double()
    # float32 sums over 32 entries of size about 1.
    assert (after @ basis.T).abs().max() < 1e-4


def edited(change, latent: int) -> torch.Tensor:
    """The definition, densely and in float64: x + decode(code') - decode(code), first tokens left alone."""
    x = captured(llama(), [])
    expected = x.clone()
    rows = MASK.bool().clone()
    rows[0, 2] = rows[1, 0] = False
    code = RUN.sae.encode(x[rows]).dense().double()
    new = code.clone()
    new[:, latent] = change(new[:, latent])
    W_dec = RUN.sae.W_dec.double()
    expected[rows] = (x[rows].double() + new @ W_dec - code @ W_dec).float()
    return expected[MASK.bool()]


@pytest.mark.parametrize(
    ("intervention", "change"),
    [
        (Scale(RUN, 3, -2.5), lambda v: v * -2.5),
        (Ablate(RUN, 3), lambda v: v * 0),
        (Clamp(RUN, 3, 4.0), lambda v: v * 0 + 4.0),
        (MinClamp(RUN, 3, 4.0), lambda v: v.clamp(min=4.0)),
        (MinClamp(RUN, 3, -4.0), lambda v: v.clamp(max=-4.0)),
        (Scale(RUN, 3, 2.0, pole=-1), lambda v: v),  # topk has no negative activations
    ],
    ids=lambda value: type(value).__name__,
)
def test_latent_edits_match_their_definition(intervention, change) -> None:
    assert (RUN.sae.encode(captured(llama(), [])[MASK.bool()]).dense()[:, 3] != 0).any()
    after = captured(llama(), intervention)[MASK.bool()]
    with torch.no_grad():
        torch.testing.assert_close(after, edited(change, 3), rtol=1e-5, atol=1e-5)


def test_without_the_error_term_the_reconstruction_takes_its_place() -> None:
    x = captured(llama(), [])[1, 1:]
    after = captured(llama(), Scale(RUN, 3, 1.0, keep_error=False))[1, 1:]
    torch.testing.assert_close(after, RUN.sae(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "intervention",
    [
        Add(vector(), 0.0),
        Add(vector(), "-0raw"),
        ProjectOut(vector(), strength=0.0),
        Scale(RUN, 3, 1.0),
        MinClamp(RUN, 3, 0.0),
        Add(vector(), 5.0, where=[]),
    ],
    ids=["add", "add_raw", "project", "scale", "min_clamp", "nowhere"],
)
def test_no_strength_changes_nothing_bit_for_bit(intervention) -> None:
    expected = llama()(input_ids=IDS, attention_mask=MASK).logits
    with attach(llama(), intervention):
        assert torch.equal(llama()(input_ids=IDS, attention_mask=MASK).logits, expected)


def test_one_sign_is_edited_and_the_other_left() -> None:
    values = torch.tensor([-2.0, 0.0, 3.0])
    assert Ablate(RUN, 3, pole=-1).edit(values).tolist() == [0.0, 0.0, 3.0]
    assert Scale(RUN, 3, 2.0, pole=1).edit(values).tolist() == [-2.0, 0.0, 6.0]
    assert Ablate(RUN, 3).edit(values).tolist() == [0.0, 0.0, 0.0]


def test_hooks_are_gone_after_an_exception() -> None:
    model = llama()
    # Transformers leaves hooks of its own on a model that was once asked for its hidden states.
    before = [(m._forward_hooks.copy(), m._forward_pre_hooks.copy()) for m in model.modules()]
    expected = model(input_ids=IDS).logits
    with pytest.raises(RuntimeError, match="mine"), attach(model, [*INTERVENTIONS["scale"], Add(vector(), 5.0)]):
        raise RuntimeError("mine")
    with pytest.raises(UserError, match="bool mask"), attach(model, Add(vector(), 5.0, where=lambda c: c.slots)):
        model(input_ids=IDS)
    assert [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()] == before
    assert "generate" not in model.__dict__
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_blocks_nest_and_come_apart_in_order() -> None:
    model = llama()
    both = plain(model, interventions=[Add(vector(), 4.0), Add(vector(1), 6.0)])
    with attach(model, Add(vector(), 4.0)):
        assert plain(model, interventions=Add(vector(1), 6.0)) == both
        outer = model.generate
        with attach(model, Add(vector(1), 6.0)):
            pass
        assert model.generate == outer


def test_a_decode_loop_written_by_hand_is_followed() -> None:
    model, intervention = llama(), Add(vector(), 9.0, where="generated")
    expected = generate_tokens(model, IDS[1:], None, intervention, max_new_tokens=4)[0]
    with attach(model, intervention):
        out, tokens = model(input_ids=IDS[1:], use_cache=True), []
        for _ in range(4):
            tokens.append(int(out.logits[0, -1].argmax()))
            out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    assert tokens == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [Clamp(RUN, 3, 1.0), Ablate(RUN, 3)], "Clamp and Ablate conflict on latent 3"),
        (lambda: [Scale(RUN, 3, 2.0, pole=1), Clamp(RUN, 3, 1.0, pole=-1)], "conflict on latent 3"),
        (lambda: [Clamp(RUN, 64, 1.0)], "latent 64 does not exist: the SAE has latents 0 to 63"),
        (lambda: [Clamp(RUN, 3, "3x")], "needs a maximum activation: the SAE has no feature index"),
        (lambda: [Add(SteeringVector.from_latent(RUN, 3), "0.5norm")], "needs the norm of the activations"),
        (lambda: [Add(vector(), "3 elephants")], "is not a number"),
        (lambda: [Add(vector(), float("nan"))], "not finite"),
        (lambda: [Add(vector(hook="blocks.7.hook_resid_post"), 1.0)], "the model has 3 blocks, 0 to 2"),
        (lambda: [Add(vector(hook="blocks.1.hook_resid_pots"), 0.0)], "did you mean blocks.1.hook_resid_post"),
        (
            lambda: [Add(vector(hook="blocks.1.hook_resid_mid"), 0.0)],
            "does not reach the later layers",
        ),
        (lambda: [Add(vector(hook="model.layer.1"), 1.0)], "did you mean model.layers.1"),
        (lambda: [Add(SteeringVector.from_tensor(torch.ones(31), HOOK), 1.0)], "width 31, the model's activations 32"),
        (lambda: [Add(vector(), 1.0, where="promt")], "where='promt' is not one of all, prompt, generated"),
        (lambda: [Scale(RUN, 3, 2.0), Scale(RUN, 4, 2.0, keep_error=False)], "must agree on keep_error"),
        (lambda: [Ablate(RUN, 3, pole="x")], "neither + nor -"),
        (lambda: [ProjectOut([])], "one or more vectors"),
        (lambda: [Ablate(RUN, 3, pole=2)], "give 1, -1, or 0 for both"),
        (lambda: [Clamp("runs/topk", 3, 1.0)], "Clamp takes a Run, not a str; open a folder with Run.open(path)"),
        (lambda: [Clamp(RUN.sae, 3, 1.0)], "Run(sae, hook_name)"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(make, message: str) -> None:
    with pytest.raises(UserError) as error, attach(llama(), make()):
        pass
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_two_phases_or_two_poles_do_not_conflict() -> None:
    with attach(llama(), [Clamp(RUN, 3, 1.0, where="prompt"), Ablate(RUN, 3, where="generated")]):
        pass
    with attach(llama(), [Scale(RUN, 3, 2.0, pole=1), Ablate(RUN, 3, pole=-1)]):
        pass
    throughout = plain(llama(), interventions=[Clamp(RUN, 11, 7.0)])
    phases = [Clamp(RUN, 11, 7.0, where="prompt"), Clamp(RUN, 11, 7.0, where="generated")]
    assert plain(llama(), interventions=phases) == throughout
    for one_phase in phases:
        assert plain(llama(), interventions=one_phase) != throughout


def test_each_pole_is_changed_as_its_own_intervention_says() -> None:
    torch.manual_seed(3)
    signed = Run(build("abs_topk", d_in=D_MODEL, d_sae=64, k=8), HOOK)

    def logits(*interventions: Scale | Ablate) -> torch.Tensor:
        with torch.no_grad(), attach(llama(), list(interventions)):
            return llama()(ALONE[1]).logits

    with torch.no_grad():
        residual = llama()(ALONE[1], output_hidden_states=True).hidden_states[2][0]
        code = signed.sae.encode(residual).dense()
    # The latent that is strong on both poles behind the first token, which latent interventions leave alone.
    latent = int(torch.minimum(code[1:].amax(0), -code[1:].amin(0)).argmax())
    scaled, ablated = Scale(signed, latent, 3.0, pole=1), Ablate(signed, latent, pole=-1)
    changed = [logits(), logits(scaled), logits(ablated), logits(scaled, ablated)]
    for i, one in enumerate(changed):
        for other in changed[:i]:
            assert not torch.allclose(one, other, atol=1e-3)
    # Up to the first token of the negative pole the two together do what the first does alone.
    first = int((code[:, latent] < 0).nonzero()[0])
    torch.testing.assert_close(changed[3][:, :first], changed[1][:, :first])


def test_hugging_face_paths_name_the_same_place() -> None:
    by_path = SteeringVector.from_tensor(vector().vector, "model.layers.1")
    assert plain(llama(), interventions=Add(by_path, 9.0)) == plain(llama(), interventions=INTERVENTIONS["add"])
    assert plain(bridge(), interventions=Add(by_path, 9.0)) == plain(llama(), interventions=INTERVENTIONS["add"])
