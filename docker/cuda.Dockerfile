# iprox on NVIDIA GPUs: docker build -f docker/cuda.Dockerfile -t iprox:cuda .
#                       docker run --rm --gpus all -v "$PWD:/work" iprox:cuda run recipe.yaml
# PyTorch's wheels for Linux bring CUDA's libraries; the host needs the driver and the NVIDIA container toolkit.
FROM python:3.12-slim

# torch.compile needs a C++ compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir "/src[lora,ray,eval]" && rm -rf /src
WORKDIR /work
ENTRYPOINT ["iprox"]
CMD ["--help"]
