"""Rows on how a guarded model is loaded and copied, and what it does not run in."""

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForImageTextToText, QuantoConfig, TorchAoConfig

from matrix.bench import Bench, Inputs, generate, generating, single
from matrix.rows import LOUD, REST, SMOL, THREE, Check, enter, enter_checks

LOADING = "Loading and types"
Models = tuple[Any, Any]  # the guarded one and the original


def loaded(**options: Any) -> Callable[[Bench], Models]:
    """Both loaded anew in one way."""

    def models(bench: Bench) -> Models:
        load = AutoModelForImageTextToText.from_pretrained
        guarded = load(bench.guarded.directory, trust_remote_code=True, **copy.deepcopy(options))
        return guarded.eval(), load(bench.stock.name_or_path, **copy.deepcopy(options)).eval()

    return models


def copied(change: Callable[[Any], Any]) -> Callable[[Bench], Models]:
    """Copies of both with the same done to them."""
    return lambda bench: (change(copy.deepcopy(bench.model)), change(copy.deepcopy(bench.stock)))


def treated(models: Callable[[Bench], Models]) -> Check:
    """Both verdicts beside an original that was treated alike; the probe keeps its type and every bit."""

    def check(bench: Bench) -> None:
        model, stock = models(bench)
        for kept, tensor in zip(model.sasa.probe.parameters(), bench.model.sasa.probe.parameters(), strict=True):
            assert kept.is_meta or (kept.dtype == torch.float32 and torch.equal(kept.cpu(), tensor))
        inputs = bench.batch(images=True)
        inputs["pixel_values"] = inputs["pixel_values"].to(stock.dtype)
        bench.check(generating(), [inputs], models=(model, stock))

    return check


def saved(bench: Bench) -> Models:
    with tempfile.TemporaryDirectory() as scratch:
        bench.model.save_pretrained(scratch)
        return AutoModelForImageTextToText.from_pretrained(scratch, trust_remote_code=True).eval(), bench.stock


enter_checks(LOADING, {"loaded in bfloat16": treated(loaded(dtype=torch.bfloat16))}, on=(*THREE, *REST, *SMOL))
COPIES = {
    "loaded in float16": loaded(dtype=torch.float16),
    "loaded with eager attention": loaded(attn_implementation="eager"),
    "save_pretrained, and loaded again": saved,
    "cast to bfloat16 and back": copied(lambda model: model.bfloat16().float()),
}
enter_checks(LOADING, {name: treated(models) for name, models in COPIES.items()}, on=THREE)


def torchao(bench: Bench) -> Models:
    kinds = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    return loaded(quantization_config=TorchAoConfig(kinds.Int8WeightOnlyConfig()))(bench)


def adapted(model: Any) -> Any:
    """The model with a LoRA adapter of random weights on its blocks, where transformers takes this peft."""
    import peft
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers {transformers.__version__} takes no peft below {MIN_PEFT_VERSION}")
    targets = r".*language_model\.layers\..*(q_proj|v_proj|up_proj)"
    torch.manual_seed(3)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model.eval()


def on_disk(model: Any) -> Any:
    return accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device=torch.device("cpu"))


def compiled(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


SLOW = {
    "weights in int8 (torchao)": torchao,
    "weights in int8 (optimum-quanto)": loaded(quantization_config=QuantoConfig(weights="int8")),
    "a LoRA adapter": copied(adapted),
    "all of it on disk (accelerate.disk_offload)": copied(on_disk),
    # The original as it is: hooks set on a compiled one, by which it says what is right, may not be called.
    "torch.compile of the forward pass": lambda bench: (compiled(copy.deepcopy(bench.model)), bench.stock),
}
enter_checks(LOADING, {name: treated(models) for name, models in SLOW.items()}, slow=True)


@torch.no_grad()
def long_refusal(bench: Bench) -> None:
    """How far the refusal is, the cache keeps in its own type, and bfloat16 counts to 256."""
    model = copy.deepcopy(bench.model).bfloat16()
    model.config.sasa |= {"refusal_token_ids": [*range(100, 349), bench.guarded.refusal[-1]], "threshold": 1e-6}
    said = generate(model, single(bench)[0], max_new_tokens=260)
    assert said[0].tolist() == model.config.sasa["refusal_token_ids"]


enter_checks(LOADING, {"the longest refusal, in bfloat16": long_refusal}, slow=True)


def stock_class(bench: Bench) -> None:
    with pytest.raises(Exception, match="SASA"):
        getattr(transformers, type(bench.stock).__name__).from_pretrained(bench.guarded.directory)


def untrusted(bench: Bench) -> None:
    """In a process of its own, since transformers goes on trusting what it has trusted once."""
    code = "import sys, transformers as t; t.AutoModelForImageTextToText.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", code, str(bench.guarded.directory)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "trust_remote_code" in result.stderr


enter_checks(LOADING, {"the family's own class": stock_class}, on=THREE, harmful=LOUD)
enter_checks(LOADING, {"without trust_remote_code": untrusted}, slow=True, harmful=LOUD)

CALLS = "Prompts packed into one row"


def continuous(bench: Bench, model: Any, inputs: Inputs) -> Tensor:
    found: Tensor = model.generate_batch(inputs=inputs["input_ids"].tolist())
    return found


def packed(bench: Bench, model: Any, inputs: Inputs) -> Tensor:
    found: Tensor = model(input_ids=inputs["input_ids"], cu_seq_lens_q=torch.tensor([0, 5, 9])).logits
    return found


def paged(bench: Bench, model: Any, inputs: Inputs) -> Tensor:
    twin = copy.deepcopy(model)
    twin.config._attn_implementation = "paged|sdpa"
    found: Tensor = twin(**inputs).logits
    return found


PACKED = {"continuous batching": continuous, "cu_seq_lens_q": packed, "paged attention": paged}
enter(CALLS, PACKED, prompts=single, error="packed")
