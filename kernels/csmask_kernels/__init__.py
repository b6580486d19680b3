"""Device kernels of csmask: Triton sources and, where it was built, the C++ extension `_cpu`. Never imports csmask."""
