"""Rows of `fleet status` for workers that cannot serve requests."""

from __future__ import annotations

from fleet.v1 import generation_pb2
from services.start_up import plain

HEAD = ("MODEL", "SERVICE", "VARIANT", "INCOMPATIBLE WORKER", "REASON")


def incompatible_rows(overview: generation_pb2.ListModelsResponse) -> list[tuple[str, str, str, str, str]]:
    """One row with the columns of HEAD per incompatible worker and variant."""
    return [
        (model.name, service.service, plain(each.variant) or "-", plain(each.worker_id), plain(each.reason))
        for model in overview.models
        for service in model.services
        for each in service.incompatible_workers
    ]
