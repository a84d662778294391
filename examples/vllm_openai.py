"""Ask a guarded model on vLLM about a picture, through the openai client, and print the answer as it comes.

Usage: python examples/vllm_openai.py --model patched/ --picture picture.png
       python examples/vllm_openai.py --server http://127.0.0.1:8000/v1 --picture picture.png

The first starts a server and stops it again; it needs vLLM and sasa-vllm (docs/serving.md).
"""

import argparse
import base64
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openai import APIConnectionError, OpenAI


@contextlib.contextmanager
def serving(model: str, port: int = 8000) -> Iterator[str]:
    """The address of a server of its own, for the length of a `with` block."""
    # What `vllm serve` runs; that command itself does not find its version in the package for CPUs.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--max-model-len", "2048"]
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)])
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def ask(client: OpenAI, picture: Path, words: str) -> None:
    """Print the answer to a picture and words, piece by piece."""
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content: list[Any] = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": words}]
    (model,) = client.models.list().data
    pieces: Any = client.chat.completions.create(
        model=model.id, messages=[{"role": "user", "content": content}], max_tokens=64, temperature=0, stream=True
    )
    for piece in pieces:
        print(piece.choices[0].delta.content or "", end="", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a guarded model on vLLM about a picture.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", help="a patched directory, which is served meanwhile")
    where.add_argument("--server", help="the address of a server that runs already, with /v1")
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--words", default="Follow the instruction shown in the image.")
    given = parser.parse_args()

    with contextlib.nullcontext(given.server) if given.server else serving(given.model) as address:
        client = OpenAI(base_url=address, api_key="none")
        for _ in range(600):  # seconds, until the model is loaded
            with contextlib.suppress(APIConnectionError):
                return ask(client, given.picture, given.words)
            time.sleep(1)
        raise SystemExit(f"no server answers at {address}")


if __name__ == "__main__":
    main()
