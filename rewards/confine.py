"""Runs one program with nothing but what it needs. Started by ``rewards.sandbox`` as a process of its own, never imported.

Reads one JSON object from standard input (``Sandbox._order`` writes it), writes ``exit``, ``failed`` or ``timeout`` to
standard output. A program that could not be started is exit code 1 and one sentence on standard error.

With ``confined`` the program gets its own user, mount, process, IPC, host-name and, unless ``network``, network namespace.
Its root is an empty file system with the ``visible`` folders read-only, four devices and ``/program``, which is in memory and
gone with it. No /proc, /home, /tmp or /etc of this machine is in there. It runs as nobody, without capabilities.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import tempfile

NOBODY = 65534
WORK_BYTES = 64 << 20
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
NEW_MOUNTS, NEW_HOST_NAME, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = (1 << n for n in (17, 26, 27, 28, 29, 30))
READ_ONLY, NO_SUID, NO_DEVICES, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 1 << 12, 1 << 14, 1 << 18
DETACH = 2
SYS_MOUNT_SETATTR, HERE, AT_RECURSIVE = 442, -100, 0x8000  # the same number on every architecture
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

libc = ctypes.CDLL(None, use_errno=True)


def call(what, function, *arguments):
    if function(*arguments) != 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")


def enter(network):
    """Own namespaces for this process and, for the process ids, its children.

    The map of user ids must be written from outside: a second process does it. Root becomes nobody later, because limits on
    the number of processes do not bind root.
    """
    me, (uid, gid) = os.getpid(), (os.geteuid(), os.getegid())
    ready, go = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(go)
        if os.read(ready, 1):
            with contextlib.suppress(OSError):  # seen by the one who waits: its ids are not mapped
                if uid != 0:
                    write(f"/proc/{me}/setgroups", "deny")
                for kind, own in (("gid", gid), ("uid", uid)):
                    write(
                        f"/proc/{me}/{kind}_map", f"{NOBODY} {NOBODY} 1\n0 0 1\n" if uid == 0 else f"{NOBODY} {own} 1\n"
                    )
        os._exit(0)
    os.close(ready)
    flags = NEW_USER | NEW_MOUNTS | NEW_PIDS | NEW_IPC | NEW_HOST_NAME | (0 if network else NEW_NETWORK)
    call("user namespaces (unshare)", libc.unshare, flags)
    os.write(go, b"x")
    os.waitpid(helper, 0)
    if os.geteuid() != (0 if uid == 0 else NOBODY):
        raise OSError("user namespaces: the user id could not be mapped")


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def build_root(root, visible):
    """An empty file system on the folder ``root``, the visible paths in it, and nothing of the old one."""
    mount("no propagation of mounts", None, "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", b"tmpfs", root, b"tmpfs", NO_SUID | NO_DEVICES, b"mode=0755,size=1m")
    for path in [*visible, *DEVICES]:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.makedirs(target) if os.path.isdir(path) else open(target, "w").close()
    os.makedirs(f"{root}/program")
    if not os.path.lexists(f"{root}/tmp"):  # else Python itself lives there
        os.symlink("program", f"{root}/tmp")
    for path in visible:
        mount(f"bind of {path}", path.encode(), root + path, None, BIND | RECURSIVE)
    restrict(root, READ_ONLY | NO_SUID | NO_DEVICES)
    for path in DEVICES:
        mount(f"bind of {path}", path.encode(), root + path, None, BIND)
        restrict(root + path, READ_ONLY | NO_SUID)
    size = f"mode=0777,size={WORK_BYTES}".encode()
    mount("tmpfs for /program", b"tmpfs", f"{root}/program", b"tmpfs", NO_SUID | NO_DEVICES, size)
    os.chdir(root)
    call("pivot_root", libc.pivot_root, b".", b".")
    call("the old root", libc.umount2, b".", DETACH)
    os.chdir("/program")


def mount(what, source, target, kind, flags, options=None):
    call(f"mount: {what}", libc.mount, source, target.encode(), kind, ctypes.c_ulong(flags), options)


def restrict(path, flags):
    """Flags for a mount and all below it."""
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    arguments = (SYS_MOUNT_SETATTR, HERE, path.encode(), AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    call("read-only mounts (mount_setattr, Linux 5.12)", libc.syscall, *wide)


def start(order):
    """Become the program."""
    os.setsid()
    if order["confined"]:
        build_root(order["root"], order["visible"])
    else:
        os.chdir(order["root"])
    for name, text in order["files"].items():
        with open(name, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    with tempfile.TemporaryFile(dir=".") as stdin:
        stdin.write(order["stdin"].encode("utf-8", "replace"))
        stdin.seek(0)
        os.dup2(stdin.fileno(), 0)
    os.dup2(order["out"], 1)
    os.close(order["out"])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if order["confined"]:
        if os.geteuid() == 0:
            os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("no_new_privs", libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call(
        "pdeathsig", libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0
    )  # after the change of user, which clears it
    for name, value in order["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.execve(order["argv"][0], order["argv"], order["environment"])


def main():
    order = json.load(sys.stdin)
    call("pdeathsig", libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with contextlib.suppress(OSError):
        write("/proc/self/oom_score_adj", "1000")  # when memory runs out, this goes first and not the training
    if order["confined"]:
        enter(order["network"])
    failed, report = os.pipe()  # closed by a successful exec
    child = os.fork()
    if child == 0:
        try:
            start(order)
        except BaseException as error:
            os.write(report, str(error).encode()[:1000])
            os._exit(1)
    os.close(report)
    if reason := os.read(failed, 1000):
        sys.exit(reason.decode())
    ended = select.poll()
    ended.register(os.pidfd_open(child), select.POLLIN)
    in_time = bool(ended.poll(1000 * order["timeout"]))
    # Confined, the child is the first of its process namespace: all others die with it. Else its process group is known.
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL) if order["confined"] else os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print("timeout" if not in_time else "exit" if status == 0 else "failed")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(str(error))
