"""Rules of the code: which file imports which, and public functions have types."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "spade_fast"
# From the bottom up: a room imports only those before it.
ROOMS = (
    "kernels",
    "codes",
    "windows",
    "layout",
    "data",
    "ops",
    "nn",
    "convert",
    "export",
    "checkpoint",
    "losses",
    "settings",
    "training",
    "service",
    "generation",
    "evaluation",
    "paint",
    "check",
    "cli",
)


def imports():
    """The modules that each module of the package imports, including imports inside functions."""
    graph = {}
    for file in PACKAGE.rglob("*.py"):
        inside = file.relative_to(PACKAGE).with_suffix("").parts
        name = inside[:-1] if inside[-1] == "__init__" else inside
        home = inside[:-1]
        found = graph.setdefault(".".join(name) or ".", set())
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            source = (*home[: len(home) + 1 - node.level], *(node.module or "").split("."))
            source = tuple(filter(None, source))
            for alias in node.names:
                path = PACKAGE.joinpath(*source, alias.name)
                is_module = path.is_dir() or path.with_suffix(".py").exists()
                found.add(".".join((*source, alias.name) if is_module else source) or ".")
    return graph


def test_imports_have_no_circles():
    assert list(TopologicalSorter(imports()).static_order())


def test_arrows_go_down():
    for module, found in imports().items():
        room = module.split(".")[0]
        for other in found:
            there = other.split(".")[0]
            if room in ROOMS and there in ROOMS:
                assert ROOMS.index(there) <= ROOMS.index(room), f"{module} imports {other}"


def public_functions(node):
    """The functions and methods without an underscore, and the special methods, in a module or a
    class. Triton's kernels are excluded, because Triton reads their annotations.
    """
    for child in node.body:
        special = getattr(child, "name", "").startswith("__")
        if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if child.name.startswith("_") and not special:
            continue
        if isinstance(child, ast.ClassDef):
            yield from public_functions(child)
        elif not any("triton.jit" in ast.unparse(made) for made in child.decorator_list):
            yield child


def test_public_functions_have_types():
    missing = []
    for file in PACKAGE.rglob("*.py"):
        for function in public_functions(ast.parse(file.read_text())):
            given = function.args
            own = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            untyped = [
                one.arg
                for one in own
                if one is not None and one.annotation is None and one.arg not in ("self", "cls")
            ]
            if function.returns is None and function.name != "__init__":
                untyped.append("its result")
            if untyped:
                place = f"{file.relative_to(PACKAGE)}:{function.lineno}"
                missing.append(f"{place} {function.name}: {', '.join(untyped)}")
    assert not missing


def test_no_test_imports_another():
    """Helpers that tests share have modules of their own."""
    for file in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = [name for name in names if name.split(".")[-1].startswith("test_")]
            assert not found, f"{file.name} imports {', '.join(found)}"
