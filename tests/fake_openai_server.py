"""A server with the part of vLLM's API that measurements use, and log lines like its: fake_openai_server.py PORT.

``--refuse`` ends at once with an error, ``--silent`` never becomes ready, ``--shift X`` adds X to log-probabilities.
``--compile`` writes into the caches as compilers do: at the start, and at the first prompt of each 64 tokens.
``--slow S`` takes S seconds for each request, ``--break N`` answers the prompts after the Nth with status 500, and
``--die N`` ends then. ``--key K`` refuses requests without that key. /health is held back as in the patched vLLM.
"""

import itertools
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model_executor" / "nvfp4"))

import health_hold


def option(name, default):
    return type(default)(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else default


PROMPTS = itertools.count(1)
SHIFT = float(sys.argv[sys.argv.index("--shift") + 1]) if "--shift" in sys.argv else 0.0
LOG = """\
INFO [nvfp4.py:280] Using 'NVFP4_MEGAMOE' NvFp4 MoE backend out of potential backends: ['NVFP4_MEGAMOE', 'MARLIN'].
INFO NVFP4 experts run on nvfp4_megamoe: backend sm90, w4a16
INFO Available KV cache memory: 12.5 GiB
INFO GPU KV cache size: 52,046 tokens, Maximum concurrency for 2,048 tokens per request: 25.41x
WARNING TileLang JIT compilation during inference: mhc_pre. This causes a latency spike; consider extending warmup
WARNING TileLang JIT compilation during inference: mhc_pre. This causes a latency spike; consider extending warmup
"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, body, status=200):
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def refused(self):
        key = option("--key", "")
        return key and self.headers["Authorization"] != f"Bearer {key}"

    def do_GET(self):
        if self.path == "/health":
            self.reply({}, 503 if health_hold.held() else 200)
        elif self.refused():
            self.reply({"error": "unauthorized"}, 401)
        else:
            self.reply({"data": [{"id": "fake", "max_model_len": 2048}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count, number = body["max_tokens"], next(PROMPTS)
        time.sleep(option("--slow", 0.0))
        if 0 < option("--die", 0) < number:
            os._exit(3)
        if "--compile" in sys.argv:
            compiled("DG_JIT_CACHE_DIR", f"kernel.{len(body['prompt']) // 64}")
        if self.refused() or 0 < option("--break", 0) < number:
            self.reply({"error": "EngineCore encountered an issue"}, 401 if self.refused() else 500)
        elif len(body["prompt"]) > 2000:
            self.reply({"error": "the prompt is too long"}, 400)
        elif body.get("stream"):
            self.send_response(200)
            self.end_headers()
            for number in range(count):
                time.sleep(0.01)
                self.wfile.write(f"data: {json.dumps({'choices': [{'text': str(number)}]})}\n\n".encode())
            usage = {"choices": [], "usage": {"completion_tokens": count}}
            self.wfile.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
            self.close_connection = True
        else:
            entries = [None, *({str(t): {"logprob": -1.0 - t / 500 + SHIFT}} for t in body["prompt"][1:])]
            tokens = [f"token_id:{n + int(10 * SHIFT)}" for n in range(count)]
            top = [{token: -0.5, "token_id:1000": -2.0} for token in tokens]
            self.reply({"choices": [{"prompt_logprobs": entries, "logprobs": {"tokens": tokens, "top_logprobs": top}}]})


def compiled(variable, name):
    path = Path(os.environ[variable], name, "kernel.cubin")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("sm_90a")


if __name__ == "__main__":
    print(LOG, flush=True)
    if "--refuse" in sys.argv:
        sys.exit("ValueError: this checkpoint cannot be served")
    if "--silent" in sys.argv:
        time.sleep(600)
    if "--compile" in sys.argv:
        compiled("TRITON_CACHE_DIR", "ab")
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
