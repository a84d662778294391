"""Fit the probe that smol-llava ships with, on the built-in calibration set, and print its learning curve.

    python training/fit_smol_llava_probe.py [--threads N]

Takes about half an hour on two CPU cores, in bfloat16. Run it again when the vision tower, the calibration set or the
layers change: until then smol-llava is calibrated at each export.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from random import Random

import numpy as np
import torch

from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.graph.trace import trace_source
from sasa_export.models import EMBEDDED, layers_of, open_source
from sasa_export.models.load import head_weight, load_model, load_processor, read_sizes
from sasa_export.probe import bundled
from sasa_export.probe.calibration import fit_probes, metric_of
from sasa_export.probe.features import collect
from sasa_export.probe.figures import figures
from sasa_export.probe.fit import best_regularization, head_metric, in_metric, threshold_of
from sasa_export.probe.folds import folds_of
from sasa_export.prompts import Prompt, builtin, for_model
from sasa_export.report import Console

SHARES = (0.125, 0.25, 0.5, 1.0)
RATE = 0.02  # of ordinary prompts that the threshold may refuse


def learning_curve(lanes: dict[str, np.ndarray], prompts: Sequence[Prompt], metric: np.ndarray) -> list[str]:
    """Rows of a table: what probes on a share of the requests do on all requests of kinds that were left out."""
    labels, groups = np.array([prompt.label for prompt in prompts]), np.array([prompt.group for prompt in prompts])
    order, rows = Random(0).sample(sorted(set(groups)), len(set(groups))), []
    lanes = {name: in_metric(states, metric_of(states, prompts, metric)) for name, states in lanes.items()}
    for share in SHARES:
        kept = np.isin(groups, order[: round(share * len(order))])
        folds = [(train[kept[train]], test) for train, test in folds_of(prompts)]
        for name, states in lanes.items():
            scores = best_regularization(states, labels, folds)[1]
            found = {
                figure.part: figure for figure in figures(name, scores, prompts, threshold_of(scores, prompts, RATE))
            }
            shown = [f"{found[part].auc:.3f} | {found[part].recall:.1%}" for part in ("text", "picture")]
            rows.append(f"| {share:.1%} | {kept.sum()} | {name} | {' | '.join(shown)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)

    source, report = open_source(EMBEDDED), Console()
    sizes, processor = read_sizes(source), load_processor(source)
    pair = layers_of(source, sizes.blocks, sizes.hidden, None, None)[:2]
    settings = LaneSettings(*pair)
    lane = rewrite_lane(trace_source(source, processor), settings)
    prompts = for_model(builtin(), processor)
    model = load_model(source, dtype="bfloat16", device="cpu")
    with report.bar(len(prompts), "calibrate") as advance:
        features = collect(model, processor, lane, prompts, batch_size=16, advance=advance)
    lanes, metric = {"projected": features.projected, "plain": features.plain}, head_metric(head_weight(model))
    bundled.write(fit_probes(lanes, prompts, metric), bundled.made_from(settings.pair))
    report.step("done", str(bundled.FILE))
    print("| share of the requests | prompts | feature | AUC, text | refused | AUC, picture | refused |")
    print("\n".join(["|---|---|---|---|---|---|---|", *learning_curve(lanes, prompts, metric)]))


if __name__ == "__main__":
    main()
