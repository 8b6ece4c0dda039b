"""ModelService: what is served here."""

# ruff: noqa: N802, ARG002 -- gRPC gives the methods their names and arguments
from __future__ import annotations

from typing import Any

import grpc

from numoe.actors.gateway.errors import answers_errors
from numoe.actors.gateway.interfaces import ServerContext
from numoe.actors.gateway.validation import Violations
from numoe.engine.errors import NotFoundError
from numoe.v1 import model_pb2 as pb
from numoe.v1 import model_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Describes the one model of this server."""

    def __init__(self, context: ServerContext) -> None:
        self._model, self._limits = model_message(context), context.limits

    @answers_errors
    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Find a model by its name, or the one there is."""
        violations = Violations()
        violations.at_most("name", len(request.name.encode()), self._limits.max_name_bytes, "bytes")
        violations.raise_if_any()
        if request.HasField("name") and request.name != self._model.name:
            raise NotFoundError(f"no model {request.name!r} is served here, only {self._model.name!r}")
        return pb.GetModelResponse(model=self._model)

    @answers_errors
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """All models."""
        return pb.ListModelsResponse(models=[self._model])


def model_message(context: ServerContext) -> pb.Model:
    """Describe the served model."""
    model = context.model
    return pb.Model(
        name=model.name,
        architecture=model.architecture,
        context_tokens=model.context_tokens,
        trained_context_tokens=model.trained_context_tokens,
        vocab_size=model.vocab_size,
        parameters=model.parameters,
        layers=model.layers,
        experts=model.experts,
        experts_used=model.experts_used,
        weight_format=model.weight_format,
        file_bytes=model.file_bytes,
        special_tokens=pb.SpecialTokens(
            bos=model.bos_id,
            eos=model.eos_id,
            eot=model.eot_id,
            pad=model.pad_id,
            end_of_generation=sorted(context.tokenizer.eog_ids),
        ),
        has_chat_template=context.chat_template is not None,
        fingerprint=model.fingerprint,
    )
