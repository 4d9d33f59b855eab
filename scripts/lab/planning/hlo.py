"""What a compiled program moves, read from its text: over the interconnect, and to and from memory.

XLA tells floating-point operations and memory of a program, but not what its collectives
send; and its count of bytes has on-chip memory in it. So both are counted here, instruction
by instruction, from `jax.stages.Compiled.as_text()`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Kind → bytes that a device sends for each byte of its operand, in a group of n: of ring
# algorithms, which no other can better on a ring (Patarasuk and Yuan 2009).
RING = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}

# Instructions that move nothing themselves: names for what is there, ends of what was counted
# at its start, and those whose bodies are counted in their stead.
FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|replica-id"
    r"|opt-barrier|domain|while|conditional|call|iota|.*-done|.*-update|async-start"
)

ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")


@dataclass(frozen=True)
class Instruction:
    """One line of a program: `%name = shape opcode(inside), attributes`."""

    name: str
    shape: str
    opcode: str
    inside: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The names of the instructions that it reads."""
        return re.findall(r"%([\w.-]+)", self.inside)

    def called(self, *roles: str) -> list[str]:
        """The computations that it calls in these roles, such as `body` or `calls`."""
        found = re.findall(rf"\b(?:{'|'.join(roles)})=(\{{[^}}]*\}}|%?[\w.-]+)", self.attributes)
        return [name for names in found for name in re.findall(r"[\w.-]+", names)]


@dataclass
class Traffic:
    """What one device moves in one execution of a program.

    sent: collective's kind → bytes sent to other devices.
    collectives: its kind → how many of them.
    memory: bytes read from and written to memory, on-chip memory left out; an upper bound
      where a fusion reads only some rows of an operand.
    endless: loops whose length the compiler does not know; their bodies count once.
    """

    sent: dict[str, float] = field(default_factory=dict)
    collectives: dict[str, int] = field(default_factory=dict)
    memory: float = 0.0
    endless: int = 0


def traffic(text: str, devices: int) -> Traffic:
    """What a device moves when the program runs once.

    Args:
      text: the optimised program of one device.
      devices: how many run it.
    """
    program, entry = computations(text)
    total, chains = Traffic(), set()

    def visit(name: str, times: int, fused: bool) -> None:
        shapes = {each.name: each.shape for each in program[name]}
        for each in program[name]:
            kind = each.opcode.removesuffix("-start")
            # The TPU's compiler spreads a collective over several fusions, a link of one chain
            # in each; and writes a reduce-scatter as an all-reduce in a fusion of that name.
            chain = re.search(r'chain_id="(\d+)"', each.attributes)
            if kind in RING and not (chain and chain[1] in chains):
                chains.update([chain[1]] if chain else [])
                size = sum(nbytes(shapes[operand]) for operand in each.operands)
                scatters = kind == "all-reduce" and name.startswith("all-reduce-scatter")
                kind = "reduce-scatter" if scatters else kind
                sent = size * RING[kind](group_size(each.attributes, devices))
                total.sent[kind] = total.sent.get(kind, 0.0) + times * sent
                total.collectives[kind] = total.collectives.get(kind, 0) + times
            if not fused:
                total.memory += times * moved(each, shapes)
            if each.opcode == "while":
                trips = trip_count(each, program)
                total.endless += trips is None
                for body in each.called("body", "condition"):
                    visit(body, times * (trips or 1), fused)
            for body in each.called("branch_computations", "true_computation", "false_computation"):
                visit(body, times, fused)
            if each.opcode in ("call", "async-start"):
                for body in each.called("to_apply", "calls"):
                    visit(body, times, fused)
            elif each.opcode == "fusion":
                for body in each.called("calls"):
                    visit(body, times, True)

    visit(entry, 1, False)
    return total


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """A program's computations by name, and the name of the one that is run."""
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


def arrays(shape: str) -> Iterator[tuple[int, bool]]:
    """The bytes of each array in a shape, and whether it is in the device's main memory."""
    for dtype, sizes, layout in ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        elements = math.prod(int(size) for size in sizes.split(",") if size)
        yield math.ceil(elements * bits / 8), not re.search(r"S\([1-9]", layout)


def nbytes(shape: str) -> int:
    """The bytes of all arrays in a shape."""
    return sum(size for size, _ in arrays(shape))


def moved(each: Instruction, shapes: dict[str, str]) -> int:
    """The bytes that an instruction reads from main memory and writes to it."""
    if FREE.fullmatch(each.opcode) or 'target="ConcatBitcast"' in each.attributes:
        return 0
    written = list(arrays(each.shape))
    if each.opcode in ("copy-start", "slice-start"):
        # A tuple of what is copied and what it becomes; only the smaller of the two is moved.
        (one, here), (other, there), *_ = written
        return min(one, other) * (here + there)
    read = [array for operand in each.operands for array in arrays(shapes[operand])]
    if each.opcode in ("slice", "dynamic-slice", "gather"):
        read = [(size, main) for size, _ in written for _, main in read[:1]]
    if each.opcode in ("dynamic-update-slice", "scatter"):
        written = read = read[-1:] if each.opcode == "scatter" else read[1:2]
    return sum(size for size, main in written + read if main)


def group_size(attributes: str, devices: int) -> int:
    """How many devices take part in each group of a collective.

    XLA writes the groups as lists, {{0,2},{1,3}}; as their number and size, [2,2]<=[4]; or as
    axes of a mesh, mesh['a'=2,'b'=2] {'a'}. Without any, all devices are one group.
    """
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])  # 'a':(1)2 is a part of an axis
        return math.prod(int(part or axes[axis]) for axis, part in parts)
    return devices


def trip_count(loop: Instruction, program: dict[str, list[Instruction]]) -> int | None:
    """How often a loop runs, as far as the program says: a count from 0 to a constant."""
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(match[1])
    condition = [each for name in loop.called("condition") for each in program[name]]
    bounds = [each.inside for each in condition if each.opcode == "constant"]
    below = [each for each in condition if "direction=LT" in each.attributes]
    return int(bounds[0]) if len(bounds) == len(below) == 1 else None
