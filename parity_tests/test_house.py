"""The rules of the house: one name and three rooms for a component, and imports that run one way."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import TypeCheckError

HOUSE = Path(__file__).parent.parent

# Described once, and read by both sides: no second version of it is written.
DESCRIBED = {"config", "bpe_format", "parameters", "dates", "conversation"}
# Translated from and to the formats of others, and nothing computed: there is nothing to write twice.
TRANSLATED = {"interop"}
# Made of components, and nothing computed either; tested with the runs.
PROGRAMS = {"chat"}

# What torch_impl may take from the reference: descriptions, keys, initial weights; nothing that it computes.
SHARED = {
    "ref_numpy.config": None,  # all of it
    "ref_numpy.bpe_format": None,
    "ref_numpy.rng": {"Key", "INIT", "DATA", "DROPOUT", "SAMPLE", "MASK"},
    "ref_numpy.dropout": {"DropoutKey"},
    "ref_numpy.loss": {"IGNORE"},
    "ref_numpy.masks": {"PADDING"},
    "ref_numpy.parameters": None,
    "ref_numpy.dates": None,
    "ref_numpy.conversation": None,
}
# Where a run that failed is held against the reference.
COMPARED = {"references.py"}
REFERENCE_MAY_IMPORT = {"numpy", "jaxtyping", "ref_numpy", "regex", "tqdm"}  # and the standard library


def components(room: str) -> set[str]:
    return {path.stem for path in (HOUSE / room).glob("*.py") if path.stem != "__init__"}


def imports(path: Path) -> list[tuple[str, str | None]]:
    """(module, name) of each import anywhere in a file; the name is None for `import module`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name their module in full here"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def files(room: str) -> list[Path]:
    return sorted((HOUSE / room).rglob("*.py"))


def test_a_component_has_its_three_rooms():
    reference, fast = components("ref_numpy"), components("torch_impl")
    tested = {path.stem.removeprefix("test_") for path in (HOUSE / "parity_tests").glob("test_*.py")}
    assert reference - DESCRIBED == fast - TRANSLATED - PROGRAMS, "each component is written twice"
    assert (reference | fast) - tested - PROGRAMS <= {"parameters"}, "each component has its parity test"


@pytest.mark.parametrize("path", files("ref_numpy"), ids=lambda path: path.name)
def test_the_reference_needs_numpy_alone(path):
    for module, _ in imports(path):
        top = module.partition(".")[0]
        assert top in REFERENCE_MAY_IMPORT or top in sys.stdlib_module_names, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", files("torch_impl"), ids=lambda path: path.relative_to(HOUSE).as_posix())
def test_the_fast_side_computes_for_itself(path):
    for module, name in imports(path):
        assert not module.startswith("parity_tests"), f"{path.name} imports {module}"
        if module.partition(".")[0] == "ref_numpy" and path.name not in COMPARED:
            allowed = SHARED.get(module, set())
            assert allowed is None or name in allowed, f"{path.name} takes {name} from {module}"


def test_there_are_no_ready_made_transformer_layers():
    for path in files("torch_impl"):
        names = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
        }
        ready_made = {name for name in names if name.startswith(("Transformer", "MultiheadAttention"))}
        assert not ready_made, f"{path.name} uses {ready_made}"


@pytest.mark.parametrize("path", files("ref_numpy"), ids=lambda path: path.name)
def test_each_file_of_the_reference_says_what_it_will_not_do(path):
    if path.stem in DESCRIBED | {"__init__"}:
        return
    assert "Not here:" in ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_the_reference_passes_its_own_tests_where_there_is_no_torch():
    """In a process whose torch cannot be imported."""
    options = [
        "parity_tests/test_differences.py",
        "--hypothesis-profile=quick",
        "-n0",
        "-p",
        "no:cacheprovider",
    ]
    code = f"import sys; sys.modules['torch'] = None; import pytest; sys.exit(pytest.main({options}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HOUSE, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.parametrize("room", ["ref_numpy", "torch_impl"])
def test_shapes_in_signatures_are_checked_though_not_at_each_call(room, request):
    if not request.config.getoption("--jaxtyping-packages"):
        pytest.skip("shapes are not to be checked")
    if room == "ref_numpy":
        from ref_numpy.linear import linear_forward as linear

        array = np.ones
    else:
        import torch

        from torch_impl.linear import linear

        array = torch.ones
    for _ in range(3):
        linear(array((4, 3)), array((2, 3)), None)
        with pytest.raises(TypeCheckError, match="parameters of"):
            linear(array((4, 3)), array((2, 5)), None)
