"""What a compiled TPU program costs, read from its optimised HLO text.

The TPU compiler writes the cycles that it estimates beside each operation it schedules. They are
summed here over the whole program, bodies of loops as often as they run. An operation without an
estimate (collectives, Pallas kernels, sorts) is counted by bytes and operations at stated rates.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from piccolo_jax.planning.topology import Chip

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
# Of an operation without an estimate: shares of the chip's peak, of its memory bandwidth.
KERNEL_PEAK_SHARE, KERNEL_BANDWIDTH_SHARE = 0.4, 0.5
# Of the links around a chip, those of one ring are used: one axis of the torus, both directions.
_LINKS = 2
_SMALL = 2**16  # bytes; an operation without an estimate that moves less is scalar work

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8,
}  # fmt: skip
# Names for what is there already, or the end of what a -start began.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "domain", "opt-barrier", "iota", "add-dependency", "while", "conditional", "call",
}  # fmt: skip
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"}
_PALLAS = "tpu_custom_call"
_CALLS = {
    "while": ("body", "condition"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "call": ("to_apply",),
    "async-start": ("calls",),
}
_PREFETCH = {"copy-start", "slice-start"}
# An asynchronous collective is written in the fusion that starts it, in each that it runs beside
# and in the one that waits for it, always with this in its configuration.
_ASYNC, _ASYNC_START = '"async_collective_fusion_config"', "AsyncCollectiveStart"
# Of the fusion of an all-reduce and the slice that a chip keeps of it, which runs as one.
_SCATTER = "AllReduceScatterFusion"


@dataclasses.dataclass
class Collective:
    """A kind of collective with the bytes of its result, per chip, over the whole program."""

    kind: str
    group: int  # chips that take part in one
    count: float = 0
    bytes: float = 0
    seconds: float = 0


@dataclasses.dataclass
class Unestimated:
    """An operation without the compiler's estimate, over the whole program."""

    name: str
    count: float = 0
    operations: float = 0
    bytes: float = 0
    seconds: float = 0


@dataclasses.dataclass
class Cost:
    """Of one execution of a program on one chip; `prefetch_bytes` move beside other work."""

    cycles: float = 0
    collectives: dict[tuple[str, int], Collective] = dataclasses.field(default_factory=dict)
    unestimated: dict[str, Unestimated] = dataclasses.field(default_factory=dict)
    prefetch_bytes: float = 0
    unknown_loops: int = 0  # loops whose number of trips the text doesn't show, counted once

    def seconds(self, chip: Chip) -> float:
        """Nothing that isn't in one operation for the compiler is taken to overlap."""
        moving = sum(collective.seconds for collective in self.collectives.values())
        others = sum(operation.seconds for operation in self.unestimated.values())
        return self.cycles / chip.clock + moving + others


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str  # what follows the operands
    operand_text: str

    @property
    def estimate(self) -> int | None:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else None

    @property
    def target(self) -> str:
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    def called(self, attribute: str) -> list[str]:
        found = re.search(rf"\b{attribute}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.rest)
        if not found:
            return []
        return [name.strip().lstrip("%") for name in (found[1] or found[2]).split(",")]


_Computations = dict[str, dict[str, _Instruction]]

_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}])([a-z][\w\-]*)\(")


def read(text: str, chip: Chip) -> Cost:
    """The cost of one execution of the program whose optimised HLO is `text`, on each chip."""
    computations, entry = _parse(text)
    cost = Cost()
    for name, times in _executed(computations, entry, 1, cost):
        for instruction in computations[name].values():
            _count(instruction, times, computations, computations[name], chip, cost)
    return cost


def _parse(text: str) -> tuple[_Computations, str]:
    computations: _Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _parse_instruction(found[1], found[2])
            if instruction:
                current[instruction.name] = instruction
    return computations, entry


def _parse_instruction(name: str, body: str) -> _Instruction | None:
    opcode = _OPCODE.search(body)
    if not opcode:
        return None
    depth, end = 0, len(body)
    for i in range(opcode.end() - 1, len(body)):
        depth += (body[i] == "(") - (body[i] == ")")
        if depth == 0:
            end = i
            break
    inner = body[opcode.end() : end]
    operands = tuple(re.findall(r"%([\w.\-]+)", inner))
    return _Instruction(name, opcode[1], body[: opcode.start(1)], operands, body[end + 1 :], inner)


def _executed(
    computations: _Computations, name: str, times: float, cost: Cost
) -> Iterator[tuple[str, float]]:
    """Every computation that is scheduled, and how often it runs; not those inside a fusion."""
    yield name, times
    for instruction in computations[name].values():
        trips = times
        if instruction.opcode == "while":
            count = _trips(instruction, computations)
            cost.unknown_loops += count is None
            trips = times * (count or 1)
        # Of a conditional's branches all are counted, though one runs.
        for attribute in _CALLS.get(instruction.opcode, ()):
            for inner in instruction.called(attribute):
                yield from _executed(computations, inner, trips, cost)


def _trips(loop: _Instruction, computations: _Computations) -> int | None:
    """From the loop's known_trip_count, or its condition `counter < constant` (it starts at 0)."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    condition = computations[loop.called("condition")[0]]
    compare = [i for i in condition.values() if i.opcode == "compare"]
    if len(compare) != 1 or "direction=LT" not in compare[0].rest:
        return None
    limits = [
        int(condition[operand].operand_text)
        for operand in compare[0].operands
        if operand in condition and condition[operand].opcode == "constant"
    ]
    return limits[0] if len(limits) == 1 else None


def _count(
    instruction: _Instruction,
    times: float,
    computations: _Computations,
    scope: dict[str, _Instruction],
    chip: Chip,
    cost: Cost,
) -> None:
    op, estimate = instruction.opcode, instruction.estimate
    cost.cycles += times * (estimate or 0)
    if op in _PREFETCH:
        cost.prefetch_bytes += times * shape_bytes(instruction.shape) / 2  # source and target
    inside = instruction.called("calls") if op == "fusion" else []
    parts = [part for name in inside for part in computations[name].values()]
    fused = [part for part in parts if _kind(part)]
    # By channels they couldn't be told apart: JAX gives all those under shard_map the channel 1.
    starts = any(part.target == _ASYNC_START for part in parts)
    for item in fused or [instruction]:
        if _kind(item) and (starts or _ASYNC not in item.rest):
            scatters = _kind(item) == "all-reduce" and _SCATTER in instruction.rest
            _count_collective(item, times, scatters, chip, cost)
    if (
        estimate is not None
        or fused
        or _kind(instruction)
        or op in _FREE
        or op.endswith(("-start", "-update", "-done"))
        or instruction.target in _FREE_TARGETS
    ):
        return
    moved = shape_bytes(instruction.shape)
    moved += sum(shape_bytes(scope[name].shape) for name in instruction.operands if name in scope)
    if moved < _SMALL:
        return
    kernel = instruction.target == _PALLAS
    name = re.sub(r"[.\d]+$", "", instruction.name) if kernel else instruction.target or op
    flops = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.rest)
    operations = float(flops[1]) if flops else 0.0
    entry = cost.unestimated.setdefault(name, Unestimated(name))
    entry.count += times
    entry.operations += times * operations
    entry.bytes += times * moved
    entry.seconds += times * max(
        operations / (KERNEL_PEAK_SHARE * chip.peak),
        moved / (KERNEL_BANDWIDTH_SHARE * chip.hbm_bandwidth),
    )


def _kind(instruction: _Instruction) -> str | None:
    """The kind of collective that an instruction is or begins."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in COLLECTIVES else None


def _count_collective(
    instruction: _Instruction, times: float, scatters: bool, chip: Chip, cost: Cost
) -> None:
    """Adds a collective: its bytes cross the ring of its group once (all-reduce: twice).

    `scatters`: it is an all-reduce of which each chip keeps a slice.
    """
    kind = "reduce-scatter" if scatters else _kind(instruction) or ""
    group = _group_size(instruction.rest)
    size = shape_bytes(instruction.shape)
    if instruction.opcode.endswith("-start"):
        size /= 2  # its shape holds operand and result
    if instruction.opcode.startswith("reduce-scatter"):
        size *= group  # of what enters
    passes = 2 if kind == "all-reduce" else 1
    share = 1.0 if kind == "collective-permute" else passes * (group - 1) / group
    entry = cost.collectives.setdefault((kind, group), Collective(kind, group))
    entry.count += times
    entry.bytes += times * size
    entry.seconds += times * size * share / (_LINKS * chip.link)


def _group_size(text: str) -> int:
    """Chips per group: of {{0,1},{2,3}}, [2,2]<=[4] or mesh['a'=2,'b'=2] {'a'}."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"('[^']*')=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'[^']*'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(found[1].split(","))
    return 2  # of a permutation: source and target


def shape_bytes(shape: str) -> float:
    """Bytes of the arrays in an HLO shape such as (bf16[8,128]{1,0}, s32[])."""
    return sum(
        _BYTES[kind] * math.prod(map(int, filter(None, sizes.split(","))))
        for kind, sizes in re.findall(r"\b(\w+)\[([\d,]*)\]", shape)
        if kind in _BYTES
    )
