# The server with the embedded base, and beside it `motley base` and `motley worker`, as a non-root user. Builds from a
# checkout: `docker build -t motley .`
#
# torch is the default index's build, which brings CUDA and several GB; for a small image, `--build-arg TORCH_INDEX=` with
# the address of PyTorch's index of CPU builds.
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# torch first and alone, so that a change of our own code does not fetch it again; the cap is that of pyproject.toml.
RUN python -m venv /opt/motley \
    && /opt/motley/bin/pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.11,<2.14"
WORKDIR /src
COPY . .
RUN /opt/motley/bin/pip install ".[server,train]"

FROM python:${PYTHON_VERSION}-slim
LABEL org.opencontainers.image.title="motley" \
      org.opencontainers.image.description="One base language model, every request under its own LoRA" \
      org.opencontainers.image.licenses="Apache-2.0"
# numba takes torch's OpenMP threads where it finds a libgomp, and starts threads of its own where it does not.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 motley \
    && useradd --uid 10001 --gid motley --no-create-home --home-dir /var/lib/motley --shell /usr/sbin/nologin motley \
    && install --directory --owner motley --group motley /var/lib/motley
COPY --from=build /opt/motley /opt/motley
# Neither MOTLEY_AUTH with MOTLEY_TLS_CERT and MOTLEY_TLS_KEY nor MOTLEY_INSECURE is set here: the server refuses to start until its operator chooses.
ENV PATH=/opt/motley/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=passive \
    GOMP_SPINCOUNT=5000 \
    HF_HUB_OFFLINE=1 \
    MOTLEY_LISTEN=0.0.0.0:8470 \
    MOTLEY_METRICS=0.0.0.0:8471 \
    MOTLEY_DATA_DIR=/var/lib/motley
USER 10001:10001
WORKDIR /var/lib/motley
VOLUME /var/lib/motley
EXPOSE 8470 8471
STOPSIGNAL SIGTERM
# Of the server alone: a container that runs another command is started with `--no-healthcheck`.
# On this machine `motley health` speaks TLS if the server does, whatever names its certificate has.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["sh", "-c", "motley health --server 127.0.0.1:${MOTLEY_LISTEN##*:} || exit 1"]
ENTRYPOINT ["motley"]
CMD ["serve"]
