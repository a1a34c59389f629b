"""What runs inside the sandbox: how an interpreter confines itself, and the program that loads hostile code and sends values out.

The program holds no secret and nothing that it sends is trusted: it is as good as the candidate's own, once that runs.
"""

from __future__ import annotations

import struct

__all__ = ["HARNESS", "START", "system_call_filter"]

START = r"""
import collections, ctypes, json, os, resource, struct, sys, types


def confine(limits, filter):
    for name, most in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError):
            if sys.platform == "linux":  # macOS knows some limits by name only
                raise
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
        code = ctypes.create_string_buffer(filter, len(filter))
        program = ctypes.create_string_buffer(struct.pack("HP", len(filter) // 8, ctypes.addressof(code)))
        died = prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
        new = prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        filtered = prctl(22, 2, ctypes.addressof(program), 0, 0) if filter else 0  # PR_SET_SECCOMP, a filter
        if died or new or filtered:
            raise OSError("this kernel refuses no-new-privileges or a system call filter")


def start():
    given = json.load(sys.stdin)
    confine(given["limits"], bytes.fromhex(given["filter"]))
    private, null = os.dup(1), os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    return given, private
"""
"""How every program here begins: `start()` gives what stood in standard input, with {"limits": {name of the rlimit: value}, "filter": hex},
and a descriptor that was standard output. The process is confined from there on, and its standard descriptors lead nowhere.
"""

HARNESS = (
    START
    + r'''
DICTS = (dict, collections.Counter, collections.OrderedDict, collections.defaultdict)


def encode(value):
    """Type-tagged JSON; only exact built-in types, so that no code of the candidate's runs here."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind in (list, tuple, set, frozenset):
        return [kind.__name__, [encode(item) for item in value]]
    if kind in DICTS:
        return ["dict", [[encode(key), encode(item)] for key, item in dict.items(value)]]
    return ["object", kind.__name__]


def outcome(expression, namespace):
    try:
        return [True, encode(eval(compile(expression, "test", "eval", dont_inherit=True), namespace))]
    except BaseException as error:
        return [False, type(error).__name__]


def main():
    given, private = start()
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # dataclasses and others look their module up
    try:
        exec(compile(given["code"], "candidate.py", "exec", dont_inherit=True), vars(module))
    except BaseException as error:
        found = {"raised": type(error).__name__}
    else:
        found = [outcome(expression, vars(module)) for expression in given["expressions"]]
    rest = json.dumps(found).encode()
    while rest:
        rest = rest[os.write(private, rest):]
    os._exit(0)


main()
'''
)
"""For `python -I -S -c`. Standard input: {"code", "expressions", "limits", "filter"}.

Standard output, which the candidate does not get as such: [[true, value] or [false, name of the exception], …], one each
expression, or {"raised": name of the exception} where the code could not be loaded.
"""

_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Number on x86-64 and on arm64, of linux/unistd.h. Processes are denied so that a fork bomb is nothing (RLIMIT_NPROC does not
# bind root), memory that no limit counts (shared segments, queues, memfd), and what reaches other processes or more of the
# kernel. Mostly for the layer without namespaces; within namespaces it is a second wall.
_DENIED = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "setrlimit": (160, 164), "prlimit64": (302, 261), "socket": (41, 198),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
}  # fmt: skip
_CLONE, _CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_PERMISSION, _NO_SUCH_CALL = 1, 38
_THREAD = 0x00010000


def system_call_filter(machine: str) -> bytes:
    """The seccomp program for `platform.machine()`, struct sock_filter by struct sock_filter; empty where none is known.

    Threads can be made, processes cannot: clone needs CLONE_THREAD, and clone3, whose flags a filter cannot see, does not
    exist (the C library then falls back to clone).
    """
    if machine not in _AUDIT:
        return b""
    column = 0 if machine == "x86_64" else 1
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    # The x32 calls have numbers of their own.
    code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    code += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERROR | _NO_SUCH_CALL)]
    for numbers in _DENIED.values():
        if (number := numbers[column]) is not None:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERROR | _PERMISSION)]
    code += [(_EQUAL, 0, 3, _CLONE[machine]), (_LOAD, 0, 0, 16), (_ANY_BIT, 1, 0, _THREAD)]
    code += [(_RETURN, 0, 0, _ERROR | _PERMISSION), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *line) for line in code)
