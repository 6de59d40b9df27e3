"""The changelog, the version, the packaging and the contributors' guide match the repository."""

import ast
import importlib.metadata
import re
import tomllib

import pytest
import yaml
from paths import CONFIGS, ROOT

import opsd_jax

PACKAGE = ROOT / "opsd_jax"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
PAGES += sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
PATH = re.compile(
    r"(?<![\w/.:-])(?:\./)?"
    r"((?:opsd_jax|configs|launch|tests|docs|benchmarks|examples|\.ci|\.github)/[\w./-]*\w)"
)


def paths_in(text):
    """Returns the repository paths that a text names, without paths inside the wheel."""
    return {path for path in PATH.findall(text) if not path.startswith("opsd_jax/configs")}


def test_the_changelog_has_an_unreleased_section_above_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert headings[:2] == ["Unreleased", opsd_jax.__version__]


def test_the_version_is_stated_once():
    """setuptools reads the version from the package as a literal, without an import."""
    assert "version" not in PYPROJECT["project"]
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "opsd_jax.__version__"}
    literals = [
        ast.literal_eval(node.value)
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert literals == [opsd_jax.__version__]
    assert importlib.metadata.version("opsd-jax") == opsd_jax.__version__


def test_the_wheel_has_every_package_the_configs_and_the_data_files():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages | {"opsd_jax.configs"})
    assert ROOT / SETUPTOOLS["package-dir"]["opsd_jax.configs"] == CONFIGS
    others = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert PACKAGE / "py.typed" in others
    assert others == {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }


def test_the_commands_of_contributing_name_files_that_exist():
    blocks = re.findall(
        r"^ *```bash\n(.*?)^ *```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
    )
    named = paths_in("\n".join(blocks))
    assert {"launch/test.sh", ".ci/run"} <= named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_code_spans_exist(page):
    spans = re.findall(r"`([^`\n]+)`", (ROOT / page).read_text())
    assert [p for p in sorted(paths_in("\n".join(spans))) if not (ROOT / p).exists()] == []


def test_the_workflow_runs_the_commands_of_ci():
    ci = (ROOT / ".ci" / "run").read_text()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["command"] == re.findall(r"^\./launch/.*", ci, re.MULTILINE)
    assert "${{ matrix.command }}" in [step.get("run") for step in job["steps"]]
    (pythons,) = [step["with"]["python-version"].split() for step in job["steps"] if "with" in step]
    assert PYPROJECT["project"]["requires-python"] == f">={pythons[-1]}"  # the default
    files = {path.name for path in (ROOT / "constraints").iterdir()}
    assert {f"python{python}.txt" for python in pythons} == files
