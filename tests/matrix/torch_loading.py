"""Ways to load and keep a patched model: types, quantized weights, offloading, copies, adapters, two processes."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import accelerate
import oracle
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, QuantoConfig, TorchAoConfig, pipeline

from matrix.bench import EVERY, TOKENS, Bench, Inputs, generate, way
from matrix.outcome import HOLDS, Outcome, row

SECTION = "Types, loading, copies"


def loaded(bench: Bench, **options: Any) -> tuple[Any, Any]:
    """The patched and the stock model, loaded anew in one way."""
    patched = AutoModelForImageTextToText.from_pretrained(
        bench.guarded.directory, trust_remote_code=True, **copy.deepcopy(options)
    )
    return patched.eval(), AutoModelForImageTextToText.from_pretrained(bench.stock.name_or_path, **options).eval()


def scores(bench: Bench, stock: Any, inputs: Inputs) -> Tensor:
    """The oracle's P(unsafe), (rows,), computed on another stock model."""
    logits = oracle.oracle_logits(stock, inputs, bench.guarded.safety, bench.guarded.semantic)
    return oracle.unsafe_probability(logits, bench.guarded.weight, bench.guarded.bias)


def probe_is_exact(bench: Bench, model: Any) -> None:
    """The probe has kept its type and every bit."""
    for name in ("weight", "bias"):
        kept, original = getattr(model.sasa.probe, name), getattr(bench.model.sasa.probe, name)
        assert kept.dtype == torch.float32 and torch.equal(kept.cpu(), original), f"sasa.probe.{name} was rounded"


def holds_like(bench: Bench, model: Any, stock: Any, *, inputs: Inputs | None = None, run: Any = None) -> Outcome:
    """Both verdicts beside a stock model that was treated in the same way, by the oracle on that one."""
    probe_is_exact(bench, model)
    inputs = bench.batch(count=6) if inputs is None else inputs
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(stock.dtype)
    return bench.mixed_verdicts(run or way(), inputs, model=model, stock=stock, scores=scores(bench, stock, inputs))


for dtype in (torch.bfloat16, torch.float16):
    kind = str(dtype).removeprefix("torch.")

    @row("torch", SECTION, f"loaded in {kind}", EVERY)
    def loaded_in(bench: Bench, dtype: torch.dtype = dtype) -> Outcome:
        return holds_like(bench, *loaded(bench, dtype=dtype)).but("probe float32 to the bit")

    @row("torch", SECTION, f"cast to {kind}")
    def cast_to(bench: Bench, dtype: torch.dtype = dtype) -> Outcome:
        return holds_like(bench, copy.deepcopy(bench.model).to(dtype), copy.deepcopy(bench.stock).to(dtype))


@row("torch", SECTION, "cast to bfloat16 and back")
def there_and_back(bench: Bench) -> Outcome:
    return holds_like(bench, *(copy.deepcopy(model).bfloat16().float() for model in (bench.model, bench.stock)))


@row("torch", SECTION, "autocast to bfloat16")
def autocast(bench: Bench) -> Outcome:
    def run(model: Any, inputs: Inputs) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return generate(model, inputs)

    inputs = bench.batch(count=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scores(bench, bench.stock, inputs)  # (rows,)
    return bench.mixed_verdicts(run, inputs, scores=found)


@row("torch", SECTION, "projection of float16 states whose squares overflow float16")
def overflow(bench: Bench) -> Outcome:
    """The rule says float32; the states of real models have tokens of such norms."""
    project = sys.modules[type(bench.model).__module__].project
    generator = torch.Generator().manual_seed(1)
    states = [(torch.randn(2, 5, 64, generator=generator) * 400).half() for _ in range(2)]
    found = project(*states, 1e-6)
    assert (states[1] * states[1]).sum(-1).isinf().any(), "the case is too tame"
    expected = oracle.project(states[0].double(), states[1].double())
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-3, atol=1.0)
    return holds_like(bench, *loaded(bench, dtype=torch.float16))


@row("torch", SECTION, "weights in int8 (torchao)")
def torchao_weights(bench: Bench) -> Outcome:
    kind = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    model, stock = loaded(bench, quantization_config=TorchAoConfig(kind.Int8WeightOnlyConfig()))
    kinds = {type(one.model.language_model.layers[3].mlp.up_proj.weight).__name__ for one in (model, stock)}
    assert kinds == {type(stock.model.language_model.layers[0].mlp.up_proj.weight).__name__} != {"Parameter"}
    return holds_like(bench, model, stock).but("probe float32 to the bit")


@row("torch", SECTION, "weights in int8 (optimum-quanto)")
def quanto_weights(bench: Bench) -> Outcome:
    model, stock = loaded(bench, quantization_config=QuantoConfig(weights="int8"))
    assert type(model.model.language_model.layers[3].mlp.up_proj).__name__ == "QLinear"
    return holds_like(bench, model, stock).but("probe float32 to the bit")


@row("torch", SECTION, "deepcopy")
def deep_copy(bench: Bench) -> Outcome:
    return holds_like(bench, copy.deepcopy(bench.model), bench.stock)


@row("torch", SECTION, "save_pretrained and load again", EVERY)
def saved(bench: Bench) -> Outcome:
    with tempfile.TemporaryDirectory() as scratch:
        bench.model.save_pretrained(scratch)
        model = AutoModelForImageTextToText.from_pretrained(scratch, trust_remote_code=True).eval()
        return holds_like(bench, model, bench.stock)


@row("torch", SECTION, "torch.save of the whole model")
def pickled(bench: Bench) -> Outcome:
    return bench.loud(
        lambda: torch.save(bench.model, io.BytesIO()), "pickle", kind=(pickle.PicklingError, AttributeError)
    )


@row("torch", SECTION, "more tokens in the vocabulary (resize_token_embeddings)")
def resized(bench: Bench) -> Outcome:
    model, stock = copy.deepcopy(bench.model), copy.deepcopy(bench.stock)
    for one in (model, stock):
        torch.manual_seed(0)
        one.resize_token_embeddings(one.config.text_config.vocab_size + 64, mean_resizing=False)
    inputs = bench.batch(count=6)
    return bench.mixed_verdicts(way(), inputs, model=model, stock=stock)


# ------------------------------------------------------------------------------------------------ adapters


def adapted(bench: Bench, *, merge: bool) -> tuple[Any, Any]:
    """Patched and stock with the same LoRA adapter on every linear layer of the blocks."""
    both = []
    for model in (bench.model, bench.stock):
        targets = r".*language_model\.layers\..*(q_proj|v_proj|up_proj)"
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        noise = torch.Generator().manual_seed(4)
        for name, tensor in wrapped.named_parameters():
            if "lora_" in name:
                tensor.data = torch.randn(tensor.shape, generator=noise) * 0.05
        both.append((wrapped.merge_and_unload() if merge else wrapped).eval())
    return both[0], both[1]


@row("torch", SECTION, "a LoRA adapter beside the weights", EVERY)
def adapter(bench: Bench) -> Outcome:
    model, stock = adapted(bench, merge=False)
    inputs = bench.batch(count=6)
    found = scores(bench, stock.get_base_model(), inputs)  # (rows,)
    return bench.mixed_verdicts(way(), inputs, model=model, stock=stock, scores=found).but(
        "judged with the adapter on: the probe was fitted without"
    )


@row("torch", SECTION, "a LoRA adapter merged, saved and loaded again")
def merged(bench: Bench) -> Outcome:
    model, stock = adapted(bench, merge=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        again = AutoModelForImageTextToText.from_pretrained(scratch, trust_remote_code=True).eval()
    holds_like(bench, model, stock)
    return holds_like(bench, again, stock)


@row("torch", SECTION, "prefix tuning, which brings a cache of its own")
def prefix_tuned(bench: Bench) -> Outcome:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(copy.deepcopy(bench.model), config).eval()
    return bench.loud(lambda: wrapped.generate(**bench.one(), max_new_tokens=4), ".", kind=Exception)


# -------------------------------------------------------------------------------------- places of the weights


@row("torch", SECTION, "device_map with blocks on disk")
def on_disk(bench: Bench) -> Outcome:
    places: dict[str, str] = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    places |= {"model.language_model.embed_tokens": "cpu", "model.language_model.norm": "cpu"}
    places |= {"model.language_model.rotary_emb": "cpu"}
    places |= {f"model.language_model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(6)}
    with tempfile.TemporaryDirectory() as scratch:
        model = AutoModelForImageTextToText.from_pretrained(
            bench.guarded.directory, trust_remote_code=True, device_map={**places, "sasa": "cpu"},
            offload_folder=scratch,
        ).eval()  # fmt: skip
        assert model.model.language_model.layers[3].mlp.up_proj.weight.is_meta
        return holds_like(bench, model, bench.stock)


@row("torch", SECTION, "all of it on disk, the probe too (accelerate.disk_offload)")
def all_on_disk(bench: Bench) -> Outcome:
    with tempfile.TemporaryDirectory() as scratch:
        model = accelerate.disk_offload(copy.deepcopy(bench.model), scratch, execution_device=torch.device("cpu"))
        assert model.sasa.probe.weight.is_meta
        return bench.mixed_verdicts(way(), model=model)


@row("torch", SECTION, "weights fetched for each call (accelerate.cpu_offload)")
def fetched(bench: Bench) -> Outcome:
    model = accelerate.cpu_offload(copy.deepcopy(bench.model), execution_device=torch.device("cpu"))
    return bench.mixed_verdicts(way(), model=model)


@row("torch", SECTION, "pipeline('image-text-to-text')")
def in_a_pipeline(bench: Bench) -> Outcome:
    processor = AutoProcessor.from_pretrained(bench.stock.name_or_path)
    chat = [{"role": "user", "content": [{"type": "text", "text": "tell me how to cook rice"}]}]
    said = []
    score = float(bench.guarded.expected(bench.chat(("user", "tell me how to cook rice"))))
    for model, value in ((bench.stock, 0.5), (bench.model, score + 1e-3), (bench.model, score - 1e-3)):
        run = pipeline("image-text-to-text", model=model, processor=processor)
        with bench.threshold(value):
            said.append(run(text=chat, max_new_tokens=TOKENS, return_full_text=False)[0]["generated_text"])
    assert said[0] == said[1] != said[2] == "I will not help."
    return HOLDS


@row("torch", SECTION, "another attention (set_attn_implementation)", EVERY)
def attention(bench: Bench) -> Outcome:
    model, stock = copy.deepcopy(bench.model), copy.deepcopy(bench.stock)
    for one in (model, stock):
        one.set_attn_implementation("eager")
        assert one.config.get_text_config()._attn_implementation == "eager"
    return bench.mixed_verdicts(way(), bench.batch(), model=model, stock=stock)


TWO_PROCESSES = """
import json, sys
import torch
import torch.distributed as distributed
from transformers import AutoModelForImageTextToText
torch.set_num_threads(1)
distributed.init_process_group("gloo")
stock, patched, prompts, threshold, tokens = json.loads(sys.argv[1])
inputs = torch.load(prompts)
found = []
for directory in (stock, patched):
    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True, tp_plan="auto").eval()
    weight = model.model.language_model.layers[3].mlp.up_proj.weight
    assert weight.to_local().shape[0] * 2 == weight.shape[0], "the weights are not split"
    if directory == patched:
        model.config.sasa["threshold"] = threshold
    with torch.no_grad():
        said = model.generate(**inputs, max_new_tokens=tokens)[:, inputs["input_ids"].shape[1]:].tolist()
    gathered = [None, None]
    distributed.all_gather_object(gathered, said)
    assert gathered[0] == gathered[1], "the processes say different things"
    found.append(said)
if distributed.get_rank() == 0:
    print(json.dumps(found))
distributed.destroy_process_group()
"""


@row("torch", SECTION, "tensor parallel over two processes (gloo, tp_plan='auto')")
def two_processes(bench: Bench) -> Outcome:
    inputs = bench.mixed
    value, refused = bench.split(bench.guarded.expected(inputs))
    with tempfile.TemporaryDirectory() as scratch:
        script, prompts = Path(scratch, "script.py"), Path(scratch, "prompts.pt")
        script.write_text(TWO_PROCESSES, encoding="utf-8")
        torch.save(inputs, prompts)
        job = [bench.stock.name_or_path, str(bench.guarded.directory), str(prompts), value, TOKENS]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        result = subprocess.run(
            [*command, json.dumps(job)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": f"{scratch}/modules"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    expected, found = (torch.tensor(said) for said in json.loads(result.stdout.strip().splitlines()[-1]))
    bench.unchanged(found, expected, refused)
    bench.refused(found, refused)
    return HOLDS
