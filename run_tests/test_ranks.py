"""Several processes, as torchrun starts them, are one run: the same losses, one voice, one set of files."""

import contextlib
import json
import multiprocessing
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from run_tests import rank_worker
from run_tests.conftest import SMALL, metrics
from torch_impl.training.ranks import Ranks
from torch_impl.training.tokenizer import CharacterTokenizer

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("ranks")  # one process of the suite starts them, once


def forking() -> Any:
    """Where the system can, processes come from one that has everything loaded."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver  # which not every system has

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run_tests.rank_worker"])
    with contextlib.chdir(ROOT):  # where it looks for what it is to load
        forkserver.ensure_running()
    return context


class Family:
    """Processes that play ranks; they are started when they are first needed."""

    def __init__(self) -> None:
        self.context = forking()
        self.members: list[tuple[Any, Any]] = []

    def ask(self, size: int, name: str, **arguments: object) -> list[Any]:
        """What the first `size` processes answer; None for one that died."""
        while len(self.members) < size:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(
                target=rank_worker.serve, args=(theirs, len(self.members)), daemon=True
            )
            process.start()
            theirs.close()
            self.members.append((process, ours))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for _, pipe in self.members[:size]:
            pipe.send((name, size, port, arguments))
        answers = [self._answer(pipe) for _, pipe in self.members[:size]]
        if failed := [answer for answer in answers if isinstance(answer, Exception)]:
            raise ExceptionGroup(f"{name} failed in {len(failed)} of {size} processes", failed)
        return answers

    def _answer(self, pipe: Any) -> Any:
        assert pipe.poll(60), "a process does not answer"
        try:
            return pipe.recv()
        except EOFError:
            return None

    def disband(self) -> None:
        for process, pipe in self.members:
            pipe.close()
            process.kill()
            process.join()
        self.members = []


@pytest.fixture(scope="module")
def family() -> Iterator[Family]:
    family = Family()
    yield family
    family.disband()


@pytest.fixture
def torchrun(family: Family, text: Path) -> Callable[..., list[Any]]:
    """The small run with a batch that one, two and three processes can divide; or another command."""

    def call(size: int, *flags: object, **disturbance: object) -> list[Any]:
        new = [] if "--resume" in flags else [*SMALL.split(), "--train-file", text, "--batch-size", 12]
        arguments = [str(flag) for flag in (*new, *flags)]
        arguments = [
            str(Path(a).absolute()) if before in ("--out", "--resume", "--cache") else a
            for before, a in zip(["", *arguments], arguments, strict=False)
        ]
        if "--resume" not in flags:
            arguments += ["--cache", str(Path("cache").absolute())]
        return family.ask(size, "command", arguments=arguments, **disturbance)

    return call


@pytest.mark.parametrize(
    ("shard", "changes"),
    [
        (False, {}),
        (False, {"architecture": "encoder-decoder", "micro_batches": 2}),
        (True, {"positions": "rope", "norm": "rmsnorm"}),
        (True, {"architecture": "encoder", "micro_batches": 2}),
        (True, {"architecture": "encoder-decoder"}),  # which used to fail: its parameters were gone halfway
        (True, {"optimizer": "muon"}),
    ],
)
def test_one_two_and_four_processes_have_the_same_losses(family, shard, changes):
    """With dropout, clipping, label smoothing, and rows of which different numbers of tokens count."""
    alone, *others = (family.ask(size, "trajectory", shard=shard, **changes) for size in (1, 2, 4))
    for told in others:
        for each in told:
            assert each == pytest.approx(alone[0], rel=1e-9)


@given(parts=st.integers(0, 9), size=st.integers(1, 5))
def test_a_piece_of_work_is_dealt_evenly_and_each_part_counts_once(parts, size):
    hands = [list(Ranks(rank, size).dealt(range(parts))) for rank in range(size)]
    assert {len(hand) for hand in hands} == {-(-parts // size)}
    assert sorted(part for hand in hands for part, counts in hand if counts) == list(range(parts))


def test_sharded_each_process_holds_its_part(family):
    whole, moments = family.ask(2, "held", shard=False)[0]
    assert moments == 2 * whole
    parts = family.ask(2, "held", shard=True)
    assert tuple(map(sum, zip(*parts, strict=True))) == (whole, moments)
    assert max(weights for weights, _ in parts) < 0.6 * whole


def test_sharded_all_blocks_of_a_step_run_compiled_and_none_of_an_evaluation(family):
    """torch.compile gives up where one code needs more than eight versions: those of an evaluation, whose
    shapes are others, used to be among them. Nine blocks with dropout need fewer."""
    for evaluation, _, step in family.ask(2, "compiled", n_layer=9):
        assert evaluation == 0 and step == 9


@pytest.mark.parametrize("shard", [False, True])
def test_a_component_that_departs_from_the_reference_in_one_process_stops_none(family, shard):
    """Where weights are held in parts, all processes put them together for a comparison, or wait for ever."""
    assert family.ask(2, "departures", shard=shard, broken=None) == [[], []]
    _, (found,) = family.ask(2, "departures", shard=shard, broken=1)
    assert found.startswith("blocks.0.ffn (the reference's numbers are finite here")


@pytest.mark.parametrize(("shard", "optimizer", "step"), [("--no-shard", "adamw", 8), ("--shard", "muon", 7)])
def test_what_two_processes_saved_one_and_three_go_on_with(torchrun, shard, optimizer, step):
    """The second process alone is told to stop; both do, after the same step. At the eighth they put off an
    evaluation."""
    torchrun(1, "--out", "whole", "--precision", "float32", "--optimizer", optimizer)
    stopped = torchrun(2, "--out", "two", shard, "--optimizer", optimizer, "--looks", 4, stop=(1, step))
    assert [code for code, _, _ in stopped] == [130, 130]
    left = json.loads(Path("two/last/training.json").read_bytes())
    assert (left["step"], left["owed"] is None) == (step, step == 7)
    assert f"stopped after step {step}" in stopped[0][1]
    looked = EventAccumulator("two/tensorboard").Reload()
    for tag in ("parameters/token_embedding.weight", "gradients, averaged/token_embedding.weight"):
        assert looked.Histograms(tag)[-1].histogram_value.num == 256 * 16  # of the whole matrix
    assert looked.Images("self-attention/layer 01")
    shutil.copytree("two", "three")
    for size, folder in ((1, "two"), (3, "three")):
        assert [answer[0] for answer in torchrun(size, "--resume", folder)] == [0] * size
        for row, wanted in zip(metrics(Path(folder)), metrics(Path("whole")), strict=True):
            numbers, expected = ([*filter(None, part.values())] for part in (row, wanted))
            assert numbers == pytest.approx(expected, rel=1e-5)


def test_the_first_process_alone_speaks_and_writes(torchrun):
    (_, out, err), *others = torchrun(3, "--out", "run", "--looks", 1, "--profile")
    assert "in each of 3 processes" in out and out.count("step 12: ") == 1 and "12/12 steps" in err
    assert all(answer == (0, "", "") for answer in others)
    assert [row["step"] for row in metrics(Path("run"))] == [0, 4, 8, 12]
    assert len(list(Path("run/tensorboard").iterdir())) == 1
    assert out.count("the dearest operations") == out.count("report: ") == 1
    assert "--nproc-per-node 3 train_gpu.py cpu" in Path("run/report.html").read_text(encoding="utf-8")


def test_the_report_knows_among_how_many_processes_each_command_was_given(torchrun):
    """All were told as those of the last session, whose number a batch may not even divide among."""
    for size, flags in (
        (2, ("--out", "run")),
        (2, ("--resume", "run", "--steps", 16)),
        (1, ("--resume", "run")),
    ):
        assert [code for code, _, _ in torchrun(size, *flags)] == [0] * size
    found = json.loads(Path("run/report.json").read_bytes())
    among = "torchrun --nproc-per-node 2 train_gpu.py "
    assert found["command"].startswith(among + "cpu ") and "--steps 12" in found["command"]
    assert found["resumed"] == [
        {"step": 12, "steps": 12, "command": f"{among}--resume run-again --steps 16"},
        {"step": 16, "steps": 16, "command": "python train_gpu.py --resume run-again"},
    ]


def test_processes_may_have_the_text_in_places_of_their_own_also_when_they_go_on(torchrun):
    """Each decided for itself whether the flags had changed, and one waited for a checkpoint that the others
    did not help to write."""
    for process in range(2):
        shutil.copy("text.txt", f"of process {process}.txt")
    own = ("--train-file", Path("of process {rank}.txt").absolute())
    assert [code for code, _, _ in torchrun(2, "--out", "run", *own, stop=(1, 7))] == [130, 130]
    assert [code for code, _, _ in torchrun(2, "--resume", "run", *own)] == [0, 0]
    assert json.loads(Path("run/report.json").read_bytes())["resumed"] == []
    assert [row["step"] for row in metrics(Path("run"))] == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--batch-size", 10],
            "10 sequences at a time, which do not divide among 3 processes; use --batch-size 12",
        ),
        (["--device", "mps"], "--device mps: the 3 processes of torchrun compute on GPUs of their own"),
        (["--device", "cuda"], "--nproc-per-node 3: CUDA finds"),
        (["--n-head", 3], "d_model 16 does not divide into n_head 3 heads"),
    ],
)
def test_a_mistake_is_told_once(torchrun, flags, message):
    answers = torchrun(3, "--out", "run", *flags)
    told = "".join(err for _, _, err in answers)
    assert message in told and told.count("error: ") == 1
    assert all(code in (1, 2) for code, _, _ in answers) and not Path("run").exists()


@pytest.mark.parametrize(
    ("surroundings", "told"),
    [
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE is 2, but its processes cannot meet \(.*RANK expected.*torchrun"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is two, but its processes cannot meet"),
        ({"RANK": "1"}, "batch_size is 0"),
    ],
)
def test_half_of_what_torchrun_says(small_run, monkeypatch, surroundings, told):
    """It was a traceback, and a RANK that something else had set silenced all mistakes."""
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    wrong = ("--batch-size", 0) if "WORLD_SIZE" not in surroundings else ()
    assert re.search(told, small_run("--out", "run", *wrong).error)


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_a_text_that_differs_between_machines_is_refused(torchrun, tmp_path, tokenizer):
    """Two texts were trained on as if they were one, or the processes waited for each other for an hour."""
    for rank in range(2):
        (tmp_path / f"text-{rank}.txt").write_text(f"This is text {rank}. " * (20 + rank), encoding="utf-8")
    flags = ("--out", "run", "--train-file", tmp_path / "text-{rank}.txt", "--tokenizer", tokenizer)
    answers = torchrun(2, *flags)
    told = "".join(err for _, _, err in answers)
    assert "the text of process 1 is not that of process 0; give all machines the same file" in told
    assert told.count("error: ") == 1 and not Path("run").exists()


def test_a_tokenizer_that_differs_between_machines_is_refused(torchrun, tmp_path):
    for rank in range(2):
        CharacterTokenizer("abcdefghijklmnopqrstuvwxyz"[: 20 + rank]).save(tmp_path / f"{rank}.json")
    answers = torchrun(2, "--out", "run", "--tokenizer", tmp_path / "{rank}.json")
    told = "".join(err for _, _, err in answers)
    assert "the tokenizer of process 1 is not that of process 0" in told and not Path("run").exists()


def test_other_flags_on_one_machine_are_refused(torchrun):
    """Each process trained with a learning rate of its own, and the run was said to have finished."""
    answers = torchrun(2, "--out", "run", "--learning-rate", "1e-{rank}")
    told = "".join(err for _, _, err in answers)
    assert (
        "--learning-rate is 0.1 in process 1, and 1.0 in process 0; start all of them with the same" in told
    )
    assert told.count("error: ") == 1 and not Path("run").exists()


@pytest.mark.parametrize("flag", ["--init-from", "--resume"])
def test_other_weights_on_one_machine_are_refused(family, torchrun, text, flag):
    """With --shard one half of each matrix came from each of two models; and machines with checkpoints of
    other steps waited for each other at other times, until gloo aborted."""
    torchrun(1, "--out", "run-0", "--keep-checkpoints", 3)
    shutil.copytree("run-0", "run-1")
    shutil.rmtree("run-1/last")
    shutil.copytree("run-0/step-5", "run-1/last")
    arguments = [flag, str(Path("run-{rank}").absolute())]
    if flag == "--init-from":
        new = ["--out", Path("new").absolute(), "--train-file", text, "--batch-size", "12", "--shard"]
        arguments = [flag, f"{arguments[1]}/last", *map(str, new), "--device", "cpu", "--steps", "3"]
    told = "".join(err for _, _, err in family.ask(2, "command", arguments=arguments))
    assert re.search(r"the (model|checkpoint) in \S*run-[01]\S* of process 1 is not that of process 0", told)
    assert told.count("error: ") == 1 and not Path("new").exists()


def test_a_file_that_one_machine_lacks_is_told_there(text):
    """Its process said nothing, and the other machine's waited for it for an hour."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    for rank in ("0", "1"):
        Path(rank).mkdir()
    CharacterTokenizer("abcdefg").save(Path("0/a.json"))
    machines = []
    for rank in ("0", "1"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", rank]
        command += [*meeting, ROOT / "train_gpu.py", *SMALL.split(), "--train-file", text]
        machine = subprocess.Popen([*command, "--tokenizer", "a.json"], cwd=rank, stderr=subprocess.PIPE)
        machines.append(machine)
    first, second = (machine.communicate(timeout=120)[1].decode("utf-8") for machine in machines)
    told = f"train_gpu.py: error: --tokenizer {Path('1/a.json').absolute()}: no such file"
    assert told in second and "train_gpu.py: error" not in first


def test_processes_that_torchrun_starts_anew_meet_and_speak(text):
    """They looked for each other where those before them had been, and took their failure for another's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", ROOT / "train_gpu.py", *SMALL.split(), "--train-file", text]
    ended = subprocess.run(
        [*command, "--batch-size", "13"], capture_output=True, encoding="utf-8", timeout=120
    )
    assert ended.stderr.count("train_gpu.py: error: batch_size 13 in 1 micro_batches") == 2


def test_a_process_that_dies_does_not_hang_the_others(torchrun, family):
    first, second = torchrun(2, "--out", "run", die=(1, 7))
    assert second is None
    code, _, err = first
    assert code == 1 and "another process of the run is gone" in err and "Traceback" not in err
    family.disband()
    assert torchrun(1, "--resume", "run")[0][0] == 0
