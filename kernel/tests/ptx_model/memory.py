"""Global, parameter and shared memory: bounds, alignment, and what shared memory may be read."""

from __future__ import annotations

import numpy as np

from .errors import OutOfBounds, ProxyError, UndefinedRead

SHARED_POISON = 0xA5
WINDOW_BITS = 24
UNDEFINED, DEFINED, IN_FLIGHT = 0, 1, 2


class GlobalMemory:
    """Buffers at fixed addresses; anything between them is out of bounds."""

    def __init__(self) -> None:
        self._buffers: list[tuple[int, str, np.ndarray]] = []

    def add(self, address: int, array: np.ndarray, name: str = "") -> int:
        """Map a contiguous array at ``address``; the program reads and writes the array itself."""
        if not array.flags.c_contiguous:
            raise ValueError("A buffer must be contiguous.")
        self._buffers.append((address, name, array.reshape(-1).view(np.uint8)))
        return address

    def find(self, address: int, size: int) -> tuple[np.ndarray, int]:
        """Bytes of the buffer that holds [address, address + size), and the offset in it."""
        for base, _, data in self._buffers:
            if base <= address and address + size <= base + data.size:
                return data, address - base
        near = min(self._buffers, key=lambda b: abs(address - b[0]), default=None)
        hint = f"; nearest is {near[1] or 'a buffer'} at {near[0]:#x}, {near[2].size} bytes" if near else ""
        raise OutOfBounds(f"global access of {size} bytes at {address:#x} is in no buffer{hint}")

    def gather(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """uint8 [n, size] at n addresses."""
        data, index = self._index(addresses, size)
        return data[index] if data is not None else np.stack([self._bytes(int(a), size) for a in addresses])

    def scatter(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Write uint8 [n, size]; of equal addresses one lane wins."""
        size = values.shape[1]
        data, index = self._index(addresses, size)
        if data is not None:
            data[index] = values
            return
        for address, value in zip(addresses, values, strict=True):
            self._bytes(int(address), size)[:] = value

    def _bytes(self, address: int, size: int) -> np.ndarray:
        data, offset = self.find(address, size)
        return data[offset : offset + size]

    def _index(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """One buffer for all addresses, and byte indices [n, size]; None where they lie in several."""
        low, high = int(addresses.min()), int(addresses.max())
        for base, _, data in self._buffers:
            if base <= low and high + size <= base + data.size:
                offsets = (addresses - np.uint64(base)).astype(np.int64)
                return data, offsets[:, None] + np.arange(size)
        return None, None


class SharedMemory:
    """One block's shared memory with the state of every byte.

    ``state``: never written, defined, or being written by an asynchronous copy. ``writer``: warp whose write through
    the generic proxy no fence.proxy.async has covered yet, plus one. ``strict`` turns a read of a byte that is not
    defined into an error; ``proxies`` does so for an asynchronous read of an unfenced byte.
    """

    def __init__(self, size: int, strict: bool, proxies: bool) -> None:
        self.data = np.full(size, SHARED_POISON, np.uint8)
        self.state = np.zeros(size, np.uint8)
        self.writer = np.zeros(size, np.int16)
        self.strict, self.proxies = strict, proxies
        self._unfenced: dict[int, list[np.ndarray]] = {}

    def check(self, offset: int, size: int) -> None:
        if offset < 0 or offset + size > self.data.size:
            raise OutOfBounds(f"shared access of {size} bytes at {offset:#x}, the block has {self.data.size:#x}")

    def read(self, index: np.ndarray, asynchronous: bool = False, unwritten: bool = False) -> np.ndarray:
        """Bytes at ``index`` of any shape; ``asynchronous`` reads go through the asynchronous proxy.

        ``unwritten``: bytes that were never written may be among them, for an operand whose padding is of no account.
        """
        if index.size and (int(index.min()) < 0 or int(index.max()) >= self.data.size):
            raise OutOfBounds(f"shared access at {int(index.max()):#x}, the block has {self.data.size:#x} bytes")
        if self.strict:
            state = self.state[index]
            wrong = state == IN_FLIGHT if unwritten else state != DEFINED
            if wrong.any():
                at = int(index[wrong][0])
                what = "is still being written" if self.state[at] == IN_FLIGHT else "was never written"
                raise UndefinedRead(f"shared byte {at:#x} {what}")
        if asynchronous and self.proxies:
            writer = self.writer[index]
            if writer.any():
                at = int(index[writer != 0][0])
                raise ProxyError(
                    f"shared byte {at:#x}, written by warp {int(self.writer[at]) - 1}, is read through the "
                    "asynchronous proxy without fence.proxy.async between"
                )
        return self.data[index]

    def write(self, index: np.ndarray, values: np.ndarray, warp: int | None) -> None:
        """Write bytes; ``warp`` through the generic proxy, None through the asynchronous one."""
        if index.size and (int(index.min()) < 0 or int(index.max()) >= self.data.size):
            raise OutOfBounds(f"shared access at {int(index.max()):#x}, the block has {self.data.size:#x} bytes")
        self.data[index] = values
        self.state[index] = DEFINED
        if warp is None:
            self.writer[index] = 0
        else:
            self.writer[index] = warp + 1
            self._unfenced.setdefault(warp, []).append(index)

    def begin_write(self, index: np.ndarray) -> None:
        """An asynchronous copy was issued: its destination is undefined until it completes."""
        if index.size and (int(index.min()) < 0 or int(index.max()) >= self.data.size):
            raise OutOfBounds(f"shared access at {int(index.max()):#x}, the block has {self.data.size:#x} bytes")
        self.data[index] = SHARED_POISON
        self.state[index] = IN_FLIGHT

    def fence(self, warp: int) -> None:
        """fence.proxy.async by a warp: its writes become visible to the asynchronous proxy."""
        for index in self._unfenced.pop(warp, ()):
            mine = self.writer[index] == warp + 1
            self.writer[index[mine]] = 0


def shared_rank(address: int) -> int:
    """Rank in the cluster of the block that a shared address belongs to."""
    return address >> WINDOW_BITS


def shared_offset(address):
    """Offset in that block's shared memory; of an int or a uint64 array."""
    mask = (1 << WINDOW_BITS) - 1
    return address & (np.uint64(mask) if isinstance(address, np.ndarray) else mask)
