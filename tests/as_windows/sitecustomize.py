"""Show qlora_lite's modules only what Python has on Windows; with this folder on PYTHONPATH, also in processes below.

Other packages keep what they import: that theirs works on Windows is their concern. Names of ``os`` and ``signal`` are
those that CPython's documentation does not call "Availability: Unix"; what Windows does otherwise fails here too: it
opens no folder, flushes no file that is open for reading, and cannot load the program itself as a library.
"""

import builtins
import ctypes
import errno
import fcntl
import os
import signal
import sys
import types

HIDDEN = {
    "crypt",
    "curses",
    "fcntl",
    "grp",
    "nis",
    "posix",
    "pty",
    "pwd",
    "readline",
    "resource",
    "spwd",
    "syslog",
    "termios",
    "tty",
}
OS = """
DirEntry F_OK O_APPEND O_CREAT O_EXCL O_RDONLY O_RDWR O_TRUNC O_WRONLY PathLike R_OK SEEK_CUR SEEK_END SEEK_SET W_OK
X_OK abort access altsep chdir chmod close closerange cpu_count curdir defpath devnull dup dup2 environ error execv
extsep fdopen fsdecode fsencode fspath fstat ftruncate get_exec_path get_terminal_size getcwd getcwdb getenv getlogin
getpid getppid isatty kill linesep link listdir lseek lstat makedirs mkdir pardir path pathsep pipe popen putenv read
readlink remove removedirs rename renames replace rmdir scandir sep stat stat_result strerror symlink system
terminal_size times truncate umask unlink unsetenv urandom utime waitpid waitstatus_to_exitcode walk write
"""
SIGNAL = """
Handlers NSIG SIGABRT SIGFPE SIGILL SIGINT SIGSEGV SIGTERM SIG_DFL SIG_IGN Signals default_int_handler getsignal
raise_signal set_wakeup_fd signal strsignal valid_signals
"""


def _open(path, flags, mode=0o777):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return os.open(path, flags, mode)


def _fsync(descriptor):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    os.fsync(descriptor)


def _locking(descriptor, _mode, _count):
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


def _library(name, *arguments, **options):
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")
    return ctypes.CDLL(name, *arguments, **options)


class _View(types.ModuleType):
    """A module with some names changed, and all others or only some of its own."""

    def __init__(self, module, only=None, **changed):
        super().__init__(module.__name__)
        self.__dict__.update(changed, _module=module, _only=only and only.split())

    def __getattr__(self, name):
        if self._only is not None and name not in self._only:
            raise AttributeError(f"Windows has no {self.__name__}.{name}")
        return getattr(self._module, name)


VIEWS = {
    "os": _View(os, OS, name="nt", open=_open, fsync=_fsync),
    "signal": _View(signal, SIGNAL, SIGBREAK=signal.SIGQUIT),
    "sys": _View(sys, platform="win32"),
    "ctypes": _View(ctypes, CDLL=_library),
    "msvcrt": _View(types.ModuleType("msvcrt"), LK_NBLCK=2, locking=_locking),
}
_import = builtins.__import__


def _import_on_windows(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and ((globals or {}).get("__package__") or "").split(".")[0] == "qlora_lite":
        if name in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in VIEWS:
            return VIEWS[name]
    return _import(name, globals, locals, fromlist, level)


builtins.__import__ = _import_on_windows
