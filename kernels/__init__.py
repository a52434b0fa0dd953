"""Triton kernels: jit functions and launchers that write into preallocated outputs."""
