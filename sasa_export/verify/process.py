"""Start a verification script in a process that shares nothing with this one but the installed packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sasa_export.errors import VerifyError


def run_fresh(script: str, directory: Path, *arguments: str, failure: str) -> dict[str, Any]:
    """The JSON object that `script`, a file of this room, prints last of all for `directory`.

    Raises VerifyError, which begins with `failure`, where the script does not get to its end.
    """
    path = Path(__file__).with_name(script)
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-I", str(path), str(directory.absolute()), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=environment, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        raise VerifyError(f"{failure} in a fresh process ({lines[-1].strip()[:400]}).")
    return dict(json.loads(result.stdout.strip().splitlines()[-1]))
