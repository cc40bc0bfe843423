"""A batched sampler for small models, which records what it draws.

Against ``generate`` it saves the concatenation of keys and values at every token, the prefill of every completion but one of a
group, the completions that have ended, much of the per-operation overhead, and the second forward that would find out logp,
entropy and rank of the sampled tokens. The weights are the model's own modules, adapters included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LogitsProcessorList, MinPLogitsWarper, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from rl.errors import ConfigError
from rl.scoring import Recorded, base_of

FAMILIES = ("llama", "qwen2", "qwen3")  # the same decoder, with and without biases and norms of queries and keys


class Truncation(NamedTuple):
    """How the distribution is cut before a token is drawn; the defaults leave it whole."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None

    def warpers(self) -> LogitsProcessorList:
        """transformers' own, in the order of ``generate``."""
        found = LogitsProcessorList()
        if self.top_k > 0:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            found.append(MinPLogitsWarper(self.min_p))
        return found


class Drawn(NamedTuple):
    """Completions up to and including their end of text, padded on the right, and what is known of each token."""

    ids: Tensor  # (N, T)
    mask: Tensor  # (N, T) bool
    recorded: Recorded  # under the model at the temperature, before any truncation; 0 in the padding


class NativeSampler:
    """Draws a trainer's completions with :func:`draw`; give it to ``EntropyTrainer(sampler=...)``.

    Raises:
        ConfigError: a model or a sampling option that only ``rollout=hf`` or vLLM can serve.
    """

    def __init__(self, config: Any, args: GRPOConfig, rank: bool = False):
        check_native(config, args)
        self.rank = rank
        self.options = {
            "max_new_tokens": args.max_completion_length,
            "temperature": args.temperature,
            "truncation": Truncation(args.top_k or 0, args.top_p, args.min_p),
        }

    def __call__(self, prompts: list, trainer: GRPOTrainer) -> tuple[dict[str, Any], Recorded]:
        """What TRL's ``rollout_func`` returns, and the record of it."""
        if trainer.is_fsdp_enabled:
            raise ConfigError("rollout=native does not know weights sharded by FSDP. Use rollout=hf.")
        prompt_ids = trainer._tokenize_prompts(prompts)[0]
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model:
            drawn = draw(
                model,
                prompt_ids,
                ends=trainer.eos_token_ids,
                pad=trainer._tokenizer.pad_token_id,
                rank=self.rank,
                **self.options,
            )
        completions = [ids[m].tolist() for ids, m in zip(drawn.ids.cpu(), drawn.mask.cpu(), strict=True)]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}, drawn.recorded


def supported(config: Any) -> bool:
    """Whether :func:`draw` knows the layers: a Llama or Qwen decoder without sliding windows or length-dependent positions."""
    known = config.model_type in FAMILIES and _kinds(config) == ["full_attention"]
    return known and _rope(config) not in ("dynamic", "longrope")


def _kinds(config: Any) -> list[str]:
    return sorted(set(getattr(config, "layer_types", None) or ["full_attention"]))


def _rope(config: Any) -> str:
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")


def check_native(config: Any, args: GRPOConfig) -> None:
    """Raise ConfigError for what the native sampler does not do, rather than sample from something else."""
    if not supported(config):
        raise ConfigError(
            f"rollout=native does not know this model: type {config.model_type}, layers {_kinds(config)}, rope "
            f"{_rope(config)}. Expected {', '.join(FAMILIES)} with full attention and a rope that does not depend on the "
            "length. Use rollout=hf."
        )
    asked = {
        "trainer.repetition_penalty": args.repetition_penalty != 1.0,
        "trainer.generation_kwargs": bool(args.generation_kwargs),
        "trainer.cache_implementation": args.cache_implementation is not None,
        "trainer.use_vllm": args.use_vllm,
        "trainer.ds3_gather_for_generation=false": not args.ds3_gather_for_generation,
        "trainer.use_transformers_continuous_batching": args.use_transformers_continuous_batching,
    }
    if found := [name for name, is_asked in asked.items() if is_asked]:
        raise ConfigError(f"rollout=native does not know {', '.join(found)}. Drop it, or use rollout=hf.")


def draw(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
    temperature: float = 1.0,
    truncation: Truncation | None = None,
    rank: bool = False,
) -> Drawn:
    """One completion of each prompt, equal prompts sharing their prefill; temperature 0 is greedy.

    Args:
        prompts: token ids. ends: token ids that end a completion. pad: fills what is not there. rank: record the ranks too.
    """
    with torch.inference_mode():  # a fifth faster than no_grad on small models
        ids, mask, known = _draw(
            base_of(model), prompts, max_new_tokens, ends, pad, temperature, truncation or Truncation(), rank
        )
    # clones made here may take part in a loss, those of inference mode may not
    return Drawn(ids.clone(), mask.clone(), Recorded(*(None if k is None else k.clone() for k in known)))


def _draw(model, prompts, max_new_tokens, ends, pad, temperature, truncation: Truncation, rank: bool) -> Drawn:
    device, n = model.device, len(prompts)
    unique = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: i for i, prompt in enumerate(unique)}
    ids, attention = _left_padded(unique, pad, device)
    padded = not bool(attention.all())
    decoder = _Decoder(model, n, ids.shape[1] + max_new_tokens)
    logits = decoder(ids, (attention.cumsum(-1) - 1).clamp(min=0), attention if padded else None)
    expand = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
    decoder.expand(expand)
    logits, length = logits[expand], attention.sum(-1)[expand]
    attention = F.pad(attention, (0, max_new_tokens), value=True)[expand]

    warpers, ends = truncation.warpers(), torch.tensor(list(ends), device=device)
    out = torch.full((n, max_new_tokens), pad, device=device)
    mask = torch.zeros_like(out, dtype=torch.bool)
    logp, entropy = (torch.zeros(n, max_new_tokens, device=device) for _ in range(2))
    ranks = torch.zeros_like(out) if rank else None
    rows = torch.arange(n, device=device)  # the completions under way, in any order
    for t in range(max_new_tokens):
        token = _choose(logits, temperature, warpers)
        out[rows, t], mask[rows, t] = token, True
        logp[rows, t], entropy[rows, t], above = _known(logits, temperature, token, rank)
        if rank:
            ranks[rows, t] = above
        alive = ~torch.isin(token, ends)
        left = int(alive.sum())
        if left == 0 or t + 1 == max_new_tokens:
            break
        if left < len(rows):  # the last ones that go on take the places of the first ones that have ended
            target = (~alive[:left]).nonzero().squeeze(1)
            source = alive[left:].nonzero().squeeze(1) + left
            decoder.move(source, target, left)
            for state in (rows, token, attention, length):
                state[target] = state[source]
            rows, token, attention, length = rows[:left], token[:left], attention[:left], length[:left]
        seen = attention[:, : ids.shape[1] + t + 1] if padded else None
        logits = decoder(token[:, None], (length + t)[:, None], seen)
    recorded = Recorded(logp[:, : t + 1], entropy[:, : t + 1], None if ranks is None else ranks[:, : t + 1])
    return Drawn(out[:, : t + 1], mask[:, : t + 1], recorded)


class _Decoder:
    """The forward of a Llama-like model, with keys and values where they will stay: (layers, rows, heads, columns, width).

    Projections of the same input are one product.
    """

    def __init__(self, model: PreTrainedModel, rows: int, columns: int):
        c = model.config
        self.body, self.head = model.base_model, model.get_output_embeddings()
        self.heads, self.groups = c.num_attention_heads, c.num_key_value_heads
        self.width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.shape = (c.num_hidden_layers, rows, self.groups, columns, self.width)
        self.keys = self.values = (
            None  # made when their dtype is known: an fp32 head tied to the embedding says nothing of it
        )
        self.length = 0
        attention, mlp = [layer.self_attn for layer in self.body.layers], [layer.mlp for layer in self.body.layers]
        self.qkv = [_joined(a.q_proj, a.k_proj, a.v_proj) for a in attention]
        self.gate_up = [_joined(m.gate_proj, m.up_proj) for m in mlp]
        self.qk_scale = [self._qk_scale(a) for a in attention]

    def _qk_scale(self, attn: nn.Module) -> Tensor | None:
        """(heads, width) weights of the norms of queries and keys, where there are any."""
        if not hasattr(attn, "q_norm"):
            return None
        return torch.stack([attn.q_norm.weight] * self.heads + [attn.k_norm.weight] * self.groups)

    def __call__(self, ids: Tensor, positions: Tensor, attention: Tensor | None) -> Tensor:
        """(rows, vocabulary) fp32 logits after the last of the new tokens ``ids``; ``attention`` is over all columns so far."""
        x = self.body.embed_tokens(ids)
        cos, sin = (c[:, :, None] for c in self.body.rotary_emb(x, positions))
        new = ids.shape[1]
        mask = None if attention is None else attention[:, None, None]
        if new > 1:  # a padding token sees itself, so that no row of the softmax is empty
            causal = torch.ones(new, new, dtype=torch.bool, device=x.device).tril()
            mask = causal if mask is None else causal & (mask | torch.eye(new, dtype=torch.bool, device=x.device))
        for i, layer in enumerate(self.body.layers):
            x = x + self._attend(i, layer.self_attn, _norm(layer.input_layernorm, x), cos, sin, mask)
            gate, up = self.gate_up[i](_norm(layer.post_attention_layernorm, x)).chunk(2, -1)
            x = x + layer.mlp.down_proj(layer.mlp.act_fn(gate) * up)
        self.length += new
        return self.head(_norm(self.body.norm, x[:, -1])).float()

    def _attend(self, i: int, attn: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        rows, new, _ = x.shape
        qkv = self.qkv[i](x).view(rows, new, -1, self.width)
        qk, v = qkv.split([self.heads + self.groups, self.groups], 2)
        if self.qk_scale[i] is not None:
            qk = F.rms_norm(qk, (self.width,), eps=attn.q_norm.variance_epsilon) * self.qk_scale[i]
        q, k = _rotate(qk, cos, sin).split([self.heads, self.groups], 2)
        if self.keys is None:
            self.keys, self.values = k.new_empty(self.shape), v.new_empty(self.shape)
        end = self.length + new
        keys, values = self.keys[i, :rows, :, :end], self.values[i, :rows, :, :end]
        keys[:, :, self.length :], values[:, :, self.length :] = k.transpose(1, 2), v.transpose(1, 2)
        if new > 1:
            q = q.transpose(1, 2)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True).transpose(1, 2)
        else:  # the queries of a group share their keys: one small product each
            q = (q * self.width**-0.5).view(rows, self.groups, -1, self.width)
            weight = torch.matmul(q, keys.transpose(-1, -2)).float()
            if mask is not None:
                weight = weight.masked_fill(~mask, -torch.inf)
            out = torch.matmul(weight.softmax(-1).to(values.dtype), values)
        return attn.o_proj(out.reshape(rows, new, -1))

    def expand(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        for states in (self.keys, self.values):
            states[:, : len(rows), :, : self.length] = states[:, rows, :, : self.length]

    def move(self, source: Tensor, target: Tensor, left: int) -> None:
        """Rows ``source`` take the places ``target``; only the first ``left`` rows are of use from now on."""
        for states in (self.keys, self.values):
            states[:, target, :, : self.length] = states[:, source, :, : self.length]


def _joined(*linears: nn.Module) -> Callable[[Tensor], Tensor]:
    """The outputs side by side; one product unless there are adapters."""
    if any(type(linear) is not nn.Linear for linear in linears):
        return lambda x: torch.cat([linear(x) for linear in linears], -1)
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return lambda x: F.linear(x, weight, bias)


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids, attention = torch.full((len(prompts), width), pad), torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = True
    return ids.to(device), attention.to(device)


def _choose(logits: Tensor, temperature: float, warpers: LogitsProcessorList) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    # one number each, by inversion in fp64; a token without probability is never drawn
    below = warpers(None, logits / temperature).softmax(-1, dtype=torch.float64).cumsum(-1)
    point = torch.rand(len(below), 1, dtype=torch.float64, device=below.device) * below[:, -1:]
    return (below <= point).sum(-1).clamp(max=below.shape[1] - 1)


def _known(logits: Tensor, temperature: float, token: Tensor, rank: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logp, entropy and rank of the tokens, before any truncation."""
    logp = (logits / (temperature or 1.0)).log_softmax(-1)
    chosen = logp.gather(-1, token[:, None])
    above = (logp > chosen).sum(-1) + 1 if rank else None
    return chosen.squeeze(-1), torch.special.entr(logp.exp()).sum(-1), above
