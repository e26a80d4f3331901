"""What the model reports; every message names the instruction and, where there is one, the warp."""

from __future__ import annotations


class ModelError(Exception):
    """A fault of the program under test, or something that the model does not know."""


class UnknownInstruction(ModelError):
    """An instruction, modifier, operand or directive that the model does not implement; it never guesses."""


class OutOfBounds(ModelError):
    """An access outside every buffer, misaligned, or outside shared memory or TMEM."""


class UndefinedRead(ModelError):
    """A read of shared memory that nothing wrote, or that an asynchronous copy is still writing."""


class ProxyError(ModelError):
    """The asynchronous proxy reads shared memory that a thread wrote without fence.proxy.async since."""


class BarrierError(ModelError):
    """More arrivals than a barrier expects, an uninitialised barrier, or a transaction count out of range."""


class Deadlock(ModelError):
    """No warp can go on and no asynchronous operation is under way."""
