"""Where weights are kept on this machine. No torch, so that `tokdiv teachers` answers at once."""

import hashlib
import os
import sys
import urllib.parse
from pathlib import Path

PACKAGED = "package:"  # prefix of weights that ship with tokdiv, relative to its folder
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm's repositories hold, best first


def cache_folder() -> Path:
    """Where downloads are kept: TOKDIV_CACHE, else `tokdiv` in the platform's cache folder."""
    if folder := os.environ.get("TOKDIV_CACHE"):
        return Path(folder).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tokdiv"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "tokdiv"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokdiv"


def cached_path(source: str) -> Path:
    """Where the weights of a URL or of "hf-hub:OWNER/REPO" lie in the cache folder.

    Authors reuse file names (all of VISSL's are `model_final_checkpoint_phase*.torch`, iBOT's
    `checkpoint_teacher.pth`), so the name starts with a hash of the whole URL.
    """
    if source.startswith("hf-hub:"):
        return cache_folder() / (source[len("hf-hub:") :].replace("/", "--") + ".safetensors")
    base = Path(urllib.parse.urlparse(source).path).name or "weights"
    return cache_folder() / f"{hashlib.sha256(source.encode()).hexdigest()[:12]}-{base}"


def is_cached(source: str) -> bool:
    """Whether weights are on this machine already; looks at file names only."""
    if source.startswith(PACKAGED):
        return packaged_path(source).is_file()
    return cached_path(source).is_file() or in_hub_cache(source) is not None


def packaged_path(source: str) -> Path:
    """Where "package:PATH" lies: in the folder of this package, wherever that is installed."""
    return Path(__file__).parents[1] / source.removeprefix(PACKAGED)


def in_hub_cache(source: str) -> Path | None:
    """The file in the Hugging Face cache, which timm and other tools share."""
    if not source.startswith("hf-hub:"):
        return None
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    folder = hub / ("models--" + source[len("hf-hub:") :].partition("@")[0].replace("/", "--"))
    revision = source.partition("@")[2] or "main"
    head = folder / "refs" / revision  # names the snapshot that a branch or tag stands for
    snapshot = head.read_text().strip() if head.is_file() else revision
    if snapshot == "main":  # copied here by hand, without the folder `refs`
        snapshot = "*"
    files = (file for name in HUB_FILES for file in folder.glob(f"snapshots/{snapshot}/{name}"))
    return next((file for file in files if file.is_file()), None)
