"""Where weights are kept on this machine. No torch, so that `tokdiv teachers` answers at once."""

import hashlib
import os
import sys
import urllib.parse
from pathlib import Path

PACKAGED = "package:"  # prefix of weights that ship with tokdiv, relative to its folder
HUB = "hf-hub:"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm's repositories hold, best first


def cache_folder() -> Path:
    """Where downloads are kept: TOKDIV_CACHE, else `tokdiv` in the platform's cache folder."""
    if folder := os.environ.get("TOKDIV_CACHE"):
        return Path(os.path.expanduser(folder))
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "tokdiv"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(home))) / "tokdiv"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "tokdiv"


def cached_path(source: str) -> Path:
    """Where the weights of a URL or of "hf-hub:OWNER/REPO" are in the cache folder.

    Authors reuse file names (all of VISSL's are `model_final_checkpoint_phase*.torch`, iBOT's
    `checkpoint_teacher.pth`), so the name starts with a hash of the whole URL.
    """
    if source.startswith(HUB):
        return cache_folder() / (source.removeprefix(HUB).replace("/", "--") + ".safetensors")
    base = Path(urllib.parse.urlparse(source).path).name or "weights"
    return cache_folder() / f"{hashlib.sha256(source.encode()).hexdigest()[:12]}-{base}"


def is_cached(source: str) -> bool:
    """Whether weights are on this machine already; looks at file names only."""
    if source.startswith(PACKAGED):
        return packaged_path(source).is_file()
    return cached_path(source).is_file() or in_hub_cache(source) is not None


def packaged_path(source: str) -> Path:
    """Where "package:PATH" is: in the folder of this package, wherever that is installed."""
    return Path(__file__).parents[1] / source.removeprefix(PACKAGED)


def hub_cache() -> str:
    """The cache of huggingface_hub, which timm and other tools share.

    The rules are those of huggingface_hub.constants and `try_to_load_from_cache`. Importing them takes 0.1 s and
    0.7 s, longer than `tokdiv teachers` itself; a test compares the two.
    """
    caches = os.getenv("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    home = os.getenv("HF_HOME", os.path.join(caches, "huggingface"))
    home = os.path.expandvars(os.path.expanduser(home))
    folder = os.getenv("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))  # older name
    return os.path.expandvars(os.path.expanduser(os.getenv("HF_HUB_CACHE", folder)))


def in_hub_cache(source: str, names: tuple[str, ...] = HUB_FILES) -> Path | None:
    """The first of these files of "hf-hub:OWNER/REPO" that is in the cache of huggingface_hub."""
    if not source.startswith(HUB):
        return None
    repository, _, revision = source.removeprefix(HUB).partition("@")
    folder = Path(hub_cache()) / ("models--" + repository.replace("/", "--"))
    head = folder / "refs" / (revision or "main")  # names the snapshot of a branch or tag
    snapshot = head.read_text().strip() if head.is_file() else revision
    if not snapshot:  # copied here by hand, without the folder `refs`
        snapshot = "*"
    files = (file for name in names for file in folder.glob(f"snapshots/{snapshot}/{name}"))
    return next((file for file in files if file.is_file()), None)
