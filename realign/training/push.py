"""Upload of a model folder to the Hub, `--push` of `realign.export`.

The token is the one of huggingface_hub: HF_TOKEN, or that of `hf auth login`. It is sent in the
Authorization header only, and removed from messages of errors.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from realign.data.errors import shorten
from realign.files import read_json

_TOKEN = re.compile(r"hf_\w{8,}|api_org_\w{8,}|(?<=://)[^/\s@]+(?=@)")
"""Tokens, and the user and password of an address. They are removed from messages."""
_LIKE_TOKEN = re.compile(r"hf_(oauth_)?[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}")
"""Tokens have 34 letters and digits. Names of models, such as hf_llava_7b, have separators."""
_FILES = (
    "config.json", "generation_config.json", "adapter_config.json",
    "*.safetensors", "*.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "*.model", "*.tiktoken", "*.spm",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json", "chat_template.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt",
)  # fmt: skip
"""Files of a model in its folder. transformers, PEFT and readers of the page know these names."""
_LOG_IN = "Run `hf auth login`, or set HF_TOKEN to a token with the right to write."


@dataclass(frozen=True)
class Target:
    """A repository on the Hub that the user may write to.

    Attributes:
        repo: OWNER/NAME.
        private: whether it is created as a private repository.
        api: client of the Hub, with the token.
    """

    repo: str
    private: bool
    api: HfApi = field(repr=False)


@contextmanager
def _scrubbed() -> Iterator[None]:
    """A context whose ValueErrors are raised without tokens."""
    try:
        yield
    except ValueError as error:
        raise ValueError(_without_token(str(error))) from None


def _without_token(text: str) -> str:
    if token := get_token():
        text = text.replace(token, "***")
    return _TOKEN.sub("***", text)


@_scrubbed()
def prepare(repo: str, *, private: bool) -> Target:
    """Check name, token and the right to write, before any work. Nothing is created.

    Args:
        repo: OWNER/NAME of the repository.
        private: whether to create a private repository.

    Raises:
        ValueError: for an invalid name, a name with a token, a missing or invalid token, no right
            to write, or a public repository with `private`.
    """
    token = get_token()
    if _LIKE_TOKEN.search(repo) or "@" in repo or (token is not None and token in repo):
        raise ValueError(
            "--push: the name of the repository holds a token or a password, so it is not sent. "
            f"Give OWNER/NAME. {_LOG_IN}"
        )
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--push: {shorten(str(error))} Give OWNER/NAME.") from None
    owner, slash, _ = repo.partition("/")
    if not slash:
        raise ValueError(f"--push: {repo!r} names no owner. Give OWNER/NAME.")
    if token is None:
        raise ValueError(f"--push: there is no token for the Hub. {_LOG_IN}")
    target = Target(repo, private, HfApi(token=token))
    with _errors(f"{repo} cannot be written"):
        account = target.api.whoami()
    owners = [account.get("name"), *(org.get("name") for org in account.get("orgs") or ())]
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ValueError(f"--push: the token of {owners[0]} can only read. {_LOG_IN}")
    with _errors(f"{repo} cannot be written"):
        try:
            found = target.api.model_info(repo)
        except RepositoryNotFoundError:
            found = None
        if found is not None:
            target.api.auth_check(repo, write=True)
    if found is None and owner not in owners:
        raise ValueError(
            f"--push: {owners[0]} cannot create {repo}. Give an owner among "
            f"{', '.join(map(str, owners))}, or the name of an existing repository."
        )
    if found is not None and private and not found.private:
        raise ValueError(
            f"--push: {repo} exists and is public, so --private would have no effect. Name another "
            "repository, or make it private on its page."
        )
    return target


@_scrubbed()
def check_folder(folder: Path) -> None:
    """Check that others can load a folder from the Hub.

    Raises:
        ValueError: for a folder without a model, a link to a file elsewhere, and an adapter whose
            base is a folder.
    """
    config = folder / "adapter_config.json"
    if not config.is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"--push: {folder} holds no model. Name the folder of one.")
    for file in folder.rglob("*"):  # a link in the folder of a stranger may name a private file
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--push: {file} is a link to a file elsewhere. Replace it by a copy.")
    if not config.is_file():
        return
    base = read_json(config).get("base_model_name_or_path")
    if base and (Path(base).exists() or str(base).startswith(("/", ".", "~"))):
        raise ValueError(
            f"--push: the base of {folder} is a folder of this machine, which others cannot load. "
            "Give --output to upload a merged model. If the base is on the Hub, set "
            "base_model_name_or_path in adapter_config.json to its name."
        )


@_scrubbed()
def upload(target: Target, folder: Path) -> str:
    """Create the repository if it does not exist, and upload the files of a model.

    Args:
        target: the result of `prepare`.
        folder: folder of the model. Files whose names are not those of a model are left out.

    Returns:
        A line with the address of the repository, and the files that were left out.

    Raises:
        ValueError: when the Hub refuses. The message does not contain the token.
    """
    files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    kept = [name for name in files if _is_of_model(name)]
    with _errors(f"{folder} is complete, and its upload to {target.repo} failed"):
        # None keeps the default of an organization, which may be private.
        url = target.api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        target.api.upload_folder(
            repo_id=target.repo,
            folder_path=folder,
            commit_message="Upload a model and its card",
            allow_patterns=[glob.escape(name) for name in kept],
        )
    left_out = ", ".join(name for name in files if name not in kept)
    return f"uploaded {folder} to {url}" + f"; left out {left_out}" * bool(left_out)


def _is_of_model(name: str) -> bool:
    """Whether a file, by its path in the folder, has a name in `_FILES`."""
    path = PurePosixPath(name)
    return any(
        len(path.parts) == len(PurePosixPath(known).parts) and fnmatchcase(name, known)
        for known in _FILES
    )


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """A context in which errors of the Hub are one line without the token.

    Raises:
        ValueError: for any error.
    """
    try:
        yield
    except Exception as error:  # of huggingface_hub, its HTTP client, or the disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = _LOG_IN if status in (401, 403) else "Check the connection, and push again."
        text = shorten(_without_token(f"{type(error).__name__}: {error}"))
        # Tracebacks of the cause would contain the request's headers.
        raise ValueError(f"--push: {what} ({text}). {advice}") from None
