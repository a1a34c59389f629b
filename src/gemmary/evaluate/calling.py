"""The two programs of a test that is a program: one holds the candidate and answers calls, one runs the test and asks.

They talk over two pipes, a line of JSON each way: [number, target, arguments, keywords] and [number, true, value, what became of
the arguments] or [number, false, exception, text]. The candidate's program is as good as the candidate's own once that
runs, so the other takes nothing from it but plain values of exact built-in types, names of exceptions, and numbers of
objects that it cannot look into; an answer in any other form ends the test.
"""

from __future__ import annotations

from gemmary.evaluate.harness import START

__all__ = ["CANDIDATE", "CHECKER"]

_VALUES = r'''
SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}
MAPPINGS = {kind.__name__: kind for kind in (dict, collections.Counter, collections.OrderedDict)}
KINDS = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)}


def encode(value, other):
    """Type-tagged JSON; only exact built-in types, of which no code is anybody's. `other` has the rest."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if abs(value) < 2**53 else ["int", hex(value)]
    if kind is complex:
        return ["complex", [value.real, value.imag]]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is range:
        return ["range", [encode(part, other) for part in (value.start, value.stop, value.step)]]
    if SEQUENCES.get(kind.__name__) is kind:
        return [kind.__name__, [encode(item, other) for item in value]]
    if MAPPINGS.get(kind.__name__) is kind or kind is collections.defaultdict:
        return [kind.__name__, [[encode(key, other), encode(item, other)] for key, item in dict.items(value)]]
    if kind is type and KINDS.get(value.__name__) is value:
        return ["kind", value.__name__]
    return other(value)


def decode(sent, other):
    """Any exception is one for a value that was not made by `encode`."""
    if sent is None or type(sent) in (bool, int, float, str):
        return sent
    tag, content = sent
    if tag in ("int", "bytes", "kind"):
        return {"int": lambda text: int(text, 16), "bytes": bytes.fromhex, "kind": KINDS.__getitem__}[tag](content)
    if tag not in ("range", "complex", "defaultdict", *SEQUENCES, *MAPPINGS):
        return other(tag, content)
    if type(content) is not list:
        raise TypeError
    if tag in MAPPINGS or tag == "defaultdict":
        pairs = {decode(key, other): decode(item, other) for key, item in content}
        return MAPPINGS[tag](pairs) if tag in MAPPINGS else collections.defaultdict(None, pairs)
    items = [decode(item, other) for item in content]
    return range(*items) if tag == "range" else complex(*items) if tag == "complex" else SEQUENCES[tag](items)


def write(descriptor, text):
    rest = text.encode()
    while rest:
        rest = rest[os.write(descriptor, rest):]
'''

CANDIDATE = (
    START
    + _VALUES
    + r"""
import builtins, operator

BUILTINS = dict(vars(builtins))
module = types.ModuleType("candidate")
objects, numbers = [], {}


def number_of(value):
    if id(value) not in numbers:
        numbers[id(value)] = len(objects)
        objects.append(value)
    return ["object", numbers[id(value)]]


def referred(tag, content):
    if tag == "name" and content not in vars(module):
        raise NameError(f"name {content!r} is not defined")
    return {"name": vars(module), "object": objects, "operation": OPERATIONS}[tag][content]


def load():
    sys.modules["candidate"] = module  # dataclasses and others look their module up
    exec(compile(given["code"], "candidate.py", "exec", dont_inherit=True), vars(module))


OPERATIONS = {
    "load": load, "value": lambda value: value, "get": getattr, "set": setattr, "item": operator.getitem,
    "iter": iter, "next": next, "len": len, "str": str,
}


def answer(number, target, arguments, keywords):
    try:
        items = [decode(item, referred) for item in arguments]
        named = {name: decode(item, referred) for name, item in keywords.items()}
        value = decode(target, referred)(*items, **named)
        # What works in place returns None.
        left = [encode(item, number_of) for item in (*items, *named.values())] if value is None else []
        return json.dumps([number, True, encode(value, number_of), left])
    except BaseException as error:
        kinds = (kind.__name__ for kind in type(error).__mro__ if BUILTINS.get(kind.__name__) is kind)
        try:
            text = error.args[0] if len(error.args) == 1 and type(error.args[0]) is str else str(error)
            return json.dumps([number, False, next(kinds), text])
        except BaseException:
            return json.dumps([number, False, "Exception", ""])


given, _ = start()
with os.fdopen(given["requests"], "rb") as requests:
    for line in requests:
        write(given["answers"], answer(*json.loads(line)) + "\n")
os._exit(0)
"""
)
"""For `python -I -S -c`. Standard input: {"code", "requests": descriptor, "answers": descriptor, "limits", "filter"}."""

CHECKER = (
    START
    + _VALUES
    + r'''
import builtins

EXCEPTIONS = {name: kind for name, kind in vars(builtins).items() if type(kind) is type and issubclass(kind, BaseException)}


def say(*verdict):
    write(private, json.dumps(verdict))
    os._exit(0)  # no `except` of the program's sees it


def stop(reason):
    frame = sys._getframe()
    while frame and frame.f_code.co_filename != "program":
        frame = frame.f_back
    say(reason, "", frame.f_lineno if frame else 0)


class Line:
    """To one candidate."""

    def __init__(self, requests, answers):
        self.requests, self.answers, self.objects = requests, answers, {}

    def ask(self, target, /, *arguments, **keywords):
        number = os.urandom(8).hex()  # which no answer can have that was written before
        items = [encode(item, self.reference) for item in arguments]
        named = {name: encode(item, self.reference) for name, item in keywords.items()}
        try:
            write(self.requests, json.dumps([number, target, items, named]) + "\n")
        except OSError:
            stop("no result")
        try:
            same, fine, first, second = json.loads(self.read())
            if same != number:
                raise ValueError
            value = decode(first, self.known) if fine else EXCEPTIONS.get(first, Exception)
            left = [decode(item, self.known) for item in second] if fine else str(second)
            if fine and value is None:
                for old, new in zip((*arguments, *keywords.values()), left, strict=True):
                    put_back(old, new)
        except Exception:
            stop("no result")
        if fine:
            return value
        raise exception(value, left)

    def read(self):
        got = bytearray()
        while b"\n" not in got[-2**16:]:
            chunk = os.read(self.answers, 2**16)
            if not chunk:
                stop("no result")
            got += chunk
            if len(got) > given["most"]:
                stop("too much output")
        line, _, more = bytes(got).partition(b"\n")
        if more:
            stop("no result")
        return line

    def reference(self, value):
        if type(value) is not Stand or whose(value) is not self:
            stop("cannot send " + type(value).__name__)
        return target_of(value)

    def known(self, tag, number):
        if tag != "object" or type(number) is not int:
            raise ValueError
        return self.objects.setdefault(number, Stand(self, [tag, number]))


def exception(kind, text):
    for base in kind.__mro__:
        try:
            return base(text)
        except TypeError:  # it wants more than a text
            pass


def put_back(old, new):
    if type(old) in (list, set, dict, *MAPPINGS.values(), collections.defaultdict):
        if type(old) is not type(new):
            raise ValueError
        old.clear()
        (old.extend if type(old) is list else old.update)(new)


class Stand:
    """For an object of the candidate's. Equal to itself only and always true: neither is asked of the candidate.

    Operators with an operand are not there: what stands on their other side may be what is expected.
    """

    __slots__ = ("_line", "_target")

    def __init__(self, line, target):
        for slot, value in zip((LINE, TARGET), (line, target)):
            slot.__set__(self, value)

    def __call__(self, /, *arguments, **keywords):
        return whose(self).ask(target_of(self), *arguments, **keywords)

    def __getattr__(self, name):
        if name.startswith("__"):  # copy and others look whether there is one
            raise AttributeError(name)
        return operate("get", self, name)

    def __setattr__(self, name, value):
        operate("set", self, name, value)

    def __getitem__(self, key):
        return operate("item", self, key)

    def __bool__(self):
        return True

    def __iter__(self):
        found = operate("iter", self)
        return found if type(found) is Stand else stop("no result")

    def __next__(self):
        return operate("next", self)

    def __len__(self):
        return operate("len", self)

    def __str__(self):
        return operate("str", self)

    def __reduce_ex__(self, protocol):
        raise TypeError("an object of the candidate's cannot be copied")


LINE, TARGET = Stand._line, Stand._target
whose, target_of = LINE.__get__, TARGET.__get__
# The candidate's attributes may have any name.
del Stand._line, Stand._target


def operate(name, stand, *arguments):
    return whose(stand).ask(["operation", name], stand, *arguments)


def prepare(lines, namespace):
    for line in lines:
        try:
            line.ask(["operation", "load"])
        except BaseException as error:
            say("raised", type(error).__name__, 0)
    for name in given["modules"]:
        namespace[name] = __import__(name)
    for name, which in given["names"].items():
        stand = Stand(lines[which], ["name", name])
        try:
            value = operate("value", stand)
        except BaseException:  # it may be there when it is used
            value = stand
        namespace[name] = stand if type(value) is Stand else value


def main():
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        prepare([Line(*pair) for pair in given["lines"]], vars(module))
        exec(compile(given["program"], "program", "exec", dont_inherit=True), vars(module))
    except BaseException as error:
        place, line = error.__traceback__, 0
        while place:
            line = place.tb_lineno if place.tb_frame.f_code.co_filename == "program" else line
            place = place.tb_next
        say("failed" if isinstance(error, AssertionError) else "raised", type(error).__name__, line)
    say("passed", "", 0)


given, private = start()
main()
'''
)
"""For `python -I -S -c`. Standard input: {"program", "names": {name: which candidate's}, "modules", "lines": [[descriptor for requests,
descriptor for answers], …], "most": bytes of one answer, "limits", "filter"}. Standard output, which the program does not get as
such: [what, name of the exception, line of the program, 0 for none], once it has ended.
"""
