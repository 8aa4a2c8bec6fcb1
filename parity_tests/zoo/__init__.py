"""The bug zoo: planted bugs, on either side, each of which the suite has to catch.

    python -m parity_tests.zoo

plants them one by one in copies of the project, and runs the component's own test on each. A bug that
survives is a hole in the suite.
"""

from parity_tests.zoo import attention, layers, learning, positions, precision, writing

ZOO = [*attention.BUGS, *positions.BUGS, *layers.BUGS, *learning.BUGS, *precision.BUGS, *writing.BUGS]
