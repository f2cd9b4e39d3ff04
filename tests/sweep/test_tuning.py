"""``lr = "tune"``: rates are compared on validation rows only; the choice is recorded and survives a kill."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.sae.weights import load_sae
from saelab.sweep import Member, Tuning, load_results, make_grid, measure, run_sweep
from saelab.sweep.choice import best_of, groups_of
from saelab.sweep.halving import stragglers
from saelab.sweep.tuning import rates_of
from saelab.training import TrainConfig, fit_steps
from saelab.viz.sweep import rates_of as rates_figure
from saelab.viz.sweep import report
from tests.planted import activations, contents
from tests.sweep.running import run

D_IN = 8
TRAIN = {"epochs": 2, "batch_size": 64}
BLOCK = {"variant": "topk", "d_sae": 20, "k": 2, "lr": {"tune": [1e-3, 2e-2, 1e3]}, "seed": [3, 4]}
GRID = {
    "train": TRAIN,
    "grid": [BLOCK, {"variant": "abs_topk", "d_sae": 12, "k": 2, "lr": 1e-2}],
    "tune": {"validation": 0.1},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    path = tmp_path_factory.mktemp("sweep") / "cache"
    return ActivationCache.from_tensors(path, activations(1200, D_IN), held_out=0.1, context_length=10)


def test_validation_rows_are_whole_contexts_that_nothing_else_uses(cache: ActivationCache) -> None:
    view = cache.with_validation(0.1)
    spans = [view.split_rows(split) for split in ("train", "validation", "held_out")]
    assert spans == [(0, 970), (970, 1080), (1080, 1200)]  # 120 contexts of 10 rows: 12 held out, 11 of 108
    assert cache.n_split("validation") == 0 and cache.n_split("train") == 1080
    assert view.fingerprint == cache.fingerprint and view.with_validation(0.1).split_rows("train") == (0, 970)
    assert cache.with_validation_from(970).split_rows("validation") == (970, 1080)
    seen = torch.cat([batch.rows for batch in view.batches(50, split="train", seed=1)])
    assert sorted(seen.tolist()) == list(range(970))
    with pytest.raises(UserError, match="validation=1 must be a share"):
        cache.with_validation(1)


def test_validation_is_cut_by_contexts_where_rows_were_dropped(tmp_path: Path) -> None:
    acts = activations(300, D_IN)
    harvested = ActivationCache.from_tensors(tmp_path / "a", acts, held_out=0.2, context_length=10, shard_rows=70)
    view = harvested.with_validation(0.25)
    assert view.split_rows("validation") == (180, 240)  # 24 training contexts, 6 of them
    contexts = [harvested.shards.context_of(row) for row in (0, 9, 10, 179, 180, 299, 300)]
    assert contexts == [0, 0, 1, 17, 18, 29, 30]
    assert [harvested.shards.first_row(context) for context in (0, 7, 18, 30)] == [0, 70, 180, 300]


def test_the_best_rate_on_validation_rows_is_chosen_and_shared_by_the_seeds(
    cache: ActivationCache, tmp_path: Path
) -> None:
    members = run(GRID, cache, tmp_path / "sweep")
    assert [m.entry.name for m in members] == [entry.name for entry in make_grid(GRID).entries]
    assert [m.status for m in members] == ["finished"] * 3
    tried = {trial["lr"]: trial for trial in members[0].tried}
    assert tried[1e3]["status"] == "diverged" and "exploded by step 2" in tried[1e3]["message"]
    assert tried[1e-3]["fvu"] is None or tried[2e-2]["fvu"] < tried[1e-3]["fvu"]
    assert [m.entry.train.lr for m in members] == [2e-2, 2e-2, 1e-2]
    assert members[1].tried == members[0].tried and members[2].tried == []

    view, entries = cache.with_validation(0.1), make_grid(GRID).entries
    first, stop = view.split_rows("validation")
    score = evaluate(
        load_sae(members[0].folder), cached(cache, first, stop, tmp_path), None, EvaluateConfig(split="all")
    )
    assert tried[2e-2]["fvu"] == pytest.approx(score["fvu"], rel=2e-3)
    # Every SAE is the one that a run of its own gives on the training rows that remain.
    for member, entry in zip(members, entries):
        config = replace(entry.train, lr=member.entry.train.lr)
        for _ in fit_steps(entry.build(D_IN), view, config, tmp_path / "solo" / entry.name):
            pass
        assert contents(member.folder) == contents(tmp_path / "solo" / entry.name)
    assert {p.name for p in (tmp_path / "sweep").iterdir()} == {"sweep.json", *(e.name for e in entries)}


def cached(cache: ActivationCache, first: int, stop: int, folder: Path) -> ActivationCache:
    """The rows of a cache as a cache of their own; its mean is that of the rows."""
    return ActivationCache.from_tensors(folder / "rows", cache.read(range(first, stop)).acts, held_out=0)


def test_nothing_that_is_chosen_or_trained_sees_held_out_rows(cache: ActivationCache, tmp_path: Path) -> None:
    acts = cache.read(range(1200)).acts
    acts[1080:] = 100 * torch.randn(120, D_IN)
    other = ActivationCache.from_tensors(tmp_path / "other", acts, held_out=0.1, context_length=10)
    one, two = (run(GRID, c, tmp_path / name) for c, name in ((cache, "one"), (other, "two")))
    assert one[0].tried == two[0].tried
    rows = measure(one, cache), measure(two, other)
    assert rows[0][0]["fvu"] < rows[1][0]["fvu"]


def test_rates_far_from_the_best_are_extended_and_the_edge_is_named(cache: ActivationCache, tmp_path: Path) -> None:
    low = {
        "train": {**TRAIN, "lr": "tune"},
        "grid": [{"variant": "topk", "d_sae": 20, "k": 2}],
        "tune": {"factors": [0.01, 0.02], "validation": 0.1},
    }
    default = (
        TrainConfig(epochs=2, batch_size=64)
        .resolved(make_grid(low).entries[0].outline(D_IN), cache.with_validation(0.1))
        .lr
    )
    assert default is not None
    (member,) = run(low, cache, tmp_path / "low")
    assert [trial["lr"] for trial in member.tried] == pytest.approx([f * default for f in (0.01, 0.02, 0.04, 0.08)])
    assert member.entry.train.lr == pytest.approx(0.08 * default)
    assert re.search(r"lr=\S+ is the largest rate tried, so a better one may lie beyond; try \S+ too", member.message)
    own = {**low, "train": {**TRAIN, "lr": {"tune": [2e-5, 1e-5]}}, "tune": {"validation": 0.1}}
    (member,) = run(own, cache, tmp_path / "own")
    assert [trial["lr"] for trial in member.tried] == [1e-5, 2e-5] and "largest rate tried" in member.message


def test_a_group_without_a_usable_rate_is_named_and_the_others_go_on(cache: ActivationCache, tmp_path: Path) -> None:
    grid = {**GRID, "grid": [{**BLOCK, "lr": {"tune": [1e3, 1e4]}}, GRID["grid"][1]]}
    members = run(grid, cache, tmp_path / "sweep")
    assert [m.status for m in members] == ["diverged", "diverged", "finished"]
    assert members[0].message.startswith(
        "no rate could be used: lr=1000 diverged; lr=10000 diverged; give smaller ones"
    )
    rows = measure(members, cache)
    assert rows[0]["lr"] is None and rows[0]["fvu"] is None and len(json.loads(rows[0]["tried"])) == 2
    again = run(grid, cache, tmp_path / "sweep", resume=True)
    assert [(m.status, m.message) for m in again] == [(m.status, m.message) for m in members]
    assert "no rate could be used" in report(rows) and "1e+03 diverged at step 2, 1e+04 diverged at step" in report(
        rows
    )


@pytest.mark.parametrize("stops", [(3, 20, 29), (28, 31, 34)])  # in the first reading, around the choice, in the second
def test_a_tuned_sweep_stopped_anywhere_resumes_to_the_same_bytes(
    cache: ActivationCache, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    run(GRID, cache, tmp_path / "whole", checkpoint_steps=5)
    for stop in stops:
        run(GRID, cache, tmp_path / "parts", stop=stop, resume=True, checkpoint_steps=5)
    run(GRID, cache, tmp_path / "parts", resume=True, checkpoint_steps=5)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_kill_between_the_choice_and_the_second_reading_is_repaired(cache: ActivationCache, tmp_path: Path) -> None:
    run(GRID, cache, tmp_path / "sweep")
    whole = contents(tmp_path / "sweep")
    lead, follower = (entry.name for entry in make_grid(GRID).entries[:2])
    # The choice is on disk; neither has the SAE been moved, nor the next seed been trained.
    place = tmp_path / "sweep" / "tuning" / lead / "lr-0.02"
    place.parent.mkdir(parents=True)
    (tmp_path / "sweep" / lead).rename(place)
    for path in (tmp_path / "sweep" / follower).iterdir():
        path.unlink()
    run(GRID, cache, tmp_path / "sweep", resume=True)
    assert contents(tmp_path / "sweep") == whole


def test_a_run_of_a_tuned_sweep_is_not_resumed_on_other_rows(cache: ActivationCache, tmp_path: Path) -> None:
    run(GRID, cache, tmp_path / "sweep", stop=6)
    entry = make_grid(GRID).entries[2]
    with pytest.raises(UserError, match="does not train on its validation rows; resume the sweep"):
        next(fit_steps(entry.build(D_IN), cache, entry.train, tmp_path / "sweep" / entry.name, resume=True))


@pytest.mark.parametrize("variant", ["gated", "jump_relu", "relu", "batch_topk"])
def test_rates_are_compared_at_the_l0_that_was_asked_for(cache: ActivationCache, tmp_path: Path, variant: str) -> None:
    block = {"variant": variant, "d_sae": 20, "l0": 2, "lr": {"tune": [2e-3, 2e-2]}}
    (member,) = run(
        {"train": TRAIN, "grid": [block], "tune": {"validation": 0.3, "stop_early": False}}, cache, tmp_path / "sweep"
    )
    assert [trial["l0"] for trial in member.tried] == pytest.approx([2, 2], rel=0.02)
    (entry,) = make_grid({"train": TRAIN, "grid": [{**block, "lr": member.entry.train.lr}]}).entries
    for _ in fit_steps(entry.build(D_IN), cache.with_validation(0.3), entry.train, tmp_path / "solo"):
        pass
    assert contents(member.folder) == contents(tmp_path / "solo")  # the comparison has not changed the SAE


def trial(lr: float, fvu: float | None, l0: float) -> dict:
    return {"lr": lr, "fvu": fvu, "l0": l0}


def test_more_active_latents_than_asked_for_are_no_advantage() -> None:
    tried = [
        trial(1, 0.3, 4.1),
        trial(2, 0.1, 8.0),
        trial(3, 0.2, 3.9),
        trial(4, float("nan"), 4.0),
        trial(5, None, 4.0),
    ]
    assert best_of(tried, 4) == tried[2] and best_of(tried, None) == tried[1]
    far = [trial(1, 0.1, 9), trial(2, 0.2, 6)]
    assert best_of(far, 4) == far[1]  # none is fair: the nearest
    assert best_of([trial(1, None, 4)], 4) is None


def test_stragglers_are_compared_at_equal_tokens_within_their_group(tmp_path: Path) -> None:
    entries = make_grid(
        {"grid": [{"variant": ["topk", "gated"], "d_sae": 20, "l0": 2, "lr": [1e-3, 2e-3, 3e-3]}]}
    ).entries
    members = []
    for entry, fvu in zip(entries, [0.2, 0.24, 0.26] * 2):
        (folder := tmp_path / entry.name).mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "fvu": fvu}) + "\n" for s in range(1, 41)))
        members.append(Member(entry, folder, step=40))
    # The L0 of a penalty is still on its way, so it is not judged before the end.
    assert stragglers([members[:3], members[3:]], 0.5, 40, 80) == [members[2]]
    assert stragglers([members[:3]], 0.25, 40, 80) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {**TRAIN, "lr": "tuen"}}, r"lr='tuen' must be a number, \"tune\", or \{tune = "),
        ({"train": {**TRAIN, "lr": True}}, "lr=True must be a number"),
        (
            {"train": {**TRAIN, "lr": {"tune": [1e-3]}}},
            r"tune=\[0.001\] leaves nothing to choose; write lr = 0.001, or give",
        ),
        ({"train": {**TRAIN, "lr": {"tune": []}}}, r"tune=\[\] leaves nothing to choose"),
        ({"train": {**TRAIN, "lr": {"tune": [1e-3, 1e-3]}}}, "lists a rate twice"),
        ({"train": {**TRAIN, "lr": {"tune": [1e-3, -1]}}}, "tune: -1 must be a positive"),
        ({"train": {**TRAIN, "lr": {"tune": "all"}}}, "lr={'tune': 'all'} must be"),
        (
            {"tune": {"validation": 0.01}},
            r"validation=0.01 gives 10 validation rows, fewer than a batch of 64;",
        ),
        ({"tune": {"validation": 2}}, "validation=2 must be a share"),
        ({"tune": {"factors": [1]}}, r"factors=\[1\] leaves nothing to choose; leave lr out"),
        ({"tune": {"factor": [1, 2]}}, "unknown key 'factor' in .tune.: did you mean factors"),
        ({"train": TRAIN}, r"\[tune\] has no effect"),
        ({"halving": {"at": [0.5]}}, r"\[halving\] and lr = \"tune\" both stop SAEs early"),
        ({"grid": [{"variant": "gated", "d_sae": 20}]}, "rates are tuned at equal L0.*give it an l0"),
        ({"grid": [{"variant": "topk", "d_sae": 20, "k": 99}]}, "k=99 is outside 1..d_sae=20"),
    ],
)
def test_an_impossible_tuning_is_refused_before_anything_trains(
    cache: ActivationCache, tmp_path: Path, change: dict, message: str
) -> None:
    grid = {
        "train": {**TRAIN, "lr": "tune"},
        "grid": [{"variant": "topk", "d_sae": 20, "k": 2}],
        "tune": {"validation": 0.1},
    }
    with pytest.raises(UserError, match=message) as error:
        next(run_sweep(make_grid(grid | change), cache, tmp_path / "out"))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_groups_differ_in_more_than_the_seed(cache: ActivationCache, tmp_path: Path) -> None:
    grid = make_grid(
        {"train": {**TRAIN, "lr": "tune"}, "grid": [{"variant": "topk", "d_sae": 20, "k": [2, 4], "seed": [0, 1]}]}
    )
    assert grid.tuning == Tuning() and rates_of(1e-3) is None and rates_of("tune") == ()
    groups = groups_of(grid, grid.view(cache), {}, tmp_path)
    assert [[entry.keys["seed"] for entry in group.entries] for group in groups] == [[0, 1], [0, 1]]
    rates = groups[0].record["rates"]
    assert [rate / rates[2] for rate in rates] == [0.25, 0.5, 1, 2, 4]


def test_the_command_shows_rates_in_table_report_and_parquet(
    cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "grid.toml").write_text(
        "[train]\nepochs = 2\nbatch_size = 64\nlr = { tune = [2e-2, 1e-3] }\n"
        '[[grid]]\nvariant = "topk"\nd_sae = 20\nk = 2\nseed = [0, 1]\n[tune]\nvalidation = 0.1\nstop_early = false\n'
    )
    main(["sweep", str(cache.path), str(tmp_path / "grid.toml"), "--out", str(tmp_path / "sweep")])
    shown = capsys.readouterr()
    assert "compared on 110 validation rows" in " ".join(shown.err.split())
    assert shown.out.count("0.02 of 2") == 2 and "lr=0.02 is the largest rate tried" in " ".join(shown.out.split())
    rows = load_results(tmp_path / "sweep")
    assert [row["lr"] for row in rows] == [2e-2, 2e-2]
    tried = json.loads(rows[0]["tried"])
    assert [t["lr"] for t in tried] == [1e-3, 2e-2] and all(0 < t["fvu"] < 2 for t in tried)
    assert "Learning rates tried" in (tmp_path / "sweep" / "report.html").read_text()
    figure = rates_figure(rows)
    assert figure is not None
    (curve,) = figure.to_dict()["data"]  # the seeds share it
    assert list(curve["x"]) == [1e-3, 2e-2] and list(curve["marker"]["symbol"]) == ["circle", "star"]
    assert rates_figure([{**row, "tried": None} for row in rows]) is None
