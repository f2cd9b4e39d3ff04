"""Caches made of activations that other tools stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saelab import ActivationCache, load_model
from saelab.cli import main
from saelab.data.cache.importing import import_activations
from saelab.errors import UserError
from tests.tiny_lm import save_llama, sentences

D = 6
HOOK = "blocks.2.hook_resid_post"


def made(contexts: int = 20, length: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Activations ``[contexts, length, D]`` and token ids."""
    rng = np.random.default_rng(0)
    acts = rng.normal(size=(contexts, length, D)).astype(np.float32)
    return acts, rng.integers(0, 300, size=(contexts, length))


def check(cache: ActivationCache, acts: np.ndarray, tokens: np.ndarray | None, skip: int = 0) -> None:
    """Every row where it should be, with its token and its place in its context."""
    kept = acts[:, skip:].reshape(-1, D)
    batch = cache.read(range(cache.n_rows))
    assert torch.equal(batch.acts, torch.from_numpy(kept))
    assert cache.manifest.context_length == acts.shape[1]
    assert cache.manifest.rms_norm > 0
    if tokens is not None:
        assert torch.equal(batch.tokens, torch.from_numpy(tokens[:, skip:].reshape(-1)))
        each = acts.shape[1] - skip
        window, offset = cache.tokens_window(2 * each + 1, 10, 10)
        assert window.tolist() == tokens[2].tolist()
        assert offset == skip + 1
        assert cache.document(2 * each + 1) == 2


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("flat", [False, True])
def test_npy(flat: bool, skip: int, tmp_path: Path) -> None:
    acts, tokens = made()
    np.save(tmp_path / "acts.npy", acts.reshape(-1, D) if flat else acts)
    np.save(tmp_path / "tokens.npy", tokens)
    cache = import_activations(
        tmp_path / "cache",
        tmp_path / "acts.npy",
        tokens=str(tmp_path / "tokens.npy"),
        context_length=5 if flat else None,
        skip_first=skip,
        shard_rows=35,
        hook_name=HOOK,
    )
    assert len(cache.manifest.shards) > 1
    check(cache, acts, tokens, skip)
    assert cache.hook_name == HOOK
    cache.verify()


@pytest.mark.parametrize("form", ["saved", "parquet", "jsonl", "dict"])
@pytest.mark.parametrize("vectors", [False, True])
def test_dataset_column(form: str, vectors: bool, tmp_path: Path) -> None:
    import datasets

    acts, tokens = made()
    source = tmp_path / f"data.{form}"
    rows = acts.reshape(-1, D) if vectors else acts
    ids = tokens.reshape(-1) if vectors else tokens
    data = datasets.Dataset.from_dict({"acts": rows.tolist(), "input_ids": ids.tolist(), "note": ["x"] * len(rows)})
    if form == "saved":
        data.save_to_disk(source)
    elif form == "dict":
        datasets.DatasetDict({"validation": data}).save_to_disk(source)
    elif form == "parquet":
        data.to_parquet(str(source))
    else:
        data.to_json(str(source))
    options = {"context_length": 5} if vectors else {}
    cache = import_activations(
        tmp_path / "cache",
        source,
        column="acts",
        shard_rows=40,
        split="validation" if form == "dict" else "train",
        **options,
    )
    check(cache, acts, tokens)


def test_saelens_arrow_layout_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    acts, tokens = made()
    features = datasets.Features(
        {HOOK: datasets.Array2D((5, D), "float32"), "token_ids": datasets.Sequence(datasets.Value("int32"), length=5)}
    )
    data = datasets.Dataset.from_dict({HOOK: acts, "token_ids": tokens.tolist()}, features=features)
    data.save_to_disk(tmp_path / "arrow")
    command = ["cache", "import", str(tmp_path / "arrow"), "--out", str(tmp_path / "cache")]
    main([*command, "--skip-first", "1", "--model", "tiny", "--json"])
    assert json.loads(capsys.readouterr().out)["rows"] == 80
    cache = ActivationCache(tmp_path / "cache")
    check(cache, acts, tokens, skip=1)
    assert (cache.hook_name, cache.manifest.model, cache.manifest.skip_first) == (HOOK, "tiny", 1)


def text_folder(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    lines = [json.dumps({"text": sentences(200, seed=i)}) for i in range(30)]
    (tmp_path / "text" / "train.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "text"


@pytest.mark.filterwarnings("ignore")
def test_saelens_own_cache_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Arrow cache that SAELens' runner writes, against what the model gives on its tokens."""
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed here; run `make test-interop`")
    from sae_lens import cache_activations_runner

    model = load_model(save_llama(tmp_path / "model"), device="cpu")
    # Its loader takes names from TransformerLens' list only.
    monkeypatch.setattr(cache_activations_runner, "load_model", lambda **options: model)
    hook, rows = "blocks.1.hook_resid_post", 32 * 16
    config = sae_lens.CacheActivationsRunnerConfig(
        dataset_path=str(text_folder(tmp_path)),
        model_name="tiny",
        model_batch_size=4,
        hook_name=hook,
        d_in=16,
        training_tokens=rows,
        context_size=16,
        new_cached_activations_path=str(tmp_path / "arrow"),
        shuffle=False,
        device="cpu",
        buffer_size_gb=1e-5,
    )
    cache_activations_runner.CacheActivationsRunner(config).run()
    cache = import_activations(tmp_path / "cache", tmp_path / "arrow")
    assert (cache.n_rows, cache.d_in, cache.hook_name, cache.manifest.context_length) == (rows, 16, hook, 16)
    batch = cache.read(range(rows))
    assert batch.tokens.unique().numel() > 10
    with torch.no_grad():
        _, seen = model.run_with_cache(batch.tokens.reshape(-1, 16), names_filter=[hook], prepend_bos=False)
    torch.testing.assert_close(batch.acts, seen[hook].reshape(-1, 16), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_nnsight_activations(tmp_path: Path) -> None:
    """Activations that nnsight traced go through from_tensors, and are those of our own harvest's model."""
    nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed here; run `make test-interop`")
    folder = save_llama(tmp_path / "model")
    traced = nnsight.LanguageModel(str(folder), device_map="cpu", dispatch=True)
    tokens = torch.randint(2, 300, (8, 12))
    with torch.no_grad(), traced.trace({"input_ids": tokens}):
        saved = traced.model.layers[1].output.save()
    acts = (saved[0] if isinstance(saved, tuple) else saved).detach()
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts, tokens, hook_name="blocks.1.hook_resid_post")
    assert cache.n_rows == 96
    model = load_model(folder, device="cpu")
    with torch.no_grad():
        _, seen = model.run_with_cache(tokens, names_filter=[cache.hook_name], prepend_bos=False)
    batch = cache.read(range(96))
    torch.testing.assert_close(batch.acts, seen[cache.hook_name].reshape(-1, 16), rtol=1e-4, atol=1e-5)
    assert torch.equal(batch.tokens.reshape(8, 12), tokens)


def saved(tmp_path: Path, name: str, **columns: list) -> Path:
    import datasets

    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (lambda p: p / "missing.npy", {}, "does not exist"),
        (lambda p: npy(p, np.zeros((4, D), np.int64)), {}, "floats"),
        (lambda p: npy(p, np.zeros(4, np.float32)), {}, "floats"),
        (lambda p: npy(p, np.zeros((0, D), np.float32)), {}, "no activations"),
        (lambda p: npy(p, np.ones((7, D), np.float32)), {"context_length": 5}, "multiple of the context length"),
        (lambda p: npy(p, np.ones((10, D), np.float32)), {"context_length": 5, "skip_first": 5}, "leaves nothing"),
        (lambda p: npy(p, np.ones((10, D), np.float32)), {"context_length": 0}, "at least 1"),
        (lambda p: npy(p, np.ones((2, 5, D), np.float32)), {"context_length": 10}, "contexts of 5 rows, not context_"),
        (lambda p: npy(p, np.array([{}], dtype=object)), {}, "not a readable"),
        (lambda p: broken(p, "acts.npy"), {}, "not a readable"),
        (lambda p: broken(p, "acts.parquet"), {}, "cannot be read as a dataset"),
        (lambda p: broken(p, "acts.jsonl"), {}, "cannot be read as a dataset"),
        (lambda p: broken(p, "acts.txt"), {}, "neither a saved dataset"),
        (lambda p: saved(p, "two", a=[[1.0, 2.0]], b=[[1.0, 2.0]]), {}, "name the column"),
        (lambda p: saved(p, "two", acts=[[1.0, 2.0]]), {"column": "act"}, "did you mean acts"),
        (lambda p: saved(p, "two", acts=[[1.0, 2.0]]), {"tokens": "ids"}, "no column 'ids'"),
        (lambda p: saved(p, "ragged", acts=[[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]]), {}, "equally long"),
        (
            lambda p: saved(p, "ids", acts=[[[1.0, 2.0], [3.0, 4.0]]], tokens=[[1, 2, 3, 4]]),
            {},
            "4 token ids for 2 activations from row 0 on",
        ),
        (lambda p: saved(p, "nan", acts=[[float("nan"), 2.0]] * 3), {}, "not finite"),
    ],
)
def test_what_is_no_activations_is_refused_in_one_line(make, options: dict, match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match) as error:
        import_activations(tmp_path / "cache", make(tmp_path), **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def npy(tmp_path: Path, content: np.ndarray) -> Path:
    np.save(tmp_path / "acts.npy", content, allow_pickle=True)
    return tmp_path / "acts.npy"


def broken(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).write_bytes(b"\x93NUMPY no such thing {[")
    return tmp_path / name


@pytest.mark.parametrize("kind", ["<f2", ">f2", ">f4", "<f8", ">f8", "longdouble"])
def test_every_kind_of_number_of_numpy(tmp_path: Path, kind: str) -> None:
    acts = np.random.default_rng(0).normal(size=(40, 6)).astype(kind)
    ids = np.arange(40).astype(">u2")
    np.save(tmp_path / "acts.npy", acts)
    np.save(tmp_path / "ids.npy", ids)
    cache = import_activations(tmp_path / "c", tmp_path / "acts.npy", tokens=str(tmp_path / "ids.npy"))
    assert cache.manifest.dtype == ("float16" if "f2" in kind else "float32")
    found = cache.read(range(40))
    assert torch.equal(found.acts, torch.from_numpy(acts.astype(np.float32))) and found.tokens.tolist() == ids.tolist()
    wide = import_activations(tmp_path / "w", tmp_path / "acts.npy", dtype="float32")
    assert wide.manifest.dtype == "float32"


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_columns_keep_their_precision(tmp_path: Path, kind: str) -> None:
    import datasets

    acts = np.random.default_rng(0).normal(size=(12, 6)).astype(kind)
    features = datasets.Features({"acts": datasets.Sequence(datasets.Value(kind))})
    data = datasets.Dataset.from_dict({"acts": list(acts)}, features=features)
    data.to_parquet(str(tmp_path / "acts.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    for number, source in enumerate(("acts.parquet", "saved")):
        cache = import_activations(tmp_path / f"c{number}", tmp_path / source)
        assert cache.manifest.dtype == kind
        assert torch.equal(cache.read(range(12)).acts, torch.from_numpy(acts.astype(np.float32)))
