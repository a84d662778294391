"""The demo's sixteen requests to smol-llava, as texts and pictures, by mlx-vlm's Python, command line and server."""

import subprocess
import sys
from typing import Any

import pytest
from conftest import MADE, inputs, made, say, serving

REFUSAL = "I'm sorry, but I cannot help with that request."
pytestmark = pytest.mark.slow


def test_python(verdicts: Any) -> None:
    loaded = made("smol")
    for prompt in loaded.prompts:
        said = say(loaded.model, inputs(loaded, prompt), 16)
        assert abs(verdicts()[-1].probability - prompt["probability"]) < 1e-3
        assert verdicts()[-1].verdict == ("refused" if prompt["refused"] else "allowed")
        assert said == prompt["answer"]


def test_command_line_and_server() -> None:
    """Both write a picture behind the text, where transformers has another P(unsafe) too."""
    loaded, patched = made("smol"), str(MADE / "smol" / "patched")
    with serving(patched) as ask:
        for prompt in loaded.prompts:
            picture = str(MADE / "smol" / prompt["picture"]) if prompt["picture"] else None
            refused = prompt["behind"] >= loaded.sasa["threshold"]
            command = [sys.executable, "-m", "mlx_vlm.generate", "--model", patched, "--max-tokens", "16"]
            command += ["--prompt", prompt["words"], *(["--image", picture] if picture else [])]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            served = ask(prompt["words"], picture)
            assert (REFUSAL in run.stdout) == (served == REFUSAL) == refused, prompt["words"]
            if not picture and not refused:
                assert served in run.stdout
                assert served == loaded.processor.tokenizer.decode(prompt["answer"], skip_special_tokens=True)
