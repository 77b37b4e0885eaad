"""The configuration of the Transformer: what the models of the house choose between."""

import dataclasses
from typing import Literal

# Of jax.checkpoint_policies those that are policies; its other members make one from arguments.
REMAT_POLICIES = ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and kind of a stack of Transformer blocks.

    Attributes:
      num_layers, embed_dim, num_heads, mlp_dim: the usual sizes.
      head_dim: width of a query or key head; embed_dim // num_heads if None.
      value_head_dim: width of a value head; embed_dim // num_heads if None.
      num_kv_heads: fewer than num_heads for grouped heads; num_heads if None.
      attention: "causal", "full", or "local" (causal, own block and the previous one).
      window: positions that a "causal" query sees, its own included; all before it if None.
      zero_key: each layer's attention also sees a zero vector before the first position (EnCodec's language model); a
        cache holds its key and value, the biases, before the first call, whose positions begin with 1.
      cross_attention: adds attention to an encoder's output to each block.
      norm, norm_position, norm_epsilon: "layer" or "rms" normalisation, of each layer's input ("pre", and once more at
        the stack's end, unless `final_norm` is False) or of each residual sum ("post").
      layer_scale: initial value of a learned factor for each channel of each residual branch (Touvron et al. 2021,
        Going deeper with Image Transformers, section 2.1); None has none.
      activation, gated_mlp: of the MLP; gated is act(x W_gate) * (x W_up).
      attention_bias, attention_out_bias, mlp_bias, norm_bias: whether q/k/v, the output projection, the MLP and the
        LayerNorm have biases.
      attention_key_bias: False leaves the keys alone without a bias (Whisper).
      positions: "none" here if positions are added to the input; "relative" (Music Transformer), "t5" (one bias table
        for the whole stack) or "rotary".
      max_distance: rows R of each relative table; T5's largest exact distance.
      num_buckets: T5's buckets.
      rotary_base: wavelength base of rotary positions.
      relative_form: form of causal relative attention, see `ops.relative_attention`; "local" attention has its own, and
        a `pitch_time` layer, which stores its logits anyway, takes "skew" for "blockwise".
      block_size: positions a block in "blockwise" and "local" attention; 64 is fastest on the CPUs we measured.
      pitch_time: adds relative pitch and time logits to the first layer (Music Transformer section 4.1.1).
      attention_scale: factor of the logits; head_dim ** -0.5 if None, 1.0 in T5.
      dropout_rate, attention_dropout_rate, mlp_dropout_rate: of block outputs, attention weights, MLP hidden units.
      dropout_generator: "jax" or "hash", see `ops.dropout`.
      stochastic_depth_rate: probability that an example skips a residual branch of the last block; it grows linearly
        with depth (Huang et al. 2016, Deep Networks with Stochastic Depth, equation 4).
      kernel_init: "xavier_uniform", or "fan_in_normal" (Whisper).
      attention_implementation: see `ops.attention.attention`.
      remat_policy: None keeps all activations; else one of `REMAT_POLICIES`, named as in `jax.checkpoint_policies`.
      dtype: "float32" or "bfloat16" compute; parameters are always float32.
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    head_dim: int | None = None
    value_head_dim: int | None = None
    num_kv_heads: int | None = None
    attention: Literal["causal", "full", "local"] = "causal"
    window: int | None = None
    zero_key: bool = False
    cross_attention: bool = False
    norm: Literal["layer", "rms"] = "layer"
    norm_position: Literal["pre", "post"] = "pre"
    norm_epsilon: float = 1e-6
    final_norm: bool = True
    layer_scale: float | None = None
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "relu"
    gated_mlp: bool = False
    attention_bias: bool = False
    attention_key_bias: bool = True
    attention_out_bias: bool = False
    mlp_bias: bool = True
    norm_bias: bool = True
    positions: Literal["none", "relative", "t5", "rotary"] = "none"
    max_distance: int = 128
    num_buckets: int = 32
    rotary_base: float = 1e4
    relative_form: Literal["gather", "skew", "blockwise"] = "blockwise"
    block_size: int = 128
    pitch_time: bool = False
    attention_scale: float | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    mlp_dropout_rate: float = 0.0
    dropout_generator: Literal["jax", "hash"] = "jax"
    stochastic_depth_rate: float = 0.0
    kernel_init: Literal["xavier_uniform", "fan_in_normal"] = "xavier_uniform"
    attention_implementation: Literal["auto", "xla", "mapped", "cudnn"] = "auto"
    remat_policy: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        for name in ("num_layers", "embed_dim", "num_heads", "mlp_dim", "max_distance", "num_buckets", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("head_dim", "value_head_dim", "num_kv_heads", "window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be None or at least 1, got {getattr(self, name)}")
        for name in ("dropout_rate", "attention_dropout_rate", "mlp_dropout_rate", "stochastic_depth_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if None in (self.head_dim, self.value_head_dim) and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}; "
                "change one of them, or set head_dim and value_head_dim"
            )
        if self.positions == "rotary" and self.query_head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.query_head_dim}")
        if self.remat_policy not in (None, *REMAT_POLICIES):
            raise ValueError(f"remat_policy {self.remat_policy!r} is not one of {REMAT_POLICIES}")
        if self.pitch_time and self.stochastic_depth_rate:
            raise ValueError(f"a pitch_time layer has no stochastic depth, got {self.stochastic_depth_rate}")
        if self.pitch_time and (self.positions, self.attention) != ("relative", "causal"):
            raise ValueError(
                "pitch_time needs positions='relative' and attention='causal', got "
                f"positions={self.positions!r}, attention={self.attention!r}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        if self.window is not None and (self.attention != "causal" or self.positions not in ("none", "rotary")):
            raise ValueError(
                f"window={self.window} needs attention='causal' and positions 'none' or 'rotary', got "
                f"attention={self.attention!r}, positions={self.positions!r}"
            )
        if self.zero_key and (self.attention, self.positions, self.cross_attention) != ("causal", "none", False):
            raise ValueError(
                "zero_key needs attention='causal' and positions='none' without cross_attention, got "
                f"{self.attention!r}, {self.positions!r}, {self.cross_attention}"
            )
        if self.positions == "t5" and self.attention == "local":
            raise ValueError("positions='t5' needs attention 'causal' or 'full', got attention='local'")
        if self.positions == "relative" and self.attention == "full":
            raise ValueError("positions='relative' is causal attention, got attention='full'")
        if self.positions == "relative" and (self.attention_scale, self.attention_implementation) != (None, "auto"):
            raise ValueError(
                "relative attention has its own scale and forms, got "
                f"attention_scale={self.attention_scale}, attention_implementation={self.attention_implementation!r}"
            )
        if self.positions == "relative" and self.kv_heads != self.num_heads:
            raise ValueError(f"relative attention has no grouped heads, got num_kv_heads={self.num_kv_heads}")

    @property
    def query_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def value_dim(self) -> int:
        """Width of a value head."""
        return self.value_head_dim or self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_kv_heads or self.num_heads
