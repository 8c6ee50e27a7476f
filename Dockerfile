# Two variants: `docker build --target cpu -t entrenar .`, and `--target cuda` with the CUDA build of torch (gigabytes).
#
#     docker run --rm -it -v "$PWD:/work" --user "$(id -u):$(id -g)" entrenar quickstart
FROM python:3.11-slim AS source
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
ENV HOME=/tmp PYTHONUNBUFFERED=1

FROM source AS cuda
RUN pip install --no-cache-dir --constraint constraints.txt '.[gguf]'
WORKDIR /work
ENTRYPOINT ["entrenar"]
CMD ["--help"]

FROM source AS cpu
RUN pip install --no-cache-dir --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu '.[gguf]'
WORKDIR /work
ENTRYPOINT ["entrenar"]
CMD ["--help"]
