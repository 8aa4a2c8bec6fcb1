"""Limits on memory that are narrower than the machine: of control groups, and of a process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from run_tests.conftest import SMALL
from torch_impl.training import memory
from torch_impl.training.counting import in_bytes
from torch_impl.training.device import Place
from torch_impl.training.memory import free_memory_of, machine_memory, memory_of, step_bytes
from torch_impl.training.memory_limits import Limit, group_limits
from torch_impl.training.presets import PRESETS
from torch_impl.training.ranks import ALONE

ROOT = Path(__file__).parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each takes addresses
CPU = torch.device("cpu")
UNLIMITED_1 = 9223372036854771712  # what version 1 says where there is no limit
MEMORY_1, MEMORY_2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


def system(root: Path, member: str, **groups: tuple[object, int, int]) -> Path:
    """A made-up Linux: the lines of /proc/self/cgroup, and of each group its limit, its use, and how much of
    that are copies of files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(member)
    for folder, (most, held, files) in groups.items():
        one = folder.startswith(MEMORY_1)
        names = ("limit_in_bytes", "usage_in_bytes") if one else ("max", "current")
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, content in zip(names, (most, held), strict=True):
            (root / folder / f"memory.{name}").write_text(f"{content}\n")
        stat = f"anon 1\n{'total_' * one}inactive_file {files}\nactive_file 3\n"
        (root / folder / "memory.stat").write_text(stat)
    return root


def test_every_group_around_a_process_limits_it(tmp_path):
    root = system(
        tmp_path,
        "0::/slurm/job7/step0\n",
        **{
            f"{MEMORY_2}/slurm/job7/step0": ("max", 5, 0),
            f"{MEMORY_2}/slurm/job7": (1000, 600, 150),
            f"{MEMORY_2}/slurm": (8000, 7900, 0),
            f"{MEMORY_2}/elsewhere": (1, 1, 0),
        },
    )
    assert group_limits(root) == [Limit(1000, 450), Limit(8000, 7900)]


@pytest.mark.parametrize(
    ("member", "top"),
    [
        ("0::/\n", MEMORY_2),
        ("0::/../../outside\n", MEMORY_2),
        ("0::/docker/4f1c\n", MEMORY_2),
        ("11:cpu,cpuacct:/\n4:memory:/docker/4f1c\n0::/\n", MEMORY_1),
        ("4:hugetlb,memory:/\n", MEMORY_1),
    ],
)
def test_a_container_sees_its_own_group_as_the_outermost(tmp_path, member, top):
    """Whatever the group is called outside, where it may not be seen."""
    assert group_limits(system(tmp_path, member, **{top: (4000, 100, 30)})) == [Limit(4000, 70)]


def test_version_1_has_a_number_for_no_limit(tmp_path):
    groups = {MEMORY_1: (UNLIMITED_1, 900, 0), f"{MEMORY_1}/job": (500, 20, 30)}
    assert group_limits(system(tmp_path, "4:memory:/job\n", **groups)) == [
        Limit(500, 0),
        Limit(UNLIMITED_1, 900),
    ]


def test_systems_without_groups(tmp_path):
    assert group_limits(tmp_path) == []
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a:b\n")
    assert group_limits(tmp_path) == []


needs_a_total = pytest.mark.skipif(machine_memory() is None, reason="the system does not say what it has")


@needs_a_total
def test_the_narrowest_limit_counts(monkeypatch):
    """A group's processes share its limit; each has one of its own."""
    monkeypatch.setattr(memory, "group_limits", lambda: [Limit(10**7, 10**6), Limit(UNLIMITED_1, 5)])
    monkeypatch.setattr(memory, "own_limits", list)
    assert (memory_of(CPU), free_memory_of(CPU)) == (10**7, 9 * 10**6)
    assert (memory_of(CPU, 4), free_memory_of(CPU, 4)) == (10**7, 9 * 10**6)
    monkeypatch.setattr(memory, "own_limits", lambda: [Limit(4 * 10**6, 10**6)])
    assert (memory_of(CPU), free_memory_of(CPU)) == (4 * 10**6, 3 * 10**6)
    assert (memory_of(CPU, 2), free_memory_of(CPU, 2)) == (8 * 10**6, 6 * 10**6)
    monkeypatch.setattr(memory, "group_limits", lambda: [Limit(10**7, 2 * 10**7)])
    assert free_memory_of(CPU) == 0


@needs_a_total
def test_what_a_container_has_no_room_for_is_refused(small_run, monkeypatch):
    """The host's memory was counted, and the run killed without a message."""
    monkeypatch.setattr(memory, "group_limits", lambda: [Limit(10 << 20, 1 << 20)])
    error = small_run("--out", "run", "--batch-size", 1024).error
    assert "but this machine has " in error and "a limit on this process (" in error
    assert "leaves it 10.0 MiB" in error
    assert not Path("run").exists()
    fit = small_run("--out", "run", "--batch-size", 32, "--batch-size", "auto")
    assert fit.code == 0 and "batches of 32 sequences, 32 at a time" in fit.out
    monkeypatch.setattr(memory, "group_limits", lambda: [Limit(10 << 20, (10 << 20) - 300_000)])
    fit = small_run("--out", "narrow", "--batch-size", 32, "--batch-size", "auto")
    assert fit.code == 0 and "batches of 32 sequences, 4 at a time" in fit.out


def test_what_is_advised_fits_into_what_is_left_of_a_limit(monkeypatch):
    """All of the machine was counted, so that the advice was one that had to fail as well."""
    config = PRESETS["nanogpt-cpu"]
    place, rows = Place(CPU, torch.float32, False), config.training.batch_size
    peak = step_bytes(config, place, 1, ALONE).peak
    advised = {}
    for share in (2.0, 0.5):
        left = int(share * peak)
        monkeypatch.setattr(memory, "own_limits", lambda left=left: [Limit(left, 0)])
        told = memory._needs(config, place, ALONE)
        advised[share] = int(told.partition("--micro-batches ")[2].partition(",")[0])
        assert f"there are {in_bytes(left)}. The largest batch that fits" in told
        assert rows % advised[share] == 0
    assert advised[2.0] < advised[0.5] and step_bytes(config, place, advised[0.5], ALONE).peak < peak / 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is held")
def test_a_limit_of_the_process_is_seen_and_kept_to(text):
    flags = ["--d-model", "256", "--n-layer", "2", "--context-length", "256", "--batch-size", "256"]
    command = [sys.executable, str(ROOT / "train_gpu.py"), *SMALL.split(), *flags, "--train-file", str(text)]
    loaded = "import torch; print(open('/proc/self/statm').read().split()[0])"  # in pages, much of it code
    alone = subprocess.run([sys.executable, "-c", loaded], capture_output=True, env=os.environ | ONE_THREAD)
    limit = (int(alone.stdout) * os.sysconf("SC_PAGE_SIZE") >> 10) + 800_000
    bounded = ["bash", "-c", f'ulimit -v {limit}; exec "$@"', "bash", *command, "--out", "run"]
    done = subprocess.run(bounded, capture_output=True, encoding="utf-8", env=os.environ | ONE_THREAD)
    told = re.search(
        r"need 2\.\d GiB of memory at least, but this machine has [\d.]+ [GT]iB, and a limit on this process "
        r"\(its container's, or ulimit -v\) leaves it ([\d.]+) ([MG])iB: reduce",
        done.stderr,
    )
    assert done.returncode == 2 and told
    left = float(told[1]) * {"M": 2**20, "G": 2**30}[told[2]]
    assert 400_000 << 10 < left < limit << 10  # the code of more libraries than PyTorch's is taken off


def test_on_a_gpu_what_others_hold_is_no_room(monkeypatch):
    """All of it was counted, and a batch advised that failed as well."""
    config, place = PRESETS["gpt2-124m"], Place(torch.device("cuda"), torch.bfloat16, False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 << 30)
    needed = memory._needs(config, place, ALONE)
    assert "there are 10.0 GiB" in needed
