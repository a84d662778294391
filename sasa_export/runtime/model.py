"""The mixin that makes a guarded model of a family's stock class."""

import functools
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from sasa_export.runtime.guard import Guard, Request, current_request
from sasa_export.runtime.host import OF_MODEL, check_names
from sasa_export.runtime.lane import Recording, current_recording, watch, within
from sasa_export.runtime.ledger import Ledger
from sasa_export.runtime.proof import prove, recognise
from sasa_export.runtime.settings import HOW_TO_LOAD, check_settings, follow_refusal

PACKED = "prompts packed into one row cannot be judged one by one. Run without it."
HUB = ("cache_dir", "local_files_only", "revision", "subfolder", "token")  # arguments that find a directory on the hub
# Options of `generate` that bypass the gate: they skip blocks, or mix in the output of another model or prompt.
UNGUARDED = ("assistant_early_exit", "assistant_ensemble_weight", "guidance_scale", "is_assistant")
DRAFTING = ("assistant_model", "prompt_lookup_num_tokens", "use_mtp", "speculation_type")  # drafts follow the prompt


def signed(around: Any, function: Callable) -> Any:
    """Return `around` with the signature of `function`, which generate() reads, and no `__wrapped__` past the gate."""
    functools.update_wrapper(around, function)
    around.__signature__ = inspect.signature(function)
    del around.__wrapped__
    return around


def guarded(forward: Callable) -> Callable:
    """Return the family's forward with the gate around it."""
    names = check_names(forward, OF_MODEL)[1:]

    def guarded_forward(self: Any, *args: Any, sasa_request: Request | None = None, **kwargs: Any) -> Any:
        if self.sasa.asked.get("unguarded"):  # set by `prove`
            return forward(self, *args, **kwargs)
        if torch.jit.is_tracing():
            raise NotImplementedError("torch.jit.trace would freeze a verdict. Run this guarded model as it is.")
        kwargs = dict(zip(names, args, strict=False), **kwargs)
        as_dictionary = kwargs.pop("return_dict", None)
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None:
            raise ValueError("this guarded model judges what it reads. Pass input_ids or inputs_embeds.")
        if "paged" in str(self.config._attn_implementation) or kwargs.get("cu_seq_lens_q") is not None:
            raise NotImplementedError(f"packed prompts: {PACKED}")
        with within(current_recording, Recording()) as seen:
            output = forward(self, **kwargs, return_dict=True)
        output = self.sasa(self, kwargs, seen, output, sasa_request)
        return output if (self.config.return_dict if as_dictionary is None else as_dictionary) else output.to_tuple()

    return signed(guarded_forward, forward)


def requested(stock: Any) -> Callable:
    """Return a stock class's `prepare_inputs_for_generation` that also passes on the request of `generate`."""

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs, request = stock.prepare_inputs_for_generation(self, *args, **kwargs), current_request.get()
        return inputs if request is None or request.model is not self else {**inputs, "sasa_request": request}

    return signed(prepare, stock.prepare_inputs_for_generation)


class GuardedModel:
    """Mixin for a family's ...ForConditionalGeneration: it judges each prompt, then answers or refuses."""

    _keep_in_fp32_modules_strict = ("sasa",)
    guarded_by_sasa = True  # tells the seal that the model is guarded
    kernel_condition = staticmethod(lambda model: False)  # no kernel of the hub takes the place of the guarded forward

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        text = config.get_text_config(decoder=True)
        sasa = check_settings(getattr(config, "sasa", None))
        if sum(node["op"] == "block" for node in sasa["graph"]) != text.num_hidden_layers:
            raise ValueError(f"config.sasa's graph has not as many blocks as the decoder. {HOW_TO_LOAD}")
        operations = [node["op"] for node in sasa["graph"]]
        ends = text.vocab_size if "lane_head" in operations else text.hidden_size
        features = ends + operations.count("state_norm") * text.hidden_size
        self.sasa: nn.Module = Guard(config, Ledger.of(text), features)
        watch(self, sasa["graph"])
        self.post_init()

    @classmethod
    def from_pretrained(cls, directory: Any, *args: Any, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(directory, *args, output_loading_info=True, **kwargs)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(str(name) for name in info.get(problem) or ()):
                what = f"{problem.replace('_', ' ')}: {', '.join(names[:5])} ({len(names)} in all)"
                raise ValueError(f"the guarded model has {what}. {HOW_TO_LOAD}")
        model.sasa.probe.check()
        follow_refusal(model.config, directory, **{name: kwargs[name] for name in HUB if name in kwargs})
        prove(model, super(GuardedModel, model).generate)
        recognise(model)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(__file__, Path(save_directory, "modeling_sasa.py"))  # this file
        if (code := Path(self.name_or_path, "modeling_sasa_mlx.py")).is_file():  # config.json names it
            shutil.copyfile(code, Path(save_directory, code.name))
        cases, kept = (Path(directory, "sasa-verify").resolve() for directory in (self.name_or_path, save_directory))
        if cases.is_dir() and cases != kept:  # test cases for `sasa-export verify`
            shutil.copytree(cases, kept, dirs_exist_ok=True)
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if kwargs.get("state_dict") is None and not several:  # otherwise this process may not hold all weights
            recognise(self, loading=False)

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate like the stock model, but answer a refused prompt with the refusal. With `return_dict_in_generate`
        the result also has `unsafe_probability` and `refused`, (sequences,) each."""
        return self._generate(inputs, *args, **kwargs)[0]

    def judge(self, **inputs: Any) -> Tensor:
        """Return P(unsafe) (batch,) of prompts, given as for `generate`. This runs the model, and logs nothing."""
        return self._generate(**inputs, max_new_tokens=1, num_beams=1, do_sample=False, logged=True)[1][1]

    def _generate(self, inputs: Any = None, *args: Any, logged: bool = False, **kwargs: Any) -> tuple[Any, Tensor]:
        """Return the result of `generate`, and verdicts (3, sequences): is one due, P(unsafe), is it refused."""
        kwargs |= zip(list(inspect.signature(super().generate).parameters)[1:], args, strict=False)
        settings: dict[str, Any] = {}
        for values in (vars(self.generation_config), vars(kwargs.get("generation_config") or object), kwargs):
            settings |= {name: value for name, value in values.items() if value is not None}
        for name in UNGUARDED:
            if settings.get(name) not in (None, 1 if name == "guidance_scale" else False):
                raise NotImplementedError(f"{name} would answer past the gate of this guarded model. Run without it.")
        prompt = [inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        shapes = [value.shape[:2] for value in prompt if isinstance(value, Tensor) and value.dim() > 1] or [(1, 0)]
        pieces, drafting = bool(settings.get("prefill_chunk_size")), any(settings.get(name) for name in DRAFTING)
        rows, lengths = zip(*shapes, strict=True)
        request = Request(self, min(lengths), max(rows), pieces, drafting, logged)
        if (streamer := kwargs.get("streamer")) is not None:
            put = functools.partial(request.stream, streamer.put)
            kwargs["streamer"] = SimpleNamespace(put=put, end=streamer.end)
        with within(current_request, request):
            output = super().generate(inputs, **kwargs)
        said = output["sequences"] if isinstance(output, dict) else output  # (sequences, tokens)
        request.check(said.shape[1] - (request.end or 0))
        found: Any = request.verdicts  # (3, rows)
        verdicts = found[:, torch.arange(len(said)) * found.shape[1] // len(said)]  # (3, sequences)
        if isinstance(output, dict):  # with return_dict_in_generate
            output["unsafe_probability"], output["refused"] = verdicts[1], verdicts[2] > 0
        return output, verdicts

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Return False, for serving engines that would run the decoder under their own head, without the gate."""
        return False

    def _no_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"continuous batching: {PACKED}")

    generate_batch = init_continuous_batching = continuous_batching_context_manager = _no_continuous_batching


def rename_old_keys(guarded_type: str, stock: Any) -> None:
    """Let old weight names of a guarded model be renamed on loading, as for its stock class."""
    find = get_checkpoint_conversion_mapping
    if (mapping := find(stock.__name__) or find(stock.config_class.model_type)) is not None:
        register_checkpoint_conversion_mapping(guarded_type, mapping, overwrite=True)
