"""What depends on what, in one direction and without circles; what the wheel contains; how long a file may be."""

from __future__ import annotations

import ast
import configparser
import functools
import logging
import os
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
DEEPEST_CHAIN = 8
# Circles that only an import inside a function closes, still to be opened; what is not here any more stays open.
DEFERRED_CIRCLES: list[set[str]] = []

Graph = dict[str, set[str]]


def source_files() -> list[Path]:
    """The repository's own text files: neither environments, caches nor the logs of runs."""
    skipped = {"build", "dist", "logs", "__pycache__", "node_modules"}
    kinds = {".py", ".md", ".cfg", ".toml", ".txt", ".sh"}
    found = []
    for folder, below, names in os.walk(ROOT):
        # Pruned before they are entered: an environment alone has ten times as many files as the repository.
        below[:] = [
            name
            for name in below
            if not (name in skipped or name.endswith(".egg-info") or (name.startswith(".") and name != ".ci"))
        ]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.suffix in kinds or path.name in {"Makefile", "run"}]
    return sorted(found)


@functools.cache
def imports_of(path: Path) -> tuple[tuple[ast.Import | ast.ImportFrom, bool, bool], ...]:
    """The imports of a file; of each, whether it is inside a function and whether it is for types alone."""
    found: list[tuple[ast.Import | ast.ImportFrom, bool, bool]] = []
    nodes: list[tuple[ast.AST, bool, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), False, False)]
    while nodes:
        node, deferred, typing = nodes.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append((node, deferred, typing))
        deferred = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = typing or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        nodes.extend((child, deferred, typing) for child in ast.iter_child_nodes(node))
    return tuple(found)


def imported_roots(path: Path, *, eager: bool = False) -> set[str]:
    """The top-level names of a file's absolute imports; `eager`: only of those that run with the import."""
    found: set[str] = set()
    for node, deferred, typing in imports_of(path):
        if eager and (deferred or typing):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def modules() -> dict[str, Path]:
    """The files of hfopt by the names of their modules."""
    paths = {path: path.relative_to(ROOT).with_suffix("").parts for path in sorted((ROOT / "hfopt").rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in paths.items()}


def import_graph(*, deferred: bool) -> Graph:
    """The modules of hfopt that each one imports: for types too, inside functions only where asked for."""
    files = modules()
    graph: Graph = {name: set() for name in files}
    for name, path in files.items():
        for node, inside, _ in imports_of(path):
            if inside and not deferred:
                continue
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            else:
                assert node.level == 0, f"{path}: imports are absolute"
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {member if member in files else str(node.module) for member in members}
    return {name: (found & set(files)) - {name} for name, found in graph.items()}


def components(graph: Graph) -> list[set[str]]:
    """The strongly connected components (Tarjan): every one after those that it leads to."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(v: str) -> None:
        order[v] = low[v] = len(order)
        stack.append(v)
        for w in sorted(graph[v]):
            if w not in order:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], order[w])
        if low[v] == order[v]:
            cut = stack.index(v)
            found.append(set(stack[cut:]))
            del stack[cut:]

    for v in sorted(graph):
        if v not in order:
            visit(v)
    return found


def circles(graph: Graph, but: list[set[str]]) -> list[list[str]]:
    """Circles of imports besides those that lie within the modules and folders of one of ``but``."""

    def known(circle: set[str]) -> bool:
        return any(all(any(f"{m}.".startswith(f"{name}.") for name in names) for m in circle) for names in but)

    return [sorted(circle) for circle in components(graph) if len(circle) > 1 and not known(circle)]


def rooms(graph: Graph) -> Graph:
    """The imports between the folders and files directly below hfopt, its own ``__init__`` left out."""
    below = {name: name.split(".")[1] for name in graph if "." in name}
    found: Graph = {room: set() for room in below.values()}
    for name, room in below.items():
        found[room] |= {below[other] for other in graph[name] if other in below} - {room}
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


def test_components_and_circles_of_a_graph() -> None:
    graph = {"a": {"b"}, "b": {"c.x", "d"}, "c.x": {"b"}, "d": set(), "e": {"a"}}
    assert components(graph) == [{"d"}, {"b", "c.x"}, {"a"}, {"e"}]
    assert circles(graph, []) == [["b", "c.x"]]
    assert circles(graph, [{"b", "c"}]) == []
    assert circles(graph, [{"b", "c.xy"}]) == [["b", "c.x"]]


def test_no_module_is_imported_in_a_circle() -> None:
    """Of what runs with the import, and of what is imported for types alone."""
    graph = import_graph(deferred=False)
    assert graph["hfopt.linalg.cg_debiased"] >= {"hfopt.linalg.vector"}
    assert "hfopt.experiment.driver" in graph["hfopt"]  # for types
    assert circles(graph, []) == []


def test_imports_inside_functions_hide_no_circle() -> None:
    assert circles(import_graph(deferred=True), DEFERRED_CIRCLES) == []


def test_the_longest_chain_of_imports_is_short() -> None:
    """Over the folders and files directly below hfopt, each one level; those of a circle count one by one."""
    graph = rooms(import_graph(deferred=False))
    depth: dict[str, int] = {}
    for group in components(graph):
        below = max((depth[room] for member in group for room in graph[member] - group), default=0)
        depth |= dict.fromkeys(group, below + len(group))
    assert depth["errors"] == 1
    assert depth["step"] > depth["curvature"] > depth["closure"] > depth["recurrences"]
    assert max(depth.values()) <= DEEPEST_CHAIN, depth


def test_hfopt_is_imported_without_what_experiments_need() -> None:
    heavy = ("h5py", "rich", "matplotlib", "torch._dynamo", "triton")
    command = f"import sys, hfopt; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lists_of_runs_do_not_wait_for_torch() -> None:
    command = (
        "import sys; from hfopt.cli.main import main; main(['list', '.']); "
        "import hfopt; assert 'torch' not in sys.modules; hfopt.HessianFree; assert 'torch' in sys.modules; "
        "hfopt.preconditioners.EmpiricalFisherDiagonal"
    )
    subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT / "docs", check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_every_folder_says_what_it_is_for_and_what_is_public() -> None:
    for folder in sorted({path.parent for path in (ROOT / "hfopt").rglob("*.py")}):
        init = folder / "__init__.py"
        assert init.is_file(), folder
        tree = ast.parse(init.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), init
        taken = any(isinstance(n, ast.ImportFrom) and str(n.module).startswith("hfopt") for n in tree.body)
        listed = any(isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__" for n in tree.body)
        assert listed or not taken, f"{init} has names of its files but no __all__"


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


@pytest.mark.slow
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
    pages = [path for path in ROOT.glob("hfopt/experiment/pages/**/*") if path.is_file() and path.suffix != ".pyc"]
    assert {"page.html", "uPlot.iife.min.js", "LICENSE-uPlot"} <= {path.name for path in pages}
    assert {path.relative_to(ROOT).as_posix() for path in pages} <= set(names)
    assert "Requires-Python: >=3.10" in text


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert ROOT / "pathological" / "adding.py" in lengths
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > LONGEST_FILE} == {}
