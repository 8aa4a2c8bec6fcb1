"""The fast side: each file is the twin of its namesake in ref_numpy, in PyTorch."""

import os

# Between two operations the threads of OpenMP wait by counting, so long that on a machine with other work to
# do they take the cores from it and from each other. A hundredth as long is no slower where nobody else is,
# and 1.4 times as fast beside one other process. It has to be said before torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
