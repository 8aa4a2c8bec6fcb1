"""The processes that share a run, as torchrun starts them: who they are, and what they tell each other.

Each draws the whole batch of a step, which costs next to nothing, and computes its rows of it. A random
number belongs to a row of the whole batch, and the loss is divided by the count of the whole batch: N
processes compute what one does, but for the order of their sums.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torch_impl.training.files import InputError

PATIENCE = timedelta(hours=1)
"""With a process that does not answer: it may be reading a long text. If it died, that is noticed at once."""


Loss = Callable[..., Tensor]
Part = TypeVar("Part")


class AnotherFailed(Exception):
    """Another process of the run failed first, and says why."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine
    local_size: int = 1
    store: Any = None  # torch.distributed's, which outlives this process
    between: Callable[[], None] = lambda: None  # what each does before every part that it is dealt

    @property
    def first(self) -> bool:
        """Whether it is the one that speaks and writes."""
        return self.rank == 0

    def rows(self, n: int) -> slice:
        """This process's part of n rows, which divide."""
        own = n // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def dealt(self, parts: Iterable[Part]) -> Iterator[tuple[Part, bool]]:
        """Of the parts of a piece of work those of this process, dealt out in turn, and whether each counts.

        All processes get equally many, since a model that is held in parts computes with all of them or not
        at all: those whom the last round does not reach repeat the last part, and it does not count.
        """
        n = 0
        for n, part in enumerate(parts, 1):
            if (n - 1) % self.size == self.rank:
                self.between()
                yield part, True
        if 0 < n % self.size <= self.rank:
            self.between()
            yield part, False

    def sums(self, *shares: int | float) -> list[float]:
        """Each number's sum over the processes."""
        return self.total(torch.tensor(shares, dtype=torch.float64)).tolist()

    def total(self, share: Tensor) -> Tensor:
        """The sum of what the processes have, in place."""
        if self.size > 1:
            dist.all_reduce(share)
        return share

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers. Waits for the processes, and not for their devices."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def wait(self) -> None:
        """Until all processes are here."""
        self.largest(0)

    def told(self, value: Any) -> Any:
        """The first process's value."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every process's value."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def require_the_same(self, what: str, name: str) -> None:
        """Raises InputError where processes have found something of another name: a file that each machine
        has for itself may be an older one on some."""
        first, *others = self.gathered(name)
        for rank, other in enumerate(others, 1):
            if other != first:
                raise InputError(
                    f"the {what} of process {rank} is not that of process 0; give all machines the same file"
                )

    @contextmanager
    def machine_by_machine(self) -> Iterator[None]:
        """On each machine one process does what is in the block, and then the others."""
        if self.local_rank:
            self.wait()
        yield
        if not self.local_rank:
            self.wait()

    def first_to_fail(self) -> bool:
        """Whether no other process of the run has failed before."""
        try:
            return self.store is None or self.store.add("failures", 1) == 1
        except RuntimeError:  # the store is gone, and with it whoever could say more
            return True


ALONE = Ranks()

# Groups are never let go of. Their end would wait, with Python's lock held, for gloo's thread, which needs
# that lock when it is the last to let go of a tensor: both would wait for ever.
_groups: list[dist.ProcessGroup] = []


@contextmanager
def joined(on_cuda: bool) -> Iterator[Ranks]:
    """Meets the other processes of the run, where torchrun has started some. All but the first fall silent.

    Where several fail, one says why: AnotherFailed is raised in the others. A process that is gone without a
    word is noticed by the next that waits for it, at the latest when PATIENCE is at its end.

    Raises InputError where the environment has WORLD_SIZE, but not all that torchrun puts beside it.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
        local_rank, local_size = (int(os.environ.get(n, "0")) for n in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    except (ValueError, dist.DistNetworkError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but its processes cannot meet ({reason}); start them "
            "with torchrun, or unset it"
        ) from None
    # torchrun's store outlives the processes that it starts anew, and tells where those before them were.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    _groups.append(dist.group.WORLD)
    ranks = Ranks(rank, size, local_rank, local_size or size, dist.PrefixStore("run", store))
    try:
        with ExitStack() as silence:
            if not ranks.first:
                nowhere = silence.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                silence.enter_context(redirect_stdout(nowhere))
                silence.enter_context(redirect_stderr(nowhere))
            ranks.wait()  # from here on nobody looks at the command line any more
            yield ranks
    except BaseException as error:
        if not ranks.first_to_fail():
            raise AnotherFailed from error
        raise
    finally:
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


class Engine(NamedTuple):
    """How a step computes a micro-batch."""

    loss: Loss  # of a micro-batch, as a share of the step's
    joining: Callable[[bool], AbstractContextManager[None]]  # around forward and backward; True for the last


def make_engine(
    model: Any,
    compiled: bool,
    ranks: Ranks = ALONE,
    sharded_on: torch.device | None = None,
) -> Engine:
    """The engine of a model that has a loss. On several processes each of them holds all of the model, or
    with a device a part of every parameter, which lies there from then on."""
    if ranks.size == 1:
        loss = torch.compile(model.loss) if compiled else model.loss
        return Engine(loss, lambda last: nullcontext())
    from torch_impl.training.engines import joined_engine  # a second to import

    return joined_engine(model, ranks, sharded_on, compiled)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, put together where processes hold parts of it. All of them have to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Of a whole tensor, which every process has, what belongs to this one's part of a parameter."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # a second to import

    where = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), *where, src_data_rank=None)
