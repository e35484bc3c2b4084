"""What depends on what, what the wheel contains, and how long a file may be."""

from __future__ import annotations

import ast
import configparser
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from importlinter import cli as importlinter_cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hfopt", "models", "pathological", "corpora", "runs")
LONGEST_FILE = 500


def source_files() -> list[Path]:
    """The repository's own text files: neither environments, caches nor the logs of runs."""
    skipped = {"build", "dist", "logs", "__pycache__", "node_modules"}
    kinds = {".py", ".md", ".cfg", ".toml", ".txt", ".sh"}
    return [
        path
        for path in sorted(ROOT.rglob("*"))
        if path.is_file()
        and (path.suffix in kinds or path.name in {"Makefile", "run"})
        and not any(
            part in skipped or part.endswith(".egg-info") or (part.startswith(".") and part != ".ci")
            for part in path.relative_to(ROOT).parts
        )
    ]


def imported_roots(path: Path, *, eager: bool = False) -> set[str]:
    """The top-level names of a file's absolute imports; `eager`: only of those that run with the import."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        if not (eager and deferred):
            nodes.extend(ast.iter_child_nodes(node))
    return found


def requirements(config: configparser.ConfigParser, section: str, option: str) -> set[str]:
    """The names of the distributions that an option of setup.cfg lists."""
    lines = config[section][option].split("\n")
    return {re.split(r"[<>=!~;\s]", line)[0] for line in lines if line.strip()}


def test_dependencies_point_one_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    loggers = [found for found in logging.root.manager.loggerDict.values() if isinstance(found, logging.Logger)]
    disabled = [logger.disabled for logger in loggers]
    try:
        status = importlinter_cli.lint_imports(no_cache=True)
    finally:  # it configures logging, and with that disables all loggers that are there
        for logger, before in zip(loggers, disabled, strict=True):
            logger.disabled = before
    assert status == 0, capsys.readouterr().out


def test_the_contracts_cover_every_package() -> None:
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.importlinter]")[2]
    line = re.search(r"root_packages = \[(.*?)\]", section)
    assert line is not None
    present = {name for name in PACKAGES if (ROOT / name / "__init__.py").is_file()}
    assert set(re.findall(r'"(\w+)"', line.group(1))) == present


def test_hfopt_imports_only_what_it_installs() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    at_once = requirements(config, "options", "install_requires") | set(sys.stdlib_module_names) | {"hfopt"}
    on_demand = at_once | requirements(config, "options.extras_require", "plot")
    files = sorted((ROOT / "hfopt").rglob("*.py"))
    assert files
    kernels = ROOT / "hfopt" / "recurrences" / "triton"
    for path in files:
        # A CUDA build of torch brings Triton along; the kernels' modules are imported by their package, on demand.
        triton = {"triton"} if path.parent == kernels and path.name != "__init__.py" else set()
        assert imported_roots(path, eager=True) <= at_once | triton, path
        assert imported_roots(path) <= on_demand | triton, path


def test_packages_never_import_tests_or_benchmarks() -> None:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            assert not imported_roots(path) & {"tests", "benchmarks"}, path


def test_the_wheel_contains_hfopt_alone(tmp_path: Path) -> None:
    tree, wheels = tmp_path / "tree", tmp_path / "wheels"
    tree.mkdir()
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for name in (*PACKAGES, "tests", "benchmarks"):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "logs")
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-index", "--disable-pip-version-check", "--wheel-dir", str(wheels), str(tree)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert {name.partition("/")[0] for name in names} == {"hfopt", metadata.partition("/")[0]}
    sources = {f"hfopt/{path.relative_to(ROOT / 'hfopt').as_posix()}" for path in ROOT.glob("hfopt/**/*.py")}
    assert sources | {"hfopt/py.typed"} <= set(names)
    assert "Requires-Python: >=3.10" in text


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert ROOT / "pathological" / "adding.py" in lengths
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > LONGEST_FILE} == {}
