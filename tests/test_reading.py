"""A token that `goes_on` takes for an answer's: reading the whole context would have found the same.

Conversations are symbols alone here, fed, judged at random, cropped and fed again, with the ledger kept by hand.
"""

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sasa_export.runtime.ledger import JUDGED, STATE
from sasa_export.runtime.turn import goes_on, read_turn, states_going_on
from sasa_export.runtime.words import Words

WORDS = Words(table=(), generation_prompt=(1, 2), turns=(3,), refusal=(4, 5, 6))
TEMPLATES = [(3, 1, 2), (1, 2), (3,), (4, 5, 6), (0,), (2,), (1,)]


@dataclass(frozen=True)
class Call:
    """What happens next: some tokens go, and others come."""

    dropped: int
    tokens: list[int]
    real: list[bool]
    refused: bool


tokens = st.lists(st.sampled_from(TEMPLATES), min_size=1, max_size=4).map(
    lambda parts: [t for part in parts for t in part]
)
calls = st.builds(
    Call,
    dropped=st.just(0) | st.just(0) | st.integers(0, 6),
    tokens=tokens | st.integers(0, 6).map(lambda token: [token]),
    real=st.lists(st.sampled_from([True, True, True, False]), min_size=12, max_size=12),
    refused=st.booleans(),
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.lists(calls, min_size=2, max_size=8))
def test_no_call_is_read_too_little(history: list[Call]) -> None:
    verdicts: dict[int, bool] = {}  # by the position that was judged: the same context gets the same verdict
    symbols, real, states, covered = [torch.zeros(1, 0).long()] * 4  # (1, context) each
    for call in history:
        left = symbols.shape[1] - call.dropped
        if left < 0:
            continue
        verdicts = {position: refused for position, refused in verdicts.items() if position < left}
        symbols, real, states, covered = (kept[:, :left] for kept in (symbols, real, states, covered))
        more = torch.tensor([call.tokens])  # (1, tokens)
        shown = torch.tensor([call.real[: len(call.tokens)]]).long()  # (1, tokens); the rest is real
        shown = torch.nn.functional.pad(shown, (0, more.shape[1] - shown.shape[1]), value=1)
        symbols, real = torch.cat([symbols, more], 1), torch.cat([real, shown], 1)
        before = states[:, -1] if left else torch.zeros(1).long()  # (1,)
        several = left == 0 or more.shape[1] > 1
        context = torch.cat([covered, torch.zeros_like(more)], 1)  # (1, context)
        turn = read_turn(symbols, real > 0, left, several, before, context > 0, WORDS)
        judged, again = int(turn.judged), int(turn.judged) in verdicts
        if turn.due:
            verdicts.setdefault(judged, call.refused)
        found = turn.states(torch.tensor([verdicts.get(judged, False)]))  # (1, tokens)
        last = torch.zeros(1, JUDGED + 1).long()  # (1, columns)
        if left and more.shape[1] == 1:
            last[:, STATE], last[:, JUDGED] = states[:, -1], covered[:, -1]
            if goes_on(last, more, WORDS).all():
                expected = states_going_on(last[:, STATE], shown > 0, WORDS)
                assert turn.covered.all() and (again or not turn.due)
                # Judged again, a refusal may begin anew; otherwise it goes on with the same word.
                assert torch.equal(found > 0, expected > 0) and (turn.due or torch.equal(found, expected))
        states, covered = torch.cat([states, found], 1), torch.cat([covered, turn.covered.long()], 1)
