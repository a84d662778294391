"""Qwen's models, and those that take pictures as Qwen does: patches of any number in a row, and a grid of each."""

from functools import partial

from tiny.parts import EXPERTS, HIDDEN, MERGED, PATCH, QWEN3_5, ROUTED, VISION_HIDDEN, Maker, grid
from tiny.processors import Routed, Squares, Untyped

_STACKED = MERGED | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
_GLM = partial(grid, vision=MERGED | {"image_size": 64}, text={})

MAKERS: dict[str, Maker] = {
    "qwen2_5_vl": partial(
        grid, name="Qwen2_5_VL", small={},
        text={"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [2, 3, 3]}},
        vision={"depth": 3, "hidden_size": VISION_HIDDEN, "intermediate_size": 48, "window_size": 4 * PATCH,
                "out_hidden_size": HIDDEN, "fullatt_block_indexes": [1]},
    ),
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
