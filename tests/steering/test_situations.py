"""Steering in the situations in which models are used: several end tokens, padding on either side, static caches,
compiled and adapted models, overflow, and calibrations that cannot succeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm import load_hf_model, load_model
from saelab.lm.tokens import end_ids, written_text
from saelab.runs import Run
from saelab.sae import build
from saelab.steering import Add, Clamp, Sampling, SteeringVector, attach, calibrate, generate, generate_tokens, stream
from tests import tiny_lm

SAVES = {
    "llama": tiny_lm.save_llama,
    "gpt2": tiny_lm.save_gpt2,
    "qwen2": tiny_lm.save_qwen2,
    "gemma3": tiny_lm.save_gemma3,
}
HOOK = "blocks.1.hook_resid_post"
PROMPTS = torch.randint(2, 320, (3, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=list(SAVES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    return load_hf_model(tiny_lm.save_llama(tmp_path / "m"), device="cpu")


def vector(length: float = 30.0) -> SteeringVector:
    direction = torch.randn(16, generator=torch.Generator().manual_seed(5))
    return SteeringVector.from_tensor(direction * length / direction.norm(), HOOK)


def greedy(model: Any, ids: Tensor, **options: Any) -> list[int]:
    """Hugging Face's own continuation."""
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **options)
    return out[0, ids.shape[1] :].tolist()


# --- ends of texts ---


def test_a_text_ends_where_it_ends_in_hugging_face(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain, bridge = load_hf_model(folder, device="cpu"), load_model(folder, device="cpu")
    prompt = "the cat sat on"
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    if tokenizer.bos_token_id is not None:
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
    whole = greedy(plain, ids, max_new_tokens=12, eos_token_id=[])
    turn = whole[4]
    for model in (plain, bridge):
        config: Any = getattr(model, "original_model", model).generation_config
        config.eos_token_id = [tokenizer.eos_token_id, turn]
        assert end_ids(model, tokenizer) == tuple(sorted({tokenizer.eos_token_id, turn}))
    expected = greedy(plain, ids, max_new_tokens=12)
    assert expected[-1] == turn
    for model in (plain, bridge):
        text = generate(model, prompt, tokenizer=tokenizer, max_new_tokens=12)
        assert text == written_text(tokenizer, expected[:-1])  # without a character that is not whole at the end
        assert "".join(stream(model, prompt, tokenizer=tokenizer, max_new_tokens=12)) in text
        assert len(generate_tokens(model, ids, eos=[turn], max_new_tokens=12)[0]) == len(expected) - 1
        assert generate_tokens(model, ids, eos=[turn], max_new_tokens=12, stop_at_eos=False)[0] == whole


# --- padding ---


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 9), torch.zeros(len(rows), longest, dtype=torch.int64)
    for row, (i, m) in zip(rows, zip(ids, mask)):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        i[place], m[place] = row, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("where", [[-1], [-3, 1], [0], "all", "prompt"])
def test_padding_on_either_side_changes_nothing(folder: Path, side: str, where: Any) -> None:
    model = load_hf_model(folder, device="cpu")
    rows = [PROMPTS[0], PROMPTS[1, :4], PROMPTS[2, :5]]
    ids, mask = padded(rows, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), attach(model, Add(vector(), where=where, skip_first=where == "all")):
        alone = [model(input_ids=row[None]).logits[0] for row in rows]
        together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, logits, real in zip(alone, together, mask.bool()):
        # float32, four layers of width 16, sums in another order.
        torch.testing.assert_close(logits[real], row, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("where", [[1, 2], [-2], "generated", "all"])
def test_a_static_cache_counts_positions_as_a_growing_one_does(folder: Path, where: Any) -> None:
    model: Any = load_hf_model(folder, device="cpu")
    ids, mask = padded([PROMPTS[0], PROMPTS[1, :4]], "left")
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": []}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with attach(model, Add(vector(), where=where, skip_first=where == "all")):
        growing = model.generate(ids, **options)
        static = model.generate(ids, cache_implementation="static", **options)
    unsteered = model.generate(ids, **options)
    assert static.sequences.tolist() == growing.sequences.tolist()
    for a, b in zip(static.logits, growing.logits):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert any(not torch.allclose(a, b, atol=1e-2) for a, b in zip(unsteered.logits, growing.logits))


# --- compiled models ---


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["torch.compile", "in place", "a block"])
def test_a_compiled_model_that_already_ran_is_steered(how: str, llama: Any) -> None:
    with torch.no_grad():
        before = llama(input_ids=PROMPTS).logits
        with attach(llama, Add(vector())):
            expected = llama(input_ids=PROMPTS).logits
        model = llama
        if how == "torch.compile":
            model = torch.compile(llama, backend="eager")
        elif how == "in place":
            llama.compile(backend="eager")
        else:
            llama.model.layers[1] = torch.compile(llama.model.layers[1], backend="eager")
        torch.testing.assert_close(model(input_ids=PROMPTS).logits, before, rtol=1e-4, atol=1e-4)
        with attach(model, Add(vector())):
            torch.testing.assert_close(model(input_ids=PROMPTS).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(input_ids=PROMPTS).logits, before, rtol=1e-4, atol=1e-4)


# --- overflow ---


def latent_run() -> Run:
    torch.manual_seed(0)
    return Run(build("topk", d_in=16, d_sae=32, k=4), HOOK)


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-320])
def test_the_coldest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    drawn = Sampling(temperature=temperature).draw(torch.tensor([[1.0, 3.0, 2.0]]), torch.Generator())
    assert drawn.tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_overflow_is_one_line(folder: Path, temperature: float) -> None:
    from transformers import AutoTokenizer

    model = load_hf_model(folder, device="cpu", dtype="float16")
    options: Any = {"tokenizer": AutoTokenizer.from_pretrained(folder), "max_new_tokens": 4, "temperature": temperature}
    largest = 6e4 / float(vector().direction.abs().max())  # one is below float16's end, two are above
    for intervention in ([Add(vector(), 1e6)], [Add(vector(), largest)] * 2, [Clamp(latent_run(), 3, 1e6)]):
        with pytest.raises(UserError, match=r"not finite in float16|overflows float16") as caught:
            generate(model, "the cat sat on", intervention, **options)
        assert "\n" not in str(caught.value)


# --- calibration ---


def measurements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from saelab.steering.measure import calibration

    counted: list[int] = []
    real = calibration.damage_in
    monkeypatch.setattr(calibration, "damage_in", lambda *given: (counted.append(1), real(*given))[1])
    return counted


def test_calibration_says_when_no_strength_will_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = load_model(folder, device="cpu"), measurements(monkeypatch)
    with pytest.raises(UserError, match=r"even at strength .* above the budget 1e-07"):
        # The damage of a constant shift does not depend on the strength.
        calibrate(model, lambda strength: Add(vector(), 8.0), "the cat sat on", budget_kl=1e-7, limit=10.0)
    assert len(counted) < 40


def test_calibration_takes_what_is_not_a_number_for_too_much(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saelab.steering.measure import calibration

    model, counted = load_model(folder, device="cpu"), measurements(monkeypatch)
    found = calibrate(model, vector(), "the cat sat on the mat", budget_kl=0.05)
    assert 0 < found.damage <= 0.05
    assert (found.strength, found.damage) in found.trace
    monkeypatch.setattr(calibration, "damage_in", lambda *_: float("nan"))
    with pytest.raises(UserError, match="the damage is nan even at strength"):
        calibrate(model, vector(), "the cat sat on the mat", budget_kl=0.05)
    assert len(counted) < 60


# --- adapters ---


def adapted(folder: Path) -> Any:
    """A LoRA whose second factor is not zero, so that it changes the model."""
    peft = pytest.importorskip("peft")
    model = load_hf_model(folder, device="cpu")
    names = [n.rpartition(".")[2] for n, m in model.named_modules() if ".mlp." in f".{n}." and hasattr(m, "weight")]
    config = peft.LoraConfig(r=2, target_modules=sorted({*names}), fan_in_fan_out=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    made = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["model", "folder"])
def test_an_adapted_model_is_steered(folder: Path, name: str, tmp_path: Path) -> None:
    made = adapted(folder)
    with torch.no_grad():
        unadapted = load_hf_model(folder, device="cpu")(input_ids=PROMPTS).logits
        plain = made(input_ids=PROMPTS).logits
    assert not torch.allclose(plain, unadapted, atol=1e-2)
    model = made
    if name == "folder":
        made.save_pretrained(tmp_path / "adapter")
        model = load_model(tmp_path / "adapter", device="cpu")
        with torch.no_grad():
            torch.testing.assert_close(model(PROMPTS), plain, rtol=1e-3, atol=1e-3)
        model = load_hf_model(tmp_path / "adapter", device="cpu")
    blocks = next(p for p, m in made.get_base_model().named_modules() if isinstance(m, nn.ModuleList))
    direction = vector()
    layer = made.get_base_model().get_submodule(f"{blocks}.1")

    def shift(_module: Any, _args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        hidden = hidden + direction.vector
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = layer.register_forward_hook(shift)
    expected = [greedy(made, row[None], max_new_tokens=6, eos_token_id=[]) for row in PROMPTS]
    handle.remove()
    for hook in (HOOK, f"{blocks}.1"):
        steer = Add(SteeringVector.from_tensor(direction.vector, hook))
        assert [generate_tokens(model, row[None], None, steer, max_new_tokens=6)[0] for row in PROMPTS] == expected
        with attach(model, steer):
            assert [greedy(model, row[None], max_new_tokens=6, eos_token_id=[]) for row in PROMPTS] == expected


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e25])
def test_a_vector_of_any_size_has_a_direction(size: float) -> None:
    raw = torch.tensor([3.0, -4.0])
    found = SteeringVector.from_tensor(raw * size, HOOK)
    torch.testing.assert_close(found.direction, raw / 5)
    assert found.norm == pytest.approx(5 * size, rel=1e-5)
