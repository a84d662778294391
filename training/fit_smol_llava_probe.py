"""Fit the probe that smol-llava brings along, on the built-in calibration set.

    python training/fit_smol_llava_probe.py [--threads N]

Takes about half an hour on two CPU cores. Run it again when the vision tower, the calibration set or the layers
change: until then smol-llava is calibrated at each export.
"""

from __future__ import annotations

import argparse

import torch

from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.graph.trace import trace_source
from sasa_export.models import EMBEDDED, layers_of, open_source
from sasa_export.models.load import load_model, load_processor, read_sizes
from sasa_export.probe import calibrate, carried
from sasa_export.prompts import builtin
from sasa_export.report import Console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)

    source, report = open_source(EMBEDDED), Console()
    sizes, processor = read_sizes(source), load_processor(source)
    settings = LaneSettings(*layers_of(source, sizes.blocks, sizes.hidden)[:2])
    lane = rewrite_lane(trace_source(source), settings)
    prompts = builtin(processor)
    model = load_model(source, dtype="float32", device="cpu")
    with report.bar(len(prompts), "calibrate") as advance:
        fitted = calibrate(model, processor, lane, prompts, batch_size=16, advance=advance)
    carried.write(fitted, settings.pair)
    report.step("done", str(carried.FILE))


if __name__ == "__main__":
    main()
