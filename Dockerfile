# syntax=docker/dockerfile:1
# CPU:  docker build -t wsi-pipeline --build-arg TORCH_INDEX=URL .
#       where URL is the index of CPU wheels that PyTorch's own "Get started" page names; without
#       it the image gets the default wheels, which also run on a CPU but are several GB larger.
# GPU:  docker build -t wsi-pipeline:gpu --build-arg TORCH=cuda .
#       The GPU wheels of torch bring their own CUDA libraries: the host needs the driver and
#       nvidia-container-toolkit (docker run --gpus all, apptainer --nv).
# Run:  docker run --rm -v "$PWD:/data" wsi-pipeline 'slides/*.svs' --out results
ARG BASE=python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE} AS build
ARG TORCH=cpu
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# torch first: this layer is rebuilt only when its pin changes.
COPY constraints-cpu.txt ./
# hadolint ignore=DL3013
RUN if [ "${TORCH}" = cpu ]; then \
      pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -c constraints-cpu.txt torch ; \
    else pip install torch ; fi
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY models ./models
COPY wsi_pipeline ./wsi_pipeline
RUN pip install .
# Compiled kernels go into the image: a job of an array should not compile them again.
ENV NUMBA_CACHE_DIR=/opt/numba
RUN mkdir -p "$NUMBA_CACHE_DIR" && wsi doctor && chmod -R a+rwX "$NUMBA_CACHE_DIR"

# hadolint ignore=DL3006
FROM ${BASE} AS runtime
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini procps \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 wsi
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/numba /opt/numba
ENV PATH=/opt/venv/bin:$PATH \
    NUMBA_CACHE_DIR=/opt/numba \
    PYTHONUNBUFFERED=1 \
    TINI_SUBREAPER=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
LABEL org.opencontainers.image.title="wsi-pipeline" \
      org.opencontainers.image.licenses="BSD-3-Clause"
USER 1000:1000
WORKDIR /data
ENTRYPOINT ["tini", "--", "wsi-run"]
CMD ["--help"]
