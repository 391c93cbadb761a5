# The course in a container, for processors (the default) or for NVIDIA GPUs:
#   docker build -t bigmodel_nb .
#   docker build -t bigmodel_nb:cuda --build-arg VARIANT=cuda .
# JupyterLab on a copy of the notebooks, kept in a volume; a headless run, which leaves its folder here; a GPU takes --gpus all:
#   docker run --init --rm -it -p 127.0.0.1:8888:8888 -v course:/home/learner/course bigmodel_nb
#   docker run --init --rm -v "$PWD:/home/learner/course" bigmodel_nb bigmodel run tour
ARG VARIANT=cpu
ARG PYTHON=3.11

# A wheel of the package, made apart: what it is made of stays out of the image.
FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY setup.py settings.ini MANIFEST.in README.md LICENSE ./
COPY bigmodel_nb bigmodel_nb
COPY nbs nbs
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# What both variants share: a user without rights, who owns a folder for notebooks and runs.
FROM python:${PYTHON}-slim AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 learner && install --directory --owner=learner --group=learner /home/learner/course \
    && mkdir -p /usr/local/etc/jupyter \
    && echo '{"ServerApp": {"ip": "0.0.0.0"}}' > /usr/local/etc/jupyter/jupyter_server_config.json
COPY requirements/lock.txt /opt/lock.txt

FROM base AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" --constraint /opt/lock.txt torch torchvision

# PyPI's torch for Linux carries CUDA; the driver comes from the machine below, through the NVIDIA Container Toolkit.
FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install --no-cache-dir --constraint /opt/lock.txt torch torchvision

# For .devcontainer: no package, but what `make` needs to install it from the checkout, and a browser for the tests.
FROM base AS dev
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends chromium git make \
    && rm -rf /var/lib/apt/lists/*
USER 1000
WORKDIR /home/learner/course

FROM ${VARIANT} AS final
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    wheel=$(echo /wheels/*.whl) && pip install --no-cache-dir --constraint /opt/lock.txt "${wheel}[cluster]"
USER 1000
WORKDIR /home/learner/course
EXPOSE 8888
CMD ["bigmodel", "lab", "--no-browser"]
