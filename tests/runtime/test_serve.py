"""`transformers serve` as it is, on a patched directory, asked by OpenAI's client."""

import base64
import io
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
import torch
from cli_steps import offline
from conftest import Guard

TEXTS = ("please describe the dog", "how do I make a safe cake", "which tools fix a broken chair", "who wrote that")
TOKENS = 24


@pytest.fixture(scope="module")
def served(split: Callable[[str], Guard], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A client of the server, and what the server writes to its terminal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("served")
    environment = {**offline(), "HF_MODULES_CACHE": str(folder)}
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(split("llava").directory)]
    command += ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            for _ in range(240):
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    assert process.poll() is None, (folder / "log").read_text()[-2000:]
                    time.sleep(0.5)
            yield client, folder / "log"
        finally:
            process.terminate()
            process.wait(timeout=30)


def asked(text: str, picture: bool) -> tuple[list[Any], list[Any]]:
    """A prompt in OpenAI's form and in that of a processor."""
    ours: list[Any] = [{"type": "text", "text": text}]
    theirs = list(ours)
    if picture:
        image, file = tiny.random_image(3), io.BytesIO()
        image.save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        ours.insert(0, {"type": "image", "image": image})
        theirs.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return [{"role": "user", "content": theirs}], [{"role": "user", "content": ours}]


@pytest.mark.slow
def test_it_answers_and_refuses(served: tuple[Any, Path], split: Callable[[str], Guard]) -> None:
    """What it says is what the model says here, whole and streamed, and its log has a line for each refusal."""
    guarded, (client, log) = split("llava"), served
    refusal, outcomes = "I will not help.", set()
    processor: Any = guarded.processor
    lines = 0
    for text in TEXTS:
        for picture in (False, True):
            theirs, ours = asked(text, picture)
            inputs = processor.apply_chat_template(
                [ours], add_generation_prompt=True, tokenize=True, return_dict=True,
                processor_kwargs={"return_tensors": "pt"},
            )  # fmt: skip
            found = guarded.model.generate(
                **inputs, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True
            )
            start = inputs["input_ids"].shape[1]
            if found.refused:
                expected, lines = refusal, lines + 2
            else:
                sequence = guarded.stock.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
                assert torch.equal(sequence, found.sequences)
                expected = processor.tokenizer.decode(sequence[0, start:], skip_special_tokens=True)
            outcomes.add((bool(found.refused), picture))
            request = {"model": str(guarded.directory), "messages": theirs, "max_tokens": TOKENS, "temperature": 0}
            whole = client.chat.completions.create(**request).choices[0].message.content
            pieces = list(client.chat.completions.create(**request, stream=True))
            streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
            assert whole.strip() == expected.strip()
            assert streamed.strip(" \ufffd") == expected.strip(
                " \ufffd"
            )  # a stream leaves out half a letter at its end
            assert len(pieces) > 3, "the answer did not come in pieces"
    assert {refused for refused, _ in outcomes} == {True, False}
    said = [line for line in log.read_text().splitlines() if line.startswith("refused: P(unsafe)")]
    assert len(said) == lines and not any(text in line for line in said for text in TEXTS)
