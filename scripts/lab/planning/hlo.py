"""Bytes that a compiled program sends between devices and moves to and from memory.

Counted in the text of the optimized HLO: XLA's own count includes on-chip memory, not collectives.
"""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

# Collective → bytes that a device sends per byte of its operand, in a group of n devices: those of
# ring algorithms, which are optimal on a ring (Patarasuk and Yuan 2009).
RING = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}

# What moves nothing itself: names for arrays, ends of operations that are counted at their start,
# and calls, whose bodies are counted instead.
FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|replica-id"
    r"|opt-barrier|domain|while|conditional|call|iota|.*-done|.*-update|async-start"
)
BRANCHES = ("branch_computations", "true_computation", "false_computation")
CALLS = ("to_apply", "calls")
# Operation → the roles of the computations that it calls and that are counted.
ROLES = {"while": ("body", "condition"), "call": CALLS, "async-start": CALLS, "fusion": CALLS[1:]}

ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")


class Instruction(NamedTuple):
    """One line of a program: `%name = shape opcode(inside), attributes`."""

    name: str
    shape: str
    opcode: str
    inside: str
    attributes: str

    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.inside)

    def called(self, *roles: str) -> list[str]:
        """The computations that it calls in these roles, such as `body` or `calls`."""
        found = re.findall(rf"\b(?:{'|'.join(roles)})=(\{{[^}}]*\}}|%?[\w.-]+)", self.attributes)
        return [name for names in found for name in re.findall(r"[\w.-]+", names)]


@dataclass
class Traffic:
    """What one device moves in one execution of a program."""

    sent: dict[str, float] = field(default_factory=dict)  # collective → bytes to other devices
    counts: dict[str, int] = field(default_factory=dict)  # collective → how many
    memory: float = 0.0  # bytes to and from main memory; at most, if fusions read some rows only
    unknown_loops: int = 0  # loops of unknown trip count, whose bodies are counted once


def traffic(text: str, devices: int) -> Traffic:
    """What one of so many devices moves in one execution of an optimized program."""
    program, entry = computations(text)
    total, chains = Traffic(), set()

    def visit(name: str, times: int, fused: bool) -> None:
        shapes = {each.name: each.shape for each in program[name]}
        for each in program[name]:
            kind = each.opcode.removesuffix("-start")
            # The TPU compiler splits a collective into a chain of fusions, and writes a
            # reduce-scatter as an all-reduce in a fusion of that name.
            chain = re.findall(r'chain_id="(\d+)"', each.attributes)
            if kind in RING and not chains.intersection(chain):
                chains.update(chain)
                size = sum(bytes_ for op in each.operands() for bytes_, _ in arrays(shapes[op]))
                scatters = kind == "all-reduce" and name.startswith("all-reduce-scatter")
                kind = "reduce-scatter" if scatters else kind
                sent = size * RING[kind](group_size(each.attributes, devices))
                total.sent[kind] = total.sent.get(kind, 0.0) + times * sent
                total.counts[kind] = total.counts.get(kind, 0) + times
            if not fused:
                total.memory += times * bytes_moved(each, shapes)
            trips = trip_count(each, program) if each.opcode == "while" else 1
            total.unknown_loops += trips is None
            for body in each.called(*BRANCHES, *ROLES.get(each.opcode, ())):
                visit(body, times * (trips or 1), fused or each.opcode == "fusion")

    visit(entry, 1, False)
    return total


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and the name of its entry."""
    program: dict[str, list[Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            name = match[2]
            entry = name if match[1] else entry
            program[name] = []
        elif name and (match := INSTRUCTION.match(line)):
            inside, _, attributes = match[4].partition(")")
            program[name].append(Instruction(match[1], match[2], match[3], inside, attributes))
    return program, entry


def arrays(shape: str) -> list[tuple[int, bool]]:
    """The bytes of each array in a shape, and whether it is in main memory."""
    found = []
    for dtype, sizes, layout in ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        elements = math.prod(int(size) for size in sizes.split(",") if size)
        found.append((math.ceil(elements * bits / 8), not re.search(r"S\([1-9]", layout)))
    return found


def bytes_moved(each: Instruction, shapes: dict[str, str]) -> int:
    """The bytes that an instruction reads from main memory and writes to it."""
    if FREE.fullmatch(each.opcode) or 'target="ConcatBitcast"' in each.attributes:
        return 0
    written = arrays(each.shape)
    if each.opcode in ("copy-start", "slice-start"):
        # A tuple of the source and the result; only the smaller of the two is moved.
        (one, here), (other, there), *_ = written
        return min(one, other) * (here + there)
    read = [array for operand in each.operands() for array in arrays(shapes[operand])]
    if each.opcode in ("slice", "dynamic-slice", "gather"):
        read = [(size, main) for size, _ in written for _, main in read[:1]]
    if each.opcode in ("dynamic-update-slice", "scatter"):
        written = read = read[-1:] if each.opcode == "scatter" else read[1:2]
    return sum(size for size, main in written + read if main)


def group_size(attributes: str, devices: int) -> int:
    """The devices in each group of a collective; without groups, all."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):  # {{0,2},{1,3}}
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):  # [2,2]<=[4]: number, size
        return int(match[1])
    # mesh['a'=2,'b'=2] {'a'}; 'a':(1)2 is a part of an axis
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or axes[axis]) for axis, part in parts)
    return devices


def trip_count(loop: Instruction, program: dict[str, list[Instruction]]) -> int | None:
    """The iterations of a loop, if the program states them or counts from 0 to a constant."""
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(match[1])
    condition = [each for name in loop.called("condition") for each in program[name]]
    bounds = [each.inside for each in condition if each.opcode == "constant"]
    below = [each for each in condition if "direction=LT" in each.attributes]
    return int(bounds[0]) if len(bounds) == len(below) == 1 else None
