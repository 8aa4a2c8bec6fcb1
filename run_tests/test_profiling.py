"""--profile: what a step spends its time on."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

from run_tests.conftest import content
from torch_impl.training.profiling import operations, steps_to_watch, table


def test_a_profiled_run_tells_its_dearest_operations_and_stays_the_same(small_run):
    assert small_run("--out", "plain").code == 0
    outcome = small_run("--out", "run", "--profile")
    assert outcome.code == 0 and content(Path("run")) == content(Path("plain"))
    lines = outcome.out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("the dearest operations of 2 steps"))
    rows = lines[start + 1 : start + 11]
    assert sum(row.startswith("aten::") for row in rows) > 5
    assert all(len(line) <= 80 for line in lines[start : start + 13])
    shares = [float(row.split()[-2].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True) and 20 < sum(shares) <= 100
    trace = json.loads(gzip.decompress(Path("run/trace.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::addmm" for event in trace["traceEvents"])


def test_a_run_that_is_done_has_nothing_to_profile(small_run, cli):
    assert small_run("--out", "run", "--steps", 1, "--profile").code == 0
    Path("run/trace.json.gz").unlink()
    assert cli("--resume", "run", "--profile").code == 0
    assert not Path("run/trace.json.gz").exists()


@given(st.integers(0, 100), st.integers(1, 100), st.integers(1, 50), st.integers(1, 50))
def test_the_steps_that_are_watched_do_nothing_else(done, left, eval_every, checkpoint_every):
    watched = steps_to_watch(done, done + left, (eval_every, checkpoint_every))
    assert 1 <= len(watched) <= 5 and done < watched[0] and watched[-1] <= done + left
    assert not [step for step in watched[:-1] if step % eval_every == 0 or step % checkpoint_every == 0]


def kernel(name: str, microseconds: float, device: DeviceType = DeviceType.CUDA, annotation: bool = False):
    event = FunctionEventAvg()
    event.key, event.count, event.device_type, event.is_user_annotation = name, 10, device, annotation
    event.self_device_time_total = microseconds if device == DeviceType.CUDA else 0.0
    event.self_cpu_time_total = microseconds if device == DeviceType.CPU else 0.0
    return event


def test_on_a_gpu_its_kernels_count_and_not_the_host():
    """The host's time runs beside theirs; an annotation's is that of the kernels in it."""
    events = [
        kernel(
            "void at::native::(anonymous namespace)::multi_tensor_apply<at::A<float, 4>, f<int> >(T1, T2)",
            750,
        ),
        kernel("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute", 250),
        kernel("aten::mm", 5000, DeviceType.CPU),
        kernel("step", 1000, annotation=True),
    ]
    heading, first, second, total = table(operations(events), 5).splitlines()
    assert first.split() == ["at::native::multi_tensor_apply", "0.150", "75.0%", "2.0"]
    assert second.startswith("sm90_xmma_gemm") and second.split()[1:] == ["0.050", "25.0%", "2.0"]
    assert total.split() == ["all", "0.200"] and max(map(len, (heading, first, second))) <= 80


@pytest.mark.parametrize("number", [1, 10, 11, 40])
def test_no_more_than_ten_are_named(number):
    lines = table(operations([kernel(f"kernel{n}", n + 1.0) for n in range(number)]), 5).splitlines()
    assert len([line for line in lines if line.startswith("kernel")]) == min(number, 10)
    assert [line.split()[0] for line in lines if "others" in line] == [str(number - 10)] * (number > 10)
