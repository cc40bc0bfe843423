"""EntropyTrainer: the thin seam between TRL's GRPO objective and entrl's per-token signal. No algorithm lives here.

TRL reads ``inputs["advantages"]`` after its forward and accepts (B, T), so plug-ins act by handing it shaped advantages:
for w >= 0, ``w min(r A, clip(r) A) = min(r w A, clip(r) w A)``. Penalties are added to the loss afterwards. The KL term and
every denominator stay TRL's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rl.contract import Mean, RunFacts, Signal, TokenBatch
from rl.dynamics import Dynamics, Histogram
from rl.head import HiddenTap, Reference, full_kl, ranks, refuse_logit_transforms
from rl.pipeline import Pipeline
from rl.recorder import Recorder
from rl.reduce import all_sum, gather
from rl.seam import check_seam
from rl.series import rename

Sink = Callable[[int, dict[str, float], dict[str, Histogram]], None]


class EntropyTrainer(GRPOTrainer):
    """``trl.GRPOTrainer`` whose advantages and loss pass through a pipeline of plug-ins.

    With no plug-in it is TRL to the last bit. Tested over all eight loss types, on- and off-policy, with and without KL.

    Args:
        model, reward_funcs, args, train_dataset, processing_class, peft_config, callbacks: as for TRL.
        pipeline: the plug-ins. dynamics: accumulates the entropy series. recorder: writes sampled rollouts, or None.
        sinks: called as ``sink(step, metrics, histograms)`` on the main process at every log.
        answer: completion text -> canonical answer, for the number of distinct answers per group; None leaves it out.

    Raises:
        SeamError: an untested TRL. ConfigError: a plug-in needs what this model cannot give.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        reward_funcs: list[Callable],
        args: GRPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        pipeline: Pipeline,
        dynamics: Dynamics | None = None,
        recorder: Recorder | None = None,
        sinks: Sequence[Sink] = (),
        answer: Callable[[str], str | None] | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        check_seam()
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        self.pipeline, self.dynamics, self.recorder = pipeline, dynamics or Dynamics(None), recorder
        self.sinks, self.answer = list(sinks), answer
        self._open: dict | None = None  # the inputs of the loss under way
        self._signal: Signal | None = None
        self._rollout_passes: list[tuple[Tensor, Tensor]] | None = None  # (logps, entropies) computed at the rollout
        self._rewards: Tensor | None = None  # (completions of all ranks, reward functions)
        self._rollout_entropy: Tensor | None = None
        self._means: dict[str, Mean] = {}
        self._clock = {"rollout": 0.0, "since": time.perf_counter(), "tokens": 0.0}
        self._totals = [0.0, 0.0, 0.0]  # tokens, rollout seconds, wall seconds
        self._tap = self._ref = None
        if "full_kl" in pipeline.needs:
            refuse_logit_transforms(self.model.config, "plugin.entropy_band")
            self._ref = Reference(self.model, self.accelerator.device)
        if pipeline.needs & {"rank", "full_kl"}:
            self._tap = HiddenTap(self.model)
        self.add_callback(_StepPhase(self))
        self.remove_callback(PrinterCallback)  # the sinks say it once, and under entrl's names

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        self._open = dict(inputs)  # TRL hands out the same dict for every iteration over a rollout: never change it
        try:
            loss = super()._compute_loss(model, self._open)
        finally:
            tokens_mask, self._open = self._loss_mask(inputs), None
        signal, self._signal = self._signal, None
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        for penalty in signal.penalties:
            loss = loss + penalty.coef * (penalty.mean(tokens_mask) / accumulation)
        return loss

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """TRL's forward; inside a loss the plug-ins run on its result, at a rollout its entropies are kept too."""
        # *args, **kwargs: TRL's own further parameters, handed on untouched; their list changes with every release.
        at_rollout = self._open is None and self._rollout_passes is not None and model is self.model
        if at_rollout:
            kwargs["compute_entropy"] = True  # costs nothing: the policy's head computes it anyway
        with self._tap or nullcontext():
            out = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        if self._open is not None:
            self._run_plugins(input_ids, attention_mask, out[0], out[1])
        elif at_rollout:
            self._rollout_passes.append(out[:2])
        return out

    def _run_plugins(self, input_ids: Tensor, attention_mask: Tensor, logps: Tensor, entropies: Tensor) -> None:
        tokens = self._token_batch(input_ids, attention_mask, logps, entropies)
        self._signal = self.pipeline(tokens)
        if self.pipeline.plugins:
            self._open["advantages"] = self._signal.effective
        if not self.model.training:
            return
        self._add(self._signal.metrics)
        self._add(self._clip_means(tokens, self._signal))
        self.dynamics.observe(tokens, self._signal, self._lr())
        if self.recorder is not None and self.recorder.due(self.state.global_step + 1):
            self._record(tokens)

    def _token_batch(self, input_ids, attention_mask, logps, entropies) -> TokenBatch:
        inputs, needs = self._open, self.pipeline.needs
        mask = self._loss_mask(inputs).bool()
        advantages = inputs["advantages"]
        old_logp = inputs.get("old_per_token_logps")
        old_entropy = inputs.get("old_entropy")
        on_policy = old_logp is None
        rank = kl = None
        if self._tap is not None:
            hidden = self._tap.completion(mask.shape[1])[mask]
            if "rank" in needs:
                rank = torch.ones_like(inputs["completion_ids"])
                rank[mask] = ranks(hidden, self._tap.head, inputs["completion_ids"][mask])
            if "full_kl" in needs:
                kl = self._full_kl(hidden, input_ids, attention_mask, mask)
        empty = logps.new_zeros(len(mask))
        return TokenBatch(
            mask=mask,
            ids=inputs["completion_ids"],
            logp=logps,
            old_logp=logps.detach() if on_policy else old_logp,
            entropy=entropies if "entropy.grad" in needs else entropies.detach(),
            advantages=(advantages if advantages.dim() == 2 else advantages[:, None]).expand(mask.shape),
            reward=inputs.get("reward", empty),
            group=inputs.get("group", empty.long()),
            step=self.state.global_step,
            total_steps=self.state.max_steps,
            temperature=self.temperature,
            on_policy=on_policy,
            old_entropy=entropies.detach() if old_entropy is None else old_entropy,
            rank=rank,
            ref_logp=inputs.get("ref_per_token_logps"),
            full_kl=kl,
            rollout_entropy=self._rollout_entropy,
        )

    def _full_kl(self, policy: Tensor, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        reference = self._ref.hidden(input_ids, attention_mask, mask.shape[1])[mask]
        kl = full_kl(policy, self._tap.head, reference, self._ref.tap.head, self.temperature)
        return torch.zeros_like(mask, dtype=kl.dtype).masked_scatter(mask, kl)

    @staticmethod
    def _loss_mask(inputs) -> Tensor:
        mask = inputs["completion_mask"]
        return mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]

    def _lr(self) -> float:
        return self._get_learning_rate() if self.lr_scheduler is not None else self.args.learning_rate

    # ---- the rollout ------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        start = time.perf_counter()
        self._rollout_passes = []
        try:
            output = super()._generate_and_score_completions(inputs)
            passes = self._rollout_passes
        finally:
            self._rollout_passes = None
        rows = len(output["completion_ids"])
        first = self.accelerator.process_index * rows
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        rewards = self._rewards[first : first + rows]
        output["rewards_per_func"] = rewards
        output["reward"] = (rewards * self.reward_weights.to(rewards.device)).nansum(-1)
        output["group"] = torch.arange(first, first + rows, device=rewards.device) // group_size
        self._old_policy(output, passes)
        self._clock["rollout"] += time.perf_counter() - start
        self._clock["tokens"] += float(output["completion_mask"].sum())
        return output

    def _old_policy(self, output: dict, passes: list[tuple[Tensor, Tensor]]) -> None:
        """Add the behaviour policy's entropies to ``output`` where TRL computed its logps or a plug-in wants them."""
        old_logp = output.get("old_per_token_logps")
        entropy = next((h for logp, h in passes if logp is old_logp), None)
        wanted = "rollout_entropy" in self.pipeline.needs
        if entropy is None and wanted:
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
            attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
            with torch.no_grad():
                _, entropy, _ = super()._get_per_token_logps_and_entropies(
                    self.model,
                    ids,
                    attention,
                    output["completion_ids"].shape[1],
                    batch_size=self.args.per_device_train_batch_size,
                    compute_entropy=True,
                )
        if entropy is not None:
            output["old_entropy"] = entropy
        if wanted:
            self._rollout_entropy = gather(entropy[self._loss_mask(output).bool()])[0]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.answer is not None and self.model.training:
            groups: dict[str, set] = {}
            for prompt, completion in zip(prompts, completions, strict=True):
                groups.setdefault(str(prompt), set()).add(self.answer(_text(completion)))
            distinct = torch.tensor([float(sum(map(len, groups.values()))), float(len(groups))])
            self._add({"rollout/distinct_answers": Mean(*distinct.to(self.accelerator.device))})
        return self._rewards

    # ---- reporting --------------------------------------------------------------------------------------------------

    def facts(self) -> RunFacts:
        """What plug-ins may know of this run, for their advice."""
        args = self.args
        every = args.steps_per_generation * self.num_iterations
        return RunFacts(
            on_policy=args.gradient_accumulation_steps % every == 0,
            loss_type=self.loss_type,
            beta=self.beta,
            micro_batch=args.per_device_train_batch_size,
            world_size=self.accelerator.num_processes,
            group_size=self.num_generations,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand one step's series to the sinks; TRL's own log then sees the same dictionary it always did."""
        if "loss" in logs and self.model.training:
            trl_means = {k: [v for v in vs if not math.isnan(v)] for k, vs in self._metrics["train"].items()}
            metrics = rename({**logs, **{k: sum(v) / len(v) for k, v in trl_means.items() if v}})
            metrics.update(self._flush_means())
            entropy, histograms = self.dynamics.flush()
            metrics.update(entropy)
            metrics.update(self._flush_clock())
            if self.accelerator.is_main_process:
                for sink in self.sinks:
                    sink(self.state.global_step, metrics, histograms)
        super().log(logs, start_time)

    def _add(self, means: Mapping[str, Mean]) -> None:
        for name, mean in means.items():
            before = self._means.get(name)
            self._means[name] = mean if before is None else Mean(before.total + mean.total, before.count + mean.count)

    def _flush_means(self) -> dict[str, float]:
        """Means over micro-batches and ranks, by sum and count; a mean of nothing is left out."""
        names = sorted(self._means)
        if not names:
            return {}
        sums = all_sum(
            torch.stack([torch.stack([m.total.double(), m.count.double()]) for m in map(self._means.get, names)])
        )
        self._means = {}
        return {name: (total / count).item() for name, (total, count) in zip(names, sums, strict=True) if count > 0}

    def _flush_clock(self) -> dict[str, float]:
        now = time.perf_counter()
        wall, rollout = now - self._clock["since"], self._clock["rollout"]
        tokens = all_sum(torch.tensor([self._clock["tokens"]], device=self.accelerator.device)).item()
        self._clock = {"rollout": 0.0, "since": now, "tokens": 0.0}
        self._totals = [total + new for total, new in zip(self._totals, (tokens, rollout, wall), strict=True)]
        times = {"time/step": wall, "time/rollout": rollout, "time/tokens_per_second": tokens / wall}
        if torch.cuda.is_available():
            times["mem/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return times

    def tokens_per_second(self) -> dict[str, float]:
        """Completion tokens over the whole training: per second of rollout, and per second of everything."""
        tokens, rollout, wall = self._totals
        return {"rollout": tokens / max(rollout, 1e-9), "train": tokens / max(wall, 1e-9)}

    def _clip_means(self, tokens: TokenBatch, signal: Signal) -> dict[str, Mean]:
        """Share of trainable tokens outside the clip range on the side where PPO stops their gradient.

        TRL's own series would count a masked token as not clipped, because its advantage has become 0.
        """
        ratio = (tokens.logp - tokens.old_logp).detach().exp()
        low = (ratio < 1 - self.epsilon_low) & (signal.advantages < 0)
        high = (ratio > 1 + self.epsilon_high) & (signal.advantages > 0)
        return {
            "policy/clip_low": Mean.of(low.float(), tokens.mask),
            "policy/clip_high": Mean.of(high.float(), tokens.mask),
        }

    def _record(self, tokens: TokenBatch) -> None:
        decode = self.processing_class.batch_decode
        prompts = [ids[m.bool()] for ids, m in zip(self._open["prompt_ids"], self._open["prompt_mask"], strict=True)]
        completions = [ids[m] for ids, m in zip(tokens.ids, tokens.mask, strict=True)]
        per_func = self._open["rewards_per_func"]
        self.recorder.observe(
            self.state.global_step + 1,
            tokens,
            self._signal,
            prompts=decode(prompts, skip_special_tokens=True),
            completions=decode(completions, skip_special_tokens=True),
            token_texts=[[self.processing_class.decode(i) for i in ids] for ids in completions],
            rewards={name: per_func[:, i].tolist() for i, name in enumerate(self.reward_func_names)},
        )


class _StepPhase(TrainerCallback):
    """On resume TRL restarts its micro-step counter at 0 (trl 1.16), which shifts when it generates; restore it."""

    def __init__(self, trainer: EntropyTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._step = state.global_step * args.gradient_accumulation_steps
        self.trainer._clock["since"] = time.perf_counter()


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
