"""The rule of the verdict, as the tests of every runtime hold it to: no library of tensors is needed here."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

RULE = {"generation_prompt_ids": [7, 8], "turn_token_ids": [2], "refusal_token_ids": [11, 12, 2]}


class Rule:
    """The rule of the verdict, one token after the other, for one row: what a call of any length must come to.

    0 is padding, (7, 8) the generation prompt, 2 an end of turn and (11, 12, 2) the refusal. `refuses` says of each
    context whether its verdict would be to refuse.
    """

    def __init__(self, refuses: Callable[[tuple[int, ...]], bool]) -> None:
        self.refuses = refuses
        self.context: list[int] = []
        self.judged = self.answering = False
        self.state = 0

    def feed(self, tokens: list[int]) -> tuple[bool, int]:
        """Is a verdict due in this call, and STATE behind it."""
        due_at, start, begun = None, self.state, len(self.context)
        for token in tokens:
            self.context.append(token)
            if token == 2:
                self.answering = False
            if self.context[-2:] == [7, 8]:
                self.answering, due_at = True, len(self.context)
        several = len(tokens) > 1
        if not self.answering:
            due_at = len(self.context) if several or not self.judged else None
        if due_at is not None:
            start = int(self.refuses(tuple(self.context[:due_at])))
            self.judged = self.judged or several or self.answering or bool(start)
        state = start
        for token in self.context[due_at or begun :]:
            if state:
                wanted = (11, 12, 2)[state - 1]
                state = min(state + 1, 3) if token == wanted or not several else 1
                if state == 1 and several:
                    break  # a stray begins the refusal anew, and what follows it in this call is a draft
        self.state = state
        return due_at is not None, state


calls = st.lists(
    st.lists(st.sampled_from([(7, 8), (2,), (5,), (11, 12, 2), (11,), (7,), (8,)]), min_size=1, max_size=4).map(
        lambda parts: [token for part in parts for token in part]
    )
    | st.sampled_from([[5], [7], [8], [2], [11], [12]]),
    min_size=1,
    max_size=8,
)


def check_calls(names: Any, make: Callable[[Any], Any], fed: list[list[int]], padding: int, harmful: bool) -> None:
    """What a runtime's arrays say of calls is what the rule says token by token, under any padding on the left.

    Args: names: has its TemplateTokens, Call, find_due and follow; make: its array of numbers or flags.
    """

    def refuses(context: tuple[int, ...]) -> bool:
        return harmful ^ (len(context) % 3 == 0)

    rule, table, context = Rule(refuses), names.TemplateTokens.of(RULE), list[int]()
    kept = [[0, 0, 0], [0, 0, 0]]  # STATE, TURN and NUMBER of earlier tokens
    for number, tokens in enumerate(fed):
        before = padding if number == 0 else 0
        ids = make([[0] * before + tokens])  # (1, tokens)
        numbers, several = table.in_ids(ids), make(before + len(tokens) > 1)
        call = names.Call(numbers, ids != 0, make([kept[-2:]]), several, several)
        due = names.find_due(call, table)
        refused = due.rows & make([refuses(tuple(context + tokens[: int(due.at.item()) + 1 - before]))])
        states, turns = names.follow(call, due, refused, table)
        context += tokens
        if before and len(tokens) == 1:
            return  # a first call of padding and one token brings several
        assert (due.rows.item(), states[0, -1].item()) == rule.feed(tokens), fed
        kept += map(list, zip(states[0].tolist(), turns[0].tolist(), numbers[0].tolist(), strict=True))
