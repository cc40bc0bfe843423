"""Alarms: each condition on series made for it, one line an episode, and what a run does about it on all ranks."""

import json
import math

import pytest
import torch
from transformers import TrainerControl

from ranks import two_ranks
from rl import build
from rl.alarms import EntropyFloor, EntropySlope, HollowReward, IdlePlugin, Length, Reading, Share, Trace
from rl.callbacks.alarm import Alarms, TakeAction
from rl.checkpoint import Checkpoints, found, rewind
from rl.config import compose
from rl.errors import ConfigError
from tiny import EntropyTrainer, make_trainer, save_model

ONE = {"window": 10, "patience": 1, "action": "log"}


def gone_off(watch, steps, tmp_path=None, name="it"):
    """The steps at which an alarm goes off. Args: steps: metrics of each, from step 1."""
    alarms, found = Alarms(tmp_path, {name: watch}) if tmp_path else None, []
    if alarms is None:
        alarms = Alarms("unused", {name: watch})
        alarms._say = lambda *args: None
    for step, metrics in enumerate(steps, 1):
        if alarms._gone_off(step, metrics):
            found.append(step)
    return found


def of(name, values):
    return [{name: value} for value in values]


def falling(start, half_life, steps):
    return of("entropy/mean", [start * 0.5 ** (t / half_life) for t in range(steps)])


# ---- conditions -------------------------------------------------------------------------------------------------------


def test_entropy_slope_is_a_half_life():
    assert gone_off(EntropySlope(half_life=30, **ONE), falling(1.0, 29, 40)) == [10]
    assert gone_off(EntropySlope(half_life=30, **ONE), falling(1.0, 31, 40)) == []
    assert gone_off(EntropySlope(half_life=30, **ONE), falling(1.0, -20, 40)) == []  # it rises
    watch = EntropySlope(half_life=30, **ONE)
    (reading,) = [r for t, m in enumerate(falling(1.0, 25, 10)) for r in watch.read(t, m)]
    assert reading.value == pytest.approx(25) and "halves every 25 steps (at most 25)" in reading.text


def test_entropy_slope_counts_steps_not_lines():
    watch = EntropySlope(half_life=30, **ONE)
    (reading,) = [
        r for t, m in enumerate(falling(1.0, 25, 10)) for r in watch.read(5 * t, m)
    ]  # logged every fifth step
    assert reading.value == pytest.approx(125)


def test_entropy_floor_is_the_time_left():
    def watch():
        return EntropyFloor(floor=0.05, within=50.5, **ONE)

    # 0.4 at step 1 falls to 0.05 in three half-lives, at step 61
    assert gone_off(watch(), falling(0.4, 20, 60))[0] == 11
    assert gone_off(watch(), falling(0.4, 200, 60)) == []
    assert gone_off(watch(), of("entropy/mean", [0.04] * 12)) == [10]  # at it already, whatever the slope
    assert gone_off(watch(), of("entropy/mean", [0.0] * 12)) == [10]
    assert gone_off(watch(), of("entropy/mean", [0.3] * 40)) == []
    noisy = of("entropy/mean", [0.3 * (1.3 if t % 2 else 0.7) * 0.98**t for t in range(12)])
    assert gone_off(watch(), noisy) == []  # the slope of so noisy a window says nothing yet


def test_shares_of_groups_and_completions():
    def watch():
        return Share(series="rollout/zero_std_groups", what="groups", above=0.9, **ONE)

    assert gone_off(watch(), of("rollout/zero_std_groups", [1.0] * 12)) == [10]
    assert gone_off(watch(), of("rollout/zero_std_groups", [0.5] * 10 + [1.0] * 20)) == [18]
    assert gone_off(watch(), of("rollout/zero_std_groups", [0.89] * 40)) == []


def test_length_against_its_beginning():
    def watch():
        return Length(low=0.5, high=2.0, **ONE)

    assert gone_off(watch(), of("rollout/len", [100.0] * 10 + [40.0] * 20)) == [20]
    assert gone_off(watch(), of("rollout/len", [100.0] * 10 + [210.0] * 20)) == [20]
    assert gone_off(watch(), of("rollout/len", [100.0] * 10 + [60.0] * 10 + [190.0] * 20)) == []
    assert gone_off(watch(), of("rollout/len", [0.0] * 40)) == []


def test_every_idle_plugin_goes_off_by_itself_and_a_busy_one_never():
    steps = [{"plugin/a/touched": 0.0, "plugin/b/touched": 0.0, "plugin/c/touched": 0.2, "plugin/c/adv_mass": 0.0}] * 15
    steps[2] = {**steps[2], "plugin/b/touched": 0.01}
    assert gone_off(IdlePlugin(**ONE), steps) == [10, 13]
    watch = IdlePlugin(**ONE)
    readings = [r for t, m in enumerate(steps[:10]) for r in watch.read(t, m)]
    assert {r.about: r.holds for r in readings} == {"a": True, "b": False, "c": False}
    assert "plugin.a has touched no token for 10 steps" in readings[0].text


def test_a_shadow_has_words_of_its_own():
    watch = IdlePlugin(**ONE)
    # of plain GRPO there is no Jaccard index, and in a step without any advantage no cosine either
    steps = [{"plugin/a/touched": 0.0, **({"shadow/a/cosine": 1.0} if step < 9 else {})} for step in range(10)]
    *_, (reading,) = [list(watch.read(step, metrics)) for step, metrics in enumerate(steps)]
    assert "plugin.a, a shadow, would have touched no token for 10 steps" in reading.text


HOLLOW = {"rise": 0.5, "entropy": 0.5, "check": None, "length": 0.6, "answers": 1.5, **ONE}


def hollow(check=None, **changed):
    """The reward rises by 0.8 of its spread and the entropy falls to 0.4; ``changed`` series: from, to."""
    series = {
        "reward/mean": (0.2, 0.6),
        "reward/std": (0.5, 0.5),
        "entropy/mean": (0.5, 0.2),
        "rollout/len": (100.0, 90.0),
        "rollout/distinct_answers": (6.0, 3.0),
        "rollout/zero_std_groups": (0.1, 0.3),
    } | {name.replace("__", "/"): ends for name, ends in changed.items()}
    steps = [{name: ends[step >= 10] for name, ends in series.items()} for step in range(20)]
    return gone_off(HollowReward(**HOLLOW | {"check": check}), steps)


def test_hollow_reward_needs_an_independent_sign():
    assert hollow() == []  # what every healthy run does
    assert hollow(rollout__len=(100.0, 50.0)) == [20]
    assert hollow(rollout__distinct_answers=(6.0, 1.2)) == [20]
    assert hollow(rollout__distinct_answers=(6.0, 1.2), rollout__zero_std_groups=(0.1, 0.8)) == []  # solved
    check = "reward/correct"
    assert hollow(check, reward__correct=(0.2, 0.2)) == [20]
    assert hollow(check, reward__correct=(0.2, 0.6)) == []
    assert hollow(check) == []  # a check that the run does not have says nothing
    short = {"rollout__len": (100.0, 50.0)}
    assert hollow(**short, reward__mean=(0.2, 0.4)) == [] == hollow(**short, entropy__mean=(0.5, 0.3))


def test_a_check_that_is_never_logged_is_named_once():
    watch = HollowReward(**{**HOLLOW, "check": "reward/corect"})
    with pytest.warns(
        UserWarning, match="check=reward/corect: the run has logged no such series in 10 steps"
    ) as caught:
        for step in range(30):
            list(watch.read(step, {"reward/mean": 0.5, "reward/std": 0.5, "entropy/mean": 0.3}))
    assert len(caught) == 1


def test_a_check_within_its_noise_has_not_risen():
    def trace(later):
        found = Trace(10)
        for value in [0.1, 0.3] * 5 + [later - 0.1, later + 0.1] * 5:
            found.add(value)
        return found

    assert trace(0.25).error == pytest.approx(math.sqrt(2 * 0.01 / 9))
    assert trace(0.25).recent < trace(0.25).early + 2 * trace(0.25).error
    assert trace(0.35).recent > trace(0.35).early + 2 * trace(0.35).error


def test_steps_without_a_number_are_passed_over():
    steps = of("entropy/mean", [0.95**t for t in range(20)])
    for at, hole in enumerate([{}, {"entropy/mean": math.nan}, {"entropy/mean": None}, {"entropy/mean": math.inf}]):
        steps[2 * at + 1] = hole
    watch = EntropySlope(half_life=30, window=10, patience=1, action="log")
    assert gone_off(watch, steps) == [14]  # the tenth good one
    for watch in (Length(low=0.5, high=2, **ONE), IdlePlugin(**ONE), HollowReward(**HOLLOW)):
        assert gone_off(watch, [{"plugin/a/touched": None, "rollout/len": math.nan, "reward/mean": None}] * 30) == []


# ---- episodes and their lines -----------------------------------------------------------------------------------------


def truncated(*shares):
    return of("rollout/truncated", shares)


def watch(**changed):
    series = {"series": "rollout/truncated", "what": "completions cut", "above": 0.5}
    return Share(**{**series, "window": 2, "patience": 3, "action": "log", **changed})


def test_one_line_an_episode():
    # means of three, at least 0.6 from step 3 on; three of them in a row is step 5
    assert gone_off(watch(window=3, above=0.6), truncated(*[1.0] * 50)) == [5]
    assert gone_off(watch(window=3, above=0.6), truncated(*[1.0] * 3, 0.0, 0.0, *[1.0] * 6)) == [9]
    # it is over once three means in a row are below, and not before
    assert gone_off(watch(window=3, patience=2, above=0.6), truncated(*[1.0] * 5, 0, 0, *[1.0] * 10)) == [4]
    assert gone_off(watch(window=3, patience=2, above=0.6), truncated(*[1.0] * 5, 0, 0, 0, *[1.0] * 10)) == [4, 11]


def test_the_line_on_the_terminal_the_record_and_the_alert(tmp_path, capsys):
    told = []
    alarms = Alarms(tmp_path, {"cut": watch(action=["checkpoint", "stop", "wandb.alert"])}, lambda *a: told.append(a))
    for step, metrics in enumerate(truncated(*[0.75] * 9), 1):
        alarms(step, metrics, {})
    said = "75% of completions cut over 2 steps."
    out = capsys.readouterr().out
    assert out == f"ALARM cut at step 4: {said} The run writes a checkpoint and ends here, with its evaluation.\n"
    (line,) = map(json.loads, (tmp_path / "alarms.jsonl").read_text().splitlines())
    actions = ["checkpoint", "stop", "wandb.alert"]
    expected = {"step": 4, "alarm": "cut", "text": said, "value": 0.75, "threshold": 0.5, "action": actions}
    assert line == expected
    ((title, text),) = told
    assert title == "cut at step 4" and text.startswith(said)
    assert alarms.asked == {"checkpoint", "stop"} and alarms.stopped_by == "cut"


def test_an_infinite_value_is_null_in_the_record(tmp_path):
    alarms = Alarms(tmp_path, {"cut": watch()})
    alarms._say(1, "cut", watch(), Reading(True, math.inf, 0.5, "text"))
    assert json.loads((tmp_path / "alarms.jsonl").read_text())["value"] is None


def test_a_run_that_goes_on_alarms_as_if_never_stopped(tmp_path):
    series = truncated(*[1.0] * 6, *[0.0] * 5, *[1.0] * 6)

    def lines(folder, *starts):
        (tmp_path / folder).mkdir()
        for begin, end in starts:
            alarms = Alarms(tmp_path / folder, {"cut": watch(action="stop")})
            for step, metrics in enumerate(series[:begin], 1):
                alarms.replay(step, metrics)
            assert not alarms.asked  # what was asked for then is done
            assert alarms.stopped_by == ("cut" if begin >= 4 else None)
            for step, metrics in enumerate(series[begin:end], begin + 1):
                alarms(step, metrics, {})
        return (tmp_path / folder / "alarms.jsonl").read_text()

    straight = lines("straight", (0, 17))
    assert [json.loads(line)["step"] for line in straight.splitlines()] == [4, 14]
    for middle in (3, 4, 8, 12):
        assert lines(f"again{middle}", (0, middle), (middle, 17)) == straight


def test_alarms_after_the_checkpoint_are_taken_back(tmp_path):
    lines = [json.dumps({"step": step, "alarm": "x"}) for step in (3, 5, 6)]
    (tmp_path / "alarms.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "al')
    rewind(tmp_path, 5)
    assert (tmp_path / "alarms.jsonl").read_text() == "\n".join(lines[:2]) + "\n"


# ---- configuration ----------------------------------------------------------------------------------------------------


def test_the_default_alarms_can_be_made_and_turned_off():
    watches = build.watches(compose([]))
    assert list(watches) == [
        "entropy_floor",
        "entropy_slope",
        "dead_groups",
        "truncation",
        "length",
        "idle_plugin",
        "hollow_reward",
    ]
    assert "length" not in build.watches(compose(["alarm.length=null"]))
    assert build.watches(compose(["alarm=none"])) == {}
    cfg = compose([])
    del cfg["alarm"]  # a run folder from before there were any
    assert build.watches(cfg) == {}
    mine = "{_target_: rl.alarms.Share, series: a, what: b, above: 0.5, window: 5, patience: 1, action: [log, stop]}"
    assert build.watches(compose([f"+alarm.mine={mine}"]))["mine"].actions == ("log", "stop")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alarm.length.action=halt", r"alarm.length.action=halt is not known.*log, checkpoint, stop, wandb.alert"),
        ("alarm.length.action=[]", r"alarm.length.action is empty"),
        ("alarm.length.action=null", r"alarm.length.action is empty"),
        ("alarm.length.action=[log,3]", r"alarm.length.action=3 is not known"),
        ("alarm.length.action=3", r"alarm.length.action=3 is not known"),
        ("alarm.length.window=1", r"alarm.length.window=1 makes no sense. Expected a whole number of at least 2"),
        ("alarm.length.patience=0.5", r"alarm.length.patience=0.5 makes no sense"),
        ("alarm.entropy_slope.window=4", r"alarm.entropy_slope.window=4 is too short for a slope"),
        ("alarm.entropy_floor.floor=0", r"alarm.entropy_floor.floor=0 makes no sense. Expected a number above 0"),
        ("alarm.entropy_floor.within=x", r"alarm.entropy_floor.within=x makes no sense"),
        ("alarm.dead_groups.above=90", r"alarm.dead_groups.above=90 makes no sense.*above 0 and at most 1"),
        ("alarm.dead_groups.above=true", r"alarm.dead_groups.above=True makes no sense"),
        ("alarm.dead_groups.series=null", r"alarm.dead_groups.series=None is no series"),
        ("alarm.length.high=0.9", r"alarm.length.high=0.9 makes no sense. Expected a number of at least 1"),
        ("alarm.hollow_reward.check=5", r"alarm.hollow_reward.check=5 is no series"),
        ("alarm.hollow_reward.rise=nan", r"alarm.hollow_reward.rise=nan makes no sense"),
        (
            "+alarm.mine={_target_: rl.stop.StopSignal}",
            r"alarm.mine is no alarm: rl.stop.StopSignal does not derive from rl.alarms.Watch",
        ),
        ("+alarm.mine={above: 3}", r"alarm.mine=.*above.* is no alarm. Expected a _target_"),
        ("+alarm.mine=3", r"alarm.mine=3 is no alarm"),
        ("+alarm.length.below=1", r"alarm.length: rl.alarms.Length cannot be made.*below"),
    ],
)
def test_settings_that_make_no_sense(override, message):
    with pytest.raises(ConfigError, match=message):
        build.watches(compose([override]))


# ---- actions ----------------------------------------------------------------------------------------------------------


def asked(rank):
    """What each rank does of what the first one's alarms ask for, log by log."""
    alarms = Alarms("unused", {}) if rank == 0 else None
    action, rows = TakeAction(alarms, torch.device("cpu")), []
    for asks in ((), ("checkpoint",), (), ("stop",)):
        control = TrainerControl()
        if alarms is not None:
            alarms.asked |= set(asks)
        action.on_log(None, None, control)
        rows.append([control.should_save, control.should_training_stop, action.stopped])
    return {"rows": rows}


def test_all_ranks_do_what_the_first_one_asks():
    first, second = two_ranks(asked)
    nothing, save, stop = [False] * 3, [True, False, False], [True, True, True]
    assert first == second == {"rows": [nothing, save, nothing, stop]}


@pytest.mark.parametrize(("action", "last"), [("checkpoint", 4), ("stop", 3)])
def test_a_trainer_saves_or_ends_in_the_step_of_the_alarm(tmp_path, action, last):
    model = save_model(tmp_path / "model")
    alarms = Alarms(tmp_path, {"idle": IdlePlugin(window=3, patience=1, action=action)})
    seen = []

    def sink(step, metrics, histograms):
        seen.append(step)
        alarms(step, {"plugin/none/touched": 0.0, **metrics}, histograms)

    extra = {"sinks": [sink], "checkpoints": Checkpoints(tmp_path / "checkpoints", every=None, keep_last=None)}
    trainer = make_trainer(EntropyTrainer, model, tmp_path / "run", max_steps=4, extra=extra)
    take = TakeAction(alarms, trainer.accelerator.device)
    trainer.add_callback(take)
    trainer.train()
    assert seen == list(range(1, last + 1)) and trainer.state.global_step == last
    assert [step for step, _ in found(tmp_path / "checkpoints")] == [3]
    assert take.stopped is (action == "stop") and alarms.stopped_by == ("idle" if action == "stop" else None)
