"""Ways to run a patched directory in mlx-vlm, and what becomes of its gate: the rows of docs/mlx.md."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_vlm
import pytest
from conftest import MADE, batch, edit, inputs, made, say, serving
from mlx_vlm import convert, load
from mlx_vlm.apc import APCManager, DiskBlockStore
from mlx_vlm.generate.dispatch import stream_generate
from mlx_vlm.models.cache import KVCache, QuantizedKVCache

LLAVA = made("llava")
REFUSAL = LLAVA.sasa["refusal_token_ids"]
REFUSED = next(prompt for prompt in LLAVA.prompts if prompt["refused"] and prompt["text"] and not prompt["picture"])
ALLOWED = next(prompt for prompt in LLAVA.prompts if not prompt["refused"] and prompt["text"] and not prompt["picture"])
KEPT: dict[str, dict[str, Any]] = {
    "a temperature of 5": {"temperature": 5.0, "seed": 1},
    "top-p, min-p and top-k": {"temperature": 2.0, "top_p": 0.3, "min_p": 0.2, "top_k": 3, "seed": 2},
    "penalties": {"repetition_penalty": 1.9, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    "logit_bias": {"logit_bias": {REFUSAL[0]: -100.0, REFUSAL[-1]: 100.0, 9: 100.0}},
    "max_kv_size": {"max_kv_size": 4},
    "kv_bits": {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
    "kv_bits, turboquant": {"kv_bits": 4, "kv_quant_scheme": "turboquant", "quantized_kv_start": 0},
}


@pytest.mark.parametrize("way", KEPT)
def test_the_refusal_stays_whole(way: str, verdicts: Any) -> None:
    assert say(LLAVA.model, inputs(LLAVA, REFUSED), **KEPT[way]) == REFUSAL
    assert abs(verdicts()[-1].probability - REFUSED["probability"]) < (0.05 if "kv_bits" in way else 2e-5)


def test_the_ledger_is_never_quantized() -> None:
    cache = LLAVA.model.language_model.make_cache()
    say(LLAVA.model, inputs(LLAVA, ALLOWED), 3, prompt_cache=cache, **KEPT["kv_bits"])
    assert isinstance(cache[0], QuantizedKVCache) and cache[-1].values.dtype == mx.float32


def forbid(tokens: mx.array, logits: mx.array) -> mx.array:
    """A logits processor that allows a few tokens alone, none of the refusal's."""
    return mx.where((mx.arange(logits.shape[-1]) % 50 == 9)[None], logits, -mx.inf)


def test_a_processor_that_forbids_the_refusal_is_an_error() -> None:
    assert not {token for token in REFUSAL if token % 50 == 9}
    with pytest.raises(ValueError, match="forbids it the refusal"):
        say(LLAVA.model, inputs(LLAVA, REFUSED), logits_processors=[forbid])


def test_in_a_batch_what_such_a_processor_leaves_tells_nothing_of_the_model() -> None:
    """Nor does it end the other rows."""
    one, other, *_ = (prompt["ids"] for prompt in LLAVA.prompts if not prompt["picture"] and prompt["refused"])
    said = batch(LLAVA, [one, other, [one[0], *one], ALLOWED["ids"]], 6, [forbid])
    assert said[0] == said[1] == said[2] and set(said[0]) == {9} and said[3] != said[0]


def test_a_begun_answer_is_refused_and_allowed_where_the_operator_says_so(copied: Path, verdicts: Any) -> None:
    begun = {**ALLOWED, "text": None, "ids": [*ALLOWED["ids"], *ALLOWED["ids"][1:3]]}
    for size in (1, 2, 512):
        assert say(LLAVA.model, inputs(LLAVA, begun), prefill_step_size=size) == REFUSAL
        assert "begins the answer" in verdicts()[-1].getMessage()
    assert batch(LLAVA, [begun["ids"], ALLOWED["ids"]], len(REFUSAL))[0] == REFUSAL
    model, _ = load(str(edit(copied, begun_answers="allow")))
    verdicts.clear()
    assert say(model, inputs(LLAVA, begun), 4) != REFUSAL[:4]
    assert [record.verdict for record in verdicts()] == ["allowed"]


def test_what_the_operator_sets_is_followed(copied: Path, verdicts: Any) -> None:
    model, _ = load(str(edit(copied, gate="observe", refusal="No, that is not for me.")))
    assert say(model, inputs(LLAVA, REFUSED), 4) != REFUSAL[:4] and verdicts()[-1].verdict == "would be refused"
    model, processor = load(str(edit(copied, gate="enforce")))
    assert processor.tokenizer.decode(say(model, inputs(LLAVA, REFUSED))[:-1]) == "No, that is not for me."
    with pytest.raises(ValueError, match="threshold"):
        load(str(edit(copied, threshold=2)))


def test_drafts_foreign_caches_and_masks_are_errors() -> None:
    lane, ids = LLAVA.model.language_model, mx.array([ALLOWED["ids"]])
    for name in ("return_hidden", "speculative_verify", "return_shared_kv", "skip_logits"):
        with pytest.raises(ValueError, match="draft model"):
            lane(ids, **{name: True})
    blocks = len(lane.model.layers)
    filled = lane.make_cache()
    for cache in ([KVCache() for _ in range(blocks)], [KVCache() for _ in range(blocks + 1)]):
        with pytest.raises(ValueError, match="has not judged"):
            lane(ids, cache=cache)
    lane(ids, cache=filled)
    filled[-1].trim(2)
    with pytest.raises(ValueError, match="the gate"):
        lane(ids, cache=filled)
    with pytest.raises(ValueError, match="mask"):
        lane(ids, mask=mx.ones(ids.shape))


def test_adapters_do_not_load(tmp_path: Path) -> None:
    lora = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "dropout": 0.0, "scale": 1.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"none": mx.zeros((1,))})
    with pytest.raises(ValueError, match="adapters"):
        load(str(MADE / "llava" / "patched"), adapter_path=str(tmp_path))


def test_a_converted_directory_is_noticed(copied: Path, tmp_path: Path, verdicts: Any) -> None:
    """By the known prompts, as four bits change P(unsafe) of these random weights by far."""
    texts = [prompt for prompt in LLAVA.prompts if not prompt["picture"]]
    known = [{"ids": " ".join(map(str, text["ids"])), "unsafe_probability": text["probability"]} for text in texts]
    edit(copied, known=known)
    load(str(copied))
    assert not verdicts()
    out = tmp_path / "converted"
    convert(str(copied), str(out), quantize=True, q_bits=2, q_group_size=32)
    load(str(out))
    assert "known prompts has moved" in verdicts()[-1].getMessage()
    edit(out, known=[{**entry, "unsafe_probability": 1 - entry["unsafe_probability"]} for entry in known])
    with pytest.raises(ValueError, match="known prompts has moved"):
        load(str(out))


def test_another_mlx_vlm_proves_the_gate_or_does_not_load(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_vlm, "__version__", "0.9.0")
    load(str(copied))
    monkeypatch.setattr("mlx_vlm.models.cache.make_prompt_cache", lambda model, *_, **__: [KVCache()] * 7)
    with pytest.raises(RuntimeError, match=r"does not hold on mlx-vlm 0\.9\.0"):
        load(str(copied))


def test_files_that_are_missing_or_damaged_do_not_load(copied: Path) -> None:
    path = str(copied)
    shard = mx.load(f"{path}/model-00002-of-00002.safetensors")
    for weight in (shard["sasa.probe.weight"] * 0, shard["sasa.probe.weight"] * float("nan")):
        mx.save_safetensors(f"{path}/model-00002-of-00002.safetensors", {**shard, "sasa.probe.weight": weight})
        with pytest.raises(ValueError, match=r"sasa\.probe is missing, zero"):
            load(path)
    (copied / "model-00002-of-00002.safetensors").unlink()
    for strict in (True, False):
        with pytest.raises(ValueError, match="probe"):
            load(path, strict=strict)
    (copied / "modeling_sasa_mlx.py").unlink()
    with pytest.raises(FileNotFoundError, match="modeling_sasa_mlx"):
        load(path)


def test_under_its_own_type_it_needs_the_file_and_relabelled_it_does_not(copied: Path) -> None:
    """Whoever holds the files can remove the gate, as docs/security.md says."""
    loading = "import pathlib, sys, mlx_vlm.utils as u; u.load_model(pathlib.Path(sys.argv[1]), strict=False)"
    run = partial(subprocess.run, [sys.executable, "-c", loading, str(copied)], capture_output=True, text=True)
    edit(copied, config={"model_file": None})
    assert "not supported" in run().stderr
    edit(copied, config={"model_type": "llava"})
    assert run().returncode == 0


@pytest.mark.parametrize("disk", [False, True])
def test_the_prefix_cache(disk: bool, tmp_path: Path, verdicts: Any) -> None:
    """Where a prompt's beginning is taken from it, the ledger comes back with the rest; from the disk nothing does."""
    hits = []
    for run in range(2):
        store = DiskBlockStore(tmp_path, namespace="test") if disk else None
        if run == 0 or disk:
            manager = APCManager(num_blocks=64, block_size=4, disk=store)
        for prompt in (REFUSED, ALLOWED):
            options = {"max_tokens": 4, "apc_manager": manager, "temperature": 0.0}
            chunks = stream_generate(LLAVA.model, LLAVA.processor, prompt["text"], **options)
            assert [chunk.token for chunk in chunks][:4] == prompt["answer"][:4]
            assert abs(verdicts()[-1].probability - prompt["probability"]) < 2e-5
        hits.append(manager.stats.matched_tokens)
        manager.close()
    assert (hits[1] > 0) == (not disk), hits


def test_the_command_line() -> None:
    command = [sys.executable, "-m", "mlx_vlm.generate", "--model", str(MADE / "llava" / "patched")]
    words = ["--prompt", REFUSED["words"], "--max-tokens", "16"]
    found = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert "I will not help." in found.stdout, found.stderr


def test_the_server_with_six_at_once() -> None:
    with serving(str(MADE / "llava" / "patched")) as ask, ThreadPoolExecutor(6) as pool:
        assert set(pool.map(ask, [REFUSED["words"]] * 6)) == {"I will not help."}
        biased = {"logit_bias": {str(token): -100 for token in REFUSAL[:-1]}}
        assert ask(REFUSED["words"], **biased) == "I will not help."
