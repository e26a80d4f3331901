"""What the preflight has to know of vLLM's flags: model, ranks, context and memory share. vLLM parses them again."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple, NoReturn

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class FlagError(ValueError):
    """A flag that cannot be used; the message names it and says what is expected."""


class Serving(NamedTuple):
    """``ranks`` in all, ``ranks_here`` on this host; ``max_model_len`` and ``memory_share`` are None if not given."""

    model: Path
    ranks: int
    ranks_here: int
    max_model_len: int | None
    memory_share: float | None


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
    )


def length(text: str | None) -> int | None:
    """Tokens in vLLM's notation: 4096, 128k (decimal), 128K (binary); None for ``auto`` and what vLLM finds itself."""
    if text is None or text in ("auto", "-1"):
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", text)
    if match is None:
        raise FlagError(f"--max-model-len {text}: expected a number of tokens such as 32768 or 128k, or auto")
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
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return value
