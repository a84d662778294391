"""mlx-vlm's server in a process of its own."""

import base64
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def serving(model: str, *options: str) -> Iterator[Callable[..., str]]:
    """Start it for a directory; what comes back asks it for 16 tokens on words, and a picture's path if any."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "mlx_vlm.server", "--model", model, "--port", url.rpartition(":")[2], *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(words: str, picture: str | None = None, **more: Any) -> str:
        content: list[dict[str, Any]] = [{"type": "text", "text": words}]
        if picture:
            shown = base64.b64encode(Path(picture).read_bytes()).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{shown}"}})
        said = [{"role": "user", "content": content}]
        body = {"model": model, "max_tokens": 16, "temperature": 0, "messages": said, **more}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])

    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(0.5)
        yield ask
    finally:
        server.terminate()
        server.wait()
