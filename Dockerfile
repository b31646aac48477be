# ablab on a host with an NVIDIA driver and its container toolkit:
#
#   docker build -t ablab .
#   mkdir -p ablab-store
#   docker run --gpus all -v "$PWD/ablab-store:/store" ablab run quickstart
#
# CUDA comes with torch, of the files whose digests stand in the locks; the image adds a C compiler, which Triton and
# torch.compile call.
FROM python:3.13-slim-bookworm

# The compiler's version changes no bit of a run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /ablab
COPY constraints.lock constraints-cuda.lock ./
RUN pip install --no-cache-dir --require-hashes --no-deps -r constraints.lock -r constraints-cuda.lock

COPY pyproject.toml README.md LICENSE ./
COPY ablations ablations
COPY analysis analysis
COPY configs configs
COPY core core
COPY experiments experiments
COPY kernels kernels
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

# Sheets and plugins of yours are mounted where it starts: -v "$PWD:/work".  Who owns the store: --user "$(id -u)".
RUN useradd --create-home --uid 1000 ablab && mkdir /store /work && chown ablab /store /work
USER 1000
WORKDIR /work
ENV ABLAB_STORE=/store
ENTRYPOINT ["ablab"]
CMD ["--help"]
