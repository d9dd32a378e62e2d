"""``python llama_server.py GGUF PORT [CONTEXT] [SLOTS] [KEY] [PREFIX]``: llama.cpp's own HTTP server, in this process.

PyPI has no llama-server; xllamacpp's wheel holds its code and starts it.
"""

import signal
import sys

import xllamacpp


def main(file: str, port: str, context: str = "4096", slots: str = "8", key: str = "", prefix: str = "") -> None:
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_ctx, params.n_parallel = int(context), int(slots)
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.endpoint_metrics = True
    params.warmup = False
    if key:
        params.api_keys = [key]
    if prefix:
        params.api_prefix = prefix
    server = xllamacpp.Server(params)
    print("listening on", server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
