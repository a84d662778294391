"""What others' exporters are given: a real decoder, and tiny random ones of many families, as transformers saves them.

    python sources.py OUT

Runs where sasa-export is installed. OUT/sources/NAME is for the newest transformers, OUT/sources-4/NAME the same
weights with a config.json as transformers 4 reads it, for optimum.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as hf

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny
from tiny.parts import QWEN_TEMPLATE

from sasa_export.models import EMBEDDED, open_source

# Of the same few sizes, so that only what is a family's own is said below.
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
FULL, SLIDING, CONVOLUTION = "full_attention", "sliding_attention", "conv"
# One of each way to attend, to norm and to cache: biased, latent, multi-query, windowed, with sinks, by learned
# positions, with convolutions; layer norms, RMS norms, those of queries and keys, and those behind a block.
FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 4, "n_head": 4},
    "deepseek_v3": {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "qk_nope_head_dim": 8, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    },
    "falcon": {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_hidden_size": 96,
        "new_decoder_architecture": False, "multi_query": True,
    },
    "gemma2": {"layer_types": [SLIDING, FULL] * 2, "sliding_window": 8},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512},
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": [SLIDING, FULL] * 2, "sliding_window": 8,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 256, "truncate": False,
        },
    },
    "lfm2": {"layer_types": [CONVOLUTION, FULL] * 2, "conv_L_cache": 3, "block_multiple_of": 8},
    "llama": {},
    "qwen3": {},
}  # fmt: skip
# Vision-language models whose decoder alone the builder exports, with heads of the sizes that its attention takes:
# recurrent states, and positions of three axes.
WITH_VISION: dict[str, dict[str, Any]] = {"qwen3_5": {"head_dim": 32}, "qwen3_vl": {}}


def main(out: Path) -> None:
    save_smol_llava(out / "sources" / "smol-llava")
    for name in FAMILIES:
        save_tiny(name, out / "sources" / name)
    for name, sizes in WITH_VISION.items():
        tiny.build(name, out / "sources" / name, **sizes)
    for directory in (out / "sources").iterdir():
        for_transformers_4(directory, out / "sources-4" / directory.name)


def save_smol_llava(out: Path) -> None:
    """smol-llava's language model as a model of its own, with its tokenizer."""
    source = open_source(EMBEDDED).directory
    whole = hf.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    model = hf.LlamaForCausalLM(whole.config.text_config)
    model.model.load_state_dict(whole.model.language_model.state_dict())
    model.lm_head.load_state_dict(whole.lm_head.state_dict())
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.generation_config = whole.generation_config
    model.save_pretrained(out)
    hf.AutoProcessor.from_pretrained(source).tokenizer.save_pretrained(out)


def save_tiny(name: str, out: Path) -> None:
    """A tiny random decoder of a family, with a tokenizer and a chat template."""
    tokenizer = tiny.make_tokenizer(
        "<|endoftext|> <|im_start|> <|im_end|>", bos="<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>",
        template=QWEN_TEMPLATE,
    )  # fmt: skip
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    own = FAMILIES[name]
    sizes = {} if {"hidden_size", "n_embd"} & set(own) else SIZES
    vocabulary = (len(tokenizer) // 64 + 1) * 64
    config = hf.AutoConfig.for_model(name, **{**sizes, "vocab_size": vocabulary, **ids, **own})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tiny._randomise(model, 0)
    model.generation_config = hf.GenerationConfig(do_sample=False, **ids)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def for_transformers_4(directory: Path, out: Path) -> None:
    """The same weights and tokenizer, and what version 4 calls otherwise."""
    out.mkdir(parents=True)
    for path in directory.iterdir():
        os.link(path, out / path.name)
    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters", None) or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype", "float32")
    _replace(out / "config.json", config)
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    _replace(
        out / "tokenizer_config.json",
        {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {}},
    )


def _replace(path: Path, content: Any) -> None:
    path.unlink()  # it is a link
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
