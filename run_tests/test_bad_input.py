"""What a user or a machine can get wrong: one line, a non-zero exit, and nothing lost."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ref_numpy.parameters import parameter_shapes
from run_tests.conftest import SMALL, Outcome, content
from run_tests.conftest import metrics as metrics_of
from torch_impl.ffn import FFN
from torch_impl.training import memory, objectives
from torch_impl.training import run as run_module
from torch_impl.training.config import read_config
from torch_impl.training.costs import parameter_count
from torch_impl.training.device import Place
from torch_impl.training.memory import largest_that_fits, needed_bytes, step_bytes
from torch_impl.training.presets import PRESETS
from torch_impl.training.ranks import ALONE, Ranks

ROOT = Path(__file__).parents[1]
GPU = Place(torch.device("cuda"), torch.bfloat16, False)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read .*bad\.txt: No such file"),
        (b"", r"bad\.txt is empty"),
        (b"text\0text", r"bad\.txt is not text: byte 4 is NUL"),
        (b"caf\xe9 au lait", r"bad\.txt is not UTF-8 text: byte 3 is 0xe9"),
        (b"short", r"the training text has 4 tokens, but context_length 8 needs at least 9"),
        (
            b"a text of 26 bytes in all.",
            r"the held-out text \(the last tenth of the training text\) has 3 tokens",
        ),
    ],
)
def test_a_text_that_cannot_be_used(small_run, content, message):
    if content is not None:
        Path("bad.txt").write_bytes(content)
    outcome = small_run("--train-file", "bad.txt", "--out", "run")
    assert outcome.code == 2
    assert re.search(message, outcome.error)
    assert not Path("run").exists()


def test_a_held_out_text_that_cannot_be_used(small_run):
    Path("short.txt").write_bytes(b"short")
    error = small_run("--valid-file", "short.txt", "--out", "run").error
    assert "the held-out text has 5 tokens, but context_length 8 needs at least 9" in error
    Path("folder").mkdir()
    assert "folder is a folder" in small_run("--valid-file", "folder", "--out", "run").error


def test_a_run_is_never_overwritten(small_run):
    small_run("--out", "run")
    before = content(Path("run"))
    assert "run exists, and a run is never overwritten" in small_run("--out", "run").error
    assert content(Path("run")) == before


def test_a_run_folder_that_cannot_be_made(small_run, text):
    assert "cannot create the run folder" in small_run("--out", text / "run").error


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:99", "CUDA finds"), ("abacus", "is no device"), ("meta", "is not supported")],
)
def test_a_device_that_is_not_here(small_run, device, message):
    assert message in small_run("--device", device, "--out", "run").error


def test_training_that_blows_up_stops_and_keeps_the_last_good_checkpoint(small_run):
    flags = ("--learning-rate", "1e30", "--warmup-steps", "0", "--clip", "0", "--checkpoint-every", "1")
    outcome = small_run("--out", "run", *flags)
    assert outcome.code == 1
    assert re.search(
        r"step \d+: .* (nan|inf|finite number).*stopped.*run.last.*learning-rate below 1e\+30", outcome.error
    )
    for name in ("last", "best"):
        for tensor in load_file(Path("run") / name / "model.safetensors").values():
            assert tensor.isfinite().all()


@pytest.mark.parametrize("flags", [(), ("--precision", "float16"), ("--detect-anomaly",)])
def test_what_is_to_blame_for_a_loss_that_is_none_is_named(small_run, monkeypatch, flags):
    """From step 7 on, the first block's feed-forward layer divides by zero. The run goes back to its last
    checkpoint, of step 5, and finds it."""
    forward = FFN.forward

    def broken(self, x):
        return forward(self, x) / (0.0 if clock[0] >= 6 else 1.0)

    clock, sample_batch = [0], objectives.sample_batch

    def watched(tokens, context_length, step, config):
        clock[0] = int(step)
        return sample_batch(tokens, context_length, step, config)

    monkeypatch.setattr(objectives, "sample_batch", watched)
    monkeypatch.setattr(FFN, "forward", broken)
    outcome = small_run("--out", "run", "--eval-every", 5, *flags)
    assert outcome.code == 1
    if "--detect-anomaly" in flags:
        assert (
            "departs from the NumPy reference is blocks.0.ffn (the reference's numbers are" in outcome.error
        )
    else:
        assert "step 7: the loss is nan: the first to make one is blocks.0.ffn; gradients" in outcome.error
        assert "gradients that are not finite: token_embedding.weight, " in outcome.error
    assert json.loads(Path("run/last/training.json").read_bytes())["step"] == 5


@pytest.mark.parametrize("flags", [(), ("--detect-anomaly",)])
def test_a_gradient_that_is_none_though_the_forward_pass_is_finite(small_run, monkeypatch, flags):
    """--detect-anomaly compared forward passes alone, and told that each component does what the reference
    does."""
    forward = FFN.forward

    def broken(self, x):
        y = forward(self, x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient / 0.0)
        return y

    monkeypatch.setattr(FFN, "forward", broken)
    error = small_run("--out", "run", *flags).error
    told = "the norm of the gradient is nan: the forward pass is finite, the gradient that comes back to "
    assert f"step 1: {told}blocks.0.ffn is not; gradients that are not finite: " in error
    not_compared = "(not compared: the output projection, the loss, any backward pass)"
    assert (not_compared in error) == bool(flags) and "departs" not in error


def test_a_failure_that_only_the_compiled_step_has_is_told_as_such(small_run, monkeypatch):
    train_steps = run_module.train_steps

    def poisoned(state, tokens, config):
        for metrics in train_steps(state, tokens, config):
            yield metrics._replace(loss=metrics.loss * float("nan"))

    monkeypatch.setattr(run_module, "train_steps", poisoned)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    told = "done again without torch.compile, the step is finite: the cause may be the compiled code"
    assert told in small_run("--out", "compiled", "--compile", "on").error
    assert "done again, the step is finite; stopped" in small_run("--out", "eager").error


def test_the_step_that_blew_up_is_named_though_the_loss_is_read_seldom(small_run, monkeypatch):
    train_steps = run_module.train_steps

    def poisoned(state, tokens, config):
        for metrics in train_steps(state, tokens, config):
            yield metrics._replace(loss=metrics.loss * float("nan")) if state.step >= 7 else metrics

    monkeypatch.setattr(run_module, "train_steps", poisoned)
    outcome = small_run("--out", "run", "--log-every", 100, "--eval-every", 5)
    assert "step 7: the loss is nan" in outcome.error
    assert json.loads(Path("run/last/training.json").read_bytes())["step"] == 5


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out(small_run, monkeypatch, error):
    def exhausted(state, tokens, config):
        raise error
        yield

    monkeypatch.setattr(run_module, "train_steps", exhausted)
    outcome = small_run("--out", "run", "--batch-size", 32)
    assert outcome.code == 1
    assert "out of memory with batch_size 32 in 1 micro_batches and context_length 8" in outcome.error
    for part in ("a step needs ", "weights ", "gradients ", "moments ", "activations "):
        assert part in outcome.error
    assert "largest batch that fits, with the same result: --micro-batches 2, 16 at a time" in outcome.error


def test_the_largest_batch_that_fits_is_the_largest():
    config = PRESETS["gpt2-124m"]
    for gib in (8, 24, 80):
        fewest = largest_that_fits(config, GPU, gib << 30, ALONE)
        counts = [m for m in range(1, 481) if 480 % m == 0]
        fits = [step_bytes(config, GPU, m, ALONE).peak <= gib << 30 for m in counts]
        assert fits == sorted(fits) and fewest == counts[fits.index(True)]
    assert largest_that_fits(config, GPU, 1 << 30, ALONE) is None
    sharded = replace(config, run=replace(config.run, shard=True))
    eight = Ranks(size=8)
    one, each = (step_bytes(kind, GPU, 60, eight).moments for kind in (config, sharded))
    assert each * 8 == one
    assert largest_that_fits(config, GPU, 24 << 30, eight) < largest_that_fits(config, GPU, 24 << 30, ALONE)


def test_a_batch_is_fitted_into_the_memory_that_is_free(small_run, monkeypatch):
    """Room for two of the four sequences, at three quarters; the losses are those of the whole batch."""
    size = "--context-length", 64
    assert small_run("--out", "whole", "--batch-size", 4, *size).code == 0
    config = read_config(Path("whole/last"))
    needed = step_bytes(config, Place(torch.device("cpu"), torch.float32, False), 2, ALONE).peak
    monkeypatch.setattr(memory, "free_memory_of", lambda device: int(needed / 0.75) + 8)
    fit = small_run("--out", "fitted", "--batch-size", "auto", "--micro-batches", 1, *size)
    assert fit.code == 0 and "batches of 4 sequences, 2 at a time" in fit.out
    assert read_config(Path("fitted/last")).training.micro_batches == 2
    for whole, part in zip(metrics_of(Path("whole")), metrics_of(Path("fitted")), strict=True):
        assert part["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)
    monkeypatch.setattr(memory, "free_memory_of", lambda device: 1000)
    error = small_run("--out", "none", "--batch-size=auto").error
    assert "a single sequence needs " in error and not Path("none").exists()


def test_free_memory_is_some_and_not_all():
    free, present = (ask(CPU) for ask in (memory.free_memory_of, memory.memory_of))
    assert (free, present) == (None, None) or 0 < free < present


def test_a_program_error_is_not_called_a_users_mistake(small_run, monkeypatch):
    def broken(state, tokens, config):
        raise RuntimeError("shapes do not match")
        yield

    monkeypatch.setattr(run_module, "train_steps", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        small_run("--out", "run")


def test_a_folder_that_nobody_may_write_to_any_more(small_run, cli, on_file_operation):
    small_run("--out", "whole")

    def refused(event, path):
        if "last.new" in path.parts and Path("run/best").exists():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    on_file_operation(refused)
    outcome = small_run("--out", "run")
    on_file_operation(None)
    assert outcome.code == 1
    assert re.search(r"last.new: Permission denied; what was saved before is whole.*--resume", outcome.error)
    assert cli("--resume", "run").code == 0
    assert content(Path("run")) == content(Path("whole"))


@pytest.mark.skipif(os.name == "nt", reason="a file that is in use cannot be deleted there")
def test_files_that_vanish_while_a_run_reads_them_are_not_missed(small_run, cli, text, monkeypatch):
    """The ids are mapped, and stay until the run lets go of them. To go on, it needs the text again."""
    small_run("--out", "whole")
    train_steps = run_module.train_steps

    def vanishing(state, sample, config):
        for metrics in train_steps(state, sample, config):
            if state.step == 3:
                shutil.rmtree("cache")
                text.unlink()
            yield metrics

    monkeypatch.setattr(run_module, "train_steps", vanishing)
    assert small_run("--out", "run").code == 0
    assert content(Path("run")) == content(Path("whole"))
    assert "cannot read" in cli("--resume", "run", "--steps", 14).error


def test_a_disk_that_fills_up_at_any_moment(small_run, cli, on_file_operation):
    """Each file operation of a run fails once; the run says so and resumes to the same end."""
    small_run("--out", "whole")
    whole = content(Path("whole"))
    operations = 0

    def count(event, path):
        nonlocal operations
        operations += "run" in path.parts

    on_file_operation(count)
    small_run("--out", "run")
    on_file_operation(None)
    assert operations > 100
    for fatal in range(7, operations, 13):
        shutil.rmtree("run")
        seen = 0

        def full(event, path, fatal=fatal):
            nonlocal seen
            seen += "run" in path.parts
            if seen == fatal:
                seen += 1
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

        on_file_operation(full)
        outcome = small_run("--out", "run")
        on_file_operation(None)
        if outcome.code == 0:  # what failed was the removal of something that is not needed any more
            assert content(Path("run")) == whole
            continue
        assert outcome.code == 1 and "the disk is full" in outcome.error
        if not Path("run/last").exists():
            continue  # nothing was saved yet
        assert not [path for path in Path("run").iterdir() if path.suffix == ".new"]
        assert cli("--resume", "run").code == 0
        assert content(Path("run")) == whole


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "tokenizer.json", "training.json"]
)
def test_a_checkpoint_with_a_file_missing_or_cut_short(small_run, cli, name):
    small_run("--out", "run")
    path = Path("run/last") / name
    path.write_bytes(path.read_bytes()[:-5])
    assert re.search(rf"{name}.*(is damaged|is no|not JSON)", cli("--resume", "run").error)
    path.unlink()
    assert re.search(rf"run.last.*incomplete.*{name}|{name}.*missing", cli("--resume", "run").error)


def test_a_checkpoint_of_another_model(small_run, cli):
    small_run("--out", "run")
    small_run("--out", "wide", "--d-model", 32)
    small_run("--out", "deep", "--n-layer", 2)
    for other in ("wide", "deep"):
        for name in ("model", "optimizer"):
            shutil.copytree("run", "mixed")
            shutil.copy(f"{other}/last/{name}.safetensors", f"mixed/last/{name}.safetensors")
            assert f"{name}.safetensors does not fit config.json" in cli("--resume", "mixed").error
            shutil.rmtree("mixed")


def test_a_checkpoint_in_another_number_format(small_run, cli):
    small_run("--out", "run")
    path = Path("run/last/model.safetensors")
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    assert "is F16" in cli("--resume", "run").error


def test_a_config_that_claims_a_billion_layers_allocates_nothing(small_run, cli):
    small_run("--out", "run")
    path = Path("run/last/config.json")
    path.write_bytes(path.read_bytes().replace(b'"n_layer": 1', b'"n_layer": 1000000000'))
    assert "does not fit config.json" in cli("--resume", "run").error


def test_a_file_that_leads_out_of_the_run_folder(small_run, cli, tmp_path):
    small_run("--out", "run")
    victim = tmp_path / "victim"
    shutil.move("run/metrics.jsonl", victim)
    Path("run/metrics.jsonl").symlink_to(victim)
    before = victim.read_bytes()
    assert "symbolic link" in cli("--resume", "run").error
    assert victim.read_bytes() == before


def test_a_loss_scale_from_a_stranger(small_run, cli):
    small_run("--out", "run", "--precision", "float16")
    path = Path("run/last/training.json")
    path.write_bytes(path.read_bytes().replace(b'"growth_factor"', b'"grow"'))
    assert "training.json: a value is of the wrong kind" in cli("--resume", "run").error


@pytest.mark.parametrize("damage", [b"{}", b'{"format_version": 1}', b"[1]"])
def test_a_foreign_training_json(small_run, cli, damage):
    small_run("--out", "run")
    Path("run/last/training.json").write_bytes(damage)
    assert "training.json" in cli("--resume", "run").error


@pytest.mark.skipif(os.name == "nt", reason="memory is not promised there: the allocation itself fails")
@pytest.mark.parametrize(
    "flags", [["--d-model", "100000", "--n-layer", "100"], ["--n-layer", 10**12], ["--batch-size", 10**9]]
)
def test_a_model_that_can_never_fit_is_refused_before_anything_is_allocated(small_run, flags):
    outcome = small_run("--out", "run", *flags)
    assert outcome.code == 2
    assert re.search(
        r"need [\d,.]+ GiB of memory at least, but this machine has [\d,.]+: reduce", outcome.error
    )
    assert not Path("run").exists()


def test_the_memory_of_a_run_counts_every_parameter():
    config = PRESETS["nanogpt-cpu"]
    assert parameter_count(config.model) == sum(map(prod, parameter_shapes(config.model).values()))
    more = replace(config, training=replace(config.training, micro_batches=12))
    assert 16 * parameter_count(config.model) < needed_bytes(more, CPU) < needed_bytes(config, CPU)


def test_a_compiler_that_is_missing(text):
    """torch.compile needs a C++ compiler on the CPU."""
    command = [sys.executable, str(ROOT / "train_gpu.py"), *SMALL.split(), "--train-file", str(text)]
    environment = {
        **os.environ,
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(Path("cache").absolute()),
    }
    outcome = subprocess.run(
        [*command, "--compile", "on"], env=environment, capture_output=True, encoding="utf-8"
    )
    assert outcome.returncode == 1
    assert "C++ compiler" in Outcome(1, "", outcome.stderr).error and "--compile off" in outcome.stderr
