"""What identifies weights: a digest of every byte of them, computed once per file.

A digest of samples would call two fine-tunings of one model equal, and their replicas would then
attend to each other's blocks: wrong tokens, and no error anywhere. Reading all of a large model at
every start is slow in its turn, so a file's digest is remembered for as long as the file's
identity (place, size, times, inode) stays the same; and processes that start together, as the
ranks of one engine do, read a file once, not once each.
"""

import hashlib
import json
import logging
import os
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import platformdirs
from filelock import FileLock

from shared_cache.errors import ModelError

logger = logging.getLogger(__name__)

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
"""What transformers loads: the files of the first pattern that any file matches."""

READ_BYTES = 1 << 20
MAX_READERS = 4
SHOWN_BYTES = 1 << 28
"""From so many bytes on, reading takes long enough to be shown."""

SETTLED_S = 2.0
"""A younger file is not remembered: a change within one tick of its clock would go unseen."""

Shown = Callable[[str], AbstractContextManager[object]]
"""Shows a person, while its block runs, what it is told is being done."""


def default_cache_dir() -> Path:
    """The folder for prepared models and digests of others.

    `KVCOMMONS_CACHE_DIR`, which is read nowhere else, moves it.
    """
    moved = os.environ.get("KVCOMMONS_CACHE_DIR")
    return Path(moved) if moved else Path(platformdirs.user_cache_dir("kvcommons"))


def weight_files(folder: Path, patterns: Sequence[str] = WEIGHT_PATTERNS) -> list[Path]:
    """What an engine would load: safetensors files, else pickled ones; sorted by name."""
    found = (sorted(folder.glob(pattern)) for pattern in patterns)
    return next((files for files in found if files), [])


def content_digest(
    folder: Path, files: Sequence[Path], cache_dir: Path, shown: Shown | None = None
) -> str:
    """SHA-256 hexadecimal digest that differs when config or weights differ in any byte.

    Covers config.json, the index of the weights if there is one, and names and whole contents of
    the weight `files`. The tokenizer is left out: it decides which tokens are asked for, not what
    their KV is. Digests of files that have not changed are taken from `cache_dir`. `shown` is used
    while much has to be read. Raises `ModelError` for a weight file that is damaged or changes
    while it is read.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for index in sorted(folder.glob("*.index.json")):
        digest.update(f"\0{index.name}\0".encode() + index.read_bytes())
    for file in files:
        if file.suffix == ".safetensors":
            _check_safetensors(file)
    digests = _file_digests(files, cache_dir / "digests", shown or _told)
    for file in files:
        digest.update(f"\0{file.name}\0{digests[file]}".encode())
    return digest.hexdigest()


def _told(what: str) -> AbstractContextManager[object]:
    logger.info("%s", what)
    return nullcontext()


def _file_digests(files: Sequence[Path], memory: Path, shown: Shown) -> dict[Path, str]:
    """The digest of each file: remembered, or read now and remembered."""
    found = {file: _recall(file, memory) for file in files}
    unread = [file for file in files if found[file] is None]
    unread_bytes = sum(file.stat().st_size for file in unread)
    show: AbstractContextManager[object] = nullcontext()
    if unread_bytes >= SHOWN_BYTES:
        show = shown(f"computing the digest of its weights ({unread_bytes / 1e6:.0f} MB)")
    with show, ThreadPoolExecutor(MAX_READERS, "kvcommons-digest") as readers:
        read = dict(zip(unread, readers.map(lambda f: _once(f, memory), unread), strict=True))
    return {file: found[file] or read[file] for file in files}


def _once(file: Path, memory: Path) -> str:
    """The digest of `file`; of processes that need it at the same time one reads it."""
    locks = memory.with_name("digest-locks")
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_entry_path(file, locks).with_suffix(".lock"))
        lock.acquire()
    except OSError as error:  # nothing can be remembered beside it either
        logger.warning("the digest of %s is read again at the next start: %s", file, error)
        return _read_digest(file, memory)
    try:
        return _recall(file, memory) or _read_digest(file, memory)
    finally:
        lock.release()


def _recall(file: Path, memory: Path) -> str | None:
    """The remembered digest of this very content; None when there is none, or a damaged one."""
    try:
        entry = json.loads(_entry_path(file, memory).read_text(encoding="utf-8"))
        digest = entry["sha256"] if entry["identity"] == _identity(file) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the remembered digest of %s cannot be read: %s", file, error)
        return None
    return digest if isinstance(digest, str) else None


def _read_digest(file: Path, memory: Path) -> str:
    begun_s, before = time.time(), _identity(file)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for piece in iter(lambda: stream.read(READ_BYTES), b""):
            digest.update(piece)
    if _identity(file) != before:
        raise ModelError(f"{file} changed while it was read; start again when it is complete")
    stat = file.stat()
    if begun_s - max(stat.st_mtime, stat.st_ctime) >= SETTLED_S:
        _remember(file, before, digest.hexdigest(), memory)
    return digest.hexdigest()


def _remember(file: Path, identity: list[str | int], digest: str, memory: Path) -> None:
    """Note a digest, in one rename; a folder that cannot be written costs time only."""
    entry = json.dumps({"identity": identity, "sha256": digest})
    try:
        memory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=memory, prefix=".new-") as scratch:
            written = Path(scratch, "entry")
            written.write_text(entry, encoding="utf-8")
            written.replace(_entry_path(file, memory))
    except OSError as error:
        logger.warning("the digest of %s is read again at the next start: %s", file, error)


def _entry_path(file: Path, memory: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(file))).hexdigest()[:32]
    return memory / f"{name}.json"


def _identity(file: Path) -> list[str | int]:
    """What changes when the file does; the change time is there for those who set `mtime` back."""
    stat = file.stat()
    times = (stat.st_mtime_ns, stat.st_ctime_ns)
    return [os.path.realpath(file), stat.st_size, *times, stat.st_ino]


def _check_safetensors(file: Path) -> None:
    """Raises `ModelError` unless the header is readable and the file as long as it says."""
    try:
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            if header_bytes > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(header_bytes))
        tensors = (entry for name, entry in header.items() if name != "__metadata__")
        data_bytes = max((entry["data_offsets"][1] for entry in tensors), default=0)
        missing_bytes = 8 + header_bytes + data_bytes - file.stat().st_size
        if missing_bytes > 0:
            raise ValueError(f"{missing_bytes} bytes are missing at its end")
    except (struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file} is not a safetensors file ({error}); it may be cut short or a Git LFS "
            "pointer: copy or download it again"
        ) from error
