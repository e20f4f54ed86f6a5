"""hf:// sources, against a hub of our own: a small HTTP server on this machine's loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.steps import layouts

pytestmark = pytest.mark.tiny

COMMIT, OLDER = "c" * 40, "0" * 40
UNET = "unet/diffusion_pytorch_model.safetensors"
CHILD = """
import json, sys
from pathlib import Path
from sdcompile.bundle import sha256_of
from sdcompile.errors import SdcompileError
from sdcompile.spec import say_nothing
from sdcompile.steps import component, fetch

asked = json.loads(sys.argv[1])
try:
    source = component.describe(
        asked["source"], "vae_decoder", base=Path("."), offline=asked["offline"], hash_file=sha256_of
    ) if asked["component"] else fetch.describe(
        asked["source"], base=Path("."), source_config=None, folders=("text_encoder", "unet", "vae"),
        offline=asked["offline"], hash_file=sha256_of,
    )
    whole = source.with_parts({"vae_decoder": source}) if asked["component"] else source
    located = whole.locate(tuple(asked["locate"]), say_nothing) if asked["locate"] else None
    answer = {
        "id": source.id, "revision": source.revision, "licence": source.licence, "notes": source.notes,
        "files": {path: [f.sha256, f.bytes] for path, f in source.files.items()},
        "here": sorted(str(p.relative_to(located)) for p in located.rglob("*") if p.is_file()) if located else [],
    }
except SdcompileError as error:
    answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
sys.stdout.write(json.dumps(answer))
"""


class Hub(ThreadingHTTPServer):
    """The three endpoints a download needs: what a revision holds, a file's facts, a file."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.asked: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Be quiet; `Hub.asked` is the log."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        for repo, status, code in (("gated", 403, "GatedRepo"), ("private", 401, ""), ("absent", 404, "RepoNotFound")):
            if f"org/{repo}/" in path:
                return self.send(status, b"", {"X-Error-Code": code} if code else {}, body)
        if path.startswith("/api/models/org/model/revision/") and path.endswith(("/main", "/v1", COMMIT)):
            return self.send(200, json.dumps(self.listing()).encode(), {}, body)
        if path.startswith("/api/models/org/model/revision"):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        if "/resolve/" not in path:
            return self.send(404, b"", {}, body)
        _, _, _, _, revision, name = path.split("/", 5)
        if revision not in ("main", "v1", COMMIT):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        file = self.server.root / name
        if not file.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
        content = file.read_bytes()
        tag = (
            hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else hashlib.sha1(content).hexdigest()
        )
        return self.send(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body)

    def listing(self) -> dict[str, Any]:
        siblings = []
        for file in sorted(p for p in self.server.root.rglob("*") if p.is_file()):
            content = file.read_bytes()
            row: dict[str, Any] = {"rfilename": file.relative_to(self.server.root).as_posix(), "size": len(content)}
            if file.suffix == ".safetensors":
                row["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            siblings.append(row)
        return {"id": "org/model", "sha": COMMIT, "siblings": siblings}

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    root = layouts.write(tmp_path / "repository")
    (root / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(layouts.safetensors(b"half"))
    (root / "safety_checker").mkdir()
    (root / "safety_checker" / "model.safetensors").write_bytes(layouts.safetensors(b"unused"))
    with Hub(root) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    endpoint: str,
    home: Path,
    source: str,
    *,
    offline: bool = False,
    locate: tuple[str, ...] = (),
    component: bool = False,
    **env: str,
) -> dict[str, Any]:
    """describe (and locate) in a process of its own: the hub's library reads its settings at import."""
    asked = json.dumps({"source": source, "offline": offline, "locate": locate, "component": component})
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_secret", "NO_PROXY": "127.0.0.1"}
    run = subprocess.run(
        [sys.executable, "-c", CHILD, asked],
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **settings, **env},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "hf_secret" not in run.stdout + run.stderr
    assert not run.stderr, run.stderr
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


def test_a_revision_is_resolved_and_weights_wait_until_they_are_needed(hub: Hub, tmp_path: Path) -> None:
    told = ask(hub.endpoint, tmp_path / "home", "hf://org/model@v1")
    assert (told["id"], told["revision"]) == (f"hf://org/model@{COMMIT}", COMMIT)
    assert told["licence"] == "creativeml-openrail-m"
    assert told["notes"] == []
    assert told["files"][UNET][0] == hashlib.sha256((hub.root / UNET).read_bytes()).hexdigest()
    assert not any(line.endswith(".safetensors") for line in hub.asked)

    hub.asked.clear()
    here = ask(hub.endpoint, tmp_path / "home", "hf://org/model@v1", locate=("unet",))["here"]
    weights = {line.rpartition("/resolve/")[2] for line in hub.asked if line.endswith(".safetensors")}
    assert weights == {f"{COMMIT}/{UNET}"}
    assert UNET in here
    assert not any("safety_checker" in path or "fp16" in path for path in here)


def test_without_a_revision_the_plan_is_told_to_name_the_commit(hub: Hub, tmp_path: Path) -> None:
    (note,) = ask(hub.endpoint, tmp_path / "home", "hf://org/model")["notes"]
    assert f"hf://org/model@{COMMIT}" in note


@pytest.mark.parametrize("name", ["hf://org/model", "hf://org/model@v1", f"hf://org/model@{COMMIT}"])
def test_once_downloaded_a_source_is_the_same_offline(hub: Hub, tmp_path: Path, name: str) -> None:
    folders = ("text_encoder", "unet", "vae")
    online = ask(hub.endpoint, tmp_path / "home", name, locate=folders)
    hub.asked.clear()
    assert ask(hub.endpoint, tmp_path / "home", name, locate=folders, offline=True) == online
    assert hub.asked == []


def test_the_environment_can_say_offline_too(hub: Hub, tmp_path: Path) -> None:
    told = ask(hub.endpoint, tmp_path / "home", "hf://org/model@v1", HF_HUB_OFFLINE="1")
    assert told["error"] == "HostError"
    assert hub.asked == []


def test_offline_without_a_copy_names_the_command_that_gets_it(hub: Hub, tmp_path: Path) -> None:
    told = ask(hub.endpoint, tmp_path / "home", "hf://org/model@v1", offline=True)
    assert told["error"] == "HostError"
    assert "hf://org/model@v1 is not in the hub cache" in told["message"]
    assert "hf download org/model --revision v1" in told["hint"]

    ask(hub.endpoint, tmp_path / "home", "hf://org/model@v1")  # configs only
    told = ask(hub.endpoint, tmp_path / "home", "hf://org/model@v1", offline=True)
    assert told["error"] == "HostError"
    assert "unet/ has no diffusion_pytorch_model.safetensors" in told["message"]
    assert "hf download org/model --revision v1" in told["hint"]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("hf://org/gated@main", "HostError", "hf://org/gated is gated"),
        ("hf://org/private@main", "HostError", "does not exist, or is private"),
        ("hf://org/absent@main", "RecipeError", "does not exist on the hub"),
        (f"hf://org/model@{OLDER}", "RecipeError", f"has no revision {OLDER}"),
    ],
)
def test_each_refusal_of_the_hub_is_told_apart(hub: Hub, tmp_path: Path, source: str, error: str, message: str) -> None:
    told = ask(hub.endpoint, tmp_path / "home", source)
    assert told["error"] == error
    assert message in told["message"]
    assert told["hint"]


def test_a_repository_that_is_no_diffusers_model_is_refused(hub: Hub, tmp_path: Path) -> None:
    (hub.root / "model_index.json").unlink()
    told = ask(hub.endpoint, tmp_path / "home", "hf://org/model@v1")
    assert told["error"] == "RecipeError"
    assert "has no model_index.json" in told["message"]


def test_a_repository_with_pickles_only_is_refused_with_the_words_to_convert_it(hub: Hub, tmp_path: Path) -> None:
    for path in (hub.root / "unet").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    told = ask(hub.endpoint, tmp_path / "home", "hf://org/model@v1")
    assert told["error"] == "RecipeError"
    assert "P.from_pretrained('org/model')" in told["hint"]


def test_without_a_network_the_hub_is_said_to_be_out_of_reach(tmp_path: Path) -> None:
    told = ask("http://127.0.0.1:9", tmp_path / "home", "hf://org/model@v1")
    assert told["error"] == "HostError"
    assert "the hub cannot be reached" in told["message"]
    assert "--offline" in told["hint"]


def test_a_component_may_come_from_a_folder_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    home, source = tmp_path / "home", "hf://org/model/vae@v1"
    told = ask(hub.endpoint, home, source, component=True)
    assert told["id"] == f"hf://org/model/vae@{COMMIT}"
    assert told["licence"] == "creativeml-openrail-m"
    assert set(told["files"]) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert not any(line.endswith(".safetensors") for line in hub.asked)
    online = ask(hub.endpoint, home, source, component=True, locate=("vae_decoder",))
    assert "diffusion_pytorch_model.safetensors" in online["here"]
    assert "unet" not in " ".join(online["here"])
    hub.asked.clear()
    assert ask(hub.endpoint, home, source, component=True, locate=("vae_decoder",), offline=True) == online
    assert hub.asked == []


def test_a_component_may_be_a_repository_of_its_own(hub: Hub, tmp_path: Path) -> None:
    (hub.root / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    (hub.root / "diffusion_pytorch_model.safetensors").write_bytes(layouts.safetensors(b"light"))
    told = ask(hub.endpoint, tmp_path / "home", "hf://org/model", component=True)
    assert told["id"] == f"hf://org/model@{COMMIT}"
    assert f"write hf://org/model@{COMMIT}" in told["notes"][0]


def test_a_whole_model_is_no_component(hub: Hub, tmp_path: Path) -> None:
    told = ask(hub.endpoint, tmp_path / "home", "hf://org/model@v1", component=True)
    assert told["error"] == "RecipeError"
    assert "has no config.json" in told["message"]
    assert "hf://org/model/vae@v1" in told["hint"]
