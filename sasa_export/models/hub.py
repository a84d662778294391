"""Fetch a model into the hub's own cache: a file goes on where its connection was cut, and errors say where to ask."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sasa_export.errors import OpenError
from sasa_export.files import claimed
from sasa_export.manifest import digest
from sasa_export.report import Silent

WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.md", "LICENSE*"]
UNWANTED = ["*/*", "*.bin.index.json"]  # the same weights in other formats, and the index of pickles


Check = Callable[[Path], object]  # told of a directory with config.json, before the weights are fetched


def fetch(repository: str, revision: str | None, report: Silent, check: Check) -> Path:
    """The model's snapshot in the hub's cache, which the hub need not be reached for. OpenError where there is none."""
    from huggingface_hub import constants, snapshot_download

    files: dict[str, Any] = {"revision": revision, "allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    try:
        _fetch_weights(repository, revision, report, check)
        return Path(snapshot_download(repository, **files))
    except OpenError:
        raise
    except Exception as error:  # of the hub's client, of its transport, of the system
        try:
            return Path(snapshot_download(repository, local_files_only=True, **files))
        except Exception:
            raise OpenError(_said(repository, revision, constants.ENDPOINT, error)) from None


def _fetch_weights(repository: str, revision: str | None, report: Silent, check: Check) -> None:
    """Fetch the shards. huggingface_hub resumes a file too, but only as long as one run lasts."""
    from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name

    info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    siblings: Any = [file for file in info.siblings or () if "/" not in file.rfilename and file.lfs is not None]
    weights = [file for file in siblings if file.rfilename.endswith(".safetensors") and file.lfs.sha256.isalnum()]
    shards = {file.lfs.sha256: file for file in weights}
    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"), "blobs")
    missing = {blobs / name: file for name, file in shards.items() if not (blobs / name).exists()}
    if missing and any(file.rfilename == "config.json" for file in info.siblings or ()):
        with TemporaryDirectory() as place:  # and not in the cache, which would have a snapshot of it alone
            hf_hub_download(repository, "config.json", revision=info.sha, local_dir=place)
            check(Path(place))
    with report.bar(sum(file.size for file in missing.values()), "fetch") as advance:
        for blob, file in missing.items():
            with claimed(blob, wait=True):  # another run may be fetching it
                if not blob.exists():
                    _fetch_file(hf_hub_url(repository, file.rfilename, revision=info.sha), blob, file.size, advance)


def _fetch_file(url: str, blob: Path, size: int, advance: Callable[[int], None]) -> None:
    """Fetch one file, whose name is its SHA-256, or what is still missing of it."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    partial = blob.with_name(f"{blob.name}.sasa-partial")
    with _Counted(partial, advance) as file:
        http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=size)
    if digest(partial) != blob.name:
        partial.unlink()
        raise OSError(f"{url} came down damaged and was removed")
    os.replace(partial, blob)


class _Counted(io.BufferedWriter):
    """A file that is written on at its end, and tells how many bytes it has."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self.advance = advance
        advance(self.tell())

    def write(self, data: Any) -> int:
        self.advance(len(data))
        return super().write(data)


def _said(repository: str, revision: str | None, endpoint: str, error: Exception) -> str:
    """What is wrong, and what to do about it."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    login = "log in with `hf auth login`, or set HF_TOKEN"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return f"{repository} is gated. Ask for access at {endpoint}/{repository}, then {login}."
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}. See {endpoint}/{repository}/commits/main for its commits."
    if isinstance(error, RepositoryNotFoundError):
        return f"{repository} is not at {endpoint}, or private. Check the name; if it is private, {login}."
    if status in (401, 403):
        return f"your token may not read {repository}. Ask for access at {endpoint}/{repository}, or {login} again."
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{repository} could not be fetched from the hub ({reason}). Check the connection and run the command again, "
        "which goes on where this one stopped; or give a local directory."
    )
