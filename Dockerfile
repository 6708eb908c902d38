# syntax=docker/dockerfile:1
# flowar with the versions that everything is tested with.
#   docker build -t flowar .                               for NVIDIA GPUs: torch's wheels bring CUDA
#   docker build -t flowar:cpu --build-arg DEVICE=cpu .    for CPUs alone, much smaller
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/workspace" flowar:cpu demo
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/workspace" --gpus all --ipc=host flowar train ...
# The recipes are in /opt/flowar/configs. --ipc=host: processes that load data share memory.
# flash-attn is not included: it is compiled against torch and CUDA's compiler.
FROM python:3.11-slim-bookworm

ARG DEVICE=cuda

# torch.compile and DeepSpeed compile small helpers when they are first used.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

COPY . /opt/flowar
RUN --mount=type=cache,target=/root/.cache/pip \
    case "$DEVICE" in \
        cuda) ;; \
        cpu) pip install -c /opt/flowar/constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu \
            $(sed -nE 's/^(torch|torchvision)==.*/&+cpu/p' /opt/flowar/constraints.txt) ;; \
        *) echo "DEVICE=$DEVICE must be cuda or cpu" >&2; exit 1 ;; \
    esac \
    && pip install -c /opt/flowar/constraints.txt /opt/flowar

# Any user may run it (docker run --user): what is compiled or fetched goes to a home that all may write to.
RUN useradd --create-home --uid 1000 flowar && chmod 1777 /home/flowar && mkdir /workspace && chown flowar /workspace
ENV HOME=/home/flowar USER=flowar PYTHONUNBUFFERED=1
USER flowar
WORKDIR /workspace
ENTRYPOINT ["flowar"]
CMD ["--help"]
