"""A folder, tar or zip, read file by file; archives are never unpacked, so nothing in one chooses where it is written.

    with open_archive(Path("photos.tar.gz")) as (sizes, read):
        content = read(next(name for name in sizes if name.endswith(".jpg")))
"""

import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lib.files import one_line

DAMAGED = (OSError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, KeyError)


def walk_folder(folder: Path) -> dict[str, tuple[int, int]]:
    """Relative path -> (bytes, mtime in ns) of all below, sorted; folders end in "/". Links are followed, once."""
    found, seen = {}, set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        relative = (Path(root).relative_to(folder).as_posix() + "/").removeprefix("./")
        found[relative] = (0, 0)
        for name in files:
            try:
                stat = os.stat(os.path.join(root, name))
                found[relative + name] = (stat.st_size, stat.st_mtime_ns)
            except OSError:  # a link to nowhere: reading it will say so
                found[relative + name] = (0, 0)
    return dict(sorted(found.items()))


@contextmanager
def open_archive(path: Path) -> Iterator[tuple[dict[str, int], Callable[[str], bytes]]]:
    """A folder, tar or zip as (sizes, read): relative path -> size in bytes, in stored order, and path -> content.

    Folders end in "/". Raises ValueError for a file that is no archive, or a damaged one.
    """
    if path.is_dir():
        yield {name: size for name, (size, _) in walk_folder(path).items()}, lambda name: (path / name).read_bytes()
        return
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                members = {entry.filename: entry.file_size for entry in archive.infolist()}
        else:
            with tarfile.open(path) as archive:
                members = {entry.name + "/" * entry.isdir(): entry for entry in archive.getmembers()}
                # The block after the one that it took for the end: two of zeros are the mark of it.
                if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("it is cut off, or a header in it is damaged")
    except DAMAGED as error:
        raise ValueError(f"{path} is no folder, .tar, .tar.gz, .tgz or .zip, or it is damaged ({one_line(error)})") from None
    if zipped:
        with zipfile.ZipFile(path) as archive:
            yield members, archive.read
    else:
        with tarfile.open(path) as archive:
            yield (
                {name: entry.size for name, entry in members.items()},
                lambda name: read_member(archive, members[name]),
            )


def content_reader(source: Path, sizes: Mapping[str, int], read: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """A function from the name of a file in an open archive, with or without "./" before it, to its content. Raises ValueError
    for one that is not there, or damaged."""
    names = {name.removeprefix("./"): name for name in sizes}

    def content(name: str) -> bytes:
        if name.removeprefix("./") not in names:
            raise ValueError(f"{source} lacks {name}: it is damaged or not whole, get it again")
        try:
            return read(names[name.removeprefix("./")])
        except DAMAGED as error:
            raise ValueError(f"{source}: {name} cannot be read ({one_line(error)}), get it again") from None

    return content


def read_member(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(entry)
    if file is None:
        raise OSError("a link or a device, not a file")
    return file.read()
