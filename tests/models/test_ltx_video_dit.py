"""Parity of the LTX-Video DiT with Diffusers' transformer, which gets padded text: same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel as Reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common.checkpoint import Checkpoint
from common.errors import CheckpointError
from configs.models.dits.ltx_video import LTXVideoTransformerConfig
from local_fleet import relative_error
from models.dits.ltx_video import LTXVideoTransformer3DModel
from models.dits.ltx_video_plan import load_ltx_video_transformer
from models.weights import load_module
from tiny_flux import randomize
from tiny_ltx2 import edit_json
from tiny_ltx_video import CAPTION_SIZE, CHANNELS, build_tiny_ltx_video, transformer_sizes

GRID = (3, 2, 5)
"""Latent frames, rows and columns."""
UNITS = (8 / 25.0, 32, 32)
"""Seconds per latent frame, pixels per row and pixels per column."""
FIRST_TOKENS = GRID[1] * GRID[2]
"""Tokens of the first latent frame."""
PADDING = 5
"""Number of padding tokens that theirs() appends to the text."""


def pair(path: Path, dtype: torch.dtype, **sizes: Any) -> tuple[Reference, LTXVideoTransformer3DModel]:
    """Diffusers' transformer and this project's DiT with the same random weights."""
    torch.manual_seed(0)
    random_model = Reference(**transformer_sizes() | sizes)
    randomize(random_model)
    random_model.save_pretrained(path)
    reference = Reference.from_pretrained(path, torch_dtype=dtype)
    config = LTXVideoTransformerConfig.from_dict("transformer", dict(reference.config))
    with torch.device("meta"):
        ours = LTXVideoTransformer3DModel(config)
    load_module(ours, "transformer", sorted(path.glob("*.safetensors")), torch.device("cpu"), dtype)
    return reference, ours


def inputs(tokens: int, dtype: torch.dtype, *, has_first: bool) -> dict[str, Tensor]:
    """Keyword arguments for two outputs with different texts. A first frame has its own timestep and positions."""
    axes = (torch.arange(size, dtype=torch.float32) * unit for size, unit in zip(GRID, UNITS, strict=True))
    positions = torch.cartesian_prod(*axes)
    given = {
        "hidden_states": torch.randn(2, len(positions), CHANNELS, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, tokens, CAPTION_SIZE, dtype=dtype),
    }
    if not has_first:
        return given | {"timestep": torch.tensor([749.0, 250.0]), "positions": positions}
    timestep = torch.tensor([[0.0, 749.0], [0.0, 250.0]])
    return given | {
        "timestep": timestep,
        "positions": positions[FIRST_TOKENS:],
        "first_positions": positions[:FIRST_TOKENS],
    }


def theirs(reference: Reference, given: dict[str, Tensor]) -> Tensor:
    """Diffusers' prediction with a timestep per token and padded text."""
    text, timestep = given["encoder_hidden_states"], given["timestep"]
    padding = torch.randn(2, PADDING, CAPTION_SIZE, dtype=text.dtype)
    if timestep.ndim == 2:
        first, rest = timestep[:, :1].expand(-1, FIRST_TOKENS), timestep[:, 1:].expand(-1, len(given["positions"]))
        timestep = torch.cat((first, rest), dim=1)
    predicted: Tensor = reference(
        hidden_states=given["hidden_states"],
        encoder_hidden_states=torch.cat((text, padding), dim=1),
        timestep=timestep,
        encoder_attention_mask=torch.tensor([[1.0] * text.shape[1] + [0.0] * PADDING] * 2),
        num_frames=GRID[0],
        height=GRID[1],
        width=GRID[2],
        rope_interpolation_scale=UNITS,
        return_dict=False,
    )[0]
    return predicted


@pytest.mark.parametrize("has_first", [False, True], ids=["one timestep", "a first frame"])
@pytest.mark.parametrize(("heads", "tokens"), [(4, 9), (5, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "max_error"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)], ids=["f32", "bf16"])
def test_predictions_match_diffusers(
    tmp_path: Path, heads: int, tokens: int, has_first: bool, dtype: torch.dtype, max_error: float
) -> None:
    """RoPE skips the first channels, because 32 and 40 channels (4 and 5 heads) are not multiples of 6."""
    reference, ours = pair(tmp_path, dtype, num_attention_heads=heads, cross_attention_dim=8 * heads)
    given = inputs(tokens, dtype, has_first=has_first)
    with torch.inference_mode():
        expected, got = theirs(reference, given), ours(**given)
    assert got.dtype == dtype
    assert relative_error(got, expected) <= max_error


def test_every_keyword_changes_the_prediction(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, torch.float32)
    given, other = (inputs(9, torch.float32, has_first=True) for _ in range(2))
    other |= {"timestep": torch.full((2, 2), 20.0), "positions": given["positions"] * 3}
    other |= {"first_positions": given["first_positions"] * 3}
    with torch.inference_mode():
        expected = ours(**given)
        for name, value in other.items():
            assert relative_error(ours(**given | {name: value}), expected) > 1e-3, name


def test_a_prediction_reads_no_value_on_the_host(tmp_path: Path) -> None:
    """CUDA graphs cannot capture host reads. FakeTensors have no values, so a host read raises an error."""
    _, ours = pair(tmp_path, torch.float32)
    given = inputs(9, torch.float32, has_first=True)
    latents, timestep = given.pop("hidden_states"), given.pop("timestep")
    with torch.inference_mode():
        prepared = ours.prepare(timestep[None], **given)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes: dict[str, Any] = {name: mode.from_tensor(each) for name, each in prepared.inputs(0).items()}
            predicted = ours.predict(hidden_states=mode.from_tensor(latents), **fakes)["hidden_states"]
    assert predicted.shape == latents.shape


def test_parameters_of_the_published_size_match_diffusers() -> None:
    """Names and shapes with default arguments."""
    with torch.device("meta"):
        theirs, ours = Reference(), LTXVideoTransformer3DModel(LTXVideoTransformerConfig())
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    config = LTXVideoTransformerConfig.from_dict("transformer", dict(theirs.config))
    assert config == LTXVideoTransformerConfig()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"patch_size": 2}, "patch_size"),
        ({"patch_size_t": 2}, "patch_size_t"),
        ({"attention_bias": False}, "attention_bias"),
        ({"qk_norm": "rms_norm"}, "qk_norm"),
        ({"cross_attention_dim": 1024}, "cross_attention_dim"),
        ({"attention_head_dim": 63}, "attention_head_dim"),
        ({"num_layers": "3"}, "num_layers"),
    ],
    ids=str,
)
def test_unsupported_architectures_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        LTXVideoTransformerConfig.from_dict("transformer", values)


def test_unknown_entries_of_the_config_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Entries of a newer Diffusers are logged; entries of the installed Diffusers are known."""
    path = build_tiny_ltx_video(tmp_path / "ltx")
    load_ltx_video_transformer(Checkpoint.open(path), "transformer", torch.device("cpu"), torch.float32)
    assert not caplog.messages
    edit_json(path / "transformer" / "config.json", newer_entry=3)
    load_ltx_video_transformer(Checkpoint.open(path), "transformer", torch.device("cpu"), torch.float32)
    assert caplog.messages == ["unknown config entries are ignored module=transformer entries=newer_entry"]
