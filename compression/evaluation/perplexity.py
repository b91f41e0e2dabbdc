"""Perplexity of a language model on a text, in the standard way.

The text is cut into consecutive windows of one length; in each, every token but the first is predicted from those
before it. The perplexity is exp of the mean negative log-likelihood over all predicted tokens. It depends on the
window's length, which goes with every figure.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

# Logits of so many tokens are held at a time. In fp32 a vocabulary of 49,152 takes 25 MB for them: larger blocks are
# slower on the CPU, for the allocator gives blocks above 32 MB back to the system and asks for them anew each time.
LOGIT_ROWS = 128


def token_losses(logits_of, hidden: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each token but the first, [windows, length - 1], in fp32.

    Args:
        logits_of: the language-model head, [rows, hidden] -> [rows, vocabulary].
        hidden: [windows, length, hidden], the model's last hidden states. ids: [windows, length].
    """
    rows, targets = hidden[:, :-1].reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1)
    parts = zip(rows.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    losses = [F.cross_entropy(logits_of(row).float(), target, reduction="none") for row, target in parts]
    return torch.cat(losses).view(len(ids), -1)


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor, batch_size: int = 1) -> float:
    """Perplexity on windows of token ids [count, length]."""
    total = 0.0
    for ids in tqdm(windows.split(batch_size), desc="perplexity", leave=False, disable=None):
        ids = ids.to(model.device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        total += token_losses(model.lm_head, hidden, ids).double().sum().item()
    return torch.tensor(total / (len(windows) * (windows.shape[1] - 1))).exp().item()
