"""Send chat requests to the teacher's server, and tell its failures apart. `send` runs in worker threads."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict, SecretStr

from lora_trainer import logs
from lora_trainer.messages import Message

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion

# (parameter for the token limit, use structured outputs). Try each until the server accepts the request instead of answering
# HTTP 400 or 422: vLLM accepts the first variant, OpenAI's newer models only max_completion_tokens, and some servers do not
# support structured outputs (transformers serve ignores them)
_REQUEST_VARIANTS: Final = (
    ("max_tokens", True),
    ("max_completion_tokens", True),
    ("max_tokens", False),
    ("max_completion_tokens", False),
)
_LONGEST_PAUSE_S: Final = 600.0


class TeacherSettings(BaseModel):
    """Settings of the teacher server and its requests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str
    model: str
    """Drafts the dialogues."""
    critic_model: str | None = None
    """Criticises and repairs the drafts. None leaves them to the rules."""
    api_key: SecretStr
    concurrency: int = 8
    """Maximum number of concurrent requests."""
    dialogues_per_request: int = 4
    request_timeout_s: float = 120.0
    """Timeout of a request, after which the client retries it."""
    max_retries: int = 5
    """The OpenAI client's retries, for 408, 409, 429, 5xx and connection errors: exponential backoff, jitter and Retry-After."""
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Call:
    """One chat request."""

    model: str
    option: str
    """The command line's option for the model, for messages."""
    system: str
    user: str
    schema_name: str
    schema: dict[str, Any]
    max_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one request: a completion or a failure."""

    completion: ChatCompletion | None = None
    failure: str = ""
    """Kind of failure, or empty."""
    fatal: str = ""
    """Reason why retrying is useless, or empty."""
    pause_s: float = 0.0
    """How long the server asks the client to wait."""
    requests: int = 1
    """HTTP requests, including the client's retries."""
    rejected_variant: int | None = None
    """Index in `_REQUEST_VARIANTS` of the request that the server rejected."""


class TeacherClient:
    """The connection to the server. It waits where the server says so, and remembers which requests each model understands."""

    def __init__(self, settings: TeacherSettings) -> None:
        from openai import OpenAI

        self._settings = settings
        self._openai = OpenAI(
            base_url=settings.base_url,
            api_key=settings.api_key.get_secret_value(),
            timeout=settings.request_timeout_s,
            max_retries=settings.max_retries,
        )
        self._variants: defaultdict[str, int] = defaultdict(int)
        self._pause_until_s = 0.0
        self._stopping = threading.Event()

    def send(self, call: Call) -> Result:
        """Send one request. Returns known failures as a `Result` instead of raising."""
        import openai

        while (left_s := self._pause_until_s - time.monotonic()) > 0:
            if self._stopping.wait(left_s):
                return Result(failure="stopped")
        variant = self._variants[call.model]
        limit, is_structured = _REQUEST_VARIANTS[variant]
        more: dict[str, Any] = {limit: call.max_tokens}
        if is_structured:
            schema = {"name": call.schema_name, "strict": True, "schema": call.schema}
            more["response_format"] = {"type": "json_schema", "json_schema": schema}
        retried = 1 + self._settings.max_retries
        try:
            raw = self._openai.chat.completions.with_raw_response.create(
                model=call.model,
                messages=[{"role": "system", "content": call.system}, {"role": "user", "content": call.user}],
                temperature=call.temperature,
                **more,
            )
            return Result(raw.parse(), requests=1 + raw.retries_taken)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            return Result(
                failure="refused",
                fatal=Message("does not accept the API key (HTTP {status}); set OPENAI_API_KEY", status=error.status_code),
            )
        except openai.NotFoundError:
            return Result(
                failure="refused",
                fatal=Message(
                    "has no model {model!r} at this URL (HTTP 404); check {option} and that the URL ends in /v1",
                    model=call.model,
                    option=call.option,
                ),
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return Result(
                failure="refused",
                fatal=Message(
                    "rejects every request variant (HTTP {status}); check that it is a chat completions API",
                    status=error.status_code,
                ),
                rejected_variant=variant,
            )
        except openai.RateLimitError as error:
            return Result(failure="rate_limited", pause_s=_retry_after_s(error), requests=retried)
        except openai.APITimeoutError:
            return Result(failure="stalled", requests=retried)
        except openai.APIConnectionError:
            return Result(failure="connection", requests=retried)
        except openai.APIStatusError as error:
            return Result(failure=f"http_{error.status_code}", requests=retried)
        except (openai.APIError, ValueError):
            # the client's parser raises ValueError for a body that is not a chat completion
            return Result(failure="not_a_completion")

    def has_another_variant(self, result: Result, model: str) -> bool:
        """Return whether a rejected request can be sent in another variant, which later calls for the model then use."""
        if result.rejected_variant is None or result.rejected_variant + 1 == len(_REQUEST_VARIANTS):
            return False
        # concurrent requests are rejected together
        if result.rejected_variant == self._variants[model]:
            self._variants[model] += 1
            limit, is_structured = _REQUEST_VARIANTS[self._variants[model]]
            logs.get_logger().warning("teacher_asked_otherwise", limit=limit, structured_outputs=is_structured)
        return True

    def is_new_failure(self, result: Result) -> bool:
        """Wait as long as the server asks. Return False for one of several concurrent requests that hit the same rate limit."""
        now_s = time.monotonic()
        is_known = result.failure == "rate_limited" and now_s < self._pause_until_s
        self._pause_until_s = max(self._pause_until_s, now_s + min(result.pause_s, _LONGEST_PAUSE_S))
        return not is_known

    def stop(self) -> None:
        """Wake the threads that wait for a rate limit."""
        self._stopping.set()


def _retry_after_s(error: Any) -> float:
    try:
        return max(0.0, float(error.response.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0
