"""Publishing runs on the Hugging Face hub in SAELens' layout: a repository of folders, one SAE each.

Every folder has the model card of its SAE; the card of the repository lists them.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from saelab.errors import UserError, first_line
from saelab.interop.fetch import REACH, endpoint, split_id
from saelab.layout import CARD, CONFIG, EVALUATION, EXTRA, WEIGHTS
from saelab.runs.card import model_card
from saelab.runs.run import Run

# saelab writes the text between these lines of a repository's card and keeps the rest.
BEGIN, END = "<!-- saelab: list of SAEs -->", "<!-- end of list -->"
HEAD = ("| SAE | variant | widths | load it |", "|---|---|---|---|")


def push_to_hub(run: Run | Path | str, repo: str, path: str | None = None, private: bool = False) -> str:
    """Upload a run's SAE to ``repo`` under ``path`` (by default its hook's name), with model cards, in one commit.

    Returns the address of the commit. Needs the token of ``hf auth login`` or ``HF_TOKEN``. Raises UserError if it is
    not a run folder, or if the hub refuses.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    path = path or run.recorded.get("hook_name")
    if not path:
        raise UserError(f"{run.path} records no hook name; give its folder in the repository with path=")
    split_id(f"{repo}/{path}")
    card = model_card(run, repo, path)
    assert run.path is not None
    files = {f"{path}/{CARD}": card.encode()}
    files |= {f"{path}/{n}": run.path / n for n in (WEIGHTS, CONFIG, EXTRA, EVALUATION) if (run.path / n).is_file()}
    api = HfApi(endpoint=endpoint())
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        present = set(api.list_repo_files(repo))
        old = Path(api.hf_hub_download(repo, CARD)).read_text(encoding="utf-8") if CARD in present else ""
        folders = sorted({name.removesuffix(f"/{CONFIG}") for name in present if name.endswith(f"/{CONFIG}")})
        files[CARD] = repository_card(repo, run, path, folders, old).encode()
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(repo, operations, commit_message=f"Upload {path} with saelab")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{repo} could not be written on the hub ({first_line(error)}); {REACH}") from error
    return str(commit.commit_url)


def repository_card(repo: str, run: Run, path: str, folders: list[str], old: str = "") -> str:
    """The card of a repository after ``run`` was put into its folder ``path``.

    ``folders`` are those of the SAEs that are already there. ``old`` is the present card: its text is kept, and in the
    list the lines of other SAEs.
    """
    before, mark, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    known = {found[1]: line for line in rest.splitlines() if (found := re.match(r"\| \[([^\]]+)\]", line))}
    lines = {folder: known.get(folder, f"| {_link(folder)} | | | {_call(repo, folder)} |") for folder in folders}
    widths = f"d_in {run.config['d_in']}, d_sae {run.config['d_sae']}"
    lines[path] = f"| {_link(path)} | {run.variant} | {widths} | {_call(repo, path)} |"
    listed = "\n".join([BEGIN, *HEAD, *(lines[name] for name in sorted(lines)), END])
    if mark:
        return f"{before}{listed}{after}"
    start = old.rstrip() or (
        "---\nlibrary_name: saelens\ntags: [saelens, saelab, sparse-autoencoder]\n---\n"
        f"# {repo}\n\nSparse autoencoders trained with saelab, one per folder."
    )
    return f"{start}\n\n## SAEs in this repository\n\n{listed}\n"


def _link(folder: str) -> str:
    return f"[{folder}]({folder}/{CARD})"


def _call(repo: str, folder: str) -> str:
    return f'`saelab.from_pretrained("{repo}", "{folder}")`'
