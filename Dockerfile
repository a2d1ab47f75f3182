# speed_engine with CUDA, from the releases of constraints.txt:
#
#   docker build -t speed-engine .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/work/runs" speed-engine train digits
#
# PyTorch's wheels bring CUDA's libraries; the machine needs a driver and the NVIDIA container toolkit.
FROM python:3.11-slim
# Triton compiles its launchers by a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip install --no-cache-dir --constraint /source/constraints.txt '/source[hub,plots,prepare]'
WORKDIR /work
ENTRYPOINT ["speed-engine"]
