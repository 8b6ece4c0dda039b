"""TokenizerService: the served model's tokenizer and chat template."""

# ruff: noqa: N802, ARG002 -- gRPC gives the methods their names and arguments
from __future__ import annotations

from typing import Any

import grpc

from numoe.actors.gateway.errors import answers_errors
from numoe.actors.gateway.interfaces import ServerContext
from numoe.actors.gateway.prompts import off_loop, render_chat
from numoe.actors.gateway.validation import Violations, check_messages, check_token_ids
from numoe.v1 import tokenizer_pb2 as pb
from numoe.v1 import tokenizer_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Answers from the tokenizer alone, whatever the worker does."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    @answers_errors
    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Text to token ids; an empty text has none or the model's own special ones."""
        size, violations = len(request.text.encode()), Violations()
        violations.at_most("text", size, self._context.limits.max_prompt_bytes, "bytes")
        violations.raise_if_any()
        ids = await off_loop(
            size,
            self._context.tokenizer.encode,
            request.text,
            add_special=request.add_special if request.HasField("add_special") else True,
            parse_special=request.parse_special if request.HasField("parse_special") else True,
        )
        return pb.TokenizeResponse(token_ids=ids)

    @answers_errors
    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        """Token ids to text."""
        violations = Violations()
        check_token_ids("token_ids", request.token_ids, self._context, violations)
        violations.raise_if_any()
        ids = list(request.token_ids)
        return pb.DetokenizeResponse(text=await off_loop(len(ids), self._context.tokenizer.decode, ids))

    @answers_errors
    async def ApplyTemplate(
        self,
        request: pb.ApplyTemplateRequest,
        context: Context,
    ) -> pb.ApplyTemplateResponse:
        """Render a conversation to the text of its prompt."""
        violations = Violations()
        check_messages("messages", request.messages, self._context.limits, violations)
        violations.raise_if_any()
        opened = request.add_generation_prompt if request.HasField("add_generation_prompt") else True
        text = await render_chat(self._context, request.messages, add_generation_prompt=opened)
        return pb.ApplyTemplateResponse(text=text)
