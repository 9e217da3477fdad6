"""Reading checkpoints: tensors and plain containers, and nothing executed."""

import argparse
import collections
import ctypes
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import importlib.util
import json
import operator
import os
import pathlib
import pickle
import re
import runpy
import shutil
import socket
import subprocess
import sys
import types
import typing
import uuid
import webbrowser
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from small_networks import saved

from tokdiv.errors import UsageError
from tokdiv.teachers.checkpoint import Inert, read_checkpoint
from tokdiv.teachers.weights import weights_file


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


class Attack:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, kind: str):
    marker, path = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"state_dict": {"w": torch.ones(2)}, "hook": Attack(marker)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content["hook"], protocol=2))
    else:
        saved(content, path, _use_new_zipfile_serialization=kind == "zip")
    message = refused(path)
    assert "could run code: refused; re-save its state_dict() alone" in message
    assert "mkdir" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(Attack(marker)))  # it would have worked
    assert marker.exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path):
    message = refused(saved(torch.nn.Linear(2, 2), tmp_path / "net.pth"))
    assert "objects other than tensors (torch.nn.modules.linear.Linear)" in message


@pytest.mark.parametrize("suffix", [".pth", ".legacy.pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99, 0.9999])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, share: float):
    tensors = {f"layer{n}.weight": torch.randn(50, 20) for n in range(20)}
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(tensors, whole)
    else:
        saved(tensors, whole, _use_new_zipfile_serialization=suffix == ".pth")
    assert len(read_checkpoint(whole)) == 20
    content = whole.read_bytes()
    part = tmp_path / f"part{suffix}"
    part.write_bytes(content[: max(1, int(len(content) * share))])
    assert re.search("is truncated or no (safetensors file|PyTorch checkpoint)", refused(part))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: expected a checkpoint (.pth, .pt or .safetensors)"),
        (b"<!DOCTYPE html>\n<html>", "is a web page, not a checkpoint"),
        (b"<?xml version='1.0'?><Error/>", "is a web page, not a checkpoint"),
        (b'{"error": "gone"}', "is a web page, not a checkpoint"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n",
            "is a Git LFS pointer, not a checkpoint: fetch it with git lfs pull",
        ),
        (b"just some text", "is truncated or no"),
        (b"abc", "is truncated or no"),
        (bytes(range(200, 0, -2)), "is truncated or no"),
        (bytes(1000), "is truncated or no"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_checkpoint_is_called_by_its_name(
    tmp_path: Path, content: bytes, said: str, suffix: str
):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    assert said in refused(path)


def test_safetensors_are_read_under_any_name(tmp_path: Path):
    safetensors.torch.save_file({"w": torch.arange(3.0)}, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth")["w"].tolist() == [0, 1, 2]


# Harmless objects beside the tensors: read as stand-ins that hold nothing


class Config(dict):  # type: ignore[type-arg]
    """As easydict's, yacs' and addict's: a dict with attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frozen = True


class Stage(enum.Enum):
    PRETRAIN = "pretrain"


@dataclasses.dataclass
class Arguments:
    lr: float = 0.1
    out: Any = None


class History(list):  # type: ignore[type-arg]
    pass


TENSORS = {"w": torch.arange(3.0), "half": torch.ones(2).half(), "counter": torch.tensor(7)}
OPTIONS = {
    "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(epochs=3)),
    "best": np.float64(0.5),
    "step": np.int64(7),
    "flag": np.bool_(True),
    "text": np.str_("vit"),
    "bytes": np.bytes_(b"vit"),
    "array": np.arange(3.0),
    "halves": np.ones(2, np.float16),
    "texts": np.array(["a", "bc"]),
    "dates": np.array(["2026-01-01"], dtype="datetime64[D]"),
    "structured": np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
    "dtype": np.dtype("float32"),
    "kind": np.float32,
    "path": pathlib.Path("runs/last"),
    "windows": pathlib.PureWindowsPath("C:/runs"),
    "default": collections.defaultdict(list, {"a": [1]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "counter": collections.Counter("abc"),
    "ordered": collections.OrderedDict(a=1),
    "simple": types.SimpleNamespace(a=1),
    "version": torch.__version__,
    "dtype of torch": torch.float16,
    "device": torch.device("cpu"),
    "size": torch.Size([1, 2]),
    "date": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    "duration": datetime.timedelta(seconds=3),
    "decimal": decimal.Decimal("0.1"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=3),
    "sets": [{1, 2}, frozenset({3})],
    "range": range(3),
    "slice": slice(1, 2),
    "complex": 1 + 2j,
    "config": Config(lr=0.1, nested=Config(a=[1, 2])),
    "enum": Stage.PRETRAIN,
    "dataclass": Arguments(out=pathlib.Path("runs")),
    "history": History([1, 2, 3]),
    "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]),
    "typing": typing.Any,
}


@pytest.fixture(autouse=True)
def _foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes above as those of a package that is not installed here, as far as the pickle says."""
    module = types.ModuleType("authors_package")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for kind in (Config, Stage, Arguments, History):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_harmless_objects_do_not_make_a_file_unreadable(tmp_path: Path, name: str, zipped: bool):
    content = {"before": OPTIONS[name], "model": TENSORS, "after": [OPTIONS[name], 1]}
    path = saved(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    sys.modules.pop("authors_package")
    found = read_checkpoint(path)["model"]
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(value, TENSORS[key]) for key, value in found.items())


def test_a_state_dict_in_a_subclass_of_dict_is_found(tmp_path: Path):
    content = Config(model=Config(TENSORS), nested=collections.defaultdict(dict, TENSORS))
    found = read_checkpoint(saved(content, tmp_path / "w.pth"))
    for part in (found["model"], found["nested"]):
        assert part.keys() == TENSORS.keys() and torch.equal(part["w"], TENSORS["w"])


def test_stand_ins_hold_nothing_and_run_nothing(tmp_path: Path):
    found = read_checkpoint(saved({"a": Arguments(), "b": np.float64(1)}, tmp_path / "w.pth"))
    for stand_in in found.values():
        assert type(stand_in) is Inert and not vars(stand_in)


@pytest.mark.skipif(not importlib.util.find_spec("omegaconf"), reason="omegaconf is not installed")
def test_omegaconf_s_configurations_are_read_over(tmp_path: Path):
    from omegaconf import OmegaConf

    nested = OmegaConf.create({"lr": 1, "betas": [1, 2], "path": "${oc.env:HOME}", "none": None})
    found = read_checkpoint(saved({"state_dict": TENSORS, "hyper": nested}, tmp_path / "w.pth"))
    assert torch.equal(found["state_dict"]["w"], TENSORS["w"])


def test_mmengine_s_history_is_read_over(tmp_path: Path):
    """Its pickles hold arrays, and its own functions by getattr."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.log = np.arange(3.0)

        def mean(self) -> float:
            return float(self.log.mean())

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "authors_package", "HistoryBuffer"
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = "authors_package"
    sys.modules["authors_package"].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    buffer = HistoryBuffer()
    buffer.functions = {"mean": HistoryBuffer.mean}  # type: ignore[attr-defined]
    path = saved({"message_hub": {"loss": buffer}, "state_dict": TENSORS}, tmp_path / "w.pth")
    assert b"getattr" in zipfile.ZipFile(path).read("w/data.pkl")
    assert torch.equal(read_checkpoint(path)["state_dict"]["w"], TENSORS["w"])


@pytest.mark.parametrize("core", [b"numpy.core.", b"numpy._core."])
def test_numpy_s_numbers_are_read_over_whatever_its_version(tmp_path: Path, core: bytes):
    saved({"w": torch.ones(2), "best": np.float64(1), "array": np.ones(2)}, tmp_path / "ours.pth")
    with (
        zipfile.ZipFile(tmp_path / "ours.pth") as ours,
        zipfile.ZipFile(tmp_path / "theirs.pth", "w") as theirs,
    ):
        for name in ours.namelist():
            content = ours.read(name)
            if name.endswith("data.pkl"):
                content = re.sub(rb"numpy\._?core\.", core, content)
                assert core in content
            theirs.writestr(name, content)
    assert read_checkpoint(tmp_path / "theirs.pth")["w"].tolist() == [1, 1]


# Attacks: each would make a folder if it were executed, or change a class; each is refused


class Call:
    """Pickled as a call of a function, whatever it is."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced

    def __call__(self) -> None:
        """So that a pickler takes it for a function."""


def attacks(marker: str) -> dict[str, Any]:
    code = f"__import__('os').mkdir({marker!r})"
    return {
        "os.mkdir": Call(os.mkdir, marker),
        "os.system": Call(os.system, f"mkdir {marker}"),
        "subprocess": Call(subprocess.Popen, ["mkdir", marker]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "compile": Call(compile, code, "x", "exec"),
        "import": Call(__import__, "os"),
        "importlib": Call(importlib.import_module, "os"),
        "runpy": Call(runpy.run_path, marker),
        "getattr of a module": Call(getattr, Call(importlib.import_module, "os"), "mkdir"),
        "getattr of a class": Call(getattr, Config, "__init__"),
        "getattr of a private name": Call(getattr, Config, "_secret"),
        "getattr of torch": Call(getattr, torch.nn.Module, "load_state_dict"),
        "getattr, called": Call(Call(getattr, Config, "fromkeys"), [1]),
        "setattr": Call(setattr, Config, "keys", 1),
        "partial": Call(functools.partial, os.mkdir, marker),
        "partial of partial": Call(Call(functools.partial, functools.partial, eval), code),
        "partial of a data class": Call(functools.partial, Config, 1),
        "map": Call(map, Config, [1]),
        "methodcaller": Call(operator.methodcaller, "mkdir"),
        "attrgetter": Call(operator.attrgetter, "mkdir"),
        "itemgetter": Call(operator.itemgetter, 0),
        "reduce": Call(functools.reduce, operator.add, [1, 2]),
        "torch.hub": Call(torch.hub.load, "owner/repo", "model"),
        "torch.load": Call(torch.load, marker),
        "torch.jit.load": Call(torch.jit.load, marker),
        "numpy.load": Call(np.load, marker),
        "numpy.lib": Call(np.fromfile, marker),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.mkdir, marker))),
        "open": Call(open, marker, "w"),
        "shutil": Call(shutil.rmtree, marker),
        "webbrowser": Call(webbrowser.open, "http://localhost"),
        "socket": Call(socket.create_connection, ("localhost", 1)),
        "ctypes": Call(ctypes.CDLL, "libc.so.6"),
        "timm": Call(timm.create_model, "test_vit"),
        "safetensors": Call(safetensors.torch.load_file, marker),
        "a module of torch": torch.nn.Linear(2, 2),
        "a network of timm": timm.create_model("test_vit"),
        "state of a function": Call(Config, state={"a": Call(os.mkdir, marker)}),
        "within a data class": Config(a=[Arguments(out=Call(os.mkdir, marker))]),
        "as a default factory": collections.defaultdict(os.getcwd),
        "in a set": {Call(os.mkdir, marker)},
        "as a key": {Call(os.mkdir, marker): 1},
    }


@pytest.mark.parametrize("name", attacks("x"))
@pytest.mark.parametrize("zipped", [True, False])
def test_an_attack_is_refused_and_not_executed(tmp_path: Path, name: str, zipped: bool):
    marker = tmp_path / "executed"
    content = {"args": OPTIONS["args"], "state_dict": TENSORS, "hook": attacks(str(marker))[name]}
    path = saved(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    assert "could run code: refused; re-save its state_dict() alone" in refused(path)
    assert not marker.exists()


# Opcodes written by hand, as no pickler writes them. The stream ends in a dict with a state dict.

OPCODES = {
    "GLOBAL and REDUCE": b"cposix\nmkdir\n(S'%s'\ntR",
    "NEWOBJ of a real class": b"csubprocess\nPopen\n(]X\x05\x00\x00\x00mkdirat\x81",
    "NEWOBJ of a class of torch": b"ctorch.nn\nModule\n)\x81",
    "NEWOBJ of a class of ours": b"ctokdiv.teachers.checkpoint\nInert\n)\x81",
    "INST": b"(S'%s'\niposix\nmkdir\n",
    "OBJ": b"(cposix\nmkdir\nS'%s'\no",
    "a memo that is called": b"cposix\nmkdir\nq\x05)Rh\x05(S'%s'\ntR",
    "BUILD of an allowed function": b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb",
    "BUILD of a class": b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb",
    "BUILD with slots": b"cbuiltins\nset\n)RN}X\x01\x00\x00\x00aK\x01s\x86b",
    "BUILD of a stand-in's class": b"cauthors_package\nConfig\n}X\x01\x00\x00\x00aK\x01sb",
    "SETITEM of a class": b"cauthors_package\nConfig\nK\x01K\x02s",
    "a call of a stand-in's object": b"cauthors_package\nConfig\n)\x81)R",
    "a persistent id": b"X\x05\x00\x00\x00helloQ",
    "a persistent id of code": b"(X\x07\x00\x00\x00storagecposix\nmkdir\nX\x01\x00\x00\x000NK\x01tQ",
    "an extension": b"\x82\x01",
    "a name with a blank": b"cposix mkdir\nx\n)R",
    "a name of two lines": b"cauthors_package\nConfig.__init__\n)R",
    "a dotted name": b"cauthors_package\nConfig.clear\n)R",
    "STACK_GLOBAL": b"\x8c\x05posix\x8c\x05mkdir\x93(S'%s'\ntR",
    "a module in a data module": b"cpathlib\nos\n)R",
    "a function in a data module": b"ccollections\nnamedtuple\n)R",
    "a private name in numpy": b"cnumpy._core.multiarray\nfrombuffer\n)R",
    "runstring": b"cnumpy.testing._private.utils\nrunstring\n)R",
    "an old name": b"c__builtin__\neval\n(S'1'\ntR",
    "an old module": b"ccommands\ngetoutput\n(S'ls'\ntR",
}


@pytest.mark.parametrize("name", OPCODES)
def test_opcodes_that_no_pickler_writes_are_refused(tmp_path: Path, name: str):
    marker = tmp_path / "executed"
    path = saved({"state_dict": TENSORS}, tmp_path / "w.pth")
    attack = OPCODES[name].replace(b"%s", str(marker).encode())
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(tmp_path / "e.pth", "w") as evil:
        for member in ours.namelist():
            content = ours.read(member)
            if member.endswith("data.pkl"):
                content = content[:2] + attack + b"0" + content[2:]  # "0" drops what it made
            evil.writestr(member, content)
    refused(tmp_path / "e.pth")
    assert not marker.exists()
    assert collections.OrderedDict() == {} and not hasattr(collections.OrderedDict, "a")
    assert not hasattr(torch._utils._rebuild_tensor_v2, "a") and not hasattr(Config, "a")


@pytest.mark.parametrize("name", ["Config", "Arguments", "History"])
def test_classes_of_a_file_are_not_loaded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    made = {"Config": Config(a=1), "Arguments": Arguments(), "History": History([1])}[name]
    path = saved({"state_dict": TENSORS, "made": made}, tmp_path / "w.pth")

    def fail(*given: Any, **named: Any) -> None:
        raise AssertionError("executed")

    for method in ("__init__", "__new__", "__setstate__", "__setitem__", "append", "extend"):
        monkeypatch.setattr(type(made), method, fail, raising=False)
    assert read_checkpoint(path)["state_dict"].keys() == TENSORS.keys()


def test_what_is_read_stays_the_same_for_others(tmp_path: Path):
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(saved({"w": TENSORS} | OPTIONS, tmp_path / "w.pth"))
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_dict_within_itself_is_read(tmp_path: Path):
    content: dict[str, Any] = {"state_dict": dict(TENSORS)}
    content["again"] = content["state_dict"]["self"] = content
    assert (
        read_checkpoint(saved(content, tmp_path / "w.pth"))["state_dict"].keys() >= TENSORS.keys()
    )


# Formats that have to be converted first: one line that says how


def test_a_torchscript_archive_is_told_how_to_convert_it(tmp_path: Path):
    path = tmp_path / "clip.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    message = refused(path)
    assert "is a TorchScript archive" in message
    code = re.search(r"torch\.save\(.*", message)[0]  # type: ignore[index]
    exec(code.replace("weights.pth", str(tmp_path / "weights.pth")))
    assert read_checkpoint(tmp_path / "weights.pth").keys() == {"weight", "bias"}


def test_numpy_s_archive_is_told_how_to_convert_it(tmp_path: Path):
    np.savez(tmp_path / "augreg.npz", a=np.ones(2))
    assert "holds NumPy arrays: convert it once with model = timm" in refused(
        tmp_path / "augreg.npz"
    )


def test_another_zip_archive_is_to_be_unpacked(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("weights.pth", b"x")
    assert "without a checkpoint in it: unpack it" in refused(tmp_path / "w.zip")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_newer_pickle_protocol_is_told_what_to_do(tmp_path: Path, protocol: int):
    path = saved({"w": torch.ones(2), "b": b"x"}, tmp_path / "w.pth", pickle_protocol=protocol)
    message = refused(path)
    assert "newer pickle protocol" in message and "or as safetensors" in message


# Checkpoints in several files


def shards(folder: Path) -> Path:
    names = {}
    for number, (key, value) in enumerate(TENSORS.items(), 1):
        file = f"model-0000{number}-of-00003.safetensors"
        safetensors.torch.save_file({key: value}, folder / file)
        names[key] = file
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


def test_all_files_of_an_index_are_read_and_hashed(tmp_path: Path):
    index = shards(tmp_path)
    found = read_checkpoint(index)
    assert found.keys() == TENSORS.keys() and torch.equal(found["w"], TENSORS["w"])
    digest = weights_file(str(index))[1]
    assert weights_file(str(index), digest)[0] == index
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(UsageError, match="the weights changed"):
        weights_file(str(index), digest)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"weight_map": {"w": "../w.safetensors"}}', "expected names of files beside it"),
        ('{"weight_map": {"w": "/etc/passwd"}}', "expected names of files beside it"),
        ('{"weight_map": {"w": 1}}', "no index of a checkpoint"),
        ('{"weight_map": {}}', "no index of a checkpoint"),
        ('{"weight_map": []}', "no index of a checkpoint"),
        ("[]", "no index of a checkpoint"),
        ("{", "no index of a checkpoint"),
        ("[" * 100_000, "no index of a checkpoint"),
        (
            '{"weight_map": {"w": "gone.safetensors"}}',
            "names 'gone.safetensors', which is not beside",
        ),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path: Path, content: str, said: str):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    assert said in refused(path)
