"""Which module may import which: the seam between the packages, and what stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "timm", "torchvision", "torchmetrics", "matplotlib", "pandas", "pyarrow")


def imported(path: Path, whole: bool = True) -> set[str]:
    """Every module that a file names in an import: anywhere in it, or at its top alone."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if whole else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = (
                path.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            )
            module = ".".join([*above, *filter(None, [node.module])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", files("tokdiv"), ids=lambda path: path.name)
def test_tokdiv_never_imports_img2vec(path: Path):
    assert "img2vec" not in packages(path)


def test_certificates_need_numpy_only():
    standard = set(sys.stdlib_module_names)
    assert packages(ROOT / "tokdiv" / "certify.py") - standard <= {"numpy", "tokdiv"}
    own = {n for n in imported(ROOT / "tokdiv" / "certify.py") if n.startswith("tokdiv.")}
    assert {name.split(".")[1] for name in own} <= {"errors"}


def test_specs_and_the_cache_need_the_standard_library_only():
    standard = set(sys.stdlib_module_names)
    for name in ("errors", "spec", "zoo", "cache"):
        assert packages(ROOT / "tokdiv" / f"{name}.py") - standard <= {"tokdiv"}


def test_figures_know_nothing_of_networks():
    # plots.py takes arrays: torch or timm in it would be a second way to the tokens.
    assert not packages(ROOT / "tokdiv" / "plots.py") & {"torch", "timm"}


def test_only_the_report_is_above_the_ranking():
    # What a run shows may be deleted: nothing else of tokdiv knows of it but at the end of a run.
    importing = {
        path.name: {
            name for name in ("tokdiv.report.page", "tokdiv.report.build") if name in imported(path)
        }
        for path in files("tokdiv")
    }
    assert {name: found for name, found in importing.items() if found} == {
        "cli.py": {"tokdiv.report.build"},
        "measure.py": {"tokdiv.report.build"},
        "report.py": {"tokdiv.report.page"},
    }


def test_measuring_does_not_need_the_figures():
    # At the top of a module, only where there is nothing to do but draw.
    for path in files("tokdiv"):
        if path.name not in ("maps.py", "depth.py", "plots.py", "page.py", "report.py"):
            assert not imported(path, whole=False) & {
                "tokdiv.figures.figures",
                "tokdiv.report.build",
            }, path.name


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
        "import tokdiv; tokdiv.parse_specs(['paper']); from tokdiv import listing; listing.zoo_table()",
        "import img2vec, img2vec.cli",
    ],
    ids=["tokdiv", "the zoo", "img2vec"],
)
def test_what_answers_at_once_loads_nothing_heavy(statement: str):
    assert not loaded_by(statement) & set(HEAVY)


def test_every_public_name_is_there_and_no_other():
    import tokdiv

    for name in tokdiv.__all__:
        assert getattr(tokdiv, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'tokdiv' has no attribute 'nothing'"):
        _ = tokdiv.nothing
