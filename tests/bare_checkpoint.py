"""A minimal Flux checkpoint for tests that load no weights; all files are as small as possible."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

FLUX_MODULES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_CONFIG_FILES = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}
_CONFIGS: Mapping[str, Mapping[str, object]] = {
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "text_encoder": {"architectures": ["CLIPTextModel"], "vocab_size": 8},
    "text_encoder_2": {"architectures": ["T5EncoderModel"], "vocab_size": 8},
    "tokenizer": {"model_max_length": 77},
    "tokenizer_2": {"model_max_length": 512},
}
_BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
_UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
_TOKENIZERS = {"tokenizer": _BPE, "tokenizer_2": _UNIGRAM}


def safetensors_bytes(tensors: Mapping[str, Sequence[float]]) -> bytes:
    """A safetensors file of float32 vectors of zeros, each as long as the given sequence."""
    header: dict[str, object] = {}
    end = 0
    for name, values in tensors.items():
        begin, end = end, end + 4 * len(values)
        header[name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(end)


def build_bare_flux(
    path: Path,
    *,
    guidance_embeds: bool = True,
    vae_blocks: int = 4,
    sampling_defaults: Mapping[str, object] | None = None,
) -> Path:
    """Write a FluxPipeline directory with a small weight file per model; returns the directory."""
    configs = dict(_CONFIGS)
    configs["transformer"] = {"guidance_embeds": guidance_embeds}
    configs["vae"] = {"block_out_channels": [8] * vae_blocks}
    for name, (library, _) in FLUX_MODULES.items():
        folder = path / name
        folder.mkdir(parents=True)
        (folder / _CONFIG_FILES.get(name, "config.json")).write_text(json.dumps(configs[name]))
        if name in _TOKENIZERS:
            tokenizer = {"added_tokens": [], "model": _TOKENIZERS[name]}
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        if name not in _CONFIG_FILES:
            stem = "model" if library == "transformers" else "diffusion_pytorch_model"
            (folder / f"{stem}.safetensors").write_bytes(safetensors_bytes({"weight": [0.0] * 5, "bias": [0.0]}))
    (path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **FLUX_MODULES}))
    if sampling_defaults is not None:
        (path / "sampling_defaults.json").write_text(json.dumps(sampling_defaults))
    return path
