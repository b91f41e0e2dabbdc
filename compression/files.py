"""Files and folders that are written whole or not at all, by one run at a time.

What is written goes to a temporary name beside its target, to the disk, and then takes the target's name in one step:
a killed run leaves the old state or the new one. Temporary names are random. Whoever writes a path holds its lock (a
hidden file `.NAME.compression.lock`), so what lies under a temporary name of a path whose lock is free was left by a
killed run.
"""

import ctypes
import errno
import json
import math
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from glob import escape
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from compression.runtime import UserError, log

WAIT_SECONDS = 30.0
"""Longest wait of a short write for another process that writes the same path."""
READINGS = 3
"""Readings of a folder that is replaced meanwhile, before its writers have to wait."""
LONGEST_NAME = 200
"""Bytes of a name; hidden names made from it are longer and must stay under the usual limit of 255."""
Value = TypeVar("Value")
TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.(tmp|old)")
LOCK = ".compression.lock"


# JSON.


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON whole or not at all.

    Raises:
        UserError: a number in it is not finite; JSON has no such numbers.
    """
    write_text(path, json_text(value, path))


def json_text(value: Any, path: Path) -> str:
    """A value as strict JSON; `path` is for the error text of `write_json`."""
    try:
        return json.dumps(value, indent=2, allow_nan=False) + "\n"
    except ValueError:
        place = next(_not_finite(value, ""), "a value")
        raise UserError(f"{path}: {place} is not a finite number; nothing was written") from None


def _not_finite(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place} ({value})"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield from _not_finite(item, f"{place}.{key}" if place else str(key))


def read_json(path: Path) -> Any:
    """Read strict JSON.

    Raises:
        UserError: the file is missing or is not valid JSON.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); make or fetch its folder again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make or fetch its folder again") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object: see `read_json`.

    Raises:
        UserError: it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, an object is needed; make or fetch its folder again")
    return value


# Locks.


@contextmanager
def locked(target: Path, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Be the only process that writes a path; this process may take the lock again while it holds it.

    Args:
        wait: seconds to wait for another process that holds it.

    Raises:
        UserError: another process holds it still; names it.
    """
    lock = _lock(target)
    path = Path(lock.lock_file)
    try:
        lock.acquire(timeout=wait, poll_interval=0.01)
    except Timeout:
        raise UserError(f"{target}: {_holder(path)} is writing it; wait for that to end, or stop it") from None
    try:
        if lock.lock_counter == 1:
            since, command = datetime.now().isoformat(" ", "seconds"), shlex.join(sys.argv)
            host = {"process": os.getpid(), "host": socket.gethostname(), "since": since, "command": command}
            path.write_text(json.dumps(host), encoding="utf-8")
        yield
    finally:
        # Whoever waits for a lock file that is gone sees that and makes a new one.
        if lock.lock_counter == 1:
            path.unlink(missing_ok=True)
        lock.release()


def _lock(target: Path) -> FileLock:
    path = target.with_name(f".{target.name}{LOCK}")
    return FileLock(path, is_singleton=True, thread_local=False)


def _holder(path: Path) -> str:
    for _ in range(50):  # it says who it is right after it has taken the lock
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            return f"process {held['process']} on host {held['host']} ({held['command']}, since {held['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.02)
    return "another process"


# Whole files and folders.


def real_path(path: Path, flag: str = "") -> Path:
    """Where a path leads, without links and `~`, whether something is there or not.

    Args:
        flag: what named it, for the error text.

    Raises:
        UserError: links lead in a circle, or the name is too long.
    """
    try:
        real = Path(path).expanduser().resolve()
        real.exists()  # raises where a name in it is too long
    except (OSError, RuntimeError) as error:
        reason = "links that lead in a circle" if "loop" in str(error) else getattr(error, "strerror", error)
        raise UserError(f"{flag} {path}: cannot be used ({reason}); name another path".lstrip()) from None
    if len(os.fsencode(real.name)) > LONGEST_NAME:
        raise UserError(f"{flag} {path}: the name is longer than {LONGEST_NAME} bytes; choose a shorter one".lstrip())
    return real


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; on success it takes the name `path`, else it is removed."""
    path = real_path(path)
    with writing(path), locked(path):
        temporary = _temporary(path)
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield an empty temporary folder beside `target`; on success it takes the place of `target`, else it is removed.

    What `target` held before is removed.

    Args:
        check: called right before; a UserError of it says that what lies there must stay. The new folder then gets
            another name, which the error names.
    """
    target = real_path(target)
    with writing(target), locked(target), scratch_folder(target) as temporary:
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        try:
            check()
        except UserError as problem:
            kept = target.with_name(f"{target.name}_{datetime.now():%Y%m%d_%H%M%S}_{secrets.token_hex(2)}")
            os.rename(temporary, kept)
            raise UserError(f"{problem}; the result of this run is in {kept}") from None
        _put(temporary, target)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """An empty temporary folder beside `target`, whose lock must be held, for as long as the context lasts."""
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Make the target's parent folder; a disk's refusal inside ends in a UserError that names the target."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        raise UserError(
            f"{target}: cannot be written ({reason}); free space or name another place; what was there is untouched"
        ) from None


def disk_error(error: BaseException) -> str | None:
    """What the operating system said, where that is the cause of an exception: libraries wrap it in their own."""
    behind = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return _disk_error(error) or (disk_error(behind) if behind is not None else None)


def _disk_error(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        elsewhere = f": {error.filename}" if error.filename and not TEMPORARY.search(str(error.filename)) else ""
        return f"{error.strerror or error}{elsewhere}"
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(found[1]))
    return "the disk takes no more" if "PytorchStreamWriter failed" in str(error) else None


def _put(temporary: Path, target: Path) -> None:
    """Let a finished folder take the place of the target; what was there then lies under the temporary name."""
    if not target.exists():
        os.rename(temporary, target)
    elif not target.is_dir():
        raise UserError(f"{target}: is a file; nothing was written; name another place")
    elif not _exchange(temporary, target):
        previous = _temporary(target, "old")
        os.rename(target, previous)
        os.rename(temporary, target)
        shutil.rmtree(previous, ignore_errors=True)
    sync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _temporary(target: Path, kind: str = "tmp") -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.{kind}")


def sync(path: Path) -> None:
    """See to it that a file's or folder's contents are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not sync folders
            raise
    finally:
        os.close(file)


def restore_replaced(target: Path) -> None:
    """Where a replacement of `target` was killed between its two renames, put the old folder back."""
    target = Path(target)
    if target.exists() or not (kept := sorted(target.parent.glob(f".{escape(target.name)}.*.old"))):
        return
    with locked(target):  # a writer that is between its renames just now has done with them then
        if not target.exists():
            os.rename(kept[-1], target)


def read_unchanged(folder: Path, read: Callable[[], Value]) -> Value:
    """What `read` gives of a folder that no other process replaced meanwhile.

    Where one did, it reads again, and in the end while it holds the folder's lock.
    """
    for _ in range(READINGS):
        before = _identity(folder)
        try:
            found = read()
        except UserError:
            if _identity(folder) == before:
                raise
            continue
        if _identity(folder) == before:
            return found
    with locked(real_path(folder)):
        return read()


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(folder)
        return status.st_dev, status.st_ino
    except OSError:
        return None


def remove_folder(folder: Path) -> None:
    """Remove a folder that holds nothing but what this project wrote, so that no kill leaves half of it."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    temporary = _temporary(folder)
    os.rename(folder, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def link_or_copy(source: str, target: str) -> None:
    """Give a file a second name, or copy it where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# What killed runs leave.


def leftovers(folder: Path) -> list[Path]:
    """Temporary files and folders, and locks, in a folder: of runs that were killed, and of those that are running."""
    found = []
    for path in Path(folder).glob(".*"):
        if TEMPORARY.fullmatch(path.name) or path.name.endswith(LOCK):
            found.append(path)
    return sorted(found)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what killed runs left under temporary names in a folder; what a running process writes stays.

    Returns:
        What was removed, locks excepted.
    """
    removed = []
    for path in leftovers(folder):
        name = TEMPORARY.fullmatch(path.name)
        target = path.with_name(name["name"] if name else path.name[1 : -len(LOCK)])
        if _lock(target).is_locked:  # by this process
            continue
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(target, wait=0))
            except (UserError, OSError):
                continue
            restore_replaced(target)
            if name and path.exists():
                log.info("Removing %s, which a killed run left", path)
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                removed.append(path)
    return removed
