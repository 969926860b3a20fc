"""The processes that share one compression: who this one is, and how they agree. Alone, everything here is a no-op.

Rank 0 leads: it solves, writes and speaks. All ranks run the same code and meet at the same calls in the same order.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from lilliput.errors import LilliputError, ToldError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
# What torchrun tells each process; other launchers set the same.
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A rank waits while another one solves or measures. One that is gone is noticed at once, by its closed connection.
_PATIENCE = timedelta(days=30)


def _grouped() -> bool:
    if "torch.distributed" not in sys.modules:
        return False  # nobody can have made a group, and the command line asks before it needs torch
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _launched(environment: Mapping[str, str]) -> bool:
    return all(environment.get(key) for key in _ENVIRONMENT) and int(environment["WORLD_SIZE"]) > 1


def rank() -> int:
    """The number of this process, from 0."""
    if _grouped():
        import torch.distributed as dist

        return dist.get_rank()
    return int(os.environ["RANK"]) if _launched(os.environ) else 0


def size() -> int:
    """How many processes there are."""
    if _grouped():
        import torch.distributed as dist

        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if _launched(os.environ) else 1


def lead() -> bool:
    """Whether this process is the one that solves, writes and speaks."""
    return rank() == 0


def local() -> int:
    """The number of this process on its machine, which is that of its accelerator."""
    return int(os.environ.get("LOCAL_RANK", rank()))


@contextmanager
def joined() -> Iterator[None]:
    """The process group while the context lasts, where a launcher such as torchrun has started several processes.

    A group that the caller has made already is used, and left to the caller. Tensors on the CPU travel by gloo, those
    on an accelerator by nccl.
    """
    if not _launched(os.environ):
        yield
        return
    import torch
    import torch.distributed as dist

    if not dist.is_available() or dist.is_initialized():
        yield
        return
    both = torch.cuda.is_available() and dist.is_nccl_available()
    with talking():
        dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def talking() -> Iterator[None]:
    """Raises LilliputError where another process is gone; it is the leader who says so."""
    try:
        yield
    except RuntimeError as error:
        kind = LilliputError if lead() else ToldError
        raise kind(
            "the processes of this run have lost each other; most likely one ended, and its own message says why "
            f"({str(error).splitlines()[0]}). Start all of them again with the same command: it continues after the "
            "last finished block"
        ) from error


def share(count: int) -> slice:
    """The part of `count` samples that is this process's: contiguous, sizes differ by at most one."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def same(tensor: Tensor) -> Tensor:
    """`tensor`, contiguous and of equal shape and dtype everywhere, overwritten with the leader's content."""
    if _grouped():
        import torch

        with talking():
            torch.distributed.broadcast(tensor.detach().view(-1).view(torch.uint8), 0)
    return tensor


def _sent(value: T, source: int) -> T:
    import torch

    mine = rank() == source
    text = json.dumps(value).encode() if mine else b""
    length = torch.tensor([len(text)])
    with talking():
        torch.distributed.broadcast(length, source)
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8) if mine else torch.empty(int(length)).byte()
        torch.distributed.broadcast(data, source)
    answer: T = value if mine else json.loads(data.numpy().tobytes())
    return answer


def agreed(value: T) -> T:
    """The leader's value, which is plain data as JSON knows it: tuples come out as lists. Everybody waits for it."""
    return _sent(value, 0) if _grouped() else value


def gathered(value: T) -> list[T]:
    """The values of all ranks in their order, plain data as in `agreed`. Everybody waits for everybody."""
    return [_sent(value, n) for n in range(size())] if _grouped() else [value]


def add(tensor: Tensor) -> Tensor:
    """`tensor` overwritten with its sum over all ranks."""
    if _grouped():
        import torch

        with talking():
            torch.distributed.all_reduce(tensor)
    return tensor


def largest(tensor: Tensor) -> Tensor:
    """`tensor` overwritten with its largest values over all ranks."""
    if _grouped():
        import torch

        with talking():
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor


def met() -> None:
    """Everybody waits for everybody."""
    gathered(None)


@contextmanager
def together() -> Iterator[None]:
    """What stops one rank stops all: a LilliputError raised inside on any rank is raised afterwards on every rank.

    The leader's own, or the first, is the leader's to say; the others raise a ToldError of the same text. No rank may
    wait for another inside.
    """
    mine: LilliputError | None = None
    try:
        yield
    except LilliputError as error:
        mine = error
    messages = [text for text in gathered(None if mine is None else str(mine)) if text is not None]
    if mine is not None and lead():
        raise mine
    if messages:
        raise (LilliputError if lead() else ToldError)(messages[0])
