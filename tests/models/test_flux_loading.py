"""Flux checkpoints: refusals at opening or loading, sharded weights, weight variants, dtypes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel as DiffusersTransformer
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.checkpoint import Checkpoint, kind_of
from common.errors import CheckpointError
from common.vocabulary import has_vocabulary
from configs.models.dits.flux import FluxTransformerConfig
from flux_pair import Pair
from local_fleet import LocalFleet, open_fleet
from models.catalog import open_model
from models.dits.flux import FluxTransformer2DModel
from models.loader import _LOADERS, load_stages, numerics_fingerprint
from models.registry import load_registry
from models.runtime import Runtime

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
QUERY = "transformer_blocks.0.attn.to_q.weight"

Tensors = dict[str, Tensor]


@pytest.fixture
def checkpoint(dev: Pair, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may modify."""
    return shutil.copytree(dev.path, tmp_path / "broken")


def load(path: Path, service: str) -> None:
    """Load the stages of one service."""
    model = open_model(str(path), load_registry())
    load_stages(model, model.service(service), Runtime(device=torch.device("cpu"), dtype=torch.float32))


def rewrite(file: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a weight file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit(file: Path, **values: object) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), f"transformer lacks: {QUERY}"),
        (lambda t: t.update(extra=torch.zeros(1)), "transformer has unknown weights: extra"),
        (lambda t: t.update({QUERY: t[QUERY][:-1].clone()}), r"to_q.weight: shape \[63, 64\] is not \[64, 64\]"),
        (
            lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)}),
            "to_q.weight: dtype F8_E4M3 is not supported",
        ),
        (
            lambda t: t.update({QUERY: t[QUERY].to(torch.int32)}),
            "to_q.weight: dtype I32 is not supported",
        ),
    ],
    ids=["missing", "unexpected", "shape", "float8", "integers"],
)
def test_mismatched_transformer_weights_are_refused(
    checkpoint: Path, change: Callable[[Tensors], object], message: str
) -> None:
    rewrite(checkpoint / TRANSFORMER, change)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint, "denoising")


def test_a_config_with_fewer_layers_than_the_weights_is_refused(checkpoint: Path) -> None:
    edit(checkpoint / "transformer" / "config.json", num_layers=1)
    with pytest.raises(CheckpointError, match=r"has unknown weights: transformer_blocks.1.* and \d+ more"):
        load(checkpoint, "denoising")


def test_truncated_weights_are_refused(checkpoint: Path) -> None:
    file = checkpoint / TRANSFORMER
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="diffusion_pytorch_model"):
        load(checkpoint, "denoising")


@pytest.mark.parametrize(
    ("module", "file", "service", "key"),
    [
        ("text_encoder_2", "model.safetensors", "text_encoding", "encoder.final_layer_norm.weight"),
        ("vae", "diffusion_pytorch_model.safetensors", "decoding", "decoder.conv_in.weight"),
    ],
)
def test_missing_weights_of_other_modules_are_refused(
    checkpoint: Path, module: str, file: str, service: str, key: str
) -> None:
    rewrite(checkpoint / module / file, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=f"{module}: missing keys: {key}"):
        load(checkpoint, service)


def test_vae_weights_of_other_shapes_than_the_config_are_refused(checkpoint: Path) -> None:
    edit(checkpoint / "vae" / "config.json", layers_per_block=1, block_out_channels=[8, 8, 16, 32])
    with pytest.raises(CheckpointError, match="vae: "):
        load(checkpoint, "decoding")


def test_a_tokenizer_that_is_not_json_is_refused(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_2" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_2/tokenizer.json is not valid JSON"):
        load(checkpoint, "text_encoding")


def test_an_unreadable_tokenizer_is_refused(checkpoint: Path) -> None:
    edit(checkpoint / "tokenizer_2" / "tokenizer.json", normalizer={"type": "Nonsense"})
    with pytest.raises(CheckpointError, match="tokenizer_2: T5Tokenizer cannot be loaded: "):
        load(checkpoint, "text_encoding")


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "tokenizer_2")
    shutil.copytree(checkpoint / "tokenizer", checkpoint / "tokenizer_2")
    edit(checkpoint / "model_index.json", tokenizer_2=["transformers", "CLIPTokenizer"])
    with pytest.raises(CheckpointError, match="tokenizer_2 has 542 tokens, but text_encoder_2 has embeddings for 110"):
        load(checkpoint, "text_encoding")


def test_a_tokenizer_with_a_longer_maximum_length_than_its_encoder_is_refused(checkpoint: Path) -> None:
    edit(checkpoint / "tokenizer" / "tokenizer_config.json", model_max_length=128)
    with pytest.raises(CheckpointError, match="tokenizer: a length of 128 tokens is not at most 77"):
        load(checkpoint, "text_encoding")


def test_a_module_class_without_a_loader_is_refused(checkpoint: Path) -> None:
    edit(checkpoint / "model_index.json", text_encoder_2=["transformers", "BertModel"])
    with pytest.raises(CheckpointError, match=r"text_encoder_2: class BertModel is not supported; .*T5EncoderModel"):
        load(checkpoint, "text_encoding")


def test_the_refusal_of_a_tokenizer_lists_the_supported_tokenizers(checkpoint: Path) -> None:
    edit(checkpoint / "model_index.json", tokenizer=["transformers", "BertTokenizer"])
    with pytest.raises(CheckpointError, match="tokenizer: class BertTokenizer is not supported") as refused:
        load(checkpoint, "text_encoding")
    supported = refused.value.message.partition("supported: ")[2].split(", ")
    assert "CLIPTokenizer" in supported
    assert all("Tokenizer" in name for name in supported)


def test_every_loaded_tokenizer_has_a_vocabulary_check() -> None:
    assert all(has_vocabulary(name) for name in _LOADERS if kind_of(name) == "Tokenizer")


def test_a_module_of_an_unknown_library_is_refused(checkpoint: Path) -> None:
    edit(checkpoint / "model_index.json", vae=["somewhere", "AutoencoderKL"])
    with pytest.raises(CheckpointError, match="vae: library 'somewhere' is not supported"):
        load(checkpoint, "decoding")


def test_a_stochastic_scheduler_is_refused(checkpoint: Path) -> None:
    edit(checkpoint / "scheduler" / "scheduler_config.json", stochastic_sampling=True)
    with pytest.raises(CheckpointError, match="stochastic_sampling: true is not supported"):
        load(checkpoint, "denoising")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "transformer/config.json",
            {"num_attention_heads": 0},
            "transformer/config.json: num_attention_heads: 0 is not a whole number of at least 1",
        ),
        ("transformer/config.json", {"num_layers": "2"}, "num_layers: '2' is not a whole number"),
        ("transformer/config.json", {"axes_dims_rope": [4, 6]}, "axes_dims_rope: .* whose sum is the head size 16"),
        ("transformer/config.json", {"patch_size": 2}, "patch_size: 2 is not 1, the only supported value"),
        ("transformer/config.json", {"guidance_embeds": "yes"}, "guidance_embeds: 'yes' is not true or false"),
        ("transformer/config.json", {"in_channels": 32}, "32 input and 32 output channels are not 64"),
        ("transformer/config.json", {"out_channels": 16}, "64 input and 16 output channels are not 64"),
        (
            "vae/config.json",
            {"latent_channels": 4},
            "are not 16, the channels of 2x2 patches of the VAE's 4 latent channels",
        ),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor: 0 is not a number other than 0"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor: 'x' is not a number"),
        ("text_encoder/config.json", {"hidden_size": 32}, "text_encoder: 32 text features are not 24"),
        ("text_encoder_2/config.json", {"d_model": 64}, "text_encoder_2: 64 text features are not 32"),
        ("scheduler/scheduler_config.json", {"max_image_seq_len": 256}, "max_image_seq_len: 256 is not different"),
    ],
    ids=str,
)
def test_unsupported_or_inconsistent_configs_are_refused(
    checkpoint: Path, file: str, values: dict[str, object], message: str
) -> None:
    edit(checkpoint / file, **values)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint, "latent_preparation")


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_parameters_of_the_published_size_match_diffusers(guidance_embeds: bool) -> None:
    """Names and shapes of FLUX.1's 12 billion parameters, on the meta device."""
    with torch.device("meta"):
        theirs = DiffusersTransformer(guidance_embeds=guidance_embeds).state_dict()
        ours = FluxTransformer2DModel(FluxTransformerConfig(guidance_embeds=guidance_embeds)).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}
    assert sum(value.numel() for value in ours.values()) > 11_800_000_000


def test_each_service_loads_only_its_own_modules(checkpoint: Path) -> None:
    """Invalid weights of other services are not read."""
    rewrite(checkpoint / TRANSFORMER, lambda tensors: tensors.pop(QUERY))
    for service in ("text_encoding", "latent_preparation", "decoding"):
        load(checkpoint, service)


def test_sharded_weights_equal_a_single_file(dev: Pair, checkpoint: Path) -> None:
    file = checkpoint / TRANSFORMER
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in (0, 1)}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, file.parent / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = {"metadata": {}, "weight_map": weight_map}
    (file.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    fleet = open_fleet(str(checkpoint))
    assert torch.equal(draw(fleet), draw(dev.ours))
    fleet.close()


@pytest.mark.parametrize("variant", ["fp16", "ema"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "100KB"])
def test_weight_variants_of_diffusers_are_loaded(
    dev: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture, variant: str, max_shard_size: str
) -> None:
    """The files are written by Diffusers' save_pretrained()."""
    dev.theirs.save_pretrained(str(tmp_path), variant=variant, max_shard_size=max_shard_size)
    assert not list(tmp_path.glob("*/*model.safetensors"))
    assert bool(list(tmp_path.glob(f"*/*.safetensors.index.{variant}.json"))) == (max_shard_size == "100KB")
    with caplog.at_level(logging.INFO, "models.loader"):
        fleet = open_fleet(str(tmp_path))
    assert torch.equal(draw(fleet), draw(dev.ours))
    fleet.close()
    for module in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        files = ",".join(file.name for file in Checkpoint.open(tmp_path).weight_files(module))
        assert f"weight files selected module={module} variant={variant} files={files}" in caplog.text


def draw(fleet: LocalFleet) -> Tensor:
    """Run a small request; returns its pixels."""
    return fleet.tensors(prompt="a red apple", seed=1, height=32, width=32, num_inference_steps=2)["pixels"]


def test_weights_are_cast_to_the_requested_dtype(dev: Pair) -> None:
    model = dev.ours.model
    spec = model.service("denoising")
    (stage,) = load_stages(model, spec, Runtime(device=torch.device("cpu"), dtype=torch.bfloat16))
    transformer = vars(stage)["_predictor"].transformers["transformer"]
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_the_numerics_fingerprint_distinguishes_dtypes() -> None:
    cpu = torch.device("cpu")
    assert numerics_fingerprint(cpu, torch.float32) == numerics_fingerprint(cpu, torch.float32)
    assert numerics_fingerprint(cpu, torch.float32) != numerics_fingerprint(cpu, torch.bfloat16)
