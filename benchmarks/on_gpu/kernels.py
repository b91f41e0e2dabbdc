"""Kernels on a GPU: flash attention against plain mathematics, and compiled models against eager ones."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM, PreTrainedModel

from compression.checkpoint import load_classifier
from compression.runtime import seed_everything
from compression.structures import DECODER_KINDS, layers_of
from compression.surgery import shrink_decoder
from compression.timing import interleaved_times
from on_gpu.classifier import pruned_classifier
from on_gpu.setting import Figures, Setting

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
MULTIPLE = 32


def pruned_decoder(setting: Setting) -> PreTrainedModel:
    """A random language model whose layers lost about half: each another number of channels, some of them groups."""
    seed_everything(0)
    with torch.device(setting.device):
        model = LlamaForCausalLM(setting.sizes.decoder.config()).to(torch.bfloat16).eval()
    kept: dict[str, list[Tensor]] = {kind: [] for kind in DECODER_KINDS}
    groups, channels = DECODER_KINDS
    for index, parts in enumerate(layers_of(model)):
        left = max(1, (parts.channels // 2 + (index % 3 - 1) * MULTIPLE) // MULTIPLE) * MULTIPLE
        kept[channels].append(torch.arange(parts.channels) < left)
        kept[groups].append(torch.arange(parts.groups) < parts.groups - index % 3)
    return shrink_decoder(model, kept).eval()


def by_backend(name: str, call: Callable[[], Tensor]) -> Tensor:
    with sdpa_kernel(BACKENDS[name]):
        return call()


def operation(setting: Setting) -> Callable[[], Tensor]:
    """Causal attention alone, forward and backward, in bfloat16."""
    shape, generator = setting.sizes.decoder, torch.Generator(setting.device).manual_seed(0)
    size = (1, shape.heads, setting.sizes.prompt, shape.hidden // shape.heads)
    inputs = [
        torch.randn(size, device=setting.device, dtype=torch.bfloat16, generator=generator).requires_grad_()
        for _ in range(3)
    ]

    def call() -> Tensor:
        found = F.scaled_dot_product_attention(*inputs, is_causal=True)
        torch.autograd.grad(found.sum(), inputs)
        return found.detach()

    return call


def attention(setting: Setting) -> Figures:
    """Torch's flash backend against the plain one: attention alone, and a pruned model's prefill."""
    model, length = pruned_decoder(setting), setting.sizes.prompt
    ids = torch.randint(setting.sizes.decoder.vocabulary, (1, length), device=setting.device)

    @torch.inference_mode()
    def prefill() -> Tensor:
        return model(ids, use_cache=False, logits_to_keep=1).logits.float()

    figures: Figures = {}
    calls = {f"attention alone, forward and backward, {length} tokens": operation(setting)}
    calls[f"prefill of a pruned model, {length} tokens"] = prefill
    for what, call in calls.items():
        runs = {name: partial(by_backend, name, call) for name in BACKENDS}
        flash, plain = (runs[name]().float() for name in BACKENDS)
        times = interleaved_times(runs, setting.sizes.repeats, setting.device)
        for name in BACKENDS:
            figures[f"{what}, bfloat16, {name}, ms"] = 1e3 * median(times[name])
        figures[f"{what}, bfloat16, largest difference"] = (flash - plain).abs().max().item()
        figures[f"{what}, bfloat16, largest value"] = plain.abs().max().item()
    return figures


def compiled(setting: Setting) -> Figures:
    """torch.compile of a pruned classifier in float32 and of a pruned language model in bfloat16, against eager."""
    sizes, device = setting.sizes, setting.device
    classifier, decoder = load_classifier(pruned_classifier(setting), device)[0], pruned_decoder(setting)
    sentences = torch.randint(5, 29, (sizes.batch_size, sizes.sentence_length), device=device)
    prompt = torch.randint(sizes.decoder.vocabulary, (1, sizes.length), device=device)
    cases = {
        f"pruned classifier, float32, {sizes.batch_size} sentences": (
            classifier,
            dict(input_ids=sentences, attention_mask=torch.ones_like(sentences)),
        ),
        f"pruned language model, bfloat16, {sizes.length} tokens": (decoder, dict(input_ids=prompt, use_cache=False)),
    }
    figures: Figures = {}
    for what, (model, given) in cases.items():
        figures |= {f"{what}, {name}": value for name, value in eager_and_compiled(model, given, setting).items()}
        torch.compiler.reset()
    return figures


@torch.inference_mode()
def eager_and_compiled(model: PreTrainedModel, given: dict, setting: Setting) -> Figures:
    """Times and largest difference of a model's logits."""
    fast = torch.compile(model, backend=setting.sizes.compiler)
    started = time.perf_counter()
    found = fast(**given).logits.float()
    seconds = time.perf_counter() - started
    expected = model(**given).logits.float()
    calls = {"eager": lambda: model(**given), "compiled": lambda: fast(**given)}
    times = interleaved_times(calls, setting.sizes.repeats, setting.device)
    return {
        "compiling, s": seconds,
        **{f"{name}, ms": 1e3 * median(values) for name, values in times.items()},
        "largest difference of logits": (found - expected).abs().max().item(),
        "largest logit": expected.abs().max().item(),
    }
