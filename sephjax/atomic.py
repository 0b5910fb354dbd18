"""Files that are written whole or not at all: no reader, and no next start, meets half of one."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator

from sephjax.errors import RunError, UserError

WRONG_PLACE = (
    errno.EACCES, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
)  # fmt: skip


@contextlib.contextmanager
def draft(file: pathlib.Path, instead: str) -> Iterator[pathlib.Path]:
    """The path to write to; what is there takes the place of `file` when the block ends.

    The folders above `file` are made. With an error nothing is left and `file` is what it was.

    Args:
        file: what is to be written.
        instead: what to do where it cannot be, the end of the error's sentence.

    Raises:
        UserError: nothing can be written there: no such place, or no right to it.
        RunError: it failed: no room, a server that does not answer; it may go well another time.
    """
    path = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield path
        path.replace(file)
    except OSError as error:
        kind = UserError if error.errno in WRONG_PLACE else RunError
        raise kind(f"{file} cannot be written ({error.strerror}); {instead}.") from error
    finally:
        with contextlib.suppress(OSError):  # where `file` cannot be, there is no draft either
            path.unlink(missing_ok=True)


def write_text(file: pathlib.Path, text: str, instead: str) -> None:
    """Writes `text` to `file`; see `draft`."""
    with draft(file, instead) as path:
        path.write_text(text)
