"""Asks onnxruntime-genai, which needs an onnxruntime of its own: an environment that `make test-slow` builds."""

import json
import subprocess
from pathlib import Path
from typing import Any

PYTHON = Path(__file__).parents[1] / "build" / "genai-venv" / "bin" / "python"
MISSING = not (PYTHON.parent.parent / ".installed").exists()
WHY = f"NO ONNXRUNTIME-GENAI IN {PYTHON.parent.parent}: that it judges and refuses was NOT tested"
SCRIPT = Path(__file__).parent / "onnx_format" / "genai" / "ask.py"
TOKENS = 14  # one more than the refusal has


def ask(directory: Path, conversations: Any, *, pixels: Any = None, picture: int | None = None, **options: Any) -> Any:
    """What is said in each turn of each conversation, of turns' rows of ids; `picture` is the token of a picture."""
    common = {"pixels": pixels, "tokens": TOKENS, "options": {"max_length": 200, **options}}
    requests = [{"turns": turns, "places": turns[0][0].count(picture), **common} for turns in conversations]
    command = [PYTHON, SCRIPT, directory]
    result = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.returncode, result.stderr[-2000:])
    return json.loads(result.stdout.strip().splitlines()[-1])
