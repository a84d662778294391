"""Read chats, from server logs or fine-tuning data: the user's last request and the turns before it.

    {"messages": [{"role": ..., "content": text or parts}]}    OpenAI's form, or in `body` as in its batch files
    {"conversations": [{"from": "human", "value": text}]}      LLaVA's form
    {"text": ...}                                              a single request

A picture is usually a part of a turn. A picture outside the turns (`image` or `images`) belongs to the user's turn with
the mark <image>; without a mark, to the user's first turn.

Turns after the user's last one are dropped: the gate judges requests, not answers.
"""

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sasa_export.errors import DataError
from sasa_export.prompts.read import Row, entry

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
MARK = "<image>"  # LLaVA's placeholder for the picture
RENDERED = re.compile(r"<\|\w+\|>|<start_of_turn>|\[INST\]|^\s*(USER|Human):", re.IGNORECASE)


@dataclass(frozen=True)
class Chat:
    """A request, the turns before it as (role, text) pairs, and its picture, a file or bytes.

    `picture_turn` is the index of the picture's turn among the user's turns: 0 is the first, -1 the last.
    `picture_last` places the picture after the turn's text.
    """

    prompt: str
    before: tuple[tuple[str, str], ...] = ()
    picture: Path | bytes | None = None
    picture_turn: int = -1
    picture_last: bool = False


def chat_of(row: Row) -> Chat | None:
    """Return the chat in a record, or None if it holds none. Raises DataError for a chat that cannot be judged."""
    inner = row.fields.get("body")
    fields = inner if isinstance(inner, dict) else row.fields
    turns = next((fields[name] for name in ("messages", "conversations") if fields.get(name)), None)
    if turns is None:
        return _alone(row) if "text" in fields and "prompt" not in fields else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{row.where} has messages that are no list of objects with a role and a content.")
    said = [_turn(row, turn) for turn in turns]
    asked = [place for place, (role, _, _) in enumerate(said) if role == "user"]
    if not asked:
        raise DataError(f"{row.where} has no turn of the user's, so nothing to judge. Take the line out.")
    said = said[: asked[-1] + 1]
    pictures = [picture for _, _, found in said for picture in found]
    pictures += [picture_of(row, held) for name in ("image", "images") for held in _listed(entry(fields, name))]
    if len(pictures) > 1:
        raise DataError(f"{row.where} has {len(pictures)} pictures, and one is read. Take the line out.")
    turn = next((number for number, place in enumerate(asked) if MARK in said[place][1]), 0)
    marked = said[asked[turn]][1]
    texts = without_mark(row, [text for _, text, _ in said], bool(pictures))
    before = tuple((role, text) for (role, _, _), text in zip(said, texts[:-1], strict=False))
    if not pictures:
        return Chat(texts[-1], before)
    return Chat(texts[-1], before, pictures[0], turn, marked.endswith(MARK) and not marked.startswith(MARK))


def without_mark(row: Row, texts: list[str], pictured: bool) -> list[str]:
    """Return the texts of a chat without LLaVA's mark, because the chat template places the picture. Raises DataError
    if there are more marks than pictures."""
    marks = sum(text.count(MARK) for text in texts)
    if marks > pictured:
        raise DataError(
            f"{row.where} has {MARK} {marks} times in its prompt and {'one picture' if pictured else 'no picture'}: "
            f"take {MARK} out, or name the picture as its image."
        )
    return [text.replace(MARK, "").strip() if marks else text for text in texts]


def _alone(row: Row) -> Chat:
    text = row.text("text")
    if RENDERED.search(text):
        raise DataError(
            f"{row.where} has a text that a chat template was applied to, so that its turns cannot be told apart. Give "
            "them as messages."
        )
    return Chat(text)


def _turn(row: Row, turn: dict[str, Any]) -> tuple[str, str, list[Path | bytes]]:
    """Return role, text and pictures of a turn. A mark in the text replaces each picture."""
    role, content = str(turn.get("role") or turn.get("from")), turn.get("content", turn.get("value"))
    role, texts, pictures = ROLES.get(role, role), [], []
    if content is None or isinstance(content, str):
        content = [{"type": "text", "text": content or ""}]
    if not isinstance(content, list):
        raise DataError(f"{row.where} has a turn whose content is neither a text nor a list of parts.")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text", "refusal"):
            texts.append(str(part.get("text", part.get("refusal", ""))))
        elif kind in ("image_url", "input_image", "image") and role == "user":
            held = next((part[name] for name in ("image_url", "image", "url", "path") if part.get(name)), None)
            pictures.append(picture_of(row, held.get("url") if isinstance(held, dict) else held))
            texts.append(MARK)
        else:
            raise DataError(f"{row.where} has a part of the kind {kind!r}; text and the user's pictures are read.")
    return role, "\n".join(texts).strip(), pictures


def _listed(held: Any) -> list[Any]:
    return held if isinstance(held, list) else [] if held is None else [held]


def picture_of(row: Row, held: Any) -> Path | bytes:
    """Return the picture as a path or bytes, from a path, a `file:` URL, a `data:` URL, or a record with bytes."""
    if isinstance(held, dict):  # the form in Parquet files and on the hub
        return held.get("bytes") or row.table.parent / str(held.get("path") or "")
    said = str(held)
    if said.startswith("data:"):
        kind, _, data = said.partition(",")
        try:
            if not kind.endswith(";base64"):
                raise ValueError("it does not say ;base64")
            return base64.b64decode(data, validate=True)
        except ValueError as error:
            raise DataError(f"{row.where} has a picture whose data: URL cannot be read as base64 ({error}).") from None
    if re.match(r"https?:", said):
        raise DataError(f"{row.where} names the picture {said[:100]}, which is not fetched. Give a file, or its data.")
    return row.table.parent / (unquote(urlsplit(said).path) if said.startswith("file:") else said)
