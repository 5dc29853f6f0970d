"""`realign.export --push` against a local server with the calls of the Hub, which records them."""

import base64
import json
import re
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from realign import export
from realign.digits import ASSETS

TOKEN = "hf_abcdefghijklmnopqrstuvwxyzABCDEF"
ACCOUNT = {
    "type": "user",
    "name": "me",
    "orgs": [{"name": "team"}],
    "auth": {"accessToken": {"role": "write", "displayName": "mine"}},
}


class Server(ThreadingHTTPServer):
    """A server that prints nothing, because tests read the command's own standard error."""

    def handle_error(self, *_):
        pass


class Hub:
    """The server.

    Attributes:
        account: the answer to whoami, or the status of an error.
        repos: OWNER/NAME -> whether it is private.
        writable: whether the token may write to existing repositories.
        commit_status: status of the answer to a commit.
        calls: (method, path, headers, body) of all requests.
    """

    def __init__(self):
        self.account, self.repos, self.writable, self.commit_status = ACCOUNT, {}, True, 200
        self.calls = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                hub.calls.append((self.command, self.path, dict(self.headers), body))
                status, value = hub.respond(self.command, self.path.partition("?")[0], body)
                data = json.dumps(value).encode()
                self.send_response(status)
                if status in (401, 404):
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def respond(self, method, path, body):
        if path == "/api/whoami-v2":
            if isinstance(self.account, int):
                return self.account, {"error": f"Invalid token {TOKEN}"}
            return 200, self.account
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repos.setdefault(name, asked.get("visibility") == "private")
            return 200, {"url": f"{self.endpoint}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repo, rest = re.fullmatch(r"/api/models/([^/]+/[^/]+)(.*)", path).groups()
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        if rest == "/auth-check/write":
            return (200, {}) if self.writable else (403, {"error": f"Forbidden for {TOKEN}"})
        if rest.startswith("/preupload"):
            files = json.loads(body)["files"]
            return 200, {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
            }
        if rest.startswith("/commit"):
            if self.commit_status != 200:
                return self.commit_status, {"error": f"no space for {TOKEN}"}
            url = f"{self.endpoint}/{repo}/commit/{'a' * 40}"
            return 200, {"commitUrl": url, "commitOid": "a" * 40, "success": True}
        return 200, {"id": repo, "private": self.repos[repo], "sha": "a" * 40, "siblings": []}

    @property
    def uploaded(self):
        """The files of the commits, name -> content."""
        lines = [
            json.loads(line)
            for _, path, _, body in self.calls
            if "/commit/" in path
            for line in body.splitlines()
        ]
        return {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, and a token for it in HF_TOKEN."""
    found = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def model(tmp_path):
    """A whole model, with files that a run may leave beside it."""
    folder = shutil.copytree(ASSETS, tmp_path / "model")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"old")
    (folder / "training_args.bin").write_bytes(b"settings")
    return folder


def test_a_folder_is_uploaded_with_the_token_in_one_header_only(hub, model, capsys):
    words = ["--model", str(model), "--push", "me/aligned", "--private"]
    assert export.main(words) == 0
    out, err = capsys.readouterr()
    line = (
        f"uploaded {model} to {hub.endpoint}/me/aligned; left out checkpoint-1/model.safetensors, "
    )
    assert f"{line}training_args.bin\n" in out
    assert hub.repos == {"me/aligned": True}
    files = {f.name: f.read_bytes() for f in ASSETS.iterdir() if f.name != ".gitattributes"}
    assert hub.uploaded == files
    for _, path, headers, body in hub.calls:
        others = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        assert TOKEN not in path + str(others) and TOKEN.encode() not in body
    sent = {
        headers.get("authorization", headers.get("Authorization")) for *_, headers, _ in hub.calls
    }
    assert sent - {None} == {f"Bearer {TOKEN}"}
    assert TOKEN not in out + err


def test_a_merged_adapter_is_uploaded(hub, other, tmp_path):
    merged = tmp_path / "merged"
    words = ["--model", str(other["adapter"]), "--output", str(merged), "--push", "team/aligned"]
    assert export.main(words) == 0
    assert hub.repos == {"team/aligned": False}
    assert hub.uploaded == {f.name: f.read_bytes() for f in merged.iterdir()}
    assert not [n for n, data in hub.uploaded.items() if str(ASSETS).encode() in data]


def test_a_link_in_a_checked_folder_is_not_uploaded(hub, other, pairs_file, tmp_path, capsys):
    merged = shutil.copytree(ASSETS, tmp_path / "merged")
    (merged / "LICENSE").symlink_to("/etc/hostname")
    words = ["--model", str(other["adapter"]), "--output", str(merged)]
    assert export.main([*words, "--check", str(pairs_file), "--push", "me/aligned"]) == 1
    assert "LICENSE is a link to a file elsewhere" in capsys.readouterr().err
    assert not hub.uploaded


def test_an_adapter_is_uploaded_if_its_base_is_on_the_hub(hub, other, tmp_path, capsys):
    folder = shutil.copytree(other["adapter"], tmp_path / "adapter")
    words = ["--model", str(folder), "--push", "me/adapter"]
    assert export.main(words) == 1
    assert "is a folder of this machine, which others cannot load" in capsys.readouterr().err
    assert not hub.uploaded and not hub.repos
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}
    file.write_text(json.dumps(config))
    assert export.main(words) == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= hub.uploaded.keys()


def test_a_link_out_of_the_folder_is_not_uploaded(hub, model, tmp_path, capsys):
    (tmp_path / "private.txt").write_text("mine")
    (model / "merges.txt").symlink_to(tmp_path / "private.txt")
    assert export.main(["--model", str(model), "--push", "me/aligned"]) == 1
    assert "merges.txt is a link to a file elsewhere" in capsys.readouterr().err
    assert not hub.uploaded


def test_only_files_of_a_model_are_uploaded_and_the_others_named(hub, model, capsys):
    """A file with settings, paths or credentials has any name."""
    known = {f.name for f in model.iterdir() if f.is_file()} - {"training_args.bin"}
    others = ("vlmevalkit.json", "credentials.json", "reference.json", "notes.txt", "my.md",
              "sub/run.json", "sub/config.json", "checkpoint-1/config.json", "[a]config.json",
              ".env", "config.json.bak")  # fmt: skip
    more = ("merges.txt", "vocab.json", "LICENSE", "README.md", "model-00001-of-00002.safetensors",
            "model.safetensors.index.json", "additional_chat_templates/tool.jinja")  # fmt: skip
    for name in (*others, *more):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    assert export.main(["--model", str(model), "--push", "me/aligned"]) == 0
    assert hub.uploaded.keys() == known | {*more}
    left_out = capsys.readouterr().out.rpartition("; left out ")[2].strip().split(", ")
    assert left_out == sorted({*others, "training_args.bin", "checkpoint-1/model.safetensors"})


@pytest.mark.parametrize("with_token", [True, False])
@pytest.mark.parametrize(
    "repo",
    [TOKEN, f"me/{TOKEN}", f"{TOKEN}/a", f"me/{TOKEN}/b", f"me/{TOKEN} x",
     f"https://me:{TOKEN}@huggingface.co/me/a", "https://me:secret-hf-1@huggingface.co/me/a",
     f"https://huggingface.co/me/a?token={TOKEN}", "hf_" + "Z" * 34],
)  # fmt: skip
def test_a_token_in_place_of_a_name_is_not_printed(
    hub, model, repo, with_token, monkeypatch, capsys
):
    if not with_token:
        monkeypatch.delenv("HF_TOKEN")
    assert export.main(["--model", str(model), "--push", repo]) == 1
    out, err = capsys.readouterr()
    assert "holds a token or a password, so it is not sent. Give OWNER/NAME" in err
    assert not any(secret in out + err for secret in (TOKEN, "secret-hf-1", "Z" * 34))
    assert not hub.calls


def test_the_token_itself_is_no_name(hub, model, monkeypatch, capsys):
    """A token of another form, such as one of a private Hub."""
    monkeypatch.setenv("HF_TOKEN", "private-1")
    assert export.main(["--model", str(model), "--push", "me/private-1"]) == 1
    assert "private-1" not in "".join(capsys.readouterr()) and not hub.calls


READ = ACCOUNT | {"auth": {"accessToken": {"role": "read"}}}


@pytest.mark.parametrize(
    ("changes", "repo", "message"),
    [
        ({}, "aligned", "'aligned' names no owner. Give OWNER/NAME."),
        ({}, "me/al igned", "Give OWNER/NAME"),
        ({}, "me/a/b", "Give OWNER/NAME"),
        ({}, "others/aligned", "me cannot create others/aligned. Give an owner among me, team"),
        ({"account": READ}, "me/aligned", "the token of me can only read. Run `hf auth login`"),
        ({"account": 401}, "me/aligned", "me/aligned cannot be written (HfHubHTTPError"),
        ({"account": 500}, "me/aligned", "Check the connection"),
        ({"repos": {"me/aligned": False}}, "me/aligned", "exists and is public, so --private"),
        ({"repos": {"me/aligned": True}, "writable": False}, "me/aligned", "cannot be written"),
    ],
)
def test_a_refused_push_fails_before_the_merge(
    hub, other, tmp_path, changes, repo, message, capsys
):
    vars(hub).update(changes)
    before = dict(hub.repos)
    words = ["--model", str(other["adapter"]), "--output", str(tmp_path / "merged")]
    assert export.main([*words, "--push", repo, "--private"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: --push: ") and err.count("\n") == 1
    assert message in err and TOKEN not in out + err
    assert not (tmp_path / "merged").exists() and hub.repos == before and not hub.uploaded


def test_without_a_token_nothing_is_sent(hub, model, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    assert export.main(["--model", str(model), "--push", "me/aligned"]) == 1
    assert "there is no token for the Hub. Run `hf auth login`" in capsys.readouterr().err
    assert not hub.calls


def test_a_failed_upload_names_the_complete_folder(hub, model, capsys):
    hub.commit_status = 403
    assert export.main(["--model", str(model), "--push", "me/aligned"]) == 1
    out, err = capsys.readouterr()
    assert f"{model} is complete, and its upload to me/aligned failed" in err
    assert "***" in err and TOKEN not in out + err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--push", "me/aligned", "--dtype", "bf16"],
            "--dtype would have no effect, since there is",
        ),
        (["--push", "me/aligned", "--check", "a.parquet"], "--output is missing"),
        (["--private", "--output", "x"], "--private would have no effect without --push"),
        (["--push", "me/aligned", "--model", "no/such-folder"], "holds no model"),
    ],
)
def test_options_without_effect_are_refused(hub, model, words, message, capsys):
    assert export.main(["--model", str(model), *words]) == 1
    assert message in capsys.readouterr().err
    assert not hub.repos
