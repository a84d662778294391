"""Qwen's models, and those that take pictures as Qwen does: patches of any number in a row, and a grid of each."""

from functools import partial
from typing import Any

import transformers as hf

from tiny.parts import (
    EXPERTS,
    MERGED,
    PATCH,
    QWEN3_5,
    QWEN_TEMPLATE,
    ROUTED,
    VISION_HIDDEN,
    Made,
    Maker,
    grid,
    make_tokenizer,
    text_fields,
)
from tiny.processors import Routed, Squares, Untyped

_STACKED = MERGED | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
_GLM = partial(grid, vision=MERGED | {"image_size": 64}, text={})


def _qwen2_5_vl(overrides: dict[str, Any]) -> Made:
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


MAKERS: dict[str, Maker] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": partial(grid, name="Qwen2VL", vision={"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}, text={}),
    "qwen3_vl": partial(grid, name="Qwen3VL", vision=_STACKED, text={"head_dim": 8}),
    "qwen3_vl_moe": partial(grid, name="Qwen3VLMoe", vision=_STACKED, text={"head_dim": 8, **EXPERTS}),
    "qwen3_5": partial(grid, name="Qwen3_5", vision=MERGED | {"num_position_embeddings": 64}, text=QWEN3_5),
    "qwen3_5_moe": partial(
        grid, name="Qwen3_5Moe", vision=MERGED | {"num_position_embeddings": 64},
        text=QWEN3_5 | EXPERTS | {"shared_expert_intermediate_size": 16},
    ),
    "glm4v": partial(_GLM, name="Glm4v"),
    "glm46v": partial(_GLM, name="Glm46V"),
    "glm4v_moe": partial(_GLM, name="Glm4vMoe", text=ROUTED | {"head_dim": 16}),
    "exaone4_5": partial(
        grid, name="Exaone4_5_", processor=Untyped,
        text={"model_type": "exaone4", "rope_parameters": None, "sliding_window": 8, "sliding_window_pattern": 3},
        vision=MERGED | {"window_size": 4 * PATCH, "fullatt_block_indexes": [1], "num_key_value_heads": 2},
    ),
    "ernie4_5_vl_moe": partial(
        grid, name="Ernie4_5_VLMoe", processor=Routed,
        vision={"hidden_size": 16, "intermediate_size": 24, "temporal_merge_size": 2, "temporal_patch_size": 1},
        text={"moe_intermediate_size": [16, 16], "moe_num_experts": 4, "moe_k": 2,
              "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0, "mrope_section": [1, 1, 2]}},
    ),
    "kimi_k25": partial(
        grid, name="Kimi_K25", processor=Squares, projection_hidden_size=16,
        vision={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                "pos_emb_height": 8, "pos_emb_width": 8, "temporal_patch_size": 1},
        text=ROUTED | {"model_type": "deepseek_v3", "rope_parameters": None, "q_lora_rank": 16, "kv_lora_rank": 16,
                        "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
                        "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "lfm3_vl": partial(
        grid, name="Lfm3Vl", processor=Untyped,
        vision={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
        text={"model_type": "lfm3", "rope_parameters": None, "head_dim": 8, "sliding_window": 8, "layer_types": [
            "conv", "full_attention", "conv", "sliding_attention", "full_attention"]},
    ),
}  # fmt: skip
