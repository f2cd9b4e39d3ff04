"""A sweep over the caches of one harvest: each run folder is the single run's, byte for byte."""

from __future__ import annotations

import json

import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.sweep import load_results, make_grid, measure, run_sweep, summarise
from saelab.sweep.caches import Caches
from saelab.sweep.grid import check_grid
from saelab.training import fit_steps
from saelab.viz.sweep import cost_of, depth_of, pareto_of

NAMES = [f"blocks.{layer}.{point}" for layer in (2, 10) for point in ("mlp.hook_in", "hook_mlp_out")]
READS, WRITES = [NAMES[0], NAMES[2]], [NAMES[1], NAMES[3]]
TRAIN = {"epochs": 2, "batch_size": 64}
BLOCK = {"variant": "topk", "d_sae": 16, "k": 3}
GRID = {
    "train": TRAIN,
    "grid": [
        {**BLOCK, "cache": "blocks.*.hook_mlp_out", "seed": [0, 1]},
        {**BLOCK, "cache": "blocks.*.mlp.hook_in", "target": "blocks.*.hook_mlp_out", "skip": True},
        {**BLOCK, "cache": "blocks.10.hook_mlp_out", "k": 5},  # a setting of one cache
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four caches of the same tokens, two of width 8 and two of width 8, like those of one harvest."""
    root = tmp_path_factory.mktemp("caches")
    tokens = torch.randint(50, (400,), generator=torch.Generator().manual_seed(0))
    for number, name in enumerate(NAMES):
        acts = torch.randn(400, 8, generator=torch.Generator().manual_seed(number))
        ActivationCache.from_tensors(root / name, acts, tokens, held_out=0.2, model="m", hook_name=name)
    return root


def names_of(entries):
    return [entry.name for entry in entries]


def test_caches_are_an_axis_of_the_grid(folder):
    caches = Caches.open(folder)
    assert caches.names == sorted(NAMES, key=lambda name: (int(name.split(".")[1]), name))
    grid = make_grid(GRID, caches.names)
    assert names_of(grid.entries)[0] == "blocks.2.hook_mlp_out_topk_k-3_seed-0"
    assert len(grid.entries) == 7 and len(set(names_of(grid.entries))) == 7
    assert [entry.pair for entry in grid.entries[4:6]] == list(zip(READS, WRITES))
    whole = make_grid({"train": TRAIN, "grid": [BLOCK]}, caches.names)
    assert [entry.pair[0] for entry in whole.entries] == caches.names


def test_each_run_is_that_of_training_alone(folder, tmp_path):
    caches = Caches.open(folder)
    grid = make_grid(GRID, caches.names)
    members = list(run_sweep(grid, caches, tmp_path / "sweep"))[-1]
    assert names_of(member.entry for member in members) == names_of(grid.entries)
    for entry in grid.entries:
        cache = ActivationCache(folder / entry.pair[0])
        if entry.pair[1]:
            cache = cache.with_target(ActivationCache(folder / entry.pair[1]))
        d_out = 8 if entry.pair[1] else None
        for _ in fit_steps(entry.build(8, d_out), cache, entry.train, tmp_path / "solo" / entry.name):
            pass
        ours, alone = tmp_path / "sweep" / entry.name, tmp_path / "solo" / entry.name
        assert {p.name for p in ours.iterdir()} == {p.name for p in alone.iterdir()}
        for file in alone.iterdir():
            assert (ours / file.name).read_bytes() == file.read_bytes(), file
    rows = measure(members, caches)
    assert [row["hook_name_out"] for row in rows] == [None] * 4 + WRITES + [None]
    summaries, differences = summarise(rows, tmp_path / "sweep")
    assert [row["seeds"] for row in summaries] == [2, 2, 1, 1, 1]
    assert differences == []  # SAEs of two places are not compared


def test_a_sweep_killed_between_two_caches_goes_on(folder, tmp_path):
    grid = make_grid({**GRID, "halving": {"at": [0.5], "within": ["k"]}}, Caches.open(folder).names)
    for _ in run_sweep(grid, Caches.open(folder), tmp_path / "whole"):
        pass
    sweep = run_sweep(grid, Caches.open(folder), tmp_path / "cut", checkpoint_steps=2)
    for _ in range(14):
        next(sweep)
    sweep.close()
    for _ in run_sweep(grid, Caches.open(folder), tmp_path / "cut", resume=True):
        pass
    read = [json.loads((tmp_path / name / "sweep.json").read_bytes()) for name in ("whole", "cut")]
    assert read[0] == read[1] and len(read[0]["rungs"]) == 4
    for entry in grid.entries:
        files = [tmp_path / name / entry.name / "sae_weights.safetensors" for name in ("whole", "cut")]
        assert files[0].is_file() == files[1].is_file()
        assert not files[0].is_file() or files[0].read_bytes() == files[1].read_bytes()


def test_the_command_takes_a_folder_of_caches(folder, tmp_path, capsys):
    (tmp_path / "grid.toml").write_text(
        "[train]\nepochs = 2\nbatch_size = 64\n"
        '[[grid]]\ncache = "blocks.*.mlp.hook_in"\ntarget = "blocks.*.hook_mlp_out"\n'
        'variant = "topk"\nd_sae = 16\nk = 3\n'
    )
    main(["sweep", str(folder), str(tmp_path / "grid.toml"), "--out", str(tmp_path / "sweep")])
    assert "2 SAEs" in capsys.readouterr().err
    rows = load_results(tmp_path / "sweep")
    assert [(row["hook_name"], row["hook_name_out"]) for row in rows] == list(zip(READS, WRITES))
    assert "Quality by depth" in (tmp_path / "sweep" / "report.html").read_text()
    # No line joins two places, where the numbers do not compare; by depth, a line is what one looks for.
    names = [trace.name for trace in pareto_of(rows, "fvu").data]
    assert names == [f"topk at {write}" for write in WRITES]
    assert [trace.name for trace in cost_of(rows, "parameters").data] == names
    (line,) = depth_of(rows, "fvu").data
    assert len(line.x) == len(READS)
    assert depth_of(rows[:1], "fvu") is None
    both = [row | {"training": json.dumps({"lr": lr})} for lr in (1e-3, 2e-3) for row in rows]
    lines = depth_of(both, "fvu").data
    assert [line.name for line in lines] == [f"topk 16 L0 3 lr={lr} blocks.*.hook_mlp_out" for lr in (0.001, 0.002)]


def test_caches_of_two_models_are_not_swept_together(tmp_path):
    for model, hook in (("one", "blocks.1.hook_resid_post"), ("two", "blocks.2.hook_resid_post")):
        ActivationCache.from_tensors(tmp_path / hook, torch.randn(8, 3), model=model, hook_name=hook)
    with pytest.raises(UserError, match=r"several models \(one, two\); sweep those of one at a time"):
        Caches.open(tmp_path)
    for weights in ("a", "b"):  # of one name
        about = {"model": "one", "weights_fingerprint": weights}
        ActivationCache.from_tensors(tmp_path / "same" / weights, torch.randn(8, 3), hook_name="h", **about)
    with pytest.raises(UserError, match=r"several weights of one model \(a, b\); sweep those of one at a time"):
        Caches.open(tmp_path / "same")


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ({"cache": "blocks.3.hook_mlp_out"}, "no cache matches 'blocks.3.hook_mlp_out'"),
        ({"cache": 3}, "cache=3 must be the name of a cache"),
        ({"target": "blocks.2.hook_mlp_out"}, "needs cache"),
        ({"cache": "blocks.2.mlp.hook_in", "target": "blocks.9.hook_mlp_out"}, "is no cache of this folder"),
        ({"cache": "blocks.2.mlp.hook_in", "target": "blocks.2.hook_mlp_out", "d_out": 9}, "has width 8, not d_out=9"),
        ({"cache": "blocks.2.mlp.hook_in", "skip": True}, "skip is a connection to a target"),
        (
            {"cache": "blocks.2.mlp.hook_in", "target": "blocks.2.hook_mlp_out", "variant": "matching_pursuit"},
            "cannot be trained on a target",
        ),
    ],
)
def test_refusals(folder, block, why):
    caches = Caches.open(folder)
    settings = {key: value for key, value in BLOCK.items() if key != "k" or "variant" not in block}
    with pytest.raises(UserError, match=why):
        check_grid(make_grid({"train": TRAIN, "grid": [{**settings, **block}]}, caches.names), caches)


def test_one_cache_has_no_such_axis(folder, tmp_path):
    with pytest.raises(UserError, match="sweep the folder that holds them"):
        make_grid({"grid": [{**BLOCK, "cache": NAMES[0]}]})
    with pytest.raises(UserError, match="is neither a cache nor a folder of caches"):
        Caches.open(tmp_path)
    alone = Caches.open(folder / NAMES[0])
    grid = make_grid({"train": TRAIN, "grid": [{**BLOCK, "target": NAMES[1]}]}, alone.names)
    check_grid(grid, alone)
    assert alone.get(grid.entries[0].pair).target is not None
