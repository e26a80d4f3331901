"""What preflight and warm-up have to know of vLLM's flags: model, ranks, context, memory share, address, batch bounds.

vLLM parses them again.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import NamedTuple, NoReturn

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class FlagError(ValueError):
    """A flag that cannot be used; the message names it and says what is expected."""


# vLLM's largest defaults, those of the largest GPUs: warming more than a server can reach costs little.
_BATCHED_TOKENS, _SEQUENCES = 16384, 1024


class Api(NamedTuple):
    """Where the server answers, and how large its batches can be.

    ``engines``: data-parallel engines that share this API. ``unreachable``: why no request can be sent, None if it can.
    """

    base_url: str
    port: int
    key: str | None
    engines: int
    sequences: int
    batched_tokens: int
    headless: bool
    unreachable: str | None


class Serving(NamedTuple):
    """``ranks`` in all, ``ranks_here`` on this host; ``max_model_len`` and ``memory_share`` are None if not given."""

    model: Path
    ranks: int
    ranks_here: int
    max_model_len: int | None
    memory_share: float | None
    api: Api


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FlagError(message)


def read(arguments: list[str]) -> Serving:
    """Read the flags of ``vllm serve``: dashes or underscores, ``--flag value`` or ``--flag=value``.

    Raises:
        FlagError: no model, a model that is not a directory, or a number that is none.
    """
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    options = _parser().parse_known_args([_dashes(each) for each in arguments])[0]
    model = first or options.model
    if options.config is not None and model is None:
        raise FlagError("--config without a model: give model and parallel sizes as flags beside it")
    if model is None:
        raise FlagError("no model: give the checkpoint's directory as the first argument, or with --model")
    if not Path(model).is_dir():
        raise FlagError(
            f"{model} is not a directory: expected a checkpoint's directory; mount the volume with the checkpoints at "
            "/models and give /models/NAME"
        )
    replica = options.tensor_parallel_size * options.pipeline_parallel_size
    if options.data_parallel_size_local is not None:
        here = replica * options.data_parallel_size_local
    elif options.data_parallel_rank is not None:
        here = replica  # one server a rank, behind a load balancer of its own
    else:
        here = max(1, replica * options.data_parallel_size // options.nnodes)
    return Serving(
        Path(model),
        replica * options.data_parallel_size,
        here,
        length(options.max_model_len),
        options.gpu_memory_utilization,
        _api(options),
    )


def _api(options: argparse.Namespace) -> Api:
    everywhere = {None: "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}
    host = everywhere.get(options.host, f"[{options.host}]" if ":" in (options.host or "") else options.host)
    unreachable = None
    if options.headless:
        unreachable = "a worker (--headless) has no API; the leader's requests warm it"
    elif options.uds:
        unreachable = "the API listens on a Unix socket (--uds)"
    elif options.ssl_keyfile or options.ssl_certfile:
        unreachable = "the API speaks TLS (--ssl-keyfile, --ssl-certfile)"
    return Api(
        f"http://{host}:{options.port}",
        options.port,
        options.api_key[0] if options.api_key else os.environ.get("VLLM_API_KEY") or None,
        1 if options.data_parallel_rank is not None else options.data_parallel_size,
        options.max_num_seqs or _SEQUENCES,
        length(options.max_num_batched_tokens, "--max-num-batched-tokens") or _BATCHED_TOKENS,
        options.headless,
        unreachable,
    )


def length(text: str | None, flag: str = "--max-model-len") -> int | None:
    """Tokens in vLLM's notation: 4096, 128k (decimal), 128K (binary); None for ``auto`` and what vLLM finds itself."""
    if text is None or text in ("auto", "-1"):
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", text)
    if match is None:
        raise FlagError(f"{flag} {text}: expected a number of tokens such as 32768 or 128k, or auto")
    return int(float(match[1]) * _SUFFIXES[match[2]])


def _dashes(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--config")
    parser.add_argument("--tensor-parallel-size", "-tp", type=_positive, default=1)
    parser.add_argument("--pipeline-parallel-size", "-pp", type=_positive, default=1)
    parser.add_argument("--data-parallel-size", "-dp", type=_positive, default=1)
    parser.add_argument("--data-parallel-size-local", "-dpl", type=_positive)
    parser.add_argument("--data-parallel-rank", "-dpn", type=int)
    parser.add_argument("--nnodes", "-n", type=_positive, default=1)
    parser.add_argument("--max-model-len")
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--host")
    parser.add_argument("--port", type=_positive, default=8000)
    parser.add_argument("--uds")
    parser.add_argument("--ssl-keyfile")
    parser.add_argument("--ssl-certfile")
    parser.add_argument("--api-key", nargs="+")
    parser.add_argument("--headless", action="store_true")
    parser.add_argument("--max-num-seqs", type=_positive)
    parser.add_argument("--max-num-batched-tokens")
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return value
