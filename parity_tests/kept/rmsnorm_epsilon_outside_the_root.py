import numpy as np
from parity_tests.parity import Case

case = Case("rmsnorm", seed=0, arguments={
    'x': np.array([0.001, -0.001]),
    'weight': np.array([1.0, 1.0]),
    'epsilon': 3e-06,
})
if __name__ == "__main__":
    case.judge('parity_tests.backends.fast', 'cpu', 'float64')
