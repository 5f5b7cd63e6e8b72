"""Speed-ups for CPUs: attention, training, and repeated shapes."""
