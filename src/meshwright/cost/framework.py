"""Bytes of a device that no tensor gets: named amounts, each with its source.

None of them has been measured on a GPU by this project.
"""

from __future__ import annotations

CUDA_CONTEXT_BYTES = 512 << 20
"""What a CUDA process takes for its context and the loaded kernels of PyTorch and its libraries:
about 300 to 550 MiB from V100 to H100, nvidia-smi's figure less `torch.cuda.memory_reserved`."""

CUBLAS_WORKSPACE_BYTES = 32 << 20
"""PyTorch's cuBLAS workspace on Hopper, 8 MiB and a little on older devices: the default of
CUBLAS_WORKSPACE_CONFIG in PyTorch's documentation."""

NCCL_COMMUNICATOR_BYTES = 96 << 20
"""A communicator's buffers: NCCL_BUFFSIZE, by default 4 MiB, for sending and for receiving, on
about 12 channels."""

COMMUNICATORS = 4
"""Groups that a rank talks in: forward, backward, gradients, and tensor ranks or everyone."""

HOLES = {"gpu": 0.04, "cpu": 0.0}
"""Share of a device's memory that is reserved and never used: the caching allocator keeps blocks
of sizes that do not come again (reserved over allocated is 2 to 10 % in PyTorch's own memory
statistics of training loops with fixed shapes)."""

FRAMEWORK_BYTES = {
    "gpu": CUDA_CONTEXT_BYTES + CUBLAS_WORKSPACE_BYTES + COMMUNICATORS * NCCL_COMMUNICATOR_BYTES,
    "cpu": 64 << 20,
}
"""What a process holds beside tensors; on a cpu gloo's buffers."""
