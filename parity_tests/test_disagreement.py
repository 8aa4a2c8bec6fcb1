"""A failure explains itself: faults are planted, and the report has to lead to them."""

from unittest.mock import patch

import numpy as np
import pytest
import torch

import torch_impl.block
import torch_impl.layernorm
import torch_impl.linear
import torch_impl.train
from parity_tests import parity
from parity_tests.backends import fast, plain_torch
from parity_tests.disagreement import Disagreement
from parity_tests.parity import Case, require_parity
from parity_tests.steps import Step, require_same_step
from parity_tests.strategies import model_params, seeded
from ref_numpy.config import ModelConfig, SamplingConfig, TrainConfig
from ref_numpy.dropout import DropoutKey
from ref_numpy.optim import zero_moments
from ref_numpy.train import train_step

FAST, PLAIN = "parity_tests.backends.fast", parity.PLAIN
CROSS_ATTENTION = plain_torch.cross_attention
NORM = Case(
    "rmsnorm", {"x": seeded((3, 5), "normal", 1), "weight": seeded((5,), "normal", 2), "epsilon": 1e-5}
)
CONFIG = ModelConfig(
    vocab_size=17, context_length=7, n_layer=3, n_head=2, d_model=8, d_ff=9, dropout=0.1, norm="rmsnorm",
    positions="rope", activation="silu",
)  # fmt: skip
IDS = np.random.default_rng(0).integers(17, size=(2, 5))
MODEL = Case(
    "transformer",
    {
        "params": model_params(CONFIG, 1),
        "ids": IDS,
        "config": CONFIG,
        "key": DropoutKey(3, 4),
        "documents": None,
    },
)
PAIRS = ModelConfig(architecture="encoder-decoder", vocab_size=17, context_length=7, d_model=8, n_head=2)
SEQ2SEQ = Case(
    "seq2seq",
    {
        "params": model_params(PAIRS, 1),
        "source": IDS,
        "present": np.ones(IDS.shape, bool),
        "target": IDS[:, :3],
    }
    | {"config": PAIRS, "key": None},
)


def disagreement(case: Case, backend: str = PLAIN, precisions: tuple[str, ...] = ()) -> Disagreement:
    with pytest.raises(Disagreement) as raised:
        require_parity(parity.target(backend, "cpu", precisions), case)
    return raised.value


class Backwards(torch.autograd.Function):
    """The identity, whose gradient is wrong."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 1.001 * dy


def test_the_worst_element_and_all_that_is_off():
    def one_off(x, weight, epsilon):
        y = weight * x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        return y + torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1e-3, 0], [0, 0, 0, 0, 0]]).to(y)

    with patch.object(plain_torch, "rmsnorm", one_off):
        found = disagreement(NORM)
    got, want = found.got["y"][1, 3], found.want["y"][1, 3]
    assert got - want == pytest.approx(1e-3, abs=1e-9)
    report = str(found)
    assert report.startswith(f"rmsnorm of {PLAIN}: not the same mathematics (float64)\n")
    assert f"y[1, 3] is {got:.12g}, the reference has {want:.12g} (in float64); 1.00e-03 apart" in report
    assert "y: 1 of 15 elements are off, all at 1 of 3 on axis 0, all at 3 of 5 on axis 1\n" in report
    assert "agree: gradient of x, gradient of weight\n" in report
    assert "MATHEMATICS: float64 rounds at 1e-16" in report


@pytest.mark.parametrize(
    ("case", "wrong", "told"),
    [
        (
            Case("window_mask", {"length": 3, "window": 2, "before": 0}),
            lambda length, window, before: torch.ones(3, 3, dtype=torch.bool).tril(),
            "result[2, 0] is the first to differ: True, the reference has False",
        ),
        (
            Case("generate", {"params": model_params(CONFIG, 1), "prompt": IDS[0], "config": CONFIG}
            | {"n_tokens": 3, "sampling": SamplingConfig(temperature=0.0), "seed": 0}),
            lambda *arguments: iter([1, 1, 1]),
            "result[0] is the first to differ: 1, the reference has",
        ),
        (
            Case("clip_by_global_norm", {"gradients": {"a": np.array([3.0, 4.0])}, "limit": 1.0}),
            lambda gradients, limit: (gradients, torch.tensor(5.0, dtype=torch.float64)),
            "result[0][a][1] is 4, the reference has 0.8 (in float64); 3.20e+00 apart",
        ),
    ],
)  # fmt: skip
def test_functions_are_explained_too(case, wrong, told):
    """Truths, tokens, and dicts of arrays that are no parameters of parts."""
    with patch.object(fast, case.component, wrong):
        assert told in str(disagreement(case, FAST))


def test_a_factor_is_named():
    with patch.object(
        plain_torch, "rmsnorm", lambda x, w, e: w * x * (x.square().sum(-1, True) + 5 * e).rsqrt()
    ):
        assert "y: 15 of 15 elements are off; the whole is 0.447214 times the reference's" in str(
            disagreement(NORM)
        )


@pytest.mark.parametrize(
    ("rms", "precisions", "verdict"),
    [
        (lambda x, e: (x.square().mean(-1, True)).sqrt() + e, (), "MATHEMATICS: float64 rounds at 1e-16"),
        (
            lambda x, e: (x.float().square().mean(-1, True) + e).sqrt(),
            (),
            "computed in float32: the size would fit",
        ),
        (
            lambda x, e: (
                (x.bfloat16() if x.dtype == torch.float32 else x).square().mean(-1, True) + e
            ).sqrt(),
            ("float32",),
            "ROUNDING: in float64 the same case agrees",
        ),
        (
            lambda x, e: (x.square().mean(-1, True) + e).sqrt() * (1 + 0.1 * (x.dtype == torch.bfloat16)),
            ("bfloat16",),
            "ROUNDING: in float64 the same case agrees",
        ),
    ],
)
def test_mathematics_or_rounding(rms, precisions, verdict):
    from types import SimpleNamespace

    module = SimpleNamespace(rmsnorm=lambda x, weight, epsilon: (weight * (x / rms(x, epsilon))).to(x.dtype))
    target = parity.target(PLAIN, "cpu", precisions)
    with patch.object(target.backend, "module", module), pytest.raises(Disagreement) as raised:
        require_parity(target, NORM)
    assert verdict in str(raised.value)


def test_what_is_only_float32_is_seen():
    with patch.object(plain_torch, "rmsnorm", lambda x, w, e: fast.rmsnorm(x.float(), w.float(), e).double()):
        assert "ROUNDING: every number here is one of float32" in str(disagreement(NORM))


def test_in_a_low_precision_float64_decides():
    """A fault that shows in float64 too is one of mathematics, however it was found."""
    with patch.object(
        plain_torch, "rmsnorm", lambda x, w, e: 1.1 * w * x * (x.square().mean(-1, True) + e).rsqrt()
    ):
        target = parity.target(PLAIN, "cpu", ("bfloat16",))._replace(plain=parity.Backend(FAST))
        with pytest.raises(Disagreement, match="MATHEMATICS: in float64, too, y is off, by") as raised:
            parity.require_well_rounded(target, NORM, "bfloat16")
        assert "not as well rounded as it could be (bfloat16 on cpu)" in str(raised.value)


class OnADeadDevice(parity.Backend):
    """Every kernel is launched there, and none computes."""

    def run(self, component, arguments, cotangent, dtype, device):
        alive = super().run(component, arguments, cotangent, dtype, "cpu")
        if device == "cpu":
            return alive
        return alive._replace(y=0 * alive.y, gradients={name: 0 * g for name, g in alive.gradients.items()})


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_device_that_computes_nothing_is_seen(precision):
    """The plain formulas, whose errors are the measure, are then off by all of the result themselves."""
    dead = OnADeadDevice(PLAIN)
    target = parity.target(PLAIN, "dead", (precision,))._replace(backend=dead, plain=dead)
    message = rf"rmsnorm of {PLAIN}: not as well rounded as it could be \({precision} on dead\)"
    with pytest.raises(Disagreement, match=message):
        parity.require_well_rounded(target, NORM, precision)


@pytest.mark.parametrize("case", [NORM, MODEL, Case("sample_token", {"logits": np.zeros(3), "seen": [1, 0]})])
def test_the_case_as_a_script_is_the_case(case):
    """What the script makes is what was judged, large arrays named by their origin and all."""
    from parity_tests.snippet import code

    if case is MODEL:  # made anew: only the last cases' arrays are known by their origin
        case = case._replace(arguments={**case.arguments, "params": model_params(CONFIG, 1)})
    script, made = code(*case, FAST, "cpu", "float64"), {"__name__": "pasted"}
    exec(script, made)
    assert made["case"].component == case.component and made["case"].seed == case.seed
    want, got = (parity.flat(c.arguments) for c in (case, made["case"]))
    assert list(got) == list(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    assert len(script) < 20_000


def test_the_script_sees_the_disagreement_again(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("def relu(x): return x.clamp(min=0.1)\n", encoding="utf-8")
    found = disagreement(Case("relu", {"x": np.array([1.0, -1.0])}), str(path))
    with pytest.raises(Disagreement, match=r"y\[1\] is 0.1, the reference has 0"):
        exec(found.script, {"__name__": "__main__"})
    path.write_text("def relu(x): return x.clamp(min=0)\n", encoding="utf-8")
    exec(found.script, {"__name__": "__main__"})
    assert "agrees on this case of relu (float64)" in capsys.readouterr().out


def in_block(number, change):
    """torch_impl's block of that number, with its arguments changed."""
    forward = torch_impl.block.Block.forward

    def changed(self, x, attend, rotation, key):
        return forward(
            self, *(change if self.layer == number else lambda *given: given)(x, attend, rotation, key)
        )

    return patch.object(torch_impl.block.Block, "forward", changed)


def backwards(kind, method="forward"):
    forward = getattr(kind, method)
    return patch.object(kind, method, lambda self, x: forward(self, Backwards.apply(x)))


def wrong_weight(self, x):
    weight, bias = Backwards.apply(self.weight).to(x.dtype), self.bias
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


@pytest.mark.parametrize(
    ("fault", "part", "backend", "case"),
    [
        (
            in_block(
                1, lambda x, attend, rotation, key: (x, attend, rotation._replace(sin=-rotation.sin), key)
            ),
            "blocks.1.attention.\nWhat comes out of blocks.1.attention.qkv still agrees, what goes into "
            "blocks.1.attention.proj does not.",
            FAST,
            MODEL,
        ),
        (
            in_block(2, lambda x, attend, rotation, key: (x, attend, rotation, key._replace(step=5))),
            "blocks.2.\nWhat comes out of blocks.2.attention still agrees, what goes into blocks.2.norm2",
            FAST,
            MODEL,
        ),
        (
            backwards(torch_impl.layernorm.RMSNorm),
            "norm.\nThe gradient that reaches norm still agrees, the gradient handed on by norm does not.",
            FAST,
            MODEL,
        ),
        (
            patch.object(torch_impl.linear.Linear, "forward", wrong_weight),
            "blocks.2.ffn.down, in the gradients of its parameters.\nAll that flows between",
            FAST,
            MODEL,
        ),
        (
            patch.object(plain_torch, "silu", lambda x: x * torch.sigmoid(1.01 * x)),
            "blocks.0.ffn.\nWhat comes out of blocks.0.ffn.up still agrees, what goes into blocks.0.ffn.down",
            PLAIN,
            MODEL,
        ),
        (
            patch.object(
                plain_torch, "_head", lambda x, params, config: x @ params["token_embedding.weight"].T * 2
            ),
            "transformer.\nWhat comes out of norm still agrees, the result does not.",
            PLAIN,
            MODEL,
        ),
        (
            patch.object(plain_torch, "cross_attention", lambda *given: 2 * CROSS_ATTENTION(*given)),
            "decoder.blocks.0.cross_attention.\n",
            PLAIN,
            SEQ2SEQ,
        ),
        (
            backwards(torch_impl.layernorm.LayerNorm),
            "decoder.norm.\nThe gradient that reaches decoder.norm still agrees",
            FAST,
            SEQ2SEQ,
        ),
    ],
    ids=[
        "rotation",
        "dropout",
        "norm's gradient",
        "weight's gradient",
        "silu",
        "head",
        "memory",
        "seq2seq's gradient",
    ],
)
def test_the_first_part_to_differ_in_a_model(fault, part, backend, case):
    with fault:
        assert f"FIRST PART TO DIFFER, in the order of execution: {part}" in str(disagreement(case, backend))


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        (
            backwards(torch_impl.layernorm.LayerNorm),
            r"the norm of their gradients(.|\n)*micro-batch 0 by itself(.|\n)*: norm.\n",
        ),
        (
            in_block(1, lambda x, attend, rotation, key: (1.5 * x, attend, rotation, key)),
            r"the losses of its micro-batches, added up(.|\n)*: blocks.1.\nWhat goes into blocks.1 still",
        ),
        (
            patch.object(
                torch_impl.train, "clip_by_global_norm", lambda model, limit: torch.tensor(1.0).double()
            ),
            r"the norm of their gradients(.|\n)*the fault lies in what is around them",
        ),
        (
            patch.object(torch_impl.train, "set_learning_rate", lambda optimizer, rate: None),
            r"the optimizer's step of token_embedding.weight(.|\n)*the fault lies in what is around them",
        ),
    ],
    ids=["gradient", "block", "clipping", "rate"],
)
def test_the_first_stage_of_a_step_to_differ(ours, fault, stage):
    from parity_tests.test_train import state_of, values

    model = ModelConfig(vocab_size=17, context_length=5, n_head=2, d_model=8)
    config = TrainConfig(batch_size=4, micro_batches=2, clip=0.1)
    params, random = model_params(model, 1), np.random.default_rng(1)
    batch = tuple(random.integers(17, size=(2, 2, 5)) for _ in range(2))
    after, _, metrics = train_step(params, zero_moments(params), batch, 0, model, config)
    with fault:
        state = state_of(params, model, config)
        got = torch_impl.train.train_step(state, tuple(map(torch.from_numpy, batch)), torch.tensor(0), config)
        with pytest.raises(AssertionError, match=f"step 0 differs in {stage}"):
            step = Step(0, batch, params, model, config)
            require_same_step(ours, step, (after, metrics), (values(state), got))
