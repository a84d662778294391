"""Load a source: its stock model and processor, or the bare skeleton that tracing needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sasa_export.errors import OpenError
from sasa_export.models import Source
from sasa_export.models.contents import read_object
from sasa_export.models.memory import fits

SPREAD = "spread"  # over all devices there are, for models larger than one


@dataclass(frozen=True)
class Sizes:
    """The decoder's number of blocks, hidden size and vocabulary, and the soft cap on its logits if it has one."""

    blocks: int
    hidden: int
    vocabulary: int
    softcap: float | None


def stock_config(source: Source) -> Any:
    """The source's configuration as its stock class reads it, defaults filled in. OpenError where it cannot."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.directory, trust_remote_code=False)
    except Exception as error:  # a damaged configuration fails in as many ways as there are fields
        raise OpenError(f"the config.json of {source.name} is damaged ({_first_line(error)}). Restore it.") from None


def stock_classes(source: Source) -> tuple[type, type]:
    """The stock configuration class and ...ForConditionalGeneration class of a source."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config_class = type(stock_config(source))
    return config_class, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]


def read_sizes(source: Source) -> Sizes:
    """Read from the configuration class, since a config.json leaves out what is usual."""
    text = stock_config(source).get_text_config(decoder=True)
    sizes = (text.num_hidden_layers, text.hidden_size, text.vocab_size)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise OpenError(f"the config.json of {source.name} has sizes that are none: {sizes}. Restore it.")
    return Sizes(*sizes, getattr(text, "final_logit_softcapping", None))


def running(source: Source, dtype: str, device: str) -> tuple[str, str]:
    """The dtype and device to run in; `auto` spreads a model over all there are where one device has no room for it."""
    import torch

    if dtype == "auto":
        stored = source.config.get("dtype") or source.config.get("torch_dtype")
        dtype = str(stored) if str(stored) in ("float32", "bfloat16", "float16") else "float32"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        device = device if fits(source, dtype, device) else SPREAD
    try:
        if device != SPREAD:
            torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OpenError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}).") from None
    return dtype, device


def load_model(source: Source, *, dtype: str, device: str) -> Any:
    """The stock model, evaluated, on `device`, or for SPREAD over all devices there are, and memory for what is left.

    OpenError where weights are missing, unexpected or NaN.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            source.directory,
            dtype=_dtype(dtype),
            device_map="auto" if device == SPREAD else device,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:  # damage, a quantization without its package, memory: each fails in its own way
        raise OpenError(f"{source.name} could not be loaded ({_first_line(error)}).") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            first = sorted(str(key) for key in info[problem])[0]
            raise OpenError(
                f"{source.name} has {len(info[problem])} {problem.replace('_', ' ')} ({first}). "
                "The files do not belong together: restore them from their source."
            )
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter).all():  # what was offloaded is read as it is used
            raise OpenError(f"{source.name} has NaN or infinity in {name}. Restore the weights from their source.")
    return model.eval()


def head_weight(model: Any) -> Any:
    """The weights of a model's head, (vocabulary, hidden), float32 in numpy, even where they lie on disk."""
    from accelerate.utils import align_module_device

    head = model.get_output_embeddings()
    with align_module_device(head, "cpu"):
        return head.weight.detach().float().numpy()


def entrance(model: Any) -> Any:
    """The device that inputs go to. What lies on disk has none of its own, and runs where the rest does."""
    import torch

    kinds = (parameter.device for parameter in model.parameters())
    return next((device for device in kinds if device.type != "meta"), torch.device("cpu"))


def place(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Move inputs to the model's device, pictures to its dtype."""
    device = entrance(model)
    return {
        name: value.to(device, model.dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
    }


def load_processor(source: Source) -> Any:
    """The stock processor, padding on the left, as generation wants it. OpenError where it cannot write a prompt."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source.directory, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer fails in as many ways as it has parts
        raise OpenError(f"{source.name} has no usable processor ({_first_line(error)}).") from None
    if not hasattr(processor, "image_processor") or getattr(processor, "chat_template", None) is None:
        raise OpenError(f"{source.name} has no image processor or no chat template, so its prompts cannot be written.")
    processor.tokenizer.padding_side = "left"
    chat = [{"role": "user", "content": [{"type": "text", "text": "a question"}]}]
    try:
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = processor.tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # a template is a program, and fails like one
        raise OpenError(f"the chat template of {source.name} does not work ({_first_line(error)}).") from None
    ends = read_object(source.directory / "generation_config.json").get("eos_token_id")
    if not ids or (processor.tokenizer.eos_token_id is None and ends in (None, [])):
        raise OpenError(f"{source.name} has a tokenizer without an end of sequence, or one that writes no prompt.")
    return processor


@contextmanager
def skeleton(source: Source) -> Iterator[Any]:
    """The stock model with fake weights: shapes alone, no memory. Runs only within the context."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers.initialization import no_init_weights

    _, model_class = stock_classes(source)
    config = stock_config(source)
    _check_depth(source, config)
    with FakeTensorMode():
        try:
            with no_init_weights():
                model = model_class(config).eval()
        except Exception as error:  # sizes that contradict each other fail wherever they meet first
            raise OpenError(f"the config.json of {source.name} describes no model ({_first_line(error)}).") from None
        _check_tensors(source, model)
        yield model


def _check_depth(source: Source, config: Any) -> None:
    """Raise OpenError where there are fewer tensors than blocks: building what a wrong number asks for never ends."""
    held = sum(len(shard.keys) for shard in source.shards)
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for name in ("num_hidden_layers", "depth", "num_layers"):
            count = getattr(part, name, None)
            if isinstance(count, int) and count > held:
                raise OpenError(
                    f"the config.json of {source.name} says {name}: {count}, and its shards hold {held} tensors in "
                    "all. The files do not belong together: restore them from their source."
                )


def _check_tensors(source: Source, model: Any) -> None:
    """Raise OpenError where the shards lack a tensor that the model needs, or have it in another shape.

    Names are mapped as on loading. What a mapping would merge or split is compared by name alone.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    transforms = get_model_conversion_mapping(model)
    held: dict[str, tuple[int, ...] | None] = {}
    for shard in source.shards:
        for name, shape in zip(shard.keys, shard.shapes, strict=True):
            if name.startswith("sasa."):
                raise OpenError(f"{shard.path} has a tensor {name}, which is a guard's. Give an unguarded model.")
            whole = True
            for transform in transforms:
                name, pattern = transform.rename_source_key(name)
                whole = whole and (pattern is None or isinstance(transform, WeightRenaming))
            held[name] = shape if whole else None
    tied = model.all_tied_weights_keys
    wanted = dict(model.named_parameters())
    missing = sorted(name for name in wanted if name not in held and tied.get(name, name) not in held)
    if missing:
        raise OpenError(
            f"the shards of {source.name} lack {len(missing)} tensors of the model ({missing[0]}). "
            "Restore the files from their source."
        )
    for name, tensor in wanted.items():
        found = held.get(name)
        if found is not None and found != tuple(tensor.shape):
            raise OpenError(
                f"{name} in the shards of {source.name} has shape {found}, and its config.json says "
                f"{tuple(tensor.shape)}. The files do not belong together: restore them from their source."
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)
