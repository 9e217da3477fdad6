"""RUN/state: the score array as it grows, so that a run that was killed goes on where it was.

Chunks of CHUNK rows, of which only those that changed are written again, under new names, and
`progress.safetensors`, which says how far the run has come. It names the chunks with their sha256 and is replaced
atomically once they are on the disk, so that a run killed at any moment leaves the state of one moment. It carries
a digest over itself and over what the scores depend on (data, settings, teachers): state that is damaged, was
edited or comes from another run is measured again.
"""

import hashlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from tokdiv.run_dir import digest, write_atomic
from tokdiv.scores import CHUNK, Progress, ScoreTable

log = logging.getLogger(__name__)

PROGRESS = "progress.safetensors"


class State:
    """The folder RUN/state.

    Args:
        folder: need not exist yet.
        identity: what the scores depend on, in JSON types; of each teacher under "teachers".
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self._changed: set[int] = set()  # chunks to be written
        self._hashes: dict[int, str] = {}  # sha256 of the chunks on the disk

    def save(self, table: ScoreTable) -> None:
        """Store what changed.

        Raises:
            RunError: the disk is full or not writable. What was stored before stays intact.
        """
        self.folder.mkdir(exist_ok=True)
        num_chunks = -(-table.num_seen // CHUNK)
        self._changed |= table.pop_changed()
        for number in sorted(self._changed & set(range(num_chunks))):
            start, stop = number * CHUNK, min((number + 1) * CHUNK, table.num_seen)
            buffer = io.BytesIO()
            pq.write_table(table.to_arrow(start, stop, table.teachers), buffer)
            self._hashes[number] = hashlib.sha256(buffer.getvalue()).hexdigest()
            write_atomic(self._chunk_file(number), buffer.getvalue())
        self._changed.clear()
        self._hashes = {number: self._hashes[number] for number in range(num_chunks)}
        fields = asdict(table.progress) | {"chunks": list(self._hashes.values())}
        # A label may be `__metadata__`, which is no name of a tensor.
        sums = {f"sum of {name}": total for name, total in fields.pop("token_sums").items()}
        text = json.dumps(fields)
        metadata = {"progress": text, "digest": self._digest(text, sums, table.teachers)}
        write_atomic(self.folder / PROGRESS, safetensors.numpy.save(sums, metadata))
        current = {self._chunk_file(number).name for number in self._hashes}
        for file in self.folder.glob("scores-*.parquet"):
            if file.name not in current:
                file.unlink(missing_ok=True)

    def load(self, table: ScoreTable) -> None:
        """Enter what `save` stored, for those of its teachers that are among the table's.

        A damaged chunk ends the measured stretch before it. Everything is measured again if a mean token was made
        of images that are missing, as a sum cannot be taken apart.
        """
        if not (self.folder / PROGRESS).is_file():
            return
        try:
            stored, hashes = self._read_progress()
        except (
            safetensors.SafetensorError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
        ):
            log.warning(
                "'%s' is damaged, or that of another run: everything is measured again", self.folder
            )
            return
        self._hashes = dict(enumerate(hashes))
        end = 0
        while end < stored.num_seen and self._load_chunk(end // CHUNK, table):
            end = min(end + CHUNK, stored.num_seen)
        table.pop_changed()
        if end < stored.num_seen:
            log.warning("'%s' is damaged: it is measured again from image %d on", self.folder, end)
        table.resume(stored, end)

    def _read_progress(self) -> tuple[Progress, list[str]]:
        """The stored progress, and the hashes of the chunks; one of many errors where it is not this run's."""
        with safetensors.safe_open(self.folder / PROGRESS, framework="numpy") as file:
            sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text, signature = (file.metadata()[key] for key in ("progress", "digest"))
        fields = json.loads(text)
        if signature != self._digest(text, sums, list(fields["measured"])):
            raise ValueError("another digest")
        hashes = fields.pop("chunks")
        sums = {name.removeprefix("sum of "): total for name, total in sums.items()}
        return Progress(**fields, token_sums=sums), hashes

    def _digest(self, progress: str, sums: Mapping[str, NDArray[Any]], teachers: list[str]) -> str:
        """Over the progress, and over what the scores of these teachers depend on."""
        of_all = self.identity.get("teachers", {})
        identity = {**self.identity, "teachers": {name: of_all.get(name) for name in teachers}}
        arrays = {
            name: [str(total.dtype), total.shape, hashlib.sha256(total.tobytes()).hexdigest()]
            for name, total in sums.items()
        }
        return digest([identity, progress, arrays])

    def _chunk_file(self, number: int) -> Path:
        return self.folder / f"scores-{number:05d}-{self._hashes[number][:16]}.parquet"

    def _load_chunk(self, number: int, table: ScoreTable) -> bool:
        """Enter a chunk that the progress names; False where it is not as it was written."""
        try:
            data = self._chunk_file(number).read_bytes()
        except OSError:
            return False
        if hashlib.sha256(data).hexdigest() != self._hashes[number]:
            return False
        table.take_arrow(pq.read_table(io.BytesIO(data)))
        return True
