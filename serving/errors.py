"""Errors of the server, in the form of OpenAI's API."""

from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse

from ..settings_hierbd3lm import did_you_mean

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
SHOWN = 80  # characters of a value in a message


class ApiError(Exception):
    """An error that a client is told.

    Args:
        status: HTTP status.
        param: field of the request that it is about.
        code: short name, such as `model_not_found`.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def error_response(error: ApiError) -> JSONResponse:
    """Return the response to a request that failed. A client may come again after 429 and 503, not at once."""
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    headers |= {"connection": "close"} if error.status in (408, 413) else {}
    return JSONResponse(error.body(), error.status, headers)


def read_validation_error(error: RequestValidationError, names: tuple[str, ...]) -> ApiError:
    """Return the first fault of a body.

    Args:
        names: fields of the request, to find the nearest one to an unknown name.
    """
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if (first["type"] in ("json_invalid", "missing") and first["loc"] == ("body",)) or first["type"] == "json_invalid":
        return ApiError(400, f"the body must be JSON, but: {first['msg']}", code="invalid_json")
    if first["loc"] == ("body",) and first["type"] != "value_error":
        return ApiError(400, "the body must be a JSON object, with the header `Content-Type: application/json`")
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        nearest = did_you_mean(place[-1], names) if len(place) == 1 else ""
        return ApiError(400, f"`{param}` is no field of this request{nearest}", param, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"`{param}` must be given, but is not", param, "missing_required_parameter")
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return ApiError(400, message, message.split("`")[1] if "`" in message else param, "unsupported_value")
    got = repr(first["input"])
    got = got if len(got) <= SHOWN else f"{got[:SHOWN]}..."
    return ApiError(
        400, f"`{param}`: {first['msg'][0].lower()}{first['msg'][1:]}, but got {got}", param, first["type"]
    )
