"""Makes patched directories known to vLLM, and raises errors for engines that the gate cannot guard."""

from collections.abc import Callable
from typing import Any

import transformers
import vllm
from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.v1.core.sched.scheduler import Scheduler

from sasa_vllm import metrics
from sasa_vllm.requests import wrap
from sasa_vllm.settings import GuardedConfig

TESTED = ("0.32.0",)  # versions of vLLM on which the tests of this package pass
READ = ("0.33.0", "0.34.0")  # versions whose source was read: an engine there must prove its gate (proof.py)
VERSION = vllm.__version__.split("+")[0]
ONLY_READ = VERSION in READ
WORKER = "sasa_vllm.worker.GuardedWorker"

# The supported families. A configuration in transformers is named ...Config, a class in vLLM ...GENERATES.
GENERATES = "ForConditionalGeneration"
FAMILIES = (
    "Llava", "LlavaNext", "Qwen2_5_VL", "SmolVLM", "Idefics3", "Gemma3", "Qwen2VL", "Qwen3VL", "LlavaOnevision",
    "Mistral3", "Glm4v", "InternVL",
)  # fmt: skip


def register() -> None:
    """Register patched directories with transformers and vLLM, under the names in their config.json."""
    for family in FAMILIES:
        config = guarded_config(getattr(transformers, f"{family}Config"))
        AutoConfig.register(config.model_type, config, exist_ok=True)
        name = f"Sasa{family}{GENERATES}"
        ModelRegistry.register_model(name, f"sasa_vllm.models:{name}")
        MODELS_CONFIG_MAP[name] = GuardedEngine
    wrap(Scheduler, "__init__", cap_hits)


def guarded_config(stock: Any) -> Any:
    """Return the configuration class of a patched directory. A loaded configuration takes the family's own class and
    model type, by which vLLM finds the family. Its attribute `sasa` keeps the settings."""

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        check_version()
        read = super(guarded, cls).from_dict(config_dict, **kwargs)
        config = read[0] if isinstance(read, tuple) else read
        config.__class__, config.model_type = stock, stock.model_type
        return read

    guarded = type(f"Sasa{stock.__name__}", (GuardedConfig, stock), {"model_type": f"sasa_{stock.model_type}"})
    guarded.from_dict = classmethod(from_dict)
    return guarded


def check_version() -> None:
    """Raise ImportError on a vLLM version that is in neither TESTED nor READ."""
    if VERSION not in TESTED + READ:
        what = f"vLLM {VERSION} is installed, and the gate of this model was tried on {', '.join(TESTED)} alone"
        newest = f"Install that, or {READ[-1]}, the newest that sasa-vllm serves, or a newer sasa-vllm"
        raise ImportError(f"{what}: another may answer past it. {newest}.")


class GuardedEngine(VerifyAndUpdateConfig):
    """The check that vLLM calls when it sets up an engine, before any process of the engine starts."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        check_engine(vllm_config)
        vllm_config.parallel_config.worker_cls = WORKER
        metrics.collect()


def lane_tokens(sasa: dict[str, Any]) -> int:
    """Return how many last tokens of a prompt the lane reads, 0 without one. Raise ValueError if it reads all."""
    tokens = [node.get("tokens") for node in sasa["graph"] if node["op"] == "projection"]
    if not all(tokens):
        raise ValueError("on vLLM no lane runs over all tokens. Export this model again, with --lane-tokens 8.")
    return tokens[0] if tokens else 0


def cap_hits(init: Callable, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Make the prefix cache, which holds no projection, leave each prompt's last tokens to be computed. If one is
    missing, the gate refuses the request."""
    init(scheduler, *args, **kwargs)
    sasa = getattr(scheduler.vllm_config.model_config.hf_config, "sasa", None)
    left = max(1, lane_tokens(sasa)) if sasa is not None else 1  # vLLM itself leaves one
    coordinator = scheduler.kv_cache_manager.coordinator
    find = coordinator.find_longest_cache_hit
    coordinator.find_longest_cache_hit = lambda hashes, longest: find(hashes, max(0, longest + 1 - left))


def check_engine(vllm_config: Any) -> None:
    """Raise ValueError if an option lets answers bypass the gate, or was never tried with it."""
    if lane_tokens(vllm_config.model_config.hf_config.sasa) > 8 and vllm_config.model_config.is_mm_prefix_lm:
        # Beyond the chat template's tokens, such a lane may meet picture tokens, but it reads in one direction only.
        raise ValueError("this model reads pictures both ways. Export it again, with --lane-tokens 8.")
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    refused = {
        "--speculative-config": vllm_config.speculative_config,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--enable-dbo": parallel.enable_dbo,
        f"--worker-cls {parallel.worker_cls}": parallel.worker_cls not in ("auto", WORKER),
        "--enable-lora": vllm_config.lora_config,
        "--kv-transfer-config": vllm_config.kv_transfer_config,
        "--ec-transfer-config": vllm_config.ec_transfer_config,
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        f"--runner {model.runner_type}": model.runner_type != "generate",
        "--enable-trace-replay": model.enable_trace_replay,
        "--return-sampling-mask": model.return_sampling_mask,
        "--logits-processors": model.logits_processors,
        f"--load-format {vllm_config.load_config.load_format}": vllm_config.load_config.load_format == "dummy",
        # Only Model Runner V2 has these.
        "--watermark-config": vllm_config.watermark_config,
        "--diffusion-config": vllm_config.diffusion_config,
        "--enable-batch-sharded-sampling": parallel.enable_batch_sharded_sampling,
    }
    for option, is_set in refused.items():
        if is_set:
            raise ValueError(f"{option}: not with this guarded model, whose gate could not judge there. Start without.")
