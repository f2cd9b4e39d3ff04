"""Chats with a steered model: system prompt, several turns, and a cache that is kept over them.

Messages are dictionaries with ``role`` and ``content``, as everywhere. They go through the model's own chat template,
and every token knows whose message it belongs to, so that interventions may act on the answer only
(``where="answer"``: the assistant's messages, earlier ones too) or the instruction only (``where="instruction"``: the
user's messages).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from saelab.data.chat import ROLES, TEMPLATE, Rendered, render, roles_of
from saelab.errors import UserError
from saelab.lm.caches import keep_first
from saelab.lm.tokens import end_ids, padded, tokenizer_of, written_text
from saelab.steering.attachment import attach
from saelab.steering.conditions import LatentFires, ProbeFires
from saelab.steering.generation import KeptCache, Sampling, generate_tokens, token_steps
from saelab.steering.interventions import Intervention
from saelab.steering.positions import PHASES
from saelab.vocabulary import encoded

Message = Mapping[str, Any]  # role, content
# Options of apply_chat_template itself, with which a client could have it do something else.
_RESERVED = {"conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"}
_RESERVED |= {"tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "processor_kwargs"}
_RESERVED |= {"return_assistant_tokens_mask", "tokenizer_kwargs", "messages"}
_SYSTEM, _ANSWER = ("system", "developer"), ROLES.index("assistant")


@dataclass(frozen=True)
class EncodedChat:
    """A chat as the model reads it, up to where its answer begins."""

    ids: list[int]
    roles: list[int]  # of each token, places in saelab.data.chat.ROLES
    text: str


def encode_chat(tokenizer: Any, messages: Sequence[Message], **template: Any) -> EncodedChat:
    """The tokens of a chat through the tokenizer's template, with the beginning of the answer that it asks for.

    ``template`` goes to the template (``enable_thinking=False``). Where it has no system role, as Gemma's, the system
    prompt stands at the beginning of the first message of the user, as its makers advise. UserError for messages that
    are none, that do not end with one to be answered, or that the template refuses.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("chats need a fast tokenizer, which tells the place of each token")
    if taken := sorted(_RESERVED & set(template)):
        raise UserError(f"{taken[0]} is no variable of a chat template; leave it out")
    text, spans = _rendered(tokenizer, _checked(messages), template)
    found = encoded(tokenizer, text, return_offsets_mapping=True)
    ids = list(found["input_ids"])
    if not ids:
        raise UserError("the chat template makes no token of these messages; say something")
    return EncodedChat(ids, roles_of(found["offset_mapping"], spans).tolist(), text)


def _checked(messages: Sequence[Message]) -> list[Message]:
    if isinstance(messages, str | Mapping) or not messages:
        raise UserError("a chat is a list of messages with role and content, and needs at least one")
    for message in messages:
        texts = [message.get("role"), message.get("content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{message!r} is no message: it needs a role and a content, both text")
    if messages[-1]["role"] == "assistant":
        raise UserError("the chat ends with an answer; end it with the message that is to be answered")
    # An empty system prompt is none.
    return [m for m in messages if m["role"] not in _SYSTEM or m["content"].strip()]


def _rendered(tokenizer: Any, messages: list[Message], template: Mapping[str, Any]) -> Rendered:
    def attempt(given: list[Message]) -> Rendered | ValueError:
        try:
            return render(tokenizer, [dict(m) for m in given], add_generation_prompt=True, **template)
        except UserError:
            raise
        except ValueError as error:
            return error

    found = attempt(messages)
    has_system = messages[0]["role"] in _SYSTEM and len(messages) > 1 and messages[1]["role"] == "user"
    if has_system and (isinstance(found, ValueError) or _leaves_out(found, attempt(messages[1:]))):
        system, user, *rest = messages
        joined = {"role": "user", "content": f"{system['content'].strip()}\n\n{user['content']}"}
        folded = attempt([joined, *rest])
        if isinstance(folded, Rendered):
            return _with_system(folded, joined["content"], system["content"].strip())
    if isinstance(found, ValueError):
        raise UserError(
            f"the model's chat template refuses these messages ({found}); most ask for user and assistant in turn"
        ) from found
    return found


def _leaves_out(found: Rendered, without: Rendered | ValueError) -> bool:
    """Whether a template passes over the system's message, as one does that knows two roles."""
    return isinstance(without, Rendered) and found.text == without.text


def _with_system(found: Rendered, content: str, system: str) -> Rendered:
    """The first message divided into the system's part and the user's, where the template left it as it was."""
    if not found.spans:
        return found
    (start, stop, role), *rest = found.spans
    middle = start + len(system)
    if found.text[start:stop] not in (content, content.strip()) or middle >= stop:
        return found
    return Rendered(found.text, [(start, middle, ROLES.index("system")), (middle, stop, role), *rest])


def turn_ends(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends an answer: those that end a text, and the one that the chat template puts behind an answer.

    Not every model's settings name the latter. A template that ends answers by ordinary text adds none.
    """
    mark = "\ue000"
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", mark), ("user", "a"))]
    found = set(end_ids(model, tokenizer))
    for messages in (turns, turns[:2]):
        try:
            text = render(tokenizer, messages).text
        except ValueError:
            continue
        if mark not in text:
            continue
        special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
        behind = encoded(tokenizer, text.rpartition(mark)[2])["input_ids"]
        found.update(next(([int(token)] for token in behind if token in special), []))
        break
    return tuple(sorted(found))


def answer_chats(
    model: nn.Module,
    chats: Sequence[Sequence[Message]],
    interventions: Intervention | Sequence[Intervention] = (),
    *,
    tokenizer: Any = None,
    template: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> list[str]:
    """The model's answer to each chat, all in one batch; ``sampling`` takes the fields of :class:`Sampling`."""
    if not chats:
        return []
    tokenizer = tokenizer_of(model, tokenizer)
    rows = [encode_chat(tokenizer, messages, **(template or {})) for messages in chats]
    ends = turn_ends(model, tokenizer)
    ids, mask = padded([row.ids for row in rows])
    roles, _ = padded([row.roles for row in rows], TEMPLATE)  # what stands on padding is never read
    found = generate_tokens(model, ids, mask, interventions, eos=ends, roles=roles, **sampling)
    return [written_text(tokenizer, row) for row in found]


class Answerer:
    """Answers one chat after another, and does not compute again what the next one has in common with the last.

    The common beginning of two chats is taken from the cache where the same interventions acted on it in the same way:
    ``"answer"``, ``"instruction"``, ``"all"`` and positions from the start do; for ``"prompt"``, ``"generated"`` and
    schedules an earlier answer is part of the prompt now and is computed again; positions from the end and functions
    depend on the whole prompt, so nothing is kept. Neither is it where the cache cannot be cut, see
    :func:`saelab.lm.caches.keep_first`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, template: Mapping[str, Any] | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer_of(model, tokenizer)
        self.template = dict(template or {})
        self.ends = turn_ends(model, self.tokenizer)
        self.prompt_tokens = 0  # of the last chat
        self.reused = 0  # of those, taken from the cache
        self._kept = KeptCache()
        self._keys: list[tuple[int, int, bool]] = []  # token, role, generated: of the tokens in the cache
        self._steered: tuple[Intervention, ...] = ()

    def tokens(
        self, messages: Sequence[Message], interventions: Sequence[Intervention], settings: Sampling
    ) -> Generator[int, None, None]:
        """The tokens of the answer as they are generated. The model is steered until the iterator ends or is closed."""
        chat, steered = encode_chat(self.tokenizer, messages, **self.template), tuple(interventions)
        keys = [(token, role, False) for token, role in zip(chat.ids, chat.roles)]
        self.prompt_tokens, self.reused = len(keys), self._reuse(keys, steered)
        ids, roles = torch.tensor([chat.ids]), torch.tensor([chat.roles])
        phases = any(_depends_on_phase(one) for one in steered)
        try:
            with attach(self.model, steered) as positions, positions.generating(len(keys), roles):
                for step in token_steps(self.model, ids, torch.ones_like(ids), settings, self.ends, self._kept):
                    keys.append((int(step[0]), _ANSWER, phases))
                    yield keys[-1][0]
        finally:
            self._keys, self._steered = keys[: self._kept.length], steered

    def forget(self) -> None:
        """Drop the cache, as before another use of the model's weights."""
        self._kept, self._keys = KeptCache(), []

    def _reuse(self, keys: list[tuple[int, int, bool]], steered: tuple[Intervention, ...]) -> int:
        """How many tokens of the chat the cache holds, to which it is cut."""
        same = len(steered) == len(self._steered) and all(a is b for a, b in zip(steered, self._steered))
        common = 0
        if same and not any(_depends_on_end(one) for one in steered):
            # One token at least is computed: its logits are those of the first token of the answer.
            for ours, theirs in zip(keys[:-1], self._keys):
                if ours != theirs:
                    break
                common += 1
        cache = keep_first(self._kept.cache, self._kept.length, common)
        self._kept = KeptCache() if cache is None else KeptCache(cache, common)
        self._keys = []
        return self._kept.length


def _depends_on_phase(one: Intervention) -> bool:
    """Whether it treats what was generated otherwise than the prompt."""
    return one.where in PHASES or (one.schedule is not None and not one.schedule.constant)


def _depends_on_end(one: Intervention) -> bool:
    """Whether it may act on a token otherwise when the prompt grows."""
    own = one.when is not None and type(one.when) not in (LatentFires, ProbeFires)
    counted = not isinstance(one.where, str) and not callable(one.where) and any(place < 0 for place in one.where)
    return own or callable(one.where) or counted


class Chat:
    """A chat with a model that may be steered::

        chat = Chat(model, Add(vector, 8.0, where="answer"), system="You are brief.", max_new_tokens=80)
        print(chat.say("What is rain?"))
        for piece in chat.stream("And snow?"):
            print(piece, end="")

    ``messages`` holds what was said; ``interventions`` may be replaced between turns. ``sampling`` takes the fields of
    :class:`Sampling`; an answer ends at the template's own end of turn.
    """

    def __init__(
        self,
        model: nn.Module,
        interventions: Intervention | Sequence[Intervention] = (),
        *,
        system: str = "",
        tokenizer: Any = None,
        template: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> None:
        self.answerer = Answerer(model, tokenizer, template)
        self.interventions = interventions
        self.settings = Sampling(**sampling)
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def say(self, text: str) -> str:
        """The answer to the next message of the user."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Generator[str, None, None]:
        """The answer piece by piece. If the iterator is closed early, what was written so far is the answer; after an
        error the chat is as it was before the message."""
        given = self.interventions
        interventions = [given] if isinstance(given, Intervention) else list(given)
        messages = [*self.messages, {"role": "user", "content": text}]
        written: list[int] = []
        shown = ""
        tokens = self.answerer.tokens(messages, interventions, self.settings)
        try:
            for token in tokens:
                written.append(token)
                whole = written_text(self.answerer.tokenizer, written)  # a character may take several tokens
                piece, shown = whole[len(shown) :], whole
                yield piece
        except GeneratorExit:
            tokens.close()
            self.messages = [*messages, {"role": "assistant", "content": shown}]
            raise
        self.messages = [*messages, {"role": "assistant", "content": shown}]
