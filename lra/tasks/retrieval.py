"""Retrieval: whether one of two papers cites the other, from bytes (Radev et al. 2013, AAN).

The pairs of the Long Range Arena (Tay et al. 2021), in the split and order of its files, each text
cut to its first bytes: files in ``data_dir``, or streamed from the hub, of which only these bytes
are kept.
"""

from dataclasses import dataclass
from pathlib import Path

from lra.tasks import register_task
from lra.tasks._pairs import VOCAB_SIZE, pieces
from lra.tasks._retrieval_files import (
    HUB_ID,
    HUB_REVISION,
    find_files,
    how_to_get,
    hub_files,
    local_files,
    read_pairs,
)
from lra.tasks.base import Built, Task


@register_task("retrieval")
class Retrieval(Task):
    """Pairs of papers, positive if there is a citation link between them."""

    @dataclass(frozen=True)
    class Config:
        """Options of Retrieval.

        Attributes:
            max_length: Bytes kept of each text, the first ones.
            num_train: Training examples, the first rows of the file; null: all.
            num_val: Validation examples, likewise.
            num_test: Test examples, likewise.
            revision: Commit, branch or tag of the hub data set to read; null: files in
                ``data_dir``, and where there are none the hub at a known commit.
        """

        max_length: int = 4_000
        num_train: int | None = None
        num_val: int | None = None
        num_test: int | None = None
        revision: str | None = None

        def __post_init__(self) -> None:
            sizes = (self.num_train, self.num_val, self.num_test)
            if self.max_length < 1 or any(size is not None and size < 1 for size in sizes):
                raise ValueError("max_length, num_train, num_val and num_test must be at least 1.")
            if self.revision == "":
                raise ValueError("revision must be a commit, a branch or a tag, or null.")

    name = "retrieval"
    version = 1
    sources = frozenset({"revision"})
    dual = True
    num_classes = 2
    vocab_size = VOCAB_SIZE

    @property
    def max_len(self) -> int:
        """Bytes kept of each text."""
        return self.config.max_length

    def source_files(self) -> dict[str, Path]:
        """Returns the files in ``data_dir``; nothing where they are not all there, or not used."""
        if self.config.revision is not None:
            return {}
        try:
            return find_files(self.data_dir)
        except ValueError:
            return {}

    def locate(self) -> None:
        """Looks for the pairs."""
        if self.config.revision is not None or not find_files(self.data_dir):
            hub_files(self.config.revision, self.data_dir)

    def origin(self) -> str:
        """Returns where the pairs would be read from."""
        revision = self.config.revision
        try:
            paths = {} if revision is not None else find_files(self.data_dir)
        except ValueError as error:
            return str(error)
        if paths:
            return f"files in {paths['train'].parent}"
        return f"{HUB_ID} on the hub at {revision or HUB_REVISION}. {how_to_get(self.data_dir)}"

    def build(self) -> Built:
        """Reads the files, each when its split is written."""
        config = self.config
        if config.revision is None and (paths := find_files(self.data_dir)):
            files, source = local_files(paths), "files of the Long Range Arena release"
        else:
            files, commit = hub_files(config.revision, self.data_dir)
            source = f"{HUB_ID} at {commit}"
        limits = {"train": config.num_train, "val": config.num_val, "test": config.num_test}
        rows = {
            name: read_pairs(name, file, config.max_length, limits[name])
            for name, file in files.items()
        }
        return Built({name: pieces(of_split) for name, of_split in rows.items()}, source)
