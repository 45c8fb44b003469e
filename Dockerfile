# Targets: `coordinator` (without torch), `cpu` and `gpu` (every stage service). Requires BuildKit.
#
#     docker build --target cpu --build-arg TORCH_INDEX=... -t diffusion-fleet:cpu .
#
# TORCH_INDEX: an additional package index for torch, for the cpu target. PyPI's torch for Linux includes
# CUDA libraries; pytorch.org's index of CPU wheels makes the image several gigabytes smaller.
# Secret pip_conf: a pip.conf for this build (mirrors, find-links, certificates), which is not stored in a layer.
#
#     docker build --secret id=pip_conf,src=$HOME/.config/pip/pip.conf ...

FROM python:3.11-slim AS base
# malloc reuses large buffers for later tensors instead of mapping and page-faulting new ones.
ENV GLIBC_TUNABLES=glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=268435456:glibc.malloc.arena_max=4 \
    PATH=/fleet/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --user-group --home-dir /fleet --create-home fleet \
    && python -m venv /fleet/venv
WORKDIR /fleet
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-m", "common.rpc.probe", "127.0.0.1:50051"]
ENTRYPOINT ["fleet", "serve"]

# The wheel, and its dependencies by target: after a code change, the layers with the dependencies are still cached.
FROM base AS wheel
COPY pyproject.toml ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install "hatchling>=1.27" \
    && python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = project["optional-dependencies"]; \
open("coordinator.txt", "w").write("\n".join(project["dependencies"] + extras["tracing"])); \
open("worker.txt", "w").write("\n".join(extras["worker"])); \
open("gpu.txt", "w").write("\n".join(extras["gpu"]))'
COPY . .
RUN pip wheel --no-deps --no-build-isolation --wheel-dir dist .

FROM base AS coordinator-packages
COPY --from=wheel /fleet/coordinator.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf pip install -r coordinator.txt

FROM coordinator-packages AS cpu-packages
ARG TORCH_INDEX=""
COPY --from=wheel /fleet/worker.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r worker.txt

# Triton compiles kernel launchers with a C compiler at their first run.
FROM coordinator-packages AS gpu-packages
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /fleet/worker.txt /fleet/gpu.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf pip install -r worker.txt -r gpu.txt

FROM coordinator-packages AS coordinator
RUN --mount=type=bind,from=wheel,source=/fleet/dist,target=/dist pip install --no-deps /dist/*.whl
USER 10001:10001

FROM gpu-packages AS gpu
RUN --mount=type=bind,from=wheel,source=/fleet/dist,target=/dist pip install --no-deps /dist/*.whl
# A volume mounted here inherits its owner from the image.
RUN install --directory --owner 10001 --group 10001 /var/cache/fleet
USER 10001:10001

FROM cpu-packages AS cpu
RUN --mount=type=bind,from=wheel,source=/fleet/dist,target=/dist pip install --no-deps /dist/*.whl
USER 10001:10001
