"""Which module may import which: the order of the rooms, the seam between the packages, and what stays light.

All imports count, those within functions too: a function-level import may defer a heavy module for the start-up
time, but never hide a circle.
"""

import ast
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STANDARD = set(sys.stdlib_module_names)
HEAVY = {
    "torch", "timm", "torchvision", "torchmetrics", "matplotlib", "pandas", "pyarrow", "numpy", "PIL", "jinja2",
    "huggingface_hub", "safetensors", "tensorboard",
}  # fmt: skip

# A room is a module or a folder of a package. It may import itself, and the rooms on lines above its own. A new
# file is added to the line below the last room that it needs.
ROOMS = {
    "tokdiv": [
        "errors text lazy memory progress similarity versions",
        "certify correspondence dist metric run_dir settings",
        "config data figures teachers",
        "autotune noise run_config scores tables",
        "ranking state",
        "hand_over judge",
        "measure",
        "depth maps",
        "report",
        "rank",
        "cli",
        "__main__",
    ],
    "img2vec": [
        "attention config figures loss masking optim",
        "data model targets teacher",
        "checkpoint step",
        "resume",
        "export log token_maps",
        "evaluate report",
        "train",
        "cli",
        "__main__",
    ],
}
# Who imports a page's builder, and only within a function: a run finishes without it.
REPORTS = {"tokdiv.report": {"tokdiv.rank", "tokdiv.cli"}, "img2vec.report": {"img2vec.train"}}
# What both packages use to make a page.
PAGE = "tokdiv.report.page"

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ROOMS
    for path in sorted((ROOT / package).rglob("*.py"))
}


@functools.cache
def imported(module: str, *, top_level: bool = False) -> frozenset[str]:
    """The modules that a file names in its imports, those for type checkers aside.

    Args:
        top_level: only what is imported with the module itself.
    """
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    left_out = {
        inner
        for node in ast.walk(tree)
        if (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        or (top_level and isinstance(node, ast.FunctionDef))
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names |= {_home(f"{node.module}.{alias.name}") for alias in node.names}
    return frozenset(names)


def _home(name: str) -> str:
    """The module behind an imported name: itself, the one it is defined in, or that of a lazy public name."""
    parent, _, last = name.rpartition(".")
    if name in MODULES or parent not in MODULES:
        return name
    if MODULES[parent].name != "__init__.py":
        return parent
    homes = getattr(importlib.import_module(parent), "_HOMES", {})
    return f"{parent}.{homes[last]}" if last in homes else parent


def own(module: str, **options: bool) -> set[str]:
    return set(imported(module, **options) & MODULES.keys())


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def packages(module: str) -> set[str]:
    """Third-party packages that a module names itself, or that are loaded with it."""
    needed, seen, waiting = set(imported(module)), set(), [module]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            needed |= imported(current, top_level=True)
            waiting += own(current, top_level=True)
    return {name.partition(".")[0] for name in needed} - STANDARD - ROOMS.keys()


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_only_those_above_them(package: str) -> None:
    level = {
        f"{package}.{name}": n for n, line in enumerate(ROOMS[package]) for name in line.split()
    }
    found = {room(module) for module in MODULES if module.startswith(f"{package}.")}
    assert found - level.keys() == set(), "rooms without a line in ROOMS"
    assert level.keys() - found == set(), "lines of ROOMS without a room"
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if module.startswith(f"{package}.")
        for name in own(module)
        if name.startswith(f"{package}.")
        and room(name) != room(module)
        and level[room(name)] >= level[room(module)]
    ]
    assert wrong == []


def test_no_circle_of_imports() -> None:
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(own(module) - {module}):
                visit(name, [*path, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


def test_tokdiv_never_imports_img2vec() -> None:
    for module in MODULES:
        if module.startswith("tokdiv"):
            assert not [name for name in imported(module) if name.startswith("img2vec")], module


def test_only_the_end_of_a_run_and_its_own_command_build_a_report() -> None:
    for report, users in REPORTS.items():
        for module in MODULES:
            used = {name for name in own(module) if room(name) == report}
            if room(module) == report or (used == {PAGE} and module.startswith("img2vec")):
                continue
            assert module in users or not used, f"{module} imports {used}"
            assert not used & own(module, top_level=True), f"{module} imports {used} at its top"


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("tokdiv.certify", {"numpy"}),
        ("tokdiv.errors", set()),
        ("tokdiv.text", set()),
        ("tokdiv.teachers.spec", set()),
        ("tokdiv.teachers.zoo", set()),
        ("tokdiv.teachers.cache", {"huggingface_hub"}),
        *(
            (module, {"matplotlib", "numpy", "pandas"})
            for module in MODULES
            if module.startswith("tokdiv.figures") or module == "img2vec.figures"
        ),
    ],
)
def test_what_needs_little_imports_little(module: str, allowed: set[str]) -> None:
    assert packages(module) <= allowed


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import tokdiv, tokdiv.cli",
        "import tokdiv; tokdiv.parse_specs(['paper']); from tokdiv import tables; tables.zoo_table()",
        "import img2vec, img2vec.cli",
        "import tokdiv, img2vec; dir(tokdiv), dir(img2vec)",
    ],
    ids=["tokdiv", "the zoo", "img2vec", "dir"],
)
def test_what_answers_at_once_loads_nothing_heavy(statement: str) -> None:
    assert not loaded_by(statement) & HEAVY


def test_without_the_report_all_else_works(tmp_path: Path) -> None:
    # As if the folder had been deleted, and jinja2 with it: importing them fails.
    code = f"""
import sys
sys.modules["tokdiv.report"] = sys.modules["jinja2"] = None
from tokdiv.cli import app, run
def call(*words):
    sys.argv = ["tokdiv", *words]
    return run(app)
data, image = "tokdiv/samples/images", "tokdiv/samples/images/cat_eyes.jpg"
out = {str(tmp_path)!r}
short = "--max-images", "8", "--device", "cpu", "--dtype", "float32"
assert call("rank", data, "-t", "pixels,hog", "-o", out + "/RUN", *short) == 0
assert call("maps", image, "-t", "pixels,hog", "-o", out + "/maps.png") == 0
assert call("depth", data, "-t", "sample_mae_vit", "-o", out + "/depth", "--max-images", "2") == 0
try:
    call("report", out + "/RUN")
except ModuleNotFoundError:
    sys.exit(0)
sys.exit("the report was written")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "RUN" / "ranking.json").is_file()
    assert not (tmp_path / "RUN" / "report.html").exists()
    assert "its report could not be written" in result.stderr


@pytest.mark.parametrize("package", ROOMS)
def test_every_public_name_is_there_and_no_other(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(getattr(module, name), "__name__", name) == name
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing
