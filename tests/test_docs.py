"""Run every command and every Python block of README.md and docs/, on stand-ins for images and weights.

A command that is added to a page is found automatically. What would take hours or a network is only checked: make
and pip against the Makefile and pyproject.toml, benchmarks by their own parsers, and data sets that would be
downloaded by the parser of the command line.
"""

import argparse
import ast
import html
import importlib
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from stand_ins import apply, make_coco_folder, make_images, save_weights, short_presets

import tokdiv.cli
from img2vec.config import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]
RUN = re.compile(r"(runs/[\w-]+|RUN|OUT)(/.*)?$")  # how the documentation names the folder of a run
DOWNLOADED = re.compile(r"(hfds|torch|tfds|hfids)/|wds/\w+://")
# Long by default, and as long as their epochs.
SHORT = {"finetune": ("--epochs", "1", "--warmup-epochs", "0")}
SHORT["probe"] = SHORT["finetune"]
SHORT["segment"] = ("--max-steps", "2", "--batch-size", "2")
SHORT["detect"] = (
    *("--max-steps", "1", "--batch-size", "2", "--image-size", "64", "--channels", "8"),
    *("--proposals", "16", "--workers", "0"),
)


@dataclass(frozen=True)
class Block:
    """A block of code: its page, the line it begins at, its language and title, and the code."""

    page: str
    line: int
    language: str
    title: str | None
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, and blocks indented by four spaces, which are shell."""
    lines = page.read_text(encoding="utf-8").splitlines()
    name = page.relative_to(ROOT).as_posix()
    number, empty = 0, True
    while number < len(lines):
        line, start = lines[number], number + 2
        if fence := re.match(r"(`{3,})\s*(\w*)(.*)$", line):
            end = next(n for n in range(number + 1, len(lines)) if lines[n].startswith(fence[1]))
            title = re.search(r'title="([^"]+)"', fence[3])
            code = "\n".join(lines[number + 1 : end])
            yield Block(name, start, fence[2], title and title[1], code)
            number = end
        elif line.startswith("    ") and empty:
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            code = "\n".join(text[4:] for text in lines[number:end])
            yield Block(name, start - 1, "sh", None, code)
            number = end - 1
        empty = not lines[number].strip()
        number += 1


BLOCKS = [block for page in PAGES for block in blocks(page)]
FILES = {block.title: block for block in BLOCKS if block.title}
SHELL = ("sh", "bash", "shell", "console")


def shell_commands() -> dict[str, str]:
    """Every different command line, by where it is first given; of a script, those that it starts."""
    found: dict[str, str] = {}
    for block in BLOCKS:
        if block.language not in SHELL:
            continue
        code = block.code.replace("\\\n", " ")
        lines = code.split("\n")
        if block.title:
            lines = re.findall(r"python -m (?:tokdiv|img2vec) [^'\"\n]*", code)
        for number, line in enumerate(lines):
            text = " ".join(line.split())
            if text and not text.startswith("#") and text not in found.values():
                found[f"{block.page}:{block.line}:{number}"] = text
    return found


COMMANDS = shell_commands()
PYTHON = [block for block in BLOCKS if block.language == "python"]


# The sandbox --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images under the names that the documentation uses."""
    root = tmp_path_factory.mktemp("images")
    make_images(root)
    make_coco_folder(root)
    return root


@pytest.fixture
def sandbox(
    template: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> Path:
    """A working folder with images and the files that pages show; weights are made where a command needs some."""
    for entry in template.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    for title, block in FILES.items():
        (tmp_path / title).write_text(block.code + "\n", encoding="utf-8")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKDIV_CACHE", str(tmp_path_factory.getbasetemp() / "weights"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    apply(monkeypatch.setattr)
    for name, preset in short_presets().items():
        monkeypatch.setitem(PRESETS, name, preset)
    for block in FILES.values():
        make_checkpoints(block.code)
    return tmp_path


@pytest.fixture
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], None]:
    """Put a finished ranking or pretraining where a command expects one; each is made once."""

    def provide(kind: str, path: str) -> None:
        kept = tmp_path_factory.getbasetemp() / f"finished-{kind}"
        if not kept.exists():
            if kind == "ranking":
                tokdiv.rank("photos", ["dino_resnet50", "hog"], kept)
            else:
                importlib.import_module("img2vec").pretrain("photos", "hog", kept)
        if not Path(path).exists():
            shutil.copytree(kept, path)

    return provide


def make_checkpoints(text: str) -> None:
    """Checkpoints that a text names, as timm:ARCH@PATH or in TOML."""
    named = re.findall(r"timm:(\w+)@([\w./-]+\.(?:pth|pt|safetensors))", text)
    named += re.findall(r'architecture = "(\w+)"\nweights = "([^"]+)"', text)
    for architecture, path in named:
        if not Path(path).is_file():
            save_weights(architecture, Path(path))


# Commands -----------------------------------------------------------------------------------------


def parsed(package: str, arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command and its parameters, as the real command line reads them."""
    group: Any = typer.main.get_command(importlib.import_module(f"{package}.cli").app)
    assert arguments and arguments[0] in group.commands, (
        f"{package} has no such command: {arguments}"
    )
    command = group.commands[arguments[0]]
    try:
        return arguments[0], command.make_context(arguments[0], arguments[1:]).params
    except Exception as error:
        raise AssertionError(f"{shlex.join([package, *arguments])}: {error!r}") from error


def run_program(
    package: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    run_folder: Callable[[str, str], None],
) -> None:
    """Parse a command line of ours, provide what it reads, and run it in this process."""
    command, parameters = parsed(package, arguments)
    data = str(parameters.get("data", parameters.get("train", "")))
    if DOWNLOADED.match(data):
        return
    make_checkpoints(" ".join(arguments))
    ranking = package == "tokdiv" or command == "pretrain"
    for name, value in parameters.items():
        if name != "out" and isinstance(value, (str, Path)) and (found := RUN.match(str(value))):
            run_folder("ranking" if ranking else "pretraining", found[1])
    monkeypatch.setattr(sys, "argv", [package, *arguments, *SHORT.get(command, ())])
    code = tokdiv.cli.run(importlib.import_module(f"{package}.cli").app)
    assert code == 0, f"exit code {code}: {shlex.join(sys.argv)}"
    if out := parameters.get("out"):
        assert Path(out).exists(), f"nothing at {out}"


def check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert arguments and set(arguments) <= set(targets), f"the Makefile has {', '.join(targets)}"


def check_pip(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert arguments.pop(0) == "install"
    for argument in arguments:
        if argument == "-e":
            continue
        name, _, extras = argument.rstrip("]").partition("[")
        assert name in (".", project["name"]), f"pip install {argument}"
        assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"])


def check_benchmark(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark's own parser takes the arguments; the benchmark itself does not run."""

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_alone(self: argparse.ArgumentParser, *given: Any, **options: Any) -> None:
        parse(self, *given, **options)
        raise Parsed

    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(path), run_name="__main__")


def check_variable(name: str) -> None:
    """The packages or the benchmarks read this environment variable."""
    sources = [
        path.read_text()
        for p in ("tokdiv", "img2vec", "benchmarks")
        for path in (ROOT / p).rglob("*.py")
    ]
    assert any(f'"{name}"' in source for source in sources), f"nothing reads {name}"


def check(
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    run_folder: Callable[[str, str], None],
) -> None:
    """Run a command line, or check what cannot be run here."""
    words = shlex.split(text, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        check_variable(words.pop(0).partition("=")[0])
    program, *arguments = words
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(arguments)
        assert given.module
        program, arguments = given.training_script, given.training_script_args
        # A single process shards nothing.
        parsed(program, arguments)
        arguments = [argument for argument in arguments if argument != "--shard"]
    if program == "python" and arguments[0] == "-m":
        _, program, *arguments = arguments
    if program in ("tokdiv", "img2vec"):
        run_program(program, arguments, monkeypatch, run_folder)
    elif program == "python":
        check_benchmark(arguments[0], arguments[1:], monkeypatch)
    elif program == "make":
        check_make(arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "export":
        for assignment in arguments:
            check_variable(assignment.partition("=")[0])
    else:
        raise AssertionError(f"say in tests/test_docs.py how to check {program}: {text}")


@pytest.mark.parametrize("where", COMMANDS)
def test_command(
    where: str,
    sandbox: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_folder: Callable[[str, str], None],
) -> None:
    check(COMMANDS[where], monkeypatch, run_folder)


@pytest.mark.parametrize(
    "text",
    [
        "tokdiv rank photos -t hog -o runs/new --no-such-option",
        "torchrun --nproc-per-node 8 -m img2vec pretrain DATA --teacher hog -o runs/new --epoch 3",
        "torchrun --nproc-per-nodes 8 -m tokdiv rank DATA -t hog -o runs/new",
        "tokdiv rank photos -t no_such_teacher -o runs/new",
        "img2vec pretrain photos --teacher hog --preset vit_vast -o runs/new",
        "tokdiv grade photos",
        "make coffee",
        "pip install -e '.[dows]'",
        "TOKDIV_CASHE=here tokdiv teachers",
        "python benchmarks/certify.py --set 5 --nothing",
        "curl somewhere",
    ],
)
def test_a_mistake_in_a_command_is_noticed(
    text: str,
    sandbox: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_folder: Callable[[str, str], None],
) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check(text, monkeypatch, run_folder)


def test_torchrun_for_real(sandbox: Path, run_folder: Callable[[str, str], None]) -> None:
    # The first ranking by torchrun in the documentation, with two processes of the eight.
    text = next(t for t in COMMANDS.values() if t.startswith("torchrun") and "tokdiv rank" in t)
    arguments = shlex.split(text)
    arguments[arguments.index("--nproc-per-node") + 1] = "2"
    arguments[arguments.index("-m")] = str(ROOT / "tests" / "stand_ins.py")
    out = arguments[arguments.index("-o") + 1]
    tokdiv.load_teacher("mae_vit_base")  # so that processes do not write one file at once
    for name in ("mae_vit_large", "dino_vit_base", "dino_resnet50"):
        tokdiv.load_teacher(name)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments[1:]],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert len(tokdiv.load_ranking(out).teachers) == 4


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_block(block: Block, sandbox: Path, run_folder: Callable[[str, str], None]) -> None:
    tree = ast.parse(block.code)
    written = {
        keyword.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "out" and isinstance(keyword.value, ast.Constant)
    }
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    for text in texts:
        if not isinstance(text, str) or text in written:
            continue
        make_checkpoints(text)
        if text.startswith("local-dir:"):
            folder = Path(text.partition(":")[2])
            run_folder("pretraining", str(folder.parent if folder.name == "student" else "made"))
            if folder.name != "student" and not folder.exists():
                shutil.copytree("made/student", folder)
        elif found := RUN.match(text):
            run_folder("ranking", found[1])
    exec(compile(tree, str(block), "exec"), {"__name__": block.page})


def test_every_file_that_is_shown_is_used() -> None:
    for title, block in FILES.items():
        if block.language not in SHELL:
            assert any(title in command for command in COMMANDS.values()), f"{block}: {title}"


def test_the_page_lists_every_benchmark() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    scripts = [p for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text()]
    missing = {p.name for p in scripts if f"`{p.name}`" not in page}
    assert missing == {"bench.py"}  # what `make bench` runs


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in SHELL and b.title], ids=str)
def test_script_is_shell(block: Block) -> None:
    result = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_blocks_are_of_a_language_that_is_checked() -> None:
    known = {*SHELL, "python", "toml", "yaml", "text"}
    assert [str(block) for block in BLOCKS if block.language not in known] == []


# Links and the site -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_links_to_files_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            continue
        linked = page.parent / path
        assert linked.exists(), f"{page.name}: {target}"
        if anchor and linked.suffix == ".md" and not anchor.startswith("tokdiv."):
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w]+", "-", heading.lower()).strip("-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}"


def test_the_file_tree_is_that_of_the_disk() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = re.search(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert tree
    folder, listed = "", []
    for line in tree[1].splitlines():
        if line.startswith(" "):
            name, description = line.split(maxsplit=1)
            assert description
            listed.append(folder + name)
        else:
            folder = line
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for package in ("tokdiv", "img2vec")
        for pattern in ("*.py", "*.html")
        for path in (ROOT / package).rglob(pattern)
        if path.name != "__init__.py"
    }
    assert set(listed) == on_disk and len(listed) == len(on_disk)


def command_reference(package: str) -> str:
    spec = importlib.util.spec_from_file_location("commands_page", ROOT / "docs" / "commands.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.on_page_markdown(f"<!-- commands of {package} -->"))


@pytest.mark.parametrize("package", ["tokdiv", "img2vec"])
def test_the_reference_has_every_command_and_option(package: str) -> None:
    reference = command_reference(package)
    sections = dict(
        re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", reference, re.MULTILINE | re.DOTALL)
    )
    group: Any = typer.main.get_command(importlib.import_module(f"{package}.cli").app)
    assert set(sections) == {f"{package} {name}" for name in group.commands}
    for name, command in group.commands.items():
        text = sections[f"{package} {name}"]
        for parameter in command.params:
            for option in [*parameter.opts, *parameter.secondary_opts]:
                if option.startswith("-"):
                    assert f"<code>{option}</code>" in text, f"{package} {name} {option}"
            shown = html.unescape(re.sub("</?code>", "", text))
            assert " ".join((parameter.help or "").replace("`", "").split()) in shown


def test_the_reference_gives_defaults() -> None:
    reference = command_reference("tokdiv")
    assert "[default: 0.99]" in reference and "[default: --resume]" in reference
    assert reference.count("Measure at most this many images. [default: all]") == 1
    assert "<dt><code>--allow-baselines</code></dt>" in reference
    assert "tokdiv rank DATA --out RUN [OPTIONS]" in reference


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; its strict build refuses links and anchors that lead nowhere."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed (pip install -e '.[docs]')")
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_site_has_every_page_and_every_public_name(site: Path) -> None:
    assert {p.stem for p in site.glob("*.html")} >= {p.stem for p in PAGES if p.parent != ROOT}
    text = (site / "python.html").read_text(encoding="utf-8")
    for package in ("tokdiv", "img2vec"):
        for name in importlib.import_module(package).__all__:
            assert re.search(rf'id="{package}\.(\w+\.)?{name}"', text), f"{package}.{name}"
    assert "img2vec pretrain DATA" in (site / "commands.html").read_text(encoding="utf-8")


def test_the_site_needs_no_network(site: Path) -> None:
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="?([^"\s>]+)', text)
        loaded += re.findall(r'<link[^>]+rel="?(?:stylesheet|icon|preconnect)[^>]*', text)
        assert not [address for address in loaded if "//" in address], page.name
