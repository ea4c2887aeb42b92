"""Models to measure with: the shapes of real ones, random weights. Their bytes and operations, counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rolloutd.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a Qwen2 decoder."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_products(self) -> tuple[tuple[str, int, int], ...]:
        """(name, outputs, inputs) of each matrix product of a layer, packed as the engine packs them."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            ("qkv", q + 2 * kv, self.hidden),
            ("o", self.hidden, q),
            ("gate_up", 2 * self.ffn, self.hidden),
            ("down", self.hidden, self.ffn),
        )

    @property
    def num_layer_weights(self) -> int:
        """Matrix elements of all layers."""
        return self.layers * sum(n * k for _, n, k in self.layer_products)

    @property
    def num_parameters(self) -> int:
        """Matrix elements of the model; norms and biases are left out."""
        return self.num_layer_weights + (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def num_step_weights(self) -> int:
        """Matrix elements that a decode step reads, the head included."""
        return self.num_layer_weights + self.vocab * self.hidden

    @property
    def kv_elements_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim

    def step_flops(self, rows: int, context: float) -> float:
        """Floating point operations of a decode step of so many rows, each over so many tokens."""
        attention = 4 * self.layers * self.heads * self.head_dim * context
        return rows * (2 * self.num_step_weights + attention)


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape(name="tiny", layers=4, hidden=256, heads=8, kv_heads=2, ffn=1024, vocab=4096),
        ModelShape(name="s", layers=8, hidden=512, heads=8, kv_heads=2, ffn=2048, vocab=32_768),
        ModelShape(name="qwen2.5-0.5b", layers=24, hidden=896, heads=14, kv_heads=2, ffn=4864, vocab=151_936),
        ModelShape(name="qwen2.5-1.5b", layers=28, hidden=1536, heads=12, kv_heads=2, ffn=8960, vocab=151_936),
        ModelShape(
            name="qwen2.5-7b", layers=28, hidden=3584, heads=28, kv_heads=4, ffn=18_944, vocab=152_064, tied=False
        ),
    )
}


def shape_named(name: str) -> ModelShape:
    """Return a shape; `ConfigError` with the nearest name."""
    if name not in SHAPES:
        raise ConfigError(f"--shape={name!r} is not known.{did_you_mean(name, SHAPES)} Known: {', '.join(SHAPES)}.")
    return SHAPES[name]


def write_checkpoint(shape: ModelShape, folder: Path, dtype: str, *, max_len: int, seed: int = 0) -> None:
    """Write config.json and safetensors of a model with this shape and random weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocab,
        max_position_embeddings=max_len,
        tie_word_embeddings=shape.tied,
        architectures=["Qwen2ForCausalLM"],
        dtype=dtype,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for i, group in enumerate(_groups(sorted(name for name, _ in model.named_parameters()))):
        tensors = {}
        for name in group:
            parameter = model.get_parameter(name)
            tensor = torch.empty(parameter.shape, dtype=getattr(torch, dtype), device=device)
            # With transformers' own 0.02 attention is almost uniform, and a wrong position would not be seen.
            fresh = tensor.fill_(1.0) if "norm" in name else tensor.normal_(0.0, 0.04, generator=generator)
            tensors[name] = fresh.cpu()
            total += fresh.nbytes
        file = f"model-{i:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _groups(names: list[str], size: int = 64) -> Iterator[list[str]]:
    for at in range(0, len(names), size):
        yield names[at : at + size]
