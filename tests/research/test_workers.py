"""Work shared among processes: the same results in the same order, however many there are."""

import json
import os
import subprocess
import sys

import pytest

WORK = """
import json
from sasa_export.workers import workers
team = workers()
advanced = []
found = {
    "spread": [team.spread(range(count), lambda item: item * item, advanced.append) for count in (7, 2, 1, 0)],
    "tell": team.tell(f"from {team.index}"), "device": team.device("auto"),
}
team.wait()
print(json.dumps({**found, "leads": team.leads, "advanced": advanced}))
"""
SQUARES = [[item * item for item in range(count)] for count in (7, 2, 1, 0)]
ALL = [item for count in (7, 2, 1, 0) for item in range(count)]


@pytest.mark.parametrize("count", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes(count: int) -> None:
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    shared |= {"CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORK],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    answers = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in running]
    for rank, answer in enumerate(answers):
        assert answer["spread"] == SQUARES and answer["tell"] == "from 0"
        assert answer["device"] == ("auto" if count == 1 else "cpu")
        assert answer["leads"] == (rank == 0) and answer["advanced"] == (ALL if rank == 0 else [])
