"""GPU kernels: optional packages, backends of GEMM, attention and fused operations, and the attention table."""
