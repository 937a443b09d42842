"""transformers' own decoder blocks, one at a time, on lazily read weights.

The model is built on the meta device, so its size never matters; a block becomes real when it is asked for and is gone
when the caller lets go of it. What transformers passes to each block (rotary embeddings, full or sliding masks) is
recorded from a dry run of its own forward in which every block is replaced by a recorder.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ...architectures.base import Fold
from ...architectures.multimodal import text_config
from ...architectures.registry import model_spec
from ...errors import CheckpointError
from ..checkpoint import Checkpoint


class BlockSource:
    """The decoder blocks of a checkpoint, in float32 on a device."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        self.checkpoint = checkpoint
        self.device = device
        self.spec = model_spec(checkpoint.config, checkpoint.names())
        described = text_config(checkpoint.config)
        settings = {k: v for k, v in described.items() if k != "quantization_config"}
        try:
            self.config = AutoConfig.for_model(**settings)
            with torch.device("meta"):
                causal_lm = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        except Exception as error:  # whatever transformers makes of a value that it did not expect
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"config.json describes no model: {reason}",
                file=checkpoint.path,
                fix="correct config.json, or take the original one",
            ) from error
        self._model = causal_lm.model
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
            for name, parameter in layer.named_parameters():
                full = f"{self.name(index)}.{name}"
                if not full.endswith(".weight") or not self.checkpoint.is_quantized(
                    full.removesuffix(".weight")
                ):
                    there = tuple(self.checkpoint.shape(full))
                    if there != tuple(parameter.shape):
                        raise CheckpointError(
                            f"has shape {list(there)}, config.json implies {list(parameter.shape)}",
                            file=self.checkpoint.path,
                            tensor=full,
                            fix="config.json and the weights must be of one model",
                        )

    def name(self, index: int) -> str:
        """The module name of a block, e.g. model.layers.3"""
        return self.spec.layer_name(index)

    def groups(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Names within block `index` of the linears that read the same input, in the order in which they run."""
        return tuple(group.modules for group in self.spec.groups(index))

    def folds(self, index: int) -> tuple[Fold, ...]:
        return self.spec.folds(index)

    def load(self, index: int) -> nn.Module:
        """Block `index` with its weights, dequantized where the checkpoint is quantized."""
        block = copy.deepcopy(self._layers[index])
        state = {}
        for module_name, module in block.named_modules():
            full = f"{self.name(index)}.{module_name}"
            for name, _ in module.named_parameters(recurse=False):
                is_matrix = isinstance(module, nn.Linear) and name == "weight"
                read = self.checkpoint.dense if is_matrix else self.checkpoint.tensor
                where = full if is_matrix else f"{full}.{name}"
                state[f"{module_name}.{name}"] = read(where, torch.float32).to(self.device)
        block.load_state_dict(state, assign=True)
        ready: nn.Module = block.requires_grad_(False).eval()
        return ready

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [n, T] -> hidden states [n, T, hidden], as the first block sees them."""
        table = self.checkpoint.dense(f"{self.spec.prefix}embed_tokens")
        hidden = nn.functional.embedding(token_ids, table).float().to(self.device)
        if self.spec.embedding_scale != 1.0:
            hidden *= torch.tensor(self.spec.embedding_scale, dtype=table.dtype).float()
        self.checkpoint.release()  # a table may be larger than a block
        return hidden

    def keyword_arguments(self, hidden: Tensor) -> list[dict[str, Any]]:
        """What transformers passes to each block, besides the hidden states, for a batch shaped as hidden."""
        recorders = [_Recorder(layer) for layer in self._layers]
        self._model.layers = nn.ModuleList(recorders)
        self._model.norm = nn.Identity()
        self._model.rotary_emb = type(self._model.rotary_emb)(config=self.config).to(self.device)
        self._model(inputs_embeds=hidden, use_cache=False)
        return [recorder.seen for recorder in recorders]


def linear(block: nn.Module, name: str) -> nn.Linear:
    """A linear of a block by its name there. TypeError if it is another kind of module."""
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is no linear but a {type(module).__name__}")
    return module


class _Recorder(nn.Module):
    """Stands in for a block: keeps the keyword arguments of its call, passes the hidden states on."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.seen: dict[str, Any] = {}
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.seen = kwargs
        return hidden
