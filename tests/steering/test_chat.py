"""Chats: against Hugging Face's own template and hooks of torch, over several turns, on models of four families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from saelab.errors import UserError
from saelab.lm import load_hf_model, load_model
from saelab.lm.structure import blocks
from saelab.lm.tokens import written_text
from saelab.steering import Add, Answerer, Chat, Sampling, Schedule, SteeringVector, answer_chats, attach, encode_chat
from saelab.steering.chat import turn_ends
from tests import tiny_lm
from tests.data.test_chat import CHATML, THINKING

# As Gemma 2: no system role, the model's role has another name, and the turn's end is a token of its own.
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}[{{ 'model' if m['role'] == 'assistant' else m['role'] }}]\n{{ m['content'] | trim }}~\n"
    "{% endfor %}{% if add_generation_prompt %}[model]\n{% endif %}"
)
# One that knows two roles and passes over all others.
DEAF = (
    "{% for m in messages if m['role'] in ('user', 'assistant') %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
START = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
FAMILIES = {
    "llama": (tiny_lm.save_llama, CHATML + START),
    "gemma3": (tiny_lm.save_gemma3, GEMMA),  # with a window of 32 tokens
    "qwen2": (tiny_lm.save_qwen2, THINKING + "{% if add_generation_prompt %}<assistant>{% endif %}"),
    "llama, two roles": (tiny_lm.save_llama, DEAF),
}
HOOK = "blocks.1.hook_resid_post"
SYSTEM, TURNS = "old roofs", ["the cat sat", "rain fell on a mat", "seven ships"]
NEW = 6


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save, template = FAMILIES[request.param]
    path = save(tmp_path_factory.mktemp("chat"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": ["~"]})
    tokenizer.save_pretrained(path)
    return path


def opened(folder: Path) -> tuple[Any, Any]:
    return load_hf_model(folder, device="cpu"), AutoTokenizer.from_pretrained(folder)


def add(where: Any, **limits: Any) -> Add:
    direction = torch.randn(16, generator=torch.Generator().manual_seed(5))
    return Add(SteeringVector.from_tensor(direction * 60 / direction.norm(), HOOK), where=where, **limits)


def said(*answers: str, system: bool = True) -> list[dict[str, str]]:
    """The messages up to the turn after these answers."""
    messages = [{"role": "system", "content": SYSTEM}] if system else []
    for turn, text in enumerate(TURNS[: len(answers) + 1]):
        messages.append({"role": "user", "content": text})
        messages += [{"role": "assistant", "content": answers[turn]}] if turn < len(answers) else []
    return messages


def by_hand(model: Any, tokenizer: Any, messages: list[dict[str, str]], where: str, steer: Add) -> str:
    """Greedy, without a cache: a hook of torch adds the vector where the contents of the role stand in the text."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    role = {"answer": "assistant", "instruction": "user"}.get(where)
    chosen, start = [], 0
    for message in messages:
        at = text.find(message["content"].strip(), start)
        if message["role"] == role:
            chosen.append((at, at + len(message["content"].strip())))
        start = at + len(message["content"].strip())
    mask = [where == "all" or any(a < stop and b > begin for begin, stop in chosen) for a, b in found["offset_mapping"]]
    ids, prompt = list(found["input_ids"]), len(found["input_ids"])
    name, _ = blocks(model)

    def shift(_module: nn.Module, _args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        hidden = hidden + torch.tensor(mask)[:, None] * steer.vector.vector
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = model.get_submodule(f"{name}.1").register_forward_hook(shift)
    for _ in range(NEW):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in turn_ends(model, tokenizer):
            break
        ids.append(token)
        mask.append(where in ("all", "answer", "generated"))
    handle.remove()
    return written_text(tokenizer, ids[prompt:])


@pytest.mark.parametrize("where", ["all", "answer", "instruction", "generated"])
def test_each_turn_is_that_of_hooks_on_the_whole_chat(folder: Path, where: str) -> None:
    """Kept cache, no cache, a padded batch and a bridge give what plain torch gives for the whole chat."""
    (model, tokenizer), steer = opened(folder), add(where)
    chat = Chat(model, steer, tokenizer=tokenizer, max_new_tokens=NEW)
    answers: list[str] = []
    for turn, text in enumerate(TURNS):
        messages = said(*answers, system=False)
        expected = by_hand(model, tokenizer, messages, where, steer)
        assert chat.say(text) == expected, (turn, chat.answerer.reused)
        options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": NEW}
        assert answer_chats(model, [messages], steer, use_cache=False, **options) == [expected]
        both = answer_chats(model, [said(system=False), messages], steer, **options)
        assert both[1] == expected
        answers.append(expected)
    assert [m["content"] for m in chat.messages if m["role"] == "assistant"] == answers
    encoded = encode_chat(tokenizer, said(*answers[:2], system=False))
    ids, roles = torch.tensor([[*encoded.ids, 9]]), torch.tensor([encoded.roles])
    seen = []
    for given in ([], steer):
        with torch.no_grad(), attach(model, given) as positions, positions.generating(len(encoded.ids), roles):
            seen.append(model(input_ids=ids).logits[0, -1])
    assert not torch.allclose(*seen, atol=1e-2), "the intervention changes nothing: the test would prove nothing"
    if where != "answer":
        return
    assert (
        answer_chats(load_model(folder, device="cpu"), [said(*answers[:2], system=False)], steer, max_new_tokens=NEW)
        == answers[2:]
    )


def test_the_cache_is_kept_where_that_is_exact(folder: Path) -> None:
    model, tokenizer = opened(folder)
    cut = "gemma3" not in type(model).__name__.lower()  # a window cannot be cut
    for steer, kept in (
        (add("answer"), True),
        (add("instruction").times(0.5), True),
        (add([1, 2]), True),
        (add([-1]), False),
        (add(lambda context: context.positions > 2), False),
    ):
        chat = Chat(model, steer, tokenizer=tokenizer, max_new_tokens=3)
        chat.say(TURNS[0])
        first = chat.answerer.prompt_tokens
        chat.say(TURNS[1])
        if cut:
            assert (chat.answerer.reused >= first - 8) == kept, (steer.where, chat.answerer.reused, first)
        answers = [m["content"] for m in chat.messages if m["role"] == "assistant"]
        fresh = answer_chats(model, [said(answers[0], system=False)], steer, tokenizer=tokenizer, max_new_tokens=3)
        assert fresh == answers[1:]


def test_what_changes_between_turns_is_computed_again(folder: Path) -> None:
    model, tokenizer = opened(folder)
    for first, second in (
        (add("all"), add("all").times(-1)),
        (add("all"), []),
        ([], add("generated", schedule=Schedule([(0, 1), (4, 0)]))),
        (add("prompt"), add("prompt")),
    ):
        chat = Chat(model, first, tokenizer=tokenizer, max_new_tokens=NEW)
        answers = [chat.say(TURNS[0])]
        chat.interventions = second
        answers += [chat.say(TURNS[1]), chat.say(TURNS[2])]
        for turn in (1, 2):
            fresh = answer_chats(
                model, [said(*answers[:turn], system=False)], second, tokenizer=tokenizer, max_new_tokens=NEW
            )
            assert fresh == answers[turn : turn + 1]


def test_a_system_prompt_is_read_whether_or_not_the_template_has_a_place_for_it(folder: Path) -> None:
    model, tokenizer = opened(folder)
    chat, bare = encode_chat(tokenizer, said()), encode_chat(tokenizer, said(system=False))
    assert chat.text.count(SYSTEM) == 1 and chat.text.replace(SYSTEM, "") != bare.text + SYSTEM
    roles: dict[int, list[int]] = {}
    for token, role in zip(chat.ids, chat.roles):
        roles.setdefault(role, []).append(token)
    assert tokenizer.decode(roles[3]).strip() == SYSTEM
    assert tokenizer.decode(roles[5]).strip() == TURNS[0]
    with_system = Chat(model, system=SYSTEM, tokenizer=tokenizer, max_new_tokens=NEW)
    assert with_system.say(TURNS[0]) == answer_chats(model, [said()], tokenizer=tokenizer, max_new_tokens=NEW)[0]
    assert encode_chat(tokenizer, [{"role": "system", "content": " "}, *said(system=False)]) == bare


def test_an_answer_ends_at_the_templates_end_of_turn(folder: Path) -> None:
    model, tokenizer = opened(folder)
    tilde = tokenizer.convert_tokens_to_ids("~")
    ends = turn_ends(model, tokenizer)
    assert tokenizer.eos_token_id in ends
    assert (tilde in ends) == ("~" in tokenizer.chat_template)
    # The first token of an answer, were it the end of a turn, is not written.
    whole = list(Answerer(model, tokenizer).tokens(said(), [], Sampling(max_new_tokens=4)))
    answerer = Answerer(model, tokenizer)
    answerer.ends = (whole[1],)
    assert list(answerer.tokens(said(), [], Sampling(max_new_tokens=4))) == whole[: whole.index(whole[1])]


def test_an_answer_may_be_stopped_and_an_error_loses_nothing(folder: Path) -> None:
    model, tokenizer = opened(folder)
    chat = Chat(model, add("all"), tokenizer=tokenizer, max_new_tokens=30)
    pieces = chat.stream(TURNS[0])
    got = next(pieces) + next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": got}
    before = [module._forward_hooks.copy() for module in model.modules()]
    assert not any(before), "hooks are gone"
    chat.say(TURNS[1])
    answers = [m["content"] for m in chat.messages if m["role"] == "assistant"]
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 30}
    assert answer_chats(model, [said(got, system=False)], add("all"), **options) == answers[1:]
    held = list(chat.messages)
    with torch.no_grad(), pytest.raises(UserError, match="not finite"):
        weight = next(iter(model.get_output_embeddings().parameters()))
        saved = weight.clone()
        weight.fill_(float("nan"))
        try:
            chat.say(TURNS[2])
        finally:
            weight.copy_(saved)
    assert chat.messages == held


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "needs at least one"),
        ("hello", "a chat is a list of messages"),
        ([{"role": "user"}], "is no message: it needs a role and a content"),
        ([{"role": "user", "content": 3}], "is no message"),
        (["hello"], "is no message"),
        ([*said()[:2], {"role": "assistant", "content": "yes"}], "ends with an answer"),
    ],
)
def test_bad_chats_are_refused_in_one_line(messages: Any, message: str, folder: Path) -> None:
    with pytest.raises(UserError) as error:
        encode_chat(AutoTokenizer.from_pretrained(folder), messages)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_a_template_refuses_is_one_line() -> None:
    tokenizer = tiny_lm.tokenizer()
    with pytest.raises(UserError, match="has no chat template"):
        encode_chat(tokenizer, said())
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(UserError, match=r"refuses these messages \(roles must"):
        encode_chat(tokenizer, said())
