"""Bytes of a device that no tensor gets: named amounts, each with its source.

None of them has been measured on a GPU by this project; together they are 1 GiB.
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

ALLOCATOR_BYTES = 96 << 20
"""What the caching allocator holds without being able to hand it out, if every step asks for the
same sizes: blocks of 1 to 10 MiB come from segments of 20 MiB, larger ones are rounded to 2 MiB
(kLargeBuffer and kRoundLarge of c10's CUDACachingAllocator); a few segments half empty."""

FRAMEWORK_BYTES = {
    "gpu": CUDA_CONTEXT_BYTES
    + CUBLAS_WORKSPACE_BYTES
    + COMMUNICATORS * NCCL_COMMUNICATOR_BYTES
    + ALLOCATOR_BYTES,
    "cpu": 64 << 20,
}
"""What a process holds beside tensors; on a cpu gloo's buffers."""
