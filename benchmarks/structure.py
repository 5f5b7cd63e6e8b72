"""Size and layers of the package, counted from the checkout.

    python benchmarks/structure.py

Lines are all lines of Python files in `src/iprox`. Imports are those at the top level of a module, except those for
type checking; an import cycle is a set of modules that import each other (a module's import of its package's `__init__`
does not count). An upward import is one from a layer of `LAYERS` to a later one, or from a layer below `cli` to a
package of `APART`.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

from iprox.cli.commands import COMMANDS, Command
from iprox.cli.parser import build_app
from iprox.settings import Recipe, fields_of

SOURCE = Path(__file__).resolve().parents[1] / "src"
# Packages from the lowest layer to the highest. Other modules, such as `iprox.files`, are below all of them.
LAYERS = (
    ("data", "models", "kronecker"),
    ("engine",),
    ("proxy", "influence"),
    ("audits", "selection"),
    ("report",),
    ("stages",),
    ("run",),
    ("cli",),
)
# Packages outside the layers, which no layer below `cli` may import.
APART = ("api",)


def main() -> None:
    """Count, and print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    files = {module_of(path): path for path in sorted((SOURCE / "iprox").rglob("*.py"))}
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in files.items()}
    imports = {name: set(imported(name, path, set(files))) for name, path in files.items()}
    options = {command.name: options_of(command) for command in COMMANDS}
    keys = [key for key, _ in fields_of(Recipe)]
    longest = max(options, key=lambda name: options[name])
    loops = cycles(imports)
    upward = [(one, other) for one, others in imports.items() for other in sorted(others) if is_upward(one, other)]
    rows = [
        ("lines of Python", f"{sum(lines.values()):,}"),
        ("Python files", f"{len(files)}"),
        *((f"  {package}", f"{count:,} lines in {number}") for package, count, number in by_package(lines)),
        ("commands", f"{len(options)}"),
        *((f"  {name}", f"{count} options") for name, count in options.items()),
        ("most options of a command", f"{options[longest]} ({longest})"),
        ("options of all commands", f"{sum(options.values())}"),
        ("keys of a recipe, sections included", f"{len(keys)}"),
        ("import cycles", f"{len(loops)}"),
        *((f"  {len(loop)} modules", ", ".join(loop)) for loop in loops),
        ("upward imports", f"{len(upward)}"),
        *((f"  {one}", other) for one, other in upward),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def module_of(path: Path) -> str:
    """Return the name of a module, e.g. `iprox.data.pool`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """Yield the modules of the package that a module imports at its top level."""
    for node in top_level(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{name}: a relative import"
            # `from iprox.data import pool` imports a module, `from iprox.data import Pool` a name.
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [each if each in known else str(node.module) for each in found]
        yield from (each for each in found if each in known and each != name)


def top_level(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run with a module, not those in functions or under `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from top_level([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from top_level([*node.body, *node.orelse, *(each for h in node.handlers for each in h.body)])
        elif isinstance(node, ast.With | ast.ClassDef):
            yield from top_level(node.body)


def cycles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of modules that import each other, directly or not."""
    reached = {name: reachable(name, imports) for name in imports}
    found = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in imports
        if name in reached[name]
    }
    return [list(each) for each in sorted(found)]


def reachable(name: str, imports: dict[str, set[str]]) -> set[str]:
    """Return all modules that a module imports, directly or not."""
    seen: set[str] = set()
    ahead = list(imports[name])
    while ahead:
        each = ahead.pop()
        if each not in seen:
            seen.add(each)
            ahead += imports[each]
    return seen


def layer(name: str) -> int:
    """Return the number of a module's layer in `LAYERS`; -1 for those in none."""
    part = name.split(".")[1] if "." in name else ""
    return next((number for number, parts in enumerate(LAYERS) if part in parts), -1)


def is_upward(one: str, other: str) -> bool:
    """Return whether an import goes from a layer to a higher one, or from below `cli` to a package of `APART`."""
    if layer(one) == -1:
        return False
    if other.split(".")[1:2] and other.split(".")[1] in APART:
        return layer(one) < len(LAYERS) - 1
    return layer(one) < layer(other)


def options_of(command: Command) -> int:
    """Return the number of options of a command, without positional arguments and `--help`."""
    arguments = build_app()[command.name].assemble_argument_collection()
    return sum(1 for argument in arguments if argument.name.startswith("--"))


def by_package(lines: dict[str, int]) -> list[tuple[str, int, int]]:
    """Return name, lines and files of each package, largest first; modules outside packages count as one."""
    packages = {name.split(".")[1] for name in lines if name.count(".") > 1}
    found: dict[str, list[int]] = {}
    for name, count in lines.items():
        part = name.split(".")[1] if "." in name else ""
        found.setdefault(part if part in packages or part == "quickstart" else "other modules", []).append(count)
    return sorted(((name, sum(each), len(each)) for name, each in found.items()), key=lambda row: -row[1])


if __name__ == "__main__":
    main()
