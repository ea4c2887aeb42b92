"""From a checkpoint to a `TransformersModel`, and what is asked of an architecture before it may serve.

transformers loads the weights itself, so that all conversions of names and layouts are its own. One probe then learns
the attention layers, and one check compares chunked, packed and cached tokens with the module's plain forward: an
architecture that keeps state beside our cache, or mixes tokens outside of attention, does not pass it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rolloutd.errors import ConfigError, ManifestMismatch, ModelNotFound, ModelUnsupported
from rolloutd.runtime.inputs import ROW_MULTIPLE, ForwardInputs, PrefillRows
from rolloutd.runtime.kv_cache import KVCache
from rolloutd.weights.packing import Precision

from .module_weights import ModuleWeights
from .paged_interface import PAGED, PROBE, Probe, probing, register
from .transformers_model import TransformersModel, autocast

log = logging.getLogger(__name__)

_FOREIGN_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What modelling code that was not written for packed tokens raises on them."""

MAX_ERROR_FP32 = 1e-3
"""Of a row's logits, relative RMS: rounding of fp32 is near 1e-6, a token that sees a wrong one is above 1e-2."""
MAX_ERROR_REDUCED = 0.25
"""The same in bf16 and fp16, for the median row: rounding is near 1e-2, and a router that flips is above 1e-1."""

LENGTHS = (7, 5)
"""Tokens of the two sequences that the check runs."""
CHUNKS = (3, 4)
"""Of them, what the first step prefills; the second step prefills the rest of one and decodes the other's."""
BLOCK_SIZE = 4


def load_transformers_model(
    cls: Any, hf_config: Any, path: Path, precision: Precision, max_model_len: int, device: torch.device
) -> tuple[TransformersModel, ModuleWeights]:
    """Return a checked model of a class of transformers and its weights; `ModelUnsupported` says why it cannot run."""
    register()
    architecture = cls.__name__
    module = _load(cls, path, hf_config, precision.residual).to(device)
    _silence(module.config)
    try:
        with torch.inference_mode(), autocast(precision, device):
            tokens = _tokens(module.get_input_embeddings().num_embeddings, device)
            with _implementation(module, "eager"), _submodels_called(module) as called:
                reference = [module(input_ids=ids[None]).logits[0].float() for ids in tokens]
            decoder_path, decoder = _decoder(architecture, module, called)
            probe = Probe(architecture, LENGTHS[0], max_model_len)
            with _implementation(module, PROBE), probing(probe):
                position_ids = torch.arange(LENGTHS[0], device=device)[None]
                output = decoder(input_ids=tokens[0][None], position_ids=position_ids)
    except _FOREIGN_ERRORS as error:
        _refuse(architecture, f"its forward fails ({type(error).__name__}: {error})")
    vocab_size = reference[0].shape[-1]
    if module.get_input_embeddings().num_embeddings < vocab_size:
        _refuse(architecture, f"its head has {vocab_size} rows, more than its embedding")
    if not probe.layers:
        _refuse(architecture, "its attention does not go through transformers' attention interface")
    module.config._attn_implementation = PAGED
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    model = TransformersModel(module, decoder_path, tuple(probe.layers), type(output), vocab_size, precision, device)
    weights = model.adopt(tensors)
    _check(architecture, model, weights, tokens, reference, precision, device)
    return model, weights


def causal_lm_class(architecture: str, hf_config: Any) -> Any:
    """Return transformers' class; `ModelUnsupported` for what can be told before any weight is read."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ModelUnsupported(
            f"{architecture} is neither native nor a causal language model that transformers "
            f"{transformers.__version__} knows. Use another model, or a newer transformers."
        )
    cls = getattr(transformers, architecture)
    if not isinstance(hf_config, cls.config_class):
        raise ModelUnsupported(
            f"config.json names {architecture}, but its model_type is {hf_config.model_type!r}. Correct it."
        )
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ModelUnsupported(f"{architecture} with quantized weights; use the unquantized checkpoint.")
    if getattr(hf_config, "is_encoder_decoder", False):
        _refuse(architecture, "it is an encoder-decoder model")
    if cls._is_stateful:
        _refuse(architecture, "its layers keep a recurrent state beside keys and values")
    return cls


def num_positions(hf_config: Any, max_model_len: int | None) -> int:
    """Return how many positions the model has; `ConfigError` where its config does not say and the caller neither."""
    config = hf_config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return _rope_limit(config, value)
    if max_model_len is None:
        raise ConfigError("config.json does not say how many positions the model has. Set --max-model-len.")
    return max_model_len


def _rope_limit(config: Any, positions: int) -> int:
    """Return the positions up to which rotary frequencies are the same for every batch.

    Beyond its original length, transformers' longrope takes other frequencies for all tokens of a batch in which one
    sequence is longer: keys that are cached would no longer fit.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    default = getattr(config, "original_max_position_embeddings", None) or positions
    longropes = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    return min([positions, *(int(kind.get("original_max_position_embeddings") or default) for kind in longropes)])


def _refuse(architecture: str, reason: str) -> NoReturn:
    raise ModelUnsupported(f"{architecture} cannot run over the paged KV cache: {reason}.")


def _load(cls: Any, path: Path, hf_config: Any, dtype: torch.dtype) -> Any:
    """Return the module with all its weights, in evaluation mode; a missing or misshapen tensor is an error."""
    with _no_progress_bar():
        try:
            module, report = cls.from_pretrained(
                path,
                config=hf_config,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except SafetensorError as error:
            raise ModelUnsupported(f"the safetensors cannot be read: {error}. Download or save them again.") from None
        except OSError as error:
            raise ModelNotFound(f"{str(path)!r}: {error}") from None
    for kind, trouble in (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes for")):
        names = sorted(str(key) for key in report[kind])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ManifestMismatch(f"the checkpoint {trouble} {', '.join(names[:3])}{more}. Save the model again.")
    if report["unexpected_keys"]:
        log.warning("ignored %d tensors that the model does not have", len(report["unexpected_keys"]))
    return module.eval()


@contextmanager
def _submodels_called(module: nn.Module) -> Iterator[list[str]]:
    """Record the paths of the models inside `module` that its forward calls, in their order."""
    from transformers import PreTrainedModel

    called: list[str] = []
    handles = [
        part.register_forward_pre_hook(lambda *_, path=path: called.append(path))
        for path, part in module.named_modules()
        if path and isinstance(part, PreTrainedModel)
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _decoder(architecture: str, module: nn.Module, called: list[str]) -> tuple[str, nn.Module]:
    """Return path and module of what turns token ids into hidden states: the first model that the forward called."""
    if not called:
        _refuse(architecture, "it has no decoder apart from its head")
    decoder = module.get_submodule(called[0])
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        _refuse(architecture, "its decoder takes no position_ids, which packed sequences need")
    return called[0], decoder


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _silence(config: Any) -> None:
    """Switch off what a forward may return besides its last hidden state, and caches of transformers' own."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in ("use_cache", "output_attentions", "output_hidden_states", "output_router_logits"):
            if getattr(part, name, False):
                setattr(part, name, False)


@contextmanager
def _implementation(module: Any, name: str) -> Iterator[None]:
    """Set the attention that the module's config names; set past transformers' check, which knows no such function."""
    before = module.config._attn_implementation
    module.config._attn_implementation = name
    try:
        yield
    finally:
        module.config._attn_implementation = before


def _tokens(vocab_size: int, device: torch.device) -> list[Tensor]:
    """Return two sequences of ids spread over the vocabulary, without its first, which are often special."""
    spread = [11 + 7919 * i % max(1, vocab_size - 11) for i in range(sum(LENGTHS))]
    ids = torch.tensor(spread, device=device) % vocab_size
    return [ids[: LENGTHS[0]], ids[LENGTHS[0] :]]


def _check(
    architecture: str,
    model: TransformersModel,
    weights: ModuleWeights,
    tokens: list[Tensor],
    reference: list[Tensor],
    precision: Precision,
    device: torch.device,
) -> None:
    """Refuse a model whose logits in two packed steps differ from its own plain forward of each sequence."""
    cache = KVCache.allocate(model.kv_layers, 4, BLOCK_SIZE, precision.matrix, device)
    errors = []
    try:
        with torch.inference_mode():
            for inputs, expected_TV in _steps(tokens, reference, device):
                logits_TV = model.logits(weights, model.forward(weights, inputs, cache))
                errors += _errors(logits_TV[: len(expected_TV)].float(), expected_TV)
    except _FOREIGN_ERRORS as error:
        _refuse(architecture, f"its forward fails on packed tokens ({type(error).__name__}: {error})")
    exact = precision.matrix == torch.float32
    found, limit = (max(errors), MAX_ERROR_FP32) if exact else (float(np.median(errors)), MAX_ERROR_REDUCED)
    if not found <= limit:
        _refuse(
            architecture,
            f"logits of packed sequences differ from its plain forward by {found:.1e} (limit {limit:.0e}), "
            "so it mixes tokens outside of attention, keeps a state of its own, or counts positions in its own way",
        )


def _errors(logits_TV: Tensor, expected_TV: Tensor) -> list[float]:
    """Return each row's RMS difference over the RMS of what is expected, both without their mean."""
    difference, expected = (rows - rows.mean(-1, keepdim=True) for rows in (logits_TV - expected_TV, expected_TV))
    errors: list[float] = (difference.norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)).tolist()
    return errors


def _steps(
    tokens: list[Tensor], reference: list[Tensor], device: torch.device
) -> Iterator[tuple[ForwardInputs, Tensor]]:
    """Yield two steps with what their real rows should give: two chunks of prefill, then a decode row and a chunk."""
    first, second = (torch.arange(2, device=device), torch.arange(2, 4, device=device))
    rows = [(tokens[0], first, 0, CHUNKS[0]), (tokens[1], second, 0, CHUNKS[1])]
    yield _inputs([], rows, device), torch.cat([reference[0][: CHUNKS[0]], reference[1][: CHUNKS[1]]])
    decode = [(tokens[1], second, CHUNKS[1], LENGTHS[1])]
    rest = [(tokens[0], first, CHUNKS[0], LENGTHS[0])]
    yield _inputs(decode, rest, device), torch.cat([reference[1][CHUNKS[1] :], reference[0][CHUNKS[0] :]])


_Rows = tuple[Tensor, Tensor, int, int]
"""Token ids of a sequence, its block table, and which of its tokens a step computes: from, to."""


def _inputs(decode: list[_Rows], prefill: list[_Rows], device: torch.device) -> ForwardInputs:
    chunks = [*decode, *prefill]
    ids = torch.cat([tokens[start:end] for tokens, _, start, end in chunks])
    positions = torch.cat([torch.arange(start, end, device=device) for _, _, start, end in chunks])
    tables = torch.cat([table.expand(end - start, -1) for _, table, start, end in chunks])
    blocks = tables.gather(1, (positions // BLOCK_SIZE)[:, None])[:, 0]
    padding = -len(ids) % ROW_MULTIPLE
    lengths = [end - start for *_, start, end in chunks]
    ends = np.cumsum(lengths)
    return ForwardInputs(
        token_ids_T=torch.nn.functional.pad(ids, (0, padding)),
        positions_T=torch.nn.functional.pad(positions, (0, padding)),
        slot_mapping_T=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
        num_decode=len(decode),
        decode_block_tables_RM=torch.stack([table for _, table, *_ in decode]) if decode else ids.new_zeros(0, 0),
        decode_lens_R=torch.tensor([end for *_, end in decode], device=device, dtype=torch.long),
        prefills=tuple(
            PrefillRows(int(stop) - (end - start), start, end - start, table)
            for (_, table, start, end), stop in zip(prefill, ends[len(decode) :], strict=True)
        ),
        last_row_of_chunk=ends - 1,
    )
