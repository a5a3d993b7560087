"""The rules that hold the rooms apart and the house small, read off the source.

Lines are counted as they stand in the files, comments and blank lines too; a room is a folder of
`lowmem_dpo`, the files beside those folders, or all of `lowmem_dpo_kernels`.
"""

import ast
import graphlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "lowmem_dpo": ROOT / "lowmem_dpo",
    "lowmem_dpo_kernels": ROOT / "kernels" / "lowmem_dpo_kernels",
}

# A room may import those after it in this list, and itself; rooms on one line are strangers.
ORDER = [
    {"cli"},
    {"pipeline", "demo"},
    {"trainer"},
    {"training"},
    {"steps"},
    {"records"},
    {"weights"},
    {"model"},
    {"linears"},
    {"reference", "memory"},
    {"machine", "packs"},
    {"tokens", "lowmem_dpo_kernels"},
    {"data"},
    {"settings"},
    {"losses"},
    {"console", "files", "stopping", "version"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
ENTRANCES = {"__init__", "__main__"}

MAX_FILE_LINES = 450
MAX_ROOM_LINES = 2_500
MAX_KERNEL_LINES = 2_900  # each operation has a plain twin, and is compiled and interpreted
MAX_PRODUCT_LINES = 24_800  # raised with what the product can do, never for how it does it
# The rest takes the groups of settings that it needs.
MAX_MODULES_WITH_TRAIN_CONFIG = 5


def source_files():
    return [path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))]


def room_of(path: Path) -> str:
    if "kernels" in path.relative_to(ROOT).parts[:1]:
        return "lowmem_dpo_kernels"
    return path.relative_to(PACKAGES["lowmem_dpo"]).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "lowmem_dpo":
                names = [f"lowmem_dpo.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lowmem_dpo":
                rooms.add(parts[1])
            elif parts[0] == "lowmem_dpo_kernels":
                rooms.add("lowmem_dpo_kernels")
    return rooms


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = room_of(path)
    if room in ENTRANCES:
        return
    for other in imported_rooms(path) - {room}:
        assert LEVEL[other] > LEVEL[room], f"{room} imports {other}"


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_files_stay_short():
    lengths = {
        str(path.relative_to(ROOT)): count_lines(path)
        for path in python_files("lowmem_dpo", "kernels", "tests", "benchmarks")
    }
    assert {path: n for path, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_rooms_stay_small():
    lines: Counter[str] = Counter()
    for path in source_files():
        in_a_folder = path.parent != PACKAGES["lowmem_dpo"]
        lines[room_of(path) if in_a_folder else "ground floor"] += count_lines(path)
    limits = {"lowmem_dpo_kernels": MAX_KERNEL_LINES}
    assert {room: n for room, n in lines.items() if n > limits.get(room, MAX_ROOM_LINES)} == {}


def test_product_stays_small():
    assert sum(map(count_lines, source_files())) <= MAX_PRODUCT_LINES


def module_name(path: Path) -> str:
    package = PACKAGES["lowmem_dpo_kernels" if "kernels" in path.parts else "lowmem_dpo"]
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports_on_loading(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports outside functions, also those for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_on_loading(node)


def test_modules_do_not_import_in_circles():
    """That a module loads the package around it is left out: every one does."""
    paths = {module_name(path): path for path in source_files()}
    graph: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        for node in imports_on_loading(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & paths.keys()
                continue
            for alias in node.names:  # a module of the package, or a name of the module
                choices = (f"{node.module}.{alias.name}", str(node.module))
                graph[name] |= set([choice for choice in choices if choice in paths][:1])
    assert sum(map(len, graph.values())) > 200
    graphlib.TopologicalSorter(graph).prepare()  # its error names the circle


def test_few_modules_hold_a_whole_training_config():
    """Modules outside settings/ that import or use the name TrainConfig; comments do not count."""
    holders = []
    for path in python_files("lowmem_dpo"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        named = {node.id for node in nodes if isinstance(node, ast.Name)}
        named |= {node.name for node in nodes if isinstance(node, ast.alias)}
        if "TrainConfig" in named and room_of(path) != "settings":
            holders.append(module_name(path))
    assert 0 < len(holders) <= MAX_MODULES_WITH_TRAIN_CONFIG, holders


@pytest.mark.parametrize(
    "path",
    [ROOT / "tests" / "tiny.py", *sorted((ROOT / "tests").rglob("conftest.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_what_all_tests_load_imports_no_library(path):
    """A test file that needs no torch runs in a second; one import here would cost it five."""
    allowed = {"pytest", "tests", "lowmem_dpo.files", *sys.stdlib_module_names}
    for node in imports_on_loading(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        for module in map(str, modules):
            assert module in allowed or module.split(".")[0] in allowed, module


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "lowmem_dpo_kernels", *sys.stdlib_module_names}
    for path in sorted(PACKAGES["lowmem_dpo_kernels"].rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            else:
                continue
            assert {name.split(".")[0] for name in names} <= allowed, path


def run_python(
    code: str, *, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(folder.parent) for folder in PACKAGES.values())
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment
    )


def test_kernels_folder_does_not_pass_for_hugging_faces_package():
    code = """
import importlib.util, transformers.modeling_utils
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is None, spec
from transformers.utils import is_kernels_available
assert not is_kernels_available()
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_real_kernels_package_wins_over_the_folder(tmp_path):
    real = tmp_path / "site" / "kernels"
    real.mkdir(parents=True)
    (real / "__init__.py").write_text("REAL = True\n")
    result = run_python(
        f"import sys; sys.path.append({str(real.parent)!r}); import kernels; assert kernels.REAL"
    )
    assert result.returncode == 0, result.stderr


def test_package_imports_without_torch_for_help_and_settings():
    code = """
import sys
for name in ("torch", "transformers", "triton", "bitsandbytes"):
    sys.modules[name] = None
from lowmem_dpo.cli import main
assert main(["--version"]) == 0
assert main(["train", "--print_config", "--beta", "0.2"]) == 0
assert main(["train", "--help"]) == 0
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_trains_on_the_cpu_without_triton(llama_dir, pairs_file, tmp_path):
    words = [
        "train",
        "--model",
        llama_dir,
        "--data",
        pairs_file(),
        "--output_dir",
        tmp_path / "out",
    ]
    code = f"""
import sys
sys.modules["triton"] = None
from lowmem_dpo.cli import main
code = main({[str(word) for word in words]})
assert "lowmem_dpo_kernels.token_logps_triton" not in sys.modules
sys.exit(code)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "step zero: every margin is exactly 0" in result.stdout


def test_sources_do_not_speak_of_where_they_were_made():
    words = ["/wo" + "rk/", "DESIGN" + ".md", "STYLE" + ".md", "shared" + "/"]
    files = python_files("lowmem_dpo", "kernels", "tests", "benchmarks")
    files += [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
    ]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in words if word in text], path
