"""Decodes video latents to files in parts; the parts emitted so far are playable."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from common.artifacts import Canvas, LatentPart
from common.errors import InternalError
from common.stage import Call, PipelineStage
from configs.pipeline_configs.base import DecodingConfig, DecodingNoise
from models.contracts import BlockDecodingInput, StreamedDecodingOutput, VideoDecodingInput
from models.media import MP4, SAFETENSORS, EncodingAhead, Mp4Fragment, encoding_ahead
from models.runtime import Runtime
from models.stages.decoded_media import DEFAULT_FRAME_RATE, media_item, pixels_of, unsupported_format

FRAGMENT_LATENT_FRAMES = 4
"""Latent frames per MP4 fragment of finished latents: about one second of Wan's 16 frames per second."""

_SLOT = "media_items"


@dataclass(frozen=True)
class _Piece:
    """Raw latents (1, C, latent frames, h, w) of an output's next frames, on the CPU."""

    index: int
    num_outputs: int
    latents: Tensor


_Pieces = Callable[[Callable[[], None]], Iterator[_Piece]]
"""Function that yields the pieces of a request in order. It calls its argument before it waits for latents."""


class VideoDecodingStage(PipelineStage[VideoDecodingInput, StreamedDecodingOutput]):
    """Decodes finished latents, output by output, to one MP4 file per output or one safetensors file.

    MP4 files are emitted in fragments of a few latent frames; each fragment is encoded while the next frames are
    decoded. A VAE session that yields all frames after the last latents results in one fragment per file.
    """

    def __init__(self, config: DecodingConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._decoder = _Decoder(config, runtime, modules)

    @torch.inference_mode()
    def run(self, x: VideoDecodingInput, call: Call) -> StreamedDecodingOutput:
        """Emit the files. Raises InvalidInput for an unsupported format."""
        raw = self._decoder.raw_latents(x.denoised_latents.parts)

        def pieces(_: Callable[[], None]) -> Iterator[_Piece]:
            for index, latents in enumerate(torch.split(raw, 1)):
                for piece in torch.split(latents, FRAGMENT_LATENT_FRAMES, dim=2):
                    yield _Piece(index, len(raw), piece)

        videos = _Videos(self._decoder, x.canvas, call, noise=self._decoder.drawn_noise(raw, x))
        _emit_files(self._decoder, pieces, x.canvas, call, videos)
        return StreamedDecodingOutput()


class BlockDecodingStage(PipelineStage[BlockDecodingInput, StreamedDecodingOutput]):
    """Decodes blocks of latents as they arrive, to one MP4 file per output or one safetensors file.

    Each block results in one fragment of each MP4 file. The VAE caches of all outputs are in memory at the same time;
    if together they exceed the VAE's memory bound, all frames are decoded after the last block has arrived.
    """

    def __init__(self, config: DecodingConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._decoder = _Decoder(config, runtime, modules)

    @torch.inference_mode()
    def run(self, x: BlockDecodingInput, call: Call) -> StreamedDecodingOutput:
        """Emit the files. Raises InvalidInput for an unsupported format."""

        def pieces(before_waiting: Callable[[], None]) -> Iterator[_Piece]:
            for block in x.denoised_blocks:
                raw = self._decoder.raw_latents(block.parts)
                yield from (_Piece(index, len(raw), latents) for index, latents in enumerate(torch.split(raw, 1)))
                if not x.denoised_blocks.has_next():
                    before_waiting()

        videos = _Videos(self._decoder, x.canvas, call, are_interleaved=True)
        _emit_files(self._decoder, pieces, x.canvas, call, videos)
        return StreamedDecodingOutput()


@dataclass(frozen=True)
class _Noise:
    """Noise (outputs, C, latent frames, h, w) to add to the latents, and its settings."""

    drawn: Tensor
    settings: DecodingNoise

    def of_output(self, index: int) -> dict[str, Any]:
        """Keyword arguments of the VAE's session() for one output."""
        return {"noise": self.drawn[index : index + 1], **vars(self.settings)}


class _Decoder:
    """The VAE of a video model with the decoding callbacks of the model's config."""

    def __init__(self, config: DecodingConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._device = runtime.device
        self._dtype = config.denormalising_dtype or config.dtype_of("vae", runtime.dtype)
        self._noise_dtype = runtime.dtype
        self._vae = modules["vae"]

    def raw_latents(self, parts: Mapping[str, LatentPart]) -> Tensor:
        """Latents of the visual part, (outputs, C, latent frames, h, w)."""
        part = parts[self._config.visual_part]
        return self._config.unpack(self._config.visual_part, part.latents, part.raw_latent_shape)

    def saved_latents(self, raw: Tensor) -> Tensor:
        """Convert raw latents of complete videos to the layout of Diffusers' output."""
        name = self._config.visual_part
        packed = self._config.pack(name, raw)
        return self._config.saved_latents(name, packed, tuple(raw.shape), self._vae).contiguous()

    def num_frames(self, canvas: Canvas) -> int:
        """Number of frames of one output."""
        return self._config.num_frames(canvas)

    def drawn_noise(self, raw: Tensor, x: VideoDecodingInput) -> _Noise | None:
        """Draw noise for all outputs at once, as in Diffusers; None if the decoder does not remove noise.

        Pipelines of models whose decoder removes noise read `sampling` and `denoising_generator`.
        """
        if x.sampling is None or x.denoising_generator is None:
            return None
        settings = self._config.decoding_noise(x.sampling)
        if settings is None:
            return None
        generator = torch.Generator("cpu")
        generator.set_state(x.denoising_generator.state)
        return _Noise(torch.randn(raw.shape, generator=generator, dtype=self._noise_dtype), settings)

    def session(self, canvas: Canvas, concurrent: int, **noise: Any) -> Any:
        """Start decoding one of `concurrent` outputs whose blocks are interleaved."""
        shape = self._config.raw_latent_shapes(canvas, 1)[self._config.visual_part]
        return self._vae.session(*shape[2:], concurrent=concurrent, **noise)

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Convert raw latents to the VAE's input, on its device."""
        return self._config.vae_latents(raw.to(self._device).to(self._dtype))


class _Videos:
    """Decodes the outputs of a request, each with its own VAE session.

    `are_interleaved`: pieces of different outputs alternate.
    """

    def __init__(
        self,
        decoder: _Decoder,
        canvas: Canvas,
        call: Call,
        *,
        are_interleaved: bool = False,
        noise: _Noise | None = None,
    ) -> None:
        self._decoder = decoder
        self._noise = noise
        self._canvas = canvas
        self._call = call
        self._are_interleaved = are_interleaved
        self._sessions: dict[int, Any] = {}
        self._total = decoder.num_frames(canvas)
        self._done = 0

    def frames(self, piece: _Piece) -> Iterator[Tensor]:
        """Decode the next frames of an output, each (3, height, width). Reports each frame."""
        self._total = self._decoder.num_frames(self._canvas) * piece.num_outputs
        if piece.index not in self._sessions:
            concurrent = piece.num_outputs if self._are_interleaved else 1
            noise = {} if self._noise is None else self._noise.of_output(piece.index)
            self._sessions[piece.index] = self._decoder.session(self._canvas, concurrent, **noise)
        for frame in self._sessions[piece.index].feed(self._decoder.vae_latents(piece.latents)):
            yield pixels_of(frame)
            self._done += 1
            self._call.progress(self._done, self._total)

    def check_complete(self) -> None:
        """Check that all frames have been decoded. Raises InternalError."""
        if self._done != self._total:
            raise InternalError(f"latents: {self._done} decoded frames are not the {self._total} frames of the request")


class _Fragments:
    """Encodes MP4 fragments on a thread and emits them in the order in which they were started."""

    def __init__(self, ahead: EncodingAhead, canvas: Canvas, call: Call) -> None:
        self._ahead = ahead
        self._canvas = canvas
        self._call = call
        self._num_frames: dict[int, int] = {}
        self._pending: deque[tuple[_Piece, int, Future[bytes]]] = deque()

    def write(self, piece: _Piece, frames: Iterator[Tensor]) -> None:
        """Encode the next frames of an output as one fragment; does nothing without frames."""
        canvas, first = self._canvas, self._num_frames.get(piece.index, 0)
        fragment = Mp4Fragment(canvas.height, canvas.width, canvas.frame_rate or DEFAULT_FRAME_RATE, first)
        count = 0
        for pixels in frames:
            count += 1
            self._ahead.submit(fragment.add, pixels)
            self._emit_finished()
        if count:
            self._num_frames[piece.index] = first + count
            self._pending.append((piece, count, self._ahead.submit(fragment.finish)))

    def emit_all(self) -> None:
        """Wait for pending fragments and emit them."""
        with self._call.waiting():
            self._ahead.wait()
        self._emit_finished()

    def _emit_finished(self) -> None:
        while self._pending and self._pending[0][2].done():
            piece, count, encoded = self._pending.popleft()
            item = media_item(encoded.result(), MP4, self._canvas, count)
            self._call.emit(_SLOT, replace(item, file_index=piece.index, file_count=piece.num_outputs))


def _emit_files(decoder: _Decoder, pieces: _Pieces, canvas: Canvas, call: Call, videos: _Videos) -> None:
    """Decode all pieces and emit the media items."""
    match canvas.output_format:
        case "mp4":
            with encoding_ahead() as ahead:
                fragments = _Fragments(ahead, canvas, call)
                for piece in pieces(fragments.emit_all):
                    fragments.write(piece, videos.frames(piece))
                fragments.emit_all()
            videos.check_complete()
        case "safetensors":
            latents: dict[int, list[Tensor]] = {}
            frames: dict[int, list[Tensor]] = {}
            for piece in pieces(lambda: None):
                latents.setdefault(piece.index, []).append(piece.latents)
                frames.setdefault(piece.index, []).extend(videos.frames(piece))
            videos.check_complete()
            raw = torch.cat([torch.cat(each, dim=2) for each in latents.values()])
            tensors = {
                "latents": decoder.saved_latents(raw),
                "pixels": torch.stack([torch.stack(each) for each in frames.values()]),
            }
            call.emit(_SLOT, media_item(save(tensors), SAFETENSORS, canvas, decoder.num_frames(canvas)))
        case other:
            raise unsupported_format(other, "mp4")
