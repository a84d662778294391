"""Families that take pictures in ways of their own."""

from functools import partial
from typing import Any

import transformers as hf

from tiny.parts import (
    IDEFICS_TEMPLATE,
    IMAGE_SIZE,
    LLAVA_TEMPLATE,
    PATCH,
    QWEN3_5,
    SMALL,
    SMALL_VISION,
    SQUARE,
    VISION,
    Made,
    Maker,
    llama_tokenizer,
    make_tokenizer,
    small_text,
    square,
    text_fields,
)
from tiny.processors import Patches, Pooled, Slices, SoftTokens, TypedSlices

_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _idefics_tokenizer(more: str = "", **named: str) -> Any:
    """With `more` special tokens behind those of all versions."""
    special = "<|endoftext|> <|im_start|> <|im_end|> <end_of_utterance> <fake_token_around_image> <image>"
    marks = {"bos": "<|im_start|>", "eos": "<end_of_utterance>", "pad": "<|im_end|>", "image_token": "<image>"}
    return make_tokenizer(f"{special} {more}", template=IDEFICS_TEMPLATE, **marks, **named)


def _idefics(overrides: dict[str, Any], *, name: str, tied: bool) -> Made:
    """Idefics3: Llama text under `text_model`, SigLIP-like vision, tiled images.

    SmolVLM2 differs in its classes and in its tied embeddings.
    """
    tiles = " ".join(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    tokenizer = _idefics_tokenizer(
        f"<global-img> {tiles}", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )  # fmt: skip
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


def _idefics2(overrides: dict[str, Any]) -> Made:
    """Idefics2: Mistral text, SigLIP-like vision of any ratio, a perceiver that gives each picture a few tokens."""
    tokenizer = _idefics_tokenizer(image_boundary_token="<fake_token_around_image>")
    text = hf.MistralConfig(**small_text(tokenizer, overrides, sliding_window=None))
    perceiver = {
        "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
        "resampler_head_dim": 8, "num_key_value_heads": 1,
    }  # fmt: skip
    config = hf.Idefics2Config(
        text_config=text,
        vision_config=SMALL_VISION,
        perceiver_config=perceiver,
        image_token_id=tokenizer.get_vocab()["<image>"],
    )
    images = hf.Idefics2ImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE // 2, "longest_edge": IMAGE_SIZE}, do_image_splitting=False
    )
    return config, hf.Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)


def _gemma3(overrides: dict[str, Any]) -> Made:
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
    images = hf.Gemma3ImageProcessorPil(size=SQUARE, image_seq_length=side**2)
    return config, hf.Gemma3Processor(images, tokenizer, chat_template=_GEMMA_TEMPLATE, image_seq_length=side**2)


def _gemma4(overrides: dict[str, Any]) -> Made:
    """Gemma 4: sliding and full blocks with heads of different sizes, patches of any number, capped logits."""
    tokenizer = llama_tokenizer()
    ids = tokenizer.get_vocab()
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    own: dict[str, Any] = {
        "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "sliding_window": 8, "layer_types": kinds, "use_bidirectional_attention": "vision",
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "final_logit_softcapping": 2.0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 3,
        "position_embedding_size": 64,
    }  # fmt: skip
    config = hf.Gemma4Config(
        text_config=small_text(tokenizer, own | overrides), vision_config=vision, audio_config=None,
        image_token_id=ids["<image>"],
        **dict.fromkeys(("video_token_id", "audio_token_id", "boi_token_id", "eoi_token_id"), ids["<unk>"]),
    )  # fmt: skip
    images = hf.Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70)
    return config, SoftTokens(images, tokenizer, chat_template=LLAVA_TEMPLATE)


def _gemma4_unified(overrides: dict[str, Any]) -> Made:
    """Gemma 4 without a tower: each patch goes through one layer, and is a token."""
    config, processor = _gemma4(overrides)
    own = config.text_config.to_dict() | {"model_type": "gemma4_unified_text"}
    unified = hf.Gemma4UnifiedConfig(
        text_config=own,
        vision_config={"patch_size": 4, "pooling_kernel_size": 3, "mm_embed_dim": 16, "output_proj_dims": 16,
                       "mm_posemb_size": 80},
        audio_config=None,
        **{name: getattr(config, name) for name in ("image_token_id", "video_token_id", "audio_token_id",
                                                    "boi_token_id", "eoi_token_id")},
    )  # fmt: skip
    images = hf.Gemma4ImageProcessorPil(patch_size=12, pooling_kernel_size=1, max_soft_tokens=70)
    return unified, SoftTokens(images, processor.tokenizer, chat_template=LLAVA_TEMPLATE)


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
    "smolvlm": partial(_idefics, name="SmolVLM", tied=True),
    "idefics3": partial(_idefics, name="Idefics3", tied=False),
    "idefics2": _idefics2,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gemma4_unified": _gemma4_unified,
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
