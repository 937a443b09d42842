"""Flags of `vllm serve`, text-generation-launcher and llama-server, as `nibble serve` spells them. docs/FLAGS.md lists
them all.

    another name    --hostname 0.0.0.0           ->  --host 0.0.0.0
    the model       --model-id org/name          ->  org/name
    as it is here   --enable-prefix-caching      ->  nothing
    one value       --tensor-parallel-size 1     ->  nothing; any other value is refused in words
    refused         --gpu-memory-utilization .9  ->  an error that says what there is in its place
"""

from collections.abc import Iterator, Sequence

from ..errors import UserError

MODEL = "MODEL"
RENAMED = {
    "--model": MODEL,
    "--model-id": MODEL,
    "-m": MODEL,
    "--hostname": "--host",
    "--alias": "--served-model-name",
    "-a": "--served-model-name",
    "--max-total-tokens": "--max-model-len",
    "--ctx-size": "--max-model-len",
    "-c": "--max-model-len",
    "--max-batch-size": "--max-num-seqs",
    "--parallel": "--max-num-seqs",
    "-np": "--max-num-seqs",
    "--max-batch-prefill-tokens": "--max-num-batched-tokens",
    "--batch-size": "--max-num-batched-tokens",
    "-b": "--max-num-batched-tokens",
    "--max-concurrent-requests": "--max-queued-requests",
    "--cors-allow-origin": "--allowed-origins",
    "--threads": "--num-threads",
    "-t": "--num-threads",
}
SWITCHES = {"--no-enable-prefix-caching": "--no-prefix-caching", "--no-webui": "--no-ui"}
ALREADY_SO = {
    "--enable-prefix-caching",
    "--enable-chunked-prefill",
    "--enable-auto-tool-choice",
    "--trust-remote-code",
    "--disable-log-requests",
    "--no-enable-log-requests",
    "--jinja",
}
# read from the checkpoint, or bounded by the context: whatever value they have
ALREADY_SO_WITH_VALUE = {"--quantization", "-q", "--max-input-tokens", "--max-input-length"}
ONLY = {
    "--tensor-parallel-size": "1",
    "-tp": "1",
    "--pipeline-parallel-size": "1",
    "-pp": "1",
    "--data-parallel-size": "1",
    "-dp": "1",
    "--num-shard": "1",
    "--sharded": "false",
    "--tokenizer-mode": "auto",
    "--load-format": "auto",
}
REFUSED = {
    "--gpu-memory-utilization": "memory is planned from what is free; --kv-cache-memory SIZE bounds the KV cache",
    "--cuda-memory-fraction": "memory is planned from what is free; --kv-cache-memory SIZE bounds the KV cache",
    "--enable-lora": "adapters are not supported; serve the merged model",
    "--lora-modules": "adapters are not supported; serve the merged model",
    "--lora-adapters": "adapters are not supported; serve the merged model",
    "--speculative-config": "drafting is not supported",
    "--tokenizer": "a model is served with the tokenizer that lies beside it",
    "--chat-template": "a model is served with the template of its own files: edit chat_template.jinja there",
}


def translated(args: Sequence[str]) -> list[str]:
    """Arguments of `nibble serve` with peers' flags as ours. UserError for one that is refused, or lacks its value."""
    return [part for given in _pairs(args) for part in _ours(*given)]


def _pairs(args: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each argument with its value, where it is a flag of a peer that takes one."""
    rest = iter(args)
    for arg in rest:
        name, equals, value = arg.partition("=")
        takes = name in RENAMED or name in ONLY or name in ALREADY_SO_WITH_VALUE
        if not takes:
            yield arg, None
        elif equals:
            yield name, value
        else:
            found = next(rest, None)
            if found is None:
                raise UserError(f"{name} lacks its value")
            yield name, found


def _ours(arg: str, value: str | None) -> list[str]:
    name = arg.partition("=")[0]
    if name in REFUSED:
        raise UserError(f"{name}: {REFUSED[name]}")
    if value is None:
        return [] if arg in ALREADY_SO else [SWITCHES.get(arg, arg)]
    if name in RENAMED:
        return [value] if RENAMED[name] == MODEL else [RENAMED[name], value]
    if name in ONLY and value.lower() != ONLY[name]:
        raise UserError(f"{name} {value} is not supported: there is {ONLY[name]} alone")
    return []
