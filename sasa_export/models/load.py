"""Load a source's stock model and processor, onto devices with enough memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from accelerate.utils import align_module_device

from sasa_export.errors import OpenError, reworded
from sasa_export.models import Source

CGROUP = Path("/sys/fs/cgroup")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATES = 1.2  # needed memory, as a multiple of the weights: leaves room for hidden states
RESTORE = "The files do not belong together: restore them from their source."
SPREAD = "spread"  # over all devices, for a model that is too large for one


@dataclass(frozen=True)
class Sizes:
    """The decoder's number of blocks, hidden size, vocabulary size, and the soft cap on its logits if it has one."""

    blocks: int
    hidden: int
    vocabulary: int
    softcap: float | None


def stock_config(source: Source) -> Any:
    """Return the configuration as its stock class reads it, with defaults. Raise OpenError where it is damaged."""
    with explained(f"the config.json of {source.name} is damaged"):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(source.directory, trust_remote_code=False)


def stock_classes(source: Source) -> tuple[type, type]:
    """Return the stock configuration class and the ...ForConditionalGeneration class of a source."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config_class = type(stock_config(source))
    return config_class, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]


def read_sizes(source: Source) -> Sizes:
    """Read the sizes from the configuration class, because config.json leaves out default values."""
    text = stock_config(source).get_text_config(decoder=True)
    softcap = getattr(text, "final_logit_softcapping", None)
    return Sizes(text.num_hidden_layers, text.hidden_size, text.vocab_size, softcap)


def running(source: Source, dtype: str, device: str) -> tuple[str, str]:
    """Return the dtype and device to run in. Where one device is too small for the model, `auto` means SPREAD.

    Raises OpenError where the device cannot be used.
    """
    if dtype == "auto":
        stored = str(source.config.get("dtype") or source.config.get("torch_dtype"))
        dtype = stored if stored in BYTES else "float32"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        device = device if fits(source, dtype, device) else SPREAD
    if device != SPREAD:
        with explained(f"--device {device} cannot be used here"):
            torch.zeros(1, device=device)
    return dtype, device


def available_memory() -> int:
    """Return the bytes that this process may still allocate, within the limit of its container if it has one."""
    free = int(psutil.virtual_memory().available)
    try:
        most, used = int((CGROUP / "memory.max").read_text()), int((CGROUP / "memory.current").read_text())
        files = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return min(free, most - used + int(files["inactive_file"]) + int(files["active_file"]))
    except (OSError, ValueError, KeyError):  # no limit, or no cgroup v2
        return free


def fits(source: Source, dtype: str, device: str) -> bool:
    """Return whether weights of this dtype, and the hidden states, fit into one device's free memory."""
    needed = STATES * BYTES[dtype] * sum(prod(shape) for shard in source.shards for shape in shard.shapes)
    free = torch.cuda.mem_get_info()[0] if device.startswith("cuda") else available_memory()
    return needed <= free


def load_model(source: Source, *, dtype: str, device: str) -> Any:
    """Return the stock model in evaluation mode, on `device`. SPREAD fills all devices, and memory with the rest.

    Raises OpenError where weights are missing, unexpected, of another shape, NaN or infinite.
    """
    from transformers import AutoModelForImageTextToText

    with explained(f"{source.name} could not be loaded"):
        model, info = AutoModelForImageTextToText.from_pretrained(
            source.directory,
            dtype=dtype,
            device_map="auto" if device == SPREAD else device,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_loaded` reports them
            trust_remote_code=False,
            use_safetensors=True,
        )
    check_loaded(source, info)
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not _finite(parameter):  # offloaded weights are read on use
            raise OpenError(f"{source.name} has NaN or infinity in {name}. Restore the weights from their source.")
    return model.eval()


def check_loaded(source: Source, info: dict[str, Any]) -> None:
    """Raise OpenError where transformers found missing, unexpected or mismatched tensors in the shards."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(info.get(problem) or ()):
            first = keys[0]
            if problem == "mismatched_keys":
                name, held, wanted = first
                first = f"{name}, {tuple(held)} in the shards and {tuple(wanted)} by config.json"
            raise OpenError(f"{source.name} has {len(keys)} {problem.replace('_', ' ')} ({first}). {RESTORE}")


def _finite(tensor: Any) -> bool:
    """Return whether all numbers are finite. torchao stores a tensor in parts; torch cannot test 8-bit floats."""
    if hasattr(tensor, "__tensor_flatten__"):
        return all(_finite(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    narrow = tensor.is_floating_point() and tensor.itemsize == 1
    return bool(torch.isfinite(tensor.float() if narrow else tensor).all())


def head_weight(model: Any) -> Any:
    """Return the weights of a model's head, (vocabulary, hidden), as float32 in numpy, even from disk."""
    head = model.get_output_embeddings()
    with align_module_device(head, "cpu"), torch.no_grad():
        weight = getattr(head, "weight", None)
        if type(weight) is torch.nn.Parameter and weight.dtype.itemsize > 1:
            return weight.float().numpy()  # (vocabulary, hidden)
        # Quantized weights have many formats, but every head can be multiplied with the identity.
        return head(torch.eye(head.in_features, dtype=model.dtype, device=model.device)).float().cpu().numpy().T


def place(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return the inputs on the device of the first weight that is not on disk, pictures in the model's dtype."""
    device = next((held.device for held in model.parameters() if not held.is_meta), torch.device("cpu"))
    return {
        name: value.to(device, model.dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
    }


def load_processor(source: Source) -> Any:
    """Return the stock processor, with left padding for generation. Raise OpenError where it cannot write prompts."""
    from transformers import AutoProcessor

    with explained(f"{source.name} has no usable processor"):
        processor = AutoProcessor.from_pretrained(source.directory, trust_remote_code=False)
    if not hasattr(processor, "image_processor") or getattr(processor, "chat_template", None) is None:
        raise OpenError(f"{source.name} has no image processor or no chat template, so its prompts cannot be written.")
    processor.tokenizer.padding_side = "left"
    chat = [{"role": "user", "content": [{"type": "text", "text": "a question"}]}]
    with explained(f"the chat template of {source.name} does not work"):
        processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return processor


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise OpenError for any error of transformers or torch in the block."""
    with reworded(OpenError, f"{what} ({{reason}})."):
        try:
            yield
        except ImportError as error:  # a fault of the installation, not of the model's files
            raise OpenError(
                f"{what}, for want of a package ({' '.join(str(error.__cause__ or error).split())[:300]}). Install it, "
                "or all that models may need: pip install 'sasa-export[video]'"
            ) from None
