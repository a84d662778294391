"""Finished results on disk, so that an interrupted run goes on where it stopped: one array a file, named when whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.errors import LocateError

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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            left = self._read_fingerprint()
            if left is not None and left != fingerprint:
                changed = ", ".join(
                    name for name in sorted({*left, *fingerprint}) if left.get(name) != fingerprint.get(name)
                )
                if not discard:
                    raise LocateError(
                        f"{self.folder} holds the unfinished work of another run (other: {changed}). Repeat that run "
                        "to go on with it, add --force to discard it, or give another --out."
                    )
                left = None
            if left is None:
                for path in self.folder.iterdir():
                    path.unlink()
                self._write(FINGERPRINT, lambda path: path.write_text(json.dumps(fingerprint), encoding="utf-8"))
            return sum(path.suffix == ".npy" for path in self.folder.iterdir())
        except OSError as error:
            raise self._explained(error) from None

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def put(self, name: str, array: np.ndarray) -> None:
        """Store a finished array; LocateError where it is not finite or the disk is full."""
        if not np.isfinite(array).all():
            raise LocateError(
                "the model's state is not finite on one of the prompts. Its weights may be damaged, or --dtype too "
                "narrow: try --dtype float32."
            )

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, array, allow_pickle=False)

        try:
            self._write(self._path(name).name, save)
        except OSError as error:
            raise self._explained(error) from None

    def get(self, name: str) -> np.ndarray:
        """A finished array, read from the disk where it is used."""
        path = self._path(name)
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
            if self.folder.is_dir() and not any(path.suffix == ".npy" for path in self.folder.iterdir()):
                self.remove()
            raise

    def remove(self) -> None:
        """The report is written: nothing of this is needed any longer."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _write(self, name: str, save: Any) -> None:
        partial = self.folder / f"{name}.partial-{os.getpid()}"
        try:
            save(partial)
            os.replace(partial, self.folder / name)
        finally:
            partial.unlink(missing_ok=True)

    def _read_fingerprint(self) -> dict[str, Any] | None:
        try:
            left = json.loads((self.folder / FINGERPRINT).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return left if isinstance(left, dict) else None

    def _explained(self, error: OSError) -> LocateError:
        return LocateError(
            f"{self.folder} could not be written ({error.strerror or error}). What is finished is kept there: free "
            "some space or correct the rights, and run the same command again."
        )
