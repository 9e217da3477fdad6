"""Read a checkpoint file: its tensors and plain containers. Nothing in it is executed.

Tensors are read with safetensors, or with `torch.load(weights_only=True)`, which refuses to call anything but the
functions that build tensors. Authors' files also hold options, paths, numbers of numpy and the like. Their classes
are replaced by stand-ins that can run nothing; every other class or function is refused with the file.
"""

import json
import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tokdiv.errors import UsageError, first_line
from tokdiv.teachers.cache import cache_folder

StateDict = dict[str, Tensor]

INDEX = ".index.json"  # ends the name of the index of a checkpoint in several files


def read_checkpoint(path: Path, name: str = "") -> Any:
    """Read a file's tensors and plain containers; never executes anything in it.

    Args:
        path: .safetensors, whatever torch.save writes, or the .index.json of a checkpoint in several files.
        name: what messages call it; its path by default.

    Raises:
        UsageError: not a checkpoint, truncated, or holding objects that could run code.
    """
    again = ""
    if not name and path.parent == cache_folder():
        again = f"; delete it and '{path.name}.sha256' to fetch it again"
    name = name or str(path)
    if path.name.endswith(INDEX):
        return _read_shards(path)
    with path.open("rb") as file:
        head = file.read(512)
    _check_kind(path, head, name, again)
    try:
        if path.suffix == ".safetensors" or head[8:9] == b"{":
            import safetensors.torch

            return safetensors.torch.load_file(path)
        with path.open("rb") as file:
            stand_ins = _stand_ins(file)
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            # Of a strange pickle protocol, in a file that is no pickle.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(error, name, again) from None
    except MemoryError:
        raise
    except Exception as error:  # whatever the readers meet in a damaged file
        kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
        raise UsageError(
            f"'{name}' is truncated or no {kind}: {first_line(error)}{again}"
        ) from None


def is_web_page(head: bytes) -> bool:
    """Whether a file that begins so is HTML, XML, JSON or nothing at all, as servers answer in place of a file."""
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return not head or (head.startswith((b"<", b"{", b"[")) and b"\0" not in head)


def shard_files(index: Path) -> list[Path]:
    """The files of a checkpoint in several files, all of them beside its index.

    Raises:
        UsageError: the index is damaged, or a file is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not names or any(not isinstance(n, str) or n != Path(n).name for n in names):
            raise ValueError("expected names of files beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"'{index}' is no index of a checkpoint: {first_line(error)}") from None
    files = [index.with_name(name) for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UsageError(f"'{index}' names '{missing[0]}', which is not beside it: fetch all parts")
    return files


def _read_shards(index: Path) -> StateDict:
    tensors: StateDict = {}
    for file in shard_files(index):
        part = read_checkpoint(file)
        if not isinstance(part, dict):
            raise UsageError(f"'{file}' holds no state dict: found {type(part).__name__}")
        tensors |= part
    return tensors


def _check_kind(path: Path, head: bytes, name: str, again: str) -> None:
    """Raise UsageError for what is no checkpoint, or one that has to be converted first."""
    if not head:
        raise UsageError(
            f"'{name}' is empty: expected a checkpoint (.pth, .pt or .safetensors){again}"
        )
    if is_web_page(head):
        raise UsageError(
            f"'{name}' is a web page, not a checkpoint: the download got an error page{again}"
        )
    if head.startswith(b"version https://git-lfs"):
        raise UsageError(
            f"'{name}' is a Git LFS pointer, not a checkpoint: fetch it with git lfs pull"
        )
    if head.startswith(b"\x89HDF"):
        raise UsageError(f"'{name}' is an HDF5 file (Keras), not a PyTorch checkpoint")
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    if any(member.endswith(("/constants.pkl", "/model.json")) for member in members):
        raise UsageError(
            f"'{name}' is a TorchScript archive, which is a program: convert it once, if you trust it, with "
            f"torch.save(torch.jit.load('{name}', map_location='cpu').state_dict(), 'weights.pth')"
        )
    if any(member.endswith(".npy") for member in members):
        raise UsageError(
            f"'{name}' holds NumPy arrays: convert it once with model = timm.create_model(ARCH); "
            f"timm.models.load_checkpoint(model, '{name}'); torch.save(model.state_dict(), 'weights.pth')"
        )
    if not any(member.endswith("data.pkl") for member in members):
        raise UsageError(
            f"'{name}' is a zip archive without a checkpoint in it: unpack it and name the file"
        )


def _refusal(error: pickle.UnpicklingError, name: str, again: str) -> UsageError:
    """What to say of a file that `torch.load(weights_only=True)` does not read."""
    text = " ".join(str(error).split())  # with advice around it, which differs by release
    if "DTensor" in text:
        return UsageError(
            f"'{name}' holds the parts of a sharded model (DTensor): save its full state dict, with "
            f"torch.distributed.checkpoint.state_dict.get_model_state_dict(full_state_dict=True)"
        )
    if "Unsupported operand" in text and _is_newer_pickle(text):
        return UsageError(
            f"'{name}' was saved with a newer pickle protocol than torch.save's own: save its state_dict() again "
            f"with torch.save's defaults, or as safetensors"
        )
    if re.search("GLOBAL|Trying to|Can only|Only persistent_load|persistent_load id", text):
        named = re.search(r"GLOBAL (\S+)", text)
        return UsageError(
            f"'{name}' holds objects other than tensors ({named[1] if named else 'objects'}) and could run code: "
            f"refused; re-save its state_dict() alone"
        )
    return UsageError(f"'{name}' is truncated or no PyTorch checkpoint{again}")


def _is_newer_pickle(text: str) -> bool:
    """Whether the operand that torch does not read is one of protocols 3 to 5."""
    number = re.search(r"Unsupported operand (\d+)", text)
    newer = {ord(op.code) for op in pickletools.opcodes if op.proto > 2}
    return number is not None and int(number[1]) in newer


# Stand-ins ---------------------------------------------------------------------------------------


class Inert:
    """What was pickled of a class that is not loaded: an object without content."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Filled:
    """The same, of a dict's subclass: a plain dict, since a state dict may be in it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "OrderedDict[Any, Any]":  # type: ignore[misc]
        return OrderedDict()


class InertList(list[Any]):
    """The same, of a list's subclass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


# Classes of the standard library, numpy and torch that only hold data. Classes of other packages are all taken
# for such; their functions, and whatever else these libraries have, are not.
DATA_CLASSES = re.compile(
    r"""builtins\.(object|int|float|str|bool|bytes|list|dict|tuple|frozenset|range|slice|NoneType)
    | collections\.(defaultdict|deque|ChainMap|UserDict|UserList)
    | argparse\.Namespace | types\.SimpleNamespace | copyreg\._reconstructor
    | pathlib\.(_local\.)?\w*Path
    | datetime\.(date|time|datetime|timedelta|timezone)
    | decimal\.Decimal | fractions\.Fraction | uuid\.UUID | typing\.[A-Z]\w*
    | numpy\.(ndarray|dtype|(bool|int|uint|float|complex|str|bytes|datetime|timedelta)\d*_?)
    | numpy\.dtypes\.\w+DType | numpy\._?core\.multiarray\.(scalar|_reconstruct)
    | torch\.torch_version\.TorchVersion
    | torch\.optim\.(\w+\.)*[A-Z]\w*""",
    re.VERBOSE,
)
OWN_RULES = sys.stdlib_module_names | {"torch", "numpy", "tokdiv", "img2vec", "pip", "setuptools"}


def is_data_class(name: str) -> bool:
    """Whether objects of this class, by its full name, only hold data; all else in a pickle is refused."""
    module, _, kind = name.rpartition(".")
    if module.partition(".")[0] in OWN_RULES:
        return DATA_CLASSES.fullmatch(name) is not None
    return bool(module) and kind[:1].isupper()  # Config, but not load_config


def _stand_ins(file: BinaryIO) -> list[Any]:
    """What `torch.serialization.safe_globals` takes: a stand-in and its name, for each data class in a file."""
    kinds: dict[str, type] = {}
    try:
        for stream in _pickles(file):
            kinds |= _kinds_in(stream)
    except Exception:  # damaged, or hostile: torch.load says how
        return []
    return [(kind, str(name)) for name, kind in kinds.items()]  # str, and no subclass of it


def _pickles(file: BinaryIO) -> Any:
    """The pickles in a checkpoint: one in a zip archive, else one after the other."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for member in archive.namelist():
                if member.endswith("data.pkl"):
                    with archive.open(member) as stream:
                        yield stream
        return
    file.seek(0)
    for _ in range(4):  # magic number, protocol, system, content; then come the tensors' bytes
        yield file


class _Global(str):
    """A class or function that a pickle names."""


_MARK = object()
_GETTERS = ("GET", "BINGET", "LONG_BINGET")
_PUTTERS = ("PUT", "BINPUT", "LONG_BINPUT")
_FILLING = {"SETITEM": Filled, "SETITEMS": Filled, "APPEND": InertList, "APPENDS": InertList}


def _kinds_in(stream: BinaryIO) -> dict[str, type]:
    """The data classes in a pickle, and the stand-in for each; the pickle is followed without building anything.

    An object is known by its class alone, all other values are None, text or tuples of these. Where this reading
    errs, a stand-in is missing or of the wrong kind, and torch.load refuses the file.
    """
    kinds: dict[str, type] = {}
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def pop_mark() -> list[Any]:
        begin = len(stack) - 1 - stack[::-1].index(_MARK)
        items = stack[begin + 1 :]
        del stack[begin:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            # Protocol 2 writes the names of Python 2.
            module = IMPORT_MAPPING.get(module, module)
            module, attribute = NAME_MAPPING.get(tuple(argument.split(" ")), (module, attribute))
            found = _Global(f"{module}.{attribute}")
            if is_data_class(found):
                kinds.setdefault(found, Inert)
            stack.append(found)
        elif name in _GETTERS:
            stack.append(memo.get(argument))
        elif name in _PUTTERS:
            memo[argument] = stack[-1]
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            if stack[-1] == "builtins.getattr" and _is_method_name(arguments):
                kinds["builtins.getattr"] = Inert
                stack[-1] = None
        elif name == "BUILD":
            stack.pop()
        elif name in _FILLING:
            if opcode.stack_before[1] is pickletools.markobject:
                pop_mark()
            else:
                del stack[1 - len(opcode.stack_before) :]
            if stack[-1] in kinds:
                kinds[stack[-1]] = _FILLING[name]
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "BINUNICODE":
            stack.append(argument)
        elif name == "MARK":
            stack.append(_MARK)
        else:
            if pickletools.markobject in opcode.stack_before:
                pop_mark()
            elif opcode.stack_before:
                del stack[-len(opcode.stack_before) :]
            stack += [None] * len(opcode.stack_after)
    return kinds


def _is_method_name(arguments: Any) -> bool:
    """Whether getattr's arguments only name a method of a data class, as mmengine's HistoryBuffer stores some."""
    if not (isinstance(arguments, tuple) and len(arguments) == 2):
        return False
    owner, attribute = arguments
    foreign = isinstance(owner, _Global) and is_data_class(owner)
    plain = type(attribute) is str and attribute.isidentifier() and attribute[0] != "_"
    return foreign and plain and str(owner).partition(".")[0] not in OWN_RULES
