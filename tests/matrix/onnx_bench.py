"""The bench that onnxruntime's rows work on: an exported directory behind the call of a torch model.

So the loops of `by_hand` drive it as they drive the stock model, which is what its answers are compared with. Its
threshold is written into the graph; the prompts are chosen on both sides of it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx_runner import KINDS, Arrays, Runner
from torch import Tensor, nn

from matrix.bench import MARGIN, Bench, Inputs, Way
from matrix.outcome import NOT_ASKED, REFUSED, UNCHANGED, Outcome
from sasa_export.writers.onnx import SUFFIX


class Past:
    """The arrays of a kept cache, decoder and ledger alike: (rows, heads, tokens, size) each."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def get_seq_length(self) -> int:
        return int(next(iter(self.arrays.values())).shape[2])

    def crop(self, tokens: int) -> None:
        """Drop the last -tokens."""
        length = self.get_seq_length() + tokens
        self.arrays = {name: array[:, :, :length] for name, array in self.arrays.items()}

    def batch_select_indices(self, rows: Tensor) -> None:
        self.arrays = {name: array[rows.numpy()] for name, array in self.arrays.items()}


@dataclass
class Answer:
    """What a call gives, as transformers names it."""

    logits: Tensor  # (rows, 1, vocabulary)
    past_key_values: Past
    unsafe_probability: Tensor | None  # (rows,)

    def get(self, name: str) -> Any:
        return getattr(self, name)


class Graphs(nn.Module):
    """A Runner, called as a model of transformers is.

    Args:
        image_token: the id in whose places the pictures go.
        outputs: those of the decoder to ask for; all by default.
        bound: run by IO binding.
    """

    def __init__(
        self, runner: Runner, image_token: int, *, outputs: Callable[[str], bool] | None = None, bound: bool = False
    ) -> None:
        super().__init__()
        self.runner, self.image_token, self.bound = runner, image_token, bound
        self.names = [name for name in runner.names if outputs is None or outputs(name)]
        self.optional = {value.name for value in runner.decoder.get_overridable_initializers()}

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        return lambda ids: torch.from_numpy(self.runner.embed(ids.numpy()))

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Past | None = None,
        use_cache: bool = True,
        **further: Tensor,
    ) -> Answer:
        embeds = self._embedded(input_ids, further) if inputs_embeds is None else inputs_embeds.numpy()
        rows, tokens = embeds.shape[:2]
        past = self.empty(rows) if past_key_values is None else past_key_values
        assert attention_mask is not None and position_ids is not None
        feed = {
            "inputs_embeds": embeds, "attention_mask": attention_mask.numpy(),
            "position_ids": np.ascontiguousarray(position_ids.numpy()), **past.arrays,
        }  # fmt: skip
        feed |= {name: further[name][:, -tokens:].numpy() for name in self.optional if name in further}
        values = self._run(feed)
        found = values.get("unsafe_probability")
        return Answer(
            torch.from_numpy(values["logits"].astype(np.float32)),
            Past({n.replace("present.", "past_key_values."): v for n, v in values.items() if n.startswith("present.")}),
            None if found is None else torch.from_numpy(found),
        )

    def empty(self, rows: int) -> Past:
        """A past of no tokens."""
        inputs = [one for one in self.runner.decoder.get_inputs() if one.name.startswith("past_key_values.")]
        return Past({
            one.name: np.zeros((rows, one.shape[1], 0, one.shape[3]), KINDS[one.type]) for one in inputs
        })  # fmt: skip

    def _embedded(self, ids: Tensor | None, further: dict[str, Tensor]) -> NDArray[Any]:
        assert ids is not None
        embeds = self.runner.embed(ids.numpy())  # (rows, tokens, hidden)
        if "pixel_values" in further:
            inputs = self.runner.vision.get_inputs()
            features = self.runner.vision.run(
                None, {value.name: further[value.name].numpy().astype(KINDS[value.type]) for value in inputs}
            )[0]
            embeds[ids.numpy() == self.image_token] = features.reshape(-1, features.shape[-1])
        return embeds

    def _run(self, feed: Arrays) -> Arrays:
        decoder = self.runner.decoder
        if not self.bound:
            return dict(zip(self.names, decoder.run(self.names, feed), strict=True))
        binding = decoder.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
        for name in self.names:
            binding.bind_output(name, "cpu")
        decoder.run_with_iobinding(binding)
        return dict(zip(self.names, binding.copy_outputs_to_cpu(), strict=True))


@dataclass(frozen=True)
class OnnxBench(Bench):
    """As `Bench`, on graphs."""

    graphs: Graphs
    directories: Callable[..., Path]  # opset=, dtype= -> the directory of graphs exported so
    plain: Callable[[str], Path]  # a type -> the file of the decoder without the gate

    def another(self, *, options: Any = None, **further: Any) -> Graphs:
        """Further sessions on the same files."""
        directory = self.directories()
        runner = Runner(directory)
        if options is not None:
            path = directory / "onnx" / "decoder_model_merged.onnx"
            runner.decoder = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return Graphs(runner, self.graphs.image_token, **further)

    def of_type(self, dtype: str, *, opset: int = 23) -> Graphs:
        """The graphs of another export."""
        return Graphs(Runner(self.directories(opset=opset, dtype=dtype), SUFFIX[dtype]), self.graphs.image_token)

    @property
    def model(self) -> Any:
        return self.graphs

    @property
    def stock(self) -> Any:
        return self.guarded.stock

    @property
    def written(self) -> float:
        """The threshold in the graph."""
        return float(self.guarded.model.config.sasa["threshold"])

    @contextmanager
    def threshold(self, value: float, *models: Any) -> Iterator[None]:
        assert value == self.written, "the threshold of a graph is what it was exported with"
        yield

    def split(self, scores: Tensor) -> tuple[float, Tensor]:
        refused = scores >= self.written  # (rows,)
        assert refused.any() and not refused.all(), "this batch has one verdict only"
        assert (scores - self.written).abs().min() > MARGIN, "a score of this batch is too close to the threshold"
        return self.written, refused

    def between(self, low: float, high: float) -> float:
        assert low + MARGIN < self.written < high - MARGIN, "these prompts do not lie on both sides of the threshold"
        return self.written

    @torch.no_grad()
    def each(self, run: Way, prompts: Iterable[Inputs], *, judged: Iterable[Inputs] | None = None) -> Outcome:
        """Run prompts one at a time until one was refused and one allowed.

        Args:
            judged: what the oracle scores, where it is not the prompts.
        """
        prompts = list(prompts)
        seen: set[bool] = set()
        for inputs, scored in zip(prompts, prompts if judged is None else judged, strict=True):
            score = float(self.guarded.expected(scored))
            refuse = score >= self.written
            if abs(score - self.written) < MARGIN or refuse in seen:
                continue
            seen.add(refuse)
            yes = torch.ones(1, dtype=torch.bool)
            found = run(self.graphs, copy.copy(inputs))
            if refuse:
                self.refused(found, yes)
            else:
                self.unchanged(found, run(self.stock, copy.copy(inputs)), ~yes)
        assert seen == {False, True} or len(prompts) == 1, "these prompts have one verdict only"
        return Outcome(REFUSED if True in seen else NOT_ASKED, UNCHANGED if False in seen else NOT_ASKED)

    def ones(self, count: int = 8, *, images: bool = False) -> list[Inputs]:
        """Single prompts, unpadded."""
        return [self.one(images=images, seed=seed) for seed in range(count)]

    def told_apart(self, prompts: list[Inputs]) -> tuple[Inputs, Inputs]:
        """An allowed and a refused one of some prompts."""
        scores = [float(self.guarded.expected(inputs)) for inputs in prompts]
        low, high = min(scores), max(scores)
        self.between(low, high)
        return prompts[scores.index(low)], prompts[scores.index(high)]
