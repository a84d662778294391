"""Finding a model's layers: what `--safety-layer auto` and a report of `locate` have in common."""

LIMIT = 400  # groups that layers are chosen on; the states of all blocks are kept for each of their prompts
