"""What the code can see and ask the kernel for: bubblewrap's namespaces, and a filter of system calls by libseccomp.

Every run is an unprivileged one. Who is root becomes, for each run, a user id that nobody has: root is exempt from the
kernel's limit of processes, and a mistake in a namespace would be root's.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.home import home

FOLDER = "/work"
"""Where the code is, its files are, and it may write."""
MAIN = "main.py"
_INSIDE_ID = "65534"
_ENVIRONMENT = {
    "HOME": FOLDER,
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PATH": "/usr/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
    "TMPDIR": FOLDER,
}
_SHARED_BYTES = 1 << 20
"""Of /dev/shm, where `multiprocessing` has its semaphores."""
_HIGHEST_ID = 1 << 31
_DENIED = (
    # Memory that no limit counts.
    *("memfd_create", "memfd_secret", "shmget", "shmat", "shmctl", "msgget", "semget", "mq_open"),
    # Large parts of the kernel that Python code has no use for.
    *("io_uring_setup", "io_uring_enter", "io_uring_register", "bpf", "perf_event_open", "userfaultfd"),
    *("add_key", "keyctl", "request_key", "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "vmsplice"),
    *("mount", "umount2", "pivot_root", "chroot", "setns", "unshare", "open_tree", "move_mount", "mount_setattr"),
    *("fsopen", "fsconfig", "fsmount", "fspick", "name_to_handle_at", "open_by_handle_at", "quotactl", "swapon"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "syslog", "acct"),
)
_NEW_USER_NAMESPACE = 0x10000000
_UNIX, _INET, _INET6 = 1, 2, 10


@dataclass(frozen=True)
class Interpreter:
    """A Python that the sandbox can use, and the folder of its libraries."""

    executable: Path
    libraries: Path


def interpreter() -> Interpreter:
    """The Python that runs Modelworks, without its virtual environment; else the system's.

    Raises
    ------
    OperationError
        If the user that the code runs as can read neither.
    """
    candidates = [Interpreter(Path(sys.executable).resolve(), Path(sys.base_prefix) / "lib")]
    system = Path("/usr/bin/python3")
    if system.exists():
        candidates.append(Interpreter(system.resolve(), Path("/usr/lib")))
    for candidate in candidates:
        if _readable(candidate.executable) and _readable(candidate.libraries):
            return candidate
    raise OperationError(
        f"code is not run: {candidates[0].executable} is for root alone, and there is no /usr/bin/python3 "
        "(on Debian: apt install python3)"
    )


def _readable(path: Path) -> bool:
    """Whether who is not root can read it."""
    if os.geteuid() != 0:
        return os.access(path, os.R_OK | os.X_OK)
    return all(one.stat().st_mode & stat.S_IXOTH for one in (path, *path.parents))


def identity() -> int | None:
    """The user id for one run: for root, one that nobody has; else None, for one's own."""
    if os.geteuid() != 0:
        return None
    # Of the ids that this user namespace knows, the upper half of the last range.
    _, (first, _, count) = max(
        (int(fields[0]), tuple(map(int, fields)))
        for fields in map(str.split, Path("/proc/self/uid_map").read_text().splitlines())
    )
    end = min(first + count - 2, _HIGHEST_ID)
    return end - secrets.randbelow(max((end - first) // 2, 1))


def command(files: Mapping[str, str | bytes], disk_bytes: int, limiter: Sequence[str]) -> tuple[list[str], list[int]]:
    """The command line that starts the code in its sandbox, and the open files that it has to be given.

    Parameters
    ----------
    files
        What is in the folder at first, by paths in it.
    disk_bytes
        How much the folder can hold.
    limiter
        The options of `prlimit`.

    Raises
    ------
    InputError
        If a file's name leads out of the folder.
    OperationError
        If a program that is needed is missing.
    """
    bubblewrap, prlimit = _program("bwrap", "bubblewrap"), _program("prlimit", "util-linux")
    python = interpreter()
    filtered = system_calls()
    given = [filtered]
    line = [
        *(bubblewrap, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
        *("--uid", _INSIDE_ID, "--gid", _INSIDE_ID, "--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"),
        *("--seccomp", str(filtered)),
    ]
    for name, value in _ENVIRONMENT.items():
        line += ["--setenv", name, value]
    for path in ("/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"):
        line += ["--ro-bind-try", path, path]
    for path in ("/lib", "/lib64"):
        if Path(path).is_symlink():
            line += ["--symlink", str(Path(path).readlink()), path]
        else:
            line += ["--ro-bind-try", path, path]
    for bound in (python.libraries, python.executable, Path(prlimit)):
        line += ["--ro-bind", str(bound), str(bound)]
    kept = home()
    if kept.is_dir() and any(kept.is_relative_to(path) for path in ("/usr/lib", python.libraries)):
        line += ["--tmpfs", str(kept)]
    line += ["--proc", "/proc", "--dev", "/dev", "--size", str(_SHARED_BYTES), "--tmpfs", "/dev/shm"]  # noqa: S108
    line += ["--remount-ro", "/dev", "--size", str(disk_bytes), "--tmpfs", FOLDER, "--remount-ro", "/"]
    try:
        for name, content in files.items():
            given.append(_open(content))
            line += ["--file", str(given[-1]), f"{FOLDER}/{_inside(name)}"]
    except BaseException:
        for descriptor in given:
            os.close(descriptor)
        raise
    line += ["--chdir", FOLDER, "--", prlimit, *limiter, "--", str(python.executable), "-s", f"{FOLDER}/{MAIN}"]
    return line, given


def _program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise OperationError(f"code is not run: {name} is missing (on Debian: apt install {package})")
    return str(Path(path).resolve())


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
        raise InputError(f"files: {name!r} is not accepted; a name is a relative path without ..")
    return str(path)


def _open(content: str | bytes) -> int:
    """A file without a name, at its beginning."""
    with tempfile.TemporaryFile() as file:
        file.write(content.encode(errors="surrogatepass") if isinstance(content, str) else content)
        file.seek(0)
        return os.dup(file.fileno())


def system_calls() -> int:
    """The filter of system calls, compiled for this processor, as an open file.

    Raises
    ------
    OperationError
        If libseccomp is missing.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError):
        raise OperationError(
            "code is not run: libseccomp is missing (on Debian: apt install libseccomp2; pip install pyseccomp)"
        ) from None
    refused = pyseccomp.ERRNO(errno.EPERM)
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in _DENIED:
        # One that this libseccomp or processor doesn't know can't be asked for by its name either.
        if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) > 0:
            rules.add_rule(refused, name)
    # The flags of `clone3` are in memory, where no filter sees them; libraries then use `clone`.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    user_namespace = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _NEW_USER_NAMESPACE, _NEW_USER_NAMESPACE)
    rules.add_rule(refused, "clone", user_namespace)
    # Of sockets, those that a network namespace confines: AF_VSOCK, for one, reaches a virtual machine's host.
    for family in (0, *range(_INET + 1, _INET6)):
        rules.add_rule(refused, "socket", pyseccomp.Arg(0, pyseccomp.EQ, family))
    rules.add_rule(refused, "socket", pyseccomp.Arg(0, pyseccomp.GT, _INET6))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return os.dup(file.fileno())
