# Two images of one project. GPU (the default): docker build . ; CPU demo: docker build --target cpu .
#
#   gpu  vLLM's own image, with this project's kernels compiled, its files laid over vLLM and its patches applied
#   cpu  vLLM's CPU build from requirements/cpu.txt, the same patches and files, and a tiny checkpoint to serve
#
# The gpu target needs no network beyond its base image. docs/operations.md describes user, ports, volumes and settings.
ARG BASE_IMAGE=vllm/vllm-openai:v0.32.0
ARG CPU_BASE_IMAGE=python:3.11-slim-bookworm

FROM ${CPU_BASE_IMAGE} AS cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
# torch comes from the configured package index if that has the CPU build, else from PyTorch's own, as in the Makefile.
ARG TORCH=torch==2.13.0+cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# g++ compiles the CPU kernel for the machine that serves, at the first start; vLLM's extension links against libnuma.
# hadolint ignore=DL3008
RUN if ! { command -v g++ && ldconfig -p | grep -q libnuma.so.1; } >/dev/null; then \
      apt-get update && apt-get install -y --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/*; \
    fi

ENV PATH=/opt/venv/bin:$PATH
COPY requirements/cpu.txt /tmp/cpu.txt
# A pip.conf for a package index of your own: docker build --secret id=pip,src=pip.conf
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /opt/venv \
 && { python -m pip install --no-cache-dir --no-deps "$TORCH" \
      || python -m pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" "$TORCH"; } \
 && python -m pip install --no-cache-dir --no-deps -r /tmp/cpu.txt

RUN --mount=type=bind,source=kernel,target=/src/kernel,rw \
    python -m pip install --no-cache-dir --no-deps --no-build-isolation /src/kernel

WORKDIR /opt/nvfp4-megamoe
COPY scripts scripts
COPY patches patches
COPY model_executor model_executor
RUN python scripts/patch_vllm.py apply && python scripts/patch_vllm.py verify \
 && python scripts/make_checkpoint.py /models/deepseek-v4-tiny --preset tiny --format nvfp4

# As in vLLM's own image: user 2000 of group 0, so that any other user of group 0 can serve as well.
RUN getent passwd 2000 >/dev/null || useradd --uid 2000 --gid 0 --create-home --home-dir /home/vllm vllm; \
    install -d -o 2000 -g 0 -m 0775 /home/vllm /cache /run/mega-moe
USER 2000:0
ENV HOME=/home/vllm \
    USER=vllm \
    PYTHONUNBUFFERED=1 \
    MEGA_MOE_CACHE_DIR=/cache \
    MEGA_MOE_STATUS_DIR=/run/mega-moe \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1
EXPOSE 8000 8001
HEALTHCHECK --interval=5s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "/opt/nvfp4-megamoe/scripts/entrypoint.py"]
CMD ["/models/deepseek-v4-tiny", "--served-model-name", "deepseek-v4-tiny", "--tokenizer-mode", "deepseek_v4", \
     "--max-model-len", "4096", "--max-num-seqs", "16", \
     "--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
LABEL org.opencontainers.image.title="deepseek-v4-nvfp4 (CPU demo)" \
      org.opencontainers.image.description="vLLM serving a tiny DeepSeek-V4 NVFP4 checkpoint on the CPU" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"

FROM ${BASE_IMAGE} AS gpu
ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
# Kernels without which the build fails; "none" builds what the base image has the compilers for, and says so.
ARG REQUIRE_KERNELS=sm90,sm100
# hadolint ignore=DL3002
USER 0

RUN --mount=type=bind,source=kernel,target=/src/kernel,rw \
    --mount=type=bind,source=scripts/build_kernels.py,target=/src/build_kernels.py \
    python3 -m pip install --no-cache-dir --no-deps --no-build-isolation /src/kernel \
 && python3 /src/build_kernels.py --require "$REQUIRE_KERNELS" --report /opt/nvfp4-megamoe/kernels.json

WORKDIR /opt/nvfp4-megamoe
COPY scripts scripts
COPY patches patches
COPY model_executor model_executor
RUN python3 scripts/patch_vllm.py apply && python3 scripts/patch_vllm.py verify

# vLLM's image has user 2000 of group 0; any other user of group 0 can serve as well.
RUN getent passwd 2000 >/dev/null || useradd --uid 2000 --gid 0 --create-home --home-dir /home/vllm vllm; \
    install -d -o 2000 -g 0 -m 0775 /home/vllm /cache /run/mega-moe && install -d /models
USER 2000:0
# vLLM's image holds no compiled Python files, and this user may not write them beside the sources: without a place for
# them every process of every start would compile all that it imports.
ENV HOME=/home/vllm \
    USER=vllm \
    PYTHONUNBUFFERED=1 \
    PYTHONPYCACHEPREFIX=/cache/python \
    MEGA_MOE_CACHE_DIR=/cache \
    MEGA_MOE_STATUS_DIR=/run/mega-moe \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1
EXPOSE 8000 8001
# During the start period, as long as the longest load, failures do not count and the first success ends it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60m --retries=6 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "/opt/nvfp4-megamoe/scripts/entrypoint.py"]
LABEL org.opencontainers.image.title="deepseek-v4-nvfp4" \
      org.opencontainers.image.description="vLLM 0.32.0 serving DeepSeek-V4 from ModelOpt NVFP4 checkpoints" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
