"""A new variant is one class in one file: registry, trainer, checkpoints and commands take it from there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab import cli, kernels
from saelab.data.cache import ActivationCache
from saelab.distributed import Parallel
from saelab.distributed.sharding import build_shard
from saelab.errors import UserError
from saelab.kernels import SelectedPreActs
from saelab.sae import SAE, VARIANTS, LinearSAE, build
from saelab.sae.weights import load_sae, save
from saelab.sparse import SparseCode
from saelab.training import TrainConfig, train_steps
from tests import tiny_lm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def every_other() -> Iterator[type[LinearSAE]]:
    class EveryOther(LinearSAE, variant="every_other"):
        """TopK among the even latents only."""

        def __init__(self, d_in: int, d_sae: int, k: int = 4) -> None:
            """
            Args:
                k: Even latents per token.
            """
            super().__init__(d_in, d_sae, k=k)
            self.k = k

        def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
            chosen = kernels.select_topk(x, self.W_enc[:, ::2], self.b_enc[::2], self.b_in, self.k)
            return chosen._replace(indices=2 * chosen.indices)

    yield EveryOther
    del VARIANTS["every_other"]


def test_one_class_is_a_variant(
    every_other: type[LinearSAE], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ActivationCache.from_tensors(tmp_path / "cache", torch.randn(2000, 8))
    options = ["--d-sae", "32", "--k", "3", "--epochs", "4", "--batch-size", "128", "--lr", "0.01", "--json"]
    cli.main(["train", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), "--variant", "every_other", *options])
    assert json.loads(capsys.readouterr().out)["fvu"] < 0.6
    sae = load_sae(tmp_path / "run")
    assert type(sae) is every_other and sae.config == {"d_in": 8, "d_sae": 32, "k": 3}
    code = sae.encode(torch.randn(50, 8))
    assert (code.indices % 2 == 0).all() and code.l0().max() == 3


def test_its_options_are_in_the_help(every_other: type[LinearSAE], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--variant", "every_other", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Even latents per token." in shown and "TopK among the even latents only." in shown


@pytest.fixture
def registry() -> Iterator[dict[str, type[SAE]]]:
    """The registry, as it was afterwards."""
    before = dict(VARIANTS)
    yield VARIANTS
    VARIANTS.clear()
    VARIANTS.update(before)


class Rule(LinearSAE):
    """A rule that the classes below share."""

    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        return kernels.select_topk(x, self.W_enc, self.b_enc, self.b_in, 4)


def test_an_option_that_nobody_hands_over_is_saved(registry: dict[str, type[SAE]], tmp_path: Path) -> None:
    class Gain(Rule, variant="gain"):
        def __init__(self, d_in: int, d_sae: int, gain: float = 1.0, words: tuple[str, ...] = ("a",)) -> None:
            super().__init__(d_in, d_sae)
            self.gain = gain

    class Narrow(Gain, variant="narrow"):
        def __init__(self, d_in: int, d_sae: int, width: int = 3, **options: Any) -> None:
            super().__init__(d_in, d_sae, **options)
            self.width = width

    class Few(VARIANTS["topk"], variant="few"):
        def __init__(self, d_in: int, d_sae: int, few: int = 2) -> None:
            super().__init__(d_in, d_sae, few)

    assert build("few", 8, 32).config == {"d_in": 8, "d_sae": 32, "few": 2}

    class Fixed(Gain, variant="fixed"):
        def __init__(self, d_in: int, d_sae: int, **options: Any) -> None:
            super().__init__(d_in, d_sae, gain=2.0, **options)

    save(Gain(8, 32, 9.0), tmp_path / "positional")
    loaded = load_sae(tmp_path / "positional")
    assert isinstance(loaded, Gain) and loaded.gain == 9.0
    assert loaded.config == {"d_in": 8, "d_sae": 32, "gain": 9.0, "words": ["a"]}
    save(build("narrow", 8, 32, gain=5.0), tmp_path / "inherited")
    loaded = load_sae(tmp_path / "inherited")
    assert isinstance(loaded, Narrow) and (loaded.gain, loaded.width) == (5.0, 3)
    with pytest.raises(UserError, match=r"Fixed takes the option gain through \*\*options and sets it itself"):
        build("fixed", 8, 32)
    with pytest.raises(UserError, match=r"variant 'gain' has no option 'gian': did you mean gain"):
        build("gain", 8, 32, gian=2.0)


def test_an_option_that_cannot_be_saved_is_named(registry: dict[str, type[SAE]]) -> None:
    class Smooth(Rule, variant="smooth"):
        def __init__(self, d_in: int, d_sae: int, act: Any = torch.relu) -> None:
            super().__init__(d_in, d_sae)

    with pytest.raises(UserError, match=r"act=.* of the variant smooth cannot be saved as JSON"):
        build("smooth", 8, 32)


@pytest.mark.parametrize(
    ("constructor", "message"),
    [
        ("def __init__(self, d_in: int, d_sae: int, gain: float) -> None: ...", "option gain of Bare has no default"),
        ("def __init__(self, d_in: int, d_sae: int, gain=1.0) -> None: ...", "option gain of Bare has no type"),
    ],
)
def test_an_option_that_the_command_line_cannot_have_is_named(
    registry: dict[str, type[SAE]], capsys: pytest.CaptureFixture[str], constructor: str, message: str
) -> None:
    exec(f"class Bare(Rule, variant='bare'):\n    {constructor}", {"Rule": Rule, "__name__": "bare"})
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "nowhere", "--out", "nowhere", "--variant", "bare"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_taken_name_is_refused(registry: dict[str, type[SAE]]) -> None:
    before = VARIANTS["topk"]
    with pytest.raises(UserError, match=r"the variant name 'topk' is taken by saelab.sae.topk.TopK; choose another"):

        class TopK(Rule, variant="topk"):
            pass

    assert VARIANTS["topk"] is before
    # The cell of a notebook that is run again defines the same class again.
    cell = "class Cell(Rule, variant='cell'):\n    pass"
    space = {"Rule": Rule, "__name__": "__main__"}
    exec(cell, space)
    first = VARIANTS["cell"]
    exec(cell, space)
    assert VARIANTS["cell"] is space["Cell"] is not first


def test_an_auxiliary_loss_that_cannot_be_computed_is_refused(registry: dict[str, type[SAE]], tmp_path: Path) -> None:
    class Tied(SAE, variant="tied"):
        def encode(self, x: Tensor, grads: Tensor | None = None) -> SparseCode:
            raise NotImplementedError

        def aux_latents(self, dead: Tensor, weight: float) -> dict[str, tuple[float, Tensor]]:
            return {"auxk": (weight, dead)}

    cache = ActivationCache.from_tensors(tmp_path / "cache", torch.randn(200, 8))
    with pytest.raises(UserError, match="auxiliary loss of tied needs pre-activations; derive it from LinearSAE"):
        train_steps(build("tied", 8, 32), cache, TrainConfig(batch_size=64))


def test_what_cannot_be_split_over_ranks_is_refused_with_the_reason(registry: dict[str, type[SAE]]) -> None:
    class Plain(Rule, variant="plain"):
        pass

    class Learned(VARIANTS["topk"], variant="learned"):
        def __init__(self, d_in: int, d_sae: int, **options: Any) -> None:
            super().__init__(d_in, d_sae, **options)
            self.temperature = torch.nn.Parameter(torch.ones(()))

    class Penalised(VARIANTS["topk"], variant="penalised"):
        def extra_losses(self, x: Tensor, code: SparseCode, error: Tensor) -> dict[str, Tensor]:
            return {"l1": code.values.sum()}

    for name, reason in (
        ("plain", "not a budget that ranks can share"),
        ("learned", "temperature is not per latent"),
        ("penalised", "extra_losses sees the whole dictionary"),
    ):
        with pytest.raises(UserError, match=rf"{name}.* cannot be split over dictionary ranks.*{reason}"):
            build_shard(name, 8, 64, 0, Parallel(dict_size=2))


def readme_variant() -> str:
    """The variant in the README, as it stands there."""
    found = re.search(r"<!-- newcomer-variant -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


WORK = """
import json, os, signal, time, torch
from pathlib import Path
from saelab import cli
from saelab.data.cache import ActivationCache
from saelab.prompt.contest import contest
from saelab.sae import VARIANTS
from saelab.sae.weights import load_sae

def refused(*args):
    try:
        cli.main(list(args))
    except SystemExit as stop:
        return stop.code

source = ["--model", "lm", "--text", "text.jsonl", "--hook", "blocks.1.hook_resid_post", "--device", "cpu"]
cli.main(["harvest", *source, "--tokens", "1500", "--context-length", "16", "--held-out", "0.2", "--out", "cache"])
cli.main([*json.loads(TRAIN), "--out", "whole"])
cli.main(["evaluate", "whole", "--cache", "cache", "--lm-tokens", "64"])
cli.main(["index", "whole", "--cache", "cache"])
cli.main(["sweep", "cache", "grid.toml", "--out", "sweep", "--device", "cpu"])
sae, x = load_sae("whole"), ActivationCache("cache").read([0]).acts[0]
found = contest(sae, x)
active = sae.encode(x[None]).nonzero().indices.tolist()
assert VARIANTS["mine"] is type(sae) and {c.latent for c in found.winners} == set(active), found
assert refused("convert", "whole", "theirs", "--to", "saelens") == 2

killed = os.fork()  # starts at once, where another interpreter would import everything again
if not killed:
    cli.main([*json.loads(TRAIN), "--out", "killed"])
    os._exit(0)
until = time.monotonic() + 120
while not any(Path("killed/checkpoints").glob("step_*")):
    assert time.monotonic() < until and not Path("killed/cfg.json").exists(), "no checkpoint was seen"
    time.sleep(0.005)
os.kill(killed, signal.SIGKILL)
assert os.waitpid(killed, 0)[1] == signal.SIGKILL
cli.main(["train", "cache", "--out", "killed", "--resume"])
"""


@pytest.mark.slow
def test_the_variant_of_the_readme_works_end_to_end(tmp_path: Path) -> None:
    """Its file is put beside the others, nothing else is touched, and every command is run."""
    shutil.copytree(ROOT / "saelab", tmp_path / "saelab", ignore=shutil.ignore_patterns("*.nb?"))  # compiled kernels
    (tmp_path / "saelab" / "sae" / "mine.py").write_text(readme_variant())
    tiny_lm.save_llama(tmp_path / "lm")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": tiny_lm.sentences(1500, 0)}) + "\n")
    grid = "[train]\nepochs = 1\nbatch_size = 64\n[[grid]]\nvariant = ['mine', 'topk']\nd_sae = 40\n"
    (tmp_path / "grid.toml").write_text(grid)
    train = ["train", "cache", "--variant", "mine", "--d-sae", "64", "--epochs", "8", "--batch-size", "64"]
    train += ["--lr", "0.01", "--device", "cpu", "--checkpoint-steps", "3"]
    # Compiling the kernels for a copy of the package would take longer than all the rest.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "SAELAB_KERNELS": "reference", "OMP_NUM_THREADS": "1"}

    work = subprocess.run(
        [sys.executable, "-c", WORK.replace("TRAIN", repr(json.dumps(train)))],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    output = work.stdout
    assert work.returncode == 0, output
    assert "a mine SAE selects latents by a rule of its own" in " ".join(output.split())
    assert json.loads((tmp_path / "whole" / "evaluation.json").read_text())["metrics"]["fvu"]["value"] < 1
    assert (tmp_path / "whole" / "features" / "features.parquet").is_file()

    for name in ("sae_weights.safetensors", "metrics.jsonl", "cfg.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
