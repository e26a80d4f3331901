"""The machine: grid, clusters, blocks, the scheduler of warps and the engine of asynchronous operations.

Warps are stepped in random order for random numbers of instructions; asynchronous operations complete at random times
in random order, except that the tensor core's operations of one block stay in order. Some warps are slow, and copies
may be late, for as long as anything else goes on. Everything random comes from one seed. Clusters run one after the
other, in random order.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import numpy as np

from . import copies, floats, integers, loads, mbarrier, mma, synchronize, tensor_copies, tmem, wgmma  # noqa: F401
from .errors import BarrierError, Deadlock, ModelError, OutOfBounds
from .isa import NOT_READY, decode
from .memory import WINDOW_BITS, GlobalMemory, SharedMemory
from .parser import Program, parse
from .warp import Warp

_QUIET_ROUNDS = 60
# Shares of the rounds in which a warp runs, and exponents of the share of the copies under way that end in a round.
_PACES, _LATENESS = (1.0, 1.0, 1.0, 0.1, 0.02), (1, 1, 8)
SHARED_LIMIT = 232448 + 1024


class Cta:
    """One block: shared memory, TMEM, barriers."""

    def __init__(self, machine: Machine, cluster: Cluster, rank: int, coordinates: tuple[int, ...]) -> None:
        self.cluster, self.rank, self.coordinates = cluster, rank, coordinates
        self.window = rank << WINDOW_BITS
        self.shared = SharedMemory(machine.shared_bytes, machine.strict, machine.proxies)
        self.barriers: dict[int, mbarrier.Mbarrier] = {}
        self.named_barriers: dict[int, dict[str, int]] = {}
        self.tmem = tmem.TensorMemory()
        self.tensor_queue: deque[tuple[str, Callable[[], None]]] = deque()
        self.warps = [Warp(machine, self, index) for index in range(machine.threads // 32)]


class Cluster:
    """The blocks that run together, and their asynchronous operations under way."""

    def __init__(self, machine: Machine, origin: tuple[int, ...]) -> None:
        self.machine = machine
        self.pending: list[tuple[str, Callable[[], object]]] = []
        self.generation = 0
        self.arrived: set[Warp] = set()
        x, y, z = machine.cluster_shape
        self.ctas: list[Cta] = []
        for rank in range(x * y * z):
            inside = (rank % x, rank // x % y, rank // (x * y))
            coordinates = tuple(base + step for base, step in zip(origin, inside, strict=True))
            self.ctas.append(Cta(machine, self, rank, coordinates))
        self.warps = [warp for cta in self.ctas for warp in cta.warps]
        self.paces = {warp: machine.random.choice(_PACES) for warp in self.warps}
        self.lateness = machine.lateness or machine.random.choice(_LATENESS)

    def cta(self, rank: int) -> Cta:
        if rank >= len(self.ctas):
            raise OutOfBounds(f"shared address of block {rank} in a cluster of {len(self.ctas)}")
        return self.ctas[rank]

    def shared(self, rank: int) -> SharedMemory:
        return self.cta(rank).shared

    def shared_barriers(self, rank: int) -> dict[int, mbarrier.Mbarrier]:
        return self.cta(rank).barriers

    def arrive(self, warp: Warp) -> None:
        """A warp arrives at the cluster's barrier; warps that have exited count as arrived."""
        self.arrived.add(warp)
        self.settle()

    def settle(self) -> None:
        """Open the cluster's barrier if every living warp has arrived."""
        if self.arrived and all(warp.done or warp in self.arrived for warp in self.warps):
            self.arrived.clear()
            self.generation += 1
        self.machine.events += 1

    def submit(self, what: str, operation: Callable[[], object]) -> None:
        """Call ``operation`` some time later, in any order, again and again while it returns NOT_READY."""
        self.pending.append((what, operation))


class Machine:
    """Runs one launch.

    Args:
        ptx: text, or a parsed program.
        params: the kernel's parameter bytes.
        memory: the buffers that the kernel may touch.
        grid, block, cluster: sizes in blocks, threads, blocks.
        dynamic_shared: bytes of launch-time shared memory.
        seed: of every random choice.
        strict: a read of shared memory that is not defined is an error, and tcgen05.ld needs its wait.
        proxies: an asynchronous read of bytes that no fence.proxy.async covers is an error.
        approximation_ulps: how far ``.approx`` functions may be off.
        lateness: how late copies may be, above 0: the share that completes in a round is a random number to this power;
            by the seed where None.
    """

    def __init__(
        self,
        ptx: str | Program,
        params: bytes,
        memory: GlobalMemory,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        dynamic_shared: int = 0,
        cluster: tuple[int, int, int] = (1, 1, 1),
        seed: int = 0,
        strict: bool = True,
        proxies: bool = True,
        approximation_ulps: int = 0,
        lateness: int | None = None,
    ) -> None:
        self.program = program = parse(ptx) if isinstance(ptx, str) else ptx
        self.code = [_decoded(ins, program) for ins in program.instructions]
        self.params = np.frombuffer(params, np.uint8)
        self.memory, self.grid, self.block, self.cluster_shape = memory, grid, block, cluster
        self.threads = block[0]
        self.shared_bytes = program.dynamic + dynamic_shared
        self.strict, self.proxies, self.approximation_ulps = strict, proxies, approximation_ulps
        self.random, self.noise = random.Random(seed), np.random.default_rng(seed)
        self.lateness = lateness
        self.give_up = 0.02
        self.events = self.polls = self.executed = 0
        self.visited: set[int] = set()
        self._check(params)

    def _check(self, params: bytes) -> None:
        program = self.program
        if len(params) < program.param_bytes:
            raise ModelError(f"the kernel takes {program.param_bytes} parameter bytes, not {len(params)}")
        if self.block[1:] != (1, 1) or self.threads % 32 or not 0 < self.threads <= 1024:
            raise ModelError(f"block {self.block} is not a row of whole warps")
        if program.block and tuple(program.block[:1]) != self.block[:1]:
            raise ModelError(f"the kernel requires blocks of {program.block}, not {self.block}")
        if any(size % step for size, step in zip(self.grid, self.cluster_shape, strict=True)):
            raise ModelError(f"grid {self.grid} is not a multiple of the cluster {self.cluster_shape}")
        if self.shared_bytes > SHARED_LIMIT:
            raise ModelError(f"{self.shared_bytes} bytes of shared memory, the limit is {SHARED_LIMIT}")

    def run(self) -> None:
        """Run every cluster to its end.

        Raises:
            ModelError: any fault, with the warp and the instruction.
        """
        x, y, z = self.cluster_shape
        origins = [
            (i, j, k)
            for k in range(0, self.grid[2], z)
            for j in range(0, self.grid[1], y)
            for i in range(0, self.grid[0], x)
        ]
        self.random.shuffle(origins)
        with np.errstate(all="ignore"):
            for origin in origins:
                self._run_cluster(Cluster(self, origin))

    def _run_cluster(self, cluster: Cluster) -> None:
        quiet, living = 0, list(cluster.warps)
        while living or cluster.pending or any(cta.tensor_queue for cta in cluster.ctas):
            events, polls, executed = self.events, self.polls, self.executed
            self.random.shuffle(living)
            for warp in living:
                if quiet or self.random.random() < cluster.paces[warp]:
                    warp.run(self.random.randint(20, 400))
            living = [warp for warp in living if not warp.done]
            completed = self._complete(cluster, 1 if quiet else cluster.lateness)
            # Instructions of polling loops are no progress: only they ran if nothing was stored and no barrier moved.
            worked = self.executed - executed > 40 * (self.polls - polls)
            idle = self.events == events and not completed and not worked
            quiet = quiet + 1 if idle else 0
            # Where nothing moves, suspended waits give up more often, so that code which polls others gets on.
            self.give_up = 0.02 if quiet == 0 else 0.3
            if quiet > _QUIET_ROUNDS:
                raise Deadlock("DEADLOCK\n" + "\n".join(warp.where() for warp in living))
        self._check_end(cluster)

    def _complete(self, cluster: Cluster, lateness: int) -> bool:
        """Complete some of the asynchronous operations."""
        done = False
        if cluster.pending:
            self.random.shuffle(cluster.pending)
            share = self.random.random() ** lateness
            now, later = [], []
            for item in cluster.pending:
                (now if self.random.random() < share else later).append(item)
            cluster.pending = later
            for what, operation in now:
                if _attributed(what, operation) is NOT_READY:
                    cluster.pending.append((what, operation))
                else:
                    done = True
        for cta in cluster.ctas:
            while cta.tensor_queue and self.random.random() < 0.8:
                _attributed(*cta.tensor_queue.popleft())
                done = True
        if done:
            self.events += 1
        return done

    def _check_end(self, cluster: Cluster) -> None:
        for cta in cluster.ctas:
            if cta.tmem.allocated:
                raise BarrierError(f"cta {cta.coordinates} exits with {cta.tmem.allocated} TMEM columns allocated")

    def on_exit(self, warp: Warp) -> None:
        """A warp ended: its copies still complete, and barriers no longer wait for it."""
        copies.finish(warp)
        warp.cta.cluster.settle()


def _attributed(what: str, operation: Callable[[], object]) -> object:
    try:
        return operation()
    except ModelError as error:
        if not error.args[0].startswith("["):
            error.args = (f"[asynchronous] {error.args[0]} | {what}",)
        raise


def _decoded(ins, program: Program):
    """(instruction, execution or None for control flow, guard register and sense or None)."""
    guard = None
    if ins.predicate is not None:
        guard = (program.registers[ins.predicate[0]][1], ins.predicate[1])
    if ins.opcode in ("bra", "bra.uni", "ret", "exit"):
        if ins.opcode.startswith("bra") and ins.operands[0] not in program.labels:
            raise ModelError(f"no such label, {ins}")
        return ins, None, guard
    return ins, decode(ins, program), guard
