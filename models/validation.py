"""The first stage of every pipeline, run by the coordinator before a request is accepted. It needs no weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from common.artifacts import ParamValue
from common.errors import InvalidInput
from configs.sample.base import ParamWarning, SamplingParams
from models.catalog import ServedModel


@dataclass(frozen=True)
class ValidatedRequest:
    """A request that can run: every parameter set, the artifacts that its pipeline is given, and what was changed."""

    params: SamplingParams
    artifacts: Mapping[str, object]
    warnings: tuple[ParamWarning, ...]


class InputValidationStage:
    """Turns what a caller gave into the first artifacts of one model's pipeline."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    def run(self, given: Mapping[str, ParamValue], images: Collection[str] = ()) -> ValidatedRequest:
        """Check and complete a request. `images` are the roles of the pictures that came with it.

        Raises InvalidInput that names the field, the value and what would be right.
        """
        if images:
            name, pipeline = self._model.name, self._model.checkpoint.pipeline_name
            raise InvalidInput(f"{name} ({pipeline}) takes no images, but {len(images)} came", field="images")
        params, warnings = self._model.sampling_params.build(given, self._model.checkpoint)
        return ValidatedRequest(params, params.artifacts(), warnings)
