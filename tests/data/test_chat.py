"""Chats go through the model's template, each token knows its role, and documents do not run into each other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from saelab.data.chat import ROLES, render
from saelab.data.packing import Contexts, pack, resolve_separator
from saelab.data.text import Chat, TextSource, from_documents, open_text
from saelab.errors import UserError
from tests import tiny_lm

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# As Llama 2: roles have no words of their own, contents are trimmed, a system message moves into the first turn.
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {% if s and loop.first %}<<{{ s }}>> {% endif %}"
    "{{ m['content'].strip() }} [/INST]{% else %} {{ m['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
# As Qwen 3: what stands before </think> is taken out of the content.
THINKING = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'].split('</think>')[-1].lstrip() }}</{{ m['role'] }}>"
    "{% endfor %}"
)
# As Qwen: an empty content leaves no line, calls of tools follow.
TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\n<call>' }}{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"place": "the harbour"}}}
WITH_TOOLS = [
    {"role": "user", "content": "rain over the harbour"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "rain", "content": "the harbour"},
]
CHAT = [
    {"role": "system", "content": "user"},  # a content that is also a word of the template
    {"role": "user", "content": " the cat sat\n"},
    {"role": "assistant", "content": "rain fell. 猫 over old roofs"},
]


def tokenizer(template: str | None) -> Any:
    made = tiny_lm.tokenizer()
    made.chat_template = template
    return made


def by_role(found: Any, tokenizer: Any) -> dict[str, str]:
    """The text of each role's tokens, joined."""
    tokens, roles = found.tokens.flatten(), found.roles.flatten()
    return {
        name: tokenizer.decode(tokens[roles == number]) for number, name in enumerate(ROLES) if (roles == number).any()
    }


def packed(
    source: TextSource, own: Any, bos: Any = "none", separator: str = "none", length: int = 4, **options: Any
) -> Contexts:
    parts = list(pack(source, own, length, bos, 8, separator, **options))
    return Contexts(*(torch.cat(columns) for columns in zip(*parts)))


@pytest.mark.parametrize("template", [CHATML, INST, THINKING])
def test_each_token_has_the_role_of_its_message(template: str) -> None:
    own = tokenizer(template)
    found = packed(from_documents([CHAT]), own, length=1)
    roles = by_role(found, own)
    assert roles["system"] == "user"
    assert roles["user"].strip() == "the cat sat"
    assert roles["assistant"].strip() == "rain fell. 猫 over old roofs"
    whole = own.apply_chat_template(CHAT, tokenize=False)
    expected = own(whole, add_special_tokens=False)["input_ids"]
    assert found.tokens.flatten().tolist() == expected  # the tokens that the model was trained on
    assert "INST" not in "".join(roles[name] for name in ("user", "assistant")) and "im_end" not in roles["user"]


def test_contents_that_the_template_changes() -> None:
    own = tokenizer(THINKING)
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a</think>\n\nold roofs"}]
    text, spans = render(own, messages)
    assert text == "<user>the cat</user><assistant>old roofs</assistant>"
    assert [(text[a:b], ROLES[role]) for a, b, role in spans] == [("the cat", "user")]


def test_a_bos_token_of_the_template_is_neither_lost_nor_doubled() -> None:
    own = tokenizer(INST)
    chat = CHAT[1:]
    ids = own(own.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
    assert ids[0] == own.bos_token_id
    for bos in ("none", "document"):
        found = packed(from_documents([chat, chat]), own, bos, length=1)
        assert found.tokens.flatten().tolist() == ids * 2
        assert [ROLES[n] for n in found.roles.flatten()[:2]] == [
            "separator",
            "template",
        ]  # an attention sink has no row
    plain = packed(from_documents([chat, "the cat"]), own, "document", length=1)
    text = own("the cat", add_special_tokens=False)["input_ids"]
    assert plain.tokens.flatten().tolist() == [*ids, own.bos_token_id, *text]
    assert [ROLES[n] for n in plain.roles.flatten()[len(ids) :]] == ["separator", *["text"] * len(text)]
    # ChatML in which BOS begins every message: it is part of the format, and has its row.
    own.chat_template = CHATML.replace("<|im_start|>", "{{ bos_token }}")
    found = packed(from_documents([CHAT]), own, length=1)
    starts = found.tokens.flatten() == own.bos_token_id
    assert int(starts.sum()) == 3 and {ROLES[n] for n in found.roles.flatten()[starts]} == {"template"}


def test_a_refused_chat_is_left_out_and_no_template_is_one_line() -> None:
    own = tokenizer(INST)
    source = from_documents([CHAT[1:], CHAT[2:], CHAT])
    left_out: Counter[str] = Counter()
    assert int(packed(source, own, length=1, left_out=left_out).documents.max()) == 1
    assert left_out == {"chats that the template refuses (roles must alternate)": 1}
    with pytest.raises(UserError, match=r"has no chat template, which messages need; give a model that has one"):
        packed(source, tokenizer(None))


def test_shared_gpt_and_parts_are_chats(tmp_path: Any) -> None:
    import json

    share = {"conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}], "source": "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps(share), encoding="utf-8")
    parts = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "mat"}]}]
    }
    empty = {"messages": [{"role": "user", "content": None}]}
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(parts)}\n{json.dumps(empty)}\n", encoding="utf-8")
    source = open_text(tmp_path)
    first, second = source.documents()
    assert first == [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    assert second == [{"role": "user", "content": "the mat"}]
    assert source.left_out == {"records with an empty 'messages'": 1}


@pytest.mark.parametrize("kind", ["memory", "jsonl", "parquet"])
def test_calls_of_tools_are_in_the_text(tmp_path: Any, kind: str) -> None:
    """The text is what the template makes of the whole chat, and a result is found behind a call that holds it."""
    import json

    import datasets

    own = tokenizer(TOOLS)
    expected = own.apply_chat_template(WITH_TOOLS, tokenize=False)
    path = tmp_path / f"chats.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps({"messages": WITH_TOOLS}), encoding="utf-8")
    elif kind == "parquet":  # which fills what a message lacks with nulls
        datasets.Dataset.from_list([{"messages": WITH_TOOLS}]).to_parquet(str(path))
    source = from_documents([WITH_TOOLS]) if kind == "memory" else open_text(path)
    (found,) = source.documents()
    assert not isinstance(found, str)
    text, spans = render(own, found)
    assert text == expected and "<call>" in text
    assert spans[-1][0] == text.rindex("the harbour")
    assert [ROLES[role] for *_, role in spans] == ["user", "tool"]


# As Llama 3, Mistral and Qwen: definitions before the chat, in the last user message, or in the first system message.
DEFINED = {
    "llama": "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}" + CHATML,
    "mistral": (
        "{% for m in messages %}[{{ m.role }}]{% if loop.last and tools %}{{ tools | tojson }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    ),
    "qwen": (
        "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>{% endif %}{% for m in messages %}"
        "{% if m.role != 'system' or not tools %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    ),
}
RAIN = {
    "type": "function",
    "function": {"name": "rain", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}},
}
ROOFS = {"type": "function", "function": {"name": "roofs", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("kind", ["memory", "jsonl", "string", "strings", "parquet", "saved"])
@pytest.mark.parametrize("template", DEFINED)
def test_the_template_gets_the_tools_that_a_record_lists(tmp_path: Any, kind: str, template: str) -> None:
    import json

    import datasets

    own = tokenizer(DEFINED[template])
    lists = [[RAIN], [RAIN, ROOFS] if kind not in ("parquet", "saved") else [RAIN], None]
    expected = [own.apply_chat_template(CHAT, tools=tools, tokenize=False) for tools in lists]
    records = [{"messages": CHAT, "tools": tools} for tools in lists]
    if kind == "string":
        records = [record | {"tools": json.dumps(record["tools"])} for record in records]
    if kind == "strings":
        records = [record | {"tools": [json.dumps(t) for t in record["tools"] or []]} for record in records]
    if kind in ("jsonl", "string", "strings"):
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        source = open_text(tmp_path / "a.jsonl")
    elif kind == "memory":
        source = from_documents([Chat(CHAT, tools or []) for tools in lists])
        assert source.fingerprint != from_documents([CHAT, CHAT, CHAT]).fingerprint
    else:
        data = datasets.Dataset.from_list([{"z": "x", **record} for record in records])
        save = data.to_parquet if kind == "parquet" else data.save_to_disk
        save(str(tmp_path / "a.parquet"))
        source = open_text(tmp_path / "a.parquet")
    left_out: Counter[str] = Counter()
    found = packed(source, own, length=1, left_out=left_out)
    ids = [token for text in expected for token in own(text, add_special_tokens=False)["input_ids"]]
    assert found.tokens.flatten().tolist() == ids and not left_out
    assert '"rain"' in expected[0] and '"rain"' not in expected[2]
    answers = by_role(found, own)["assistant"].replace("roofs ", "roofs")  # a token may begin with the blank before it
    assert answers.strip() == CHAT[2]["content"] * 3  # and none of them has a definition


def test_tools_that_the_template_does_not_show_are_counted(tmp_path: Any) -> None:
    import json

    own = tokenizer(CHATML)
    lists: list[Any] = [[RAIN], [ROOFS], [], None, "", ["rain"], 3, {"rain": 1}, "no JSON"]
    records = [{"messages": CHAT, "tools": tools} for tools in lists]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    left_out: Counter[str] = Counter()
    found = packed(open_text(tmp_path / "a.jsonl"), own, length=1, left_out=left_out)
    ids = own(own.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False)["input_ids"]
    assert found.tokens.flatten().tolist() == ids * len(lists)
    unseen, wrong = "lists of tools that the chat template does not show", "lists of 'tools' that are no definitions"
    assert left_out == {unseen: 2, wrong: 4}


def test_a_document_in_memory_that_is_no_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"document 2 of memory is neither a text nor a chat"):
        from_documents(["the cat", [{"from": ["user"], "value": "sat"}]])


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_chats_of_tables(tmp_path: Any, kind: str) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"messages": CHAT, "source": "x"}, {"messages": None, "source": "y"}])
    if kind == "parquet":
        data.to_parquet(str(tmp_path / "a.parquet"))
    else:
        data.save_to_disk(str(tmp_path / "saved"))
    source = open_text(tmp_path / "a.parquet" if kind == "parquet" else tmp_path / "saved")
    assert list(source.documents()) == [CHAT]
    assert source.left_out == {"records without 'messages'": 1}


def test_a_separator_stands_between_documents_and_has_its_own_role() -> None:
    own = tokenizer(None)
    documents = ["the cat", "sat on", "a mat"]
    found = packed(from_documents(documents), own, separator="</s>", length=1)
    assert own.decode(found.tokens.flatten()) == "the cat</s>sat on</s>a mat"
    inserted = found.roles.flatten() == ROLES.index("separator")
    assert found.tokens.flatten()[inserted].tolist() == [own.eos_token_id] * 2
    assert found.documents.flatten()[inserted].tolist() == [0, 1]
    assert own.decode(packed(from_documents(documents), own, separator="\n", length=1).tokens.flatten()) == "\n".join(
        documents
    )


def test_the_separator_is_one_that_the_model_knows() -> None:
    own = tokenizer(None)
    assert resolve_separator("auto", own, "context") == "</s>"
    assert resolve_separator("auto", own, "document") == "none"
    assert resolve_separator("newline", own, "none") == "\n"
    assert resolve_separator("none", own, "context") == "none"
    own.add_special_tokens({"eos_token": "<|im_end|>"})
    own.add_tokens(["<|endoftext|>"])  # as chat models have it: EOS ends a turn, not a document
    assert resolve_separator("auto", own, "none") == "<|endoftext|>"
    assert resolve_separator("eos", own, "none") == "<|im_end|>"
    assert resolve_separator("<s>", own, "none") == "<s>"
    with pytest.raises(UserError, match=r"separator '<doc>' is no token of the vocabulary"):
        resolve_separator("<doc>", own, "none")
    own.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        resolve_separator("eos", own, "none")
