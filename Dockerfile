# gemma3-export in a container: the command line, the server and the runtime, without PyTorch or
# weights. The target is cpu or, by default, cuda.
#
#   docker build -t gemma3-export:cpu --target cpu .
#   docker run --rm -p 127.0.0.1:8000:8000 -e GEMMA3_API_KEY -v "$PWD/bundle:/model:ro" gemma3-export:cpu
#
#   docker build -t gemma3-export:cuda .
#   docker run --rm --gpus all gemma3-export:cuda doctor
#   echo "The sea is" | docker run --rm -i --gpus all -v "$PWD/bundle:/model:ro" gemma3-export:cuda
#
# The host of the cuda image needs the NVIDIA driver (580 or newer) and nvidia-container-toolkit;
# CUDA is installed by pip. docs/cuda.md and docs/cluster.md have the details and say which parts
# have been tested.

FROM scratch AS code

WORKDIR /src

COPY pyproject.toml README.md LICENSE ./
COPY reference/ reference/
COPY exporters/ exporters/
COPY runtimes/ runtimes/
COPY gemma3_export/ gemma3_export/


FROM python:3.13.7-slim-bookworm AS build

WORKDIR /src
RUN python -m venv /opt/gemma3-export
ENV PATH=/opt/gemma3-export/bin:$PATH
COPY constraints.txt ./


FROM build AS build-cuda

# The version that graph placement was checked with.
ARG ONNXRUNTIME_GPU=1.31.1

# The large layer that rarely changes comes first: about 2 GB of CUDA.
RUN pip install --no-cache-dir -c constraints.txt "onnxruntime-gpu[cuda,cudnn]==${ONNXRUNTIME_GPU}"
COPY --from=code /src ./
RUN pip install --no-cache-dir -c constraints.txt ".[cuda,serve,structured]"


FROM build AS build-cpu

COPY --from=code /src ./
RUN pip install --no-cache-dir -c constraints.txt ".[cpu,serve,structured]"


FROM python:3.13.7-slim-bookworm AS base

ENV PATH=/opt/gemma3-export/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1

RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin gemma
WORKDIR /home/gemma
ENTRYPOINT ["gemma3-export"]


FROM base AS cpu

COPY --from=build-cpu /opt/gemma3-export /opt/gemma3-export
USER 10001:10001
EXPOSE 8000

# For `docker run` and Compose; Kubernetes has probes of its own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready')"]

# Serve the bundle mounted at /model. Clients need the key in GEMMA3_API_KEY.
CMD ["serve", "/model", "--host", "0.0.0.0"]


FROM base AS cuda

COPY --from=build-cuda /opt/gemma3-export /opt/gemma3-export

# Tell NVIDIA's container toolkit what to expose, as NVIDIA's own images do.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

# The check opens a CUDA context for a second, so it runs rarely. A server should use its own
# health endpoint; docs/serve.md has the command.
HEALTHCHECK --interval=5m --timeout=150s --start-period=30s --retries=2 \
    CMD ["gemma3-export", "doctor"]

# Continue the text on stdin with the bundle mounted at /model.
CMD ["generate", "/model", "--device", "cuda", "--prompt", "-"]
