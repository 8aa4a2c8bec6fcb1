"""Everything before the first step of a run: text, tokenizer, model and folder, new or from a checkpoint."""

import os
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from torch_impl.float8 import use_float8
from torch_impl.seq2seq import make_model
from torch_impl.train import FromHost, StepMetrics, TrainState, start
from torch_impl.training.agreement import refuse_uneven, require_same_flags, tensors_sha256
from torch_impl.training.beginning import new_run_folder, resumed_run_folder
from torch_impl.training.captured import CudaGraphs
from torch_impl.training.checkpoint import load_model, load_parameters, put_back
from torch_impl.training.command_line import Request
from torch_impl.training.config import RunConfig, read_config
from torch_impl.training.corpus import Corpus, make_tokenizer
from torch_impl.training.counting import counted
from torch_impl.training.device import Place, choose_place
from torch_impl.training.events import TensorBoardEvents
from torch_impl.training.files import InputError, refuse_links, settle_folder
from torch_impl.training.growth import with_chat_tokens, with_new_rows
from torch_impl.training.looks import Look
from torch_impl.training.memory import fitted, refuse_what_cannot_fit
from torch_impl.training.objectives import Objective, load_for, make_objective
from torch_impl.training.progress import Progress, load_progress
from torch_impl.training.ranks import Ranks
from torch_impl.training.recompute import recompute_blocks
from torch_impl.training.spikes import SpikeWatch
from torch_impl.training.telemetry import MetricsLog
from torch_impl.training.tokenizer import Tokenizer, WordTokenizer, tokenizer_sha256
from torch_impl.training.word_vectors import coverage, place_word_vectors, read_word_vectors
from torch_impl.transformer import Embedded

_COUNTED_AT_ONCE = 1 << 24  # ids


@dataclass
class Run:
    """What a run holds while it trains."""

    folder: Path
    require_folder: Callable[[], None]  # before what is written: raises FileNotFoundError where it was moved
    place: Place
    config: RunConfig
    tokenizer: Tokenizer
    state: TrainState
    progress: Progress
    objective: Objective
    unsaved: bool  # whether a killed run would go on without these settings, or not at all
    before: float  # seconds spent in the sessions before this one
    metrics: MetricsLog
    events: TensorBoardEvents | None  # of the first process alone
    seen: Look | None = None  # in this session
    spikes: SpikeWatch = field(default_factory=SpikeWatch)
    pending: list[StepMetrics] = field(default_factory=list)  # steps whose metrics are not read yet
    started: float = field(default_factory=time.perf_counter)  # this session

    def seconds(self) -> float:
        """Time that the run has taken so far, in all sessions."""
        return self.before + time.perf_counter() - self.started


class _Saved(NamedTuple):
    """What a checkpoint holds, optimizer state aside."""

    config: RunConfig
    tokenizer: Tokenizer
    model: Embedded
    progress: Progress


def prepare(request: Request, ranks: Ranks, held: ExitStack) -> Run:
    """The run that the request describes. Raises InputError or ConfigError where it cannot be.

    The folder is locked for as long as `held` is; a new run's is made when nothing can be wrong with the
    request any more. Of several processes the first one writes, before the others read.
    """
    require_folder = _no_folder_of_its_own
    if request.resume and ranks.first:
        refuse_links(request.resume)
        require_folder = held.enter_context(resumed_run_folder(request.resume))
    require_same_flags(request, ranks)
    refuse_uneven(request, ranks)
    _settle_order_of_sums(request.config.run.deterministic)
    config, place = request.config, choose_place(request.config.run, ranks)
    _refuse_place(config, place, ranks)
    sharded = config.run.shard and ranks.size > 1
    home = torch.device("cpu") if sharded else place.device  # of the model while it is whole
    saved = _load(request.resume, require_folder, place.dtype, home, ranks) if request.resume else None
    corpus = load_for(config)
    ranks.require_the_same("text", corpus.sha256())
    if saved is None:
        with ranks.machine_by_machine():
            tokenizer = make_tokenizer(config.tokenizer, corpus, request.cache)
        if request.init_from and tokenizer.vocab_size != config.model.text_tokens:
            raise InputError(
                f"{config.tokenizer.tokenizer} has {tokenizer.vocab_size} tokens, but the model in "
                f"{request.init_from} {config.model.text_tokens}: they do not belong together"
            )
        if config.run.content == "conversations":
            tokenizer = with_chat_tokens(tokenizer)
        vocab_size = tokenizer.vocab_size + config.model.added_tokens
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
        if not request.fit:
            refuse_what_cannot_fit(config, place.device, ranks)
    else:
        _check_goes_on(request, saved.progress, corpus)
        tokenizer = saved.tokenizer
    ranks.require_the_same("tokenizer", tokenizer_sha256(tokenizer))
    with ranks.machine_by_machine():
        objective = make_objective(corpus, tokenizer, config, request.cache, place.device)
    if config.run.cuda_graph and isinstance(objective.sample, FromHost):
        raise InputError(
            f"--cuda-graph: {place.device} has no room for the text, and batches that the host makes are not "
            "recorded; leave it out"
        )
    if request.fit:  # into what the tokens leave
        config = fitted(config, place, ranks)
        rows = config.training.batch_size // config.training.micro_batches
        print(f"batches of {counted(config.training.batch_size, 'sequence')}, {rows} at a time")

    if saved is None:
        model = _first_model(request.init_from, config, place.dtype, home, ranks)
        if config.start.word_vectors:
            _begin_with_word_vectors(model, config, tokenizer, objective.train_tokens, ranks)
        progress = Progress(corpus.sha256(), processes=ranks.size, on_a_machine=ranks.local_size)
        state = _start(model, config, place, ranks)
        folder = None
        if ranks.first:
            folder, require_folder = held.enter_context(new_run_folder(request.out, config))
        folder = ranks.told(folder)
        metrics = MetricsLog(folder / "metrics.jsonl")
    else:
        progress, folder = saved.progress, request.resume
        metrics = MetricsLog(folder / "metrics.jsonl")
        # The first process decides: machines may have texts elsewhere, and other numbers of processes.
        changed = ranks.told(progress.go_on(saved.config, config, ranks.size, ranks.local_size))
        if changed and ranks.told(_best_is_ahead(folder, progress)):
            progress.forget_best(metrics.rows())
        state = _start(saved.model, config, place, ranks)
        put_back(folder / "last", state, progress)
        if ranks.first:
            require_folder()
            metrics.forget_from(progress.next_row)

    events = None
    if ranks.first:
        events = TensorBoardEvents(folder / "tensorboard", progress.next_row)
        held.callback(events.close)
    return Run(
        folder=folder,
        require_folder=require_folder,
        place=place,
        config=config,
        tokenizer=tokenizer,
        state=state,
        progress=progress,
        objective=objective,
        unsaved=saved is None or changed,
        before=progress.seconds,
        metrics=metrics,
        events=events,
    )


def _no_folder_of_its_own() -> None:
    """What a process that writes nothing requires of the folder."""


def _refuse_place(config: RunConfig, place: Place, ranks: Ranks) -> None:
    """Raises InputError for settings that go with another device, number format or number of processes."""
    if config.run.cuda_graph and (
        place.device.type != "cuda" or ranks.size > 1 or place.dtype == torch.float16
    ):
        among = f" in {ranks.size} processes" if ranks.size > 1 else ""
        raise InputError(
            f"--cuda-graph on {place}{among}: it is for one process on CUDA, not in float16; leave it out"
        )
    if config.run.detect_anomaly and place.products == "float8":
        raise InputError(
            "--detect-anomaly sees nothing beside the rounding of float8; use --precision bfloat16 with it"
        )


def _settle_order_of_sums(deterministic: bool) -> None:
    """Has PyTorch take kernels whose sums have one order, or whichever is fastest.

    cuBLAS has to be told by the environment, before it is first used (PyTorch's notes on reproducibility).
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written


def _start(model: Embedded, config: RunConfig, place: Place, ranks: Ranks) -> TrainState:
    if place.products == "float8":
        use_float8(model)
    torch.set_float32_matmul_precision("high" if place.products == "tf32" else "highest")
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # PyTorch's advice to who chose float32
    if config.run.checkpoint_activations:
        recompute_blocks(model)
    state = start(model, config.training, place.compile, ranks, place.device if config.run.shard else None)
    if config.run.cuda_graph:
        state.recorder = CudaGraphs()
    return state


def _first_model(
    init_from: Path | None, config: RunConfig, dtype: torch.dtype, device: torch.device, ranks: Ranks
) -> Embedded:
    """The model before its first step: with the weights of its seed, or of another folder."""
    model = make_model(config.model, dtype)
    if init_from is None:
        model.initialise(config.training.seed)
        return model.to(device)
    params = load_parameters(init_from, read_config(init_from).model)
    if ranks.size > 1:
        ranks.require_the_same(f"model in {init_from}", tensors_sha256(params))
    if config.model.positions == "learned":  # a shorter context needs only the first of them
        name = "position_embedding.weight"
        params[name] = params[name][: config.model.context_length]
    model.load_state_dict(with_new_rows(params, config.model.vocab_size))
    return model.to(device)


def _load(
    folder: Path, require_folder: Callable[[], None], dtype: torch.dtype, device: torch.device, ranks: Ranks
) -> _Saved:
    if ranks.first:
        require_folder()
        settle_folder(folder / "last")
        settle_folder(folder / "best")
    ranks.wait()
    loaded, progress = load_model(folder / "last", dtype, device), load_progress(folder / "last")
    if ranks.size > 1:
        found = tensors_sha256(loaded.model.state_dict())
        ranks.require_the_same(f"checkpoint in {folder}", f"{found} after step {progress.step}")
    return _Saved(*loaded, progress)


def _best_is_ahead(folder: Path, progress: Progress) -> bool:
    """Whether best/ was found after the last checkpoint, by a session that was killed. The same settings find
    it again; others would never, and it would stay."""
    with suppress(InputError):  # somebody made room there
        return load_progress(folder / "best").step > progress.step
    return False


def _check_goes_on(request: Request, progress: Progress, corpus: Corpus) -> None:
    if progress.corpus != corpus.sha256():
        source = (
            request.config.run.train_file or "the Python reference, which each Python version has its own of"
        )
        raise InputError(
            f"the text has changed since the run in {request.resume} began ({source}); give it the same "
            "--train-file and --valid-file"
        )
    steps = request.config.training.steps
    if progress.step > steps:
        raise InputError(
            f"--steps {steps}, but the run in {request.resume} has done {progress.step}; use a larger one, "
            "or leave the flag out"
        )


def _begin_with_word_vectors(
    model: Embedded, config: RunConfig, tokenizer: Tokenizer, tokens: Integer[Tensor, "N"], ranks: Ranks
) -> None:
    """Put the vectors of the config's file into the embedding, and say which words it lacks."""
    file = Path(config.start.word_vectors)
    if not isinstance(tokenizer, WordTokenizer):
        raise InputError(f"--word-vectors are of words, but {config.tokenizer.tokenizer} holds other tokens")
    read = read_word_vectors(file, {word: row for row, word in enumerate(tokenizer.tokens)})
    if not read.found.any():
        raise InputError(
            f"{file} has none of the text's words; does it need --lowercase, or is it of another language?"
        )
    ranks.require_the_same("file of --word-vectors", tensors_sha256({"": torch.from_numpy(read.vectors)}))
    n = tokenizer.vocab_size
    place_word_vectors(model.token_embedding.weight.detach()[:n], read)
    counts = sum(
        np.bincount(part.cpu().numpy(), minlength=config.model.vocab_size)
        for part in tokens.split(_COUNTED_AT_ONCE)
    )
    print(coverage(read, tokenizer.tokens, counts[:n]))
    if config.training.freeze_embeddings:
        tied = ", and with them the output projection; --no-tied-embeddings trains one" * (
            config.model.tied_embeddings
        )
        print(f"the embeddings are frozen, also those that begin at random{tied}")
