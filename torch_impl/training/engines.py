"""How the gradients of a run's processes are joined: by PyTorch's own engines.

DDP, where every process holds the whole model, and FSDP2, where each holds a part of every parameter and the
others' parts of a block for as long as it computes there. Both take the mean of the gradients.
Only a run of several processes imports this file: PyTorch's engines take a second to load.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from warnings import catch_warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

from torch_impl.block import Block
from torch_impl.cross_block import CrossBlock
from torch_impl.seq2seq import Seq2Seq
from torch_impl.training.ranks import Engine, Ranks
from torch_impl.transformer import Embedded


def joined_engine(model: Embedded, ranks: Ranks, sharded_on: torch.device | None, compiled: bool) -> Engine:
    """The engine of a model on several processes: FSDP2 on a kind of device, which changes the parameters in
    place, or else DDP."""
    if sharded_on is not None:
        return _sharded(model, ranks, sharded_on, compiled)
    with catch_warnings(action="ignore", category=FutureWarning):  # the next name is not known to 2.11
        replicated = DistributedDataParallel(
            _ModelLoss(model), broadcast_buffers=False, gradient_as_bucket_view=True
        )
    loss = replicated
    if compiled:
        # DDP's mark for profilers, which torch.compile leaves out, is not for each process to warn of.
        logging.getLogger("torch._dynamo.variables.ctx_manager").setLevel(logging.ERROR)
        loss = torch.compile(replicated)
    return Engine(loss, lambda last: nullcontext() if last else replicated.no_sync())


class _ModelLoss(nn.Module):
    """A model with its loss: what DDP wraps is what backward begins from."""

    def __init__(self, model: Embedded) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> Tensor:
        return self.model.loss(*arguments)


def _sharded(model: Embedded, ranks: Ranks, device: torch.device, compiled: bool) -> Engine:
    """FSDP2, block by block. Weights travel in the precision of the computation, gradients in their own.

    Blocks run compiled in a step alone: an evaluation or a generation has shapes of its own, which would use
    up the versions of one code that torch.compile makes before it gives up.
    """
    stepping = False

    @contextmanager
    def step(last: bool) -> Iterator[None]:
        nonlocal stepping
        stepping = True
        try:
            yield
        finally:
            stepping = False

    def in_steps(fast: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Any) -> Tensor:
        return (fast if stepping else plain)(*inputs)

    mesh = init_device_mesh(device.type, (ranks.size,))
    precise = model.token_embedding.weight.dtype
    policy = MixedPrecisionPolicy(model.compute_dtype, precise, cast_forward_inputs=False)
    for block in [module for module in model.modules() if isinstance(module, Block | CrossBlock)]:
        if compiled:
            block.forward = partial(in_steps, torch.compile(block.forward), block.forward)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for method in ("loss", "encode", "decode") if isinstance(model, Seq2Seq) else ("loss",):
        register_fsdp_forward_method(model, method)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # and divided afterwards: gloo knows no means

    # Every micro-batch hands its gradients on: to add them up here first would take the room of all of them.
    return Engine(model.loss, step)
