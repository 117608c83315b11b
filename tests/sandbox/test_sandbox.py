"""Code that tries to get out of the sandbox, to see what it shouldn't, to take too much, and to stay."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from modelworks.sandbox import Limits, run, unavailable
from modelworks.sandbox import execution as sandbox_execution
from modelworks.spec.errors import InputError, OperationError

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

PATIENT = Limits(wall_s=60)


def _processes_with(text: str) -> list[psutil.Process]:
    """Those that were started with a program of one line that ends so."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [""])[-1] == f"import time; time.sleep(600)  # {text}"
    ]


def test_a_program_reads_its_input_and_files_and_gives_its_output_and_exit_code():
    result = run(
        "import sys, helper\nprint(helper.twice(int(input())))\nprint('said', file=sys.stderr)\nsys.exit(3)",
        PATIENT,
        stdin="21\n",
        files={"helper.py": "def twice(x):\n    return 2 * x\n"},
    )
    assert (result.stdout, result.stderr, result.exit_code, result.ended) == ("42\n", "said\n", 3, "finished")


def test_half_a_character_is_an_error_of_the_code():
    result = run("print('\ud800')")
    assert (result.ended, result.exit_code) == ("finished", 1)
    assert "SyntaxError" in result.stderr


def test_a_file_that_leads_out_of_the_folder_is_refused():
    for name in ("../x", "/etc/x", ""):
        with pytest.raises(InputError, match="a relative path"):
            run("", PATIENT, files={name: "x"})


def test_the_users_files_the_data_and_the_environment_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_TEST", "sesame")
    secret = tmp_path / "modelworks.db"
    secret.write_text("secret")
    code = f"""
import os
for path in ["/etc/shadow", "/etc/passwd", {str(Path.home() / ".bashrc")!r}, {str(secret)!r}, "/proc/1/environ",
             "/dev/sda", "/dev/mem", "/sys/kernel", {str(Path(__file__).resolve())!r}]:
    try:
        data = open(path, "rb").read()
    except OSError:
        continue
    assert b"sesame" not in data, path
    assert path == "/proc/1/environ", path
assert "SECRET_OF_TEST" not in os.environ
for pid in [name for name in os.listdir("/proc") if name.isdigit()]:
    assert int(pid) < 10, pid
for path in ["/x", "/usr/lib/x", "/dev/x", "/proc/sys/kernel/hostname", "/etc/x", os.__file__]:
    try:
        open(path, "a").write("x")
    except OSError:
        continue
    raise AssertionError(path)
open("mine", "w").write("x")
print(sorted(os.listdir("/")))
"""
    result = run(code, PATIENT)
    assert result.exit_code == 0, result
    assert "home" not in result.stdout
    assert "root" not in result.stdout or not os.access("/usr/bin/python3", os.X_OK)


def test_no_port_of_this_machine_can_be_reached_and_no_namespace_made():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run(
            f"""
import ctypes, os, socket
for address in [("127.0.0.1", {port}), ("192.0.2.1", 80)]:
    try:
        socket.create_connection(address, timeout=5)
    except OSError:
        continue
    raise AssertionError(address)
for family in (socket.AF_NETLINK, socket.AF_PACKET, 40):
    try:
        socket.socket(family, socket.SOCK_RAW if family != 40 else socket.SOCK_STREAM)
    except PermissionError:
        continue
    raise AssertionError(family)
libc = ctypes.CDLL(None, use_errno=True)
for flags in (0x10000000, 0x00020000, 0x40000000):
    assert libc.unshare(flags) == -1
assert libc.mount(b"none", b"/work", b"tmpfs", 0, None) == -1
assert libc.shmget(0, 1 << 20, 0o1600) == -1
try:
    os.memfd_create("x")
except PermissionError:
    print("kept in")
""",
            PATIENT,
        )
    assert result.stdout == "kept in\n", result


def test_it_has_no_capability_and_a_user_of_its_own():
    result = run("print(open('/proc/self/status').read())", PATIENT)
    status = dict(line.split(":\t", 1) for line in result.stdout.splitlines() if ":\t" in line)
    assert [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")] == [0, 0, 0, 0]
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


def test_a_fork_bomb_meets_its_limit():
    result = run(
        """
import os, time
made = 0
try:
    while made < 500:
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except OSError:
    print(made)
""",
        Limits(wall_s=60, processes=16),
    )
    assert result.ended == "finished", result
    assert 1 <= int(result.stdout) <= 16


def test_memory_has_a_limit_for_one_process_and_for_all_together():
    alone = run("x = bytearray(1 << 30)", Limits(wall_s=60, memory_bytes=256 << 20))
    assert alone.ended == "memory", alone
    together = run(
        """
import os, time
for _ in range(5):
    if os.fork() == 0:
        break
x = bytearray(os.urandom(1 << 20)) * 100
time.sleep(50)
""",
        Limits(wall_s=60, memory_bytes=256 << 20),
    )
    assert together.ended == "memory", together


def test_what_it_writes_has_a_limit():
    result = run(
        """
import errno, os
for size, number in ((40 << 20, errno.EFBIG), (20 << 20, errno.ENOSPC)):
    try:
        for name in "abcdef":
            open(name, "wb").write(bytes(size))
    except OSError as error:
        assert error.errno == number, error
    else:
        raise AssertionError(size)
    for name in os.listdir("."):
        os.remove(name)
print("full")
""",
        PATIENT,
    )
    assert result.stdout == "full\n", result


def test_what_it_prints_has_a_limit():
    result = run("while True: print('x' * 1000)", Limits(wall_s=60, output_bytes=100_000))
    assert (result.ended, len(result.stdout), result.exit_code) == ("output", 100_000, None)


def test_time_has_a_limit_and_no_signal_is_heeded_that_code_can_ignore():
    code = """
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
print("ready")
time.sleep(600)
"""
    begin = time.monotonic()
    result = run(code, Limits(wall_s=5))
    assert result.ended == "time", result
    assert time.monotonic() - begin < 60
    computing = run("while True: pass", Limits(wall_s=120, cpu_s=1))
    assert computing.ended == "time"
    assert computing.seconds < 115


def test_the_caller_can_stop_it():
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    assert run("import time; time.sleep(60)", PATIENT, stop=stop).ended == "killed"


def test_a_daemon_that_it_leaves_behind_ends_with_it():
    result = run(
        """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for descriptor in range(3):
            os.close(descriptor)
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)  # daemon-left-behind"])
    os._exit(0)
time.sleep(1)
print("left")
""",
        PATIENT,
    )
    assert (result.stdout, result.ended) == ("left\n", "finished")
    assert not _processes_with("daemon-left-behind")


def test_it_ends_when_the_process_that_wanted_it_is_killed():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)  # orphan-of'])"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"from modelworks.sandbox import Limits, run\nrun({code!r}, Limits(wall_s=300))"]
    )
    deadline = time.monotonic() + 100
    while not _processes_with("orphan-of"):
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while _processes_with("orphan-of"):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_where_there_can_be_no_sandbox_code_is_not_run(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox_execution.unavailable.cache_clear()
    try:
        with pytest.raises(OperationError, match="code is not run: bwrap is missing"):
            run("print(1)")
        refusing = tmp_path / "bwrap"
        refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
        refusing.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin")
        # Another user could not read the folder of a test.
        monkeypatch.setattr(sandbox_execution, "identity", lambda: None)
        sandbox_execution.unavailable.cache_clear()
        with pytest.raises(OperationError, match=r"doesn't allow the sandbox its namespaces .*No permissions"):
            run("print(1)")
    finally:
        sandbox_execution.unavailable.cache_clear()
