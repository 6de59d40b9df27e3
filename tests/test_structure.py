"""The package's own rules: imports go one way, folders stay few, functions stay short."""

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
    """Dotted name -> path of every module of the package; a package's is its `__init__`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ["opsd_jax", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path, known):
    """The modules of the package that a module imports, inside functions too."""
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
    """The folder of a module, or the module itself directly under the package."""
    return name.removeprefix("opsd_jax.").partition(".")[0]


def circle(graph):
    """A circle in a graph of sets, as a list of its nodes; [] if there is none."""
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


def test_the_search_finds_a_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_circle_between_modules(graph):
    assert circle(graph) == []


def test_imports_between_folders_go_one_way(graph):
    upward = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if name != "opsd_jax" and other != "opsd_jax" and folder(name) != folder(other)
        if ORDER.index(folder(other)) > ORDER.index(folder(name))
    ]
    assert upward == []


def test_losses_and_policy_import_nothing_of_ours(graph):
    for name, others in graph.items():
        if folder(name) in ("losses", "policy", "problem", "options"):
            assert {folder(other) for other in others} <= {folder(name)}, name


def test_few_modules_directly_under_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= 5


def functions():
    """(module, name, lines) of every function of the package, docstrings included."""
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
    """Everything else reads the table `opsd_jax.stages.ALGORITHMS`."""
    found = [
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*.py")
        if "stages" not in path.parts and word in path.read_text()
    ]
    assert found == []


def test_library_code_does_not_print():
    """Messages go through `logging`; the results of a command go to standard output."""
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
