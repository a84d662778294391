"""Families that take pictures in ways of their own."""

from functools import partial
from typing import Any

import transformers as hf

from tiny.parts import (
    IMAGE_SIZE,
    LLAVA_TEMPLATE,
    PATCH,
    QWEN3_5,
    SMALL,
    SMALL_VISION,
    SQUARE,
    Made,
    Maker,
    llama_tokenizer,
    small_text,
    square,
)
from tiny.processors import Patches, Pooled, Slices, TypedSlices


def _aya_vision(overrides: dict[str, Any]) -> Made:
    """Aya Vision: Cohere2 text with sliding and full layers, SigLIP vision, tiles."""
    tiles = "<|START_OF_IMG|> <|END_OF_IMG|> <|IMG_PATCH|> <|IMG_LINE_BREAK|> TILE TILE_GLOBAL"
    tokenizer = llama_tokenizer(tiles)
    config = hf.AyaVisionConfig(
        text_config=hf.Cohere2Config(**small_text(tokenizer, overrides, sliding_window=8, logit_scale=0.25)),
        vision_config=hf.SiglipVisionConfig(**SMALL_VISION, vision_use_head=False),
        image_token_index=tokenizer.get_vocab()["<|IMG_PATCH|>"],
        downsample_factor=2,
    )
    images = hf.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=3)
    return config, hf.AyaVisionProcessor(
        images, tokenizer, patch_size=PATCH, img_size=IMAGE_SIZE, downsample_factor=2,
        chat_template=LLAVA_TEMPLATE,
    )  # fmt: skip


def _llama4(overrides: dict[str, Any]) -> Made:
    """Llama 4: chunked blocks with rotary positions and full blocks without, experts in every second block."""
    vision = hf.Llama4VisionConfig(
        **SMALL_VISION | {"intermediate_size": 64}, vision_output_dim=16, projector_input_dim=16,
        projector_output_dim=16, pixel_shuffle_ratio=0.5,
    )  # fmt: skip
    own = SMALL | {
        "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16, "no_rope_layer_interval": 3,
    }  # fmt: skip
    return square(overrides, name="Llama4", text=hf.Llama4TextConfig, vision=vision, cell=2 * PATCH, own=own)


def _lfm2_vl(overrides: dict[str, Any]) -> Made:
    """LFM2-VL: blocks with a short convolution and blocks with attention; SigLIP 2 with patches of any number."""
    tokenizer = llama_tokenizer()
    kinds = ["conv", "full_attention", "conv", "conv", "full_attention"]
    text = hf.Lfm2Config(**small_text(tokenizer, overrides, layer_types=kinds, block_multiple_of=8))
    config = hf.Lfm2VlConfig(
        text_config=text,
        vision_config=hf.Siglip2VisionConfig(**SMALL_VISION, num_patches=16, vision_use_head=False),
        image_token_id=tokenizer.get_vocab()["<image>"],
        projector_hidden_size=24,
        downsample_factor=1,
        tie_word_embeddings=False,
    )
    images = hf.Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=16)
    return config, Patches(images, tokenizer, chat_template=LLAVA_TEMPLATE)


def _minicpmv(overrides: dict[str, Any], *, name: str, processor: type) -> Made:
    """MiniCPM-V: Qwen3.5 text, a picture and its slices as patches in a row, merged within the tower and behind."""
    tokenizer = llama_tokenizer("<im> </im> <slice> </slice>")
    ids = tokenizer.get_vocab()
    marks = {"image_start": "<im>", "image_end": "</im>", "slice_start": "<slice>", "slice_end": "</slice>"}
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [2, 1, 1]}
    config = getattr(hf, f"{name}Config")(
        text_config=hf.Qwen3_5TextConfig(**small_text(tokenizer, overrides, rope_parameters=rope, **QWEN3_5)),
        vision_config=SMALL_VISION | {"image_size": 64, "patch_size": 4},
        insert_layer_id=0,
        image_token_id=ids["<image>"],
        video_token_id=ids["<unk>"],
        **{f"{mark}_id": ids[token] for mark, token in marks.items()},
        newline_id=tokenizer.encode("\n", add_special_tokens=False)[0],
    )
    # More than one token a slice: a product with one row rounds by where in memory the weights are.
    images = hf.MiniCPMV4_6ImageProcessorPil(patch_size=4, scale_resolution=IMAGE_SIZE, max_slice_nums=3)
    return config, processor(images, tokenizer, chat_template=LLAVA_TEMPLATE)


def _deepseek_vl_hybrid(overrides: dict[str, Any]) -> Made:
    """DeepSeek-VL 7B: SAM, for the picture in a higher resolution, beside SigLIP."""
    tokenizer = llama_tokenizer(image_token="<image>")
    sam = hf.SamVisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=2 * IMAGE_SIZE,
        patch_size=PATCH, global_attn_indexes=[1], window_size=4, mlp_dim=24, num_pos_feats=4,
    )  # fmt: skip
    config = hf.DeepseekVLHybridConfig(
        text_config=hf.LlamaConfig(**small_text(tokenizer, overrides)),
        vision_config=hf.SiglipVisionConfig(**SMALL_VISION, vision_use_head=False),
        high_res_vision_config=sam,
        image_token_id=tokenizer.get_vocab()["<image>"],
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
    )
    high = {"height": 2 * IMAGE_SIZE, "width": 2 * IMAGE_SIZE}
    images = hf.DeepseekVLHybridImageProcessorPil(size=SQUARE, high_res_size=high)
    count = (IMAGE_SIZE // PATCH) ** 2
    return config, hf.DeepseekVLHybridProcessor(images, tokenizer, chat_template=LLAVA_TEMPLATE, num_image_tokens=count)


def _molmo2(overrides: dict[str, Any]) -> Made:
    """Molmo 2: text of its own with scaled and plain rotary positions, features of several layers of the tower."""
    tokenizer = llama_tokenizer()
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    own = {"head_dim": 8, "additional_vocab_size": 8, "rope_scaling_layers": [1, 2, 4]}
    config = hf.Molmo2Config(
        text_config=small_text(tokenizer, overrides, **own),
        vision_config=SMALL_VISION | heads | {"image_size": [IMAGE_SIZE] * 2},
        adapter_config={"vision_feature_layer": [0, 1], "hidden_size": 16, "intermediate_size": 24,
                        "text_hidden_size": 32, **heads},
        image_patch_id=tokenizer.get_vocab()["<image>"],
    )  # fmt: skip
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE)
    return config, Pooled(
        images, tokenizer, patch_size=2 * PATCH, vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    )  # fmt: skip


def _ovis2(overrides: dict[str, Any]) -> Made:
    """Ovis2: Qwen2 text, and a tower that says which of a vocabulary of its own a patch is."""
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = llama_tokenizer(f"<IMG_ATOM> {' '.join(marks)}")
    text = hf.Qwen2Config(**small_text(tokenizer, overrides))
    config = hf.Ovis2Config(
        text_config=text,
        vision_config=hf.Ovis2VisionConfig(**SMALL_VISION, vocab_size=37, hidden_stride=2),
        image_token_id=tokenizer.get_vocab()["<IMG_ATOM>"],
        visual_indicator_token_ids=[tokenizer.get_vocab()[mark] for mark in marks],
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
    )
    images = hf.Ovis2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=3)
    return config, hf.Ovis2Processor(images, tokenizer, image_seq_length=4, chat_template=LLAVA_TEMPLATE)


MAKERS: dict[str, Maker] = {
    "internvl": partial(
        square, name="InternVL", text=hf.Qwen2Config, cell=2 * PATCH,
        vision=hf.InternVLVisionConfig(**SMALL_VISION | {"image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH] * 2}),
    ),
    "aya_vision": _aya_vision,
    "cohere2_vision": partial(
        square, name="Cohere2Vision", text=hf.Cohere2Config, cell=2 * PATCH, own=SMALL | {"sliding_window": 8},
        vision=hf.SiglipVisionConfig(**SMALL_VISION, vision_use_head=False), alignment_intermediate_size=24,
    ),
    "llama4": _llama4,
    "lfm2_vl": _lfm2_vl,
    "minicpmv4_6": partial(_minicpmv, name="MiniCPMV4_6", processor=Slices),
    "minicpmv4_7": partial(_minicpmv, name="MiniCPMV4_7", processor=TypedSlices),
    "deepseek_vl": partial(
        square, name="DeepseekVL", text=hf.LlamaConfig, cell=PATCH,
        vision=hf.SiglipVisionConfig(**SMALL_VISION, vision_use_head=False),
    ),
    "deepseek_vl_hybrid": _deepseek_vl_hybrid,
    "molmo2": _molmo2,
    "ovis2": _ovis2,
}  # fmt: skip
