"""Log lines of request states: one per state change, from the coordinator that stores the change."""

from __future__ import annotations

from common.logs import get_logger
from common.state.records import State, StateValue
from fleet.v1 import generation_pb2
from services.coordinator.outcome import Outcome

_PROMPT = "prompt"

_log = get_logger(__name__)


def log_state(state: StateValue, **pairs: object) -> None:
    """Log the new state of a request, which the log context identifies."""
    name = State.Name(state).removeprefix("REQUEST_STATE_")
    if state == State.REQUEST_STATE_QUEUED:
        _log.info("request accepted", state=name, **pairs)
    elif state == State.REQUEST_STATE_RUNNING:
        _log.info("request running", state=name, **pairs)
    else:
        _log.info("request finished", state=name, **pairs)


def log_taken_over(epoch: int) -> None:
    """Log that this coordinator has taken a request over, as owner of `epoch`."""
    _log.info("request taken over", epoch=epoch)


def log_resumed(step: int) -> None:
    """Log that a worker resumes a request from a step checkpoint."""
    _log.info("request resumed", step=step)


def described(outcome: Outcome) -> dict[str, object]:
    """Key-value pairs of an outcome, for a log line.

    Omits the message of an error about the request's input, because it may quote the prompt.
    """
    pairs: dict[str, object] = {"steps_saved": outcome.steps_saved or None}
    if outcome.error is not None:
        error = outcome.error
        is_about_input = error.code == "INVALID_ARGUMENT"
        pairs |= {"code": error.code, "field": error.field or None, "error": None if is_about_input else error.message}
    return pairs


def prompts_of(parameters: generation_pb2.GenerationParameters) -> dict[str, str]:
    """The prompts of a request, by parameter."""
    own = {"prompt": parameters.prompt, "negative_prompt": parameters.negative_prompt}
    more = {name: value.string_value for name, value in parameters.params.items() if _PROMPT in name}
    return {name: value for name, value in {**own, **more}.items() if value}
