"""What an operator does with a patched model: observes before enforcing, reads scores, and changes its settings."""

import copy
import json
import logging
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cli_steps import fails, flags, invoke, settle, succeeds
from conftest import Guard, load, move_weights
from feeding import CACHE
from labelled import write_set
from matrix.bench import begun_answers_allowed
from onnx_runner import Runner
from transformers import AutoProcessor

from sasa_export.verify import answers

Guards = Callable[..., Guard]
NEW = 6


def edited(directory: Path, to: Path, **settings: Any) -> Path:
    """A copy with other settings in its config.json, and nothing else changed."""
    shutil.copytree(directory, to)
    settle(to, **settings)
    return to


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "sasa"]


def test_observe_first_and_enforce_by_config_alone(
    split: Callable[[str], Guard], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of forty prompts none is refused, each P is logged, answers are the original's; then some are refused."""
    guarded = split("llava")
    observing = edited(guarded.directory, tmp_path / "observing", gate="observe")
    observe, enforce = load(observing), load(edited(observing, tmp_path / "enforcing", gate="enforce"))
    asked = {"max_new_tokens": NEW, "return_dict_in_generate": True}
    refused = []
    for seed in range(4):
        inputs = guarded.batch(count=10, seed=seed)
        expected, original = guarded.expected(inputs), guarded.stock.generate(**inputs, max_new_tokens=NEW)
        with caplog.at_level(logging.INFO, logger="sasa"):
            caplog.clear()
            found = observe.generate(**inputs, **asked)
        assert torch.equal(found.sequences, original) and not found.refused.any()
        torch.testing.assert_close(found.unsafe_probability, expected, rtol=0.0, atol=1e-4)
        would = found.unsafe_probability >= observe.config.sasa["threshold"]  # (10,)
        what = ["would be refused" if one else "allowed" for one in would]
        lines = [f"{word}: P(unsafe) {p:.4f}" for word, p in zip(what, found.unsafe_probability, strict=True)]
        assert [message.split(",")[0] for _, message in said(caplog)] == lines
        found = enforce.generate(**inputs, **asked)
        assert torch.equal(found.refused, would)
        start = inputs["input_ids"].shape[1]
        guarded.check_answers(found.sequences[:, start:], original[:, start:], found.refused)
        refused += found.refused.tolist()
    assert 4 < sum(refused) < 36


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_generate_tells_what_it_found(
    split: Callable[[str], Guard], caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    """One value for each sequence, however it is generated; and one line a refused prompt, without a word of it."""
    guarded = split("llava")
    inputs = guarded.batch(images=False, count=6)
    count = options.get("num_return_sequences", 1)
    expected = guarded.expected(inputs)  # (batch,)
    caplog.clear()
    found = guarded.model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True, **options)
    torch.testing.assert_close(found.unsafe_probability, expected.repeat_interleave(count), rtol=0.0, atol=1e-4)
    refused = expected >= guarded.model.config.sasa["threshold"]
    assert torch.equal(found.refused, refused.repeat_interleave(count)) and len(found.sequences) == 6 * count
    assert [level for level, _ in said(caplog)] == [logging.WARNING] * int(refused.sum())
    assert all(message.startswith("refused: P(unsafe) 0.") for _, message in said(caplog)) and refused.any()
    records: list[Any] = [record for record in caplog.records if record.name == "sasa"]  # named fields, for formatters
    assert [record.row for record in records] == refused.nonzero()[:, 0].tolist()
    told = torch.tensor([record.probability for record in records])  # without a cache judged again, in another shape
    torch.testing.assert_close(told, found.unsafe_probability[::count][refused], rtol=0.0, atol=1e-6)
    limit = guarded.model.config.sasa["threshold"]
    assert {(record.verdict, record.threshold) for record in records} == {("refused", limit)}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_judge_scores_a_batch_without_answering(guard: Guards, family: str, caplog: pytest.LogCaptureFixture) -> None:
    """As `generate` would judge it, at the price of one forward pass, and without a line in the log."""
    guarded = guard(family)
    inputs = guarded.batch(count=6)
    calls: list[int] = []
    with caplog.at_level(logging.INFO, logger="sasa"):
        handle = guarded.model.register_forward_hook(lambda module, args, output: calls.append(1))
        found = guarded.model.judge(**inputs)
        handle.remove()
        assert found.shape == (6,) and len(calls) == 1 and not said(caplog)
        guarded.model(**inputs)  # a call behind it logs again
    torch.testing.assert_close(found, guarded.expected(inputs), rtol=0.0, atol=1e-4)
    assert len(said(caplog)) == 6


def test_an_answer_that_goes_on_has_no_new_verdict(split: Callable[[str], Guard]) -> None:
    """Where it may go on, a second call of `generate` says nothing of P, and that refused rows are refused."""
    guarded = split("llava")
    inputs = guarded.batch(images=False, count=6)
    first = guarded.model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    given = {"attention_mask": mask, "max_new_tokens": 2, "return_dict_in_generate": True}
    with pytest.raises(ValueError, match="begins the answer"):
        guarded.model.generate(first.sequences, **{CACHE: copy.deepcopy(first[CACHE])}, **given)
    with begun_answers_allowed(guarded.model):
        found = guarded.model.generate(first.sequences, **{CACHE: first[CACHE]}, **given)
    assert found.unsafe_probability.isnan().all() and torch.equal(found.refused, first.refused)


def test_settings_at_load(guard: Guards, tmp_path: Path) -> None:
    """Threshold, gate and a refusal in another language, for one load; what is saved again has them."""
    guarded = guard("llava")
    inputs = guarded.batch(images=False, count=4)
    lowest = float(guarded.expected(inputs).min()) / 2
    refusal = "Dabei kann ich nicht helfen."
    model = load(guarded.directory, sasa={"threshold": lowest, "refusal": refusal})
    said = model.generate(**inputs, max_new_tokens=40)[:, inputs["input_ids"].shape[1] :]
    tokenizer: Any = guarded.processor.tokenizer
    assert tokenizer.batch_decode(said, skip_special_tokens=True) == [refusal] * 4
    assert load(guarded.directory).config.sasa["threshold"] != lowest, "the directory stays as it is"
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["sasa"]
    assert (saved["threshold"], saved["refusal"], saved["tokenized_refusal"]) == (lowest, refusal, refusal)
    observing = load(guarded.directory, sasa={"threshold": lowest, "gate": "observe"})
    assert torch.equal(
        observing.generate(**inputs, max_new_tokens=NEW), guarded.stock.generate(**inputs, max_new_tokens=NEW)
    )


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"treshold": 0.3}, "only threshold, refusal, gate, prove, begun_answers can be changed"),
        (0.3, "only threshold, refusal, gate, prove, begun_answers can be changed"),
        ({"refusal_token_ids": [5]}, "only threshold, refusal, gate, prove, begun_answers can be changed"),
        ({"threshold": 1}, "threshold 1"),
        ({"gate": None}, "gate None"),
        ({"refusal": "See <image> here."}, "special token"),
    ],
)
def test_settings_that_no_gate_could_run_on(guard: Guards, changes: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        load(guard("llava").directory, sasa=changes)


# -------------------------------------------------------------------------------------------------- graphs


@pytest.mark.slow
@pytest.mark.xdist_group("onnx-llava")
def test_graphs_observe_too(split: Callable[[str], Guard], exported: Callable[..., Path], tmp_path: Path) -> None:
    """The decoder's P(unsafe) is there, its logits are the original's, and nothing of its state says a refusal."""
    guarded = split("llava")
    runner = Runner(exported(edited(guarded.directory, tmp_path / "observing", gate="observe")))
    inputs = guarded.batch(count=6)
    ids, _ = runner.ask(guarded, inputs)
    expected = guarded.expected(inputs)
    assert runner.probability is not None
    assert np.abs(runner.probability - expected.numpy()).max() < 1e-4
    assert 0 < (expected >= guarded.model.config.sasa["threshold"]).sum() < 6
    with torch.no_grad():
        original = guarded.stock(**inputs, position_ids=ids).logits[:, -1].numpy()
    assert np.abs(runner.logits - original).max() < 1e-4
    assert not runner.cache[f"past_key_values.{tiny.LAYERS}.key"][:, 0, :, 0].any()


def answer_elsewhere(model: Any, inputs: dict[str, Any]) -> tuple[list[list[int]], list[float]]:
    torch.set_num_threads(1)
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=NEW).tolist(), model.judge(**inputs).tolist()


@torch.no_grad()
def test_a_spawned_process_is_handed_the_model(guard: Guards) -> None:
    """As workers of a pool and Ray are: by pickle, with the gate, the rows refused and allowed as here."""
    guarded = guard("llava")
    inputs = guarded.batch(images=False)  # transformers loses how a stock LLaVA's tower hands out states
    with guarded.halved(inputs) as refused, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        expected = guarded.model.generate(**inputs, max_new_tokens=NEW).tolist()
        # Loaded anew: the hooks by which transformers hands out hidden states cannot be pickled, in stock models too.
        model = load(guarded.directory, sasa={"threshold": guarded.model.config.sasa["threshold"]})
        said, probability = pool.submit(answer_elsewhere, model, inputs).result(timeout=120)
    assert said == expected and refused.any() and not refused.all()
    torch.testing.assert_close(torch.tensor(probability), guarded.expected(inputs), rtol=0.0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- the tool


@pytest.mark.slow
def test_a_patch_that_observes_is_verified_and_its_card_says_so(llava: Path, calibration: Path, place: Path) -> None:
    out = place / "out"
    fitted = {"calibration": calibration, "max_false_positive_rate": 0.1, "gate": "observe"}
    said = succeeds(*flags(llava, out, **fitted)).stderr
    assert "none is refused, since the gate observes" in said and "✗" not in said
    card = " ".join((out / "README.md").read_text().split())
    assert "**The gate only observes** (`--gate observe`)" in card and "Set `gate` to `enforce`" in card
    again = edited(out, place / "enforcing", gate="enforce")
    said = succeeds("verify", str(again)).stderr
    assert "with settings as the operator changed them" in said
    assert "refused prompts say the refusal" in said and "the gate observes" not in said


@pytest.fixture
def saved(guard: Guards, tmp_path: Path) -> Path:
    """A patched model as `save_pretrained` writes it, without a manifest."""
    return save_again(guard("llava").model, guard("llava").directory, tmp_path / "saved")


def save_again(model: Any, written: Path, to: Path) -> Path:
    model.save_pretrained(to)
    AutoProcessor.from_pretrained(written).save_pretrained(to)
    return to


def fails_verification(directory: Path, *switches: str) -> str:
    """All that it says of its checks."""
    result = invoke("verify", str(directory), *switches)
    assert result.exit_code == 1 and "failed its verification. Do not serve it" in result.stderr
    return str(result.stderr)


def test_verify_of_a_saved_model_fails_where_it_has_no_cases(saved: Path) -> None:
    said = fails_verification(saved)
    assert "– files are those that were exported: not checked" in said
    assert "✗ answers are the original's: not checked, since there are no cases" in said and said.count("✗") == 1
    assert "not checked" in fails_verification(saved, "--files")


def name_other_code(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"]["AutoModelForImageTextToText"] = "other/code--modeling_sasa.SasaLlavaForConditionalGeneration"
    (directory / "config.json").write_text(json.dumps(config))


def generate_otherwise(directory: Path) -> None:
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text("raise SystemExit")


OTHER_CODE: dict[str, Callable[[Path], Any]] = {
    "more code": lambda directory: (directory / "modeling_sasa.py").open("a").write("raise SystemExit\n"),
    "code elsewhere": name_other_code,
    "a file of code beside it": generate_otherwise,
}


@pytest.mark.slow
def test_verify_counts_the_verdicts_that_training_moves(llava: Path, calibration: Path, place: Path) -> None:
    """Cases go along with save_pretrained: they hold where it is the same model, and not where weights moved."""
    written = place / "written"
    succeeds(*flags(llava, written, calibration=calibration, max_false_positive_rate=0.1))
    model = load(written)
    saved = save_again(model, written, place / "saved")
    said = succeeds("verify", str(saved)).stderr
    assert "– files are those that were exported" in said and "0 of 16 changed" in said and "✗" not in said
    said = succeeds("verify", str(saved), "--load", "bfloat16").stderr
    assert "tolerance 0.15 (bfloat16 on cpu, float32 original)" in said
    assert "Choose one of: bfloat16" in fails("verify", str(written), "--load", "nf4")

    move_weights(model)
    said = fails_verification(save_again(model, written, place / "trained"))
    assert "✗ verdicts are the original's" in said and "0 of 16 changed" not in said

    for name, change in OTHER_CODE.items():
        directory = shutil.copytree(saved, place / name)
        change(directory)
        said = fails_verification(directory)
        assert "no manifest vouches for its code" in said and "it loads" not in said, name


def test_evaluate_of_a_saved_model(saved: Path, llava: Path, tmp_path: Path) -> None:
    """It does not know what it was made from, and says so; with that, it is evaluated. Graphs that observe are not."""
    data, other = (str(write_set(tmp_path, name, seed, 6)) for name, seed in (("evaluation", 1), ("calibration", 2)))
    given = flags(saved, tmp_path / "report", "--force", data=data, calibration=other, max_new_tokens=2)
    settle(saved, gate="observe")
    assert "Give it as --baseline" in fails("evaluate", *given)
    for _ in range(2):  # the second time over the report that is there, which is ours
        succeeds("evaluate", *given, "--baseline", str(llava))
    settle(saved, graphs={"decoder": "onnx/decoder_model_merged.onnx"})
    message = fails("evaluate", *flags(saved, tmp_path / "other"))
    assert "only observe. Export them again with --gate enforce" in message


def test_verification_has_the_packages_of_its_caller(
    tmp_path: Path, patched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From wherever they come: PYTHONPATH, the user's own packages, or a path that a notebook has added."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "only_here.py").write_text("WHERE = 'found'")
    (tmp_path / "fresh").mkdir()
    program = "import json, only_here; print(json.dumps({'where': only_here.WHERE}))"
    (tmp_path / "fresh" / "__main__.py").write_text(program)
    monkeypatch.setattr(answers, "FRESH", tmp_path / "fresh")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("packages")
    assert answers.run_fresh(patched, "torch_model", {}, "cpu", []) == {"where": "found"}
