"""Fake kernel packages for tests: modules on disk with the dist-info metadata that pip writes.

FLASH_ATTN_2, 3 and 4 have the signatures and results of flash-attn 2.8.3, fa3-fwd 0.0.3 and flash-attn-4 4.0.0b36, on
any device.
"""

from __future__ import annotations

from pathlib import Path

_ATTENTION = """
import torch


def _attend(q, k, v, softmax_scale):
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16), "dtype"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "channels must be adjacent"
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()).to(q.dtype), scores.logsumexp(-1)

"""

FLASH_ATTN_2 = (
    _ATTENTION
    + """
def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):
    assert not dropout_p and not causal
    out, softmax_lse = _attend(q, k, v, softmax_scale)
    return (out, softmax_lse, torch.empty(0)) if return_attn_probs else out
"""
)

FLASH_ATTN_3 = (
    _ATTENTION
    + """
def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):
    assert not causal
    out, softmax_lse = _attend(q, k, v, softmax_scale)
    return (out, softmax_lse) if return_attn_probs else out
"""
)

FLASH_ATTN_4 = (
    _ATTENTION
    + """
def flash_attn_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
    block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):
    assert not causal
    out, lse = _attend(q, k, v, softmax_scale)
    return out, lse if return_lse else None
"""
)

LAUNCH_FAILS = """
def flash_attn_func(*args, **options):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
"""

WRONG_RESULTS = FLASH_ATTN_2 + "\n_right = _attend\n_attend = lambda *args: (_right(*args)[0] * 0, _right(*args)[1])\n"


def install(folder: Path, name: str, version: str, module: str, source: str) -> None:
    """Install a package in a folder of sys.path; only the last module of a dotted name has source code."""
    package = folder.joinpath(*module.split("."))
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(source)
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
