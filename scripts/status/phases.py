"""The phases of a rank's start-up in their order, and which of them ask nothing of the rank."""

from __future__ import annotations

START = "start"
MODEL = "model construction"
READ = "checkpoint read"
UPLOAD = "upload"
PREPARE = "weight preparation"
LAYER_TEST = "layer test"
COMPILE = "compile and warm-up"
KV_CACHE = "KV cache"
CAPTURE = "graph capture"
# The server's, once its ranks are ready.
WARM_UP = "warm-up requests"
WAITING = "waiting"
READY = "ready"
STOPPING = "stopping"
STOPPED = "stopped"

ORDER = (START, MODEL, READ, UPLOAD, PREPARE, LAYER_TEST, KV_CACHE, COMPILE, CAPTURE)

# In these a rank waits for others: the CPU time it spends on that is no progress.
PASSIVE = frozenset({WAITING, READY, STOPPED})
ENDED = frozenset({STOPPING, STOPPED})
