"""Generation beside its peers, in one run: python -m benchmarks.generate [--nanogpt FOLDER] [--json FILE].

A GPT-2-124M-shaped model with random weights, a prompt of 32 tokens, 100 new ones, batch 1, float32, greedy.
All take turns, several rounds, and the best round of each counts; reading the prompt is timed along.
transformers, where it is installed, runs `generate` with its cache, at its defaults and with the matmul
precision tuned; nanoGPT, where a folder is given, has no cache. Each token reads all weights: the bound is
what reading them takes when nothing is computed but their sum. The command line is timed by its first
character, with a small model (the preset cpu), from the start of the process.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from timeit import repeat

import numpy as np

import torch_impl  # noqa: F401 (says how OpenMP waits, before torch is there)
from benchmarks.command import check_files, command
from benchmarks.rows import OURS, row, table, write_rows
from ref_numpy.config import ModelConfig, SamplingConfig
from torch_impl.training.flags import parse_flags

PROMPT, NEW, ROUNDS = 32, 100, 3
GPT2 = ModelConfig(vocab_size=50257, context_length=1024, n_layer=12, n_head=12, d_model=768)
GREEDY = SamplingConfig(temperature=0.0)


@dataclass(frozen=True)
class Flags:
    nanogpt: str = ""
    """Folder of nanoGPT, with its model.py; without it, nanoGPT is left out."""
    json: str = ""
    """File that the rows are written to."""


def ours(model, prompt: np.ndarray) -> Callable[[], list[int]]:
    """The fast side."""
    import torch

    from torch_impl.generate import generate

    return lambda: list(generate(model, torch.from_numpy(prompt), NEW, GREEDY))


def reference(model, prompt: np.ndarray) -> Callable[[], list[int]]:
    """The NumPy side, with the same weights."""
    from ref_numpy.generate import generate

    params = {name: value.numpy() for name, value in model.state_dict().items()}
    return lambda: list(generate(params, prompt, GPT2, NEW, GREEDY))


def transformers_peer(model, prompt: np.ndarray, precision: str) -> Callable[[], list[int]] | None:
    """GPT2LMHeadModel.generate with its key/value cache, and the same weights."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    import torch

    from torch_impl.training.hf_tensors import to_hf_tensors

    theirs = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None)).eval()
    theirs.load_state_dict(to_hf_tensors(dict(model.state_dict()), GPT2), strict=False)
    ids = torch.from_numpy(prompt)[None]

    def run() -> list[int]:
        torch.set_float32_matmul_precision(precision)
        try:
            with torch.inference_mode():
                out = theirs.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=NEW,
                    pad_token_id=0,
                )
        finally:
            torch.set_float32_matmul_precision("highest")
        return out[0, PROMPT:].tolist()

    return run


def nanogpt_peer(folder: str, prompt: np.ndarray) -> Callable[[], list[int]]:
    """nanoGPT's generate, which computes the whole context for each token; top_k = 1 takes the likeliest."""
    import torch

    from benchmarks.peers import load_nanogpt

    nanogpt = load_nanogpt(folder)
    theirs = nanogpt.GPT(nanogpt.GPTConfig(dropout=0.0)).eval()
    ids = torch.from_numpy(prompt)[None]

    def run() -> list[int]:
        with torch.inference_mode():
            return theirs.generate(ids, NEW, top_k=1)[0, PROMPT:].tolist()

    return run


def reading_bound(model) -> float:
    """Tokens per second, if a token took only as long as all matrices take to be summed."""
    matrices = [
        param for name, param in model.named_parameters() if param.ndim == 2 and "position" not in name
    ]
    return 1 / min(repeat(lambda: [matrix.sum() for matrix in matrices], number=1, repeat=10))


def first_character() -> float:
    """Seconds from the start of torch_impl.generate to the first character that it writes, at best."""
    from torch_impl.training.checkpoint import save_model
    from torch_impl.training.presets import PRESETS
    from torch_impl.training.tokenizer import ByteTokenizer
    from torch_impl.transformer import initialised

    config, best = PRESETS["cpu"], float("inf")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_model(path, config, ByteTokenizer(), initialised(config.model, 0))
        command = [sys.executable, "-m", "torch_impl.generate", "--model", str(path), "--prompt", "T"]
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            process.stdout.read(2)  # the prompt's own, and one more
            best = min(best, time.perf_counter() - begin)
            process.kill()
            process.communicate()
    return best


def measure(nanogpt: str) -> list[dict]:
    """The rows; prints whether all wrote the same. Raises InputError for a folder that is not nanoGPT's."""
    import torch

    from torch_impl.transformer import initialised

    prompt = np.random.default_rng(0).integers(GPT2.vocab_size, size=PROMPT)
    peer = nanogpt_peer(nanogpt, prompt) if nanogpt else None
    model = initialised(GPT2, 0).requires_grad_(False)
    runs = {
        "torch_impl": ours(model, prompt),
        "ref_numpy": reference(model, prompt),
        "transformers": transformers_peer(model, prompt, "highest"),
        "transformers, matmul precision medium": transformers_peer(model, prompt, "medium"),
        "nanoGPT": peer,
    }
    runs = {name: run for name, run in runs.items() if run is not None}
    core_type = os.environ.get("OPENBLAS_CORETYPE", "not set")
    print(f"{torch.get_num_threads()} threads; OPENBLAS_CORETYPE {core_type}")
    best = dict.fromkeys(runs, 0.0)
    texts = {}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begin = time.perf_counter()
            texts[name] = run()
            best[name] = max(best[name], NEW / (time.perf_counter() - begin))
    same = [texts[name] == texts["torch_impl"] for name in runs if name != "nanoGPT"]
    print(f"{sum(same)} of {len(same)} wrote the same {NEW} tokens")
    best["reading the weights and no more"] = reading_bound(model)
    return [
        row(f"generate, {mine} beside {name}", best[mine], speed, "tokens/s")
        for mine in OURS
        for name, speed in best.items()
        if name not in OURS
    ]


@command("benchmarks.generate")
def main(arguments: list[str]) -> None:
    flags = parse_flags(Flags(), arguments, "python -m benchmarks.generate", __doc__)
    check_files(flags.json)
    rows = measure(flags.nanogpt)
    rows.append(row("first character of the command line, small model", first_character(), None, "s"))
    print(table(rows))
    write_rows(flags.json, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
