"""The Music Transformer in PyTorch, the peer of the benchmark: eager, with torch's fused pieces where there are any."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from jaxaudio.models.music_transformer import MusicTransformerConfig
from jaxaudio.nn.transformer_config import TransformerConfig


class TorchBlock(nn.Module):
    """Pre-norm relative self-attention and ReLU MLP; names of dimensions as in `jaxaudio.nn.transformer`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        dim, width = config.embed_dim, config.num_heads * config.query_head_dim
        self.attention_norm = nn.LayerNorm(dim, eps=config.norm_epsilon)
        self.query_key_value = nn.Linear(dim, 3 * width, bias=False)
        self.relative_embeddings = nn.Parameter(
            torch.empty(config.num_heads, config.max_distance, config.query_head_dim)
        )
        self.out = nn.Linear(width, dim, bias=False)
        self.mlp_norm = nn.LayerNorm(dim, eps=config.norm_epsilon)
        self.up = nn.Linear(dim, config.mlp_dim)
        self.down = nn.Linear(config.mlp_dim, dim)

    def forward(self, x: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
        """(B, T, D); `future` (T, T) is True where a key must not be seen."""
        config = self.config
        y = self.attention(self.attention_norm(x), future)
        x = x + F.dropout(y, config.dropout_rate, self.training)
        hidden = F.dropout(F.relu(self.up(self.mlp_norm(x))), config.mlp_dropout_rate, self.training)
        return x + F.dropout(self.down(hidden), config.dropout_rate, self.training)

    def attention(self, x: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
        """The paper's skew, one pass over the logits for the sum of both terms (baddbmm) and one for the mask."""
        config = self.config
        batch, length, _ = x.shape
        heads = self.query_key_value(x).view(batch, length, 3, config.num_heads, config.query_head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each B N T H
        query = query * config.query_head_dim**-0.5
        rows = min(length, config.max_distance)
        products = torch.einsum("bnth,nrh->bntr", query, self.relative_embeddings[:, -rows:])
        skewed = F.pad(products, (length - rows + 1, 0)).view(batch, config.num_heads, length + 1, length)[:, :, 1:]
        logits = torch.baddbmm(skewed.flatten(0, 1), query.flatten(0, 1), key.flatten(0, 1).mT)
        weights = torch.softmax(logits.masked_fill_(future, -torch.inf), dim=-1)
        weights = F.dropout(weights, config.attention_dropout_rate, self.training)
        out = torch.bmm(weights, value.flatten(0, 1)).view(batch, config.num_heads, length, -1)
        return self.out(out.transpose(1, 2).flatten(2))


class TorchMusicTransformer(nn.Module):
    """The relative rows of Table 2: the same function as `jaxaudio.models.music_transformer` with the same parameters.

    Options of the config that those rows do not use have no counterpart here; the benchmark's check of both models'
    outputs would tell.
    """

    def __init__(self, config: MusicTransformerConfig, length: int):
        super().__init__()
        self.config = config
        transformer = config.transformer
        dim = transformer.embed_dim
        self.embedding = nn.Embedding(config.vocab_size, dim, padding_idx=0)
        self.concatenated = None
        if config.position_encoding == "concatenated":
            self.concatenated = nn.Linear(2 * dim + config.label_period, dim, bias=False)
        self.blocks = nn.ModuleList(TorchBlock(transformer) for _ in range(transformer.num_layers))
        self.norm = nn.LayerNorm(dim, eps=transformer.norm_epsilon)
        self.logits = nn.Linear(dim, config.vocab_size, bias=False)
        self.register_buffer("positions", _positions(length, dim, config.label_period))
        self.register_buffer("future", torch.ones(length, length, dtype=torch.bool).triu(1))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.logits.weight.device

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) ids -> (B, T, V) logits; T is the length it was made for."""
        x = self.embedding(tokens) * self.config.transformer.embed_dim**0.5
        if self.concatenated is None:
            x = x + self.positions
        else:
            x = self.concatenated(torch.cat([x, self.positions.expand(x.shape[0], -1, -1)], dim=-1))
        x = F.dropout(x, self.config.transformer.dropout_rate, self.training)
        for block in self.blocks:
            x = block(x, self.future)
        return self.logits(self.norm(x))

    def load(self, params: Any) -> "TorchMusicTransformer":
        """Copies parameters of our model, every one of them; gives itself."""
        state = {name: torch.from_numpy(np.array(array)) for name, array in _renamed(params).items()}
        self.load_state_dict(state | dict(self.named_buffers()))
        return self


def _positions(length: int, dim: int, label_period: int) -> torch.Tensor:
    """(T, D + label_period): sines, cosines, and each position modulo the period as one-hot."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(1e4) / (half - 1)))
    phase = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    parts = [phase.sin(), phase.cos()]
    if label_period:
        parts.append(F.one_hot(torch.arange(length) % label_period, label_period))
    return torch.cat(parts, dim=-1).float()


def _renamed(params: Any) -> dict[str, np.ndarray]:
    """Our parameters under the peer's names: kernels transposed, q, k and v joined, layers taken apart."""
    embedding = np.array(params["embedding"]["embedding"])
    embedding[0] = 0  # id 0 is the zero vector whatever the table holds
    norm = params["transformer"]["norm"]["layer"]
    out = {
        "embedding.weight": embedding,
        "norm.weight": norm["scale"],
        "norm.bias": norm["bias"],
        "logits.weight": params["logits"]["kernel"].T,
    }
    if "concatenated" in params:
        out["concatenated.weight"] = params["concatenated"]["kernel"].T
    layers = params["transformer"]["layers"]
    attention, mlp = layers["attention"], layers["mlp"]
    for i in range(layers["attention_norm"]["layer"]["scale"].shape[0]):
        dim = attention["query"]["kernel"].shape[1]
        joined = [attention[name]["kernel"][i].reshape(dim, -1).T for name in ("query", "key", "value")]
        out |= {
            f"blocks.{i}.query_key_value.weight": np.concatenate(joined),
            f"blocks.{i}.relative_embeddings": attention["relative_embeddings"][i],
            f"blocks.{i}.out.weight": attention["out"]["kernel"][i].reshape(-1, dim).T,
        }
        for name in ("attention_norm", "mlp_norm"):
            out[f"blocks.{i}.{name}.weight"] = layers[name]["layer"]["scale"][i]
            out[f"blocks.{i}.{name}.bias"] = layers[name]["layer"]["bias"][i]
        for name in ("up", "down"):
            out[f"blocks.{i}.{name}.weight"] = mlp[name]["kernel"][i].T
            out[f"blocks.{i}.{name}.bias"] = mlp[name]["bias"][i]
    return out
