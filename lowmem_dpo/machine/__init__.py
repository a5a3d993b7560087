"""What there is to compute with, and whether its kernels are right."""
