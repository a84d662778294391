"""Choose a model's safety and semantic layer, for `--safety-layer auto` and the report of `locate`."""

LIMIT = 400  # groups for choosing layers; bounds the storage, because each prompt's states of all blocks are kept
