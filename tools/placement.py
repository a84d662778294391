"""Where the nodes of a graph would run on an NVIDIA GPU, found on a machine that has none.

    python tools/placement.py GRAPH...

onnxruntime-gpu itself places them, by the kernels that its CUDA provider registers. The libraries of CUDA that the
provider is linked with are stood in for by empty ones, made here by gcc: a graph is placed, and never run.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

# What must answer something for a session to start: one device of compute capability 8.0, with memory of the host's.
ANSWERS = {
    "cudaGetDeviceCount": "(int *count) { *count = 1; return 0; }",
    "cudaGetDevice": "(int *device) { *device = 0; return 0; }",
    "cudaMalloc": "(void **place, size_t size) { *place = malloc(size + 256); return 0; }",
    "cudaHostAlloc": "(void **place, size_t size) { *place = malloc(size + 256); return 0; }",
    "cudaMallocHost": "(void **place, size_t size) { *place = malloc(size + 256); return 0; }",
    "cudaFree": "(void *place) { free(place); return 0; }",
    "cudaFreeHost": "(void *place) { free(place); return 0; }",
    "cudaMemGetInfo": "(size_t *unused, size_t *all) { *unused = *all = 1ul << 36; return 0; }",
    "cudaDeviceGetAttribute": "(int *said, int which) { *said = which == 75 ? 8 : which == 76 ? 0 : 1024; return 0; }",
    # cudaDeviceProp: the warp at 308, threads of a block at 320, the major number of the capability at 360
    "cudaGetDeviceProperties": "(char *said) { memset(said, 0, 400); *(int *)(said + 308) = 32; "
    "*(int *)(said + 320) = 1024; *(int *)(said + 360) = 8; return 0; }",
}  # fmt: skip
CREATED = "cudaStreamCreateWithFlags cudaEventCreateWithFlags cudaEventCreate cublasCreate_v2 cublasLtCreate".split()
ANSWERS |= dict.fromkeys(CREATED, "(void **handle) { *handle = malloc(256); return 0; }")
# Of the providers in the package; unversioned names that one lacks are of the library given here.
PROVIDERS = {"cuda": "libcuda.so.1", "tensorrt": "libnvinfer.so.10"}


# Placed, a graph says where; there is nothing behind the libraries that could be closed.
OPEN = """
import onnxruntime, os, sys
options = onnxruntime.SessionOptions()
options.log_severity_level = 0
gpu, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=[gpu, cpu])
os._exit(session.get_providers()[0] != gpu)
"""


class Placement(NamedTuple):
    gpu: int  # nodes there, copies not counted
    shapes: int  # nodes on the CPU because they compute shapes, which onnxruntime leaves there
    missing: list[str]  # nodes on the CPU for want of a kernel, as "Operator (name)"
    copies: dict[str, int]  # between the two, by the name of the graph that they lie in


def place(graph: Path) -> Placement:
    """Where onnxruntime-gpu would run a graph's nodes. RuntimeError where it cannot be asked."""
    with tempfile.TemporaryDirectory() as folder:
        write_libraries(Path(folder))
        environment = {**os.environ, "LD_LIBRARY_PATH": folder}
        command = [sys.executable, "-c", OPEN, str(graph)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise RuntimeError(f"onnxruntime-gpu did not open {graph}: {result.stderr.strip()[-300:]}")
    return read_log(result.stderr)


def read_log(log: str) -> Placement:
    """What onnxruntime said while it placed the nodes."""
    nodes: dict[str, list[str]] = {"CPU": [], "CUDA": []}
    said = log.split("Node placements", 1)[1]
    if all_of_them := re.search(r"All nodes placed on \[CUDAExecutionProvider\]\. Number of nodes: (\d+)", said):
        return Placement(int(all_of_them[1]), 0, [], {})
    for line in said.splitlines():
        if found := re.search(r"placed on \[(\w+)ExecutionProvider\]", line):
            provider = found[1]
        elif found := re.search(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+ \(.*\))", line):
            nodes[provider].append(found[1])
    without = set(re.findall(r"kernel not found in registries for Op type: (\w+) node name: (\S*)", log))
    missing = [node for node in nodes["CPU"] if tuple(node[:-1].split(" (", 1)) in without]
    copies = {graph: int(count) for count, graph in re.findall(r"(\d+) Memcpy nodes are added to the graph (\S+)", log)}
    gpu = [node for node in nodes["CUDA"] if not node.startswith("Memcpy")]
    return Placement(len(gpu), len(nodes["CPU"]) - len(missing), missing, copies)


def write_libraries(folder: Path) -> None:
    """Libraries that the providers of onnxruntime-gpu find in the place of CUDA's."""
    import onnxruntime

    wanted: dict[str, set[str]] = defaultdict(set)
    for provider, other in PROVIDERS.items():
        path = Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime_providers_{provider}.so"
        if not path.exists():
            raise RuntimeError(f"{path} is missing: onnxruntime-gpu is not installed here")
        for name in re.findall(r"NEEDED.*\[(lib(?:cu|nv).*)\]", _said("readelf", "-dW", path)):
            wanted[name] |= set()
        for name, version in re.findall(r" U (\w+)(?:@+(\S+))?$", _said("nm", "-D", path), re.MULTILINE):
            library = version or other
            if library in wanted and name != "Provider_GetHost":
                wanted[library].add(name)
    for library, names in wanted.items():
        source, versions = folder / "source.c", folder / "versions"
        lines = [f"int {name}{ANSWERS.get(name, '() { return 0; }')}" for name in sorted(names)]
        source.write_text("\n".join(["#include <stdlib.h>", "#include <string.h>", *lines]) + "\n")
        versions.write_text(f"{library} {{ global: *; }};\n")
        options = [f"-Wl,-soname,{library}", f"-Wl,--version-script={versions}"]
        _said("gcc", "-shared", "-fPIC", "-w", "-o", folder / library, source, *options)


def _said(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for graph in sys.argv[1:]:
        print(graph, place(Path(graph)))
