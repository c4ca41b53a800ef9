"""Publishing a saved adapter on the Hub: exactly the files that belong to it, checked first, in one commit.

What goes there: the adapter's config and weights, its sidecar, its card, the tokenizer and chat template if they lie
beside them, and `recipe.yaml` and `report.json` of the run. Text files leave without local paths and secrets
(`privacy.py`); the folder itself is never changed. What never goes: anything else, above all checkpoints, the trainer's
state, pickles, links and hidden files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not re-exported by name

from ..errors import LlmregError, RecipeError
from .privacy import has_secret, neutral_text
from .push_files import CARD, adapter_folder, check_card, contents, one_line
from .sidecar import FACTORS_NAME, SIDECAR_NAME, read_sidecar

__all__ = ["PushError", "PushReport", "push"]


class PushError(LlmregError, OSError):
    """The Hub cannot be reached or does not accept the adapter."""


@dataclass(frozen=True)
class PushReport:
    """What was pushed, or would be.

    Attributes:
        repo_id: of the model repository. private: whether only its owners see it.
        files: size in bytes by name. total_bytes: of all of them.
        url: of the commit or the pull request; None in a dry run.
        dry_run: nothing was sent.
    """

    repo_id: str
    private: bool
    files: dict[str, int]
    total_bytes: int
    url: str | None
    dry_run: bool


def push(
    adapter: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> PushReport:
    """Publish the adapter in a folder, in one commit; the repository and the branch are made if they do not exist.

    Args:
        adapter: folder of a saved adapter, or the output folder of a run (its `adapter/` is meant then).
        repo_id: "owner/name", or "name" for your own. private: of a new repository; an existing one that is public
            is only pushed to with `private=False`.
        dry_run: check everything that can be checked here and say what would be sent; no network, no file is written.
        token: of the Hub; by default the one that `hf auth login` stored, or `HF_TOKEN`.
        revision: branch. commit_message: its first line. create_pr: open a pull request instead.

    Raises:
        RecipeError: an argument that makes no sense, or a card that the Hub would not take.
        AdapterFileError: the folder holds no whole adapter.
        PushError: the Hub cannot be reached, or refuses.
    """
    _check_arguments(repo_id, token, revision, create_pr)
    folder = adapter_folder(Path(adapter))
    files = contents(folder, online=not dry_run)
    check_card(_card_text(files))
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    url = None
    if not dry_run:
        message = neutral_text(commit_message or f"Upload {_title(folder)} with llmreg")
        try:
            api = HfApi(token=token)
            repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
            private, url = _upload(api, repo_id, files, private, revision, message, create_pr)
        except LlmregError:
            raise
        except Exception as error:  # whatever HTTP libraries and storage back ends raise
            raise PushError(_in_words(error, repo_id, revision, token)) from None
    return PushReport(repo_id, private, sizes, sum(sizes.values()), url, dry_run)


# -- what is given -------------------------------------------------------------------------------------------------


def _check_arguments(repo_id: str, token: Any, revision: str | None, create_pr: bool) -> None:
    if isinstance(repo_id, str) and has_secret(repo_id):
        raise RecipeError(
            "the repository id looks like an access token; write owner/name, and give the token as token."
        )
    try:
        if not repo_id:
            raise HFValidationError("it is empty")
        validate_repo_id(repo_id)
    except HFValidationError:
        raise RecipeError(
            f"{neutral_text(str(repo_id))[:100]!r} is no repository id; write owner/name, each of at most 96 letters, "
            "digits, '-', '_' and '.', without '--' or '..', with a letter or digit at both ends, not ending in .git."
        ) from None
    if token is not None and not (isinstance(token, str) and re.fullmatch(r"[!-~]+", token)):
        raise RecipeError("the token is not one line of letters and digits; copy it again, or run hf auth login.")
    if create_pr and revision not in (None, "main"):
        raise RecipeError(f"a pull request goes to main, not to {revision!r}; leave revision or create_pr out.")


def _card_text(files: Mapping[str, bytes | Path]) -> str:
    card = files[CARD]
    return card.decode("utf-8") if isinstance(card, bytes) else card.read_text(encoding="utf-8")


def _title(folder: Path) -> str:
    sidecar = read_sidecar(folder)
    return f"{sidecar.method} adapter" if sidecar else "adapter"


# -- the Hub -------------------------------------------------------------------------------------------------------


def _upload(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, bytes | Path],
    private: bool,
    revision: str | None,
    message: str,
    create_pr: bool,
) -> tuple[bool, str]:
    """Check the card on the Hub, make the repository, commit; whether it is private, and the commit's address."""
    try:
        ModelCard(_card_text(files)).validate()
    except ValueError as error:
        raise RecipeError(f"the Hub does not take the card: {one_line(error)}; correct {CARD}.") from None
    existed, is_private = _make_repo(api, repo_id, private)
    if revision and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
    if existed and SIDECAR_NAME not in files:
        operations += [CommitOperationDelete(name) for name in _old_sidecar(api, repo_id, revision)]
    done = api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    return is_private, done.pr_url or done.commit_url


def _make_repo(api: HfApi, repo_id: str, private: bool) -> tuple[bool, bool]:
    """Create the repository, or see that it is there; whether it was, and whether it is private."""
    try:
        api.create_repo(repo_id, private=private)
        return False, private
    except HfHubHTTPError as error:
        if error.response.status_code not in (
            401,
            402,
            403,
            409,
        ):  # the first three: perhaps only creating is forbidden
            raise
        try:
            is_private = bool(api.model_info(repo_id).private)
        except HfHubHTTPError:
            if error.response.status_code != 409:
                raise error from None
            return True, private
    if private and not is_private:
        raise RecipeError(
            f"{repo_id} exists and is public; write private=False to push to it, or another repository id."
        )
    return True, is_private


def _old_sidecar(api: HfApi, repo_id: str, revision: str | None) -> list[str]:
    """The sidecar of an earlier adapter, which would make a plain LoRA that replaces it unloadable."""
    try:
        found = api.get_paths_info(repo_id, [SIDECAR_NAME, FACTORS_NAME], revision=revision)
    except HfHubHTTPError as error:
        if error.response.status_code == 404:
            return []
        raise
    return [entry.path for entry in found]


_REASONS = {
    401: "the Hub does not know you; run hf auth login, or give a token that is valid",
    402: "the Hub asks for payment; see your plan, or free storage",
    403: "your token may not write there; give one with write access (hf auth login), or a repository of your own",
    404: "it, or its branch, is not there or not visible to you; check the id, and run hf auth login",
    409: "somebody else is changing it; push again",
    413: "the Hub takes no files of this size",
    429: "the Hub has had too many requests; wait a few minutes and push again",
}


def _in_words(error: Exception, repo_id: str, revision: str | None, token: str | None) -> str:
    """One sentence on what went wrong and what to do, without the token."""
    cause: BaseException = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # how uploads wrap what happened
        cause = cause.__cause__
    where = f"{repo_id} (branch {revision})" if revision else repo_id
    endpoint = neutral_text(huggingface_hub.constants.ENDPOINT)
    if isinstance(cause, OfflineModeIsEnabled):
        text = f"{where} was not pushed: HF_HUB_OFFLINE is set; unset it, or use dry_run."
    elif isinstance(cause, HfHubHTTPError):
        code = cause.response.status_code
        reason = _REASONS.get(code, "the Hub has a problem; push again later" if code >= 500 else "the Hub refuses it")
        said = f" (it says: {one_line(cause.server_message)})" if cause.server_message and code != 404 else ""
        text = f"{where} was not pushed: HTTP {code} from {endpoint}: {reason}{said}."
    else:
        text = (
            f"{where} was not pushed: {endpoint} cannot be reached or does not answer as a Hub "
            f"({type(cause).__name__}: {one_line(cause)}); check the connection and HF_ENDPOINT, and push again."
        )
    for secret in filter(None, (token, huggingface_hub.get_token())):
        text = text.replace(secret, "removed-secret")
    return text
