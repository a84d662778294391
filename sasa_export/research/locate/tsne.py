"""t-SNE of the last token's states: how harmful and harmless prompts lie, block by block."""

from __future__ import annotations

import numpy as np

COMPONENTS = 30  # that t-SNE is given of the states


def points(states: np.ndarray) -> np.ndarray:
    """t-SNE of states (prompts, hidden): (prompts, 2). The same states give the same points."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    states = states.astype(np.float64) - states.mean(0)
    size = states.std(0)
    scaled = np.divide(states, size, out=np.zeros_like(states), where=size > 1e-6 * max(size.max(), 1e-30))
    if not scaled.any():
        return np.zeros((len(states), 2))
    count = min(COMPONENTS, *scaled.shape)
    reduced = PCA(count, svd_solver="full").fit_transform(scaled)  # (prompts, components)
    perplexity = min(30.0, (len(states) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=0, max_iter=750).fit_transform(reduced)
