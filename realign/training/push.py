"""Upload of a model folder to the Hub, `--push` of `realign.export`.

The token is the one of huggingface_hub: HF_TOKEN, or that of `hf auth login`. It is sent in the
Authorization header only, and removed from messages of errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from realign.data.errors import shorten
from realign.files import read_json

_TOKEN = re.compile(r"\bhf_\w{8,}")
_OF_MODEL = [
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.spm", "*.txt", "*.bpe",
    "*.md",
]  # fmt: skip
_OF_RUN = ["checkpoint-*", "trainer_state.json", "run.json"]
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


def prepare(repo: str, *, private: bool) -> Target:
    """Check name, token and the right to write, before any work. Nothing is created.

    Args:
        repo: OWNER/NAME of the repository.
        private: whether to create a private repository.

    Raises:
        ValueError: for an invalid name, a missing or invalid token, no right to write, or a public
            repository with `private`.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--push: {shorten(str(error))} Give OWNER/NAME.") from None
    owner, slash, _ = repo.partition("/")
    if not slash:
        raise ValueError(f"--push: {repo!r} names no owner. Give OWNER/NAME.")
    if (token := get_token()) is None:
        raise ValueError(f"--push: there is no token for the Hub. {_LOG_IN}")
    target = Target(repo, private, HfApi(token=token))
    with _errors(target, f"{repo} cannot be written"):
        account = target.api.whoami()
    owners = [account.get("name"), *(org.get("name") for org in account.get("orgs") or ())]
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ValueError(f"--push: the token of {owners[0]} can only read. {_LOG_IN}")
    with _errors(target, f"{repo} cannot be written"):
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


def upload(target: Target, folder: Path) -> str:
    """Create the repository if it does not exist, and upload the files of a model.

    Args:
        target: the result of `prepare`.
        folder: folder of the model. Files of other kinds and checkpoints are left out.

    Returns:
        A line with the address of the repository, and the files that were left out.

    Raises:
        ValueError: when the Hub refuses. The message does not contain the token.
    """
    with _errors(target, f"{folder} is complete, and its upload to {target.repo} failed"):
        # None keeps the default of an organization, which may be private.
        url = target.api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        target.api.upload_folder(
            repo_id=target.repo,
            folder_path=folder,
            commit_message="Upload a model and its card",
            allow_patterns=_OF_MODEL,
            ignore_patterns=_OF_RUN,
        )
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    kept = filter_repo_objects(files, allow_patterns=_OF_MODEL, ignore_patterns=_OF_RUN)
    left_out = sorted(files.difference(kept))
    text = f"uploaded {folder} to {url}"
    return text + f"; left out {', '.join(left_out)}" * bool(left_out)


@contextmanager
def _errors(target: Target, what: str) -> Iterator[None]:
    """A context in which errors of the Hub are one line without the token.

    Raises:
        ValueError: for any error.
    """
    try:
        yield
    except Exception as error:  # of huggingface_hub, its HTTP client, or the disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        text = str(error).replace(str(target.api.token), "***")
        advice = _LOG_IN if status in (401, 403) else "Check the connection, and push again."
        text = shorten(_TOKEN.sub("***", f"{type(error).__name__}: {text}"))
        # Tracebacks of the cause would contain the request's headers.
        raise ValueError(f"--push: {what} ({text}). {advice}") from None
