"""The feature index against brute force over dense codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from saelab import SAE, ActivationCache, SparseCode, UserError, build
from saelab.features import FeatureIndex, IndexConfig, LogitLens, build_index
from saelab.features.indexing.config import OPTIONAL
from saelab.features.indexing.examples import BANDS
from saelab.features.indexing.words import joins
from tests.features.lookup import Lookup

CONTEXT, N_CONTEXTS, D_IN, D_SAE, VOCAB = 16, 20, 6, 12, 11
# Small runs and chunks, so that merging runs and cutting chunks is exercised.
CONFIG = IndexConfig(batch_size=37, run_entries=150, chunk_entries=90, chunk_latents=5, neighbours=4, tokens=3)


class Planted(SAE):
    """Looks its code up in a table by the first coordinate of ``x``: any code can be planted."""

    variant = "planted"

    def __init__(self, table: Tensor, signed: bool) -> None:
        super().__init__(D_IN, table.shape[1])
        self.signed = signed
        self.table = table

    def encode(self, x: Tensor, grads: Tensor | None = None) -> SparseCode:
        acts = self.table[x[:, 0].long()]
        # A stored zero must not count as firing.
        _, indices = acts.abs().topk(min(5, acts.shape[1]), dim=1)
        return SparseCode.from_rows(acts.gather(1, indices), indices, acts.shape[1])


def planted(tmp_path: Path, signed: bool = False, skip_first: bool = False) -> tuple[Planted, ActivationCache, Tensor]:
    n = CONTEXT * N_CONTEXTS
    acts = torch.randn(n, D_IN)
    acts[:, 0] = torch.arange(n)
    tokens = torch.randint(0, VOCAB, (n,))
    code = torch.randn(n, D_SAE).masked_fill(torch.rand(n, D_SAE) > 0.2, 0.0)
    code = code if signed else code.abs()
    code[:, 3] = 0.0  # never fires
    code[:, 5] = 0.0
    code[7, 5] = 2.5  # fires once
    code = _keep_five(code)
    cache = ActivationCache.from_tensors(
        tmp_path / "cache", acts, tokens, context_length=CONTEXT, shard_rows=5 * CONTEXT
    )
    return Planted(code, signed), cache, code


def _keep_five(code: Tensor) -> Tensor:
    kept = code.abs().topk(5, dim=1)
    mask = torch.zeros_like(code).scatter(1, kept.indices, 1.0)
    return code * mask


def strings(n: int = VOCAB) -> list[str]:
    return [f" t{i}" for i in range(n)]


@pytest.fixture(scope="module", params=[False, True], ids=["unsigned", "signed"])
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FeatureIndex, Tensor, Tensor, Planted]:
    folder = tmp_path_factory.mktemp("index")
    torch.manual_seed(0)
    sae, cache, code = planted(folder, request.param)
    index = build_index(sae, cache, folder / "run", token_strings=strings(), config=CONFIG)
    tokens = cache.read(torch.arange(cache.n_rows)).tokens
    return index, code, tokens, sae


def poles(code: Tensor, pole: int) -> Tensor:
    return (code * pole).clamp_min(0.0)


def test_statistics_match_brute_force(built) -> None:
    index, code, tokens, _ = built
    table = index.table()
    assert len(table) == D_SAE * len(index.poles)
    edges = np.array(index.histogram_edges)
    for latent in range(D_SAE):
        for pole in index.poles:
            size = poles(code, pole)[:, latent].double().numpy()
            fired = size[size > 0]
            row = index.latent(latent, pole)
            assert (row["latent"], row["pole"], row["count"]) == (latent, pole, len(fired))
            assert row["density"] == pytest.approx(len(fired) / len(code))
            assert sum(row["histogram"]) == len(fired)
            if not len(fired):
                assert row["max"] == row["mean"] == row["q50"] == row["token_entropy"] == 0
                continue
            assert row["max"] == index.max_activation(latent, pole) == pytest.approx(fired.max())
            assert row["mean"] == pytest.approx(fired.mean(), rel=1e-6)
            for name, q in {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q95": 0.95}.items():
                assert row[name] == pytest.approx(np.quantile(fired, q), rel=1e-5)
            assert row["histogram"] == np.histogram(fired.clip(edges[0], edges[-1]), edges)[0].tolist()
            met = Counter(tokens[size > 0].tolist())
            p = np.array(list(met.values())) / len(fired)
            assert row["token_entropy"] == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-5)
            assert row["token_share"] == pytest.approx(p.max())
            assert row["top_token_counts"] == [c for _, c in met.most_common(CONFIG.top_tokens)]


def test_correlations_match_numpy(built) -> None:
    index, code, tokens, _ = built
    n = len(code)
    frequency = np.bincount(tokens)[tokens]
    position = np.arange(n) % CONTEXT
    norms = ActivationCache(index.run_folder.parent / "cache").read(torch.arange(n)).acts.norm(dim=1).numpy()
    covariates = {
        "position_corr": position,
        "frequency_corr": np.log(frequency),
        "first_corr": position == 0,
        "norm_corr": norms,
    }
    for latent in (0, 4, 5, D_SAE - 1):
        for pole in index.poles:
            size = poles(code, pole)[:, latent].numpy()
            if size.any():
                row = index.latent(latent, pole)
                for name, values in covariates.items():
                    assert row[name] == pytest.approx(np.corrcoef(size, values)[0, 1], abs=1e-5)
    assert np.isnan(index.latent(3)["position_corr"])


def test_examples_show_the_code(built) -> None:
    index, code, tokens, _ = built
    before, after = CONFIG.before, CONFIG.after
    for latent in range(D_SAE):
        for pole in index.poles:
            for example in index.examples(latent, pole):
                assert (example.latent, example.pole) == (latent, pole)
                start = example.row - example.row % CONTEXT
                window = range(max(start, example.row - before), min(start + CONTEXT, example.row + after + 1))
                assert example.tokens == tokens[window].tolist()
                assert example.strings == [f" t{t}" for t in example.tokens]
                torch.testing.assert_close(torch.tensor(example.activations), code[window, latent])
                assert example.value == pytest.approx(code[example.row, latent].item())
                assert window[example.focus] == example.row
                assert example.document == example.row // CONTEXT
                if example.kind in {"silent", "hard"}:
                    assert not any(example.activations)
                else:
                    assert example.value * pole > 0


def test_top_examples_are_the_largest_one_per_context(built) -> None:
    index, code, _, _ = built
    for latent in range(D_SAE):
        for pole in index.poles:
            best = poles(code, pole)[:, latent].view(N_CONTEXTS, CONTEXT).amax(1)
            expected = best[best > 0].sort(descending=True).values[: CONFIG.top]
            found = [abs(e.value) for e in index.examples(latent, pole, "top")]
            assert found == pytest.approx(expected.tolist())


def test_bands_and_random_examples_come_from_where_they_say(built) -> None:
    index, code, _, _ = built
    for latent in range(D_SAE):
        for pole in index.poles:
            size = poles(code, pole)[:, latent]
            fired = size[size > 0].sort(descending=True).values
            for number, band in enumerate(BANDS):
                a, b = len(fired) * number // 4, len(fired) * (number + 1) // 4
                found = [abs(e.value) for e in index.examples(latent, pole, band)]
                assert len(found) == min(b - a, CONFIG.band)
                assert len({e.row for e in index.examples(latent, pole, band)}) == len(found)
                assert all(v in fired[a:b].tolist() for v in found)
            random = index.examples(latent, pole, "random")
            assert len({e.row for e in random}) == min(len(fired), CONFIG.random)


def test_neighbours_are_the_closest_decoder_rows(built) -> None:
    index, _, _, sae = built
    W = torch.nn.functional.normalize(sae.W_dec.detach().double(), dim=1)
    cosines = W @ W.T
    for latent in (0, D_SAE - 1):
        others = cosines[latent].clone()
        others[latent] = 0.0 if sae.signed else -2.0
        key = others.abs() if sae.signed else others
        row = index.latent(latent)
        assert row["neighbours"] == key.topk(4).indices.tolist()
        assert row["neighbour_cosines"] == pytest.approx(others[key.topk(4).indices].tolist(), abs=1e-5)


def test_logit_lens_and_its_mirror_image(tmp_path: Path) -> None:
    sae, cache, _ = planted(tmp_path, signed=True)
    lens = LogitLens(torch.randn(D_IN, VOCAB), norm_weight=torch.rand(D_IN))
    index = build_index(sae, cache, tmp_path / "run", lens=lens, token_strings=strings(), config=CONFIG)
    logits = (sae.W_dec.double() * lens.norm_weight) @ lens.unembed.double()
    logits -= logits.mean(1, keepdim=True)
    for latent in range(D_SAE):
        up, down = index.latent(latent, 1), index.latent(latent, -1)
        order = logits[latent].argsort(descending=True)
        assert up["promoted_ids"] == order[:3].tolist()
        assert up["promoted"] == [f" t{i}" for i in order[:3]]
        assert up["promoted_logits"] == pytest.approx(logits[latent, order[:3]].tolist(), rel=1e-4)
        assert down["suppressed_ids"] == up["promoted_ids"]
        assert down["suppressed_logits"] == pytest.approx([-v for v in up["promoted_logits"]])
        assert down["promoted_ids"] == order.flip(0)[:3].tolist()
    assert index.meta["logit_lens"] is True


def test_index_without_language_model_says_so(built) -> None:
    index, *_ = built
    assert index.meta["logit_lens"] is False
    assert index.latent(0)["promoted"] == []


def test_a_failed_build_leaves_the_old_index(tmp_path: Path) -> None:
    sae, cache, _ = planted(tmp_path)
    index = build_index(sae, cache, tmp_path / "run", token_strings=strings(), config=CONFIG)
    before = sorted(p.name for p in index.run_folder.rglob("*"))

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "describe":
            raise KeyboardInterrupt

    with pytest.raises(UserError, match="--overwrite"):
        build_index(sae, cache, index.run_folder, token_strings=strings(), config=CONFIG)
    with pytest.raises(KeyboardInterrupt):
        build_index(
            sae, cache, index.run_folder, token_strings=strings(), config=CONFIG, overwrite=True, progress=interrupt
        )
    assert sorted(p.name for p in index.run_folder.rglob("*")) == before
    (index.run_folder / ".features.0a1b2c3d.partial").mkdir()  # left by a killed build
    config = IndexConfig(max_tokens=50, batch_size=37)
    newer = build_index(sae, cache, index.run_folder, token_strings=strings(), config=config, overwrite=True)
    assert newer.meta["tokens"] == 50
    assert newer.table()["count"].sum() == (sae.table[:50] != 0).sum()
    assert sorted(p.name for p in index.run_folder.rglob("*")) == before


KILLED = """
import os, signal, sys, torch
from saelab import ActivationCache, build, build_index

def progress(stage, done, total):
    if stage == "describe":
        os.kill(os.getpid(), signal.SIGKILL)

cache = ActivationCache(sys.argv[1])
sae = build("topk", cache.d_in, 8, k=2).eval()
build_index(sae, cache, sys.argv[2], token_strings=["x"] * 11, overwrite=True, progress=progress)
"""


def test_a_killed_build_leaves_the_old_index_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    sae, cache, code = planted(tmp_path)
    run = tmp_path / "run"
    build_index(sae, cache, run, token_strings=strings(), config=CONFIG)
    died = subprocess.run([sys.executable, "-c", KILLED, str(cache.path), str(run)], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert FeatureIndex(run).table()["count"].sum() == (code != 0).sum()
    assert len(list(run.glob(".features.*.partial"))) == 1
    build_index(sae, cache, run, token_strings=strings(), config=CONFIG, overwrite=True)
    assert [p.name for p in run.iterdir()] == ["features"]


def test_mistakes_are_named(tmp_path: Path) -> None:
    sae, cache, _ = planted(tmp_path)
    with pytest.raises(UserError, match="no feature index"):
        FeatureIndex(tmp_path)
    with pytest.raises(UserError, match="d_in=4"):
        build_index(build("topk", 4, 8, k=2), cache, tmp_path / "run", token_strings=strings())
    for wrong in ({"max_tokens": 0}, {"bins": 0}, {"batch_size": 0}, {"top": -1}):
        with pytest.raises(UserError, match=r"=-?\d must be at least [01]"):
            IndexConfig(**wrong)
    with pytest.raises(UserError, match="vocabulary"):
        build_index(sae, cache, tmp_path / "run", token_strings=strings(2))
    assert not (tmp_path / "run" / "features").exists()
    index = build_index(sae, cache, tmp_path / "run", token_strings=strings())
    with pytest.raises(UserError, match="outside"):
        index.latent(D_SAE)
    with pytest.raises(UserError, match="pole -1"):
        index.examples(0, -1)
    features = tmp_path / "run" / "features" / "features.parquet"
    features.write_bytes(features.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        FeatureIndex(tmp_path / "run")


def test_every_column_is_described(built) -> None:
    index, *_ = built
    for name, key in (("features", "columns"), ("examples", "example_columns")):
        found = pq.read_schema(index.folder / f"{name}.parquet")
        assert found.names == list(index.meta[key])
    json.dumps(index.latent(0), allow_nan=True)


def test_every_optional_part_may_be_left_out(tmp_path: Path) -> None:
    sae, cache, _ = planted(tmp_path)
    index = build_index(
        sae, cache, tmp_path / "run", token_strings=strings(), config=IndexConfig(**dict.fromkeys(OPTIONAL, 0))
    )
    assert index.examples(0) == [] and index.latent(0)["count"] > 0
    assert not any(index.latent(0)[name] for name in ("top_tokens", "neighbours", "partners"))


def test_more_examples_than_firings_and_wide_windows(tmp_path: Path) -> None:
    sae, cache, code = planted(tmp_path)
    config = IndexConfig(top=500, band=300, random=400, silent=3, before=99, after=99)
    index = build_index(sae, cache, tmp_path / "run", token_strings=strings(), config=config)
    rows = sorted(e.row for e in index.examples(0, kind="random"))
    assert rows == code[:, 0].nonzero().flatten().tolist()
    assert all(len(e.tokens) == CONTEXT for e in index.examples(0))
    assert [e.row for e in index.examples(5, kind="top")] == [7]
    assert index.examples(3, kind="top") == []


def test_two_hosts_build_one_index(tmp_path: Path) -> None:
    """Another host's unfinished build is left alone, whatever runs here; so is a folder that only looks like one."""
    sae, cache, _ = planted(tmp_path)
    run = tmp_path / "run"
    (run / ".features-backup").mkdir(parents=True)
    code = "import sys; from pathlib import Path; from saelab.files import new_folder\n"
    code += "with new_folder(Path(sys.argv[1])) as partial: print(partial, flush=True); sys.stdin.read()"
    args = [sys.executable, "-c", code, str(run / "features")]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with pytest.raises(UserError, match="another process is writing"):
            build_index(sae, cache, run, token_strings=strings(), config=CONFIG)
        assert theirs.is_dir()
        other.kill()
    build_index(sae, cache, run, token_strings=strings(), config=CONFIG)
    assert sorted(path.name for path in run.iterdir()) == [".features-backup", "features"]


def test_words_are_whole_and_their_shares_are_those_of_the_magnitude(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = [" Mo", "zart", " music", ",", " 猫", "猫", "ian", "\n", " 19", "56"]
    tokens = torch.randint(0, len(names), (40, 16))
    code = torch.rand(640, 3) * (torch.rand(640, 3) < 0.3)
    acts = torch.zeros(640, 4)
    acts[:, 0] = torch.arange(640)
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts, tokens, context_length=16)
    index = build_index(Lookup(code), cache, tmp_path / "run", token_strings=names, config=IndexConfig(words=500))
    words = []
    for line in tokens.tolist():
        whole: list[list[int]] = []
        for place, token in enumerate(line):
            text, last = names[token], names[line[place - 1]][-1]
            if place and joins(text[0]) and joins(last):
                whole[-1].append(place)
            else:
                whole.append([place])
        for run in whole:
            words += ["".join(names[line[p]] for p in run).strip() or "⏎"] * len(run)
    for latent in range(3):
        row, mass = index.latent(latent), code[:, latent]
        expected = {w: float(sum(m for m, x in zip(mass, words) if x == w) / mass.sum()) for w in set(words)}
        found = dict(zip(row["words"], row["word_shares"]))
        assert found == pytest.approx({w: share for w, share in expected.items() if share}, abs=1e-5)
        assert row["word_shares"] == sorted(row["word_shares"], reverse=True)
    assert {"Mozart", "Mozartian", "1956"} & set(words)
