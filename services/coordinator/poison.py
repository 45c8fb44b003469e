"""The rule for failing a request whose workers are repeatedly lost.

A loss is suspect after the worker's heartbeat has expired, because the request may have crashed the worker.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.state.leases import Loss

MOST_WITHOUT_PROGRESS = 3
"""Number of suspect losses without progress at which a request fails."""

MOST_IN_CHURN = 10
"""Number of suspect losses without progress at which a request fails, if one of them is in churn.

In churn, workers that did not run the request were lost too, so the request may not be the cause.
"""

MOST_OUTSIDE_CHURN = 10
"""Number of suspect losses outside churn, with or without progress, at which a request fails."""


def reason_to_give_up(losses: Sequence[Loss]) -> str:
    """The reason for failing a request with these suspect losses, in order; empty if it continues."""
    without_progress = _since_progress(losses)
    most = MOST_IN_CHURN if any(loss.in_churn for loss in without_progress) else MOST_WITHOUT_PROGRESS
    if len(without_progress) >= most:
        return f"{len(without_progress)} workers were lost while they ran this request, without progress in between"
    outside_churn = sum(not loss.in_churn for loss in losses)
    if outside_churn >= MOST_OUTSIDE_CHURN:
        return f"{outside_churn} workers were lost while they ran this request"
    return ""


def _since_progress(losses: Sequence[Loss]) -> list[Loss]:
    """The losses since the latest progress. Progress: a later step or service than at all earlier losses."""
    since: list[Loss] = []
    stage, reached = -1, -1
    for loss in losses:
        if loss.stage > stage or loss.reached > reached:
            since = []
        since.append(loss)
        stage, reached = max(stage, loss.stage), max(reached, loss.reached)
    return since
