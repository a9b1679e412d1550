"""Debug mode: a header before every message, and a look at every layer's numbers.

Both are for finding a mistake, and cost time: the host reads what it checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed import Work

from meshwright.errors import Problem, TrainingError
from meshwright.program.instructions import Instruction, text
from meshwright.program.messages import stage_before
from meshwright.program.operations import Op
from meshwright.runtime.build import Held

_DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_DIRECTIONS = {Op.SEND_F: 0, Op.RECV_F: 0, Op.SEND_B: 1, Op.RECV_B: 1}
_MARK = 0x6D657368
_DIMENSIONS = 8
_LENGTH = 7 + _DIMENSIONS

Post = Callable[[Tensor, int], Work]
"""Starts a send or a receive of a tensor under a tag."""


class Headers:
    """Precedes every message of a direction by what it is, and checks it on arrival."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.step = 0

    def send(self, i: Instruction, k: int, tensor: Tensor, tag: int, post: Post) -> list[Work]:
        """Starts tensor number `k` of a send, its header first."""
        header = torch.tensor(self._header(i, k, tensor), device=self.device)
        return [post(header, 2 * tag), post(tensor, 2 * tag + 1)]

    def receive(self, i: Instruction, k: int, tensor: Tensor, tag: int, post: Post) -> Work:
        """Starts a receive; its `wait` raises TrainingError, naming peer and instruction, if
        another message arrives than the one that is due."""
        header = torch.empty(_LENGTH, dtype=torch.int64, device=self.device)
        wanted = self._header(i, k, tensor)
        arriving = post(header, 2 * tag)
        # gloo would write a message of another size into `tensor`, or end the process: there the
        # payload is asked for when its header is known. NCCL has no tags and needs the order.
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
        """Starts tensor number `k` of a broadcast, its header first; `wait` checks as a receive's.

        Both are started at once: the broadcasts of a group must come in one order on all its ranks.
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
    """A receive that is done when its header has been compared and its payload is here."""

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
            text(i),
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


class Tracer:
    """Finds the layer in which the first number that is none appears, and says when.

    With `backward` false only forwards are looked at: the scaled gradients of float16 overflow as a
    matter of course.
    """

    def __init__(self, stage: int, held: Iterable[Held], *, backward: bool) -> None:
        self.stage = stage
        self.backward = backward
        self.place = ("", "")
        """Step and micro-batch that are computed."""
        if backward:
            for one in held:
                if one.parameter.requires_grad:
                    one.parameter.register_post_accumulate_grad_hook(self._hook(one.name))  # type: ignore[no-untyped-call]

    def begin(self, step: int, micro_batches: Sequence[int]) -> None:
        """What is computed from here on."""
        self.place = (f"step {step}", f"micro-batch {', '.join(map(str, micro_batches))}")

    def read(self, layer: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A layer's inputs, in a form of its own: what comes back to them is its gradient."""
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
        """Raises TrainingError if a layer's forward has made a number that is none."""
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
