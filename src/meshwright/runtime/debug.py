"""Sends a header before every message, and checks every layer for non-finite values (NaN or Inf):
the debug mode.

Both help to find a mistake, and cost time: the host waits for each value that it checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed import Work

from meshwright.errors import Problem, TrainingError
from meshwright.program.instructions import Instruction, format_instruction
from meshwright.program.messages import stage_before
from meshwright.program.operations import Op
from meshwright.runtime.build_stages import LocalParameter

_DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_DIRECTIONS = {Op.SEND_F: 0, Op.RECV_F: 0, Op.SEND_B: 1, Op.RECV_B: 1}
_MARK = 0x6D657368
_DIMENSIONS = 8
_LENGTH = 7 + _DIMENSIONS

Post = Callable[[Tensor, int], Work]
"""Function that starts a send or a receive of a tensor under a tag."""


class MessageHeaders:
    """Sends a header that describes each message of one direction ahead of it, and checks it on
    arrival."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.step = 0

    def send(self, i: Instruction, k: int, tensor: Tensor, tag: int, post: Post) -> list[Work]:
        """Starts the send of an instruction's tensor number `k`, preceded by its header."""
        header = torch.tensor(self._header(i, k, tensor), device=self.device)
        return [post(header, 2 * tag), post(tensor, 2 * tag + 1)]

    def receive(self, i: Instruction, k: int, tensor: Tensor, tag: int, post: Post) -> Work:
        """Starts the receive of tensor number `k`. The result's `wait` raises TrainingError, naming
        peer and instruction, if another message than the expected one arrives."""
        header = torch.empty(_LENGTH, dtype=torch.int64, device=self.device)
        wanted = self._header(i, k, tensor)
        arriving = post(header, 2 * tag)
        # Over gloo a message of the wrong size would be written into `tensor`, or end the process,
        # so the payload's receive waits for the header. NCCL has no tags: receives must be posted
        # in the order of the sends.
        late = self.device.type == "cpu"
        payload = None if late else post(tensor, 2 * tag + 1)

        def finish() -> None:
            arriving.wait()
            found = header.tolist()
            if found != wanted:
                raise _wrong(i, found, wanted)
            (payload or post(tensor, 2 * tag + 1)).wait()

        return _Checked(finish)

    def broadcast(
        self, i: Instruction, k: int, tensor: Tensor, start: Callable[[Tensor], Work]
    ) -> list[Work]:
        """Starts the broadcast of tensor number `k`, preceded by its header, which receivers check
        in `wait`.

        Header and tensor start at once: all ranks of a group must start its broadcasts in the same
        order.
        """
        wanted = self._header(i, k, tensor)
        header = torch.tensor(wanted, device=self.device)
        arriving, payload = start(header), start(tensor)
        if i.op.kind == "send":
            return [arriving, payload]

        def finish() -> None:
            arriving.wait()
            found = header.tolist()
            if found != wanted:
                raise _wrong(i, found, wanted)
            payload.wait()

        return [_Checked(finish)]

    def _header(self, i: Instruction, k: int, tensor: Tensor) -> list[int]:
        assert i.micro_batch is not None
        shape = (*tensor.shape, *(-1,) * (_DIMENSIONS - tensor.ndim))
        kind = _DTYPES.index(tensor.dtype)
        cut = stage_before(i)
        return [_MARK, _DIRECTIONS[i.op], self.step, i.micro_batch, cut, k, kind, *shape]


class _Checked(Work):
    """Receives a tensor; it has completed when the header has been compared and the tensor has
    arrived."""

    def __init__(self, finish: Callable[[], None]) -> None:
        super().__init__()
        self._finish: Callable[[], None] | None = finish

    def wait(self, timeout: object = None) -> bool:  # noqa: ARG002
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()
        return True

    def is_completed(self) -> bool:
        return self._finish is None


def _wrong(i: Instruction, found: Sequence[int], wanted: Sequence[int]) -> TrainingError:
    return TrainingError(
        Problem(
            format_instruction(i),
            "header",
            f"from rank {i.peer}: {_words(found)}",
            _words(wanted),
            f"rank {i.peer} sent another message than this one was waiting for",
        )
    )


def _words(header: Sequence[int]) -> str:
    mark, direction, step, micro_batch, cut, k, kind, *shape = header
    if mark != _MARK:
        return "no header"
    sizes = "x".join(str(n) for n in shape if n >= 0)
    dtype = str(_DTYPES[kind]).removeprefix("torch.")
    what = "gradient" if direction else "activation"
    return (
        f"{what} {k} of step {step}, micro-batch {micro_batch}: {sizes} {dtype}, after stage {cut}"
    )


class NonFiniteCheck:
    """Finds the layer, step and micro-batch in which the first non-finite value (NaN or Inf)
    appears.

    With `backward` false only forwards are checked: under fp16, scaled gradients are expected to
    overflow now and then.
    """

    def __init__(self, stage: int, held: Iterable[LocalParameter], *, backward: bool) -> None:
        self.stage = stage
        self.backward = backward
        self.place = ("", "")
        """The step and the micro-batch that are being computed, as words for the error."""
        if backward:
            for one in held:
                if one.parameter.requires_grad:
                    one.parameter.register_post_accumulate_grad_hook(self._hook(one.name))  # type: ignore[no-untyped-call]

    def begin(self, step: int, micro_batches: Sequence[int]) -> None:
        """Notes which step and micro-batches are computed next."""
        self.place = (f"step {step}", f"micro-batch {', '.join(map(str, micro_batches))}")

    def read(self, layer: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns a layer's inputs as tensors of the layer's own, so that the gradient which comes
        back to each can be checked."""
        if not self.backward or not torch.is_grad_enabled():
            return list(tensors)
        result = []
        for tensor in tensors:
            own = tensor
            if tensor.requires_grad:
                own = tensor.view_as(tensor)
                own.register_hook(self._check_input(layer))  # type: ignore[no-untyped-call]
            result.append(own)
        return result

    def made(self, layer: str, tensors: Iterable[Tensor]) -> None:
        """Raises TrainingError if a layer's forward has produced a non-finite value."""
        for tensor in tensors:
            self._check(tensor.detach(), f"layer {layer}, forward", "output")

    def _check_input(self, layer: str) -> Callable[[Tensor], None]:
        return lambda grad: self._check(grad, f"layer {layer}, backward", "gradient of its input")

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def check(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._check(parameter.grad, f"parameter {name}, backward", "gradient")

        return check

    def _check(self, tensor: Tensor, where: str, what: str) -> None:
        if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
            return
        bad = tensor.isfinite().logical_not()
        count, first = int(bad.sum()), tensor[bad][0].item()
        step, micro_batch = self.place
        raise TrainingError(
            Problem(
                f"{step}, {micro_batch}, stage {self.stage}",
                where,
                f"{count} of {tensor.numel()} numbers of its {what} are none (the first: {first})",
                "finite numbers",
                "look at this layer with this micro-batch",
            )
        )
