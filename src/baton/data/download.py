"""Getting the well-known data sets onto the disk: whole files or none, and one clear sentence when it fails."""

import http.client
import socket
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torchvision.datasets.utils import check_integrity

TIMEOUT = 10
"""Seconds without an answer after which a server counts as dead."""

_FAILURES = (OSError, RuntimeError, EOFError, zlib.error, tarfile.TarError, http.client.HTTPException)


def fetch(
    name: str,
    root: Path,
    build: Callable[[Path], Any],
    files: Mapping[str, str | None],
    archives: Mapping[str, str],
) -> None:
    """Download and unpack what is missing, unless all `files` are there.

    Everything happens in a temporary folder inside `root`; a file appears under its own name only when all are
    complete, so that a broken download never counts as data. Archives that are there already are used.

    Args:
        name: of the data set, for messages.
        root: folder that receives the files.
        build: downloads and unpacks into the folder it is given (torchvision's data set with `download=True`).
        files: files that make up the data set, relative to `root`, with their md5 (None: not checked).
        archives: files that can be put there by hand, relative to `root`, with their md5.

    Raises:
        FileNotFoundError: if the download fails; names the folder and the files expected there.
    """
    if all((root / file).is_file() for file in files):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".download-", dir=root) as folder, _timeout(TIMEOUT):
            partial = Path(folder)
            for archive, md5 in archives.items():
                if check_integrity(root / archive, md5):
                    (partial / archive).parent.mkdir(parents=True, exist_ok=True)
                    (partial / archive).symlink_to((root / archive).resolve())
            build(partial)
            for path in sorted(partial.rglob("*")):
                if path.is_file() and not path.is_symlink():
                    target = root / path.relative_to(partial)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(target)
    except _FAILURES as error:
        raise FileNotFoundError(_explain(name, root, files, archives, error)) from None


def verify(name: str, root: Path, files: Mapping[str, str | None]) -> None:
    """Check that the files are there and undamaged.

    Args:
        name: of the data set, for messages.
        root: folder that holds the files.
        files: relative to `root`, with their md5 (None: only present).

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged.
    """
    for file, md5 in files.items():
        path = root / file
        if not path.is_file():
            raise FileNotFoundError(f"{name} needs {path}, which is missing; prepare_data() downloads it.")
        if not check_integrity(path, md5):
            raise ValueError(damaged(name, path))


def damaged(name: str, path: Path) -> str:
    """Sentence for a file that does not hold what it should."""
    return f"{name} cannot use {path}: the file is damaged or incomplete; delete it and start again to download it."


def _explain(
    name: str, root: Path, files: Mapping[str, str | None], archives: Mapping[str, str], error: BaseException
) -> str:
    present = [archive for archive in archives if (root / archive).is_file()]
    broken = [archive for archive in present if not check_integrity(root / archive, archives[archive])]
    reason = " ".join(str(error).split()) or type(error).__name__
    note = f" ({', '.join(broken)} there is damaged)" if broken else ""
    by_hand = f"put {', '.join(archives)} into {root}{note}" if archives else f"put them into {root}"
    return f"{name} needs {', '.join(files)} in {root}, and downloading failed ({reason}); {by_hand} and start again."


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Without this, torchvision waits for ever on a dead server; the sockets' default is the only handle there is."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
