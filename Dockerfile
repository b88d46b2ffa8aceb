# gemma3-export on an NVIDIA GPU: the command line and the runtime, without PyTorch or weights.
#
#   docker build -t gemma3-export:cuda .
#   docker run --rm --gpus all gemma3-export:cuda doctor
#   echo "The sea is" | docker run --rm -i --gpus all -v "$PWD/bundle:/model:ro" gemma3-export:cuda
#
# The host needs the NVIDIA driver (580 or newer) and nvidia-container-toolkit; CUDA is installed by
# pip. docs/cuda.md has the details and says which parts have been tested.

FROM python:3.13.7-slim-bookworm AS build

# The version that graph placement was checked with.
ARG ONNXRUNTIME_GPU=1.31.1
WORKDIR /src
RUN python -m venv /opt/gemma3-export
ENV PATH=/opt/gemma3-export/bin:$PATH

# The large layer that rarely changes comes first: about 2 GB of CUDA.
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt "onnxruntime-gpu[cuda,cudnn]==${ONNXRUNTIME_GPU}"

COPY pyproject.toml README.md LICENSE ./
COPY reference/ reference/
COPY exporters/ exporters/
COPY runtimes/ runtimes/
COPY gemma3_export/ gemma3_export/
RUN pip install --no-cache-dir -c constraints.txt ".[cuda,serve]"


FROM python:3.13.7-slim-bookworm

COPY --from=build /opt/gemma3-export /opt/gemma3-export

# Tell NVIDIA's container toolkit what to expose, as NVIDIA's own images do.
ENV PATH=/opt/gemma3-export/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin gemma
USER 10001:10001
WORKDIR /home/gemma

# The check opens a CUDA context for a second, so it runs rarely. A server should use its own
# health endpoint; docs/serve.md has the command.
HEALTHCHECK --interval=5m --timeout=150s --start-period=30s --retries=2 \
    CMD ["gemma3-export", "doctor"]

ENTRYPOINT ["gemma3-export"]
# Continue the text on stdin with the bundle mounted at /model.
CMD ["generate", "/model", "--device", "cuda", "--prompt", "-"]
