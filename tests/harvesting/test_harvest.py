"""Harvesting: the cache holds what the model computes, and an interruption leaves no trace."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from saelab.cli import main
from saelab.data import tokenized
from saelab.data.cache import ActivationCache, CacheWriter
from saelab.data.text import from_documents
from saelab.distributed.exchange import exchange_bytes
from saelab.errors import UserError
from saelab.harvesting import HarvestConfig, Share, harvest, harvest_many
from saelab.harvesting.activations import Reader
from saelab.lm import load_model, locate
from tests import tiny_lm
from tests.processes import run_processes

HOOK = "blocks.2.hook_resid_post"
TEXT = from_documents([tiny_lm.sentences(120, seed) for seed in range(6)])
# Shards of four passes of two contexts: 45 contexts make five whole shards and a short one.
SETTINGS: dict[str, Any] = {"tokens": 45 * 16, "context_length": 16, "pass_tokens": 32, "shard_bytes": 8 * 16 * 16 * 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(tiny_lm.save_llama(tmp_path_factory.mktemp("llama")), device="cpu")


def config(**options: Any) -> HarvestConfig:
    return HarvestConfig(**{"dtype": "float32", "separator": "none", **SETTINGS, **options})


@pytest.fixture(scope="module")
def cache(model: Any, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return harvest(model, HOOK, TEXT, tmp_path_factory.mktemp("c") / "cache", config())


def test_rows_are_the_models_activations(model: Any, cache: ActivationCache) -> None:
    assert cache.n_rows == 45 * 15
    assert [s.rows for s in cache.manifest.shards] == [120] * 5 + [75]
    for tokens, rows in cache.contexts("all"):
        assert int(tokens[0]) == model.tokenizer.bos_token_id
        assert int(rows[0]) == -1
        expected = model.run_with_cache(tokens[None])[1][HOOK][0, 1:]
        found = cache.read(rows[1:])
        torch.testing.assert_close(found.acts, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert torch.equal(found.tokens, tokens[1:])


def test_the_manifest_tells_where_rows_come_from(model: Any, cache: ActivationCache) -> None:
    manifest = cache.manifest
    assert (manifest.hook_name, manifest.hf_hook_name) == (HOOK, "model.layers.2")
    assert (manifest.bos, manifest.skip_first, manifest.text) == ("context", 1, "memory")
    assert manifest.weights_fingerprint and manifest.tokenizer_hash and manifest.text_fingerprint
    assert Path(manifest.model).is_dir()
    tokens, _ = cache.tokens_window(200, 8, 8)
    assert "".join(cache.token_strings(tokens)) == model.tokenizer.decode(tokens)
    ids = torch.cat([t[1:] for t, _ in cache.contexts("all")])
    owner = torch.tensor([cache.document(row) for row in range(cache.n_rows)])
    first = model.tokenizer(list(TEXT.documents())[1], add_special_tokens=False)["input_ids"]
    assert ids[owner == 1].tolist() == first


def test_the_bos_token_of_a_document_has_no_row_wherever_it_stands(model: Any, tmp_path: Path) -> None:
    """The third document brings its own: it is neither doubled nor stored."""
    own = model.tokenizer
    first, second, third = (tiny_lm.sentences(50, seed) for seed in range(3))
    text = from_documents([first, second, own.bos_token + third])
    found = harvest(model, HOOK, text, tmp_path / "cache", config(bos="document", skip_first=0))
    without = [token for tokens, rows in found.contexts("all") for token in tokens[rows < 0].tolist()]
    assert without == [own.bos_token_id] * 3
    assert own.bos_token_id not in found.read(torch.arange(found.n_rows)).tokens.tolist()


@pytest.mark.parametrize("shards", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_killed_harvest_resumes_to_the_same_bytes(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, gradients: bool
) -> None:
    from saelab.data.cache.storage import Folder

    options = config(gradients=gradients, dtype="float16", shard_bytes=SETTINGS["shard_bytes"] // 2)
    harvest(model, HOOK, TEXT, tmp_path / "whole", options)
    write, written = Folder.write, 0

    def dying(self: Folder, name: str, data: bytes) -> None:
        nonlocal written
        if name.startswith("shard") or (shards == 6 and written == 6):
            if written == shards:
                (self.local / f".{name}.partial").write_bytes(data[: len(data) // 2])
                raise KeyboardInterrupt
            written += 1
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            harvest(model, HOOK, TEXT, tmp_path / "cut", options)
    with pytest.raises(UserError, match="unfinished"):
        ActivationCache(tmp_path / "cut")
    harvest(model, HOOK, TEXT, tmp_path / "cut", options, resume=True)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    harvest(model, HOOK, TEXT, tmp_path / "cut", options, resume=True)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def harvest_together(rank: int, size: int, root: str, last: int) -> None:
    """What each of several processes does; with ``last`` it dies once it has written so many shards."""
    from saelab.data.cache.storage import Folder

    model = load_model(Path(root) / "llama", device="cpu")
    write, written = Folder.write, 0

    def dying(self: Folder, name: str, data: bytes) -> None:
        nonlocal written
        if name.startswith("shard"):
            if written == last:
                os._exit(3)
            written += 1
        write(self, name, data)

    Folder.write = dying  # type: ignore[method-assign]
    tokenized.GROUP = 500  # characters: several parts of the text for each process
    meeting = dist.FileStore(f"{root}/meeting-{last}", size)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    options = config(gradients=True, dtype="float16", shard_bytes=SETTINGS["shard_bytes"] // 2)
    hooks = [HOOK, "blocks.1.hook_mlp_out"]
    harvest_many(
        model, hooks, TEXT, f"{root}/many", options, resume=True, share=Share(rank, size, dist.barrier, exchange_bytes)
    )
    dist.destroy_process_group()


def test_several_processes_write_the_cache_of_one(tmp_path: Path) -> None:
    model = load_model(tiny_lm.save_llama(tmp_path / "llama"), device="cpu")
    options = config(gradients=True, dtype="float16", shard_bytes=SETTINGS["shard_bytes"] // 2)
    harvest_many(model, [HOOK, "blocks.1.hook_mlp_out"], TEXT, tmp_path / "whole", options)
    shards = len(ActivationCache(tmp_path / "whole" / HOOK).manifest.shards)
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        run_processes(harvest_together, (3, str(tmp_path), 3), 3)  # dies between two hooks' shards
    begun = {p.name for p in (tmp_path / "many" / "blocks.1.hook_mlp_out").glob("*")}
    assert 0 < sum(name.startswith("shard") for name in begun) < shards and "manifest.json" not in begun
    run_processes(harvest_together, (2, str(tmp_path), -1), 2)  # resumed by another number of processes
    assert files(tmp_path / "many") == files(tmp_path / "whole")


def test_a_harvest_into_an_object_store(model: Any, cache: ActivationCache, bucket: str, s3_server: Any) -> None:
    """Cut off by refused credentials at the third shard, and resumed: the files are those of a local harvest."""
    from saelab.data.cache.storage import Folder

    def refuse(method: str, path: str, number: int) -> tuple[int, str] | None:
        return (403, "ExpiredToken") if method == "PUT" and "shard_00002" in path else None

    with s3_server.faulty(refuse), pytest.raises(UserError, match=r"ExpiredToken: .*check the credentials"):
        harvest(model, HOOK, TEXT, f"{bucket}/cache", config())
    made = harvest(model, HOOK, TEXT, f"{bucket}/cache", config(), resume=True)
    assert made.fingerprint == cache.fingerprint
    there, here = Folder(f"{bucket}/cache"), Folder(cache.path)
    assert there.names() == here.names()
    assert all(there.read(name) == here.read(name) for name in here.names())


def test_resuming_with_other_settings_is_refused(model: Any, cache: ActivationCache) -> None:
    with pytest.raises(UserError, match=r"cannot resume .*: its context_length is 16, this harvest has 8"):
        harvest(model, HOOK, TEXT, cache.path, config(context_length=8), resume=True)
    with pytest.raises(UserError, match="already exists"):
        harvest(model, HOOK, TEXT, cache.path, config())


def test_many_hooks_in_one_pass(model: Any, cache: ActivationCache, tmp_path: Path) -> None:
    hooks = [HOOK, "blocks.1.hook_mlp_out", "model.layers.1.mlp.down_proj"]
    caches = harvest_many(model, hooks, TEXT, tmp_path / "many", config())
    assert list(caches) == hooks
    together, alone = caches[HOOK].read(range(40)), cache.read(range(40))
    assert torch.equal(together.tokens, alone.tokens)
    assert torch.equal(together.acts, alone.acts)
    expected = next(iter(cache.contexts("all")))[0]
    mlp = model.run_with_cache(expected[None])[1]["blocks.1.hook_mlp_out"][0, 1:]
    torch.testing.assert_close(caches[hooks[1]].read(range(15)).acts, mlp, rtol=1e-4, atol=1e-5)
    assert torch.equal(caches[hooks[2]].read(range(15)).acts, caches[hooks[1]].read(range(15)).acts)


def test_one_hook_and_several_are_two_functions(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="call harvest_many for several"):
        harvest(model, [HOOK], TEXT, tmp_path / "c", config())  # type: ignore[arg-type]
    for hooks in (HOOK, []):
        with pytest.raises(UserError, match="is not a list of hook points; call harvest for one"):
            harvest_many(model, hooks, TEXT, tmp_path / "c", config())
    assert not (tmp_path / "c").exists()


def test_each_value_is_cast_and_checked_once(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"activations": 0, "gradients": 0}
    cast = CacheWriter.cast

    def counted(self: CacheWriter, values: torch.Tensor, what: str, *rest: Any) -> torch.Tensor:
        seen[what] += len(values)
        return cast(self, values, what, *rest)

    monkeypatch.setattr(CacheWriter, "cast", counted)
    cache = harvest(model, HOOK, TEXT, tmp_path / "c", config(gradients=True))
    assert seen == {"activations": cache.n_rows, "gradients": cache.n_rows}


def test_gradients_are_stored_scaled_and_read_back(model: Any, tmp_path: Path) -> None:
    cache = harvest(model, HOOK, TEXT, tmp_path / "g", config(gradients=True, dtype="float16", skip_first=0))
    tokens, rows = next(iter(cache.contexts("all")))
    got = next(cache.batches(16, split="all", seed=None, grads=True))
    assert torch.equal(got.rows, rows)
    expected = Reader(model, [locate(model, HOOK)]).gradients(tokens[None])[1][0][0]
    assert got.grads is not None
    # float16 rounding is 2^-11 of each value; what is 2^-20 of the largest is a subnormal.
    torch.testing.assert_close(got.grads, expected, rtol=2e-3, atol=2e-5 * float(expected.abs().max()))
    scale = cache.manifest.grad_scale
    assert scale == 2.0 ** round(torch.tensor(scale).log2().item())


def test_tokens_with_large_norms_can_be_left_out(model: Any, cache: ActivationCache, tmp_path: Path) -> None:
    norms = cache.read(range(cache.n_rows)).acts.norm(dim=1)
    limit = float(norms.median())
    small = harvest(model, HOOK, TEXT, tmp_path / "small", config(max_norm=limit))
    keep = norms <= limit
    assert small.n_rows == int(keep.sum())
    assert small.manifest.dropped_rows == int((~keep).sum())
    assert torch.equal(small.read(range(small.n_rows)).acts, cache.read(range(cache.n_rows)).acts[keep])
    row = 77
    window, offset = small.tokens_window(row, 3, 3)
    assert int(window[offset]) == int(small.read([row]).tokens)


def test_activations_that_are_no_numbers_are_not_taken_for_large_ones(tmp_path: Path) -> None:
    broken = load_model(tiny_lm.save_llama(tmp_path / "broken"), device="cpu")
    with torch.no_grad():
        broken.original_model.model.embed_tokens.weight[5:] = torch.nan
    with pytest.raises(UserError, match=r"activations are not finite in shard_00000"):
        harvest(broken, HOOK, TEXT, tmp_path / "c", config(max_norm=1e6))


def test_progress_and_short_texts(model: Any, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    cache = harvest(model, HOOK, TEXT, tmp_path / "p", config(tokens=10**6), progress=lambda a, b: calls.append((a, b)))
    assert calls[-1][0] == cache.manifest.n_tokens < calls[-1][1]
    assert [a for a, _ in calls] == sorted({a for a, _ in calls})
    with pytest.raises(UserError, match="shorter than one context"):
        harvest(model, HOOK, from_documents(["cat"]), tmp_path / "q", config())
    assert not (tmp_path / "q").exists()


def test_overflow_names_the_remedy(model: Any, tmp_path: Path) -> None:
    hot = load_model(tiny_lm.save_llama(tmp_path / "hot"), device="cpu")
    with torch.no_grad():
        hot.original_model.model.embed_tokens.weight.mul_(1e6)
    with pytest.raises(UserError, match=r"too large for float16; use bfloat16 or float32"):
        harvest(hot, HOOK, TEXT, tmp_path / "c", config(dtype="float16"))


def test_bad_settings_are_one_line() -> None:
    for options, message in [
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"skip_first": 16}, "skip_first=16 must be below context_length=16"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
    ]:
        with pytest.raises(UserError, match=message):
            config(**options)


@pytest.mark.smollm2
def test_the_demo_model_on_the_demo_text(tmp_path: Path) -> None:
    settings = HarvestConfig(tokens=512, held_out=0.25)
    cache = harvest("smollm2", "blocks.9.hook_resid_post", "wiki-sample", tmp_path / "c", settings)
    assert (cache.d_in, cache.n_rows, cache.manifest.model) == (576, 4 * 127, "smollm2")
    assert 100 < cache.manifest.rms_norm < 200
    assert "Anarchism" in "".join(cache.token_strings(cache.tokens_window(0, 0, 30)[0]))


def test_the_command(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(tiny_lm.sentences(400))
    options = ["--model", str(model.cfg.model_name), "--text", str(tmp_path / "text.txt"), "--context-length", "16"]
    main(["harvest", *options, "--hook", HOOK, "--tokens", "320", "--out", str(tmp_path / "c"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["hook_name"], found["text"]) == (20 * 15, HOOK, str(tmp_path / "text.txt"))
    main(["harvest", *options, "--hook", HOOK, "--tokens", "320", "--out", str(tmp_path / "c"), "--resume"])
    many = ["--hook", HOOK, "blocks.0.hook_mlp_out", "--tokens", "160", "--out", str(tmp_path / "many"), "--gradients"]
    main(["harvest", *options, *many])
    assert ActivationCache(tmp_path / "many" / "blocks.0.hook_mlp_out").has_grads
    capsys.readouterr()
    for bad, message in [
        ([*options, "--out", str(tmp_path / "c")], "already exists"),
        ([*options, "--hook", "blocks.7.resid", "--out", str(tmp_path / "d")], "no hook point 'blocks.7.resid'"),
        ([*options, "--tokens", "0", "--out", str(tmp_path / "d")], "tokens=0 must be at least 1"),
        ([*options, "--device", "meta", "--out", str(tmp_path / "d")], "device 'meta' is not available here"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(["harvest", *bad])
        assert stopped.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "d").exists()
