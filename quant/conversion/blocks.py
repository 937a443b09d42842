"""transformers' own decoder blocks, one at a time, on lazily read weights.

The model is built on the meta device, so its size never matters; a block becomes real when it is asked for and is gone
when the caller lets go of it. What transformers passes to each block (rotary embeddings, full or sliding masks) is
recorded from a dry run of its own forward in which every block is replaced by a recorder.
"""

import copy
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from ...architectures.base import Attention, Fold, LayerSpec, LinearGroup, Mamba2, experts_of
from ...architectures.multimodal import text_config
from ...architectures.registry import model_spec
from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from . import streams
from .carried import Carried
from .experts import rename, unroll

_PAIRS = ("bamba",)  # models that take attention weights from their blocks, too


class BlockSource:
    """The decoder blocks of a checkpoint, in float32 on a device."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        self.checkpoint = checkpoint
        self.device = device
        self.spec = model_spec(checkpoint.config, checkpoint.names())
        described = text_config(checkpoint.config)
        settings = {k: _number(v) for k, v in described.items() if k != "quantization_config"}
        try:
            self.config = AutoConfig.for_model(**settings)
            with torch.device("meta"):
                self._model = AutoModel.from_config(self.config, dtype=torch.float32)
                for layer, of in zip(self._model.layers, self.spec.layers, strict=True):
                    _adapt(layer, of)
        except Exception as error:  # whatever transformers makes of a value that it did not expect
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"config.json describes no model: {reason}",
                file=checkpoint.path,
                fix="correct config.json, or take the original one",
            ) from error
        self.carried = Carried(self.spec)
        self._layers = list(self._model.layers)
        self._check_shapes()

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def dtype(self) -> torch.dtype:
        """What tensors that stay dense are stored in: the source's 16-bit dtype, else bfloat16."""
        return self.checkpoint.dense_dtype

    def linear_shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """Names within block `index` -> [out, in], of all its linears."""
        linears = (
            (n, m) for n, m in self._layers[index].named_modules() if isinstance(m, nn.Linear)
        )
        return {name: (module.out_features, module.in_features) for name, module in linears}

    def _check_shapes(self) -> None:
        """Raise CheckpointError for a tensor of the blocks that is missing or not shaped as config.json implies."""
        for index, layer in enumerate(self._layers):
            for name, wanted, is_matrix in _stored(layer):
                full = f"{self.name(index)}.{name}"
                if is_matrix and self.checkpoint.is_quantized(full.removesuffix(".weight")):
                    continue
                there = tuple(self.checkpoint.shape(full))
                if there != tuple(wanted.shape):
                    raise CheckpointError(
                        f"has shape {list(there)}, config.json implies {list(wanted.shape)}",
                        file=self.checkpoint.path,
                        tensor=full,
                        fix="config.json and the weights must be of one model",
                    )

    def name(self, index: int) -> str:
        """The module name of a block, e.g. model.layers.3"""
        return self.spec.layer_name(index)

    def groups(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Names within block `index` of the linears that read the same input, in the order in which they run."""
        return tuple(names for stage in self.stages(index) for names in stage)

    def stages(self, index: int) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """The groups of block `index`, together those that do not wait for each other: one for each expert."""
        return tuple(
            tuple(member.modules for member in group.members()) for group in self.spec.groups(index)
        )

    def linear_groups(self, index: int) -> tuple[LinearGroup, ...]:
        return self.spec.groups(index)

    def folds(self, index: int) -> tuple[Fold, ...]:
        return self.spec.folds(index)

    def load(self, index: int) -> nn.Module:
        """Block `index` with its weights, dequantized where the checkpoint is quantized."""
        block = copy.deepcopy(self._layers[index])
        state = {}
        for name, _, is_matrix in _stored(block):
            full = f"{self.name(index)}.{name}"
            if is_matrix:
                tensor = self.checkpoint.dense(full.removesuffix(".weight"), torch.float32)
            else:
                tensor = self.checkpoint.tensor(full, torch.float32)
            state[name] = tensor.to(self.device)
        block.load_state_dict(state, assign=True)
        ready: nn.Module = block.requires_grad_(False).eval()
        if self.spec.alt_up is not None:  # what is not stored of a block on the meta device
            router: Any = ready.get_submodule("altup")
            router.router_input_scale = torch.tensor(1 / self.spec.hidden_size, device=self.device)
        told = None
        if self.spec.per_layer_inputs is not None:
            told = partial(self._per_layer_input, index)
        self.carried.attach(ready, index, told)
        return ready

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [n, T] -> activations [n, T, carried.width], as the first block takes them."""
        hidden = self._embed(token_ids)
        if (alt_up := self.spec.alt_up) is not None:
            hidden = streams.start(hidden, alt_up, self.spec, self.checkpoint)
        return self.carried.start(hidden, token_ids)

    def last_hidden(self, activations: Tensor) -> Tensor:
        """What the last block gives -> [n, T, hidden], which the final norm reads."""
        hidden = self.carried.hidden(activations)
        if (alt_up := self.spec.alt_up) is None:
            return hidden
        return streams.end(hidden, alt_up, self.spec, self.checkpoint)

    def _embed(self, token_ids: Tensor) -> Tensor:
        table = self.checkpoint.dense(f"{self.spec.prefix}{self.spec.embedding}")
        hidden = nn.functional.embedding(token_ids, table).float().to(self.device)
        if self.spec.embedding_norm:
            hidden = nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=self.spec.norm_eps)
        if self.spec.embedding_scale != 1.0:
            hidden *= torch.tensor(self.spec.embedding_scale, dtype=table.dtype).float()
        self.checkpoint.release()  # a table may be larger than a block
        return hidden

    def _per_layer_input(self, index: int, token_ids: Tensor) -> Tensor:
        """token_ids [n, T] -> what block `index` is told of them once more, [n, T, width] (PerLayerInputs)."""
        if (spec := self.spec.per_layer_inputs) is None:
            raise ValueError("a model without inputs for every layer")
        prefix, device = self.spec.prefix, self.device
        own = slice(index * spec.width, (index + 1) * spec.width)
        table = self.checkpoint.dense_part(f"{prefix}embed_tokens_per_layer", cols=own)
        projection = self.checkpoint.dense_part(f"{prefix}per_layer_model_projection", rows=own)
        norm = self.checkpoint.tensor(f"{prefix}per_layer_projection_norm.weight", torch.float32)
        seen = self._embed(token_ids) @ projection.float().to(device).t()
        seen = seen * self.spec.hidden_size**-0.5
        seen = nn.functional.rms_norm(seen, norm.shape, norm.to(device), self.spec.norm_eps)
        known = torch.where(token_ids < spec.vocab_size, token_ids, 0).cpu()
        said = nn.functional.embedding(known, table).float().to(device) * spec.width**0.5
        told: Tensor = (seen + said) * 2.0**-0.5
        return told

    def keyword_arguments(self, hidden: Tensor) -> list[dict[str, Any]]:
        """What transformers passes to each block, besides the hidden states, for a batch shaped as activations are."""
        pairs = self.config.model_type in _PAIRS
        recorders = [_Recorder(layer, pairs) for layer in self._layers]
        self._model.layers = nn.ModuleList(recorders)
        setattr(self._model, self.spec.final_norm, nn.Identity())
        for name, module in list(self._model.named_modules()):
            if any(key.endswith("inv_freq") for key, _ in module.named_buffers(recurse=False)):
                made = type(module)(config=module.config).to(self.device)  # it is on meta
                self._model.set_submodule(name, made)
        # Gemma 4: blocks are told when they run (carried.py), and no tokens are left out on the way.
        self._model.hidden_size_per_layer_input = 0
        self._model.first_kv_shared_layer_idx = -1
        if self.spec.alt_up is not None:  # Gemma 3n: the same, and what makes streams is on meta
            self._model.project_per_layer_inputs = self._nothing_told
            for name in (*self.spec.alt_up.projections, *self.spec.alt_up.unprojections):
                self._model.set_submodule(name, nn.Identity())
        self._model(inputs_embeds=hidden[..., : self.spec.hidden_size], use_cache=False)
        return [recorder.seen for recorder in recorders]

    def _nothing_told(self, embedded: Tensor, _: Tensor | None = None) -> Tensor:
        """[n, T, layers, 0]"""
        return embedded.new_zeros(*embedded.shape[:2], len(self), 0)


def _adapt(layer: nn.Module, of: LayerSpec) -> None:
    """Make one of transformers' decoder layers, on the meta device, what the checkpoint's is: see `unroll`; and with
    the time steps that Nemotron-H's Mamba-2 has (architectures/nemotron.py)."""
    if (experts := experts_of(of.mlp)) is not None:
        unroll(layer, experts)
    if isinstance(of.mixer, Attention) and of.mixer.head_gate:  # as published files call it
        attention: Any = layer.get_submodule(of.mixer.module)
        rename(attention, "g_proj", of.mixer.gate.rpartition(".")[2])
    if isinstance(of.mixer, Mamba2):
        mixer: Any = layer.get_submodule(of.mixer.module)
        mixer.time_step_limit = of.mixer.time_step_limit


def _number(value: Any) -> Any:
    """What transformers writes of a number that JSON does not have, as that number."""
    if isinstance(value, list):
        return [_number(each) for each in value]
    special = isinstance(value, dict) and value.keys() == {"__float__"}
    return float(value["__float__"]) if special else value


def linear(block: nn.Module, name: str) -> nn.Linear:
    """A linear of a block by its name there. TypeError if it is another kind of module."""
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is no linear but a {type(module).__name__}")
    return module


def _stored(block: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Names, tensors and whether it is a linear's weight, of all that a checkpoint has of a block."""
    matrices = {f"{n}.weight" for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    for name, tensor in block.state_dict(keep_vars=True).items():
        yield name, tensor, name in matrices


class _Recorder(nn.Module):
    """Stands in for a block: keeps the keyword arguments of its call, passes the hidden states on."""

    def __init__(self, layer: nn.Module, pairs: bool):
        super().__init__()
        self.seen: dict[str, Any] = {}
        self.pairs = pairs
        self.names = list(inspect.signature(layer.forward).parameters)[1:]
        for name in ("attention_type", "block_type"):  # by which a model chooses a block's mask
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden: Tensor, *given: Any, **kwargs: Any) -> Any:
        self.seen = dict(zip(self.names, given, strict=False)) | kwargs
        return (hidden, None) if self.pairs else hidden
