"""Where ONNX Runtime's CUDA provider would put a graph, asked on a machine without a GPU.

A stub of the CUDA libraries (``cuda_stub.c``, compiled when it is needed) lets ``onnxruntime-gpu``
create and run sessions: the partitioning, the memory copies, the allocations and the launches are
ONNX Runtime's own; the values are meaningless.
"""

from gemma3_export.placement.check import PlacementReport, check_placement
from gemma3_export.placement.stub import COUNTERS, CUDA_FIX, cuda_environment

__all__ = ["COUNTERS", "CUDA_FIX", "PlacementReport", "check_placement", "cuda_environment"]
