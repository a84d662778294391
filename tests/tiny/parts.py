"""What tiny models are made of: sizes, tokenizer, templates, and the ways with pictures that several families have."""

from collections.abc import Callable
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

Made = tuple[PreTrainedConfig, ProcessorMixin]
Maker = Callable[[dict[str, Any]], Made]  # given fields of the text config that differ from the usual ones

LAYERS = 6
HIDDEN = 64
VISION_HIDDEN = 32
IMAGE_SIZE = 32
PATCH = 8
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
BLOCKS = 5  # of the narrower ones

WORDS = (
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

# Vision config fields shared by the CLIP and SigLIP shaped towers.
VISION: dict[str, Any] = {
    "hidden_size": VISION_HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
}

# Of families beyond those that most tests run: narrower, of five blocks.
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
SMALL_VISION: dict[str, Any] = VISION | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TILES = {"image_grid_pinpoints": [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE] * 2]}
MERGED: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
QWEN3_5: dict[str, Any] = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


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
    core.train_from_iterator([" ".join(WORDS)] * 4 + WORDS, trainer)
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


def small_text(tokenizer: PreTrainedTokenizerFast, overrides: dict[str, Any], **own: Any) -> dict[str, Any]:
    return text_fields(tokenizer, SMALL | own | overrides)


def llama_tokenizer(more: str = "", **named: str) -> PreTrainedTokenizerFast:
    """With `more` special tokens behind the usual ones."""
    special = f"<unk> <s> </s> <image> <pad> {more}"
    return make_tokenizer(special, bos="<s>", eos="</s>", pad="<pad>", template=LLAVA_TEMPLATE, **named)


def tile_images() -> hf.LlavaNextImageProcessorPil:
    """LLaVA-NeXT's way with pictures: each whole, and cut into tiles."""
    return hf.LlavaNextImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE, **TILES)


def square(
    overrides: dict[str, Any],
    *,
    name: str,
    text: type,
    vision: PreTrainedConfig,
    cell: int,
    dropped: bool = False,
    own: dict[str, Any] = SMALL,
    tiles: Any = None,
    **fields: Any,
) -> Made:
    """A square picture, one token for each `cell` pixels a side: LLaVA's processor, with or without CLS `dropped`.

    Args:
        own: fields of the text config that are not the usual ones; `fields`: of the whole config.
        tiles: an image processor that cuts pictures into tiles, which LLaVA-NeXT's processor then takes.
    """
    tokenizer = llama_tokenizer()
    config = getattr(hf, f"{name}Config")(
        text_config=text(**text_fields(tokenizer, own | overrides)),
        vision_config=vision,
        image_token_id=tokenizer.get_vocab()["<image>"],
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
        **(TILES if tiles else {}),
        **fields,
    )
    images = tiles or hf.CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE)
    return config, (hf.LlavaNextProcessor if tiles else hf.LlavaProcessor)(
        images, tokenizer, patch_size=cell, num_additional_image_tokens=int(dropped),
        vision_feature_select_strategy="default" if dropped else "full", chat_template=LLAVA_TEMPLATE,
    )  # fmt: skip


def grid(
    overrides: dict[str, Any],
    *,
    name: str,
    vision: dict[str, Any],
    text: dict[str, Any],
    processor: type = hf.PaddleOCRVLProcessor,
    small: dict[str, Any] = SMALL,
    **more: Any,
) -> Made:
    """Qwen's way with pictures: patches of any number in a row, and each picture's grid.

    Qwen's own processor insists on a video processor, and that on torchvision. This stock class does the same for
    images: it expands the image token by the grid and writes mm_token_type_ids.
    """
    special = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
    tokenizer = make_tokenizer(
        special, bos=None, eos="<|im_end|>", pad="<|endoftext|>", template=QWEN_TEMPLATE,
        image_token="<|image_pad|>", video_token="<|video_pad|>",
    )  # fmt: skip
    ids = tokenizer.get_vocab()
    # Sections add up to half of the head dimension, 8.
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [2, 1, 1]}
    fields = text_fields(tokenizer, {**small, "rope_parameters": rope, **text} | overrides)
    starts = "image" if name.startswith(("Glm", "Ernie")) else "vision"
    config = getattr(hf, f"{name}Config")(
        text_config=fields,
        vision_config={"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2,
                       "depth": 2, **vision},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        **{f"{starts}_start_token_id": ids["<|vision_start|>"], f"{starts}_end_token_id": ids["<|vision_end|>"]},
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
        **more,
    )  # fmt: skip
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}  # areas in pixels, whatever their names say
    frames = vision.get("temporal_patch_size", 2)
    images = hf.Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=frames, size=size)
    return config, processor(images, tokenizer, chat_template=QWEN_TEMPLATE)
