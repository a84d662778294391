"""Finished results on disk, so that an interrupted run goes on where it stopped: one array a file, named when whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.errors import LocateError
from sasa_export.models import Source
from sasa_export.prompts.prompt import Prompt

FINGERPRINT = "fingerprint.json"


class Work:
    """A folder of finished arrays that belong to one model, one set of prompts and one way of running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def beside(cls, out: Path) -> Work:
        """The work folder of a report that will be written to `out`."""
        out = out.resolve()
        return cls(out.parent / f".{out.name}.work")

    def open(self, fingerprint: dict[str, Any], *, discard: bool) -> int:
        """Begin, or go on with what a run of the same fingerprint has left. Returns how many results are there.

        Raises LocateError where the folder holds the results of another model, other prompts or settings and
        `discard` is not set. Only one run may be at work in it (`claimed` its output).
        """
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                left = json.loads((self.folder / FINGERPRINT).read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                left = None
            if left is not None and left != fingerprint and not discard:
                changed = (name for name in sorted({*left, *fingerprint}) if left.get(name) != fingerprint.get(name))
                raise LocateError(
                    f"{self.folder} holds the unfinished work of another run (other: {', '.join(changed)}). Repeat "
                    "that run to go on with it, add --force to discard it, or give another --out."
                )
            if left != fingerprint:
                for path in self.folder.iterdir():
                    path.unlink()
                self._write(FINGERPRINT, lambda path: path.write_text(json.dumps(fingerprint), encoding="utf-8"))
            return sum(path.suffix == ".npy" for path in self.folder.iterdir())

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.npy").exists()

    def put(self, name: str, array: np.ndarray) -> None:
        """Store a finished array; LocateError where it is not finite or the disk is full."""
        if not np.isfinite(array).all():
            raise LocateError(
                "the model's state is not finite on one of the prompts. Its weights may be damaged, or --dtype too "
                "narrow: try --dtype float32."
            )

        def save(path: Path) -> None:
            with path.open("wb") as file:  # np.save would put .npy behind the partial file's name
                np.save(file, array, allow_pickle=False)

        with self._explained():
            self._write(f"{name}.npy", save)

    def get(self, name: str) -> np.ndarray:
        """A finished array, read from the disk where it is used. LocateError where its file is damaged."""
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise LocateError(
                f"{path} is damaged ({str(error).splitlines()[0]}). Delete that file and run the same command again."
            ) from None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Where the block fails before anything was finished, there is nothing to go on with: leave no folder."""
        try:
            yield
        except BaseException:
            if not any(self.folder.glob("*.npy")):
                self.remove()
            raise

    def remove(self) -> None:
        """The report is written: nothing of this is needed any longer."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, save: Callable[[Path], Any]) -> None:
        partial = self.folder / f"{name}.partial-{os.getpid()}"
        try:
            save(partial)
            os.replace(partial, self.folder / name)
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LocateError(
                f"{self.folder} could not be written ({error.strerror or error}). What is finished is kept there: free "
                "some space or correct the rights, and run the same command again."
            ) from None


def fingerprint(source: Source, prompts: Sequence[Prompt], **running: Any) -> dict[str, Any]:
    """What finished work depends on, as a JSON object: equal objects mean that it may be used again.

    It covers the model's files, the prompts to the pixel, the packages' versions, and `running`, how the model runs.
    """
    model = hashlib.sha256((source.directory / "config.json").read_bytes())
    for shard in source.shards:  # size, time and head, since shards are too large to be read whole
        state = shard.path.stat()
        model.update(f"{shard.path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
        with shard.path.open("rb") as file:
            model.update(file.read(1 << 20))
    asked = hashlib.sha256()
    for prompt in prompts:
        asked.update(repr((prompt.name, prompt.prompt, prompt.label, prompt.group, prompt.channel)).encode())
        if prompt.image is not None:
            picture = prompt.image()
            asked.update(repr(picture.size).encode() + picture.tobytes())
    return {
        "model": model.hexdigest(),
        "prompts": asked.hexdigest(),
        "versions": {name: version(name) for name in ("sasa-export", "torch", "transformers", "numpy", "pillow")},
        **running,
    }
