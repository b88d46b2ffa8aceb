"""Stream generated text over HTTP.

BUNDLE=gemma-3-270m-it uvicorn --app-dir examples/fastapi app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from gemma3_export import Engine, InputError, QueueFullError


class Generate(BaseModel):
    """The body of a request."""

    prompt: str = Field(max_length=20_000)
    max_new_tokens: int = Field(128, ge=1, le=1024)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the engine; when the server stops, finish what runs."""
    async with Engine(os.environ["BUNDLE"], warm_up=True) as app.state.engine:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/generate")
async def generate(request: Generate) -> StreamingResponse:
    """Stream the text that follows a prompt."""
    options = {"max_new_tokens": request.max_new_tokens, "allow_control_tokens": False}
    try:
        stream = app.state.engine.stream(request.prompt, **options)
    except QueueFullError as error:
        raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
    except InputError as error:
        raise HTTPException(400, str(error)) from error
    return StreamingResponse(stream, media_type="text/plain")  # a client that leaves cancels it
