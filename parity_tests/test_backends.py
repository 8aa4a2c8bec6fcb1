"""Backends: what the suite takes from them, what it refuses and in which words, and the examples."""

import importlib.util

import numpy as np
import pytest

from parity_tests import parity, tally
from parity_tests.backend import Backend, BackendError
from parity_tests.disagreement import Disagreement
from parity_tests.exchange import Misfit, NotOffered
from parity_tests.parity import Case, require_parity
from parity_tests.strategies import REGIMES, array, model_params, seeded
from ref_numpy.config import ModelConfig, SamplingConfig

X, W = seeded((3, 5), "normal", 1), seeded((5,), "normal", 2)
F = seeded((7, 5), "normal", 3) / 5**0.5
SINUSOIDAL = ModelConfig(vocab_size=5, n_head=2, d_model=6, positions="sinusoidal")
EXAMPLES = {
    "linear": {"x": X, "weight": F, "bias": seeded((7,), "normal", 4)},
    **{name: {"x": X} for name in ("relu", "gelu", "gelu_tanh", "silu")},
    "layernorm": {"x": X, "weight": W, "bias": W, "epsilon": 1e-5},
    "rmsnorm": {"x": X, "weight": W, "epsilon": 1e-5},
    "embedding": {"ids": np.array([[1, 0, 1], [2, 2, 6]]), "weight": F},
    "attention": {name: seeded((2, 3, 4, 5), "normal", i) for i, name in enumerate("qkv")}
    | {"mask": np.tri(4, dtype=bool), "slopes": None},
    "rope": {
        "x": seeded((2, 3, 4, 6), "normal", 5),
        "places": np.array([3, 0, 7, 1]),
        "config": ModelConfig(n_head=3, d_model=18, positions="rope"),
    },
    "swiglu": {
        "x": X[None],
        **{
            f"{name}_{kind}": value
            for name, weight in (("gate", F), ("up", F[::-1]), ("down", F.T))
            for kind, value in (("weight", weight.copy()), ("bias", None))
        },
    },
    "transformer": {
        "params": model_params(SINUSOIDAL, 1),
        "ids": np.array([[1, 0, 2], [2, 4, 3]]),
        "config": SINUSOIDAL,
        "key": None,
        "documents": None,
    },
    "cross_entropy": {"logits": X, "targets": np.array([4, -100, 0]), "label_smoothing": 0.0, "count": None},
    "adam": {"param": X, "gradient": X, "m": X, "v": X**2, "t": 3, "learning_rate": 0.1}
    | {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8},
    "filtered_logits": {"logits": W, "seen": [1, 1], "config": SamplingConfig(top_k=3, temperature=0.7)},
}


@pytest.fixture
def write(tmp_path):
    """write(source): the file of a module with that source."""

    def write(source: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(source, encoding="utf-8")
        return str(path)

    return write


def judge(
    backend: str, component: str = "rmsnorm", precisions: tuple[str, ...] = ("float32", "bfloat16"), **changes
) -> tuple[list[str], dict[str, str]]:
    """The precisions that were judged, and the reasons for those that were declined."""
    judged, declined = [], {}
    target = parity.target(
        backend,
        "cpu",
        precisions,
        record=lambda judgement: judged.append(judgement.precision),
        declined=lambda component, precision, reason: declined.update({precision: reason}),
    )
    require_parity(target, Case(component, EXAMPLES[component] | changes, 1))
    return judged, declined


@pytest.mark.parametrize(
    ("name", "components"),
    [
        (
            "plain_torch",
            ["linear", "gelu", "layernorm", "rmsnorm", "embedding", "attention", "rope", "swiglu"],
        ),
        ("plain_torch", ["cross_entropy", "adam", "transformer"]),
        ("hugging_face", ["linear", "relu", "gelu", "gelu_tanh", "silu", "attention", "rope", "swiglu"]),
        ("hugging_face", ["cross_entropy"]),
    ],
)
def test_examples_agree(name, components):
    for component in components:
        judged, declined = judge(f"parity_tests.backends.{name}", component)
        assert "float64" in judged and not declined


def test_compiled_kernels_agree():
    """One compilation, forward and backward: others are for .ci."""
    judged, _ = judge("parity_tests.backends.compiled", "rmsnorm", precisions=())
    assert judged == ["float64"]


def test_the_example_in_jax_agrees_or_says_what_it_lacks():
    name = "parity_tests.backends.jax_numpy"
    if importlib.util.find_spec("jax") is None:
        with pytest.raises(ModuleNotFoundError, match="needs JAX, an optional extra: pip install jax"):
            Backend(name)
        return
    for component in ("rmsnorm", "attention", "cross_entropy"):
        assert judge(name, component) == (["float64", "float32", "bfloat16"], {})


HONEST = {
    "another order of the sum": "y = x.flip(-1); s = (y * y).cumsum(-1)[..., -1:] / x.shape[-1]",
    "fused": "return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)",
    "by a matrix product": "s = (x.reshape(-1, 1, C) @ x.reshape(-1, C, 1)).reshape(*x.shape[:-1], 1) / C",
    "recomputed in the backward pass": "return checkpoint(plain, x, weight, epsilon, use_reentrant=False)",
    "in halves": "a, b = x[..., : C // 2], x[..., C // 2 :]; "
    "s = ((a * a).sum(-1, keepdim=True) + (b * b).sum(-1, keepdim=True)) / C",
}


@pytest.mark.parametrize("how", HONEST)
def test_what_is_written_otherwise_but_right_passes(how, write):
    """With no tolerance touched, in every regime."""
    backend = write(
        "import torch\n"
        "from torch.utils.checkpoint import checkpoint\n"
        "from parity_tests.backends.plain_torch import rmsnorm as plain\n"
        "def rmsnorm(x, weight, epsilon):\n"
        "    C = x.shape[-1]\n"
        f"    {HONEST[how]}\n"
        "    return weight * x * torch.rsqrt(s + epsilon)\n"
    )
    for seed, regime in enumerate(REGIMES):
        random = np.random.default_rng(seed)
        case = {"x": array(random, (4, 11), regime), "weight": array(random, (11,))}
        assert judge(backend, **case)[0] == ["float64", "float32", "bfloat16"]


def test_numpy_by_hand(write):
    """Arrays of NumPy, a pair of functions; what NumPy lacks is not offered, and not passed."""
    backend = write(
        'import numpy as np\nARRAYS = "numpy"\n'
        "def rmsnorm_forward(x, weight, epsilon):\n"
        "    assert type(x) is np.ndarray\n"
        "    s = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(epsilon))\n"
        "    return weight * x * s, (x, weight, s)\n"
        "def rmsnorm_backward(dy, cache):\n"
        "    x, weight, s = cache\n"
        "    n, dn = x * s, dy * weight\n"
        "    return s * (dn - n * (dn * n).mean(-1, keepdims=True)), (dy * n).sum(0)\n"
    )
    assert judge(backend) == (["float64", "float32"], {"bfloat16": "NumPy has no bfloat16"})


def test_arrays_of_any_library_by_dlpack(write):
    """A library whose arrays nobody here knows: they speak DLPack, and have no bfloat16."""
    backend = write(
        "import torch\n"
        "class Array:\n"
        "    def __init__(self, source):\n"
        "        self.own = torch.from_dlpack(source).clone()\n"
        "        if self.own.dtype == torch.bfloat16: raise TypeError('no such type')\n"
        "        self.dtype = str(self.own.dtype)\n"
        "    def __dlpack__(self, **more): return self.own.__dlpack__(**more)\n"
        "    def __dlpack_device__(self): return self.own.__dlpack_device__()\n"
        "ARRAYS = Array\n"
        "def relu_forward(x): return Array(x.own.clamp(min=0)), x\n"
        "def relu_backward(dy, x): return Array(dy.own * (x.own > 0))\n"
    )
    assert judge(backend, "relu") == (
        ["float64", "float32"],
        {"bfloat16": "its arrays do not take bfloat16: no such type"},
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def rms_norm(x): pass",
            r"offers no component \(its rms_norm should perhaps be called rmsnorm\); there",
        ),
        ("", "offers no component; there are linear, relu"),
        (
            "def rmsnorm(x, weight): pass",
            r"rmsnorm\(x, weight\) is to be called as rmsnorm\(x, weight, epsilon\)",
        ),
        ("def rmsnorm(weight, x, epsilon): pass", r"is to be called as rmsnorm\(x, weight, epsilon\)"),
        ("def rmsnorm_forward(x, weight, epsilon): pass", "has rmsnorm_forward, but no rmsnorm_backward"),
        ("ARRAYS = 'numpy'\ndef relu(x): pass", "no autograd, so relu needs relu_forward and relu_backward"),
        (
            "ARRAYS = 'tensorflow'\ndef relu(x): pass",
            'ARRAYS is \'tensorflow\', not "torch", "numpy" or a func',
        ),
    ],
)
def test_what_cannot_be_a_backend_is_told_in_one_line(source, message, write):
    with pytest.raises(BackendError, match=message) as refusal:
        Backend(write(source))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["no_such_layers", "parity_tests.backends.no_such", "./no_such.py"])
def test_a_backend_that_is_not_there(name):
    with pytest.raises(BackendError, match=r"there is no (module|file) .*no_such"):
        Backend(name)


def test_what_a_backend_itself_fails_to_import_is_told_as_it_is(write):
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_library'"):
        Backend(write("import no_such_library"))


BODY = """
def rmsnorm(x, weight, epsilon):
    y = weight * x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
"""


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("return None", "rmsnorm returns NoneType, not one tensor"),
        ("return y, x", "rmsnorm returns tuple, not one tensor"),
        ("return y.T", r"y has shape \(5, 3\), not \(3, 5\)"),
        ("return y.detach()", "autograd finds no way back from y: rmsnorm left its graph"),
        ("return y.float()", "y comes back as float32 from arguments in float64"),
        ("return x * y.detach()", "autograd finds no way back from y to weight"),
    ],
)
def test_results_that_cannot_be_compared_are_told_in_one_line(ending, message, write):
    with pytest.raises(Misfit, match=message) as complaint:
        judge(write(f"{BODY}    {ending}\n"))
    assert str(complaint.value).startswith("rmsnorm of ") and "\n" not in str(complaint.value)
    assert 'Case("rmsnorm"' in complaint.value.script


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("(dy, dy)", "relu_backward returns 2 gradients, not 1: of x"),
        ("None", "relu_backward returns 0 gradients, not 1: of x"),
        ("dy.T", r"gradient of x has shape \(5, 3\), not \(3, 5\)"),
        ("'dy'", "the gradient of x is no array but str: 'dy'"),
    ],
)
def test_gradients_by_hand_are_looked_at(returned, message, write):
    backend = write(
        "import numpy as np\nARRAYS = 'numpy'\ndef relu_forward(x): return np.maximum(x, 0), x\n"
        f"def relu_backward(dy, x): return {returned}\n"
    )
    with pytest.raises(Misfit, match=message):
        judge(backend, "relu")


@pytest.mark.parametrize(
    ("component", "source", "message"),
    [
        (
            "relu",
            "def relu_forward(x): return x.clamp_(min=0), x.clone()\n"
            "def relu_backward(dy, x): return dy * (x > 0)\n",
            "relu of .*: x was changed",
        ),
        (
            "relu",
            "def relu_forward(x): return x.clamp(min=0), x\n"
            "def relu_backward(dy, x): return dy.mul_(x > 0)\n",
            "relu of .*: dy was changed",
        ),
        (
            "adam",
            "from parity_tests.backends.fast import adam as right\n"
            "def adam(param, *rest): found = right(param, *rest); param.zero_(); return found\n",
            "adam of .*: param was changed",
        ),
    ],
)
def test_arguments_are_left_alone(component, source, message, write):
    """A residual stream is read again. Such a relu passed, for it had been given a copy."""
    with pytest.raises(Misfit, match=message):
        judge(write(source), component)


def test_a_mask_of_numbers_is_none(write):
    """Added to scores, as PyTorch adds them, it would hide nothing."""
    backend = write(
        "from torch_impl import masks\n"
        "def causal_mask(length, before): return masks.causal_mask(length, before).double()\n"
    )
    target = parity.target(backend, "cpu", ())
    with pytest.raises(Misfit, match=r"causal_mask of .*: result holds floating numbers, not truth values"):
        require_parity(target, Case("causal_mask", {"length": 3, "before": 1}))


def test_nan_never_passes(write):
    with pytest.raises(Disagreement, match="1 are NaN"):
        judge(write(f"{BODY}    y = y.clone(); y[1, 2] = float('nan'); return y\n"))


def test_what_a_backend_declines_is_not_judged(write):
    backend = write(
        f"DTYPES = ('float64', 'float32')\n{BODY}"
        "    if epsilon > 1e-3: raise NotImplementedError('epsilon is fixed')\n    return y\n"
    )
    assert judge(backend) == (["float64", "float32"], {"bfloat16": "it computes in float64, float32"})
    judged, declined = judge(backend, epsilon=0.01)
    assert judged == [] and declined["float64"] == "epsilon is fixed"
    with pytest.raises(NotOffered, match="it runs on cuda"):
        Backend(write(f"DEVICES = ('cuda',)\n{BODY}    return y\n")).require_device("cpu")


def test_functions_are_compared_too(write):
    judge(write("from parity_tests.backends.fast import adam"), "adam")
    wrong = write(
        "import torch\nfrom torch_impl import sampling\n"
        "def filtered_logits(logits, seen, config):\n"
        "    return logits.masked_fill(logits <= logits.topk(3).values[-1], -torch.inf) / 0.7\n"
    )
    with pytest.raises(Disagreement, match=r"result\[\d\] is -inf, the reference has"):
        judge(wrong, "filtered_logits")


def test_functions_run_where_the_suite_is_pointed(write):
    """They once ran on the CPU, whatever --device said. PyTorch's meta device stands in for a GPU here."""
    backend = write(
        "import torch\nfrom ref_numpy import masks, optim\n"
        "def causal_mask(length, before):\n"
        "    assert torch.empty(0).is_meta\n"
        "    return masks.causal_mask(length, before)\n"
        "def adam(param, gradient, m, v, *settings):\n"
        "    assert all(given.is_meta for given in (param, gradient, m, v))\n"
        "    raise NotImplementedError('it has been there')\n"
    )
    declined = []
    target = parity.target(backend, "meta", (), declined=lambda *told: declined.append(told))
    require_parity(target, Case("causal_mask", {"length": 3, "before": 1}))
    require_parity(target, Case("adam", EXAMPLES["adam"]))
    assert declined == [("adam", "float64", "it has been there")]
    assert target._replace(device="mps").runs_on("adam", "float64") == "cpu"  # it has no float64


def test_what_is_not_offered_is_listed_and_not_passed():
    lines = [
        ("rope", "float64", "passed", 20),
        ("rope", "float64", "- no interleaved layout", 10),
        ("gelu", "float64", "failed", 3),
        ("silu", "float64", "passed", 30),
        ("silu", "bfloat16", "- NumPy has no bfloat16", 30),
        ("block", "", "- ", 1),
    ]
    assert tally.summary(lines, "cpu")[:-1] == [
        "passed       rope, silu (in float64)",
        "failed       gelu (in float64)",
        "not offered  rope in float64, 10 of 30 cases: no interleaved layout",
        "not offered  block",
        "not offered  silu in bfloat16: NumPy has no bfloat16",
    ]


def test_what_fails_before_it_is_judged_has_failed():
    """It was in no line, and passed where other tests had judged it."""
    tally.begin()
    tally.asked("silu")
    assert tally.as_lines(failed=False) == []
    lines = [*tally.as_lines(failed=True), ("gelu", "", "failed", 1), ("gelu", "float64", "passed", 9)]
    assert tally.summary(lines, "cpu")[:-1] == ["failed       gelu (in float64)", "failed       silu"]


def test_a_test_in_which_a_precision_was_declined_throughout_counts_as_skipped():
    tally.begin()
    tally.judged("silu", "float64")
    tally.declined("silu", "bfloat16", "NumPy has no bfloat16")
    assert tally.never_judged(set()) == "", "nobody asked for it"
    assert tally.never_judged({"bfloat16"}) == "silu is not offered in bfloat16: NumPy has no bfloat16"
    tally.begin()
    tally.declined("silu", "float64", "no")
    assert tally.never_judged(set()) == "silu is not offered in float64: no"
    tally.begin()
