"""GPU kernels: optional packages, and backends of GEMM, attention and fused operations."""
