"""Rules for the package: imports go one way, modules stay few, and functions stay short."""

import ast
import pathlib

import pytest
from paths import ROOT

PACKAGE = ROOT / "opsd_jax"
# Folders from the lowest to the highest: each imports only from those before it.
ORDER = (
    "losses", "policy", "problem", "options", "parallel", "storage", "verify", "data", "models",
    "rollout", "training", "stages", "evaluation", "config", "run", "planning", "cli", "__main__",
)  # fmt: skip
LONG = 60  # lines of a function; a few may have more, none more than LIMIT
LIMIT = 100


def modules():
    """Returns dotted name -> path for every module; the name of a folder has its `__init__`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ["opsd_jax", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path, known):
    """Returns the modules of the package that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & known.keys() or {node.module}
    return found


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def folder(name):
    """Returns the folder of a module, or the module itself if it is in no folder."""
    return name.removeprefix("opsd_jax.").partition(".")[0]


def cycle(graph):
    """Returns the nodes of a cycle in a graph; [] if the graph has none."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for after in sorted(graph.get(node, ())):
            if found := visit(after):
                return found
        path.pop()
        done.add(node)
        return []

    for node in sorted(graph):
        if found := visit(node):
            return found
    return []


def test_the_search_finds_a_cycle():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_modules_do_not_import_in_a_cycle(graph):
    assert cycle(graph) == []


def test_imports_between_folders_go_one_way(graph):
    upward = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if name != "opsd_jax" and other != "opsd_jax" and folder(name) != folder(other)
        if ORDER.index(folder(other)) > ORDER.index(folder(name))
    ]
    assert upward == []


def test_losses_and_policy_import_nothing_else_of_the_package(graph):
    for name, others in graph.items():
        if folder(name) in ("losses", "policy", "problem", "options"):
            assert {folder(other) for other in others} <= {folder(name)}, name


def test_few_modules_directly_under_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= 5


def functions():
    """Returns (module, name, number of lines) for every function; docstrings count as lines."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path.relative_to(PACKAGE), node.name, node.end_lineno - node.lineno + 1


def test_functions_are_short():
    long = sorted(f for f in functions() if f[2] > LONG)
    assert [f for f in long if f[2] > LIMIT] == []
    assert len(long) <= 5, long


@pytest.mark.parametrize("word", ["algorithm ==", "algorithm !=", "algorithm in ("])
def test_only_stages_tell_algorithms_apart(word):
    """All other modules use the table `opsd_jax.stages.ALGORITHMS`."""
    found = [
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*.py")
        if "stages" not in path.parts and word in path.read_text()
    ]
    assert found == []


def test_library_code_does_not_print():
    """Library code uses `logging`. Only commands print, and they print results."""
    printing = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    assert printing <= {"cli", "config"}  # config/fields.py is a command: it writes a page


def test_every_folder_of_the_package_has_tests():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders <= {path.name for path in pathlib.Path(ROOT / "tests").iterdir()}
