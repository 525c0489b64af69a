"""One process at a time writes to a folder.

    take_folder(Path("runs/vlm"))            # until this process ends; ValueError while another one holds it

The system itself holds the lock on a file and drops it with the process, however that ends: a crash leaves nothing to clean up.
"""

import errno
import os
import sys
from pathlib import Path

from lib.files import make_folder, sweep, writing

if sys.platform == "win32":
    import msvcrt

    def lock(file) -> None:
        file.seek(2**30)  # a locked byte cannot be read by others: this one is far behind the process's number
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def lock(file) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, it is not inherited by processes that decode images


HELD_BY_ANOTHER = errno.EACCES, errno.EAGAIN, errno.EDEADLK
NO_LOCKS_HERE = errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL  # some network file systems
_open_files = {}  # closing a file gives up its lock


def take_folder(folder: Path) -> None:
    """Make the folder, lock it, and delete what killed writes have left in it. The same process may ask again.

    Raises ValueError, naming the other process, where one holds the lock; OSError where the file `lock` cannot be written. A
    file system that knows no locks gives none."""
    make_folder("--out", folder)
    path = folder.resolve() / "lock"
    if path in _open_files:
        _open_files.pop(path).close()
    with writing(path):
        file = _open_files[path] = path.open("a+b", buffering=0)
        try:
            lock(file)
        except OSError as error:
            if error.errno in HELD_BY_ANOTHER:
                file.seek(0)
                holder = file.read(20).decode(errors="replace").strip()
                who = f"process {holder}" if holder.isdigit() else "another process"
                raise ValueError(
                    f"--out {folder}: {who} is writing to this folder: wait until it ends, stop it, or choose another --out"
                ) from None
            if error.errno not in NO_LOCKS_HERE:
                raise
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
    sweep(folder)
