"""Parts of scripts/entrypoint.py: what vLLM's flags say, and the server as a child process."""
