"""Writes messages.md, every message of an error of the code, with what to do: `python docs/messages.py`."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "esper_triton"

ROOMS = {  # in the order of the page: the title, and where its code lies
    "Growing: wrap, hook, checkpoints": ("model", "tamiyo", "config.py", "huggingface.py", "lightning.py", "demo.py"),
    "Kasmina: layers and seeds": ("kasmina",),
    "Designs: blueprints, graphs, expressions": ("contracts",),
    "Tezzeret: compiling": ("tezzeret", "compile.py"),
    "Urza: the store": ("urza",),
    "Urabrask: proofs": ("urabrask",),
    "Oona: the bus": ("oona",),
    "Nissa: the page": ("nissa",),
    "For your own tests": ("testing",),
    "The CPU backend": ("cpu",),
    "The package itself": ("__init__.py",),
}

# What an exception becomes that is made by a call of this name.
MADE_BY = {
    "refuse": "TypeError",
    "self._refused": "ArchiveRefused",
    "self._error": "MLIRSyntaxError",
    "unsupported": "UnsupportedOperation",
    "self.unsupported": "UnsupportedOperation",
    "self._death": "Died",
    "_bad_record": "CorruptObject",
    "self._refusal": "CorruptObject",
    "argparse.ArgumentTypeError": "ArgumentTypeError",
}

# By where the code lies (the longest that fits counts) and the class. Public classes that are not here have an entry in
# faq.md that says it.
WHAT_TO_DO = {
    ("", "AttributeError"): (
        "There is no such name. The message has the nearest one, or the list is in the [reference](reference.md)."
    ),
    ("", "ImportError"): "A package that this part alone needs is not installed. Run the `pip install` of the message.",
    ("", "AssertionError"): (
        "This cannot happen by any use of the package: it is a bug of ours. Please tell us, with the traceback."
    ),
    ("model", "ValueError"): (
        "A call of yours does not fit what the model, its optimizer or its connection is by now. Nothing was "
        "changed: do what the message names, mostly another call that has to come first, or correct the value."
    ),
    ("model/commanding.py", "ValueError"): (
        "A command over the bus cannot be carried out. Its sender gets the message as a `refused` answer, and "
        "nothing was changed; send one that fits the seed's state."
    ),
    ("model", "TypeError"): (
        "An object of another kind was given than this call can work with: the message names what it was, and what"
        " it would have to be or have."
    ),
    ("model", "RuntimeError"): (
        "An optimizer has got a scheduler behind `attach`'s back: hand it over as the message says."
    ),
    ("model", "FileNotFoundError"): "The folder is none that `save_model` has written. Look at the path.",
    ("tamiyo", "TypeError"): (
        "What was given as a controller, or what a controller of your own gave back, is not what `GrowthHook` works "
        "with; the message says what it expects."
    ),
    ("config.py", "ValueError"): (
        "The file of a run cannot be read. It is raised as a `ConfigError` that begins with the file's name; "
        "correct the file."
    ),
    ("huggingface.py", "ValueError"): (
        "Hugging Face's Trainer is set up in a way that the callback cannot follow. Change what the message names."
    ),
    ("lightning.py", "ValueError"): (
        "Lightning's Trainer is set up in a way that the callback cannot follow. Change what the message names."
    ),
    ("demo.py", "RuntimeError"): (
        "The demo has found that something does not work on this machine; the message has the cause. `python -m "
        "esper_triton.cpu --check` says more about the machine."
    ),
    ("kasmina", "ValueError"): (
        "An argument is out of range, or does not fit the layer; the message has what was found and what is "
        "expected. Nothing was changed."
    ),
    ("kasmina/launcher.py", "ValueError"): (
        "Tensors of a call do not fit the kernel. In a layer this is a seed's fault: the host serves the call, and"
        " the error is in `layer.last_error(seed)`. In a program of your own that calls a kernel, give it what the"
        " message names."
    ),
    ("kasmina/fixed.py", "ValueError"): "A baked model is called with another input than its layers were made for.",
    ("kasmina/gpu.py", "ValueError"): "Fewer rows have to go through the layer at once: split the batch.",
    ("kasmina", "TypeError"): (
        "This module, or this object, cannot be taken; the message says why, and mostly what to do first."
    ),
    ("kasmina", "IndexError"): "The layer has fewer seeds. They count from 0.",
    ("kasmina", "AttributeError"): "State arrays follow the seeds and are read only. Ask for a transition instead.",
    ("kasmina", "RuntimeError"): (
        "Seeds are run in a way that they are not made for; the message says which. Compile, export or load anew, "
        "or ask for first derivatives alone."
    ),
    ("contracts", "ValueError"): (
        "A field of a blueprint, a file or a message is wrong. You meet it inside of a `BlueprintError`, a "
        "`ConfigError` or a `MalformedMessage`, which names the field in front of it."
    ),
    ("contracts", "ExpressionError"): (
        "An expression over dims, as in a parameter's shape or an init, cannot be read. You meet it inside of a "
        "`BlueprintError` with the parameter; [blueprints.md](blueprints.md#as-text) has what may be written."
    ),
    ("contracts", "GraphTextError"): (
        "The text of a graph cannot be read; every fault has its line. You meet it inside of a `BlueprintError`. "
        "[blueprints.md](blueprints.md#operations) has the operations."
    ),
    ("contracts/arguments.py", "TypeError"): (
        "An argument of a hook, a controller or a command is of another kind. Nothing was changed: give what the "
        "message says is expected."
    ),
    ("contracts/arguments.py", "ValueError"): "A number is out of range; the message has the range.",
    ("contracts", "AttributeError"): (
        "Blueprints have no such operation; [blueprints.md](blueprints.md#operations) lists them."
    ),
    ("tezzeret", "Refused"): (
        "Something that `Blueprint.from_module` met in a module cannot be said by the operations of a graph. You "
        "meet it inside of a `BlueprintError` with the module's own line: write that line otherwise, as the "
        "message says, or [write the graph](blueprints.md)."
    ),
    ("tezzeret", "TooLarge"): (
        "A candidate's blocks do not fit the target; smaller ones are tried by themselves. From a hand-written "
        "source it is a `CompileError`: write it with smaller blocks."
    ),
    ("tezzeret", "WorkerGone"): (
        "A process that compiles has ended, or was ended. You meet it inside of a `CompileError` that says what "
        "happened; give more time or memory (`Forge(time_limit=..., memory_limit=...)`)."
    ),
    ("tezzeret", "ValueError"): (
        "An option of the forge is out of range, or a graph has a form that has no kernels or no derivative here "
        "([limits](emission.md#limits))."
    ),
    ("tezzeret", "RuntimeError"): "The `Forge` was closed before. Make another, or submit inside of its `with` block.",
    ("tezzeret", "KeyError"): (
        "Nothing was compiled for that target in this call. Add it to `targets`, or ask for one that the message lists."
    ),
    ("tezzeret", "AttributeError"): (
        'Several artifacts came of this call, one for each target. Pick one: `artifacts["cpu"]`.'
    ),
    ("tezzeret", "TimeoutError"): (
        "No worker has answered. Start one as the message says, look at the bus's address, or wait longer."
    ),
    ("urza", "ValueError"): (
        "A name, URL, token, policy or option is not of the form that is needed; the message has the form. Nothing"
        " was stored."
    ),
    ("urza/parsing.py", "ValueError"): (
        "A record or manifest in the store is not what its writer signed. You meet it inside of a `CorruptObject` "
        "or an `ArchiveRefused`; compile the artifact again."
    ),
    ("urza/requests.py", "ValueError"): (
        "What was asked to be remembered of a request is not of the form that is needed. It costs no artifact."
    ),
    ("urza", "TypeError"): "These options are for a store at a URL. Leave them out for a directory.",
    ("urza", "Damage"): (
        "A file of the store is not what was written. You meet it inside of a `CorruptObject`, and the file lies "
        "in `quarantine/`; compile the artifact again."
    ),
    ("urza", "Missing"): (
        "A server was asked to commit an artifact some of whose objects it does not have; the client sends them "
        "and asks again."
    ),
    ("urza", "OtherSchema"): (
        "The store has something of a newer or older release. Update the package, or compile again."
    ),
    ("urza", "Unreachable"): (
        "A `StoreUnavailable`: the store on another machine does not answer. What the cache has is served "
        "meanwhile; look at the address, the network and the server."
    ),
    ("urza", "_Refused"): (
        "A store's server answers this, with a status of HTTP and a code. The client raises the error that fits "
        "the code, with this text; an HTTP client of your own has to send what the text asks for."
    ),
    ("urza", "_Broken"): (
        "An attempt to talk to a server came to nothing. It is made again by itself; when no attempt is left you "
        "see it at the end of a `StoreUnavailable`."
    ),
    ("urza", "_Misused"): "The command line is wrong: exit code 2, and `--help` of the command has its options.",
    ("urza", "ArgumentTypeError"): (
        "The command line is wrong: exit code 2, and `--help` of the command has its options."
    ),
    ("urza", "ConnectionError"): (
        "An object was damaged while a server sent it, so it broke off. The client asks again; `python -m "
        "esper_triton.urza verify` on the server finds the object."
    ),
    ("urabrask", "Died"): (
        "The cell in which a kernel was proven has ended, or was stopped. In a report it is a failed check, since "
        "a sound kernel does not do this: look at the kernel, or at limits of memory and processes."
    ),
    ("urabrask", "Failed"): (
        "The kernel, or the blueprint's own reference, has raised in the sandbox. In a report it is a failed "
        "check; correct what the text names."
    ),
    ("urabrask", "Garbage"): (
        "The cell has sent what is no message: code in it has written to its pipe. In a report it is a failed check."
    ),
    ("urabrask", "TooLarge"): (
        "A drawn call has more bytes than a sandbox has, and counts as a failed check. Prove with smaller dims."
    ),
    ("urabrask", "OSError"): (
        "This system does not let a sandbox be closed, so what runs in it can do more than it should: the report says "
        "so (`environment.degraded`). Look at the security policy of the container, or prove on another machine."
    ),
    ("urabrask", "ConnectionResetError"): (
        "The process that sandboxes are forked from was ended by somebody, as for want of memory. You meet it "
        "inside of a `ProofUnavailable`; prove again."
    ),
    ("urabrask", "RuntimeError"): (
        "A watch is started once; and sandboxes cannot be forked where a library that is loaded with the package "
        "starts threads: do not import it by `sitecustomize` or a `.pth` file."
    ),
    ("urabrask", "ValueError"): (
        "An option is out of range, or names of a module's parameters do not fit the blueprint's. Give what the "
        "message names."
    ),
    ("oona", "ValueError"): (
        "An address, a bound, a token file or an option of the bus is wrong. The message has what is expected; "
        "nothing was sent."
    ),
    ("oona", "ConnectionError"): (
        "The queue in this process is full, since some group has not read for long: `publish` returns False. Read "
        "in that group, or close its subscription."
    ),
    ("oona", "TimeoutError"): "Nobody has answered in time. Is the model, or the worker, on this bus?",
    ("oona", "RuntimeError"): "A job server is started once. Make another.",
    ("nissa", "ValueError"): (
        "An option of the command, or what a page was sent, is not of the form that the message has."
    ),
    ("testing", "ValueError"): (
        "The artifact and the module cannot be held against each other, or there is nothing to break. Give "
        "`names`, or a model with an active seed, as the message says."
    ),
    ("testing", "AssertionError"): (
        "Your test has found something: the message has the simplest call and its seed, or where the model differs"
        " from its host."
    ),
    ("testing", "MemoryError"): (
        "Raised on purpose by `assert_never_breaks`, inside of a launch. You see it in `layer.last_error(seed)` alone."
    ),
    ("testing", "_Broken"): (
        "Raised on purpose by `assert_never_breaks`, inside of a launch. You see it in `layer.last_error(seed)` alone."
    ),
    ("cpu", "CPUBackendError"): (
        "The backend cannot work as this machine or this release of Triton is set up; the message has the remedy, "
        "and `python -m esper_triton.cpu --check` looks at all of it."
    ),
    ("cpu", "ValueError"): "An option of the backend is out of range.",
    ("cpu/elf.py", "ValueError"): (
        "Object code is malformed. You meet it inside of an `ObjectRefused`; remove Triton's cache folder, or "
        "compile the artifact again."
    ),
    ("cpu/place.py", "ValueError"): (
        "Object code is malformed. You meet it inside of an `ObjectRefused`; remove Triton's cache folder, or "
        "compile the artifact again."
    ),
    ("cpu", "Unplaceable"): "The fast loader leaves such object code to LLVM's. Nothing is to be done.",
    ("cpu", "Unlowered"): (
        "The backend does not have this operation, or not in this form. You meet it inside of an "
        "`UnsupportedOperation` with kernel and line; [what it has](cpu-backend.md#what-it-has)."
    ),
    ("cpu", "OSError"): (
        "The system does not let memory be made executable. Look at its security policy (SELinux, a hardened "
        "container)."
    ),
}


def text_of(node: ast.expr | None) -> str | None:
    """A message as a pattern, with its fields in braces; None where it is no literal."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(field_of(p.value) if isinstance(p, ast.FormattedValue) else str(text_of(p)) for p in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        return None if left is None and right is None else (left or "{…}") + (right or "{…}")
    return None


def field_of(node: ast.expr) -> str:
    """The name of what is put in."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "nearest":
            return "{; did you mean …?}"
        if node.func.id == "len":
            return "{number of " + field_of(node.args[0])[1:]
    if isinstance(node, ast.Attribute) and node.attr == "__name__" and isinstance(node.value, ast.Call):
        return "{class of " + field_of(node.value.args[0])[1:]
    if isinstance(node, ast.IfExp):
        ends = [text_of(end) for end in (node.body, node.orelse)]
        if all(end is not None for end in ends):
            return "{" + " or ".join(end or "nothing" for end in ends if end is not None) + "}"
    if isinstance(node, (ast.Name, ast.Attribute)):
        return "{" + ast.unparse(node).rpartition(".")[2].strip("_") + "}"
    called = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
    bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names = [n for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute)) and ast.unparse(n) not in called]
    names = [n for n in names if not (isinstance(n, ast.Name) and n.id in bound)]
    return field_of(names[0]) if names else "{…}"


def exceptions() -> set[str]:
    """Names of classes of exceptions: Python's, and those of the package."""
    of_python = {name: value for name, value in vars(builtins).items() if isinstance(value, type)}
    known = {name for name, value in of_python.items() if issubclass(value, BaseException)}
    bases: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    while more := {name for name, own in bases.items() if own & known} - known:
        known |= more
    return known


def messages() -> Iterator[tuple[str, str, str]]:
    """Of every exception that the package makes: its file, its class and its message."""
    known = exceptions()
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE).as_posix()
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                made = MADE_BY.get(name, name.rpartition(".")[2] if "(" not in name else "")
                if made in known or name in MADE_BY:
                    yield from ((where, made, text) for text in literals(node))
            if isinstance(node, ast.ClassDef) and node.name in known:
                for call in ast.walk(node):
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
                        yield from ((where, node.name, text) for text in literals(call))


def literals(call: ast.Call) -> Iterator[str]:
    """The sentences among the arguments of a call that makes an exception."""
    for argument in (one for given in call.args for one in (given.elts if isinstance(given, ast.List) else [given])):
        text = text_of(argument)
        if text is not None and re.search(r"[a-z]{2,}\W+[a-z]{2,}", re.sub(r"\{.*?\}", "", text)):
            yield " ".join(text.split())


def advice(where: str, made: str, answers: Mapping[str, str]) -> tuple[str, str] | None:
    """The entry of WHAT_TO_DO for a class in a file; None where the questions answer it. Raises LookupError where none
    does."""
    fitting = [start for start, name in WHAT_TO_DO if name == made and where.startswith(start)]
    if fitting:
        return max(fitting, key=len), made
    if made not in answers:
        raise LookupError(f"nothing says what to do about {made} of {where}: WHAT_TO_DO of {Path(__file__).name}")
    return None


def code(text: str) -> str:
    """As code of Markdown, whatever is in it."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{' ' if '`' in text else ''}{text}{' ' if '`' in text else ''}{fence}"


def page() -> str:
    """The whole page."""
    faq = (HERE / "faq.md").read_text("utf-8")
    answers = {
        name: " ".join(line for line in body.split("\n") if line and not line.startswith(">"))
        for name, body in re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", faq, re.DOTALL | re.MULTILINE)
    }
    groups: dict[str, dict[tuple[str, str], set[str]]] = {title: {} for title in ROOMS}
    used = set()
    for where, made, text in messages():
        (title,) = (title for title, places in ROOMS.items() if where.split("/")[0] in places)
        entry = advice(where, made, answers)
        used.add(entry)
        said = WHAT_TO_DO[entry] if entry else f"{answers[made]} ([{made}](faq.md#{made.lower()}))"
        groups[title].setdefault((made, said), set()).add(text)
    if unused := set(WHAT_TO_DO) - used:
        raise LookupError(f"nothing has such a message any more: {unused} in WHAT_TO_DO of {Path(__file__).name}")
    parts = [
        "# Every message\n",
        "Made by `docs/messages.py` of the package's source: every message of an exception, by room and class"
        ", and what to do. What is in braces differs from case to case (`{…}`: a list of faults, or a text that was"
        " put together before), so search for the words that do not. A class that is met inside of another has no"
        " public name. [The questions](faq.md) have each public class.\n",
    ]
    for title, found in groups.items():
        parts.append(f"## {title}\n")
        for (made, said), texts in sorted(found.items()):
            parts.append(f"**{made}.** {said}\n")
            parts.append("\n".join(f"- {code(text)}" for text in sorted(texts)) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (HERE / "messages.md").write_text(page(), encoding="utf-8")
