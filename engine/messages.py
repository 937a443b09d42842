"""What crosses the socket pair between the API process and the engine process: typed msgspec structs, msgpack, each
frame preceded by its length as a 4-byte little-endian integer. Never pickle. Importing this needs no torch.

    API process                             engine process
      AddRequest, AbortRequests, Shutdown  ->
      CompileGrammar, EncodeImages         ->
      Ping                                 ->
                                           <-  Pong                 by the loop, between two steps
                                           <-  GrammarCompiled, ImagesEncoded   as soon as they are
                                           <-  Ready | Fatal        once, after loading
                                           <-  StepOutputs          after every step with news
"""

from typing import Any

import msgspec

from .pooling import EmbeddingInfo, Task
from .sampling_params import SamplingParams


class AddRequest(msgspec.Struct, tag="add", omit_defaults=True):
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float = 0.0  # time.time()
    cache_salt: bytes = b""
    images: list[bytes] = []  # files, in the order of the prompt's image tokens


class AbortRequests(msgspec.Struct, tag="abort"):
    request_ids: list[str]


class CompileGrammar(msgspec.Struct, tag="compile"):
    """Have a grammar ready for requests that are about to come. Answered by GrammarCompiled."""

    key: int
    grammar: str  # llguidance's form


class GrammarCompiled(msgspec.Struct, tag="compiled"):
    key: int
    error: str  # empty, or why it cannot be kept to, fit for the client to read


class EncodeImages(msgspec.Struct, tag="images"):
    """Have images ready for a request that is about to come. Answered by ImagesEncoded."""

    key: int
    files: list[bytes]


class Placeholder(msgspec.Struct, frozen=True):
    """What stands for an image in a prompt: text for the tokenizer, in which each image token stands for a run."""

    text: str
    runs: list[int]  # lengths in tokens, in order


class ImagesEncoded(msgspec.Struct, tag="encoded"):
    key: int
    placeholders: list[Placeholder]  # of each file
    error: str = ""  # why there are none, fit for the client to read
    refused: int | None = None  # which of the files it is about


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Stop at once; the API process drains before it sends this."""


class Ping(msgspec.Struct, tag="ping"):
    """Is the loop still going round? Answered by a Pong."""


class Pong(msgspec.Struct, tag="pong"):
    """It is."""


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one position, natural logarithm, of the distribution before temperature and penalties."""

    token_id: int
    logprob: float
    rank: int  # 1: the most probable token
    top_ids: list[int]
    top_logprobs: list[float]


class RequestOutput(msgspec.Struct, omit_defaults=True):
    """News of one request after one step."""

    request_id: str
    token_ids: list[int] = []  # new since the last message
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids, if asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once; the first position has none
    finish_reason: str | None = None  # a FinishReason
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str = ""
    # What params.pooling asked for, little-endian float32: an embedding, or one score
    embedding: bytes = b""


class EngineStats(msgspec.Struct, omit_defaults=True):
    """The engine's gauges and running totals, sent with every StepOutputs."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    step_tokens: int = 0  # tokens in the step just done


class StepOutputs(msgspec.Struct, tag="outputs"):
    outputs: list[RequestOutput]
    stats: EngineStats


class VisionInfo(msgspec.Struct, frozen=True):
    """How a chat template writes an image, and the token that its embeddings stand in place of."""

    image_token: str
    image_token_id: int


class Ready(msgspec.Struct, tag="ready"):
    """The engine has loaded, measured its memory and run one forward pass."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    num_blocks: int
    block_size: int
    dtype: str
    device: str
    quantization: str  # "awq int4 g64", "none", ...
    kernels: dict[str, int]  # kernel name -> layers that use it
    ledger: dict[str, int]  # bytes: weights, kv_cache, activations, recurrent_states, vision
    load_seconds: float = 0.0
    tasks: tuple[Task, ...] = ("generate",)  # what may be asked of it
    embedding: EmbeddingInfo | None = None  # where it embeds
    card: dict[str, Any] | None = None  # what its conversion measured, quant/card_file.py
    vision: VisionInfo | None = None  # where it sees


class Fatal(msgspec.Struct, tag="fatal"):
    """The engine cannot go on. exit_code 2: bad input, said in one line; 1: a defect."""

    message: str
    exit_code: int = 1


ToEngine = AddRequest | AbortRequests | CompileGrammar | EncodeImages | Shutdown | Ping
FromEngine = Ready | Fatal | StepOutputs | Pong | GrammarCompiled | ImagesEncoded

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def frame(message: ToEngine | FromEngine | msgspec.Struct) -> bytes:
    """A message as it crosses the socket: its length in 4 bytes, little-endian, and its msgpack."""
    body = encode(message)
    return len(body).to_bytes(4, "little") + body


class FrameReader:
    """Cuts a byte stream back into the bodies of its frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take in some bytes of the stream; the bodies that are now complete."""
        buffer, bodies, start = self._buffer, [], 0
        buffer += data
        while len(buffer) - start >= 4:
            end = start + 4 + int.from_bytes(buffer[start : start + 4], "little")
            if len(buffer) < end:
                break
            bodies.append(bytes(buffer[start + 4 : end]))
            start = end
        del buffer[:start]
        return bodies
