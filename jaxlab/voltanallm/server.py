"""An OpenAI-compatible front of an engine, with a dashboard, metrics, and a door to the clocks."""

import asyncio
import base64
import contextlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any, TypeVar

from jaxlab.core.errors import require
from jaxlab.voltanallm.limits import Limits

T = TypeVar("T")


def create_app(
    engine: Any,
    *,
    model_name: str,
    tokenizer: Any = None,
    api_key: str | None = None,
    gpu: Any = None,
    controller: Any = None,
    limits: Limits | None = None,
    warm: bool = True,
) -> Any:
    """A server as an ASGI application.

    `/v1/completions`, `/v1/chat/completions` and `/v1/models` are OpenAI's, `/health` says whether requests are taken,
    `/metrics` speaks to Prometheus, `/control/freq` shows and sets the clocks, and `/` is the dashboard. Errors are
    OpenAI's error object.

    The application owns the engine, and runs it on a thread of its own, from its start (or the first request) to its
    shutdown; afterwards the engine can be used again.

    Args:
      engine: an `Engine` or a `DisaggregatedEngine`.
      model_name: what the model is called; requests for another are answered with 404.
      tokenizer: None: prompts are token ids, and text is ids in decimal, separated by spaces.
      api_key: what clients must send as a bearer token, or a browser as the password; `/health` is open to all.
      gpu: whose clock is set: a backend, or one for each worker, `{worker id: backend}`.
      controller: sets it: an `EcoFreq` or any other with its `decide`, or one for each worker. Needs `gpu`.
      limits: what one client may take.
      warm: compile everything when the application starts rather than when it is first needed.

    Raises:
      MissingExtra: fastapi or prometheus_client is not installed.
      ValueError: `gpu` or `controller` name a worker that the engine does not have, or there is a controller without
        a GPU.
    """
    fastapi: Any = require("fastapi", "serving")
    require("prometheus_client", "serving")
    from jaxlab.voltanallm import dashboard
    from jaxlab.voltanallm.engine_loop import EngineLoop
    from jaxlab.voltanallm.service import Service
    from jaxlab.voltanallm.telemetry import Telemetry
    from jaxlab.voltanallm.worker_controls import WorkerControls

    limits = limits or Limits()
    controls = WorkerControls(engine, gpu, controller)
    loop = EngineLoop(engine, max_requests=limits.requests, controls=controls, warm=warm)
    telemetry = Telemetry(loop, controls.states)
    service = Service(
        loop,
        model_name=model_name,
        tokenizer=tokenizer,
        room=_room(engine),
        limits=limits,
        telemetry=telemetry,
    )
    board = dashboard.Board(model_name, loop, telemetry, controls.states)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        loop.start()
        await asyncio.to_thread(loop.ready.wait)
        keeping = asyncio.create_task(board.keep())
        yield
        keeping.cancel()
        await asyncio.to_thread(loop.close)

    app = fastapi.FastAPI(title=f"jaxlab: {model_name}", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine_loop, app.state.limits, app.state.telemetry = loop, limits, telemetry
    _answer_errors(app, telemetry)
    _add_openai(app, service)
    _add_operations(app, service, controls, telemetry, board)
    if api_key is not None:
        app.add_middleware(_Guard, api_key=api_key)
    return app


def _room(engine: Any) -> int:
    """Tokens of prompt and answer that a request may have."""
    config = engine.config
    return min(engine.model.config.max_position_embeddings, (config.num_pages - 1) * config.page_size)


def _answer_errors(app: Any, telemetry: Any) -> None:
    """Makes every error OpenAI's error object."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    from jaxlab.voltanallm.protocol import ApiError

    def answer(error: ApiError) -> Any:
        telemetry.refused(error.status)
        return JSONResponse(error.body, error.status, error.headers)

    async def known(_: Any, error: Any) -> Any:
        return answer(error)

    async def of_http(request: Any, error: Any) -> Any:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return answer(ApiError(error.status_code, message, headers=error.headers))

    async def of_query(_: Any, error: Any) -> Any:
        first = error.errors()[0]
        return answer(ApiError(400, f"{first['loc'][-1]}: {first['msg']}", param=str(first["loc"][-1])))

    async def unforeseen(_: Any, error: Any) -> Any:
        return answer(ApiError(500, f"the server failed ({type(error).__name__})", code="internal_error"))

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_query)
    app.add_exception_handler(Exception, unforeseen)


def _add_openai(app: Any, service: Any) -> None:
    """Adds OpenAI's endpoints."""
    from fastapi import Request
    from fastapi.responses import JSONResponse

    from jaxlab.voltanallm.protocol import ChatRequest, CompletionRequest, read
    from jaxlab.voltanallm.streams import event_stream

    async def generate(http: Request, kind: Any) -> Any:
        request = read(kind, await _body(http, service.limits))
        job = await _while_there(http, service.submit(request))
        try:
            if request.stream:
                events = service.stream(job)
                # Nothing is sent before the first event, so that trouble until then has a status of its own.
                first = await _while_there(http, anext(events))
                return event_stream(first, events, lambda: service.give_up(job), service.limits.stall_s)
            return JSONResponse(await _while_there(http, service.whole(job)))
        except BaseException:
            service.give_up(job)
            raise

    @app.post("/v1/completions", openapi_extra=_schema(CompletionRequest))
    async def completions(http: Request) -> Any:
        return await generate(http, CompletionRequest)

    @app.post("/v1/chat/completions", openapi_extra=_schema(ChatRequest))
    async def chat_completions(http: Request) -> Any:
        return await generate(http, ChatRequest)

    def model() -> dict[str, Any]:
        return {"id": service.model_name, "object": "model", "created": service.created, "owned_by": "jaxlab"}

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Any:
        service.check_model(name)
        return model()


def _add_operations(app: Any, service: Any, controls: Any, telemetry: Any, board: Any) -> None:
    """Adds what operators look at and turn."""
    import prometheus_client
    from fastapi import Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response

    from jaxlab.voltanallm import dashboard
    from jaxlab.voltanallm.protocol import ApiError, FrequencyRequest, read

    loop = service.loop

    @app.get("/health")
    async def health() -> Any:
        why = loop.unavailable
        return JSONResponse({"status": "ok" if why is None else why}, 200 if why is None else 503)

    @app.get("/metrics")
    async def metrics() -> Any:
        return Response(telemetry.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Any:
        return HTMLResponse(dashboard.page(service.model_name), headers={"Content-Security-Policy": dashboard.POLICY})

    @app.get("/dashboard/data")
    async def data(since: float = 0.0) -> Any:
        return board.data(since)

    def clocks() -> dict[str, Any]:
        return {
            "workers": [
                {"id": state.id, "mode": state.mode, "freq_mhz": state.freq_mhz, "slo_ms": state.slo_ms}
                for state in controls.states()
            ]
        }

    @app.get("/control/freq")
    async def frequencies() -> Any:
        return clocks()

    @app.post("/control/freq", openapi_extra=_schema(FrequencyRequest))
    async def set_frequencies(http: Request) -> Any:
        # A browser asks before it sends JSON to another site, and is refused; any other type it would just send.
        if http.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError(400, "content-type: expected application/json")
        wanted = read(FrequencyRequest, await _body(http, service.limits))
        loop.start()
        try:
            await asyncio.wrap_future(
                loop.call(lambda: controls.command(wanted.mode, wanted.freq_mhz, wanted.slo_ms, wanted.worker))
            )
        except ValueError as error:
            raise ApiError.bad_value(error) from None
        return clocks()


def _schema(kind: Any) -> dict[str, Any]:
    """What the API's description says of a body that we read ourselves."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


async def _body(http: Any, limits: Limits) -> bytes:
    """A request's body, as far as its size and the time it takes are bearable."""
    from starlette.requests import ClientDisconnect

    from jaxlab.voltanallm.protocol import ApiError

    # What comes after is not read: the connection ends with the answer.
    too_large = ApiError(
        413, f"the body is larger than {limits.body_bytes} bytes", code="too_large", headers={"Connection": "close"}
    )
    declared = http.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for part in http.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        message = f"the body did not arrive within {limits.body_s:g} s"
        raise ApiError(408, message, code="too_slow", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(499, "the client has gone") from None
    return bytes(body)


async def _while_there(http: Any, work: Awaitable[T]) -> T:
    """What an awaitable gives, which ends when the client leaves; for after the body has been read."""
    from jaxlab.voltanallm.protocol import ApiError

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    leaving, working = asyncio.ensure_future(gone()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({leaving, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has gone")
        return working.result()
    finally:
        for task in (leaving, working):
            task.cancel()
        await asyncio.wait({leaving, working})


class _Guard:
    """Middleware that asks for a key; as the password it may come from a browser, which then shows the dashboard."""

    def __init__(self, app: Any, api_key: str):
        self._app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._knows(dict(scope["headers"])):
            await self._app(scope, receive, send)
            return
        from fastapi.responses import JSONResponse

        from jaxlab.voltanallm.protocol import ApiError

        asked = 'Basic realm="jaxlab"' if scope["path"] == "/" else "Bearer"
        error = ApiError(401, "expected the API key of this server", code="invalid_api_key")
        await JSONResponse(error.body, 401, {"WWW-Authenticate": asked})(scope, receive, send)

    def _knows(self, headers: Mapping[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"basic":
            with contextlib.suppress(ValueError):
                given = base64.b64decode(given, validate=True).partition(b":")[2]
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(given.strip(), self._key)
