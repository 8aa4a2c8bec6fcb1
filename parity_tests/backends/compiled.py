"""Parts of torch_impl as torch.compile makes them: fused, in an order of its own, backward passes included.

The first case of a kind takes seconds. Sizes are symbols, so that other sizes need no compilation; where
something else changes so often that the compiler would give up and run it as it stands, it raises instead.
"""

import torch

from parity_tests.backends import fast

torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.fail_on_recompile_limit_hit = True

rmsnorm = torch.compile(fast.rmsnorm, dynamic=True)
layernorm = torch.compile(fast.layernorm, dynamic=True)
swiglu = torch.compile(fast.swiglu, dynamic=True)
cross_entropy = torch.compile(fast.cross_entropy, dynamic=True)
