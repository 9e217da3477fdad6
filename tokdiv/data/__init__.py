"""DATA: what the user names, as a source of images; decoded and batched in threads."""

from typing import TYPE_CHECKING

from tokdiv.lazy import lazy_names

if TYPE_CHECKING:
    from tokdiv.data.decode import decode_image
    from tokdiv.data.open import open_source

_HOMES = {"decode_image": "decode", "open_source": "open"}

__all__ = ["decode_image", "open_source"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
