# iprox on CPUs: docker build -f docker/cpu.Dockerfile -t iprox . && docker run --rm -v "$PWD:/work" iprox quickstart
FROM python:3.12-slim

# torch.compile needs a C++ compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch
COPY . /src
RUN pip install --no-cache-dir "/src[lora,ray,eval]" && rm -rf /src
WORKDIR /work
ENTRYPOINT ["iprox"]
CMD ["--help"]
