"""Public names that are imported on first use, so that `import tokdiv` does not load torch."""

import importlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public names live in its modules.

    A function may have the name of its module (`tokdiv.rank`). The import system sets every imported module as an
    attribute of its package, which would hide the function; for public names that is prevented here.

    Args:
        package: its `__name__`.
        homes: public name -> module of the package, as {"rank": "rank"}.
    """

    class Package(types.ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            if not (name in homes and isinstance(value, types.ModuleType)):
                super().__setattr__(name, value)

    module = sys.modules[package]
    module.__class__ = Package

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(module, name, value)
        return value

    return get, lambda: sorted({*vars(module), *homes})
