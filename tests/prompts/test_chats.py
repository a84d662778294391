"""Chats as servers log them and fine-tuning has them become prompts, and what is none is an error with its line."""

import base64
import json
from pathlib import Path
from typing import Any

import miniature
import pytest
from cli_steps import Told

from sasa_export.errors import DataError
from sasa_export.prompts import Prompt, for_model, load

ASKED = {"role": "user", "content": "How do I bake bread?"}
EARLIER = [
    {"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": None, "tool_calls": []},
]  # fmt: skip


def read(folder: Path, record: Any) -> Prompt:
    (folder / "log.jsonl").write_text(json.dumps(record), encoding="utf-8")
    (prompt,) = load(str(folder / "log.jsonl"), labelled=False)
    return prompt


def shown(prompt: Prompt) -> list[list[str]]:
    """The kinds of the parts of each turn."""
    return [[part["type"] for part in turn["content"]] for turn in prompt.conversation()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    miniature.picture(tmp_path / "a b.png", 1)
    return tmp_path


@pytest.mark.parametrize("inside", [False, True], ids=["messages", "body"])
def test_a_request_as_a_server_logs_it(folder: Path, inside: bool) -> None:
    """With what stood before it, and without the answer."""
    chat = {"model": "m", "messages": [*EARLIER, ASKED, {"role": "assistant", "content": "Knead."}], "temperature": 0}
    prompt = read(folder, {"custom_id": "one", "body": chat} if inside else {"id": "one", **chat})
    assert (prompt.name, prompt.prompt, prompt.label) == ("one", "How do I bake bread?", 0)
    assert prompt.before == (("system", "Be kind."), ("user", "Hello"), ("assistant", ""))


@pytest.mark.parametrize("kind", ["path", "file", "data", "image"])
def test_pictures_of_a_message(folder: Path, kind: str) -> None:
    path = folder / "a b.png"
    data = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    url = {"path": "a b.png", "file": path.as_uri(), "data": data, "image": "a b.png"}[kind]
    part = {"type": "image", "image": url} if kind == "image" else {"type": "image_url", "image_url": {"url": url}}
    parts = [{"type": "text", "text": "What is it?"}, part]
    prompt = read(folder, {"messages": [{"role": "user", "content": parts}]})
    assert prompt.prompt == "What is it?" and shown(prompt) == [["text", "image"]]
    assert shown(read(folder, {"messages": [{"role": "user", "content": parts[::-1]}]})) == [["image", "text"]]
    picture = prompt.conversation()[0]["content"][1]["image"]
    miniature.picture(folder / "again.png", 1)
    assert picture.tobytes() == read(folder, {"prompt": "x", "image": "again.png"}).image().tobytes()  # type: ignore[misc]


def test_a_picture_stays_in_its_turn(folder: Path) -> None:
    """Of LLaVA's form by its mark, which is taken out."""
    seen = {"role": "user", "content": [{"type": "image", "path": "a b.png"}]}
    assert shown(read(folder, {"messages": [*EARLIER, seen, ASKED]}))[3:] == [["image", "text"], ["text"]]
    said = [{"from": "human", "value": text} for text in ("Hello", "<image>\nWhat is it?", "And this?")]
    chat = [said[0], {"from": "gpt", "value": "Yes"}, *said[1:]]
    prompt = read(folder, {"image": "a b.png", "conversations": chat, "label": 1})
    assert shown(prompt) == [["text"], ["text"], ["image", "text"], ["text"]]
    assert prompt.before[2] == ("user", "What is it?") and prompt.prompt == "And this?"
    assert shown(read(folder, {"images": ["a b.png"], "conversations": said[2:]})) == [["image", "text"]]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no turn of the user's"),
        ({"messages": "a"}, "no list of objects"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "part of the kind 'input_audio'"),
        ({"messages": [ASKED], "images": ["a b.png", "a b.png"]}, "has 2 pictures, and one is read"),
        ({"messages": [ASKED], "image": "none.png"}, "none.png, which does not exist"),
        ({"messages": [ASKED], "image": "https://a.org/a.png"}, "https://a.org/a.png, which is not fetched"),
        ({"messages": [ASKED], "image": "data:image/png;base64,a!"}, "data: URL cannot be read as base64"),
        ({"conversations": [{"from": "human", "value": "<image> a"}]}, "<image> 1 times in its prompt and no picture"),
        ({"messages": [ASKED], "image": "data:image/png,a"}, "it does not say ;base64"),
        ({"messages": [{"role": "user", "content": 5}]}, "content is neither a text nor a list of parts"),
        ({"text": "<|im_start|>user\na"}, "a chat template was applied to"),
    ],
)
def test_what_is_no_chat(folder: Path, record: Any, said: str) -> None:
    with pytest.raises(DataError, match=r"log\.jsonl, line 1 .*") as caught:
        read(folder, record)
    assert said in str(caught.value)


def test_a_text_alone(folder: Path) -> None:
    assert read(folder, {"text": "How do I bake bread?"}).prompt == "How do I bake bread?"
    assert read(folder, {"text": "a", "prompt": "b"}).prompt == "b"


class Template:
    """A processor whose template has no place for a tool's turns."""

    tokenizer = None

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        if any(message["role"] == "tool" for message in messages):
            raise ValueError("no tools here")
        return "rendered without what was thought"


def test_chats_that_a_template_does_not_take(folder: Path) -> None:
    """They are counted. That it drops a thought is its own affair, as it is where the model is served."""
    lines = [
        {"id": "a", "messages": [*EARLIER, ASKED]},
        {"id": "b", "messages": [{"role": "tool", "content": "1"}, ASKED]},
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    report = Told()
    kept = for_model(load(str(folder / "log.jsonl"), labelled=False), Template(), report)
    assert [prompt.name for prompt in kept] == ["a"]
    assert report.warnings == [
        "1 chats are left out, b first: the model's chat template takes no such turns (tool before the user's)."
    ]
