"""Parts of torch_impl as torch.compile makes them: fused, in an order of its own, backward passes included.

The first case of a kind takes seconds. Sizes are symbols and leading axes are joined, so that few other cases
need a compilation; where one changes so much that the compiler would give up and run the source as it stands,
it raises instead.
"""

from inspect import unwrap

import torch

from parity_tests.backends import fast

torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.fail_on_recompile_limit_hit = True


def _compiled(function):
    """Without the checks of shapes that the tests put around it: they are no part of the kernel."""
    return torch.compile(unwrap(function), dynamic=True)


_gelu_tanh = _compiled(fast.gelu_tanh)
_rmsnorm = _compiled(fast.rmsnorm)
_cross_entropy = _compiled(fast.cross_entropy)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def gelu_tanh(x):
    return _gelu_tanh(x.flatten()).view(x.shape)


def rmsnorm(x, weight, epsilon):
    return _rmsnorm(_rows(x), weight, epsilon).view(x.shape)


def cross_entropy(logits, targets, label_smoothing, count):
    return _cross_entropy(_rows(logits), targets.flatten(), label_smoothing, count)
