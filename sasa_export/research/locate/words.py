"""What a report says in words: one section a capability, for the page and for Markdown alike."""

from __future__ import annotations

from dataclasses import dataclass

from sasa_export.research.locate.interval import is_below
from sasa_export.research.locate.plots import Theme, depth, heads, scatter, sweep_map
from sasa_export.research.locate.propose import spans
from sasa_export.research.locate.result import Located


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, and the name of a picture with what it shows (for those who do not see it)."""

    heading: str
    paragraphs: tuple[str, ...]
    picture: str | None = None
    shows: str = ""
    table: tuple[tuple[str, ...], ...] = ()  # the first row is the head
    listed: bool = False  # the paragraphs are points, each named by what stands before its colon


def title(located: Located) -> str:
    return f"Where {located.subject.model} perceives, understands and speaks"


def summary(located: Located) -> str:
    """The result in two sentences."""
    proposal, subject = located.proposal, located.subject
    known = "" if located.known is None or located.known == (proposal.safety, proposal.semantic) else (
        f" The family's file says {located.known[0]} and {located.known[1]}."
    )  # fmt: skip
    return (
        f"Proposed: safety layer {proposal.safety}, semantic layer {proposal.semantic} of {subject.blocks} blocks "
        f"(zero-based).{known}"
    )


def subject_line(located: Located) -> str:
    subject = located.subject
    return (
        f"Family {subject.family}, hidden size {subject.hidden}, {subject.dtype} on {subject.device}. "
        f"{subject.harmful} harmful and {subject.harmless} harmless prompts in {subject.groups} groups "
        f"({subject.source}). Intervals are 95 %, with the prompts of one group counted as one."
    )


def sections(located: Located) -> list[Section]:
    """All sections in order."""
    found = [Section("Why these layers", (*located.proposal.reason, _held_out(located)), listed=True)]
    found.append(
        Section(
            "Three capabilities, three depths",
            (
                "Top: how well a plane separates harmful from harmless prompts by the last token's state behind each "
                "block (logistic regression, cross-validated by group). "
                + (
                    "Middle: how much that state, for a picture with text, agrees with the state of the same request "
                    "as text alone, and of the same picture alone (cosine after the mean over all requests is taken "
                    "off: 0 knows nothing of the request, 1 is the same). "
                    if located.alignment is not None
                    else "No picture prompts were given, so semantic understanding was not measured. "
                )
                + "Bottom: the share of readable tokens among the five likeliest, if the final norm and the head read "
                "that state already (logit lens), and the share that the last block ranks among its five too. A bar "
                "along the bottom marks the blocks that a capability points to.",
            ),
            "depth",
            f"Curves over the blocks; the safety layer {located.proposal.safety} and the semantic layer "
            f"{located.proposal.semantic} are marked",
        )
    )
    if located.heads is not None:
        found.append(_heads(located))
    found.append(
        Section(
            "Every pair that was tried",
            (
                "For each pair, the second lane was run on the projected state, and a probe on its last token's state "
                f"was cross-validated. Without any projection the same probe has an AUC of {located.sweep.plain}.",
                *_together(located),
            ),
            "sweep",
            "A map of the AUC of each pair of safety and semantic layer",
        )
    )
    found.append(
        Section(
            "The states, block by block",
            (
                "t-SNE of the last token's states. Distances between clusters and their sizes mean nothing in such a "
                "picture.",
            ),
            "tsne",
            "Scatter plots of harmful and harmless prompts at several blocks",
        )
    )
    found.append(_lens(located))
    return found


def pictures(located: Located, theme: Theme) -> dict[str, bytes]:
    """The PNG files by name."""
    found = {"depth": depth(located, theme)}
    if located.heads is not None:
        found["heads"] = heads(located.heads, theme)
    found["sweep"] = sweep_map(located, theme)
    found["tsne"] = scatter(located, theme)
    return found


def _held_out(located: Located) -> str:
    held, chosen = located.held_out, (located.proposal.safety, located.proposal.semantic)
    halves = " and ".join(
        f"{auc:.3f} ({safety} and {semantic})" for auc, (safety, semantic) in zip(held.aucs, held.pairs, strict=True)
    )
    among = "these candidates" if chosen in located.proposal.candidates else "all pairs"
    return (
        f"What the choice is worth: let one half of the groups choose among {among} and judge by the other, "
        f"which took no part in the choice, and the AUC is {halves}, {held.auc:.3f} on average, against "
        f"{located.sweep.pairs[chosen].value:.3f} for the pair above on all prompts."
    )


def _together(located: Located) -> list[str]:
    """What several pairs would gain, at the cost of a second lane for each."""
    together, pairs = located.sweep.together, located.sweep.pairs
    if together is None or len(pairs) < 2:
        return []
    chosen = pairs[located.proposal.safety, located.proposal.semantic]
    wins = "which is better than the chosen pair by more than noise" if is_below(chosen, together) else (
        "which is not better than the chosen pair by more than noise"
    )  # fmt: skip
    return [
        f"All {len(pairs)} pairs together (the mean of their log-odds, and a second lane for each) have an AUC of "
        f"{together}, {wins}."
    ]


def _heads(located: Located) -> Section:
    assert located.heads is not None
    found, listed = located.heads, located.heads.safety_heads()
    paragraphs = [
        f"Each head of {spans(found.blocks)} was silenced in turn, on {found.prompts} harmful and as many harmless "
        "prompts. The leading singular vector of the last token's final states turns by some angle: the score is that "
        "angle on harmful prompts less that on ordinary ones. A safety head stands four robust standard deviations "
        "above the median score and turns harmful prompts at least twice as far.",
        "These are too few prompts to compare two halves of them."
        if found.reliability is None
        else f"The scores of two halves of the prompts have a rank correlation of {found.reliability:.2f}; the nearer "
        "that is to 0, the more of the picture is noise.",
    ]
    rows = [("block", "head", "degrees, harmful", "degrees, ordinary")]
    for block, head, _ in listed[:10]:
        place = (found.blocks.index(block), head)
        rows.append((str(block), str(head), f"{found.harmful[place]:.2f}", f"{found.ordinary[place]:.2f}"))
    if not listed:
        paragraphs.append("No head stands out.")
    elif len(listed) > 10:
        paragraphs.append(f"The ten foremost of {len(listed)}:")
    table = tuple(rows) if listed else ()
    shows = "A map of the scores of all heads; safety heads are framed"
    return Section("Safety heads", tuple(paragraphs), "heads", shows, table)


def _lens(located: Located) -> Section:
    rows = [("block", *(f"{place}." for place in range(1, 6)))]
    rows += [(str(block), *(shown(word) for word in words)) for block, words in enumerate(located.example.words)]
    return Section(
        "What the model would say, block by block",
        (f"The five likeliest first tokens behind each block, for one harmless prompt: {located.example.prompt}",),
        table=tuple(rows),
    )


def shown(piece: str) -> str:
    """A token in a table: control characters and what does not print as a middle dot."""
    text = "".join(letter if letter.isprintable() and letter != "\ufffd" else "·" for letter in piece.strip(" "))
    return text[:16] or "·"
