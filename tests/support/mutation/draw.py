"""Which faults are planted: sites drawn by seed, so that an edit elsewhere draws the same ones again."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from cosmic_ray.work_item import MutationSpec

# Slips that a hand makes. Others of cosmic-ray's end in a TypeError at once (shifted floats), and catch nobody out.
OPERATORS = re.compile(
    r"core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_FloorDiv|Pow_Mul|BitAnd_BitOr|"
    r"BitOr_BitAnd)|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt|Gt_GtE|Gt_LtE|GtE_Gt|"
    r"GtE_Lt|Is_IsNot|IsNot_Is)|ReplaceUnaryOperator_Delete_\w+|AddNot|ReplaceTrueWithFalse|ReplaceFalseWithTrue|"
    r"ReplaceAndWithOr|ReplaceOrWithAnd|ReplaceBreakWithContinue|ReplaceContinueWithBreak|ExceptionReplacer|"
    r"NumberReplacer|RemoveDecorator|ZeroIterationForLoop)"
)


@dataclass(frozen=True)
class Mutant:
    """One changed place: `key` names it by its code, not by its line number."""

    key: str
    spec: MutationSpec
    mutated: str

    @property
    def path(self) -> str:
        return str(self.spec.module_path)

    def change(self, source: str) -> tuple[str, str]:
        """The lines that differ, before and after, without indentation."""
        was, now = source.splitlines(), self.mutated.splitlines()
        while was and now and was[0] == now[0]:
            was, now = was[1:], now[1:]
        while was and now and was[-1] == now[-1]:
            was, now = was[:-1], now[:-1]
        return "\n".join(map(str.strip, was)), "\n".join(map(str.strip, now))


class Source:
    """A file that is mutated: its text, and what of it is code that runs."""

    def __init__(self, root: Path, path: str) -> None:
        self.path = path
        self.text = (root / path).read_text()
        self.tree = ast.parse(self.text)

    @cached_property
    def _kept_out(self) -> list[ast.AST]:
        """Annotations, strings with values in them (messages), and what is imported for annotations only."""
        found: list[ast.AST | None] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.arg | ast.AnnAssign):
                found.append(node.annotation)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(node.returns)
            elif isinstance(node, ast.JoinedStr) or (
                isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            ):
                found.append(node)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp) and not self.function_at(node):
                found += [node] if isinstance(node.value.op, ast.BitOr) else []  # a name for a union of types
        return [node for node in found if node is not None]

    @cached_property
    def _functions(self) -> list[ast.AST]:
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    def runs(self, position: tuple[int, int]) -> bool:
        """Whether a change at (line, column) can change what the program does."""
        row, column = position
        marker = self.text.splitlines()[row - 1][column:].startswith("*,")  # of arguments by keyword only
        return not marker and not any(_start(node) <= position < _end(node) for node in self._kept_out)

    def function_at(self, node: ast.AST) -> bool:
        """Whether a node lies in the body of a function: its lines run when that is called, not at import."""
        return any(_start(_body(one)) <= _start(node) and _end(node) <= _end(one) for one in self._functions)

    def statement_at(self, position: tuple[int, int]) -> ast.stmt:
        """The innermost statement around (line, column)."""
        around = [
            node
            for node in ast.walk(self.tree)
            if isinstance(node, ast.stmt) and _start(node, decorated=True) <= position < _end(node)
        ]
        return max(around, key=_start)


def statement_lines(node: ast.stmt) -> range:
    """The lines of a simple statement, or of the head of a compound one."""
    inner = getattr(node, "body", None)
    end = max(inner[0].lineno - 1, node.lineno) if inner else node.end_lineno
    return range(_start(node, decorated=True)[0], end + 1)


def draw(root: Path, paths: Iterable[str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants of files under `root`, at most one for each site (or as many as there are sites)."""
    sources = {path: Source(root, path) for path in paths}
    keyed = {_key(spec, source): (spec, source) for source in sources.values() for spec in _changes(source)}
    taken: set[tuple] = set()
    mutants: list[Mutant] = []
    for key in sorted(keyed, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest()):
        spec, source = keyed[key]
        site = (source.path, spec.start_pos)
        if len(mutants) == count:
            break
        if site in taken or not source.runs(spec.start_pos):
            continue
        mutated = mutate_code(source.text, get_operator(spec.operator_name)(), spec.occurrence)
        if mutated is not None and _differs(source.tree, mutated):
            taken.add(site)
            mutants.append(Mutant(key, spec, mutated))
    return mutants


def _changes(source: Source) -> Iterator[MutationSpec]:
    nodes = list(ast_nodes(get_ast(source.text)))
    for name in operator_names():
        if OPERATORS.fullmatch(name):
            operator = get_operator(name)()
            found = ((node, *where) for node in nodes for where in operator.mutation_positions(node))
            for occurrence, (node, start, end) in enumerate(found):
                scope = ASTQuery(node).get_definition_name()
                yield MutationSpec(Path(source.path), name, occurrence, start, end, definition_name=scope)


def _key(spec: MutationSpec, source: Source) -> str:
    """File, function, kind of change and code: the same after an edit elsewhere in the file."""
    (row, start), (_, end) = spec.start_pos, spec.end_pos
    line = source.text.splitlines()[row - 1]
    left = start - (len(line) - len(line.lstrip()))
    kind = f"{spec.operator_name}:{spec.occurrence % 2}" if "Number" in spec.operator_name else spec.operator_name
    return f"{source.path}:{spec.definition_name}:{kind}:{left}:{end - start}:{line.strip()}"


def _differs(tree: ast.Module, mutated: str) -> bool:
    try:
        return ast.dump(ast.parse(mutated)) != ast.dump(tree)
    except SyntaxError:
        return False


def _body(node: ast.AST) -> ast.AST:
    return node.body[0] if isinstance(node.body, list) else node.body


def _start(node: ast.AST, decorated: bool = False) -> tuple[int, int]:
    decorators = getattr(node, "decorator_list", None)
    if decorated and decorators:
        return decorators[0].lineno, 0
    return node.lineno, node.col_offset


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset
