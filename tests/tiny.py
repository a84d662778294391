"""Tiny random vision-language models, written to disk the way a hub repository lays them out.

No model can be downloaded in tests, so every family is built from its config: random weights, a tokenizer
trained here, and the family's own processor. The directories load through the plain Auto classes.
"""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    BatchFeature,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

FAMILIES: tuple[str, ...] = ("llava", "llava_next", "qwen2_5_vl", "smolvlm", "gemma3", "idefics3")

LAYERS = 6
HIDDEN = 64
VISION_HIDDEN = 32
IMAGE_SIZE = 32
PATCH = 8
# Weight matrices are drawn this wide so that attention, MLP and head all matter: with the usual 0.02 a tiny
# model answers every prompt alike, and a wrong second lane would go unseen.
INIT_STD = 0.2
# Smaller than the rest, or a model with scaled and tied embeddings (Gemma) merely repeats its last token.
EMBEDDING_STD = 0.1
NORM_STD = 0.1
BIAS_STD = 0.05

_WORDS = (
    "please describe the picture and tell me what is in this image how do I make a safe cake with apples "
    "where can the small dog run near the river why does an old house look red under rain who wrote that "
    "letter about bridges when will it be ready for us list three ideas to cook rice explain plainly which "
    "tools fix a broken chair is there any water left on your table"
).split()

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def build(family: str, directory: Path, *, seed: int = 0, shards: int = 1, **overrides: Any) -> Path:
    """Write a tiny random model of `family` into `directory` and return that directory.

    `overrides` are fields of the text config (`final_logit_softcapping=30.0`, `num_hidden_layers=4`, ...);
    `tie_word_embeddings` is set on the whole config too. `shards > 1` splits the weights under an index, into
    about that many files.
    """
    from tiny_more import MAKERS

    config, processor = {**_MAKERS, **MAKERS}[family](overrides)
    with torch.random.fork_rng():
        # Initial values that are drawn at random, such as CLIP's class embedding, stay part of the weights.
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    model.generation_config = _generation_config(config)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    model.save_pretrained(directory, max_shard_size=size // shards + 1 if shards > 1 else "5GB")
    processor.save_pretrained(directory)
    # Hub repositories carry this file; transformers 5 no longer writes it: processor_config.json has it all.
    described = {**processor.image_processor.to_dict(), "processor_class": type(processor).__name__}
    (directory / "preprocessor_config.json").write_text(json.dumps(described, indent=2, default=list) + "\n")
    return directory


def prompts(
    processor: ProcessorMixin,
    *,
    images: bool,
    count: int,
    seed: int,
    padding_side: Literal["left", "right"],
) -> BatchFeature:
    """A batch of `count` random prompts of different lengths, through the chat template.

    With `images`, every row but each third one carries one random image of its own size: all six families
    take mixed batches. A batch of fewer than three rows has an image in every row.
    """
    return encode(processor, conversations(images=images, count=count, seed=seed), padding_side=padding_side)


def encode(
    processor: ProcessorMixin,
    chats: list[list[dict[str, Any]]],
    *,
    padding_side: Literal["left", "right"] = "left",
) -> BatchFeature:
    """The model inputs of a batch of chats, padded together."""
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "padding_side": padding_side, "return_tensors": "pt"},
    )
    assert isinstance(inputs, BatchFeature)
    return inputs


def conversations(*, images: bool, count: int, seed: int) -> list[list[dict[str, Any]]]:
    """The chats behind `prompts`, one per row: single user turns of the processors' content-list form."""
    draw = random.Random(seed)
    # Lengths differ by row, and no two rows of a small batch are as long: padding must matter.
    lengths = [3 + 2 * (step % 16) for step in draw.sample(range(count + 2), count)]
    chats = []
    for row, length in enumerate(lengths):
        content: list[dict[str, Any]] = []
        if images and row % 3 != 2:
            content.append({"type": "image", "image": random_image(draw.randrange(2**31))})
        content.append({"type": "text", "text": " ".join(draw.choices(_WORDS, k=length))})
        chats.append([{"role": "user", "content": content}])
    return chats


def random_image(seed: int) -> Image.Image:
    """A random RGB image of 24 to 64 pixels a side."""
    draw = np.random.default_rng(seed)
    height, width = draw.integers(24, 65, size=2)
    # Large flat cells keep images apart after any resizing; white noise would average out to one grey.
    cells = draw.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((int(width), int(height)), Image.Resampling.NEAREST)


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew: matrices wide, norms and biases around their initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)  # same shape as the parameter
            if parameter.ndim > 1:
                parameter.copy_(noise * (EMBEDDING_STD if "embed_tokens" in name else INIT_STD))
            else:
                parameter.add_(noise * (BIAS_STD if name.endswith("bias") else NORM_STD))
        # A trained model never says the placeholder of an image. A random one would, and a pass over its own
        # answer would then look for one image more. A logit of 0 is never the largest of hundreds.
        for name in ("image_token_id", "video_token_id"):
            if hasattr(model.config, name):
                model.get_output_embeddings().weight[getattr(model.config, name)] = 0.0  # (hidden,)


def _generation_config(config: PreTrainedConfig) -> GenerationConfig:
    """Greedy decoding with the special tokens of the text config, as hub repositories ship it."""
    text = config.get_text_config()
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=False,
    )


def make_tokenizer(
    special: str, *, bos: str | None, eos: str, pad: str, template: str, **named: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a small merge table.

    Args:
        special: the special tokens in the order of their ids, with spaces between them.
        named: extra named special tokens.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special.split()) + len(alphabet) + 120,
        special_tokens=special.split(),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(_WORDS)] * 4 + _WORDS, trainer)
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=named,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def text_fields(tokenizer: PreTrainedTokenizerFast, overrides: dict[str, Any]) -> dict[str, Any]:
    """Text config fields that all families share."""
    return {
        # Padded beyond the tokenizer's size, as real checkpoints do.
        "vocab_size": (len(tokenizer) // 64 + 1) * 64,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **overrides,
    }


# Vision config fields shared by the CLIP and SigLIP shaped towers.
VISION: dict[str, Any] = {
    "hidden_size": VISION_HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
}


def _llava(overrides: dict[str, Any], *, tiled: bool = False) -> tuple[PreTrainedConfig, ProcessorMixin]:
    """LLaVA-1.5: Llama text, CLIP vision, the CLS token dropped.

    LLaVA-NeXT is the same with image tiles, so that the number of image tokens follows the image's size.
    """
    tokenizer = make_tokenizer(
        "<unk> <s> </s> <image> <pad>", bos="<s>", eos="</s>", pad="<pad>", template=LLAVA_TEMPLATE
    )
    name, image_processor = "Llava", hf.CLIPImageProcessorPil
    if tiled:
        name, image_processor = "LlavaNext", hf.LlavaNextImageProcessorPil
    # Patches twice as large as elsewhere: up to five tiles would make too many tokens.
    patch = 2 * PATCH if tiled else PATCH
    wide, square = 2 * IMAGE_SIZE, IMAGE_SIZE
    tiles = {"image_grid_pinpoints": [[square, wide], [wide, square], [wide, wide]]} if tiled else {}
    config = getattr(hf, f"{name}Config")(
        text_config=hf.LlamaConfig(**text_fields(tokenizer, overrides)),
        vision_config=hf.CLIPVisionConfig(**VISION | {"patch_size": patch}, projection_dim=VISION_HIDDEN),
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=(IMAGE_SIZE // patch) ** 2,
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
        **tiles,
    )
    images = image_processor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, **tiles
    )
    return config, getattr(hf, f"{name}Processor")(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def _qwen2_5_vl(overrides: dict[str, Any]) -> tuple[PreTrainedConfig, ProcessorMixin]:
    """Qwen2.5-VL: three-dimensional rotary positions and a vision tower of native resolution."""
    tokenizer = make_tokenizer(
        "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>",
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        template=QWEN_TEMPLATE,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )
    ids = tokenizer.get_vocab()
    text = text_fields(tokenizer, overrides)
    # Sections add up to half of the head dimension, 16.
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [2, 3, 3]}
    text.setdefault("rope_parameters", rope)
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": 3,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 4 * PATCH,
            "out_hidden_size": text["hidden_size"],
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
    )
    # Qwen's bounds are areas in pixels, whatever their names say.
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    images = hf.Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=2, size=size)
    # Qwen's own processor insists on a video processor, and that on torchvision. This stock class does the
    # same for images: it expands the image token by the grid and writes mm_token_type_ids.
    return config, hf.PaddleOCRVLProcessor(images, tokenizer, chat_template=QWEN_TEMPLATE)


def _idefics(overrides: dict[str, Any], *, name: str, tied: bool) -> tuple[PreTrainedConfig, ProcessorMixin]:
    """Idefics3: Llama text under `text_model`, SigLIP-like vision, tiled images.

    SmolVLM2 differs in its classes and in its tied embeddings.
    """
    tiles = " ".join(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    tokenizer = make_tokenizer(
        "<|endoftext|> <|im_start|> <|im_end|> <end_of_utterance> <fake_token_around_image> <image> <global-img> "
        + tiles,
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        template=IDEFICS_TEMPLATE,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    tied = overrides.get("tie_word_embeddings", tied)
    config = getattr(hf, f"{name}Config")(
        text_config=hf.LlamaConfig(**text_fields(tokenizer, overrides) | {"tie_word_embeddings": tied}),
        vision_config=VISION,
        scale_factor=2,
        image_token_id=tokenizer.get_vocab()["<image>"],
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
    )
    # The long side grows to two tiles, each of the vision tower's size.
    images = getattr(hf, f"{name}ImageProcessorPil")(
        size={"longest_edge": 2 * IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}
    )
    # SmolVLM's own processor insists on torchvision and num2words, for videos. That of Idefics3 treats images
    # alike, and is the one that SmolVLM 1 names.
    tokens = (IMAGE_SIZE // PATCH) ** 2 // 4  # of one tile
    return config, hf.Idefics3Processor(images, tokenizer, image_seq_len=tokens, chat_template=IDEFICS_TEMPLATE)


def _gemma3(overrides: dict[str, Any]) -> tuple[PreTrainedConfig, ProcessorMixin]:
    """Gemma 3: sliding and full layers, attention both ways within an image, SigLIP vision."""
    tokenizer = make_tokenizer(
        "<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> <image_soft_token>",
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        template=_GEMMA_TEMPLATE,
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    ids = tokenizer.get_vocab()
    full, sliding = "full_attention", "sliding_attention"
    own: dict[str, Any] = {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        # Narrower than the prompts, or sliding layers would see what full ones see.
        "sliding_window": 8,
        # No regular period: a lane that starts counting the kinds at its own first block goes wrong.
        "layer_types": [sliding, full, sliding, sliding, full, sliding],
        "eos_token_id": [ids["<eos>"], ids["<end_of_turn>"]],
    }
    text = text_fields(tokenizer, own | overrides)
    text["layer_types"] = text["layer_types"][: text["num_hidden_layers"]]
    side = 2
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**text),
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=side**2,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        tie_word_embeddings=overrides.get("tie_word_embeddings", True),
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = hf.Gemma3ImageProcessorPil(size=size, image_seq_length=side**2)
    return config, hf.Gemma3Processor(images, tokenizer, chat_template=_GEMMA_TEMPLATE, image_seq_length=side**2)


_MAKERS: dict[str, Callable[[dict[str, Any]], tuple[PreTrainedConfig, ProcessorMixin]]] = {
    "llava": _llava,
    "llava_next": partial(_llava, tiled=True),
    "qwen2_5_vl": _qwen2_5_vl,
    "smolvlm": partial(_idefics, name="SmolVLM", tied=True),
    "gemma3": _gemma3,
    "idefics3": partial(_idefics, name="Idefics3", tied=False),
}
