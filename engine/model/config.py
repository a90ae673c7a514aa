"""Hyperparameters of a llama-family decoder, wherever they were read."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ModelError
from engine.model.fields import MAX_COUNT, check_count, check_number
from kernels.rope import RopeScaling, YarnScaling

MAX_LAYERS = 1 << 12
MAX_CONTEXT = 1 << 20  # the rotation tables of so many positions are made at load
_KV_MULTIPLE = 16

Windows = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Shapes and constants. Raises ModelError naming the field unless they fit each other.

    ``attention_bias`` is that of q, k and v, ``output_bias`` that of the projection after
    attention, ``mlp_bias`` that of gate, up and down. With ``qk_norm`` every head of q and k is
    normalised before it is rotated. ``windows`` has one entry per layer: a row at position p sees
    positions p - window + 1 to p, all up to p where it is None; left empty, it is None everywhere.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    rope_theta: float
    norm_eps: float
    tied_head: bool
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: Windows = ()
    rope: RopeScaling | None = None

    def __post_init__(self) -> None:
        for field in (
            "num_layers",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
            "max_context",
        ):
            check_count(field, getattr(self, field), _MAXIMA.get(field, MAX_COUNT))
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"model config: {self.num_heads} heads are no multiple of {self.num_kv_heads}"
            )
        if self.head_dim % _KV_MULTIPLE or self.head_dim > 256:
            raise ModelError(
                f"model config: head_dim {self.head_dim} is no multiple of {_KV_MULTIPLE} up to 256"
            )
        for field in ("rope_theta", "norm_eps"):
            check_number(field, getattr(self, field))
        if isinstance(self.rope, YarnScaling) and self.rope_theta <= 1:
            raise ModelError(f"model config: rope_theta is {self.rope_theta}, not above 1 for yarn")
        windows = self.windows or (None,) * self.num_layers
        assert len(windows) == self.num_layers
        object.__setattr__(self, "windows", windows)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model under its Hugging Face name."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.tied_head:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        per_layer = self._layer_shapes()
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{name}": size for name, size in per_layer.items()}
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        for name, rows, columns, has_bias in (
            ("self_attn.q_proj", q, hidden, self.attention_bias),
            ("self_attn.k_proj", kv, hidden, self.attention_bias),
            ("self_attn.v_proj", kv, hidden, self.attention_bias),
            ("self_attn.o_proj", hidden, q, self.output_bias),
            ("mlp.gate_proj", inner, hidden, self.mlp_bias),
            ("mlp.up_proj", inner, hidden, self.mlp_bias),
            ("mlp.down_proj", hidden, inner, self.mlp_bias),
        ):
            shapes[f"{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{name}.weight"] = (hidden,)
        if self.qk_norm:
            for name in ("self_attn.q_norm", "self_attn.k_norm"):
                shapes[f"{name}.weight"] = (self.head_dim,)
        return shapes


_MAXIMA = {"num_layers": MAX_LAYERS, "max_context": MAX_CONTEXT}
