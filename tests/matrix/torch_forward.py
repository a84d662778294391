"""Ways to call the forward pass: what it gives out, in which mode, compiled, traced, exported, in threads."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from matrix.bench import EVERY, Bench, Inputs, generate, way
from matrix.outcome import HOLDS, Outcome, row

SECTION = "Calls of the forward pass"
Logits = Callable[[Any, Inputs], Tensor]  # -> (rows, kept, vocabulary), the last column at or behind the prompt's end


def forced(bench: Bench, run: Logits, inputs: Inputs | None = None, *, model: Any = None) -> Outcome:
    """Allowed rows have the stock model's logits to the bit, refused rows those of the refusal's first token."""
    inputs = bench.mixed if inputs is None else inputs
    model = model or bench.model
    value, refused = bench.split(bench.guarded.expected(inputs))
    expected = run(bench.stock, copy.copy(inputs))  # (rows, kept, vocabulary)
    with bench.threshold(value, model):
        found = run(model, copy.copy(inputs))
    assert torch.equal(found[~refused], expected[~refused]), "harmless logits changed"
    assert (found[refused, -1].argmax(-1) == bench.guarded.refusal[0]).all(), "harmful logits are not the refusal's"
    return HOLDS


for name, options in {
    "logits_to_keep 1": {"logits_to_keep": 1},
    "logits_to_keep 3": {"logits_to_keep": 3},
    "logits_to_keep, positions of one's own": {"logits_to_keep": torch.tensor([0, -1])},
    "output_hidden_states": {"output_hidden_states": True},
    "use_cache off": {"use_cache": False},
}.items():
    for side in ("left", "right"):
        row("torch", SECTION, f"{name}, padding on the {side}", EVERY if side == "right" else ("llava",))(
            lambda bench, options=options, side=side: forced(
                bench, lambda model, inputs: model(**inputs, **options).logits, bench.batch(side=side)
            )
        )


@row("torch", SECTION, "return_dict off")
def as_tuple(bench: Bench) -> Outcome:
    return forced(bench, lambda model, inputs: model(**inputs, return_dict=False)[0])


@row("torch", SECTION, "positional arguments")
def positional(bench: Bench) -> Outcome:
    return forced(
        bench,
        lambda model, inputs: model(inputs["input_ids"], None, inputs["attention_mask"]).logits,
        bench.batch(images=False),
    )


@row("torch", SECTION, "inference_mode")
def inference_mode(bench: Bench) -> Outcome:
    @torch.inference_mode()
    def run(model: Any, inputs: Inputs) -> Tensor:
        return generate(model, inputs)

    return bench.mixed_verdicts(run)


@row("torch", SECTION, "train mode")
def train_mode(bench: Bench) -> Outcome:
    model, stock = copy.deepcopy(bench.model).train(), copy.deepcopy(bench.stock).train()
    return bench.mixed_verdicts(way(), model=model, stock=stock)


def checkpointed(bench: Bench) -> tuple[Any, Any]:
    """The patched and the stock model in train mode with gradient checkpointing."""
    both = []
    for model in (bench.model, bench.stock):
        both.append(copy.deepcopy(model).train())
        both[-1].gradient_checkpointing_enable()
    return both[0], both[1]


@row("torch", SECTION, "a training step with gradient checkpointing", EVERY)
def training_step(bench: Bench) -> Outcome:
    """The stock model's loss and gradients; the logits are gated all the same."""
    model, stock = checkpointed(bench)
    inputs = bench.batch(count=3)
    value, refused = bench.split(bench.guarded.expected(inputs))
    with torch.enable_grad(), bench.threshold(value, model):
        found, expected = (one(**inputs, labels=inputs["input_ids"]) for one in (model, stock))
        for output in (found, expected):
            output.loss.backward()
    assert torch.equal(found.loss, expected.loss)
    gradients = dict(stock.named_parameters())
    for name, tensor in model.named_parameters():
        if tensor.grad is not None:
            assert torch.equal(tensor.grad, gradients[name].grad)
    assert model.sasa.probe.weight.grad is None
    assert torch.equal(found.logits[~refused], expected.logits[~refused])
    assert (found.logits[refused, -1].argmax(-1) == bench.guarded.refusal[0]).all()
    return HOLDS


@row("torch", SECTION, "generate in train mode with gradient checkpointing, no cache", EVERY)
def checkpointing(bench: Bench) -> Outcome:
    model, stock = checkpointed(bench)
    return bench.mixed_verdicts(way(use_cache=False), model=model, stock=stock)


@row("torch", SECTION, "generate in train mode with gradient checkpointing")
def checkpointing_cache(bench: Bench) -> Outcome:
    model, _ = checkpointed(bench)
    return bench.loud(lambda: generate(model, bench.mixed), "checkpointing")


@row("torch", SECTION, "scoring a given answer")
def scoring(bench: Bench) -> Outcome:
    """Teacher forcing: every position of a refused row's answer is forced, so its likelihood tells nothing."""
    prompt = bench.one()
    end = prompt["input_ids"].shape[1]
    whole = bench.of_ids([*prompt["input_ids"][0].tolist(), 70, 71, 72, 73])
    score = float(bench.guarded.expected(prompt))
    expected = bench.stock(**whole).logits
    with bench.threshold(score + 1e-3):
        assert torch.equal(bench.model(**whole).logits, expected)
    with bench.threshold(score - 1e-3):
        found = bench.model(**whole).logits[0, end - 1 :].argmax(-1)  # (answer,)
    assert set(found.tolist()) <= set(bench.guarded.refusal)
    return HOLDS


@row("torch", SECTION, "torch.compile, eager backend, in generate")
def compiled(bench: Bench) -> Outcome:
    torch._dynamo.reset()
    model = copy.deepcopy(bench.model)
    model.forward = torch.compile(model.forward, backend="eager")
    found = bench.mixed_verdicts(way(max_new_tokens=3), bench.batch(images=False), model=model)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
    return found


@row("torch", SECTION, "torch.compile into one graph (fullgraph)")
def one_graph(bench: Bench) -> Outcome:
    torch._dynamo.reset()
    fast = torch.compile(copy.deepcopy(bench.model), backend="eager", fullgraph=True)
    return bench.loud(lambda: fast(**bench.batch(images=False)), ".", kind=Exception)


@row("torch", SECTION, "torch.export")
def exported(bench: Bench) -> Outcome:
    inputs = {**bench.batch(images=False), "use_cache": False}
    torch.export.export(bench.stock, (), inputs, strict=False)  # the stock model can
    return bench.loud(lambda: torch.export.export(bench.model, (), inputs, strict=False), ".", kind=Exception)


@row("torch", SECTION, "torch.jit.trace of a prompt")
def traced(bench: Bench) -> Outcome:
    inputs, other = bench.batch(images=False), bench.batch(images=False, seed=3)

    class Plain(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def fed(model: Any, inputs: Inputs) -> Tensor:
        graph = torch.jit.trace(Plain(model), (other["input_ids"], other["attention_mask"]), check_trace=False)
        return graph(inputs["input_ids"], inputs["attention_mask"])

    fed(bench.stock, inputs)  # the stock model can
    return bench.loud(lambda: fed(bench.model, inputs), ".", kind=Exception)


@row("torch", SECTION, "nn.DataParallel")
def data_parallel(bench: Bench) -> Outcome:
    return forced(bench, lambda model, inputs: nn.DataParallel(model)(**inputs).logits)


@row("torch", SECTION, "two threads at once on one model")
def threads(bench: Bench) -> Outcome:
    batches = [bench.batch(seed=seed) for seed in (1, 3)]
    value, _ = bench.split(bench.guarded.expected(batches[0]))
    expected = [generate(bench.stock, inputs) for inputs in batches]
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def serve(index: int) -> None:
        with torch.no_grad():
            found[index] += [generate(bench.model, batches[index]) for _ in range(2)]

    with bench.threshold(value):
        workers = [threading.Thread(target=serve, args=(index,)) for index in found]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for index, inputs in enumerate(batches):
        refused = bench.guarded.expected(inputs) >= value  # (rows,)
        assert len(found[index]) == 2
        for said in found[index]:
            bench.unchanged(said, expected[index], refused)
            if refused.any():
                bench.refused(said, refused)
    return HOLDS
