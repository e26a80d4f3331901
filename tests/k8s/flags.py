"""vLLM's own parser on what the entrypoint gets, and whether every name in the manifests is one that someone reads."""

from __future__ import annotations

import mmap
import re
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import NoReturn

from .render import ROOT

# Read by programs that the CPU environment lacks: NCCL (https://docs.nvidia.com/deeplearning/nccl) and the NVIDIA
# container toolkit.
_ELSEWHERE = {"NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NVIDIA_VISIBLE_DEVICES"}


class FlagError(ValueError):
    """What vLLM's parser said."""


@cache
def _parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise FlagError(message)

    return make_arg_parser(Parser(prog="vllm serve", allow_abbrev=False))


def parse(arguments: list[str]) -> Namespace:
    """Parse as ``vllm serve`` of the installed, patched vLLM does.

    Raises:
        FlagError: vLLM refuses them.
    """
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    parsed, unknown = _parser().parse_known_args(arguments)
    if unknown:
        raise FlagError(f"unknown: {' '.join(unknown)}")
    try:
        validate_parsed_serve_args(parsed)
    except (TypeError, ValueError) as error:
        raise FlagError(str(error)) from error
    return parsed


@cache
def is_read(variable: str) -> bool:
    """Whether this project, vLLM or PyTorch reads the environment variable."""
    import torch
    import vllm.envs

    if variable in _ELSEWHERE or variable in vllm.envs.environment_variables:
        return True
    quoted = re.compile(rf"""["']{variable}["']""")
    for folder in ("scripts", "kernel/nvfp4_megamoe", "model_executor"):
        if any(quoted.search(path.read_text()) for path in (ROOT / folder).rglob("*.py")):
            return True
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(variable.encode()) >= 0
