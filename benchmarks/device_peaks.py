"""What GPUs can do at most: the roofs of `benchmarks.step_model`."""

from __future__ import annotations

from typing import NamedTuple


class Peaks(NamedTuple):
    """bfloat16 matrix products without sparsity, and memory traffic, in units of 10^12 a second."""

    name: str
    tflops: float
    tb_per_s: float
    source: str


MEASURED = "measured: a large bfloat16 GEMM and a large copy through torch"

DEVICES = {
    "h200": Peaks("NVIDIA H200", 788.0, 4.3, MEASURED),
    "h100": Peaks("NVIDIA H100 SXM", 989.4, 3.35, "NVIDIA H100 Tensor Core GPU datasheet"),
    "a100": Peaks("NVIDIA A100 SXM 80 GB", 312.0, 2.039, "NVIDIA A100 Tensor Core GPU datasheet"),
    "b200": Peaks("NVIDIA B200", 2250.0, 8.0, "NVIDIA DGX B200 datasheet, an eighth of it"),
    "l40s": Peaks("NVIDIA L40S", 362.05, 0.864, "NVIDIA L40S datasheet"),
    "l4": Peaks("NVIDIA L4", 121.0, 0.3, "NVIDIA L4 datasheet"),
    "rtx4090": Peaks(
        "NVIDIA GeForce RTX 4090", 165.2, 1.008, "NVIDIA Ada GPU architecture whitepaper, appendix"
    ),
}
