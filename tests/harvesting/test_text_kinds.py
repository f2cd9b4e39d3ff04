"""Harvests of chats, of several documents, and of texts with holes: which tokens get a row, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.data.cache.merge import merge
from saelab.data.chat import ROLES
from saelab.data.text import from_documents
from saelab.errors import UserError
from saelab.harvesting import HarvestConfig, harvest, harvest_again
from saelab.lm import load_model
from tests import tiny_lm
from tests.data.test_chat import CHAT, CHATML

HOOK = "blocks.2.hook_resid_post"
SETTINGS: dict[str, Any] = {"tokens": 2000, "context_length": 16, "pass_tokens": 32, "dtype": "float32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_lm.save_llama(tmp_path_factory.mktemp("llama"))
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return load_model(folder, device="cpu")


def test_separators_are_read_and_not_stored(model: Any, tmp_path: Path) -> None:
    source = from_documents([tiny_lm.sentences(20, seed) for seed in range(9)])
    cache = harvest(model, HOOK, source, tmp_path / "c", HarvestConfig(**SETTINGS))
    assert cache.manifest.separator == "</s>" and not cache.manifest.roles
    text = torch.cat([tokens for tokens, _ in cache.contexts("all")])
    rows = torch.cat([rows for _, rows in cache.contexts("all")])
    ends = text == model.tokenizer.eos_token_id
    assert int(ends.sum()) == 8 and bool((rows[ends] == -1).all())
    assert int((rows < 0).sum()) == 8 + cache.manifest.n_contexts
    before = harvest(model, HOOK, source, tmp_path / "d", HarvestConfig(**SETTINGS, separator="none"))
    assert model.tokenizer.eos_token_id not in torch.cat([tokens for tokens, _ in before.contexts("all")])
    with pytest.raises(UserError, match="its separator is 'none'"):
        merge([cache, before], tmp_path / "m")


@pytest.mark.parametrize("roles", [(), ("assistant",), ("system", "template")])
def test_roles_are_stored_and_kept(model: Any, tmp_path: Path, roles: tuple[str, ...]) -> None:
    source = from_documents([CHAT] * 8)
    cache = harvest(model, HOOK, source, tmp_path / "c", HarvestConfig(**SETTINGS, roles=roles))
    assert (cache.manifest.kept_roles, cache.manifest.roles) == (list(roles), list(ROLES))
    text, _, slots = map(torch.cat, zip(*cache.shard_texts()))
    found = torch.cat(list(cache.shard_roles()))
    answers = model.tokenizer.decode(text[found == ROLES.index("assistant")])
    assert answers.startswith("rain fell. 猫 over old roofsrain fell.")
    kept = [ROLES[number] for number in found[slots.long()].unique().tolist()]
    assert set(kept) == (set(roles) or {"template", "system", "user", "assistant"})
    wanted = torch.tensor([name in roles if roles else name != "separator" for name in ROLES])[found.long()]
    wanted &= torch.arange(len(text)) % 16 > 0  # the first position of each context is skipped
    assert torch.equal(wanted.nonzero().flatten(), slots.long())
    joined = merge([cache, cache], tmp_path / "m")
    assert torch.equal(torch.cat(list(joined.shard_roles())), torch.cat([found, found]))
    again = harvest_again(model, cache, tmp_path / "a")
    assert torch.equal(torch.cat(list(again.shard_roles())), found)


def test_roles_of_what_is_no_chat_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would hold no row"):
        source = from_documents([tiny_lm.sentences(50)])
        harvest(model, HOOK, source, tmp_path / "c", HarvestConfig(**SETTINGS, roles=("assistant",)))
    with pytest.raises(UserError, match=r"unknown role 'bot'; roles are text, template, system, "):
        HarvestConfig(roles=("bot",))


def test_the_command_counts_what_it_left_out(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"text": tiny_lm.sentences(60), "url": "http://a"}, {"text": None, "url": "http://b"}]
    (tmp_path / "pages.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "more.txt").write_text(tiny_lm.sentences(60), encoding="utf-8")
    folder = str(model.tokenizer.name_or_path)
    base = ["harvest", "--model", folder, "--hook", HOOK, "--device", "cpu", "--context-length", "16"]
    texts = ["--text", str(tmp_path / "pages.jsonl"), str(tmp_path / "more.txt")]
    main([*base, *texts, "--out", str(tmp_path / "c")])
    printed = capsys.readouterr()
    assert "left out of the text: 1 record without 'text'" in printed.err
    assert "from 2 documents" in printed.out
    assert ActivationCache(tmp_path / "c").manifest.left_out == {"records without 'text'": 1}
    main(["cache", "info", str(tmp_path / "c"), "--json"])
    assert json.loads(capsys.readouterr().out)["left_out"] == {"records without 'text'": 1}
    (tmp_path / "void.jsonl").write_text(json.dumps(lines[1]), encoding="utf-8")
    with pytest.raises(SystemExit):
        main([*base, "--text", str(tmp_path / "void.jsonl"), "--out", str(tmp_path / "d")])
    error = " ".join(capsys.readouterr().err.split())
    assert "void.jsonl (left out: 1 record without 'text') is shorter than one context" in error
