"""The peers in training: nanoGPT's model and transformers' GPT-2, both in the loop of nanoGPT's train.py."""

import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from shutil import which
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.sides import Side
from ref_numpy.config import ModelConfig
from torch_impl.optim import learning_rates
from torch_impl.train import evaluate, keep_freed_memory
from torch_impl.training.config import RunConfig
from torch_impl.training.files import InputError


def peer_side(
    train: np.ndarray,
    valid: np.ndarray,
    folder: str,
    config: RunConfig,
    name: str = "nanoGPT",
    device: str = "cpu",
    tuned: bool = False,
    half: bool = False,
) -> Side:
    """A peer in float32, or half: in bfloat16 by autocast. Tuned: compiled, on the CPU with memory kept
    between steps, and on CUDA with TF32 where float32 is left."""
    model = nanogpts_model(folder, config) if name == "nanoGPT" else Gpt2(config.model)
    if tuned and device == "cpu":
        keep_freed_memory()
    elif tuned:
        torch.set_float32_matmul_precision("high")
    return nanogpts_loop(model, train, valid, config, tuned and has_compiler(), half, device)


def has_compiler() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs."""
    return any(which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))


def load_nanogpt(folder: str) -> ModuleType:
    """nanoGPT's model.py. Raises InputError where the folder has none, or another's."""
    path = Path(folder) / "model.py"
    if not folder or not path.is_file():
        raise InputError(f"--nanogpt {folder or 'is missing'}: name a checkout of nanoGPT, with its model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclass looks there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"--nanogpt {folder}: model.py cannot be imported: {error}") from error
    if not hasattr(module, "GPT") or not hasattr(module, "GPTConfig"):
        raise InputError(f"--nanogpt {folder}: its model.py is not nanoGPT's, it has no GPT and GPTConfig")
    return module


def nanogpts_model(folder: str, config: RunConfig) -> Any:
    """nanoGPT's model of a config's shape, which has its own optimizer."""
    nanogpt, model = load_nanogpt(folder), config.model
    torch.manual_seed(1337)
    with redirect_stdout(io.StringIO()):
        return nanogpt.GPT(
            nanogpt.GPTConfig(
                block_size=model.context_length,
                vocab_size=model.vocab_size,
                n_layer=model.n_layer,
                n_head=model.n_head,
                n_embd=model.d_model,
                dropout=model.dropout,
                bias=model.bias,
            )
        )


class Gpt2(nn.Module):
    """transformers' GPT-2, as nanoGPT's loop calls a model."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.d_model}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout)
        self.model = GPT2LMHeadModel(
            GPT2Config(vocab_size=model.vocab_size, n_positions=model.context_length, **sizes, **dropouts)
        )

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(ids, use_cache=False).logits
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def configure_optimizers(self, decay: float, rate: float, betas: tuple, device: str) -> torch.optim.AdamW:
        fused = device == "cuda"  # as nanoGPT's
        return torch.optim.AdamW(self.parameters(), lr=rate, betas=betas, weight_decay=decay, fused=fused)


def nanogpts_loop(
    model: Any,
    train: np.ndarray,
    valid: np.ndarray,
    config: RunConfig,
    compiled: bool,
    half: bool,
    device: str,
) -> Side:
    """The batches, the optimizer and the steps of nanoGPT's train.py, for its own model or another's with
    `(ids, targets) -> (logits, loss)` and `configure_optimizers`. half: in bfloat16, by autocast."""
    training, T = config.training, config.model.context_length
    model = model.to(device)
    with redirect_stdout(io.StringIO()):
        betas = (training.beta1, training.beta2)
        optimizer = model.configure_optimizers(training.weight_decay, training.learning_rate, betas, device)
    rates = learning_rates(training).tolist()
    forward = torch.compile(model) if compiled else model
    precision = partial(torch.autocast, device, torch.bfloat16, enabled=half)

    def get_batch(path: Path) -> tuple[Tensor, Tensor]:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        ix = torch.randint(len(data) - T, (training.batch_size,))
        x = torch.stack([torch.from_numpy((data[i : i + T]).astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy((data[i + 1 : i + 1 + T]).astype(np.int64)) for i in ix])
        if device == "cpu":
            return x, y
        return tuple(part.pin_memory().to(device, non_blocking=True) for part in (x, y))

    def steps() -> Iterator[None]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            path = Path(temporary) / "train.bin"
            train.astype(np.uint16).tofile(path)
            x, y = get_batch(path)
            for step, rate in enumerate(rates):
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with precision():
                    _, loss = forward(x, y)
                x, y = get_batch(path)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if step % config.run.log_every == 0:
                    loss.item()
                yield

    class WithLoss(nn.Module):
        """The model as evaluate() asks one."""

        config = SimpleNamespace(context_length=T)

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def loss(self, batch: tuple[Tensor, Tensor], count: int) -> Tensor:
            ids, targets = batch
            with precision():
                return model(ids, targets.contiguous())[1] * (targets.numel() / count)

    def held_out_loss() -> float:
        model.eval()  # without dropout
        loss = evaluate(WithLoss(), torch.from_numpy(valid).to(device))
        model.train()
        return loss

    return Side(steps(), held_out_loss)
