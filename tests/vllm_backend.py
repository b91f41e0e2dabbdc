"""vLLM's part, played on the CPU: what its Transformers modeling backend does with a checkpoint, step by step.

The steps are those of vllm/model_executor/models/transformers (base.py, causal.py, fusers/attention.py) and
vllm/config/model_arch.py at the commits that docs/engines.md names. Its layers are stood in for by those of torch, with
sizes from the same places. test_vllm_contract.py runs this file outside the project, in a folder with `model`, a
checkpoint, and `text.safetensors`, ids [texts, length]; it writes `logits.safetensors`, [texts, length, vocabulary] by
the way that the attention is found.
"""

import inspect
import re

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FOLDER = "model"
LENGTH = load_file("text.safetensors")["ids"].shape[1]


class Attention(nn.Module):
    """One layer's, which makes room in the cache: it knows the sizes in the config, and nothing of the model."""

    def __init__(self, config, window, scale):
        super().__init__()
        self.heads, self.groups, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.window, self.scale = window, scale

    def forward(self, query, key, value):
        """[tokens, heads * size] of all texts, one behind the other -> the same of the outputs."""
        query, key, value = (
            states.view(-1, LENGTH, heads, self.size).transpose(1, 2)
            for states, heads in ((query, self.heads), (key, self.groups), (value, self.groups))
        )
        behind = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        seen = (behind >= 0) & (behind < (self.window or LENGTH))
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=self.scale, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(-1, self.heads * self.size)


def attend(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **_):
    """What is registered as "vllm": older versions hand the instances down, newer ones attach them to the modules."""
    attention = module.attn if attention_instances is None else attention_instances[module.layer_idx]
    assert attention_mask is None and scaling == attention.scale
    query, key, value = (states.transpose(1, 2).flatten(0, 1).flatten(1) for states in (query, key, value))
    return attention(query, key, value), None


class Missing(nn.Module):
    """In the place of what another stage of the pipeline has."""

    def forward(self, state, **_):
        return state


class Compiled:
    """Becomes a base of the decoder's class, as the wrapper for torch.compile does."""


def resolve():
    """The config, and the check of the class that `auto_map` names."""
    config = AutoConfig.from_pretrained(FOLDER, trust_remote_code=True)
    model_class = get_class_from_dynamic_module(config.auto_map["AutoModel"], FOLDER)
    assert model_class.is_backend_compatible()
    return config


def build(config):
    """The base model, buffers without weights, whose kernel is vLLM's; once before for the class to compile."""
    config.get_text_config()._attn_implementation = "vllm"
    options = dict(config=config, dtype=torch.float32, trust_remote_code=True)
    with torch.device("meta"):
        decoder_class = type(AutoModel.from_config(**options).get_decoder())
    decoder_class.__bases__ += (Compiled,)
    with init_empty_weights(include_buffers=False):
        return AutoModel.from_config(**options)


def dispatches(module):
    """Whether a module's source looks its function up once, and its config names vLLM's."""
    source = inspect.getsource(type(module).forward)
    looks_up = len(re.findall(r"(\w+)[^=\n]*= ALL_ATTENTION_FUNCTIONS\b", source)) == 1
    return looks_up and module.config._attn_implementation == "vllm" and type(module.layer_idx) is int


def replace_modules(model):
    """Put other layers in the places of Linear layers, norms and embeddings; the places of attention by layer."""
    plan, attentions = model.tp_plan, {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            assert any(re.match(pattern, name) for pattern in plan), f"{name} would be replicated"
            new = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        elif type(module).__name__.endswith("RMSNorm"):
            new = nn.RMSNorm(module.weight.shape[0], module.variance_epsilon)
        elif name.endswith("self_attn") and dispatches(module):
            attentions[module.layer_idx] = name
            continue
        else:
            continue
        model.set_submodule(name, new)
    model.set_input_embeddings(nn.Embedding(model.config.vocab_size, model.config.hidden_size))
    return attentions


def attention_instances(model, attentions):
    """For each layer, with the sizes that are its own."""
    config, instances = model.config, {}
    assert all(getattr(module, "is_causal", True) for module in model.modules()), "it would be taken for an encoder"
    layer_types = getattr(config, "layer_types", None)
    for index in range(config.num_hidden_layers):
        if index not in attentions:
            raise ValueError(f"Layer {index} does not dispatch through the Transformers attention interface")
        slides = layer_types is None or layer_types[index] == "sliding_attention"
        window = getattr(config, "sliding_window", None) if slides else None
        scale = model.get_submodule(attentions[index]).scaling
        instances[index] = Attention(config.per_layer_config[index], window, scale)
    return instances


def load(model):
    """The weights by their names in the file, each parameter once; the head is vLLM's own."""
    weights, config = load_file(f"{FOLDER}/model.safetensors"), model.config
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.full(parameter.shape, torch.nan)))
    children = "|".join(name for name, _ in model.named_children())
    names = {re.sub(rf"^(?!model\.)(({children}).*)", r"model.\1", name): name for name in weights}
    head = names.pop("lm_head.weight", None)
    assert (head is None) == config.tie_word_embeddings
    own = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    assert names.keys() == own.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[names[name]])
    return weights[head or "model.embed_tokens.weight"]


def run(model, **inputs):
    """The states of all texts, one behind the other: [tokens, hidden]."""
    texts = next(iter(inputs.values())).shape[1] // LENGTH
    positions = torch.arange(LENGTH).repeat(texts)[None]
    return model(**inputs, use_cache=False, position_ids=positions, return_dict=False)[0][0]


def run_in_stages(model, ids, instances):
    """As two stages of a pipeline do, which the model's plan divides."""
    assert list(model._pp_plan) == ["embed_tokens", "layers", "norm"] and model.supports_pp_plan
    embeddings, layers, norm = model.embed_tokens, list(model.layers), model.norm
    last = [index >= len(layers) // 2 for index in range(len(layers))]
    model.layers = nn.ModuleList(Missing() if late else layer for layer, late in zip(layers, last, strict=True))
    model.norm = Missing()
    state = run(model, input_ids=ids, attention_instances=instances)
    model.layers = nn.ModuleList(layer if late else Missing() for layer, late in zip(layers, last, strict=True))
    model.norm, model.embed_tokens = norm, Missing()
    state = run(model, inputs_embeds=state[None], attention_instances=instances)
    model.embed_tokens, model.layers = embeddings, nn.ModuleList(layers)
    return state


@torch.no_grad()
def main():
    ALL_ATTENTION_FUNCTIONS["vllm"] = attend
    model = build(resolve())
    attentions = replace_modules(model)
    instances = attention_instances(model, attentions)
    head = load(model)
    ids = load_file("text.safetensors")["ids"]
    flat = ids.reshape(1, -1)
    states = {
        "handed_down": run(model, input_ids=flat, attention_instances=instances),
        "in_stages": run_in_stages(model, flat, instances),
    }
    for index, name in attentions.items():
        model.get_submodule(name).attn = instances[index]
    states["attached"] = run(model, input_ids=flat)
    save_file({name: (state @ head.T).view(*ids.shape, -1) for name, state in states.items()}, "logits.safetensors")


if __name__ == "__main__":
    main()
