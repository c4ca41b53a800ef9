"""Pushing: what arrives at a Hub is exactly the adapter, and what goes wrong is one sentence without the token.

The Hub here is a server on the loopback that speaks what huggingface_hub asks of it and keeps what arrives.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import adapter_files as saved
import huggingface_hub
import peft
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import _http
from peft import LoraConfig
from safetensors.torch import load_file

import llmreg
from llmreg.errors import AdapterFileError, LlmregError, RecipeError
from llmreg.hub.card import write_card
from llmreg.hub.push import PushError, push

TOKEN = "hf_" + "aBcDeFgH12" * 3
RECIPE = """model: {name: /home/somebody/models/base}
data: {train: /home/somebody/data/train.jsonl}
adapter: {method: pissa, r: 4}
training: {max_steps: 3, hub_token: hf_abcdefghij0123456789}
output: {dir: /home/somebody/runs/mine}
"""
ROW = {"name": "/home/somebody/data/test.jsonl", "metric": "exact match", "role": "task", "rows": 2}
REPORT = {
    "method": "pissa",
    "model": "/home/somebody/models/base",
    "measurements": [{**ROW, "before": 0.0, "after": 0.5}],
    "adapter": "/home/somebody/runs/mine/adapter",
    "machine": {"gpu": "the-gpu"},
    "steps": 3,
}
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "llmreg.json", "llmreg_factors.safetensors")


class LoopbackHub:
    """A Hub that keeps what it is sent; `failing` maps a part of a path to the status it answers with."""

    def __init__(self) -> None:
        self.repos: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[dict] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.failing: dict[str, tuple[int, str]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
                status, answer = hub.answer(self.command, self.path, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = _serve

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, command: str, path: str, body: bytes) -> tuple[int, dict | list]:
        for part, (status, message) in self.failing.items():
            if part in path:
                return status, {"error": message}
        if path.startswith("/lfs/"):
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}
        if "/paths-info/" in path:  # asked as a form
            there = [name for name in self.files if name in body.decode()]
            return 200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in there]
        asked = [json.loads(line) for line in body.splitlines()] if body else [{}]
        if path == "/api/validate-yaml":
            bad = "never-valid" in asked[0]["content"]
            return (400, {"errors": [{"message": "never-valid is wrong"}]}) if bad else (200, {"warnings": []})
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/repos/create":
            name = "/".join(filter(None, (asked[0].get("organization") or "me", asked[0]["name"])))
            if name in self.repos:
                return 409, {"error": "You already created this model repo"}
            self.repos[name] = asked[0]
            return 200, {"url": f"{self.url}/{name}"}
        if path.endswith("/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}} for one in asked[0]["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        name, _, rest = path.removeprefix("/api/models/").partition("?")[0].partition("/preupload")
        if rest:
            modes = [
                (one["path"], "lfs" if one["path"].endswith(".safetensors") else "regular") for one in asked[0]["files"]
            ]
            return 200, {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]}
        if "/commit/" in path:
            return self._commit(path, asked)
        if "/branch/" in path:
            return 200, {}
        if command == "GET" and name in self.repos:
            return 200, {"id": name, "private": self.repos[name].get("visibility") == "private"}
        return 404, {"error": "not found"}

    def _commit(self, path: str, lines: list[dict]) -> tuple[int, dict]:
        self.commits.append({"path": path, **lines[0]["value"], "operations": lines[1:]})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.blobs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.files[value["path"]] = content
            else:
                del self.files[value["path"]]
        url = f"{self.url}/me/adapter/commit/{'0' * 40}"
        return 200, {"commitUrl": url, "commitOid": "0" * 40, "pullRequestUrl": f"{self.url}/me/adapter/discussions/1"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = LoopbackHub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The output folder of a run, made once."""
    base = saved.checkpoint(tmp_path_factory.mktemp("somebodys-base"))
    output = tmp_path_factory.mktemp("output")
    config = llmreg.PissaConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    saved.drift(peft.get_peft_model(saved.load_base(base), config)).save_pretrained(output / "adapter")
    (output / "recipe.yaml").write_text(RECIPE)
    (output / "report.json").write_text(json.dumps(REPORT))
    write_card(output / "adapter", recipe=RECIPE, report=REPORT)
    return output


@pytest.fixture
def run(made, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(made, tmp_path / "output")


@pytest.fixture
def adapter(run):
    return run / "adapter"


def snapshot(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- what arrives ----------------------------------------------------------------------------------------------------


def test_every_file_of_the_adapter_arrives_to_the_byte_in_one_commit(hub, adapter, run):
    report = push(adapter, "me/adapter", token=TOKEN)
    assert set(hub.files) == {*ADAPTER, "README.md", "recipe.yaml", "report.json"}
    for name in ("adapter_model.safetensors", "llmreg.json", "llmreg_factors.safetensors", "README.md"):
        assert hub.files[name] == (adapter / name).read_bytes()
    assert report.files == {name: len(content) for name, content in hub.files.items()}
    assert report.total_bytes == sum(map(len, hub.files.values()))
    assert (report.repo_id, report.private, report.dry_run) == ("me/adapter", True, False)
    assert report.url == f"{hub.url}/me/adapter/commit/{'0' * 40}"
    assert len(hub.commits) == 1


def test_what_arrives_loads_as_what_was_saved(hub, adapter, tmp_path):
    push(adapter, "me/adapter", token=TOKEN)
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in hub.files.items():
        (arrived / name).write_bytes(content)
    sidecar = llmreg.hub.read_sidecar(arrived)
    assert sidecar.adapter_config().r == 4
    assert sidecar.load_factors().keys() == load_file(adapter / "llmreg_factors.safetensors").keys()


@pytest.mark.parametrize("private", [True, False])
def test_the_repository_is_private_unless_said_otherwise(hub, adapter, private):
    assert push(adapter, "me/adapter", token=TOKEN, **({} if private else {"private": False})).private is private
    assert hub.repos["me/adapter"]["visibility"] == ("private" if private else "public")


def test_a_name_alone_is_a_repository_of_ones_own(hub, adapter):
    for _ in range(2):  # made, and found again
        assert push(adapter, "adapter", token=TOKEN).repo_id == "me/adapter"
    assert set(hub.repos) == {"me/adapter"}
    assert hub.commits[-1]["path"] == "/api/models/me/adapter/commit/main"


def test_a_score_that_is_no_number_arrives_as_null(hub, adapter, run):
    rows = [{**ROW, "before": float("nan"), "after": float("inf")}]
    (run / "report.json").write_text(json.dumps({**REPORT, "measurements": rows}))
    push(adapter, "me/adapter", token=TOKEN)
    arrived = json.loads(hub.files["report.json"], parse_constant=lambda word: pytest.fail(word))
    assert arrived["measurements"][0]["before"] is None


def test_a_regular_expression_of_modules_arrives_as_it_is(hub, adapter):
    for name in ("llmreg.json", "llmreg_factors.safetensors"):
        (adapter / name).unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"target_modules": r".*/x/y\\z\(q|v)_proj", "revision": "/home/somebody/x"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    push(adapter, "me/adapter", token=TOKEN)
    arrived = json.loads(hub.files["adapter_config.json"])
    assert (arrived["target_modules"], arrived["revision"]) == (config["target_modules"], None)


def test_the_output_folder_of_a_run_means_its_adapter(hub, run):
    push(run, "me/adapter", token=TOKEN)
    assert set(hub.files) >= set(ADAPTER)
    assert not any("/" in name for name in hub.files)


def test_nothing_of_the_machine_arrives_and_the_folder_stays_as_it_is(hub, adapter, run):
    before = snapshot(run)
    assert "/somebodys-base" in before["adapter/adapter_config.json"].decode()
    push(adapter, "me/adapter", token=TOKEN)
    assert snapshot(run) == before
    for name, content in hub.files.items():
        assert not re.search(rb"somebody|the-gpu|hf_[a-z]{6}", content), name
    config = json.loads(hub.files["adapter_config.json"])
    assert config["base_model_name_or_path"] is None
    assert {**config, "base_model_name_or_path": 0} == {
        **json.loads(before["adapter/adapter_config.json"]),
        "base_model_name_or_path": 0,
    }
    assert json.loads(hub.files["report.json"])["measurements"][0]["after"] == 0.5


def test_the_base_keeps_its_hub_id(hub, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "llmreg.json").unlink()
    (adapter / "llmreg_factors.safetensors").unlink()
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base-1b"}))
    push(adapter, "me/adapter", token=TOKEN)
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/base-1b"
    assert hub.files["adapter_config.json"] == (adapter / "adapter_config.json").read_bytes()


def test_tokenizer_and_chat_templates_go_along_without_their_path(hub, adapter):
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    (adapter / "additional_chat_templates").mkdir()
    (adapter / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    settings = {"eos_token": "</s>", "name_or_path": "/home/somebody/base", "chat_template": "a /b/c d"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    push(adapter, "me/adapter", token=TOKEN)
    assert hub.files["tokenizer.json"] == b"{}"
    assert hub.files["additional_chat_templates/tools.jinja"] == b"{{ tools }}"
    del settings["name_or_path"]
    assert json.loads(hub.files["tokenizer_config.json"]) == settings


def test_nothing_else_ever_goes(hub, adapter, run):
    for name in (
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin", "trainer_state.json",
        "checkpoint-10/adapter_model.safetensors", "checkpoint-10/optimizer.pt", ".env", ".git/config", "notes.md",
        "runs/events.out", "model.pkl", "other.safetensors", "additional_chat_templates/.hidden.jinja",
    ):  # fmt: skip
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text("secret")
    (adapter / "vocab.txt").symlink_to(run / "report.json")
    (adapter / "link").symlink_to(run)
    push(adapter, "me/adapter", token=TOKEN)
    assert set(hub.files) == {*ADAPTER, "README.md", "recipe.yaml", "report.json"}


def test_recipe_and_report_of_another_folder_are_not_taken(hub, adapter, run):
    adapter.rename(run / "mine")
    push(run / "mine", "me/adapter", token=TOKEN)
    assert set(hub.files) == {*ADAPTER, "README.md"}


@pytest.mark.parametrize("card", [None, "---\nbase_model: /home/somebody/base\n---\n[More Information Needed]\n"])
def test_a_card_is_written_where_there_is_none_or_only_a_form(hub, adapter, card):
    if card is None:
        (adapter / "README.md").unlink()
    else:
        (adapter / "README.md").write_text(card)
    push(adapter, "me/adapter", token=TOKEN)
    assert "# PiSSA adapter" in hub.files["README.md"].decode()
    assert (adapter / "README.md").exists() is (card is not None)


def test_a_card_of_ones_own_goes_without_local_paths(hub, adapter):
    base = "/home/somebody/base"
    metadata = f"---\nlicense: mit\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n- mine\n---\n"
    (adapter / "README.md").write_text(f"{metadata}Mine, from {base}, see https://example.org/a/b.\n")
    push(adapter, "me/adapter", token=TOKEN)
    arrived = ModelCard(hub.files["README.md"].decode())
    assert arrived.data.to_dict() == {"license": "mit", "tags": ["mine"]}
    assert arrived.text.strip() == "Mine, from local-path, see https://example.org/a/b."


def test_branch_message_and_pull_request_are_passed_on(hub, adapter):
    push(adapter, "me/adapter", token=TOKEN, revision="trial", commit_message="Second try")
    assert any("/branch/trial" in path for _, path, _ in hub.requests)
    assert hub.commits[-1]["path"] == "/api/models/me/adapter/commit/trial"
    assert hub.commits[-1]["summary"] == "Second try"
    report = push(adapter, "me/adapter", token=TOKEN, create_pr=True)
    assert hub.commits[-1]["path"].endswith("/commit/main?create_pr=1")
    assert report.url.endswith("/discussions/1")


def test_pushing_again_replaces_and_takes_an_old_sidecar_away(hub, adapter, tmp_path):
    push(adapter, "me/adapter", token=TOKEN)
    llmreg.export_lora(adapter, tmp_path / "plain", rank=2)
    push(tmp_path / "plain", "me/adapter", token=TOKEN)
    assert hub.files["adapter_model.safetensors"] == (tmp_path / "plain" / "adapter_model.safetensors").read_bytes()
    assert not {"llmreg.json", "llmreg_factors.safetensors"} & set(hub.files)


def test_plain_lora_is_pushed_too(hub, tmp_path):
    base = saved.load_base(saved.checkpoint(tmp_path / "base"))
    peft.get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "plain")
    push(tmp_path / "plain", "me/adapter", token=TOKEN)
    assert set(hub.files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, adapter):
    push(adapter, "me/adapter", token=TOKEN, commit_message=f"with {TOKEN}")
    assert {token for _, path, token in hub.requests if "/commit/" in path} == {f"Bearer {TOKEN}"}
    assert TOKEN not in hub.commits[0]["summary"]
    assert not any(TOKEN.encode() in content for content in hub.files.values())


# -- a dry run -------------------------------------------------------------------------------------------------------


def test_a_dry_run_sends_nothing_writes_nothing_and_tells_the_same(hub, adapter, run):
    before = snapshot(run)
    dry = push(adapter, "me/adapter", dry_run=True)
    assert hub.requests == []
    assert snapshot(run) == before
    assert (dry.dry_run, dry.url) == (True, None)
    assert dry.files == push(adapter, "me/adapter", token=TOKEN).files


def test_a_dry_run_writes_no_card_either_and_asks_nobody_for_a_licence(hub, adapter):
    (adapter / "README.md").unlink()
    assert "README.md" in push(adapter, "me/adapter", dry_run=True).files
    assert hub.requests == []
    assert not (adapter / "README.md").exists()


# -- refused before anything is sent ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo_id", ["", "a/b/c", "me/", "/me", "me/ad apter", "me/--x", "me/a..b", "me/x.git", "x" * 97, None]
)
def test_what_is_no_repository_id_is_refused(hub, adapter, repo_id):
    with pytest.raises(RecipeError, match="write owner/name"):
        push(adapter, repo_id)
    assert hub.requests == []


def test_a_token_in_place_of_the_id_is_refused_and_not_repeated(hub, adapter):
    with pytest.raises(RecipeError, match="access token") as caught:
        push(adapter, TOKEN)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("token", ["", " ", "hf_a b", "hf_a\nb", "hf_é", 3])
def test_what_cannot_be_a_token_is_refused(hub, adapter, token):
    with pytest.raises(RecipeError, match="hf auth login"):
        push(adapter, "me/adapter", token=token)


def test_a_pull_request_to_a_branch_is_refused(hub, adapter):
    with pytest.raises(RecipeError, match="create_pr"):
        push(adapter, "me/adapter", revision="trial", create_pr=True)


def _without(name):
    return lambda folder: (folder / name).unlink()


def _cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def _flip(name):
    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[-5] ^= 1
        (folder / name).write_bytes(content)

    return change


def _write(name, text):
    return lambda folder: (folder / name).write_text(text)


def _pickle(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _link(folder):
    (folder / "adapter_model.safetensors").rename(folder / "elsewhere")
    (folder / "adapter_model.safetensors").symlink_to(folder / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("adapter_config.json"), r"adapter_config\.json is missing"),
        (_write("adapter_config.json", "{"), "damaged"),
        (_write("adapter_config.json", "[]"), "damaged"),
        (_without("adapter_model.safetensors"), r"adapter_model\.safetensors is missing"),
        (_cut("adapter_model.safetensors"), "not a whole safetensors file"),
        (_flip("adapter_model.safetensors"), "SHA-256 differs"),
        (_cut("llmreg_factors.safetensors"), "SHA-256 differs"),
        (_without("llmreg_factors.safetensors"), "missing"),
        (_without("llmreg.json"), r"no llmreg\.json"),
        (_cut("llmreg.json"), "damaged"),
        (_write("tokenizer_config.json", "{"), "damaged"),
        (_pickle, "pickle, which is never pushed"),
        (_link, "is a link"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused(hub, adapter, damage, message):
    damage(adapter)
    for dry_run in (True, False):
        with pytest.raises(AdapterFileError, match=message):
            push(adapter, "me/adapter", token=TOKEN, dry_run=dry_run)
    assert hub.requests == []


def test_a_folder_that_is_none_is_refused(hub, tmp_path):
    for folder, message in ((tmp_path / "nowhere", "not a folder"), (tmp_path, "holds no adapter")):
        with pytest.raises(AdapterFileError, match=message):
            push(folder, "me/adapter")


@pytest.mark.parametrize(
    "text",
    ["no metadata", "---\n- a\n---\n", "---\na: [\n---\n", "---\nlicense: 3\n---\n", "---\nmodel-index: 3\n---\n"],
)
def test_a_card_that_does_not_validate_is_refused(hub, adapter, text):
    (adapter / "README.md").write_text(text)
    with pytest.raises(RecipeError, match=r"metadata of README\.md is not valid"):
        push(adapter, "me/adapter", dry_run=True)


def test_a_card_that_only_the_hub_finds_wrong_leaves_no_repository(hub, adapter):
    (adapter / "README.md").write_text("---\nlicense: never-valid\n---\n")
    push(adapter, "me/adapter", dry_run=True)
    with pytest.raises(RecipeError, match="never-valid is wrong"):
        push(adapter, "me/adapter", token=TOKEN)
    assert hub.repos == {}


@pytest.mark.parametrize(("name", "text"), [("recipe.yaml", "a: ["), ("report.json", "["), ("report.json", "[]")])
def test_a_damaged_recipe_or_report_is_refused(hub, adapter, run, name, text):
    (run / name).write_text(text)
    with pytest.raises(RecipeError, match="restore it, or remove it"):
        push(adapter, "me/adapter", dry_run=True)


# -- what a Hub may answer -------------------------------------------------------------------------------------------


def test_an_existing_public_repository_needs_consent(hub, adapter):
    hub.repos["me/adapter"] = {"visibility": "public"}
    with pytest.raises(RecipeError, match="is public; write private=False"):
        push(adapter, "me/adapter", token=TOKEN)
    assert hub.commits == []
    assert push(adapter, "me/adapter", token=TOKEN, private=False).private is False


def test_an_existing_private_repository_stays_private(hub, adapter):
    hub.repos["me/adapter"] = {"visibility": "private"}
    assert push(adapter, "me/adapter", token=TOKEN, private=False).private is True


def test_a_token_that_may_write_but_not_create_is_enough(hub, adapter):
    hub.repos["me/adapter"] = {"visibility": "private"}
    hub.failing["/api/repos/create"] = (403, "no")
    assert push(adapter, "me/adapter", token=TOKEN).private is True


@pytest.mark.parametrize(
    ("part", "status", "advice"),
    [
        ("/commit/", 401, "hf auth login"),
        ("/commit/", 403, "write access"),
        ("/commit/", 404, "check the id"),
        ("/commit/", 409, "push again"),
        ("/commit/", 500, "push again later"),
        ("/lfs/", 413, "files of this size"),
        ("/lfs/", 500, "push again later"),
        ("/objects/batch", 403, "write access"),
        ("/preupload/", 404, "check the id"),
        ("/preupload/", 500, "push again later"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_with_what_to_do(hub, adapter, part, status, advice):
    hub.failing[part] = (status, f"said by the server about {TOKEN}")
    with pytest.raises(PushError) as caught:
        push(adapter, "me/adapter", token=TOKEN)
    text = str(caught.value)
    assert f"me/adapter was not pushed: HTTP {status}" in text
    assert advice in text
    assert TOKEN not in text
    assert "\n" not in text
    assert isinstance(caught.value, LlmregError)
    assert hub.commits == []


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "hf auth login"), (403, "write access"), (500, "push again later")]
)
def test_a_repository_that_cannot_be_made_is_said(hub, adapter, status, advice):
    hub.failing["/api/repos/create"] = (status, "no")
    with pytest.raises(PushError, match=f"HTTP {status}.*{advice}"):
        push(adapter, "me/adapter", token=TOKEN)


def test_a_hub_that_is_not_there_is_said(hub, adapter):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(PushError, match=r"cannot be reached.*HF_ENDPOINT"):
        push(adapter, "me/adapter", token=TOKEN)


def test_something_that_is_no_hub_is_said(hub, adapter, monkeypatch):
    monkeypatch.setattr(hub, "answer", lambda *_: (200, "hello"))
    with pytest.raises(PushError, match="does not answer as a Hub"):
        push(adapter, "me/adapter", token=TOKEN)


def test_offline_mode_is_named(hub, adapter, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set"):
        push(adapter, "me/adapter", token=TOKEN)
    assert hub.requests == []
