"""The causal Wan DiT: predicts a video in blocks of frames. A block attends to itself and to earlier frames.

The KV cache `kv_cache` of a request holds keys and values of earlier frames. Each prediction writes the keys and values
of its block to the cache. If a block follows, the last prediction of a block runs on the denoised latents at timestep
0; later blocks attend to the keys and values from that prediction. RoPE positions count from the start of the video.

With an attention window the cache holds the first frames (the sink), followed by a ring buffer, in which new frames
overwrite frames that have left the window. Shapes: as in models.dits.wan; S tokens of the whole video.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from configs.models.dits.causal_wan import CausalWanTransformerConfig
from models.dits.base import MemorySpec, Predictions, Prepared, entry_point
from models.dits.wan import VIDEO, WanTransformer3DModel
from models.layers.attention import KeyValueCache
from models.layers.rotary import rotary_embedding
from models.layers.step_cache import CacheUse


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """Predicts the velocity of a block of video latents."""

    def __init__(self, config: CausalWanTransformerConfig) -> None:
        super().__init__(config)
        self.window = config.local_attn_size
        self.sink = config.sink_size

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        video_grid: Tensor | None = None,
    ) -> Tensor:
        """Velocity of a whole video as a single block; arguments as in WanTransformer3DModel.

        `video_grid` is as in prepare(); None: the grid of hidden_states.
        """
        grid = hidden_states[:1, :0] if video_grid is None else video_grid
        prepared = self.prepare(timestep[None], encoder_hidden_states, grid)
        slab = prepared.memory["kv_cache"]
        memory = {"kv_cache": torch.zeros(slab.shape, dtype=slab.dtype, device=hidden_states.device)}
        inputs = prepared.inputs(0)
        return self.predict(hidden_states, first_frame=0, use=None, **memory, **inputs)["hidden_states"]

    @entry_point
    def prepare(  # type: ignore[override]  # keywords differ by model
        self, timesteps: Tensor, encoder_hidden_states: Tensor, video_grid: Tensor
    ) -> Prepared:
        """Prepare as the Wan DiT, with RoPE (S, K / 2) of the whole video and the KV cache as memory.

        `video_grid` is an empty tensor (1, 0, frames, rows, columns): the size of the whole video's latents.
        """
        prepared = super().prepare(timesteps, encoder_hidden_states)
        grid = self._grid(video_grid)
        positions = torch.cartesian_prod(*(torch.arange(size, device=timesteps.device) for size in grid))
        rotation = rotary_embedding(positions, self.axes_dims)
        attention = [block.attn1 for block in self._blocks()]
        frames = grid[0] if self.window is None else min(grid[0], self.window)
        heads, head_size = attention[0].cached_heads, attention[0].head_size
        shape = (len(attention), 2, timesteps.shape[1], frames * math.prod(grid[1:]), heads, head_size)
        return Prepared(
            prepared.steps,
            {**prepared.constants, **rotation.tensors()},
            {"kv_cache": MemorySpec(shape, encoder_hidden_states.dtype)},
        )

    def cached_tensors(self, latents: Mapping[str, Tensor]) -> None:
        """None: Prepared.constants contains RoPE of the whole video."""
        del latents

    @entry_point
    def predict(  # type: ignore[override]  # constants differ by model
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        text_kv: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_cache: Tensor,
        first_frame: Hashable = 0,
        use: CacheUse | None = None,
    ) -> Predictions:
        """Velocity (B, out_channels, frames, rows, columns) of a block of frames from `first_frame` on.

        `kv_cache` (transformer blocks, 2, B, capacity, heads, K) holds the earlier frames; the frames of this block are
        written to it.
        """
        assert isinstance(first_frame, int), "first_frame is a static flag"
        grid = self._grid(hidden_states)
        frame_tokens = math.prod(grid[1:])
        tokens = slice(first_frame * frame_tokens, (first_frame + grid[0]) * frame_tokens)
        slots, length = self._slots(first_frame, grid[0], frame_tokens)
        segments = self.predict_tokens(
            self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous(),
            cos[tokens],
            sin[tokens],
            modulation,
            text_kv,
            None,
            caches=[KeyValueCache(slab, slots, length) for slab in kv_cache],
            use=use,
        )
        return {"hidden_states": self._unpatchify(segments[VIDEO], grid)}

    def _slots(self, first: int, frames: int, frame_tokens: int) -> tuple[tuple[slice, ...], int]:
        """Cache slots (tokens) for `frames` frames from `first` on, and the number of valid tokens afterwards."""
        runs: list[tuple[int, int]] = []
        for slot in (self._frame_slot(first + frame) for frame in range(frames)):
            if runs and runs[-1][1] == slot:
                runs[-1] = (runs[-1][0], slot + 1)
            else:
                runs.append((slot, slot + 1))
        valid = first + frames if self.window is None else min(first + frames, self.window)
        return tuple(slice(begin * frame_tokens, end * frame_tokens) for begin, end in runs), valid * frame_tokens

    def _frame_slot(self, frame: int) -> int:
        """Cache slot of a frame, in frames. In a full cache, a frame overwrites the oldest frame after the sink."""
        if self.window is None or frame < self.sink:
            return frame
        return self.sink + (frame - self.sink) % (self.window - self.sink)
