"""From what a user names as a model to a loaded model, and to a digest of its content."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

from trialist.data import assets
from trialist.models.eviction.swap import enable_eviction
from trialist.models.nested.adapters import nested_lora
from trialist.models.nested.precision import nested_layers
from trialist.models.selective_attention.swap import enable_selective_attention
from trialist.models.swaps import swapped_loader

DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
MODEL_ASSETS = ("smollm2-135m-instruct",)
PEFT_PREFIX = "base_model.model."
"""Assets that are causal language models"""


def load_model(model: str, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """A causal language model in evaluation mode from a Hub id, a local folder or a built-in asset name.

    Selective attention or eviction that was enabled when a model was saved is enabled again, swapped layers are there. A PEFT
    adapter is put on the model that it names.

    dtype is one of `DTYPES`; "auto" is the saved one. Raises ValueError that says what is missing: no such folder, no
    config or weights in it, weights missing, unknown Hub id, or a Hub that cannot be reached; FileNotFoundError for an
    asset that was not fetched yet.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    source = model_source(model)
    base = _base_of_adapter(source)
    if base is not None:
        try:
            loaded = load_model(base, dtype=dtype, device=device)
        except ValueError as error:
            raise ValueError(f"{model!r} is an adapter of {base!r}: {error}") from error
        return _with_adapter(loaded, model, source)
    try:
        loaded, found = swapped_loader(source).from_pretrained(
            source, dtype=dtype if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
        )
    except OSError as error:
        raise ValueError(_unreachable(model, error)) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(_damaged(model, error)) from error
    _require_all(model, found["missing_keys"], f"a {type(loaded).__name__}", "it is no causal language model")
    settings = getattr(loaded.config, "selective_attention", None)
    if isinstance(settings, dict):
        del loaded.config.selective_attention
        enable_selective_attention(loaded, **settings)
    eviction = getattr(loaded.config, "eviction", None)
    if isinstance(eviction, dict):
        del loaded.config.eviction
        enable_eviction(loaded, **eviction)
    return loaded.to(device).eval()


def _base_of_adapter(source: str) -> str | None:
    """What an adapter says it belongs to; None for a whole model. Raises ValueError for an adapter that does not say."""
    if (Path(source) / "config.json").is_file():
        return None
    try:
        found = find_adapter_config_file(source)
    except OSError:
        return None  # loading says better what cannot be reached
    if found is None:
        return None
    base = json.loads(Path(found).read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"adapter {source!r} names no model in its adapter_config.json (base_model_name_or_path); write the folder or Hub "
            "id of the model there that it was trained on"
        )
    return base


def _with_adapter(loaded: PreTrainedModel, model: str, source: str) -> PreTrainedModel:
    """`loaded` with the adapter of `source` put in. By PEFT's own functions: some versions of transformers leave out what an
    adapter keeps of whole modules (`modules_to_save`)."""
    from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(source)
        loaded.add_adapter(nested_lora(config) if nested_layers(loaded) else config)
        weights = {name.removeprefix(PEFT_PREFIX): x for name, x in load_peft_weights(source, device="cpu").items()}
        set_peft_model_state_dict(loaded, weights)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(_damaged(model, error)) from error
    missing = get_peft_model_state_dict(loaded).keys() - weights.keys()
    _require_all(model, missing, f"an adapter of {type(loaded).__name__}", "it was trained on another model")
    return loaded.eval()


def _require_all(model: str, missing: Iterable[str], kind: str, otherwise: str) -> None:
    if names := sorted(missing):
        raise ValueError(
            f"model {model!r} lacks {len(names)} of the weights of {kind}: {', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}; they would be drawn at random. Its files may be incomplete, or {otherwise}"
        )


def model_source(model: str) -> str:
    """What `from_pretrained` takes for `model`: an asset's folder, a checked local folder, or the
    Hub id."""
    if model in MODEL_ASSETS:
        return str(assets.path(model))
    folder = Path(os.path.expanduser(model))
    if folder.is_file():
        raise ValueError(f"model {model!r} is a file; give the folder that save_pretrained wrote")
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"model folder {model!r} has no config.json, so it holds no saved model (it holds: "
                f"{_contents(folder)}); "
                "give a folder that save_pretrained wrote, or a Hub id"
            )
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"model folder {model!r} has no *.safetensors weights (it holds: {_contents(folder)}); save the "
                "model with "
                "save_pretrained; pickled weights are not loaded"
            )
        return str(folder)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"model folder {model!r} does not exist")
    return model


def _contents(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return (", ".join(names[:6]) + (", ..." if len(names) > 6 else "")) or "nothing"


def _unreachable(model: str, error: OSError) -> str:
    return (
        f"model {model!r} could not be loaded: it is no local folder, no built-in name "
        f"({', '.join(MODEL_ASSETS)}), and the "
        f"Hugging Face Hub has no such model or cannot be reached from here ({str(error).strip().splitlines()[0]})"
    )


def _damaged(model: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return (
        f"model {model!r} is there but could not be loaded ({type(error).__name__}: {reason}); its files may be damaged "
        "or belong to different models: save or download it again"
    )


def model_context(model: str) -> int | None:
    """Tokens that a model takes at most; None where its configuration does not say. Raises the errors of `load_model`."""
    source = model_source(model)
    if (base := _base_of_adapter(source)) is not None:
        return model_context(base)
    try:
        config = AutoConfig.from_pretrained(source)
    except OSError as error:
        raise ValueError(_unreachable(model, error)) from error
    except Exception as error:
        raise ValueError(_damaged(model, error)) from error
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and (not isinstance(most, int) or most < 1):
        raise ValueError(
            f"model {model!r}: its config.json says max_position_embeddings {most!r}, not a number of tokens"
        )
    return most


def model_digest(model: str) -> str:
    """What identifies the content of `model`: `sha256:...` of a local folder or asset, `commit:...` of a Hub id.

    A folder's digest covers its config.json and every tensor's name, dtype, shape and bytes, so a model split over
    other files keeps it; that of an adapter covers the model it belongs to as well. Raises the errors of `load_model`.
    """
    if model in MODEL_ASSETS:
        return f"sha256:{assets.ASSETS[model].sha256}"
    source = model_source(model)
    base = _base_of_adapter(source)
    if base is not None:
        whole = f"{_own_digest(model, source, 'adapter_config.json')} {model_digest(base)}"
        return f"sha256:{hashlib.sha256(whole.encode()).hexdigest()}"
    return _own_digest(model, source, "config.json")


def _own_digest(model: str, source: str, config: str) -> str:
    if not Path(source).is_dir():
        return f"commit:{_commit(model, config)}"
    files = sorted(Path(source).glob("*.safetensors")) + sorted(Path(source).glob("*config.json"))
    try:
        return "sha256:" + _folder_digest(
            tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files)
        )
    except SafetensorError as error:
        raise ValueError(_damaged(model, error)) from error


def _commit(model: str, file: str) -> str:
    try:
        config = cached_file(model, file)
    except OSError as error:
        raise ValueError(_unreachable(model, error)) from error
    parts = Path(str(config)).parts  # .../snapshots/<commit>/config.json
    return parts[parts.index("snapshots") + 1]


@functools.lru_cache(maxsize=32)
def _folder_digest(files: tuple[tuple[str, int, int], ...]) -> str:
    """Digest of the given files; their times and sizes are part of the cache's key only."""
    entries = []
    for name, _, _ in files:
        if name.endswith(".json"):
            entries.append((os.path.basename(name), hashlib.sha256(Path(name).read_bytes()).hexdigest()))
            continue
        with safe_open(name, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a dict)
                tensor = tensors.get_tensor(key).contiguous()
                digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
                entries.append((key, digest.hexdigest()))
    return hashlib.sha256(repr(sorted(entries)).encode()).hexdigest()


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters, tied ones once; with `trainable`, of those that require a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trainable)
