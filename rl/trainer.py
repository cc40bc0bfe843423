"""EntropyTrainer: the thin seam between TRL's GRPO objective and entrl's per-token signal. No algorithm lives here.

TRL reads ``inputs["advantages"]`` after its forward and accepts (B, T), so plug-ins act by handing it shaped advantages:
for w >= 0, ``w min(r A, clip(r) A) = min(r w A, clip(r) w A)``. Penalties are added to the loss afterwards. The KL term and
every denominator stay TRL's.

Where the rollout's own values are recorded and nothing but advantages decides about gradient, the plug-ins run before the
forward, and the forward sees only what can get gradient (``rl.sparsity``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rl.callbacks.phase import StepPhase
from rl.checkpoint import Checkpoints
from rl.contract import Signal, TokenBatch
from rl.dynamics import Dynamics, Histogram
from rl.groups import group_of, leave_out, mean_logps, new_rollout, only_votes, trained_of_group
from rl.meter import Meter, distinct_answers, policy_means, reward_means, sampling_means
from rl.pipeline import Pipeline
from rl.recorder import Recorder
from rl.recording import Recording
from rl.resume import ResumableTrainer
from rl.scoring import HiddenTap, Recorded, Reference, WithRank, add_scoring, base_of, check_needs
from rl.seam import check_seam
from rl.series import of_step, rename
from rl.sparsity import (
    Cut,
    Savings,
    Trim,
    by_length,
    expected_gradient,
    has_dropout,
    lengths_of,
    no_gradient,
    per_token,
    rows_in,
    score_all,
    score_live,
)

Sink = Callable[[int, dict[str, float], dict[str, Histogram]], None]


class EntropyTrainer(ResumableTrainer):
    """``trl.GRPOTrainer`` whose advantages and loss pass through a pipeline of plug-ins.

    With no plug-in its gradients are TRL's up to rounding. Tested over all eight loss types, on- and off-policy, with and
    without KL.

    Args:
        model, reward_funcs, args, train_dataset, processing_class, peft_config, callbacks: as for TRL.
        pipeline: the plug-ins. dynamics: accumulates the entropy series. recorder: writes sampled rollouts, or None.
        sinks: called as ``sink(step, metrics, histograms)`` on the main process at every log.
        answers: completion texts -> canonical answers, for the number of distinct answers per group; None leaves it out.
        sampler: draws the completions instead of TRL and records as it goes (``rl.rollout``); None for TRL's generation.
        train_share: of each group only this share, its first completions, is trained on; the others vote.
        checkpoints: where and when the trainer is saved (``rl.resume``); None: where asked, in the output folder.

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
        answers: Callable[[list[str]], list[str | None]] | None = None,
        sampler: Callable[[list, GRPOTrainer], tuple[dict[str, Any], Recorded]] | None = None,
        train_share: float = 1.0,
        checkpoints: Checkpoints | None = None,
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
            rollout_func=self._sample if sampler is not None else None,
        )
        self.pipeline, self.dynamics = pipeline, dynamics or Dynamics(None)
        self.sinks, self.answers, self.sampler = list(sinks), answers, sampler
        self.trained = trained_of_group(train_share, args)  # completions of each group
        self.meter = Meter(self.accelerator.device)
        self.recording = None if recorder is None else Recording(self, recorder)
        self._open: dict | None = None  # the inputs of the loss under way
        self._signal: Signal | None = None
        self._passes: list[Recorded] | None = None  # computed at the rollout under way
        self._sampled: Recorded | None = None  # recorded by the sampler
        self._rewards: Tensor | None = None  # (completions of all ranks, reward functions)
        self._rollout_entropy: Tensor | None = None
        self._rollout_step = -1  # optimizer steps done at the last rollout
        self._window: tuple[int, list[dict]] = (0, [])  # first micro-step, micro-batches of one optimizer step
        needs = pipeline.needs
        terms = needs | ({"entropy.grad"} if self._entropy_bonus_enabled else set())
        self.savings = Savings.of(
            args, terms, pipeline.promises, aux_loss=self.aux_loss_enabled, dropout=has_dropout(self.model)
        )
        # several ranks, and engines that watch every parameter, call the model equally often
        self._skips_idle = self.accelerator.distributed_type == DistributedType.NO
        self.trim = Trim.of(self.model.config.get_text_config(), args.pad_to_multiple_of)
        for scored in (self.model, self.ref_model):
            if scored is not None:
                add_scoring(base_of(self.accelerator.unwrap_model(scored)), self.temperature, args.cast_lm_head_to_fp32)
        check_needs(pipeline, self.model.config, self.accelerator, args)
        self._ref = Reference(self.model, self.accelerator.device, self.temperature) if "full_kl" in needs else None
        self._tap = HiddenTap(self.model) if needs & {"full_kl", "logit_scale"} else None
        self._trims_loss = not (self._is_vlm or self.aux_loss_enabled or self._tap is not None)
        self.use_checkpoints(checkpoints)
        self.add_callback(StepPhase(self))
        self.remove_callback(PrinterCallback)  # the sinks say it once, and under entrl's names

    # ---- the micro-batches of an optimizer step -----------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return inputs
        first, batches = self._window
        if not first <= self._step < first + len(batches):
            first, batches = self._window = self._step, self._next_window()
        return batches[self._step - first]

    def _next_window(self) -> list[dict]:
        """The micro-batches up to the next update, as far as they come from one rollout."""
        per_rollout, per_update = self.args.steps_per_generation, self.current_gradient_accumulation_steps
        at, size = self._step % per_rollout, min(per_rollout, per_update)
        whole = per_update == self.args.gradient_accumulation_steps and max(per_rollout, per_update) % size == 0
        size = size if whole and at % size == 0 else 1
        batches = [dict(batch) for batch in self._buffered_inputs[at : at + size]]
        fresh = self.state.global_step == self._rollout_step
        ahead = self.savings.tokens if fresh else self.savings.stale
        ahead = ahead and not self._is_vlm and all(map(self._recorded, batches))
        if ahead:
            for batch in batches:
                self._run_ahead(batch)
            if self.recording is not None and not fresh:
                self.recording.before_loss()
        order = self.savings.order_ahead if ahead else self.savings.order
        if size > 1 and order and not self._is_vlm:
            batches = by_length(
                batches, [lengths_of(batch, self._scored(batch), self._live(batch)) for batch in batches]
            )
        # a micro-batch without gradient is skipped, where another one of the same update brings every parameter its gradient
        may_skip = self._skips_idle and (ahead or self.savings.rows)
        idle = [may_skip and not self._live(batch).any() for batch in batches]
        for batch, is_idle in zip(batches, idle, strict=True):
            batch["idle"] = is_idle and not all(idle)
        return batches

    def _recorded(self, inputs: dict) -> bool:
        rank = "rank" not in self.pipeline.needs or "old_rank" in inputs
        return rank and "old_logp" in inputs and "old_entropy" in inputs

    def _run_ahead(self, inputs: dict) -> None:
        """The plug-ins on what the rollout recorded, which leaves their effective advantages in ``inputs``."""
        rank = inputs["old_rank"] if "rank" in self.pipeline.needs else None
        tokens = self._token_batch(inputs, inputs["old_logp"], inputs["old_entropy"], rank, None)
        signal = self._run_plugins(inputs, tokens)
        self.pipeline.check_gradients(signal)
        inputs["effective"] = signal.effective

    def _scored(self, inputs: dict) -> Tensor:
        """(B, T) tokens whose logits the loss computes."""
        if "effective" in inputs:
            return self._loss_mask(inputs).bool() & (inputs["effective"] != 0)
        return inputs["completion_mask"].bool()

    def _live(self, inputs: dict) -> Tensor:
        """(B, T) tokens that may get gradient, as far as that is known before the forward."""
        scored = self._scored(inputs)
        if "effective" in inputs or not self.savings.rows:
            return scored
        return scored & (per_token(inputs["advantages"]) != 0)

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        self._open = dict(inputs)  # TRL hands out the same dict for every iteration over a rollout: never change it
        try:
            loss = super()._compute_loss(model, self._open)
        finally:
            tokens_mask, self._open = self._loss_mask(inputs), None
        signal, self._signal = self._signal, None
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        for penalty in signal.penalties if signal is not None else ():
            loss = loss + penalty.coef * (penalty.mean(tokens_mask) / accumulation)
        return loss

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """Logp and entropy of every completion token: TRL asks at the rollout, in the loss, and of the reference model.

        Inside a loss the plug-ins run on the result, at a rollout it is kept.
        """
        # *args, **kwargs: TRL's own further parameters, handed on untouched; their list changes with every release.
        inputs, rank, out = self._open, "rank" in self.pipeline.needs, None
        if inputs is not None and "effective" in inputs:
            return self._forward_ahead(model, inputs, input_ids, attention_mask)
        if inputs is None and not self._is_vlm:
            scored = attention_mask[:, -logits_to_keep:].bool()
            size = kwargs.get("batch_size") or len(input_ids)
            with self.accelerator.autocast():
                found = score_all(
                    model, input_ids, attention_mask, scored, size, self.trim, rank and model is self.model
                )
            if self._passes is not None and model is self.model:
                self._passes.append(found)
        elif inputs is not None and self._trims_loss:
            scored = self._scored(inputs)
            live = None if inputs.get("idle") else rows_in(self._live(inputs))
            with self.accelerator.autocast():
                found = score_live(model, input_ids, attention_mask, scored, live, self.trim, rank)
        else:
            scorer = WithRank(model, rank)
            with self._tap if self._tap is not None else nullcontext():
                out = super()._get_per_token_logps_and_entropies(
                    scorer, input_ids, attention_mask, logits_to_keep, *args, **kwargs
                )
            found = Recorded(out[0], out[1], scorer.rank(logits_to_keep))
        if inputs is not None:
            mask = self._loss_mask(inputs).bool()
            kl = self._ref.full_kl(self._tap, input_ids, attention_mask, mask) if self._ref is not None else None
            logp = found.logp if "logp.grad" in self.pipeline.needs else found.logp.detach()
            entropy = found.entropy if "entropy.grad" in self.pipeline.needs else found.entropy.detach()
            tokens = self._token_batch(inputs, logp, entropy, found.rank, kl)
            self._signal = self._run_plugins(inputs, tokens)
            if self.model.training:
                alive = per_token(inputs["advantages"]) != 0 if self.savings.rows else None
                self.pipeline.check_gradients(self._signal, alive)
            if (scale := self._signal.logit_scale) is not None:
                inputs.pop("old_per_token_logps", None)  # on-policy: TRL then takes the scaled ones, detached
                with self.accelerator.autocast():
                    found = self._tap.scaled(found, tokens, scale, self.args.cast_lm_head_to_fp32)
            if self._tap is not None:
                self._tap.free()
            self._count(inputs, found.logp, tokens.mask, self._signal.effective != 0)
            if self.pipeline.plugins:
                inputs["advantages"] = self._signal.effective
        return found.logp, found.entropy, None if out is None else out[2]

    def _forward_ahead(self, model, inputs, input_ids, attention) -> tuple[Tensor, Tensor, None]:
        """Scores the tokens with an effective advantage; for all others what the rollout recorded stands."""
        mask, scored = self._loss_mask(inputs).bool(), self._scored(inputs)
        logp, entropy = inputs["old_logp"], inputs["old_entropy"]
        if inputs["idle"]:
            logp = logp + no_gradient(model)
        else:
            cut = Cut.of(input_ids, attention, scored, rows_in(scored), self.trim)
            with self.accelerator.autocast():
                found = cut.score(model, hint=expected_gradient(self.args, inputs, mask, inputs["effective"]))
            logp = torch.where(scored, found.logp, logp)
            entropy = torch.where(scored, found.entropy.detach(), entropy)
        self._count(inputs, logp, scored, scored)
        if self.pipeline.plugins:
            inputs["advantages"] = inputs["effective"]
        return logp, entropy, None

    def _token_batch(self, inputs, logps: Tensor, entropies: Tensor, rank, kl) -> TokenBatch:
        mask = self._loss_mask(inputs).bool()
        old_logp, old_entropy = inputs.get("old_per_token_logps"), inputs.get("old_entropy")
        on_policy = old_logp is None
        empty = logps.new_zeros(len(mask))
        return TokenBatch(
            mask=mask,
            ids=inputs["completion_ids"],
            logp=logps,
            old_logp=logps.detach() if on_policy else old_logp,
            entropy=entropies,
            advantages=per_token(inputs["advantages"]).expand(mask.shape),
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
            noted={key: value for key, value in inputs.items() if key.startswith("plugin/")},
        )

    def _run_plugins(self, inputs: dict, tokens: TokenBatch) -> Signal:
        signal = self.pipeline(tokens)
        if self.model.training:
            self.meter.add(signal.metrics)
            self.dynamics.observe(tokens, signal, self._lr())
            if self.recording is not None:
                self.recording.observe(inputs, tokens, signal)
        return signal

    @staticmethod
    def _loss_mask(inputs) -> Tensor:
        mask = inputs["completion_mask"]
        return mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]

    def _lr(self) -> float:
        return self._get_learning_rate() if self.lr_scheduler is not None else self.args.learning_rate

    # ---- the rollout ------------------------------------------------------------------------------------------------

    def _sample(self, prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
        output, self._sampled = self.sampler(prompts, trainer)
        return output

    def _generate_and_score_completions(self, inputs):
        start = time.perf_counter()
        self._passes, self._sampled = [], None
        try:
            output = super()._generate_and_score_completions(inputs)
            self._record_old_policy(output)
        finally:
            self._passes = None
        rows, tokens = len(output["completion_ids"]), float(output["completion_mask"].sum())
        first = self.accelerator.process_index * rows
        rewards, weights = self._rewards[first : first + rows], self.reward_weights.to(self._rewards.device)
        if self.trained < self.num_generations and self.model.training:
            leave_out(output, rewards.isnan().all(1), self.accelerator)
        output |= {"rewards_per_func": rewards, "reward": (rewards * weights).nansum(-1), "group": group_of(self, rows)}
        if self.model.training:
            self._rollout_step = self.state.global_step
            self._window = (0, [])
            mask = self._loss_mask(output).bool()
            if "rollout_entropy" in self.pipeline.needs:
                self._rollout_entropy = output["old_entropy"][mask]
            output |= self.pipeline.at_rollout(new_rollout(output, mask, self.num_generations, self.trained))
            self.meter.add(reward_means(rewards, self.reward_func_names, weights) | sampling_means(output, mask))
        self.meter.add_rollout(time.perf_counter() - start, tokens)
        if self.recording is not None and self.model.training:
            self.recording.at_rollout(output)
        return output

    def _record_old_policy(self, output: dict) -> None:
        """Add logp, entropy and rank under the rollout's policy, where the sampler or TRL made them or a plug-in wants them."""
        old_logp, wanted = output.get("old_per_token_logps"), "rollout_entropy" in self.pipeline.needs
        found = next((p for p in self._passes if p.logp is old_logp), self._sampled)
        if found is None and wanted:
            both = [torch.cat([output[f"prompt_{x}"], output[f"completion_{x}"]], 1) for x in ("ids", "mask")]
            size, width = self.args.per_device_train_batch_size, output["completion_ids"].shape[1]
            with torch.no_grad():
                self._get_per_token_logps_and_entropies(self.model, *both, width, batch_size=size)
            found = self._passes[-1]
        if found is not None:
            output |= found.named("old", output["completion_mask"])

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if any(getattr(reward, "needs_logp", False) for reward in self.reward_funcs):
            known = self._sampled or (self._passes[-1] if self._passes else None)
            means = mean_logps(self, prompts, completion_ids_list, known and known.logp)
            inputs = [{**row, "mean_logp": mean} for row, mean in zip(inputs, means, strict=True)]
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.answers is not None and self.model.training:
            found = self.answers([c if isinstance(c, str) else str(c[-1]["content"]) for c in completions])
            self.meter.add(distinct_answers(group_of(self, len(found)), found))
        if self.trained < self.num_generations and self.model.training:
            votes = only_votes(len(self._rewards), self.num_generations, self.trained, self._rewards.device)
            self._rewards[votes] = torch.nan  # TRL leaves what has no reward out of its group's mean and deviation
        return self._rewards

    # ---- reporting --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand one step's series to the sinks; TRL's own log then sees the same dictionary it always did."""
        if "loss" in logs and self.model.training:
            metrics = rename({**logs, **of_step(self._metrics["train"])})
            entropy, histograms = self.dynamics.flush(self.accelerator.device)
            metrics |= entropy | self.meter.flush()
            if self.accelerator.is_main_process:
                for sink in self.sinks:
                    sink(self.state.global_step, metrics, histograms)
        super().log(logs, start_time)

    def _count(self, inputs: dict, logp: Tensor, scored: Tensor, live: Tensor) -> None:
        if self.model.training:
            self.meter.add(policy_means(inputs, self._loss_mask(inputs).bool(), logp, scored, live, self.args))
