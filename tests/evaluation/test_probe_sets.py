"""k-sparse probing on the sets of sae-probes: reading them, the split, the selection, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from saelab.cli import main
from saelab.errors import UserError
from saelab.evaluation.tasks import probe_sets
from saelab.lm import load_hf_model, load_model, locate
from saelab.lm.tokens import token_ids
from saelab.sae import build
from tests.tiny_lm import save_gpt2, save_llama, save_qwen2, sentences

MASTER = "Data type,Dataset save name,Notes\n"


def make_data(folder: Path, sets: dict[str, list[tuple[str, str]]]) -> Path:
    """A folder like the package's, with lines of text and class."""
    (folder / "cleaned_data").mkdir(parents=True)
    lines = [f"Binary Classification,cleaned_data/{name}.csv," for name in sets]
    write(
        folder / "probing_datasets_MASTER.csv.zst", MASTER + "\n".join([*lines, "Continuous Data,cleaned_data/x.csv,"])
    )
    for name, rows in sets.items():
        body = "\n".join(f'{i},"{text}",{target}' for i, (text, target) in enumerate(rows))
        write(folder / "cleaned_data" / f"{name}.csv.zst", f"index,prompt,target\n{body}\n")
    return folder


def write(path: Path, text: str) -> None:
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(text.encode())


def sentiment(n: int) -> list[tuple[str, str]]:
    return [(f"{sentences(8, i)} {'rain' if i % 2 else 'dawn'}", "yes" if i % 2 else "no") for i in range(n)]


def test_sets_are_read_as_they_stand(tmp_path: Path) -> None:
    folder = make_data(tmp_path / "data", {"5_one": [("a,\nb", "1"), ("c", "0")], "66_two": [("", "x"), ("d", "y")]})
    assert probe_sets.set_names(folder) == ["5_one", "66_two"]
    assert probe_sets.chosen_sets(folder, ("66",)) == ["66_two"]
    one = probe_sets.read_set(folder, "5_one")
    assert one.prompts == ["a,\nb", "c"] and one.labels.tolist() == [True, False]
    with pytest.raises(UserError, match="no binary set '7'"):
        probe_sets.chosen_sets(folder, ("7",))
    write(folder / "cleaned_data" / "5_one.csv.zst", "prompt,target\na,0\nb,0\n")
    with pytest.raises(UserError, match="1 classes"):
        probe_sets.read_set(folder, "5_one")
    (folder / "cleaned_data" / "5_one.csv.zst").write_bytes(b"broken")
    with pytest.raises(UserError, match="install sae-probes again"):
        probe_sets.read_set(folder, "5_one")


def test_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps sae-probes"):
        probe_sets.data_folder()


def test_parts_are_balanced_and_disjoint() -> None:
    labels = np.arange(700) < 350
    parts = probe_sets.split(labels, 42)
    assert len(parts.train) == 600 and len(parts.test) == 99
    assert labels[parts.train].mean() == 0.5 and abs(labels[parts.test].mean() - 0.5) < 0.01
    assert not set(parts.train) & set(parts.test)
    assert parts.train.tolist() != probe_sets.split(labels, 43).train.tolist()
    for bad in (np.arange(103) < 50, np.arange(400) < 20):
        with pytest.raises(UserError, match=r"too small|balance"):
            probe_sets.split(bad, 42)


def test_the_planted_latent_is_found_and_the_interval_is_over_seeds() -> None:
    torch.manual_seed(0)
    y = np.arange(500) % 2 == 0
    x = 0.3 * torch.randn(500, 8)
    x[:, 3] += torch.from_numpy(y).float()
    sae = build("topk", 8, 8, k=8).eval()
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(8))
        sae.W_enc.copy_(torch.eye(8))
        sae.b_dec.zero_()
    assert probe_sets.ranked(probe_sets.encode(sae, x.numpy()), y)[0] == 3
    found = probe_sets.probe_sets(sae, {"a": (x.numpy(), y)}, ks=(1, 4), seeds=(42, 43, 44))
    best = found["means"]["sae_top_1_auc"]
    assert best["value"] > 0.95 and best["low"] < best["value"] < best["high"]
    one = probe_sets.probe_sets(sae, {"a": (x.numpy(), y)}, ks=(1,), seeds=(42,))["means"]["sae_top_1_auc"]
    assert one["low"] is None and "cannot say" in one["interval"]
    shuffled = np.random.default_rng(0).permutation(y)
    chance = probe_sets.probe_sets(sae, {"a": (x.numpy(), shuffled)}, ks=(4,), seeds=(42, 43))
    assert chance["means"]["sae_top_4_auc"]["value"] == pytest.approx(0.5, abs=0.13)  # 99 test prompts


@pytest.mark.parametrize("save", [save_llama, save_gpt2, save_qwen2], ids=["llama", "gpt2", "qwen2"])
def test_activations_are_those_of_single_prompts(tmp_path: Path, save) -> None:
    """Padding must not reach the last token: against one plain pass of transformers per prompt."""
    folder = save(tmp_path / "model")
    model, tokenizer = load_hf_model(folder), load_model(folder).tokenizer
    prompts = [sentences(n, n) for n in (1, 9, 3, 4, 2, 7)]

    def encode(text: str) -> list[int]:
        return token_ids(tokenizer, text, tokenizer.bos_token_id is not None)

    site = locate(model, "blocks.1.hook_resid_post")
    found = probe_sets.last_activations(model, site, encode, prompts)
    for prompt, row in zip(prompts, found):
        with torch.no_grad():
            states = model(torch.tensor([encode(prompt)]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(torch.from_numpy(row), states[2][0, -1], rtol=1e-4, atol=1e-4)


def test_prompts_longer_than_the_table_of_positions_are_cut_in_front(tmp_path: Path) -> None:
    model = load_hf_model(save_gpt2(tmp_path / "model"), device="cpu")  # of 64 positions
    ids = [0, *range(2, 101)]
    found = probe_sets.last_activations(model, locate(model, "blocks.1.hook_resid_post"), lambda _: ids, ["a"])
    with torch.no_grad():
        states = model(torch.tensor([[0, *ids[-63:]]]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(torch.from_numpy(found[0]), states[2][0, -1], rtol=1e-4, atol=1e-4)


def test_the_command_probes_and_writes_saebench(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = make_data(tmp_path / "data", {"1_weather": sentiment(240), "2_again": sentiment(232)})
    monkeypatch.setattr(probe_sets, "data_folder", lambda: folder)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": sentences(80, seed)}) for seed in range(12)), encoding="utf-8")
    hook = ["--hook", "blocks.1.hook_resid_post", "--context-length", "16", "--tokens", "900", "--held-out", "0.3"]
    model, run = save_llama(tmp_path / "model"), tmp_path / "run"
    main(["harvest", "--out", str(tmp_path / "cache"), "--model", str(model), "--text", str(text), *hook])
    main(["train", str(tmp_path / "cache"), "--out", str(run), "--d-sae", "32", "--k", "4", "--epochs", "2",
          "--batch-size", "128"])  # fmt: skip
    capsys.readouterr()
    args = ["evaluate", str(run), "--cache", str(tmp_path / "cache"), "--lm-tokens", "0", "--tasks", "sae-probes"]
    main([*args, "--probe-seeds", "2", "--probe-sets", "1", "--saebench", str(tmp_path / "bench"),
          "--controls", "--control-kinds", "untrained"])  # fmt: skip
    assert "sae-probes sae_top_16_auc" in capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    probes = found["tasks"]["sae-probes"]
    assert set(probes["by_set"]) == {"1_weather"}
    assert probes["means"]["channels_top_16_auc"]["value"] > 0.9  # the last word decides
    assert found["controls"]["untrained"]["tasks"]["sae-probes"]["means"]["sae_top_1_auc"]["value"] > 0
    (path,) = (tmp_path / "bench").glob("sparse_probing_sae_probes/*.json")
    metrics = json.loads(path.read_text())["eval_result_metrics"]["sae"]
    assert metrics["sae_top_1_test_auc"] == probes["means"]["sae_top_1_auc"]["value"]
    with pytest.raises(SystemExit):
        main([*args, "--probe-sets", "nothing"])
    assert "no binary set" in capsys.readouterr().err
