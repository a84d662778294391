"""The ledger: what the gate keeps of each token, in the last entry of the prompt cache, behind those of the blocks.

It is a KV cache. Its keys are columns, (batch, 1, tokens, columns), float32. Its values are projected states,
(batch, 1, tokens, hidden). Code that crops, batches, keeps or restores a prompt cache carries the ledger along.
"""

from typing import Any

import mlx.core as mx
from mlx_vlm.models.cache import BatchKVCache, KVCache

# Columns: STATE, TURN and NUMBER as in the verdict, REAL (0 at padding), and three axes of the position.
REAL, POSITION, COLUMNS = 3, 4, 7


class BatchLedger(BatchKVCache):
    """The ledger of several rows. If prompts are padded on the right, it knows which columns are padding."""

    preserve_auxiliary_kv_state = True  # exempt from quantization
    ends: Any = None  # (batch,), the column where each prompt ends, if padded on the right

    def prepare(self, *, lengths: Any = None, **padding: Any) -> None:
        super().prepare(lengths=lengths, **padding)
        self.ends = None if lengths is None else mx.array(lengths) + self._idx

    def finalize(self) -> None:
        super().finalize()
        self.ends = None

    def extract(self, idx: int) -> "Ledger":
        return Ledger.like(super().extract(idx))

    def real(self, rows: int, count: int) -> mx.array:
        """Return which of the next `count` tokens are not padding, (batch, count), bool."""
        column = mx.arange(self._idx, self._idx + count)[None]  # (1, count)
        found = column >= self.left_padding[:, None]
        return found if self.ends is None else found & (column < self.ends[:, None])


class Ledger(KVCache):
    """The ledger of one row, or of rows without padding."""

    preserve_auxiliary_kv_state, ends = True, None

    @classmethod
    def like(cls, plain: KVCache) -> "Ledger":
        ledger = cls()
        ledger.keys, ledger.values, ledger.offset = plain.keys, plain.values, plain.offset
        return ledger

    def extract(self, idx: int) -> "Ledger":
        return self.like(super().extract(idx))

    def to_quantized(self, **_: Any) -> "Ledger":
        return self

    def to_batch(self, left_padding: list[int]) -> BatchLedger:
        return BatchLedger(left_padding)

    @classmethod
    def merge(cls, caches: list[Any]) -> BatchLedger:
        return BatchLedger.merge(caches) if any(cache.size() for cache in caches) else BatchLedger([0] * len(caches))

    def prefix_cache_merge(self, rows: list[Any], prefix_lens: Any) -> Any:
        return self.merge(rows) if all(type(row) is Ledger for row in rows) else None

    def real(self, rows: int, count: int) -> mx.array:
        return mx.ones((rows, count), dtype=mx.bool_)


def length(cache: Any) -> int:
    """Return the number of tokens in an entry of a prompt cache, padding included."""
    return int(cache._idx if hasattr(cache, "_idx") else cache.offset)


def tail(ledger: Any, states: mx.array, wanted: int) -> tuple[mx.array, mx.array]:
    """Return columns (batch, wanted, columns), float32, and projected states (batch, wanted, hidden) of the last
    tokens, with 0 for missing ones. The states get the type of a call's `states` (batch, tokens, hidden)."""
    rows, _, hidden = states.shape
    if ledger.keys is None:
        return mx.zeros((rows, wanted, COLUMNS)), mx.zeros((rows, wanted, hidden), dtype=states.dtype)
    kept = slice(max(0, length(ledger) - wanted), length(ledger))
    fewer = [(0, 0), (wanted - (kept.stop - kept.start), 0), (0, 0)]
    return mx.pad(ledger.keys[:, 0, kept], fewer), mx.pad(ledger.values[:, 0, kept], fewer).astype(states.dtype)
