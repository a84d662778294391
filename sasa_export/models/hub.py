"""Fetch a model into the hub's own cache. Errors tell the user what to do."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download

from sasa_export.errors import OpenError

WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.md", "LICENSE*"]
# Other formats of the same weights, the index of pickled weights, and Mistral's second copy.
UNWANTED = ["*/*", "*.bin.index.json", "consolidated*"]


def fetch(repository: str, revision: str | None, check: Callable[[Path], object]) -> Path:
    """Return the model's snapshot in the hub's cache. A cached model needs no network. Raise OpenError on failure.

    `check` is called with a directory that has config.json, before weights are fetched.
    """
    try:
        check(Path(snapshot_download(repository, revision=revision, allow_patterns=["config.json"])))
        # One file at a time: Xet fetches its parts in parallel, and an interrupted run loses that file alone.
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED, max_workers=1
            )
        )
    except OpenError:
        raise
    except Exception as error:  # from the hub's client, its transport or the system
        raise OpenError(_said(repository, revision, constants.ENDPOINT, error)) from None


def _said(repository: str, revision: str | None, endpoint: str, error: Exception) -> str:
    """Return a message that says what is wrong and what to do."""
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the reason why the hub could not be asked
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated. Ask for access at {endpoint}/{repository}, then {login}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}. See {endpoint}/{repository}/commits/main for its commits."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repository} is not at {endpoint}, or private. Check the name; if it is private, {login}."
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{repository} could not be fetched from the hub ({reason}). Check the connection and run the command again, "
        "which keeps the files that are whole; or give a local directory."
    )
