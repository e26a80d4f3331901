"""PTX text to a :class:`Program`: one kernel, its parameters, registers, shared variables and instructions.

Scopes (``{ ... }`` around inline assembly) get their own registers and labels. A directive that the model does not
know is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import UnknownInstruction

# The first kilobyte of the shared window belongs to the system on compute capability 9 and later.
SHARED_BASE = 1024
_SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4}
_SIZES |= {"b64": 8, "u64": 8, "s64": 8, "f64": 8}
_REGISTER_CLASS = {"pred": "pred", "b8": "b8", "u8": "b8", "s8": "b8"}
_REGISTER_CLASS |= {"b16": "b16", "u16": "b16", "s16": "b16", "f16": "b16", "bf16": "b16"}
_REGISTER_CLASS |= {"b32": "b32", "u32": "b32", "s32": "b32", "f32": "b32"}
_REGISTER_CLASS |= {"b64": "b64", "u64": "b64", "s64": "b64", "f64": "b64"}
REGISTER_CLASSES = ("pred", "b8", "b16", "b32", "b64")
# Directives that bear on performance or debugging alone.
_IGNORED = ("pragma", "loc", "file", "section", "maxnreg", "minnctapersm", "maxntid", "noreturn")
_LABEL = re.compile(r"([%$\w]+)\s*:(?!:)")


@dataclass(slots=True)
class Instruction:
    """One instruction. ``opcode`` includes the modifiers; ``predicate`` is (register, negated) or None."""

    index: int
    line: int
    text: str
    opcode: str
    operands: tuple[str, ...]
    predicate: tuple[str, bool] | None

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass
class Program:
    """One kernel.

    params: name to (offset, bytes) in parameter space. registers: name to (class, index), a class of
    ``REGISTER_CLASSES``. labels: name to instruction index. shared: variable to address; ``dynamic`` is where
    launch-time shared memory begins. block, cluster: sizes that the kernel requires, or None.
    """

    name: str = ""
    params: dict[str, tuple[int, int]] = field(default_factory=dict)
    registers: dict[str, tuple[str, int]] = field(default_factory=dict)
    register_counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REGISTER_CLASSES, 0))
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    dynamic: int = SHARED_BASE
    instructions: list[Instruction] = field(default_factory=list)
    block: tuple[int, ...] | None = None
    cluster: tuple[int, ...] | None = None

    @property
    def param_bytes(self) -> int:
        return max((offset + size for offset, size in self.params.values()), default=0)


def parse(text: str) -> Program:
    """Parse PTX that holds exactly one ``.entry``.

    Raises:
        UnknownInstruction: no or several kernels, a device function, a directive that the model does not know.
    """
    text = re.sub(r"//[^\n]*", "", text)
    if len(re.findall(r"\.entry\b", text)) != 1 or re.search(r"\.func\b", text):
        raise UnknownInstruction("The model takes PTX with exactly one .entry and no .func.")
    head, body = text.split(".entry", 1)
    program = Program()
    extern: list[str] = []
    declarations = re.sub(r"^\s*\.(version|target|address_size)\b[^\n]*", "", head, flags=re.M)
    for statement in declarations.split(";")[:-1]:
        _shared(program, extern, " ".join(statement.split()))
    signature, attributes = body[: body.index("{")], ""
    match = re.match(r"\s*([\w$]+)\s*\((.*?)\)(.*)", signature, re.S)
    if match is None:
        raise UnknownInstruction(f"Cannot read the kernel's signature: {signature[:80]!r}.")
    program.name, parameters, attributes = match.groups()
    _parameters(program, parameters)
    for directive, values in re.findall(r"\.(\w+)([ \t\d,]*)", attributes):
        numbers = tuple(int(value) for value in values.split(",") if value.strip())
        if directive == "reqntid":
            program.block = numbers
        elif directive == "reqnctapercluster":
            program.cluster = numbers
        elif directive not in (*_IGNORED, "explicitcluster"):
            raise UnknownInstruction(f"Unknown kernel attribute .{directive}.")
    first_line = text[: text.index(".entry")].count("\n") + signature.count("\n") + 1
    _Body(program, extern, body[body.index("{") :], first_line).parse()
    for name in extern:
        program.shared[name] = program.dynamic
    return program


def _parameters(program: Program, text: str) -> None:
    offset = 0
    pointer = r"(?:\.ptr[^%$\w]*(?:\.\w+\s+)*(?:\.align\s+\d+\s+)?)?"
    pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+" + pointer + r"([\w$]+)(?:\[(\d+)\])?"
    for align, kind, name, count in re.findall(pattern, text):
        alignment = int(align or _SIZES[kind])
        size = _SIZES[kind] * int(count or 1)
        offset = -(-offset // alignment) * alignment
        program.params[name] = (offset, size)
        offset += size


def _shared(program: Program, extern: list[str], statement: str) -> None:
    match = re.fullmatch(r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", statement)
    if match is None:
        raise UnknownInstruction(f"Unknown variable: {statement}.")
    is_extern, align, name, size = match.groups()
    address = -(-program.dynamic // int(align)) * int(align)
    if is_extern:
        extern.append(name)
        program.dynamic = address
    else:
        program.shared[name] = address
        program.dynamic = address + int(size)


class _Body:
    """The statements between the outer braces."""

    def __init__(self, program: Program, extern: list[str], text: str, line: int) -> None:
        self.program, self.extern, self.text, self.line = program, extern, text, line
        self.scopes: list[dict[str, str]] = []
        self.scope_count = 0

    def parse(self) -> None:
        position, depth = 0, 0
        while position < len(self.text):
            character = self.text[position]
            if character.isspace() or character == ";":
                position += 1
            elif character == "{":
                depth += 1
                if depth > 1:
                    self._open(position)
                position += 1
            elif character == "}":
                depth -= 1
                if depth == 0:
                    return
                self.scopes.pop()
                position += 1
            elif label := _LABEL.match(self.text, position):
                self.program.labels[self._name(label[1])] = len(self.program.instructions)
                position = label.end()
            elif re.match(r"\.(loc|file)\b", self.text[position : position + 6]):
                position = self.text.index("\n", position)
            else:
                end = self.text.index(";", position)
                self._statement(self.text[position:end].strip(), self.line + self.text.count("\n", 0, position))
                position = end + 1
        raise UnknownInstruction("The kernel's body has no closing brace.")

    def _open(self, start: int) -> None:
        """Begin a scope; its labels are known from the start, for they are used before they are defined."""
        end, depth = start, 0
        while True:
            depth += {"{": 1, "}": -1}.get(self.text[end], 0)
            if depth == 0:
                break
            end += 1
        self.scope_count += 1
        names = _LABEL.findall(self.text[start:end])
        self.scopes.append({name: f"{name}@{self.scope_count}" for name in names})

    def _name(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".shared"):
            _shared(self.program, self.extern, re.sub(r"\s+", " ", text))
        elif text.startswith("."):
            if text[1:].split()[0].split('"')[0] not in _IGNORED:
                raise UnknownInstruction(f"line {line}: unknown directive: {text}")
        else:
            self._instruction(text, line)

    def _registers(self, text: str) -> None:
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
        if match is None or match[1] not in _REGISTER_CLASS:
            raise UnknownInstruction(f"Unknown register declaration: {text}")
        kind = _REGISTER_CLASS[match[1]]
        for item in (part.strip() for part in match[2].split(",")):
            numbered = re.fullmatch(r"([%\w$]+)<(\d+)>", item)
            names = [f"{numbered[1]}{i}" for i in range(int(numbered[2]))] if numbered else [item]
            for name in names:
                unique = name
                if self.scopes:
                    unique = self.scopes[-1].setdefault(name, f"{name}@{self.scope_count}")
                self.program.registers[unique] = (kind, self.program.register_counts[kind])
                self.program.register_counts[kind] += 1

    def _instruction(self, text: str, line: int) -> None:
        text = re.sub(r"\s+", " ", text)
        if self.scopes:
            text = re.sub(r"(?<![\w.%$:])[%$A-Za-z_][\w$]*", lambda name: self._name(name[0]), text)
        predicate, rest = None, text
        if guard := re.match(r"@(!?)([%\w$@]+)\s+", text):
            predicate, rest = (guard[2], bool(guard[1])), text[guard.end() :]
        opcode, _, operands = rest.partition(" ")
        instructions = self.program.instructions
        instructions.append(
            Instruction(len(instructions), line, text, opcode, tuple(split_operands(operands)), predicate)
        )


def split_operands(text: str) -> list[str]:
    """Split at the commas outside brackets and braces."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts
