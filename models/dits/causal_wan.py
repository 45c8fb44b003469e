"""The causal Wan DiT: predicts one block of a video's frames, which attends to itself and to the frames before it.

Keys and values of earlier frames are in a cache (`kv_cache`) that belongs to the request. Each prediction writes those
of its own frames to the cache: the last prediction of a block, with its finished latents at timestep 0, is what later
blocks attend to. Rotary positions are those of the whole video.

Shapes: as in models.dits.wan; S are the tokens of the whole video. With a window the cache is a ring buffer behind the
sink: frames that leave the window are overwritten.
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
        """Velocity of a whole video as one block; arguments as those of the Wan DiT."""
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
        """As the Wan DiT's, with the rotation (S, K / 2) of the whole video and the cache as memory.

        `video_grid` is (1, 0, frames, rows, columns) of the video's latents.
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
        """None: the rotation of the whole video is a constant of the request."""
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
        """Velocity of a block (B, out_channels, frames, rows, columns) that begins at `first_frame` of the video.

        `kv_cache` (blocks, 2, B, capacity, heads, K) holds the frames before it, and afterwards the block's, too.
        """
        assert isinstance(first_frame, int), "a static flag"
        grid = self._grid(hidden_states)
        frame_tokens = math.prod(grid[1:])
        tokens = slice(first_frame * frame_tokens, (first_frame + grid[0]) * frame_tokens)
        slots, length = self._slots(first_frame, grid[0], frame_tokens)
        segments = self.tokens(
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
        """Where the tokens of frames from `first` on go in the cache, and how many tokens are valid then."""
        places = [self._place(first + frame) for frame in range(frames)]
        runs: list[tuple[int, int]] = []
        for place in places:
            if runs and runs[-1][1] == place:
                runs[-1] = (runs[-1][0], place + 1)
            else:
                runs.append((place, place + 1))
        valid = first + frames if self.window is None else min(first + frames, self.window)
        return tuple(slice(begin * frame_tokens, end * frame_tokens) for begin, end in runs), valid * frame_tokens

    def _place(self, frame: int) -> int:
        """The place of a frame in the cache: behind the sink the frame's takes that of the oldest frame."""
        if self.window is None or frame < self.sink:
            return frame
        return self.sink + (frame - self.sink) % (self.window - self.sink)
