"""Push and pull in SAELens' layout, against a local server that speaks the hub's HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from saelab.errors import UserError
from saelab.interop import from_pretrained
from saelab.interop.fetch import download
from saelab.runs import Run
from saelab.runs.publishing import push_to_hub
from saelab.sae.weights import save
from tests.interop import collected
from tests.interop.examples import example, probe

HOOK = "blocks.9.hook_resid_post"


class FakeHub(BaseHTTPRequestHandler):
    """Enough of the hub for one repository: create, pre-upload, commit, list, download."""

    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        """The newest commit: another one for other files."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: object) -> None:
        self.answer(json.dumps(content).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/api/repos/create"):
            self.answer_json({"url": f"http://{self.headers['Host']}/org/repo", "name": "org/repo", "id": "org/repo"})
        elif "/preupload/" in self.path:
            wanted = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]
            self.answer_json({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer_json(
                {"commitOid": self.sha, "commitUrl": f"http://{self.headers['Host']}/org/repo/commit/{self.sha}"}
            )
        else:
            self.answer_json({"valid": True})

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            name = unquote(self.path.split("/resolve/")[1].split("/", 1)[1])
            if name not in self.files:
                self.answer(b"", 404, X_Error_Code="EntryNotFound")
                return
            etag = f'"{hashlib.sha1(self.files[name]).hexdigest()}"'
            self.answer(self.files[name], ETag=etag, X_Repo_Commit=self.sha)
        elif self.path.startswith("/api/models/org/repo"):
            siblings = [{"rfilename": name} for name in self.files]
            entries = [{"type": "file", "path": n, "size": len(b), "oid": self.sha} for n, b in self.files.items()]
            if "/tree/" in self.path:
                self.answer_json(entries)
                return
            self.answer_json(
                {"id": "org/repo", "modelId": "org/repo", "sha": self.sha, "siblings": siblings, "private": False}
            )
        else:
            self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, bytes]]:
    FakeHub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # stops at once
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield FakeHub.files
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_push_then_pull_gives_the_same_sae(hub: dict[str, bytes], tmp_path: Path) -> None:
    sae = example("batch_topk")
    save(sae, tmp_path / "run", {"hook_name": HOOK, "model_name": "tiny"})
    push_to_hub(tmp_path / "run", "org/repo")
    assert {f"{HOOK}/cfg.json", f"{HOOK}/sae_weights.safetensors", "README.md"} <= set(hub)
    card = hub["README.md"].decode()
    assert "batch_topk" in card
    assert f'from_pretrained("org/repo", "{HOOK}")' in card
    again = from_pretrained("org/repo", HOOK)
    assert torch.equal(again.encode(probe()).dense(), sae.encode(probe()).dense())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_second_sae_joins_the_card_of_the_repository(hub: dict[str, bytes], tmp_path: Path) -> None:
    for variant, hook in (("batch_topk", HOOK), ("gated", "blocks.3.hook_mlp_out"), ("relu", HOOK)):
        save(example(variant), tmp_path / variant, {"hook_name": hook, "model_name": "tiny"})
        push_to_hub(tmp_path / variant, "org/repo")
        if variant == "batch_topk":
            hub["README.md"] = hub["README.md"].replace(b"one per folder.", b"one per folder. By hand.")
            hub["by-hand/cfg.json"] = b"{}"
    card = hub["README.md"].decode()
    rows = [line for line in card.splitlines() if line.startswith("| [")]
    starts = [
        "| [blocks.3.hook_mlp_out](blocks.3.hook_mlp_out/README.md) | gated | d_in",
        f"| [{HOOK}]({HOOK}/README.md) | relu | d_in",
        "| [by-hand](by-hand/README.md) | | | `saelab",
    ]
    assert len(rows) == 3 and all(map(str.startswith, rows, starts)), rows
    assert "By hand." in card and card.count("list of SAEs") == 1
    assert b"| variant | gated |" in hub["blocks.3.hook_mlp_out/README.md"]
    assert b"| variant | relu |" in hub[f"{HOOK}/README.md"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_card_from_before_the_list_is_kept(hub: dict[str, bytes], tmp_path: Path) -> None:
    hub["README.md"] = b"# My SAEs\n\nWritten by hand.\n"
    save(example("relu"), tmp_path / "run", {"hook_name": HOOK})
    push_to_hub(tmp_path / "run", "org/repo")
    card = hub["README.md"].decode()
    assert card.startswith("# My SAEs\n\nWritten by hand.\n") and f"[{HOOK}]" in card


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_what_is_not_there_is_said(hub: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not be fetched|has nothing"):
        from_pretrained("org/repo", "blocks.1.hook_resid_post")
    with pytest.raises(UserError, match="could not be fetched"):
        from_pretrained("org/other")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_the_settings_beside_a_single_file_come_with_it(hub: dict[str, bytes], tmp_path: Path) -> None:
    file = collected.nanda(tmp_path / "there" / "gpt2-small_L5_lr1.0e+00.pt")
    for path in file.parent.iterdir():
        hub[f"all/{path.name}"] = path.read_bytes()
    hub["all/other_cfg.json"] = b"{}"
    found = download("org/repo/all/gpt2-small_L5_lr1.0e+00.pt")
    assert sorted(path.name for path in found.parent.iterdir()) == sorted(p.name for p in file.parent.iterdir())
    assert Run.open(found).hook_name == "blocks.5.attn.hook_z"
