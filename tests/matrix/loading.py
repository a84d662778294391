"""Rows on how a guarded model is loaded, kept and called: types, quantized weights, adapters, devices, engines."""

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText, QuantoConfig, TorchAoConfig

from matrix.bench import TOKENS, Bench, Check, Inputs, generate, generating, raises
from matrix.rows import FAMILIES, LOUD, THREE, enter

LOADING = "Loading and types"
Models = tuple[Any, Any]


def load(bench: Bench, **options: Any) -> Models:
    """The guarded and the original model, loaded anew in one way."""
    places = bench.guarded.directory, bench.stock.name_or_path
    loaded = [
        AutoModelForImageTextToText.from_pretrained(place, trust_remote_code=True, **copy.deepcopy(options)).eval()
        for place in places
    ]
    return loaded[0], loaded[1]


def copied(bench: Bench, change: Callable[[Any], Any] = lambda model: model) -> Models:
    """Copies of both models with the same done to them."""
    model, stock = (change(copy.deepcopy(one)) for one in (bench.model, bench.stock))
    return model, stock


def treated(models: Callable[[Bench], Models]) -> Check:
    """Both verdicts beside an original that was treated alike; the probe keeps its type and every bit."""

    def check(bench: Bench) -> None:
        model, stock = models(bench)
        for kept, tensor in zip(model.sasa.probe.parameters(), bench.model.sasa.probe.parameters(), strict=True):
            assert kept.is_meta or (kept.dtype == torch.float32 and torch.equal(kept.cpu(), tensor))
        inputs = {
            name: value.to(stock.dtype) if value.is_floating_point() else value for name, value in bench.mixed.items()
        }
        bench.check(generating(), [inputs], models=(model, stock))

    return check


enter(
    LOADING,
    {"loaded in bfloat16": treated(lambda bench: load(bench, dtype=torch.bfloat16))},
    on=(*FAMILIES, "smol-llava"),
)
enter(LOADING, {
    "loaded in float16": treated(lambda bench: load(bench, dtype=torch.float16)),
    "eager attention": treated(lambda bench: load(bench, attn_implementation="eager")),
}, on=THREE)  # fmt: skip
enter(LOADING, {
    "cast to bfloat16 and back": treated(lambda bench: copied(bench, lambda model: model.bfloat16().float())),
    "a copy in train mode": treated(lambda bench: copied(bench, lambda model: model.train())),
})  # fmt: skip


def saved(bench: Bench) -> Models:
    with tempfile.TemporaryDirectory() as scratch:
        bench.model.save_pretrained(scratch)
        return AutoModelForImageTextToText.from_pretrained(scratch, trust_remote_code=True).eval(), bench.stock


enter(LOADING, {"save_pretrained and load again": treated(saved)}, on=THREE)


def long_refusal(tokens: int) -> Check:
    """How far the refusal is, is kept in the cache's type, and bfloat16 counts to 256."""

    def check(bench: Bench) -> None:
        model, _ = copied(bench, lambda model: model.bfloat16())
        words = (bench.guarded.refusal[:-1] * tokens)[: tokens - 1]
        model.config.sasa |= {"refusal_token_ids": [*words, bench.guarded.refusal[-1]], "threshold": 1e-6}
        said = generate(model, bench.singles[0], max_new_tokens=tokens + 2)
        assert said[0].tolist() == model.config.sasa["refusal_token_ids"]

    return check


enter(LOADING, {"the longest refusal, in bfloat16": torch.no_grad()(long_refusal(250))})


# --------------------------------------------------------------- quantized weights, adapters, devices: slow


def torchao(bench: Bench) -> Models:
    kinds = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    return load(bench, quantization_config=TorchAoConfig(kinds.Int8WeightOnlyConfig()))


def adapted(model: Any) -> Any:
    """The model with a LoRA adapter of random weights on its blocks."""
    import peft

    targets = r".*language_model\.layers\..*(q_proj|v_proj|up_proj)"
    torch.manual_seed(3)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model.eval()


def on_disk(bench: Bench) -> Models:
    """Half of the blocks on disk."""
    parts = [f"model.{part}" for part in ("vision_tower", "multi_modal_projector")]
    parts += [f"model.language_model.{part}" for part in ("embed_tokens", "norm", "rotary_emb")]
    places = dict.fromkeys([*parts, "lm_head", "sasa"], "cpu")
    places |= {f"model.language_model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(6)}
    model = AutoModelForImageTextToText.from_pretrained(
        bench.guarded.directory, trust_remote_code=True, device_map=places, offload_folder=tempfile.mkdtemp()
    )
    assert model.model.language_model.layers[3].mlp.up_proj.weight.is_meta
    return model.eval(), bench.stock


def all_on_disk(bench: Bench) -> Models:
    model = accelerate.disk_offload(
        copy.deepcopy(bench.model), tempfile.mkdtemp(), execution_device=torch.device("cpu")
    )
    assert model.sasa.probe.weight.is_meta
    return model, bench.stock


def compiled(bench: Bench) -> None:
    torch._dynamo.reset()
    model = copy.deepcopy(bench.model)
    model.forward = torch.compile(model.forward, backend="eager")
    bench.check(generating(max_new_tokens=3), [bench.batch()], models=(model, bench.stock))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"


enter(LOADING, {
    "weights in int8 (torchao)": treated(torchao),
    "weights in int8 (optimum-quanto)": treated(
        lambda bench: load(bench, quantization_config=QuantoConfig(weights="int8"))),
    "a LoRA adapter": treated(lambda bench: copied(bench, adapted)),
    "device_map with blocks on disk": treated(on_disk),
    "all of it on disk (accelerate.disk_offload)": treated(all_on_disk),
    "torch.compile of the forward pass, eager backend": compiled,
}, slow=True)  # fmt: skip

TWO_PROCESSES = """
import json, sys
import torch
import torch.distributed as distributed
from transformers import AutoModelForImageTextToText
torch.set_num_threads(1)
distributed.init_process_group("gloo")
stock, guarded, prompts, threshold, tokens = json.loads(sys.argv[1])
inputs = torch.load(prompts)
found = []
for directory in (stock, guarded):
    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True, tp_plan="auto").eval()
    weight = model.model.language_model.layers[3].mlp.up_proj.weight
    assert weight.to_local().shape[0] * 2 == weight.shape[0], "the weights are not split"
    if directory == guarded:
        model.config.sasa["threshold"] = threshold
    with torch.no_grad():
        found.append(model.generate(**inputs, max_new_tokens=tokens)[:, inputs["input_ids"].shape[1]:].tolist())
if distributed.get_rank() == 0:
    print(json.dumps(found))
distributed.destroy_process_group()
"""


def two_processes(bench: Bench) -> None:
    inputs, scratch = bench.mixed, Path(tempfile.mkdtemp())
    scores = bench.guarded.expected(inputs)  # (rows,)
    (threshold,) = bench.thresholds(scores)
    (scratch / "script.py").write_text(TWO_PROCESSES, encoding="utf-8")
    torch.save(inputs, scratch / "prompts.pt")
    job = [bench.stock.name_or_path, str(bench.guarded.directory), str(scratch / "prompts.pt"), threshold, TOKENS]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, str(scratch / "script.py"), json.dumps(job)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": f"{scratch}/modules"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    expected, found = (torch.tensor(said) for said in json.loads(result.stdout.strip().splitlines()[-1]))
    bench.compare(found, expected, scores >= threshold)


enter(LOADING, {"tensor parallel over two processes (gloo)": two_processes}, slow=True)

# ---------------------------------------------------------------------------------- calls of the forward pass

CALLS = "Calls of the forward pass"


def forward(**options: Any) -> Check:
    """Allowed rows have the original's logits to the bit, refused rows those of the refusal's first token."""

    @torch.no_grad()
    def check(bench: Bench) -> None:
        inputs = bench.batch(images=True, side="right")
        scores = bench.guarded.expected(inputs)  # (rows,)
        (threshold,) = bench.thresholds(scores)
        refused = scores >= threshold
        expected = bench.stock(**inputs, **options)[0]  # (rows, kept, vocabulary)
        with bench.threshold(threshold):
            found = bench.model(**inputs, **options)[0]
        assert torch.equal(found[~refused], expected[~refused])
        assert (found[refused, -1].argmax(-1) == bench.guarded.refusal[0]).all()

    return check


enter(CALLS, {
    "logits_to_keep 1": forward(logits_to_keep=1),
    "logits_to_keep 3": forward(logits_to_keep=3),
    "logits_to_keep, a list of positions": forward(logits_to_keep=torch.tensor([0, -1])),
    "output_hidden_states": forward(output_hidden_states=True),
    "return_dict off, no cache": forward(return_dict=False, use_cache=False),
})  # fmt: skip

# ------------------------------------------------------------------------------------------ loud errors


def packed(bench: Bench, model: Any) -> Tensor:
    ids = torch.cat([bench.batch(count=1, seed=seed)["input_ids"] for seed in (1, 2)], dim=1)  # (1, tokens)
    return model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 9, ids.shape[1]])).logits


def paged_attention(bench: Bench, model: Any) -> Tensor:
    twin = copy.deepcopy(model)
    twin.config._attn_implementation = "paged|sdpa"
    return twin(**bench.singles[0]).logits


enter(CALLS, {
    "prompts packed into one row (cu_seq_lens_q)": raises(packed, "packed"),
    "paged attention": raises(paged_attention, "packed"),
}, harmful=LOUD)  # fmt: skip
enter(LOADING, {
    "the family's own class": raises(
        lambda bench, model: getattr(transformers, type(bench.stock).__name__).from_pretrained(bench.guarded.directory),
        "SASA", Exception),
    "without trust_remote_code": raises(
        lambda bench, model: AutoModelForImageTextToText.from_pretrained(
            bench.guarded.directory, trust_remote_code=False),
        "trust_remote_code", Exception),
}, on=THREE, harmful=LOUD)  # fmt: skip
