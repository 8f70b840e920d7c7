"""The processes that share a run: `torchrun` starts them, and every batch is divided among them.

They take the same steps: each computes the gradients of its share of a batch, which are summed, so
that weights, schedules and scores are those of one process. The first process alone writes files.
Without torchrun all of this is one process, and nothing is sent.

Between any two sums the processes meet in `together`, so that what ends one of them, a signal or an
error, ends all of them at the same point, and none waits for one that has left.
"""

import contextlib
import os
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""The longest that processes wait for one another."""

GROUP = "LRA_GROUP"
"""Environment variable: the name under which processes of a sweep's run find one another."""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Connects the processes that torchrun has started; does nothing without it.

    Tensors on CPU are summed by gloo, those on GPUs by nccl.

    Raises:
        ValueError: If torchrun's environment is incomplete.
    """
    if asked() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(os.environ.get(GROUP, "run"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def asked() -> int:
    """Returns how many processes torchrun has started, whether they are connected or not."""
    return int(os.environ.get("WORLD_SIZE") or 1)  # a number: the command line has looked at it


def count() -> int:
    """Returns the number of processes that share the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """Returns which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def local_index() -> int:
    """Returns which of those on this machine this is, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK") or index())


def leads() -> bool:
    """Tells whether this is the first process, which writes the run's files."""
    return index() == 0


def environment(job: int) -> dict[str, str]:
    """Returns what the processes of a sweep's run need to find one another."""
    if asked() == 1:
        return {}
    # The store of addresses is there: torchrun or the first process of the sweep has it.
    return {GROUP: f"job {job}", "TORCHELASTIC_USE_AGENT_STORE": "True"}


@dataclass
class Meeting:
    """What processes tell one another at the end of `together`.

    Attributes:
        vote: Inside, that of this process; afterwards, the largest of all.
    """

    vote: int = 0


@contextlib.contextmanager
def together() -> Iterator[Meeting]:
    """Ends in all processes at once; what is raised inside in one of them is raised in all.

    If several raise, the error of the first of them is raised in all, with its traceback as a note.
    Blocks nest, and only sums that directly follow one may stand outside: a process that fails
    meets the others at the end of whatever block they are in.

    Raises:
        ConnectionError: If a process has ended, or does not answer.
    """
    meeting = Meeting()
    if count() == 1:
        yield meeting
        return
    error = None
    try:
        yield meeting
    except Exception as raised:
        if getattr(raised, "met", False):  # all of them are raising it
            raise
        raised.add_note(f"in process {index()}:\n{traceback.format_exc()}")
        error = raised
    facts = torch.tensor([count() - index() if error else 0, meeting.vote])
    try:
        _reduce(facts, dist.ReduceOp.MAX)
        first, meeting.vote = count() - int(facts[0]), int(facts[1])
        if first < count():
            error = _sent(error, first)
    except ConnectionError:
        if error is None:
            raise
    if error is not None:
        error.met = True  # type: ignore[attr-defined]
        raise error


def first(call: Callable[[], T]) -> T:
    """Returns what ``call`` returns in the first process, which alone calls it.

    Raises:
        Exception: In all processes, what it raises there.
    """
    if count() == 1:
        return call()
    with together():
        value = call() if leads() else None
    return _broadcast(value, 0)


def sum_(tensor: Tensor) -> Tensor:
    """Replaces a tensor by its sum over all processes, and returns it."""
    if count() > 1:
        _reduce(tensor, dist.ReduceOp.SUM)
    return tensor


def share_(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by those of the first process."""
    if count() == 1:
        return
    with together():
        pass
    for tensor in tensors:
        dist.broadcast(tensor, 0)


class Gradients:
    """Sums a model's gradients over all processes.

    One sum for all of them, after the last micro-batch, where `DistributedDataParallel` would begin
    with those of the last layers during its backward pass: so processes may have any number of
    micro-batches, or none, one that runs out of memory can say so first, and the gradient is that
    of the summed loss. Models of the arena are small; the sum takes little of a step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._used: list[bool] = []

    def changed(self) -> bool:
        """Tells whether other parameters have gradients here than had them in the last sum."""
        if count() == 1:
            return False
        used = [p.grad is not None for p in self._parameters]
        return any(used) and used != self._used  # none of them: this process had no examples

    def sum_(self, changed: bool) -> None:
        """Replaces gradients by their sums.

        Args:
            changed: What `changed` says in any of the processes.
        """
        if count() == 1:
            return
        if changed:
            used = torch.tensor([p.grad is not None for p in self._parameters], dtype=torch.uint8)
            _reduce(used, dist.ReduceOp.MAX)
            self._used = [bool(somewhere) for somewhere in used]
        # The optimiser leaves out what has no gradient in any of them.
        summed = [p for p, used in zip(self._parameters, self._used, strict=True) if used]
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in summed]
        )
        _reduce(flat, dist.ReduceOp.SUM)
        for p, part in zip(summed, flat.split([p.numel() for p in summed]), strict=True):
            p.grad = part.view_as(p)


def _reduce(tensor: Tensor, operation: "dist.ReduceOp.RedOpType") -> None:
    try:
        dist.all_reduce(tensor, operation)
    except RuntimeError as error:
        raise _lost(error) from error


def _broadcast(value: T, source: int) -> T:
    box = [value]
    try:
        dist.broadcast_object_list(box, source, device=torch.device("cpu"))
    except RuntimeError as error:
        raise _lost(error) from error
    return box[0]


def _lost(error: RuntimeError) -> ConnectionError:
    told = str(error).strip().splitlines()[0]
    lost = ConnectionError(f"another process of this run has ended, or does not answer: {told}")
    lost.met = True  # type: ignore[attr-defined]  # there is nobody to tell
    return lost


def _sent(error: Exception | None, source: int) -> Exception:
    """Returns the error of process ``source``."""
    if index() != source:
        return _broadcast(RuntimeError(), source)
    assert error is not None
    portable = error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of a class that can be made here alone
        portable = RuntimeError(f"{type(error).__name__}: {error}")
    _broadcast(portable, source)
    return error
