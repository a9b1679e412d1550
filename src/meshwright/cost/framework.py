"""Lists the bytes of a device that the framework reserves, each amount with its source.

None of them has been measured on a GPU by this project.
"""

from __future__ import annotations

CUDA_CONTEXT_BYTES = 512 << 20
"""A CUDA process's context and the loaded kernels of PyTorch and its libraries: about 300 to 550
MiB from V100 to H100, as nvidia-smi's figure less `torch.cuda.memory_reserved`."""

CUBLAS_WORKSPACE_BYTES = 32 << 20
"""PyTorch's cuBLAS workspace on Hopper; on older devices it is a little over 8 MiB: the default of
CUBLAS_WORKSPACE_CONFIG in PyTorch's documentation."""

NCCL_COMMUNICATOR_BYTES = 96 << 20
"""The buffers of one communicator: NCCL_BUFFSIZE (4 MiB by default) for sending and as much for
receiving, on about 12 channels."""

COMMUNICATORS = 4
"""The communicators of a rank: forward, backward, gradients, and one of the tensor ranks or of all
ranks."""

HOLES = {"gpu": 0.04, "cpu": 0.0}
"""The share of a device's memory that is lost to fragmentation. The caching allocator keeps blocks
of sizes that are not asked for again: reserved memory exceeds allocated memory by 2 to 10 % in
PyTorch's own statistics of training loops with fixed shapes."""

FRAMEWORK_BYTES = {
    "gpu": CUDA_CONTEXT_BYTES + CUBLAS_WORKSPACE_BYTES + COMMUNICATORS * NCCL_COMMUNICATOR_BYTES,
    "cpu": 64 << 20,
}
"""The bytes that a process holds besides tensors, by processor; on a CPU they are gloo's
buffers."""
