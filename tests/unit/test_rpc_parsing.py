"""Malformed messages, invalid UTF-8, unknown fields and contracts that exceed their RPC are refused."""

from __future__ import annotations

import pytest

from common.errors import FailedPrecondition, InvalidInput
from common.pipeline import PipelineError
from common.rpc.method import check_contract, contract_of, path_of, stage_method
from common.rpc.parsing import parse, refuse_unknown_fields
from common.stage import Contract
from fleet.v1 import artifacts_pb2 as pb
from fleet.v1 import denoising_pb2
from fleet.v1 import generation_pb2 as gen
from models import contracts

BAD = b"b\xffd"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (gen.SubmitRequest(model="bad"), "model"),
        (gen.SubmitRequest(parameters=gen.GenerationParameters(prompt="bad")), "parameters.prompt"),
        (
            gen.SubmitRequest(
                parameters=gen.GenerationParameters(images=[gen.ImageInput(), gen.ImageInput(role="bad")])
            ),
            "parameters.images.role",
        ),
        (
            gen.SubmitRequest(parameters=gen.GenerationParameters(params={"k": pb.ParamValue(string_value="bad")})),
            "parameters.params.value.string_value",
        ),
        (
            gen.SubmitRequest(parameters=gen.GenerationParameters(params={"bad": pb.ParamValue(bool_value=True)})),
            "parameters.params.key",
        ),
    ],
)
def test_invalid_utf8_is_refused_with_its_field(request_: gen.SubmitRequest, field: str) -> None:
    raw = request_.SerializeToString()
    assert parse(gen.SubmitRequest, raw) == request_
    with pytest.raises(InvalidInput, match="not valid UTF-8") as caught:
        parse(gen.SubmitRequest, raw.replace(b"bad", BAD))
    assert caught.value.field == field


@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\x05ab", b"\x0a", b"\x12\x02\x0a\x05"])
def test_bytes_that_are_not_a_message_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidInput, match=r"not a fleet\.v1\.SubmitRequest") as caught:
        parse(gen.SubmitRequest, raw)
    assert caught.value.field == ""


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (denoising_pb2.DenoiseInputs.FromString(b"\xfa\x01\x01x"), "DenoiseInputs"),
        (denoising_pb2.DenoiseInputs(canvas=pb.Canvas.FromString(b"\xf8\x01\x01")), "canvas"),
        (
            denoising_pb2.DenoiseInputs(
                text_conditioning=pb.Conditioning(prompt_embeds={"x": pb.Tensor.FromString(b"\xf8\x01\x01")})
            ),
            "text_conditioning.prompt_embeds.x",
        ),
    ],
)
def test_a_field_of_another_version_is_refused(message: denoising_pb2.DenoiseInputs, field: str) -> None:
    with pytest.raises(InvalidInput, match="does not support") as caught:
        refuse_unknown_fields("", message)
    assert caught.value.field == field


def test_known_fields_pass() -> None:
    media = pb.Media(items=[pb.MediaItem(data=pb.Tensor(shape=[1]))])
    refuse_unknown_fields("media", media)
    refuse_unknown_fields("s", pb.Sampling(params={"x": pb.ParamValue(int_value=1)}, sigmas=[1.0]))


@pytest.mark.parametrize("name", ["", "worker", "artifacts", "generation", "nonsense", "../x", "os"])
def test_an_unknown_stage_service_is_refused(name: str) -> None:
    with pytest.raises(FailedPrecondition, match="stage service"):
        stage_method(name)


@pytest.mark.parametrize("service", ["text_encoding", "latent_preparation", "denoising", "decoding"])
def test_stage_services_are_found_by_name(service: str) -> None:
    assert path_of(stage_method(service)).startswith("/fleet.v1.")


def test_standard_contracts_fit_their_rpcs() -> None:
    for service, contract in (
        ("text_encoding", contracts.TEXT_ENCODING),
        ("latent_preparation", contracts.LATENT_PREPARATION),
        ("latent_preparation", contracts.TIMESTEP_PREPARATION),
        ("denoising", contracts.DENOISING),
        ("denoising", contracts.CAUSAL_DENOISING),
        ("decoding", contracts.DECODING),
        ("decoding", contracts.VIDEO_DECODING),
        ("decoding", contracts.BLOCK_DECODING),
    ):
        check_contract(contract, stage_method(service))
    assert contract_of(stage_method("decoding")).outputs == {"media": "Media", "media_items": "Stream[MediaItem]"}


@pytest.mark.parametrize(
    ("contract", "message"),
    [
        (Contract("S", {"nonsense": "Latents"}, {}), "reads 'nonsense' as Latents, but Decode carries nothing there"),
        (Contract("S", {"canvas": "Latents"}, {}), "reads 'canvas' as Latents, but Decode carries Canvas there"),
        (Contract("S", {}, {"canvas": "Canvas"}), "writes 'canvas' as Canvas, but Decode carries nothing there"),
    ],
)
def test_a_contract_that_exceeds_its_rpc_is_refused(contract: Contract, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        check_contract(contract, stage_method("decoding"))
