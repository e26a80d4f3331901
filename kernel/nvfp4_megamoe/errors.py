"""Errors that users see; each message names the thing, what was expected and what to do."""


class CheckpointError(ValueError):
    """A checkpoint file or tensor that must not be served."""


class UnsupportedError(ValueError):
    """A geometry, device or setting that no kernel here computes."""
