"""ld, st, atom, red, prefetch, and the address instructions cvta, mapa."""

from __future__ import annotations

import numpy as np

from .errors import OutOfBounds, UnknownInstruction
from .isa import expect_operands, instruction
from .memory import WINDOW_BITS, shared_offset, shared_rank
from .operands import LANES, PARAM_BASE, TYPES, address_reader, lanes, reader, reader_any, vector, writer
from .parser import Instruction, Program

_SPACE = r"(?P<space>param|global|shared(::cta|::cluster)?)"
_HINTS = r"(\.(relaxed|acquire|release)\.(cta|cluster|gpu|sys)|\.volatile|\.weak)?"
_CACHE = r"(\.(nc|ca|cg|cs|lu|cv|wb|wt|L1::(no_allocate|evict_\w+)|L2::(128B|256B|64B|evict_\w+)))*"
_MEMORY_TYPE = r"(?P<type>[busf](8|16|32|64))"
_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


def _access(type_name: str) -> tuple[int, np.dtype, bool]:
    """Bytes in memory, numpy type there, signedness."""
    size = _BYTES[type_name[1:]]
    kind = {"b": "u", "u": "u", "s": "i", "f": "u"}[type_name[0]]
    return size, np.dtype(f"{kind}{size}"), type_name[0] == "s"


def _ranks(warp, space: str, addresses: np.ndarray) -> np.ndarray:
    """Blocks of the cluster that shared addresses belong to; without ``::cluster`` only the own one may be."""
    ranks = (addresses >> np.uint64(WINDOW_BITS)).astype(np.int64)
    if space != "shared::cluster" and (ranks != warp.cta.rank).any():
        raise OutOfBounds(f"another block's shared memory is accessed as .{space}, not .shared::cluster")
    return ranks


def _load_bytes(warp, space: str, addresses: np.ndarray, size: int) -> np.ndarray:
    """uint8 [n, size]; alignment checked."""
    if (addresses % np.uint64(size)).any():
        raise OutOfBounds(f"misaligned {space} access of {size} bytes at {int(addresses[0]):#x}")
    if space == "param":
        index = (addresses - np.uint64(PARAM_BASE)).astype(np.int64)[:, None] + np.arange(size)
        if index.max() >= warp.machine.params.size:
            raise OutOfBounds("parameter access outside the kernel's parameters")
        return warp.machine.params[index]
    if space == "global":
        return warp.machine.memory.gather(addresses, size)
    out = np.empty((addresses.size, size), np.uint8)
    ranks = _ranks(warp, space, addresses)
    index = shared_offset(addresses).astype(np.int64)[:, None] + np.arange(size)
    for rank in np.unique(ranks):
        mine = ranks == rank
        out[mine] = warp.cta.cluster.shared(int(rank)).read(index[mine])
    return out


def _store_bytes(warp, space: str, addresses: np.ndarray, values: np.ndarray) -> None:
    size = values.shape[1]
    if (addresses % np.uint64(size)).any():
        raise OutOfBounds(f"misaligned {space} access of {size} bytes at {int(addresses[0]):#x}")
    warp.machine.events += 1
    if space == "global":
        warp.machine.memory.scatter(addresses, values)
        return
    ranks = _ranks(warp, space, addresses)
    index = shared_offset(addresses).astype(np.int64)[:, None] + np.arange(size)
    for rank in np.unique(ranks):
        mine = ranks == rank
        if int(rank) == warp.cta.rank:
            warp.cta.shared.write(index[mine], values[mine], warp.index)
        else:
            warp.cta.cluster.shared(int(rank)).write(index[mine], values[mine], None)


@instruction(rf"ld{_HINTS}\.{_SPACE}{_CACHE}(\.(?P<vector>v2|v4|v8))?\.{_MEMORY_TYPE}")
def _ld(ins: Instruction, match, program: Program):
    expect_operands(ins, 2)
    names, space = vector(ins.operands[0]), match["space"]
    size, dtype, signed = _access(match["type"])
    if len(names) != int((match["vector"] or "v1")[1:]):
        raise UnknownInstruction(f"Vector of the wrong length, {ins}")
    classes = [program.registers.get(name, ("b32",))[0] for name in names]
    kinds = [
        {"b16": "s16" if signed else "u16", "b32": "s32" if signed else "u32"}.get(c, "s64" if signed else "u64")
        for c in classes
    ]
    if any(TYPES[kind][1].itemsize < size for kind in kinds):
        raise UnknownInstruction(f"Destination narrower than the type, {ins}")
    address = address_reader(program, ins, ins.operands[1])
    writes = [(writer(program, ins, n, k), np.zeros(LANES, TYPES[k][1])) for n, k in zip(names, kinds, strict=True)]

    def execute(warp, mask):
        data = _load_bytes(warp, space, address(warp)[mask], size * len(writes))
        for position, (write, zero) in enumerate(writes):
            part = np.ascontiguousarray(data[:, position * size : (position + 1) * size]).view(dtype)[:, 0]
            values = zero.copy()
            values[mask] = part
            write(warp, mask, values)

    return execute


@instruction(rf"st{_HINTS}\.{_SPACE}{_CACHE}(\.(?P<vector>v2|v4|v8))?\.{_MEMORY_TYPE}")
def _st(ins: Instruction, match, program: Program):
    expect_operands(ins, 2)
    names, space = vector(ins.operands[1]), match["space"]
    size, _, _ = _access(match["type"])
    if len(names) != int((match["vector"] or "v1")[1:]) or space == "param":
        raise UnknownInstruction(f"Cannot store so, {ins}")
    address = address_reader(program, ins, ins.operands[0])
    wide = {1: "u16", 2: "u16", 4: "u32", 8: "u64"}[size]
    sources = [reader_any(program, ins, name, wide) for name in names]

    def execute(warp, mask):
        parts = [source(warp)[mask].reshape(-1, 1).view(np.uint8)[:, :size] for source in sources]
        _store_bytes(warp, space, address(warp)[mask], np.concatenate(parts, 1))

    return execute


@instruction(
    rf"(?P<op>atom|red)(\.relaxed|\.acquire|\.release|\.acq_rel)?(\.(cta|cluster|gpu|sys))?\.{_SPACE}"
    r"(\.(cta|gpu))?\.(?P<what>add|inc|exch|cas|min|max|or|and)\.(?P<type>[bus](32|64)|f32)"
)
def _atom(ins: Instruction, match, program: Program):
    returns = match["op"] == "atom"
    operands = ins.operands if returns else ("_", *ins.operands)
    kind, what, space = match["type"], match["what"], match["space"]
    if what == "inc" or len(operands) != (4 if what == "cas" else 3):
        raise UnknownInstruction(f"Not modelled, {ins}")
    address = address_reader(program, ins, operands[1])
    values = [reader(program, ins, text, kind) for text in operands[2:]]
    write, dtype = writer(program, ins, operands[0], kind), TYPES[kind][1]
    combine = {
        "add": lambda old, b: old + b,
        "exch": lambda old, b: b,
        "min": min,
        "max": max,
        "or": lambda old, b: old | b,
        "and": lambda old, b: old & b,
        "cas": lambda old, compare, new: new if old == compare else old,
    }[what]

    def execute(warp, mask):
        out, targets, given = np.zeros(LANES, dtype), address(warp), [value(warp) for value in values]
        for lane in warp.machine.random.sample(lanes(mask), int(mask.sum())):
            where = targets[lane : lane + 1]
            old = _load_bytes(warp, space, where, dtype.itemsize).view(dtype)[0, 0]
            with np.errstate(over="ignore"):
                new = dtype.type(combine(old, *(value[lane] for value in given)))
            _store_bytes(warp, space, where, np.array([[new]], dtype).view(np.uint8))
            out[lane] = old
        write(warp, mask, out)

    return execute


@instruction(r"prefetch(\.\w+)?\.(tensormap|global\.L2(::evict_\w+)?|L1|L2)|prefetch\.tensormap")
def _prefetch(ins: Instruction, match, program: Program):
    return lambda warp, mask: None


@instruction(r"cvta(\.to)?\.(global|shared(::cta|::cluster)?|param|const)\.u64")
def _cvta(ins: Instruction, match, program: Program):
    expect_operands(ins, 2)
    read, write = reader(program, ins, ins.operands[1], "u64"), writer(program, ins, ins.operands[0], "u64")
    return lambda warp, mask: write(warp, mask, read(warp))


@instruction(r"mapa(\.shared::cluster)?\.u32")
def _mapa(ins: Instruction, match, program: Program):
    expect_operands(ins, 3)
    source, rank = (reader(program, ins, text, "u32") for text in ins.operands[1:])
    write = writer(program, ins, ins.operands[0], "u32")

    def execute(warp, mask):
        if shared_rank(int(rank(warp)[mask].max()) << WINDOW_BITS) >= len(warp.cta.cluster.ctas):
            raise OutOfBounds("mapa names a block that the cluster does not have")
        offset = source(warp) & np.uint32((1 << WINDOW_BITS) - 1)
        write(warp, mask, offset | (rank(warp) << np.uint32(WINDOW_BITS)))

    return execute
