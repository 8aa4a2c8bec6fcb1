"""Mutants of a source text: one operator, number, condition or loop changed, as cosmic-ray changes them."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

# What may stand for what. A float has no << or |, and any test catches // in place of +.
_SWAPPED = (
    {"Add", "Sub", "Mul", "Div"},
    {"FloorDiv", "Mod"},
    {"LShift", "RShift"},
    {"BitAnd", "BitOr", "BitXor"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
    {"Is", "IsNot"},
)
_REPLACED = {("FloorDiv", "Mul"), ("Pow", "Mul"), *(("Delete", unary) for unary in ("USub", "Invert", "Not"))}
# The first two draw at random, and the last stumbles over `except json.JSONDecodeError`.
_LEFT_OUT = {"VariableReplacer", "VariableInserter", "ExceptionReplacer"}


class Mutant(NamedTuple):
    """A file with one change."""

    file: str  # from the root of the project
    line: int
    before: str  # what changes: the line or lines, without indentation
    after: str
    source: str  # the whole text with the change

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.file}\n{self.source}".encode()).hexdigest()[:16]

    @property
    def change(self) -> tuple[str, str, str]:
        """What it is wherever it stands."""
        return self.file, self.before, self.after

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before} -> {self.after or '(nothing)'}"


@cache
def _operators() -> list[Any]:
    """Raises ImportError where cosmic-ray is not installed."""
    from cosmic_ray.operators.provider import OperatorProvider

    provider = OperatorProvider()
    return [provider[name] for name in provider if _makes_sense(name)]


def _makes_sense(operator: str) -> bool:
    """By its name, such as ReplaceBinaryOperator_Add_Sub, ReplaceUnaryOperator_Delete_Not or AddNot."""
    name, *change = operator.split("_")
    if not change:
        return name not in _LEFT_OUT
    return tuple(change) in _REPLACED or any(set(change) <= group for group in _SWAPPED)


class _Meaning(ast.NodeTransformer):
    """Leaves out what is not computed: annotations, how arguments may be passed, the wording of errors."""

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:
        node.args, node.posonlyargs, node.kwonlyargs = node.posonlyargs + node.args + node.kwonlyargs, [], []
        node.defaults, node.kw_defaults = node.defaults + [value for value in node.kw_defaults if value], []
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = ast.Constant(None)
        self.generic_visit(node)
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        if isinstance(node.exc, ast.Call):
            node.exc.args = []
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "_require":  # (condition, message)
            node.args = node.args[:1]
        return node


def _meaning(code: str) -> str:
    """The same for two texts if they do the same for the reason that they say the same.

    Raises SyntaxError for what is no Python.
    """
    compile(code, "", "exec", dont_inherit=True)  # ast.parse lets some mistakes pass
    return ast.dump(_Meaning().visit(ast.parse(code)))


def _changes(code: str) -> Iterator[str]:
    """A statement with each change that means something else, once."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    nodes = list(ast_nodes(get_ast(code)))
    seen = {_meaning(code)}
    for operator in _operators():
        for occurrence in range(sum(1 for node in nodes for _ in operator().mutation_positions(node))):
            changed = mutate_code(code, operator(), occurrence)
            try:
                meaning = _meaning(changed)
            except SyntaxError:  # the star of def f(a, *, b) is no product
                continue
            if meaning not in seen:
                seen.add(meaning)
                yield changed


def _difference(before: list[str], after: list[str]) -> tuple[int, str, str]:
    """The place (from 0) where the lines differ, and those of either side that do."""
    start = 0
    while start < min(len(before), len(after)) and before[start] == after[start]:
        start += 1
    end = 0
    while end < min(len(before), len(after)) - start and before[-1 - end] == after[-1 - end]:
        end += 1
    old, new = (
        " ".join(line.strip() for line in lines[start : len(lines) - end]) for lines in (before, after)
    )
    return start, old, new


def _is_program(statement: ast.stmt) -> bool:
    """def main(), and if __name__ == "__main__": a demonstration, which no test runs."""
    if isinstance(statement, ast.FunctionDef):
        return statement.name == "main"
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """All mutants of a file, from the top down. Raises ImportError where cosmic-ray is not installed."""
    lines = source.split("\n")
    for statement in ast.parse(source).body:
        if _is_program(statement):
            continue
        decorators = getattr(statement, "decorator_list", [])
        start, end = min(node.lineno for node in [statement, *decorators]) - 1, statement.end_lineno
        found = []
        for changed in _changes("\n".join(lines[start:end])):
            place, before, after = _difference(lines[start:end], changed.split("\n"))
            text = "\n".join([*lines[:start], changed, *lines[end:]])
            found.append(Mutant(file, start + place + 1, before, after, text))
        yield from sorted(found, key=lambda mutant: mutant.line)
