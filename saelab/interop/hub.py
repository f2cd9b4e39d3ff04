"""The Hugging Face hub in SAELens' layout: a repository of folders, one SAE each, with a model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from saelab.errors import UserError, damaged, first_line
from saelab.interop.detection import is_ours, load
from saelab.interop.fetch import REACH, download, endpoint, split_id
from saelab.interop.reading import read_json
from saelab.layout import CARD, CONFIG, EVALUATION, EXTRA, WEIGHTS
from saelab.sae import SAE
from saelab.sae.weights import load_config, load_metadata


def from_pretrained(repo: str, path: str = "", revision: str | None = None) -> SAE:
    """The SAE in folder ``path`` (in SAELens' layout the hook's name) of the hub repository ``org/repo``."""
    hub_id = f"{repo}/{path}" if path else repo
    split_id(hub_id)
    return load(download(hub_id, revision))


def push_to_hub(run: Path | str, repo: str, path: str | None = None, private: bool = False) -> str:
    """Upload a run folder's SAE to ``repo`` under ``path`` (by default its hook's name), with a model card.

    Returns the address of the commit. Needs the token of ``hf auth login`` or ``HF_TOKEN``.
    """
    run = Path(run)
    if not is_ours(run):
        raise UserError(f"{run} is not a run folder; convert it first")
    metadata = load_metadata(run)
    path = path or metadata.get("hook_name")
    if not path:
        raise UserError(f"{run} records no hook name; say with path= where in the repository it belongs")
    split_id(f"{repo}/{path}")
    api = HfApi(endpoint=endpoint())
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            card = Path(folder) / CARD
            card.write_text(card_of(run, repo, path))
            api.upload_file(path_or_fileobj=card, path_in_repo=CARD, repo_id=repo)
        keep = [WEIGHTS, CONFIG, EXTRA, EVALUATION]
        commit = api.upload_folder(folder_path=run, path_in_repo=path, repo_id=repo, allow_patterns=keep)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{repo} could not be written on the hub ({first_line(error)}); {REACH}") from error
    return str(commit.commit_url)


def card_of(run: Path | str, repo: str | None = None, path: str | None = None) -> str:
    """The model card of a run folder: for ``path`` in the hub repository ``repo``, or for the folder as it is."""
    run = Path(run)
    if not is_ours(run):
        raise UserError(f"{run} is not a run folder; convert it first")
    config = load_config(run)
    path = path or config["metadata"].get("hook_name")
    if repo is None or not path:
        calls = f'saelab.load("{run.name}")', f'SAE.load_from_disk("{run.name}")'
    else:
        calls = f'saelab.from_pretrained("{repo}", "{path}")', f'SAE.from_pretrained("{repo}", "{path}")'
    return _model_card(repo or run.name, calls, config, _measured(run / EVALUATION))


def _model_card(title: str, calls: tuple[str, str], config: Mapping[str, Any], measured: str) -> str:
    metadata = config["metadata"]
    rows = [
        ("variant", metadata["saelab"]["variant"]),
        ("language model", metadata.get("model_name")),
        ("passes over the text", metadata.get("train", {}).get("epochs")),
        ("hook", metadata.get("hook_name")),
        ("widths", f"d_in {config['d_in']}, d_sae {config['d_sae']}"),
        ("text", metadata.get("dataset_path")),
        ("context length", metadata.get("context_size")),
        ("saelab", metadata.get("saelab_version")),
    ]
    facts = "\n".join(f"| {name} | {value} |" for name, value in rows if value is not None)
    return f"""---
library_name: saelens
tags: [saelens, saelab, sparse-autoencoder]
---
# {title}

A sparse autoencoder trained with saelab.

| | |
|---|---|
{facts}
{measured}
## Load it

```python
import saelab

sae = {calls[0]}
```

In SAELens, where it has the architecture (`{config["architecture"]}`):

```python
from sae_lens import SAE

sae = {calls[1]}
```
"""


def _measured(file: Path) -> str:
    if not file.is_file():
        return "\nNot evaluated yet.\n"
    with damaged(file, "evaluate the run again"):
        return _metrics(read_json(file))


def _metrics(evaluation: Mapping[str, Any]) -> str:
    split = evaluation["settings"]["split"].replace("_", "-")
    window = evaluation["density_histogram"]["tokens"]
    lines = [
        f"\n## Metrics\n\nOn the {split} split; shares of latents are counted over a window of {window:,} tokens.\n",
        "| metric | value | 95 % interval | measured on |",
        "|---|---|---|---|",
    ]
    for name, entry in evaluation["metrics"].items():
        low, high = entry["low"], entry["high"]
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        lines.append(f"| {name} | {entry['value']:.4g} | {interval} | {entry['n']:,} {entry['unit']}s |")
    return "\n".join(lines) + "\n"
