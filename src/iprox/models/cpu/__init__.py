"""Speed-ups for CPUs: attention, training, and shapes that repeat. GPUs have kernels and allocators of their own."""
