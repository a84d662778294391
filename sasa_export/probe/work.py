"""Store finished work on disk, one array per file, so that the next run can resume an interrupted one.

Processes that share the work (`sasa_export.workers`) share the folder too. Each process stores its results there,
and can read the results of all. joblib.Memory would not do: it names a result by a hash of the arguments, here a loaded
model and pictures that are read late, and cannot say that a folder holds the unfinished work of another run.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.errors import CalibrationError, SasaExportError, reworded
from sasa_export.files import check_free, claimed, write_whole
from sasa_export.manifest import check_ours
from sasa_export.models import Source
from sasa_export.prompts.prompt import Prompt, batches, digest_of
from sasa_export.report import Silent
from sasa_export.workers import workers

FINGERPRINT = "fingerprint.json"


class Work:
    """A folder of finished arrays for one model, one set of prompts and one way of running the model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, fingerprint: dict[str, Any], *, discard: bool, report: Silent) -> None:
        """Prepare the folder, and keep the results of an earlier run with the same fingerprint. Other processes wait.

        Raises SasaExportError where the folder holds the results of another model, other prompts or settings, unless
        `discard` is set.
        """
        if not workers().leads:
            workers().wait()
            return
        path = self.folder / FINGERPRINT
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            changed = [name for name in sorted({*earlier, *fingerprint}) if earlier.get(name) != fingerprint.get(name)]
            if earlier and changed and not discard:
                raise SasaExportError(
                    f"{self.folder} holds the unfinished work of another run (other: {', '.join(changed)}). Repeat "
                    "that run to go on with it, add --force to discard it, or give another --out."
                )
            if changed:
                for leftover in self.folder.iterdir():
                    leftover.unlink()
                write_whole(path, json.dumps(fingerprint))
            count = len(list(self.folder.glob("*.npy")))
        if count:
            report.step("resume", f"{count} results of an interrupted run are there already")
        workers().wait()

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.npy").exists()

    def put(self, name: str, array: np.ndarray) -> None:
        """Store a finished array. CalibrationError where it is not finite, SasaExportError where the disk is full."""
        if not np.isfinite(array).all():
            raise CalibrationError(  # `resumable` then removes the folder, so that another --dtype can start
                "the model's state is not finite on one of the prompts. Its weights may be damaged, or --dtype too "
                "narrow: try --dtype float32."
            )

        partial = self.folder / f"{name}.partial-{os.getpid()}"
        with self._explained():
            try:
                with partial.open("wb") as file:  # np.save would append .npy to the partial file's name
                    np.save(file, array, allow_pickle=False)
                os.replace(partial, self.folder / f"{name}.npy")
            finally:
                partial.unlink(missing_ok=True)

    def get(self, name: str) -> np.ndarray:
        """Return a finished array, memory-mapped. Raise SasaExportError where its file is damaged."""
        path = self.folder / f"{name}.npy"
        damaged = f"{path} is damaged ({{reason}}). Delete that file and run the same command again."
        with reworded(SasaExportError, damaged):
            return np.load(path, mmap_mode="r", allow_pickle=False)

    def remove(self) -> None:
        """Remove the folder with all results."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _explained(self) -> AbstractContextManager[None]:
        return reworded(
            SasaExportError,
            f"{self.folder} could not be written ({{reason}}). What is finished is kept there: free some space or "
            "correct the rights, and run the same command again.",
        )


class Results:
    """Results of a list of prompts, computed batch by batch and stored in the work folder under `kind`."""

    def __init__(self, work: Work, kind: str, prompts: Sequence[Prompt], batch_size: int) -> None:
        self.work, self.kind, self.prompts = work, kind, prompts
        self.batches = list(batches(prompts, batch_size))  # row numbers

    def fill(
        self,
        names: Sequence[str],
        compute: Callable[[list[Prompt], list[str]], Iterable[tuple[str, np.ndarray]]],
        report: Silent,
    ) -> None:
        """Compute all missing results, spread over all processes.

        `compute` gets the prompts of a batch and the missing `names`, and returns arrays (rows, ...) by name.
        """

        def fill(number: int) -> None:
            missing = [name for name in names if not self.work.has(self._file(number, name))]
            if missing:
                for name, array in compute([self.prompts[row] for row in self.batches[number]], missing):
                    self.work.put(self._file(number, name), array)

        with report.bar(len(self.prompts), self.kind) as advance:
            workers().spread(range(len(self.batches)), fill, lambda number: advance(len(self.batches[number])))

    def read(self, name: str, block: int | None = None) -> np.ndarray:
        """Return an array (prompts, ...) in the prompts' order, or one block of an array (prompts, blocks, ...)."""
        parts = [self.work.get(self._file(number, name)) for number in range(len(self.batches))]
        whole = np.concatenate([part if block is None else part[:, block] for part in parts])
        return whole[np.argsort(np.concatenate(self.batches))]

    def _file(self, number: int, name: str) -> str:
        return f"{self.kind}-{number:05d}-{name}"


@contextmanager
def resumable(out: Path, *, force: bool, report: Silent) -> Iterator[Work]:
    """Yield the work for `out`, in a folder beside `out`. The folder is removed when the context ends without an error.

    After an error, finished work stays for the next run, except after CalibrationError, which calls for other prompts
    or layers. A second run on the same output fails at once. Raises EmitError where `out` cannot be written.
    """
    processes, out = workers(), out.resolve()
    work = Work(out.parent / f".{out.name}.work")
    with claimed(out) if processes.leads else nullcontext():
        check_free(out, force=force)
        check_ours(out)
        try:
            yield work
        except BaseException as error:
            if isinstance(error, CalibrationError) or not any(work.folder.glob("*.npy")):
                if processes.leads:
                    work.remove()
            else:
                report.step("kept", f"what is finished is in {work.folder}; the same command goes on from there")
            raise
        processes.wait()
        if processes.leads:
            work.remove()


def fingerprint(source: Source, prompts: Sequence[Prompt], **running: Any) -> dict[str, Any]:
    """Return the dependencies of finished work as a JSON object. Work may be reused where the objects are equal.

    The object covers the model's files, the prompts with their pictures, the packages' versions, and `running`: how the
    model runs.
    """
    model = hashlib.sha256()
    for path in sorted([*source.directory.glob("*.json"), *source.directory.glob("*.jinja")]):
        model.update(path.read_bytes())
    for shard in source.shards:  # size, time and first MiB, since shards are too large to read whole
        state = shard.path.stat()
        model.update(f"{shard.path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
        with shard.path.open("rb") as file:
            model.update(file.read(1 << 20))
    return {
        "model": model.hexdigest(),
        "prompts": digest_of(prompts),
        "versions": {name: version(name) for name in ("sasa-export", "torch", "transformers", "numpy", "pillow")},
        **running,
    }
