"""What a model costs where it runs: latency, throughput, size on disk.

Models are timed interleaved, round after round in one process and in a rotating order, so that a change of clock
speed, temperature or load meets all of them alike. Numbers of two separate runs do not have that.
"""

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from compression.integrity import WEIGHT_FILES
from compression.outputs import exports_of
from compression.progress import progress

WARM_UP_CALLS = 3


def interleaved_times(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    untimed: int = 0,
    prepare: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of each call, one per round, by name.

    Args:
        calls: what to time; each is called a few times first, untimed.
        rounds: in each, every call has one turn; the one that goes first changes from round to round.
        device: where the calls compute; a CUDA device is synchronized around each timed call.
        untimed: calls before the timed one of each turn, so that the caches hold this model and not the last one.
        prepare: called with the name before each call, not timed.
    """
    names = list(calls)
    for name in names:
        for _ in range(WARM_UP_CALLS):
            prepare(name)
            calls[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in progress(range(rounds), "timing"):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for _ in range(untimed):
                prepare(name)
                calls[name]()
            prepare(name)
            seconds[name].append(_time(calls[name], device))
    return seconds


def _time(call: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, PreTrainedModel],
    device: torch.device,
    sequence_length: int,
    latency_repeats: int,
    throughput_repeats: int,
    throughput_batch_size: int = 32,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, float]]]:
    """Latency at batch 1 and throughput at a larger batch, per model.

    All models get the same random token ids of full length: no padding, nothing to skip.

    Args:
        models: Hugging Face models on `device`, in evaluation mode.
        sequence_length: tokens per sequence.
        latency_repeats, throughput_repeats: timed calls per model; medians and percentiles are over these.

    Returns:
        By name: {"latency": median, p10, p90 in milliseconds; "throughput": the same in samples per second}, with
        batch size, sequence length and number of repeats beside them.
    """
    ids = random_ids(models, (throughput_batch_size, sequence_length), seed).to(device)
    one = interleaved_times(forwards(models, ids[:1]), latency_repeats, device, untimed=1)
    many = interleaved_times(forwards(models, ids), throughput_repeats, device)
    stated = {"sequence_length": sequence_length}
    return {
        name: {
            "latency": _spread(np.array(one[name]) * 1e3, "ms") | stated | {"batch_size": 1},
            "throughput": _spread(throughput_batch_size / np.array(many[name]), "samples_per_second")
            | stated
            | {"batch_size": throughput_batch_size},
        }
        for name in models
    }


@torch.inference_mode()
def measure_generation(
    models: Mapping[str, PreTrainedModel],
    device: torch.device,
    prompt_length: int,
    new_tokens: int,
    repeats: int,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, float]]]:
    """Prefill and decode speed of language models at batch 1.

    Prefill: one forward pass over a random prompt, logits of its last token alone. Decode: `new_tokens` tokens, one
    after the other, with the key-value cache of that prompt.

    Returns:
        By name: {"prefill": median, p10, p90 in tokens per second; "decode": the same}, with lengths and repeats.
    """
    ids = random_ids(models, (1, prompt_length), seed).to(device)
    first = prefill_times(models, ids, repeats)
    then = decode_times(models, ids, new_tokens, repeats)
    return {
        name: {
            "prefill": _spread(prompt_length / np.array(first[name]), "tokens_per_second")
            | {"prompt_length": prompt_length},
            "decode": _spread(new_tokens / np.array(then[name]), "tokens_per_second")
            | {"prompt_length": prompt_length, "new_tokens": new_tokens},
        }
        for name in models
    }


@torch.inference_mode()
def prefill_times(models: Mapping[str, PreTrainedModel], ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each language model's pass over a prompt, with its key-value cache and the last token's logits alone.

    Args:
        ids: token ids [batch, length], on the models' device.
    """

    def prefill(model: PreTrainedModel) -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    return interleaved_times({name: partial(prefill, model) for name, model in models.items()}, rounds, ids.device)


@torch.inference_mode()
def decode_times(
    models: Mapping[str, PreTrainedModel], ids: torch.Tensor, new_tokens: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds that each language model takes for new tokens, one after the other, with a prompt's key-value cache.

    Args:
        ids: token ids of the prompt [batch, length], on the models' device; the new tokens are its first ones again.
    """
    caches = {name: model(ids, use_cache=True, logits_to_keep=1).past_key_values for name, model in models.items()}
    begun: dict[str, Any] = {}

    def begin(name: str) -> None:
        """A cache that holds the prompt alone: one with windows forgets, and cannot be cut back to it."""
        begun[name] = copy.deepcopy(caches[name])

    def decode(name: str, model: PreTrainedModel) -> None:
        for place in range(new_tokens):
            model(ids[:, place : place + 1], past_key_values=begun[name], use_cache=True)

    decodes = {name: partial(decode, name, model) for name, model in models.items()}
    return interleaved_times(decodes, rounds, ids.device, prepare=begin)


def random_ids(models: Mapping[str, PreTrainedModel], shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Token ids that all models know and none takes for padding, of which RoBERTa makes no position."""
    known = torch.arange(min(model.config.vocab_size for model in models.values()))
    padding = {getattr(model.config, "pad_token_id", None) for model in models.values()} - {None}
    known = known[~torch.isin(known, torch.tensor(sorted(padding), dtype=known.dtype))]
    return known[torch.randint(len(known), shape, generator=torch.Generator().manual_seed(seed))]


def forwards(models: Mapping[str, PreTrainedModel], ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    mask = torch.ones_like(ids)
    return {name: partial(model, input_ids=ids, attention_mask=mask) for name, model in models.items()}


def _spread(values: np.ndarray, unit: str) -> dict[str, float]:
    low, median, high = (float(value) for value in np.percentile(values, (10, 50, 90)))
    return {f"median_{unit}": median, f"p10_{unit}": low, f"p90_{unit}": high, "repeats": len(values)}


def size_on_disk(folder: Path) -> dict[str, int]:
    """Bytes of a checkpoint or an export: its weight files, and the whole folder without the exports in it."""
    exports = exports_of(folder)
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    sizes = {path: path.stat().st_size for path in files if not any(map(path.is_relative_to, exports))}
    weights = sum(size for path, size in sizes.items() if path.suffix in WEIGHT_FILES)
    return {"weights_bytes": weights, "folder_bytes": sum(sizes.values())}
